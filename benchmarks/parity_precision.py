"""Norms without rounding, for the float64 half of `ppo_parity.py`; both trainers import this.

transformers' RMSNorm works in float32 whatever the model's precision. The same product over tensors
of different shapes may differ in its last bit of float64, and where that bit decides how a value is
rounded to float32 the two trainers are 1e-8 apart although they compute the same thing.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from transformers.models.llama import modeling_llama


def _forward(norm, hidden: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (hidden * scale)


@contextmanager
def exact_norms(dtype: str):
    """Llama's norms in float64, when `dtype` says so; a float32 run is unchanged."""
    if dtype != "float64":
        yield
        return
    with mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", _forward):
        yield
