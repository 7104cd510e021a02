"""A linear map with DoRA (Liu et al., 2402.09353), as peft 0.21 computes it.

The adapted weight is its direction times a magnitude for each output, which is trained:
`m · (W + B·A) x / ‖W + B·A‖`, the norm taken of each row. peft writes B·A out in every pass, as
the adapters' answers to an identity matrix, and the norm is a constant for the gradient (section
4.3); so what is written out is there until the map is done, and only `Wx` and `B(Ax)` stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .quantization import FORMATS
from .values import Store, Value
from .work import product

if TYPE_CHECKING:
    from .architecture import Linear
    from .layers import PassConfig
    from .setup import Setup
    from .tape import Tape

NOT_WITH = {
    "layout": ("adapters", "roles switch between LoRA adapters: choose layout='four'"),
    "use_vllm": (True, "an engine takes adapters that are a sum of weights: leave it out"),
    "torch_compile": (True, "its compiled layers are not planned: leave it out"),
    "selective_checkpointing": (True, "which of its products stay is not known: leave it out"),
    "load_in_8bit": (True, "what its weights take written out is not known: set load_in_4bit"),
    "sharding": ("zero3", "it reads weights that are in parts then: choose zero2 or fsdp2"),
}
"""Settings that do not go with DoRA, at which value, and what to do."""


def cannot(s: Setup) -> Iterator[str]:
    """→ a line for what peft does not do with `use_dora`, or is not planned with it."""
    if not (s.use_dora and s.lora_r):
        return
    for name, (value, why) in NOT_WITH.items():
        if getattr(s, name) == value:
            yield f"use_dora does not go with {name}={value!r}: {why}"
    if s.tensor_parallel > 1:
        yield "use_dora does not go with tensor_parallel: norms of whole rows are not shared out"
    facts, targets = s.model.facts, s.model.lora_targets(s.lora_targets)
    inside = [x for layer in s.model.layers for x in layer.linears]
    bare = [x for x in inside if x.copies > 1 or x.name == facts.router and not facts.router_linear]
    if odd := [x.name for x in (*bare, *s.model.outer, s.model.lm_head) if x.rank(1, targets)]:
        yield (
            f"use_dora is of linear maps inside layers, not of {', '.join(dict.fromkeys(odd))}: "
            "name others in lora_target_modules"
        )
    if s.lora_dropout and facts.qkv_map == "c_attn":  # whose maps are Conv1D
        yield (
            f"use_dora with lora_dropout over {s.model.family} has peft 0.21 compute gradients of "
            "frozen weights: leave lora_dropout out"
        )


def dora(t: Tape, p: PassConfig, lin: Linear, x: Value, y: Value, rank: int) -> Value:
    """x through the map and its adapters; `y`: through the map alone. x has the adapters'
    precision, but under autocast over weights in few bits."""
    scale, weight, _there = _scale(t, p, lin, x.itemsize, rank)
    base = y
    if p.dropout:  # the map once more, of what dropout left
        x = t.dropout(x)
        base = _once_more(t, p, lin, x, weight)
    del weight
    low = t.linear(x, lin.inputs, rank, p.adapter_bytes_per_weight, trained=True)
    update = t.linear(low, rank, lin.outputs, p.adapter_bytes_per_weight, trained=True)
    del low
    if lin.bias and not p.dropout:
        base = t.add(base)
    first = t.mul(t.add(scale), base)
    del base
    whole = t.add(first, t.mul(t.mul(scale, update)))
    del first, update, scale, _there
    return t.add(y, whole)


def _scale(
    t: Tape, p: PassConfig, lin: Linear, itemsize: int, rank: int
) -> tuple[Value, Store, list[Store]]:
    """→ magnitude through norm, the map's weight as the norm reads it, and what else stays until
    the map is done: with a gradient, the identity and its way through the adapters too."""
    own, whole = p.adapter_bytes_per_weight, lin.inputs * lin.outputs
    low = min(own, 2) if t.autocast else own
    there = [Store(t, lin.inputs * lin.inputs * own)]
    copies = [Store(t, rank * n * low) for n in (lin.inputs, lin.outputs) if low < own]
    if low < own:
        there.append(Store(t, lin.inputs * lin.inputs * low))
    there.append(Store(t, lin.inputs * rank * low))
    update = Store(t, whole * low)
    for done in ((lin.inputs, rank), (rank, lin.outputs)):
        t.count_product(product(lin.inputs, *done, low))
    if low < own:
        del there[0]
    if not t.grad:
        there.clear()
    if low != itemsize:
        update = Store(t, whole * itemsize)
    there.append(update)
    weight = Store(t, 0)  # the parameter itself
    if p.quantized != "none":
        kind = FORMATS[p.quantized]
        t.forward.moved += (kind.size(lin) + whole * p.bytes_per_weight) / kind.share
        t.forward.called += 1
        weight = Store(t, whole * p.bytes_per_weight)
    if p.bytes_per_weight != itemsize:
        weight = Store(t, whole * itemsize)
    scaled = Store(t, whole * itemsize)
    added = Store(t, whole * itemsize)
    del scaled
    # An identity, the update scaled and added to the weight, which the norm reads.
    t.forward.moved += 7 * whole * itemsize + lin.inputs * lin.inputs * own
    t.forward.called += 5
    norm = Store(t, lin.outputs * itemsize)
    del added, copies
    magnitude = max(itemsize, own)
    scale = t.result(lin.outputs, magnitude, [], (norm,), weights=(lin.outputs * own,))
    return scale, weight, [*there, weight]


def _once_more(t: Tape, p: PassConfig, lin: Linear, x: Value, weight: Store) -> Value:
    """x · W without its bias; where W was made for it, its gradient needs it."""
    if t.autocast:
        return t.linear(x, lin.inputs, lin.outputs, max(x.itemsize, 4), trained=False)
    rows = x.numel // lin.inputs
    done = product(rows, lin.inputs, lin.outputs, x.itemsize)
    t.count_product(done)
    t.read(x)
    saved = (weight,) if x.needs else ()
    size = rows * lin.outputs
    return t.result(size, x.itemsize, [(x, "new")], saved, work=[done] * x.needs, last=1)
