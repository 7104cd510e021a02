"""NF4 on a CPU: matrices that bitsandbytes stores rightly and reads wrongly, read rightly.

bitsandbytes 0.50 dequantises row by row on a CPU, and a block of 64 weights that lies in two rows
gets the wrong scale: where the width is even and no multiple of 64. The same bytes as one flat
vector are read rightly.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

Weight = Any
"""A `Params4bit`: packed bytes, with the state that says how to read them."""


def read_flat(model: nn.Module) -> None:
    """Let the 4-bit layers of such widths read their weights as one vector."""
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit) and layer.in_features % 64 and layer.in_features % 2 == 0:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def dequantised(weight: Weight) -> Tensor:
    """The weights that the bytes of a matrix stand for. → (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    state.shape = torch.Size([weight.quant_state.shape.numel()])
    flat: Tensor = dequantize_4bit(weight.data.view(-1, 1), state)
    return flat.view(weight.quant_state.shape)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = _Product.apply(x, layer.weight)  # type: ignore[no-untyped-call]
    return out if layer.bias is None else out + layer.bias


class _Context(FunctionCtx):
    """What the backward pass of `_Product` needs."""

    weight: Weight


class _Product(torch.autograd.Function):
    """x·Wᵀ, whose dense W is made anew for the backward pass and not kept."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return x @ dequantised(weight).to(x.dtype).t()

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dequantised(ctx.weight).to(grad.dtype), None
