#!/bin/sh
# Make or repair the virtual environment VENV and put torch in it; write the version found there to VENV/torch.txt.
#
#     ci/venv.sh PYTHON VENV TORCH TORCH_INDEX
#
# torch goes first and by itself: named as a mere dependency it would come as the default Linux build, which drags in
# gigabytes of CUDA libraries. A torch that VENV already has is kept. Nothing is ever removed.
#
#   TORCH        a requirement such as torch==2.13.0, or "system": the torch that PYTHON itself has, as vendors' images do
#   TORCH_INDEX  a further package index to look in; its local builds (+cpu) win over the default ones of the same version
set -eu
python=$1 venv=$2 torch=$3 torch_index=$4

fail() {
    echo "error: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "no '$python' on the PATH: install Python 3.10 or newer, or pass PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version 2>&1) is too old: install Python 3.10 or newer, or pass PYTHON=/path/to/python3.11"

system_packages=
if [ "$torch" = system ]; then
    "$python" -c 'import torch' || fail "TORCH=system asks for the torch of '$python', which cannot import one"
    system_packages=--system-site-packages
    # The Gaudi images have pip without ensurepip, which venv installs pip with; the environment then sees that pip.
    "$python" -c 'import ensurepip' 2>/dev/null || system_packages="$system_packages --without-pip"
fi

venv_python=$venv/bin/python
if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    echo "Making the virtual environment $venv with $("$python" --version)"
    "$python" -m venv $system_packages "$venv" ||
        fail "'$python -m venv' failed: Debian and Ubuntu have it in the package python3-venv"
fi

if "$venv_python" -c 'import torch' 2>/dev/null; then
    echo "Keeping the torch that $venv sees"
elif [ "$torch" = system ]; then
    fail "$venv was made without TORCH=system and does not see the torch of '$python': run 'make clean' first"
else
    echo "Installing $torch"
    # A wheel that pip is set up to find on disk (find-links) needs no index at all.
    "$venv_python" -m pip install -q --no-index --no-deps "$torch" 2>/dev/null ||
        "$venv_python" -m pip install -q ${torch_index:+--extra-index-url "$torch_index"} "$torch"
fi

if [ -n "$torch_index" ] && "$venv_python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
    echo "warning: $torch_index did not give its CPU build, so $venv has torch for CUDA, with gigabytes of libraries: see TORCH_INDEX in the Makefile" >&2
fi

"$venv_python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$venv/torch.txt.new"
mv "$venv/torch.txt.new" "$venv/torch.txt"
echo "$venv has $(cat "$venv/torch.txt")"
