"""What optimizers keep and do, as data: one entry each, named as transformers' `optim`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """`moments`: numbers that it keeps of each parameter, in the precision of the gradients;
    `state_bytes`: bytes of each parameter, whatever its precision. `workspace`: what a step needs
    on top: "root", √v of all parameters at once (GPU) or of one at a time; "update", fp32
    tensors of one parameter at a time (transformers' optimization.py)."""

    moments: float = 0.0
    state_bytes: float = 0.0
    factored: bool = False
    """it keeps sums of rows and columns instead of whole moments"""
    workspace: Literal["none", "root", "update"] = "none"
    fused: bool = False
    """a step reads and writes everything once"""
    eight_bit: bool = False
    """states in bytes, those of small tensors and embeddings whole (`states.py`)"""
    paged: bool = False
    """a GPU's states are in managed memory: what it has no room for waits in main memory"""


BLOCK = 256
"""Numbers of an 8-bit state that share a scale in fp32."""
_8BIT = Optimizer(state_bytes=2 + 2 * 4 / BLOCK, eight_bit=True)
OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch_fused": Optimizer(moments=2.0, fused=True),
    "adamw_torch": Optimizer(moments=2.0, workspace="root"),
    "adamw_bnb_8bit": _8BIT,
    "paged_adamw_8bit": replace(_8BIT, paged=True),
    "paged_adamw_32bit": Optimizer(state_bytes=8, paged=True),
    "adafactor": Optimizer(factored=True, workspace="update"),
    "sgd": Optimizer(fused=True),
}
