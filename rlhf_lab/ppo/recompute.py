"""Activation checkpointing: in the update layers keep their inputs, and run again in backward.

transformers does it in layers that are in training mode, where those of some families (OPT, Falcon)
drop activations too. PPO's models are in eval mode (rule 4), and stay there: for the time of a
pass of the update, and of no other, a layer's `forward` is the one that torch checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..stages import Settings
from .adapters import Switch
from .compiled import Code

Layers = Sequence[GradientCheckpointingLayer]
Checkpoint = Callable[..., object]
"""torch's `checkpoint`, as transformers keeps it in a layer."""


def recomputed_layers(trained: nn.Module, settings: Settings) -> Layers:
    """The layers to recompute, of all models in `trained`. `settings`: transformers'
    `activation_checkpointing_kwargs`. Raises ValueError, one line, where a model has no such layer.
    """
    rest = dict(settings)
    more = {name: rest.pop(name) for name in ("every_n_layers", "offload") if name in rest}
    inner = set[nn.Module]()
    for model in trained.modules():
        if not isinstance(model, PreTrainedModel) or model in inner:
            continue
        inner.update(model.modules())
        if not any(isinstance(layer, GradientCheckpointingLayer) for layer in model.modules()):
            name = type(model).__name__
            raise ValueError(f"{name} has no layers to recompute: leave gradient_checkpointing out")
        model.activation_checkpointing_enable(rest or None, **more)
    layers = (x for x in trained.modules() if isinstance(x, GradientCheckpointingLayer))
    return [layer for layer in layers if layer.gradient_checkpointing]


@contextmanager
def recomputed(layers: Layers, switch: Switch | None) -> Iterator[None]:
    """While it lasts these layers keep their inputs alone; they run again with the adapter that
    they ran with."""

    def forward(
        layer: GradientCheckpointingLayer, run: Code, *args: object, **kwargs: object
    ) -> object:
        adapter = switch.on if switch else None

        def plain(*args: object) -> object:
            if switch:
                switch.to(adapter)
            return run(*args, **kwargs)

        checkpoint: Checkpoint = vars(layer)["_gradient_checkpointing_func"]
        return checkpoint(plain, *args)

    compiled = {layer: vars(layer)["forward"] for layer in layers if "forward" in vars(layer)}
    for layer in layers:
        run = compiled.get(layer) or partial(type(layer).forward, layer)
        layer.forward = partial(forward, layer, run)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
            if layer in compiled:
                layer.forward = compiled[layer]
