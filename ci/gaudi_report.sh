#!/usr/bin/env bash
# Write gaudi-report.txt: what only a Gaudi can show, for people who have none.
#
#     make gaudi-report                              on a machine, or in a container, with the Gaudi software
#     ci/gaudi_report.sh .venv hpu-rehearsal         the same commands on any CPU, shortened, to see that they run
#
# Each part is run whatever became of the others, and ends with its exit status. It reports even where no device is found.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath -m "${1:-.venv}")/bin
backend=${2:-hpu}
place=device steps=20 size=(--dtype bfloat16) train=(--bf16 true) bench=(--rounds 15)
if [ "$backend" != hpu ]; then
    place='' steps=3 size=(--dtype float32) train=(--max_steps 2 --max_eval_samples 8 --prompts '[]') bench=(--rounds 2 --shape tiny)
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

# part MODE COMMAND...
part() {
    local mode=$1 began=$SECONDS
    shift
    printf '\n==> PT_HPU_LAZY_MODE=%s: %s\n' "$mode" "$*"
    PT_HPU_LAZY_MODE=$mode PACA_TEST_HPU=$place timeout 1800 "$bin/python" -m "$@"
    printf '==> exit status %d after %d s\n' $? $((SECONDS - began))
}

# graph MODE GRAPH: one graph mode of a process's mode
graph() {
    local mode=$1 graph=$2
    local recipe=(recipes/quickstart.yaml --backend "$backend" --strategies "{graph: $graph}" --attn_implementation eager
        --packing true "${size[@]}")
    part "$mode" paca doctor --graphs "${recipe[@]}" --steps "$steps"
    part "$mode" paca train "${recipe[@]}" "${train[@]}" --output_dir "runs/gaudi/$graph"
    part "$mode" paca bench --backend "$backend" --graph whole --strategies "graph=$graph" "${size[@]}" "${bench[@]}" \
        --methods floor,paca-r8,paca-r64,lora-r8 --out "runs/gaudi/bench-$graph.json"
}

report() {
    part 0 paca env
    for mode in 0 1; do
        part "$mode" paca parity verify --backend "$backend"
        part "$mode" pytest -q -rs --tb=short tests/device/hpu/test_emulated_device.py tests/device/hpu/test_hpu_strategies.py
    done
    graph 0 eager
    graph 0 compile
    graph 1 lazy
    if [ "$backend" = hpu ]; then graph 1 hpu_graphs; fi
    part 0 benchmarks.strategies --backend "$backend" "${bench[@]:0:2}" --out runs/gaudi/strategies.json
}

mkdir -p runs/gaudi
report 2>&1 | tee gaudi-report.txt
echo "attach gaudi-report.txt to an issue"
