"""`python -m paca_hpu` prints what PaCA should cost on a Gaudi, on paper."""

from paca_hpu.cost import frozen_seconds, gather_table, overhead_table

TOKENS = 4096

print(f"One layer of Llama-3-8B in bfloat16, {TOKENS} tokens, on paper.\n")
print("\n".join(gather_table(TOKENS)))
print(f"\nThe frozen GEMMs (forward and dX) take {1e6 * frozen_seconds(TOKENS):.0f} µs.\n")
print("\n".join(overhead_table(TOKENS)))
