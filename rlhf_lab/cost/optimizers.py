"""What optimizers keep and do, as data: one entry each, named as transformers' `optim`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """`moments`: numbers that it keeps of each parameter, in the precision of the gradients;
    `state_bytes`: bytes of each parameter, whatever its precision. `workspace`: what a step needs
    on top: "root", √v of all parameters at once (GPU) or of one at a time; "update", an fp32 tensor
    of the largest parameter's size."""

    moments: float = 0.0
    state_bytes: float = 0.0
    factored: bool = False
    """it keeps sums of rows and columns instead of whole moments"""
    workspace: Literal["none", "root", "update"] = "none"
    fused: bool = False
    """a step reads and writes everything once"""


_8BIT = Optimizer(state_bytes=2 + 2 * 4 / 256)
"""two bytes, and two fp32 scales per block of 256"""
OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch_fused": Optimizer(moments=2.0, fused=True),
    "adamw_torch": Optimizer(moments=2.0, workspace="root"),
    "adamw_bnb_8bit": _8BIT,
    "paged_adamw_8bit": _8BIT,
    "adafactor": Optimizer(factored=True, workspace="update"),
    "sgd": Optimizer(fused=True),
}
