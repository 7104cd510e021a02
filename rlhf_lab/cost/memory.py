"""Activation memory of a training step over time, from segments of a model written on a tape.

A model is a row of segments: embedding, layers (all alike, so one is written and counted `times`
times), head with loss. Forward, each leaves behind what backward needs; backward, the last
segment goes first, gives that back, and leaves the gradients of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import TypeAlias

from . import heads
from .architecture import Architecture
from .layers import LayerRun, PassConfig
from .recording import Recorded, Recorder, Written, recordable, without_sizes
from .tape import Tape
from .values import GRADIENT, Store, Value
from .work import Work

KindBytes: TypeAlias = Sequence[float]
"""Bytes of activations, of gradients of weights, of logits."""


STASH, LEAST = 5, 1024
"""Saved tensors on their way to main memory, and bytes of the smallest that goes there."""


@dataclass
class Segment:
    """A piece of a model that occurs `times` times. Bytes: `peak` and `kept` of the forward pass;
    `back`, the peak of the backward pass with what was kept; `gradients` that it leaves, and of
    them those that `waits` keep until another segment's; `cached` until the forward pass ends;
    `away`, kept in main memory. Peaks are by kind (`values.BYTE_KINDS`). `weights`: numbers in its
    matrices and norms, the largest of which has `tensor`; `tied`: its matrix is the embedding's,
    and counted there."""

    times: int
    kept: int
    peak: KindBytes
    back: KindBytes = (0, 0, 0)
    gradients: int = 0
    cached: int = 0
    waits: int = 0
    away: int = 0
    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    weights: int = 0
    tensor: int = 0
    tied: bool = False

    @classmethod
    def of(cls, w: Written, times: int = 1) -> Segment:
        """A segment whose peaks are known."""
        (peak,), (back,) = w.peak, w.back
        segment = cls(times, w.kept, peak, back, w.gradients, w.cached, away=w.away)
        segment.forward, segment.backward = w.forward, w.backward
        return segment


def written(
    p: PassConfig,
    write: Callable[[Tape, Value], Value],
    numel: int = 0,
    needs: bool = True,
    checkpoint: bool = False,
    grad: bool = True,
    new_tape: Callable[..., Tape] = Tape,
) -> Written:
    """Write a segment down once: forward, then backward. `numel`: of its input."""
    itemsize = p.bytes_per_weight
    tape = new_tape(p.block, p.autocast, grad and not checkpoint)
    if p.selective and checkpoint:
        tape.selected = {}
    x = tape.new(numel, itemsize, needs)
    y = write(tape, x)
    size, peak, work, cached = y.numel * y.itemsize, tape.moments, tape.forward, 0
    if not grad:
        return Written(0, peak, work)
    if not checkpoint:
        del x
        away = send_away(tape) if p.away == "all" else 0
        before = tape.live
        tape.cache.clear()
        cached = before - tape.live
        kept = tape.live - sum(store.size for store in {y.store, *tape.returned})
        g = Store(tape, size)
        del y
        tape.reset_peak()
    else:
        kept, away = (0, x.store.size) if p.away else (x.store.size, 0)
        cached, stay = sum(store.size for store in tape.cache), tape.selected or {}
        kept += sum(store.size for stores in stay.values() for store in stores)
        del x, y
        tape = new_tape(p.block, p.autocast)
        g = Store(tape, size)
        again = tape.new(numel, itemsize, needs)
        y = write(tape, again)
        # It stops as soon as all that was saved is there again; compiled code does not stop.
        until = tape.forward.products[: None if p.compiled else tape.needed]
        done = [x for i, x in enumerate(until) if i not in stay]
        again_work = replace(tape.forward, products=done)
        tape.backward.add(again_work)
        del again, y
        tape.cache.clear()
    tape.undo(g)
    del g
    tape.returned = []
    gradients = tape.by_kind[GRADIENT]
    return Written(kept, peak, work, tape.moments, gradients, cached, away, tape.backward)


def send_away(tape: Tape) -> int:
    """What was saved goes to main memory, in TRL's way (models/activation_offloading.py). → its
    bytes. A tensor stays here for so long as `STASH` others follow it; where it is saved once
    more before, it stays until the backward pass too. A compiled layer is one node of autograd: it
    saves each tensor once, and they come back together."""
    if any(node.fused for node in tape.nodes):
        saved = (root for node in tape.nodes for store in node.saved for root in store.roots)
        tape.returned = [*dict.fromkeys(root for root in saved if root.size >= LEAST)]
        return sum(store.size for store in tape.returned)
    followed: dict[Store, int] = {}
    stay: set[Store] = set()
    number, total = 0, 0
    for node in tape.nodes:
        here = []
        for store in (root for saved in node.saved for root in saved.roots):
            number += 1
            if number - followed.get(store, -STASH) < STASH or store in stay:
                stay.add(store)
            elif store.size >= LEAST:
                followed[store] = number
                node.away += store.size
                continue
            here.append(store)
        node.saved = here
        total += node.away
    return total


def plus(kinds: KindBytes, activations: float = 0, gradients: float = 0) -> KindBytes:
    return kinds[0] + activations, kinds[1] + gradients, kinds[2]


def forward_peak(segments: Iterable[Segment], before: int = 0) -> tuple[KindBytes, int, int]:
    """→ (peak, number of the segment that has it, bytes kept at the end) of a forward pass that
    starts with `before` bytes."""
    worst: KindBytes = (before, 0, 0)
    most: float = before
    where = 0
    live, cached = before, 0
    for number, s in enumerate(segments):
        here = live + cached + (s.times - 1) * (s.kept + s.cached)
        if here + sum(s.peak) > most:
            worst, where = plus(s.peak, here), number
            most = sum(worst)
        live += s.times * s.kept
        cached += s.times * s.cached
    return worst, where, live


def backward_peak(
    segments: Sequence[Segment], live: int, stay: bool = True
) -> tuple[KindBytes, int]:
    """→ (peak, number of the segment that has it) of a backward pass that starts with `live` bytes
    of what was kept and is resident.

    Without `stay` every gradient is added to one that is there, and freed at once; but that of a
    head which is the embedding too waits for the embedding's (`Segment.waits`).
    """
    worst: KindBytes = (live, 0, 0)
    most: float = live
    where = len(segments) - 1
    gradients = 0
    for number in range(where, -1, -1):
        s = segments[number]
        left = s.gradients if stay else s.waits
        for done in {0, s.times - 1}:
            before = live - (done + 1) * s.kept
            if before + gradients + done * left + sum(s.back) > most:
                worst, where = plus(s.back, before, gradients + done * left), number
                most = sum(worst)
        live -= s.times * s.kept
        gradients += s.times * left
    return worst, where


def works(segments: Iterable[Segment], which: str) -> Work:
    """The `which` ("forward" or "backward") work of all segments together."""
    total = Work()
    for s in segments:
        total.add(getattr(s, which), s.times)
    return total


@lru_cache(maxsize=256)
def trunk(
    model: Architecture,
    p: PassConfig,
    *,
    checkpoint: int = 0,
    grad: bool = True,
    tied: bool = False,
) -> tuple[Segment, ...]:
    """Embedding and layers. `checkpoint`: of so many layers one is recomputed; 0: none. `tied`: the
    head's gradient is there before the embedding's. Stages run the same passes more than once (four
    models of a size), and sliders come back to where they were: it is kept."""
    sizeless = without_sizes(p) if recordable(model, p) else None
    return (
        _embedding(model, p, sizeless, grad, tied),
        *_layers(model, p, sizeless, checkpoint * grad, grad),
    )


def _adapted(model: Architecture, p: PassConfig) -> bool:
    """Whether the embedding has adapters."""
    return bool(p.lora_r) and any(x.rank(p.lora_r, p.targets) for x in model.outer)


EMBEDDING = -1
"""Among the numbers of layers."""
How: TypeAlias = tuple[bool, bool, bool, bool]
"""`needs`, `checkpoint` and `grad` of `written`, and `first` of `heads.embed`."""


def _part(
    model: Architecture, number: int, p: PassConfig, sizeless: PassConfig | None, how: How
) -> Written:
    """A layer, or the embedding; `sizeless`: the pass without sizes, where it can be recorded;
    `how` it is written."""
    if sizeless:
        return _recorded(model, number, sizeless, how).at(p)
    return _write_part(model, number, p, how)


@lru_cache(maxsize=256)
def _recorded(model: Architecture, number: int, p: PassConfig, how: How) -> Recorded:
    requests: dict[int, int] = {}
    return Recorded(_write_part(model, number, p, how, partial(Recorder, requests)), [*requests])


def _write_part(
    model: Architecture, number: int, p: PassConfig, how: How, new_tape: Callable[..., Tape] = Tape
) -> Written:
    needs, checkpoint, grad, first = how

    def write(tape: Tape, x: Value) -> Value:
        if number == EMBEDDING:
            return heads.embed(tape, model, p, first)
        return LayerRun(tape, model, model.layers[number], p).layer(x)

    size = 0 if number == EMBEDDING else p.tokens * model.hidden
    return written(p, write, size, needs, checkpoint, grad, new_tape)


def _embedding(
    model: Architecture, p: PassConfig, sizeless: PassConfig | None, grad: bool, tied: bool
) -> Segment:
    grad = grad and (p.trained or _adapted(model, p))
    first = Segment.of(_part(model, EMBEDDING, p, sizeless, (True, False, grad, not tied)))
    first.weights, first.tensor = model.embedding, model.vocabulary * model.head_width
    return first


def _layers(
    model: Architecture, p: PassConfig, sizeless: PassConfig | None, checkpoint: int, grad: bool
) -> tuple[Segment, ...]:
    # The embeddings of adapters are frozen: the first layer's input needs no gradient, unless
    # checkpointing asks for one (peft's enable_input_require_grads).
    frozen = grad and not p.trained and not checkpoint and not _adapted(model, p)
    row = []
    for number, times, needs, recomputed in _order(model, checkpoint, frozen):
        layer = model.layers[number]
        sizes = [x.parameters for x in layer.linears]
        part = _part(model, number, p, sizeless, (needs, recomputed, grad, True))
        row.append(Segment.of(part, times))
        row[-1].weights, row[-1].tensor = sum(sizes) + layer.norms, max(sizes)
    return tuple(row)


def _order(
    model: Architecture, checkpoint: int, frozen: bool
) -> Iterator[tuple[int, int, bool, bool]]:
    """→ (number of the kind of layer, how many in a row, whether its input needs a gradient,
    whether it is recomputed), as the layers follow each other where that matters: of every
    `checkpoint` layers the first is recomputed (transformers' modeling_utils.py), so what the
    others keep is there, or gone, when it is. Kinds are spread evenly."""
    if checkpoint < 2:
        for number, layer in enumerate(model.layers):
            first = int(frozen and number == 0)
            for times, needs in ((first, False), (layer.count - first, True)):
                if times:
                    yield number, times, needs, bool(checkpoint)
        return
    places = [((i + 0.5) / x.count, k) for k, x in enumerate(model.layers) for i in range(x.count)]
    kinds = [(k, index % checkpoint == 0) for index, (_, k) in enumerate(sorted(places))]
    for (kind, recomputed), alike in groupby(kinds):
        yield kind, len([*alike]), True, recomputed


@lru_cache(maxsize=256)
def ending(
    model: Architecture, p: PassConfig, write: Callable[..., Value], *args: int, grad: bool = True
) -> Segment:
    """Final norm, and the head and loss that `write(tape, model, p, x, *args)` writes (`heads`)."""

    def end(tape: Tape, x: Value) -> Value:
        # Named, so that it is held until the end: a call with `*args` lets go of it on Python 3.14.
        hidden = heads.before_head(tape, model, p, x)
        return write(tape, model, p, hidden, *args)

    needs = p.trained or bool(p.lora_r)
    last = Segment.of(written(p, end, p.tokens * model.hidden, needs, grad=grad))
    last.tied = model.tied and write is not heads.scores
    last.tensor = model.head_width * (1 if write is heads.scores else model.vocabulary)
    last.weights = model.final_norm + (0 if last.tied else last.tensor)
    if grad and p.trained and model.tied and write is not heads.scores:
        last.waits = model.vocabulary * model.head_width * p.bytes_per_weight
    return last
