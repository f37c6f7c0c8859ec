#!/usr/bin/env bash
# Tests and measures the CUDA backend on a machine with a GPU, from a bare checkout: nothing is installed or downloaded,
# except from a folder of wheels if there is one.
#
#     ci/gpu.sh tests           versions, the tests of the kernels and of the backend, parity, predicted memory
#     ci/gpu.sh bench [WORD…]   the strategies, then the GPU suite, most telling runs first; only runs with a WORD if given
#     ci/gpu.sh all             both
#
# Variables:
#   PYTHON    the interpreter that has torch, transformers and peft; default python3
#   MINUTES   the time for the whole call; default 9. What does not fit is left, and the next call goes on with it
#   RESULTS   where the suite's results lie, those of earlier calls too; default benchmarks/results/gpu
#   OUT       where logs and gpu.tar.gz go, which holds the results and what was tuned; default gpu-out
#   WHEELS    a folder of wheels to install first, into a folder of their own; default .whl, if it is there
#   BACKEND   what is measured; default cuda. "cpu" tries the call out where there is no GPU, with SIZES="--shape=tiny"
set -uo pipefail
cd "$(dirname "$0")/.." || exit
stage=${1:-}
case $stage in tests | bench | all) shift ;; *)
    sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3- >&2
    exit 2
    ;;
esac
PYTHON=${PYTHON:-python3} MINUTES=${MINUTES:-9} RESULTS=${RESULTS:-benchmarks/results/gpu} OUT=${OUT:-gpu-out}
WHEELS=${WHEELS:-.whl} BACKEND=${BACKEND:-cuda} SIZES=${SIZES:-}
end=$((SECONDS + $("$PYTHON" -c "print(int(60 * $MINUTES))"))) || exit 2
export PYTHONPATH=$PWD:$PWD/backends PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
mkdir -p "$OUT" "$RESULTS" || exit 2
RESULTS=$(cd "$RESULTS" && pwd)
export PACA_CACHE=$RESULTS/tuned
failed=0

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH=$site:$PYTHONPATH
fi
"$PYTHON" - <<'CHECK' || exit 2
import sys
from importlib.metadata import PackageNotFoundError, version
from packaging.version import Version

needed = {"torch": "2.10", "peft": "0.21.2", "transformers": "4.55", "psutil": "5.9", "tqdm": "4.66", "pytest": "8.2", "hypothesis": "6.100"}
wrong = []
for name, least in needed.items():
    try:
        if Version(version(name)) < Version(least):
            wrong.append(f"{name} {version(name)} is too old, {least} is needed")
    except PackageNotFoundError:
        wrong.append(f"{name} is missing, {least} or newer is needed")
sys.exit("\n".join([*wrong, "put their wheels into the folder that WHEELS names"]) if wrong else 0)
CHECK

# step NAME SECONDS COMMAND…: run it, in at most so many seconds and the time that is left, with a log of its own.
step() {
    local name=$1 seconds=$2 began=$SECONDS status
    shift 2
    ((seconds > end - SECONDS)) && seconds=$((end - SECONDS))
    if ((seconds < 5)); then
        echo "==> $name: no time left"
        failed=1
        return
    fi
    echo "==> $name: $*"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"
    status=${PIPESTATUS[0]}
    echo "==> $name: status $status after $((SECONDS - began)) s"
    ((status == 0)) || failed=1
}

step env 60 "$PYTHON" -m paca env
if [[ $stage != bench ]]; then
    if [[ $BACKEND == cuda ]]; then
        # A warning that this project has not met yet must not cost the hour: they are shown, and are no errors here.
        # What only compiles needs no GPU.
        workers=$("$PYTHON" -c 'import xdist; print("-n 6")' 2>/dev/null)
        # shellcheck disable=SC2086
        step tests 360 "$PYTHON" -m pytest -q -W default -p no:cacheprovider --maxfail=20 $workers tests/device/cuda \
            --ignore tests/device/cuda/test_kernels_compile.py
    fi
    modes=(--graph eager)
    [[ $BACKEND == cuda ]] && modes+=(--graph cuda_graph)
    step parity 120 "$PYTHON" -m paca parity verify --backend "$BACKEND" "${modes[@]}" --json "$OUT/parity.json"
    step estimate 90 "$PYTHON" -m paca.estimate.check --backend "$BACKEND" --dtype bfloat16 --methods lora,paca --json "$OUT/estimate.json"
    if [[ $BACKEND == cuda ]]; then # what is compiled takes longest, and is shown as it comes
        # shellcheck disable=SC2086
        step compiled 180 "$PYTHON" -m pytest -v -W default -p no:cacheprovider $workers --backend cuda -k compile \
            tests/parity/test_every_backend.py
    fi
fi
if [[ $stage != tests ]]; then
    if [[ ! -e $RESULTS/strategies/$BACKEND.json && $# == 0 && -z $SIZES ]]; then
        mkdir -p "$RESULTS/strategies"
        step strategies 90 "$PYTHON" benchmarks/strategies.py --backend "$BACKEND" --rounds 20 \
            --only gather --only grad_columns --only write --tokens 4096 --inputs 4096 --outputs 14336 --out "$RESULTS/strategies/$BACKEND.json"
    fi
    left=$("$PYTHON" -c "print(max(0, $end - $SECONDS - 40) / 60)")
    if [[ $left != 0.0 ]]; then
        # shellcheck disable=SC2086
        step bench 100000 "$PYTHON" -m paca bench --suite gpu --backend "$BACKEND" --out "$RESULTS" --minutes "$left" \
            $SIZES ${1:+--only "$(IFS=,; echo "$*")"}
    fi
    if compgen -G "$RESULTS/*.json" >/dev/null; then
        "$PYTHON" -m paca bench --report "$RESULTS" --markdown >"$OUT/summary.md"
    fi
fi
tar -czf "$OUT/gpu.tar.gz" -C "$(dirname "$RESULTS")" "$(basename "$RESULTS")"
exit $failed
