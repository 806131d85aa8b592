"""Arguments of kv_append and of the op below it."""

import torch
from rope_cases import make

CANARY = -77.0  # in every row of a cache that nothing was written to


def make_all(**kwargs):
    q, k, q_weight, k_weight, positions = make(**kwargs)
    return q, k, torch.randn_like(k), q_weight, k_weight, positions


def low_level(cache_dtype=torch.float32, slots=(6, -1, 0, 2, -3), **kwargs):
    """Arguments of the op itself: rows in any order, negative ones are left out."""
    arguments = make_all(**kwargs)
    k = arguments[1]
    shape = (k.shape[0], 8, *k.shape[2:])
    k_cache, v_cache = (torch.full(shape, CANARY, dtype=cache_dtype, device=k.device) for _ in range(2))
    return (*arguments, torch.tensor(slots, dtype=torch.int32, device=k.device), k_cache, v_cache, 1e-6, 1e4, False)
