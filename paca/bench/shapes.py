"""The sizes of the measured model: a stack of Llama decoder layers without vocabulary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a stack and of the batch it is trained on.

    Attributes:
        layers: decoder layers.
        hidden: width of the residual stream.
        ffn: width of gate and up.
        heads: query heads.
        kv_heads: key and value heads.
        batch: sequences a step.
        tokens: tokens a sequence.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    batch: int
    tokens: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the seven linear maps of one layer: q, k, v, o, gate, up, down."""
        kv = self.hidden // self.heads * self.kv_heads
        h, f = self.hidden, self.ffn
        return (h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the batch."""
        return self.batch * self.tokens

    def check(self) -> None:
        """Refuse sizes that no Llama can have.

        Raises:
            ValueError: naming the size and its remedy.
        """
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {size}")
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ValueError(
                f"--hidden {self.hidden} must be --heads {self.heads} times an even head size (rotary embeddings pair "
                f"its channels); --hidden {self.heads * 64} would do"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}")


SHAPES = {
    "tiny": Shape(layers=2, hidden=64, ffn=176, heads=4, kv_heads=2, batch=1, tokens=64),
    "small": Shape(layers=2, hidden=512, ffn=1408, heads=8, kv_heads=2, batch=1, tokens=512),
    "stack": Shape(layers=4, hidden=1024, ffn=2816, heads=16, kv_heads=4, batch=2, tokens=512),
    "decode": Shape(layers=4, hidden=1024, ffn=2816, heads=16, kv_heads=4, batch=1, tokens=16),
    # Four layers with Llama-3-8B's dimensions, of which a dozen copies fit on a large GPU.
    "llama-3-8b-train": Shape(layers=4, hidden=4096, ffn=14336, heads=32, kv_heads=8, batch=1, tokens=4096),
    # Layers of Llama-3.1-70B; all 80 of them hold 35 GB in NF4.
    "llama-3-70b": Shape(layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, batch=1, tokens=512),
    # Two layers with Llama-3-8B's dimensions, few tokens: enough to count bytes, too few to time.
    "llama-3-8b": Shape(layers=2, hidden=4096, ffn=14336, heads=32, kv_heads=8, batch=1, tokens=16),
}


def matching_lora_rank(shape: Shape, paca_rank: int) -> int:
    """Return the LoRA rank that trains as many parameters as PaCA does: PaCA has r·out a linear, LoRA r'·(in + out)."""
    paca = paca_rank * sum(wide for _, wide in shape.linears)
    return max(1, round(paca / sum(narrow + wide for narrow, wide in shape.linears)))
