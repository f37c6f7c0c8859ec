#!/usr/bin/env bash
# Write gaudi-report.txt: what only a Gaudi can show, for people who have none.
#
#     make gaudi-report                              on a machine, or in a container, with the Gaudi software
#     ci/gaudi_report.sh .venv hpu-rehearsal         the same commands on any CPU, to see that they run
#
# Each part is run whatever became of the others, and ends with its exit status. It reports even where no device is found.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath -m "${1:-.venv}")/bin
backend=${2:-hpu}
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

# part MODE COMMAND...
part() {
    local mode=$1 began=$SECONDS
    shift
    printf '\n==> PT_HPU_LAZY_MODE=%s: %s\n' "$mode" "$*"
    PT_HPU_LAZY_MODE=$mode PACA_TEST_HPU=device timeout 1800 "$bin/python" -m "$@"
    printf '==> exit status %d after %d s\n' $? $((SECONDS - began))
}

report() {
    part 0 paca env
    for mode in 0 1; do
        part "$mode" paca parity verify --backend "$backend"
        part "$mode" pytest -q -rs --tb=short tests/device/hpu/test_emulated_device.py tests/device/hpu/test_hpu_strategies.py
        part "$mode" paca doctor --graphs recipes/quickstart.yaml --backend "$backend" --steps 20 \
            --attn_implementation eager --packing true --dtype bfloat16
        part "$mode" paca train recipes/quickstart.yaml --backend "$backend" --packing true --attn_implementation eager \
            --dtype bfloat16 --bf16 true --output_dir "runs/gaudi/$mode"
        part "$mode" paca bench --backend "$backend" --methods floor,paca-r8,paca-r64,lora-r8 --dtype bfloat16 --out "runs/gaudi/bench-$mode.json"
    done
    part 0 benchmarks.strategies --backend "$backend" --rounds 15 --out runs/gaudi/strategies.json
}

mkdir -p runs/gaudi
report 2>&1 | tee gaudi-report.txt
echo "attach gaudi-report.txt to an issue"
