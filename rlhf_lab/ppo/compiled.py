"""`torch_compile`: one decoder layer compiled, and shared by all layers and models of its shape.

Regional compilation: a layer's Python is compiled once by inductor, for any number of rows and
tokens, forward and backward, instead of a whole model for each. Weights are inputs of what is
compiled, so that all layers of one shape run the same code; modules keep their names, and
checkpoints do not change. The work on logits beside the head's product is compiled too
(`ppo/logprobs.py`). Decoding with a cache stays as it is: its passes are so small that checking
whether compiled code fits takes what the code saves. So do passes of one row or one token, for
which inductor would make other code.

A dispatch mode (the meter's counters) sees what compiled code does: its products, its buffers.
Compiled once, code lies in inductor's cache on the disk (`TORCHINDUCTOR_CACHE_DIR`, else a folder
of the user's among temporary files), and the next process finds it there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _pop_mode,
    _push_mode,
)
from transformers import Cache

from ..models.device import cannot_compile

Code = Callable[..., Any]
"""A function of tensors, or what was compiled of one."""
VARIANTS = 64
"""Ways in which a layer may be called (trained or not, adapters on or off, models of other shapes),
each compiled for itself; torch refuses one more."""
_heads: WeakSet[nn.Module] = WeakSet()
_seeing: list[TorchDispatchMode] = []


def compile_layers(*models: Any) -> None:
    """Compile the decoder layers of these models, when they first run, and what is done with their
    logits. Raises ValueError, one line, for models and machines that this is not for."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if why := cannot_compile():
        raise ValueError(f"torch_compile: {why}")
    _let_modes_see()
    for model in models:
        whole = getattr(model, "whole", model)  # of a `RoleView`
        name, config = type(whole).__name__, whole.config.get_text_config()
        if getattr(whole, "is_loaded_in_4bit", False):
            raise ValueError("torch_compile: weights in 4 bits are not compiled: leave one out")
        if getattr(config, "num_local_experts", getattr(config, "num_experts", None)):
            raise ValueError(f"torch_compile: {name} routes tokens to experts: leave it out")
        layers = [x for x in whole.modules() if isinstance(x, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(f"torch_compile: {name} has no layers that are known: leave it out")
        for layer in layers:
            layer.forward = partial(_forward, compiled(inspect.unwrap(type(layer).forward)), layer)
        if (head := whole.get_output_embeddings()) is not None:
            _heads.add(head)


def is_compiled(model: Any) -> bool:
    """Whether a language model's logits are to be worked on by compiled code."""
    return len(_heads) > 0 and model.get_output_embeddings() in _heads


def _forward(code: Code, layer: Any, hidden: Tensor, *args: object, **kwargs: object) -> object:
    """A layer's forward pass. hidden: (b, s, h)."""
    cached = any(isinstance(x, Cache) for x in (*args, *kwargs.values()))
    if cached or 1 in hidden.shape[:2]:
        return type(layer).forward(layer, hidden, *args, **kwargs)
    if layer.gradient_checkpointing and layer.training:  # where transformers would have done it
        return layer._gradient_checkpointing_func(partial(code, layer, **kwargs), hidden, *args)
    return code(layer, hidden, *args, **kwargs)


@cache
def compiled(function: Code) -> Code:
    """A function compiled for tensors of any size; for each way to call it when first called so."""
    how: dict[str, Any] = {"dynamic": True, "fullgraph": True, "recompile_limit": VARIANTS}
    code: Code = torch.compile(function, backend=_seen, **how)

    def call(*args: object, **kwargs: object) -> object:
        if not torch._C._len_torch_dispatch_stack():
            return code(*args, **kwargs)
        with _disable_current_modes() as modes:  # under one torch would take it for another call
            _seeing[:] = modes
            try:
                return code(*args, **kwargs)
            finally:
                _seeing.clear()

    return call


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Code:
    """torch's default backend."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Code, compile_fx(graph, inputs))


def _seen(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Code:
    """inductor, whose code runs in the dispatch modes that were on around it."""
    code = inductor(graph, inputs)

    def run(*args: object) -> object:
        with ExitStack() as stack:
            for mode in reversed(_seeing):
                _push_mode(mode)
                stack.callback(_pop_mode)
            return code(*args)

    return run


@cache
def _let_modes_see() -> None:
    """inductor's code makes its buffers past the dispatcher: from now on only where no mode is on,
    which is to count them."""
    home = torch._C._dynamo.guards

    def empty(
        plain: Code, device: str, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        if torch._C._len_torch_dispatch_stack():
            return torch.empty_strided(size, stride, dtype=dtype, device=device)
        made: Tensor = plain(size, stride, dtype)
        return made

    for device in ("cpu", "cuda"):
        name = f"_empty_strided_{device}"
        setattr(home, name, partial(empty, getattr(home, name), device))
