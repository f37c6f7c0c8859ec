"""Runs one rank of two, over gloo: `distributed_worker.py SCENARIO RANK FOLDER`; leaves what it found in FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import paca

RANKS = 2
BATCH = 4  # rows of the whole batch; a rank has its part
Found = dict[str, Any]


def steps(model: Any, rows: slice, number: int = 4) -> list[float]:
    """Train on this rank's rows of one batch; returns this rank's losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    losses = []
    for _ in range(number):
        ids = tiny.tokens(BATCH)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mine() -> slice:
    """This rank's rows."""
    per_rank = BATCH // RANKS
    return slice(dist.get_rank() * per_rank, (dist.get_rank() + 1) * per_rank)


def ddp(folder: Path) -> Found:
    """Plain DistributedDataParallel."""
    model = tiny.adapted(tiny.llama())
    losses = steps(DistributedDataParallel(model), mine())
    paca.verify(model)
    return {"losses": losses, "adapter": get_peft_model_state_dict(model), "logits": tiny.logits(model)}


def ddp_unseeded(folder: Path) -> Found:
    """Every rank draws columns of its own; DistributedDataParallel sends rank 0's to the others."""
    base = tiny.llama()
    torch.manual_seed(100 + dist.get_rank())
    model = tiny.adapted(base, random_seed=None)
    drawn = [layer.paca_indices["default"].tolist() for layer in tiny.layers_of(model)]
    steps(DistributedDataParallel(model), mine())
    paca.verify(model)
    found: Found = {"drawn": drawn, "adapter": get_peft_model_state_dict(model), "logits": tiny.logits(model)}
    found["unloaded"] = tiny.weights_of(model.unload())
    return found


def shard(model: Any, reshard: bool) -> Any:
    """Give each rank half of every block, and of the rest."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """The full state dict, on every rank."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def fsdp2(folder: Path, reshard: bool = True, dtype: torch.dtype = torch.float32) -> Found:
    """`fully_shard` on a fresh adapter."""
    model = shard(tiny.adapted(tiny.llama(dtype)), reshard)
    losses = steps(model, mine())
    found: Found = {"losses": losses, "logits": tiny.logits(model), "state": whole_state(model)}
    found["residency"] = {layer.residency for layer in tiny.layers_of(model)}
    with model.disable_adapter():
        found["disabled"] = tiny.logits(model)
    found["again"] = tiny.logits(model)
    return found


def fsdp2_kept(folder: Path) -> Found:
    """`fully_shard` that keeps the whole weight from forward to backward."""
    return fsdp2(folder, reshard=False)


def fsdp2_bfloat16(folder: Path) -> Found:
    """`fully_shard` of a bfloat16 model with float32 deltas."""
    return fsdp2(folder, dtype=torch.bfloat16)


def fsdp2_loaded(folder: Path) -> Found:
    """`fully_shard` on an adapter that has an effect, and whose columns the weight held before it was sharded."""
    model = PeftModel.from_pretrained(tiny.llama(), folder / "adapter", is_trainable=True)
    tiny.logits(model)
    model = shard(model, reshard=True)
    found: Found = {"before": tiny.logits(model)}
    with model.disable_adapter():
        found["disabled"] = tiny.logits(model)
    found["losses"] = steps(model, mine())
    found["logits"] = tiny.logits(model)
    found["state"] = whole_state(model)
    return found


def fsdp2_at_once(folder: Path) -> Found:
    """The same, asked for the base model before any forward."""
    model = PeftModel.from_pretrained(tiny.llama(), folder / "adapter", is_trainable=True)
    model = shard(model, reshard=True)
    found: Found = {"state": whole_state(model)}
    with model.disable_adapter():
        found["disabled"] = tiny.logits(model)
    found["logits"] = found["before"] = tiny.logits(model)
    return found


def fsdp2_gathered(folder: Path) -> Found:
    """The same, asked while every weight is gathered and no shard can be written."""
    model = PeftModel.from_pretrained(tiny.llama(), folder / "adapter")
    model = shard(model, reshard=False)
    found: Found = {"logits": tiny.logits(model)}
    try:
        with model.disable_adapter():
            found["disabled"] = tiny.logits(model)
    except RuntimeError as error:
        found["refused"] = str(error)
    return found


SCENARIOS: dict[str, Callable[[Path], Found]] = {
    scenario.__name__: scenario
    for scenario in (ddp, ddp_unseeded, fsdp2, fsdp2_kept, fsdp2_bfloat16, fsdp2_loaded, fsdp2_at_once, fsdp2_gathered)
}


def main(rank: int, folder: Path) -> None:
    """Run every scenario; save what it found, or the error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS)
    for name, scenario in SCENARIOS.items():
        dist.barrier()
        try:
            found = scenario(folder)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
