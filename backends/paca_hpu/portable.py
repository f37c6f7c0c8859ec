"""Optimizer and scheduler states of GaudiTrainer in the form that transformers' own Trainer writes and reads.

Both have two groups of parameters, with weight decay and without; GaudiTrainer leaves an empty one out, because
FusedAdamW cannot take it. FusedAdamW counts its steps in the group and leaves each parameter's own `step` at 0, with
which torch's AdamW would start its bias correction again; and its groups lack options that AdamW goes by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

_GROUPS = 2
_OF_EACH_GROUP = ("base_lrs", "_last_lr", "lr_lambdas")


def make_portable(optimizer: Optimizer) -> None:
    """Let an optimizer save and load the common form from now on."""
    if not hasattr(optimizer, "_paca_portable"):
        optimizer._paca_portable = True  # type: ignore[attr-defined]
        optimizer.register_state_dict_post_hook(_common_form)
        optimizer.register_load_state_dict_pre_hook(_own_form)


def make_scheduler_portable(scheduler: Any, optimizer: Optimizer) -> None:
    """Let a scheduler save and load one value for each group of the common form."""
    if hasattr(scheduler, "_paca_portable"):
        return
    save, load, groups = scheduler.state_dict, scheduler.load_state_dict, len(optimizer.param_groups)

    def state_dict() -> dict[str, Any]:
        state = dict(save())
        del state["_paca_portable"], state["state_dict"], state["load_state_dict"]
        for name in _OF_EACH_GROUP:
            if name in state:
                state[name] = [*state[name], *state[name][-1:] * (_GROUPS - groups)]
        return state

    def load_state_dict(state: dict[str, Any]) -> None:
        load({name: value[:groups] if name in _OF_EACH_GROUP else value for name, value in state.items()})

    scheduler._paca_portable = True
    scheduler.state_dict, scheduler.load_state_dict = state_dict, load_state_dict


def _common_form(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    # Without `decoupled_weight_decay` in a group, torch would load it into AdamW as Adam with L2 regularisation.
    options = torch.optim.AdamW([torch.zeros(1)]).defaults
    groups = [{**options, **group} for group in state["param_groups"]]
    states = dict(state["state"])
    for group in groups:
        steps = group.pop("step", None)  # AdamW would carry it along and never raise it
        for number in group["params"] if steps is not None else ():
            if number in states:
                states[number] = {**states[number], "step": torch.tensor(float(steps))}
    while 0 < len(groups) < _GROUPS:
        groups.append({**groups[-1], "weight_decay": 0.0, "params": []})
    return {**state, "state": states, "param_groups": groups}


def _own_form(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = [dict(group) for group in state["param_groups"]]
    if len(groups) != len(optimizer.param_groups):
        groups = [group for group in groups if group["params"]]
    for group in groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)
        steps = [
            state["state"][number]["step"] for number in group["params"] if "step" in state["state"].get(number, {})
        ]
        if steps and type(optimizer).__name__ == "FusedAdamW":
            group["step"] = int(max(steps))
    return {**state, "param_groups": groups}
