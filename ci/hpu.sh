#!/usr/bin/env bash
# What can be proven about Gaudi without one: the real GaudiTrainer on a stand-in and on an emulated device.
#
#     ci/hpu.sh [VENV]             VENV is where the project's own environment is, .venv by default
#     ci/hpu.sh --install [VENV]   only make the second environment, which the tests need
#
# optimum-habana pins an older transformers, so it gets an environment of its own, .cache/hpu-venv, which is kept. It is
# installed without dependencies beside exactly what its GaudiTrainer imports (requirements/hpu.txt): with all that it
# declares it would take twice as long. On a machine with the vendor's software the tests are left out: there,
# `PACA_TEST_HPU=device` runs them on the device (docs/gaudi.md).
set -euo pipefail
cd "$(dirname "$0")/.."
only_install=
if [ "${1:-}" = --install ]; then
    only_install=yes
    shift
fi
own=$(realpath -m "${1:-.venv}")
venv=.cache/hpu-venv
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD:$PWD/backends:$PWD/tests:$PWD/tests/device/hpu"

if "$own/bin/python" -c 'import sys; from importlib.util import find_spec; sys.exit(find_spec("habana_frameworks") is None)'; then
    echo "habana_frameworks is installed: the stand-in must not shadow it, so nothing is run"
    exit 0
fi

key=$(cat requirements/hpu.txt "$own/torch.txt" | sha256sum | cut -c1-16)
if [ ! -e "$venv/$key" ]; then
    rm -rf "$venv"
    ci/venv.sh "${PYTHON:-$own/bin/python}" "$venv" "$(cat "$own/torch.txt")" "${TORCH_INDEX-https://download.pytorch.org/whl/cpu}"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r requirements/hpu.txt
    touch "$venv/$key"
fi
[ -z "$only_install" ] || exit 0

# run PLACE LAZY ENVIRONMENT TESTS...
run() {
    local place=$1 lazy=$2 python=$3/bin/python
    shift 3
    printf '\n--> %s, PT_HPU_LAZY_MODE=%s: %s\n' "$place" "$lazy" "$*"
    PACA_TEST_HPU=$place PT_HPU_LAZY_MODE=$lazy "$python" -m pytest -q -p hpu_place -p no:cacheprovider "$@"
}

gaudi=tests/device/hpu/test_gaudi_trainer.py
standin() {
    PACA_OTHER_PYTHON=$own/bin/python run standin 1 "$venv" "$gaudi" tests/device/hpu/test_checkpoint_exchange.py &&
        run standin 0 "$venv" "$gaudi" -k 'compile_mode or the_real_one or (same_bits and True) or merging'
}
emulated() {
    run emulated 0 "$own" tests/device/hpu/test_emulated_device.py &&
        run emulated 0 "$own" tests/parity/test_every_backend.py --backend hpu -k 'each_strategy or eager' &&
        run emulated 1 "$venv" "$gaudi" -k 'the_real_one or True-True or True-False or same_bits or merging or planted'
}

# Each process keeps one core busy, so the two halves run side by side; what the first prints is shown when it has ended.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
standin >"$log" 2>&1 &
half=$!
failed=
if why=$("$own/bin/python" -c 'import emulated_device; why = emulated_device.why_not(); print(why or ""); raise SystemExit(bool(why))'); then
    emulated || failed="the emulated device"
    emulated="gradients bit for bit with the CPU, GaudiTrainer and transformers' own Trainer under autocast on a device that torch calls hpu"
else
    emulated="NOT the emulated device: $why"
fi
wait "$half" || failed="$failed the stand-in"
cat "$log"
if [ -n "$failed" ]; then
    printf '\nfailed on: %s\n' "$failed" >&2
    exit 1
fi

cat <<END

Exercised: optimum-habana $("$venv/bin/python" -c 'from importlib.metadata import version as v; print(v("optimum-habana"), "with transformers", v("transformers"))'), GaudiTrainer in lazy and in compile mode: loss, save, resume, merge;
  its checkpoints on the Trainer of transformers $("$own/bin/python" -c 'import transformers; print(transformers.__version__)'), and the other way round;
  $emulated.
Not exercised, because it takes a Gaudi: the vendor's bridge and compiler, HPU graphs, HCCL, its kernels' numerics, speed and memory.
END
