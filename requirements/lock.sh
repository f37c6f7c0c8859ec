#!/bin/sh
# Write constraints.txt and hpu-image.txt anew: `make lock` keeps the pins that still fit, `make lock ARGS=--upgrade` takes
# the newest versions. One file serves every supported Python: where the newest release has left the oldest one behind, both
# versions are listed.
set -eu
cd "$(dirname "$0")/.."

# lock FILE ARGS...: torch is installed beforehand, and only its CUDA builds need the rest of what is left out.
lock() {
    file=requirements/$1
    shift
    uv pip compile pyproject.toml --universal --no-annotate --no-header --quiet --output-file "$file" "$@" >/dev/null
    {
        echo "# Written by requirements/lock.sh from pyproject.toml and requirements/build.in."
        grep -v -E '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' "$file"
    } >"$file.new"
    mv "$file.new" "$file"
}

lock constraints.txt requirements/build.in --extra dev --extra quant --python-version 3.10 "$@"
# The vendor's image has Python 3.12; 3.11 is what the image's steps are tried with.
lock hpu-image.txt requirements/build.in --extra train --extra hpu --python-version 3.11 "$@"
