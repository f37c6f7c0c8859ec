import torch

from ..calls import note


def manual_seed(seed):
    note("manual_seed", seed=seed)


def manual_seed_all(seed):
    note("manual_seed_all", seed=seed)


def get_rng_state(device="hpu"):
    return torch.random.get_rng_state()


def set_rng_state(state, device="hpu"):
    note("set_rng_state")


def get_rng_state_all():
    return [get_rng_state()]


def set_rng_state_all(states):
    note("set_rng_state_all")
