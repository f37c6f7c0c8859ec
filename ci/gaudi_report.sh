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
place=device steps=20 dtype=bfloat16 size=() train=(--bf16 true) bench=(--rounds 15) parity=('' '')
if [ "$backend" != hpu ]; then
    # Two small layers with the quick start's tokenizer, one graph mode for each process, and no peaks: there is no device to ask for them.
    place='' steps=3 dtype=float32 size=(--model_name_or_path runs/gaudi/tiny --max_length 32)
    train=(--max_steps 2 --max_eval_samples 8 --prompts '[]') bench=(--rounds 2 --shape tiny --measure "time,bytes")
    parity=('--graph=eager' '--graph=lazy')
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
        --packing true --dtype "$dtype" "${size[@]}")
    part "$mode" paca doctor --graphs "${recipe[@]}" --steps "$steps"
    part "$mode" paca train "${recipe[@]}" "${train[@]}" --output_dir "runs/gaudi/$graph"
    part "$mode" paca bench --backend "$backend" --graph whole --strategies "graph=$graph" --dtype "$dtype" "${bench[@]}" \
        --methods floor,paca-r8,paca-r64,lora-r8 --out "runs/gaudi/bench-$graph.json"
}

report() {
    part 0 paca env
    for mode in 0 1; do
        part "$mode" paca parity verify --backend "$backend" ${parity[mode]:+"${parity[mode]}"}
        part "$mode" pytest -q -rs --tb=short tests/device/hpu/test_emulated_device.py tests/device/hpu/test_hpu_strategies.py
    done
    graph 0 eager
    graph 0 compile
    graph 1 lazy
    if [ "$backend" = hpu ]; then graph 1 hpu_graphs; fi
    part 0 benchmarks.strategies --backend "$backend" "${bench[@]:0:2}" --out runs/gaudi/strategies.json
}

tiny() {
    "$bin/python" - <<'END'
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from paca.quickstart import resolve

source = resolve("quickstart:smollm2-135m")
sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
config = AutoConfig.from_pretrained(source, num_hidden_layers=2, layer_types=None, **sizes)
AutoModelForCausalLM.from_config(config).save_pretrained("runs/gaudi/tiny")
AutoTokenizer.from_pretrained(source).save_pretrained("runs/gaudi/tiny")
END
}

mkdir -p runs/gaudi
if [ "$backend" != hpu ]; then tiny; fi
report 2>&1 | tee gaudi-report.txt
echo "attach gaudi-report.txt to an issue"
