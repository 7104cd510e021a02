"""Memory of passes under sharding: which weights are whole, for how long, and where gradients go.

`states.py` has what one device keeps; here is what comes and goes while segments run, as DeepSpeed
0.19 does it (runtime/zero: stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py), and
torch 2.13's FSDP2 (distributed/fsdp/_fully_shard) with the units that accelerate 1.15 makes:

- ZeRO-1 and ZeRO-2: weights are whole. Backward fills a bucket with gradients; what is in it is
  copied and summed over devices, and each device keeps its part. ZeRO-1 first has all of them.
- ZeRO-3: weights are gathered ahead of their use until `stage3_max_live_parameters` are whole, and
  as many stay whole from forward to backward; small tensors (`stage3_param_persistence_threshold`)
  always, gathered anew after each step. Its bucket is always there.
- FSDP2: a unit (a layer, the embedding, the head) is gathered into a buffer and copied out of it,
  freed after forward and gathered again for backward, while the next one already arrives. The unit
  of the head, and of a table tied to it, stays whole in between. Gradients are scattered unit by
  unit, and only in the last micro-batch of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .memory import KindBytes, Segment, backward_peak, forward_peak, plus
from .seconds import Sent
from .setup import Setup
from .states import State


@dataclass(frozen=True)
class Row:
    """One pass through a model: its segments, and what one device keeps of the model."""

    segments: Sequence[Segment]
    state: State

    @property
    def weights(self) -> int:
        """Numbers in all its segments."""
        return sum(x.times * x.weights for x in self.segments)

    @property
    def units(self) -> list[float]:
        """Bytes of one of each segment's weights, whole, as they are gathered."""
        width = self.state.whole / max(1, self.weights)
        return [x.weights * width for x in self.segments]


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment: by kind (`values.BYTE_KINDS`), and of whole weights and buffers. `row`:
    the number of the pass that runs at that moment."""

    kinds: KindBytes
    whole: float = 0.0
    row: int = 0

    @property
    def total(self) -> float:
        return sum(self.kinds) + self.whole


def _higher(one: Moment, other: Moment) -> Moment:
    return other if other.total > one.total else one


def _once(rows: Sequence[Row]) -> list[Row]:
    """Each model once: both answers of a pair may be passes through the same one."""
    return list({id(row.state): row for row in rows}.values())


def _segments(rows: Sequence[Row]) -> list[Segment]:
    return [x for row in rows for x in row.segments]


def _row_of(rows: Sequence[Row], number: int) -> int:
    """Whose segment has this number among those of all rows."""
    return [n for n, row in enumerate(rows) for _ in row.segments][number]


# ------------------------------------------------------------------------------------ whole weights


@dataclass(frozen=True)
class _Live:
    """Whole weights of ZeRO-3, in bytes: of all models, at most at a time, and of one gathering."""

    everything: float
    limit: float
    buffer: float

    @classmethod
    def of(cls, s: Setup, rows: Sequence[Row]) -> _Live:
        everything = sum(row.state.whole for row in _once(rows))
        width = everything / max(1, sum(row.weights for row in _once(rows)))
        return cls(
            everything,
            s.stage3_max_live_parameters * width,
            min(everything, s.stage3_prefetch_bucket_size * width),
        )

    def using(self, unit: float, first: bool) -> float:
        """While a unit is used: half of the limit is kept for reuse, the unit itself is whole. What
        arrives is in a buffer until it is copied out; a small model arrives at once, at first."""
        live = min(self.everything, max(self.limit, unit + self.limit / 2))
        return live + (self.buffer if first or self.buffer < self.everything else 0.0)


def _held(s: Setup, row: Row) -> tuple[float, float]:
    """→ bytes that FSDP2 keeps whole until backward has passed: from a row's first segment on, and
    from its last one on."""
    first, last = row.units[0], row.units[-1]
    if s.fsdp_units == "root" or row.segments[-1].tied:
        return first + last, 0.0
    return 0.0, last


def _units(s: Setup, row: Row) -> list[float]:
    """Bytes of the units that FSDP2 gathers and frees one by one."""
    units = row.units
    if _held(s, row)[0]:
        units[0] = units[-1] = 0.0
    return units


def forward(s: Setup, rows: Sequence[Row], before: float) -> tuple[Moment, int]:
    """→ (the highest moment, bytes of activations kept at the end) of a pass through these rows
    that starts with `before` bytes."""
    if not s.shards:
        peak, where, kept = forward_peak(_segments(rows), int(before))
        return Moment(peak, row=_row_of(rows, where)), kept
    worst, live, held = Moment((before, 0, 0)), int(before), 0.0
    zero3 = _Live.of(s, rows) if s.sharding == "zero3" else None
    for number, row in enumerate(rows):
        cached, previous, units = 0, 0.0, row.units
        if s.sharding == "fsdp2":
            units = _units(s, row)
            held += _held(s, row)[0]
        for i, x in enumerate(row.segments):
            whole = 0.0
            if zero3:
                whole = zero3.using(units[i], first=not number and not i)
            elif s.sharding == "fsdp2":  # what has just been copied out lies in its buffer too
                whole = held + units[i] + (units[i] or previous)
            here = live + cached + (x.times - 1) * (x.kept + x.cached)
            worst = _higher(worst, Moment(plus(x.peak, here), whole, number))
            live, cached, previous = live + x.times * x.kept, cached + x.times * x.cached, units[i]
        held += _held(s, row)[1] if s.sharding == "fsdp2" else 0.0
    return worst, live


def between(s: Setup, rows: Sequence[Row]) -> float:
    """Bytes of whole weights between forward and backward."""
    if s.sharding == "zero3":
        live, head = _Live.of(s, rows), max(row.units[-1] for row in rows)
        return min(live.everything, max(live.limit, head))
    return sum(sum(_held(s, row)) for row in rows) if s.sharding == "fsdp2" else 0.0


# ---------------------------------------------------------------------------------------- gradients


def _backward_zero(s: Setup, rows: Sequence[Row], live: float, accumulates: bool) -> Moment:
    """ZeRO. The bucket is copied to be summed, and so is a gradient that is larger than it."""
    one, two = s.sharding == "zero1", s.sharding == "zero2"
    states = [row.state for row in _once(rows)]
    zero3 = _Live.of(s, rows) if s.sharding == "zero3" else None
    trained, kept = sum(x.trained for x in states), sum(x.gradients for x in states)
    bucket = max(x.bucket for x in states)
    held, full = (0.0 if zero3 else bucket), trained > bucket
    largest = max(x.tensor for row in rows for x in row.segments) * s.bytes_per_weight
    copy = min(trained, max(bucket, largest))
    collected, passed = 0.0, 0.0
    if accumulates and not zero3:
        collected = trained if one else kept
    worst = Moment((live, collected, 0), 0.0 if two else held, len(rows) - 1)
    for number, row in reversed([*enumerate(rows)]):
        for x, unit in zip(reversed(row.segments), reversed(row.units), strict=True):
            g, own = x.gradients, x.back[1]
            grows = g if one and not accumulates else 0.0
            own = own if one else min(own, float(x.tensor * s.bytes_per_weight))
            gathered = zero3.using(unit, first=False) if zero3 else 0.0
            # The bucket is copied when the next gradient has no room in it: not in the first of
            # these, or in all that come after the one that fills it.
            filling = math.ceil(max(0.0, bucket - passed) / g) if g else 0
            for done in {0, min(filling, x.times - 1), x.times - 1}:
                activations = x.back[0] + live - (done + 1) * x.kept
                behind = passed + done * g
                filled = full and not one and behind + g > bucket
                # ZeRO-2's bucket comes with the first gradient; those before left a part here.
                part = min(kept, max(0.0, behind - bucket)) if two and filled else 0.0
                kinds = activations, collected + part + done * grows + own, x.back[2]
                whole = (held if behind or not two else 0.0) + (copy if filled else 0.0)
                worst = _higher(worst, Moment(kinds, gathered + whole, number))
            live, collected = live - x.times * x.kept, collected + x.times * grows
            passed += x.times * g
    if two:
        collected += kept * full
    if one:  # gradients move into the bucket, and what is there is copied
        collected = max(0.0, trained - bucket)
    return _higher(worst, Moment((live, collected, 0), held + max(copy, 0.0 if zero3 else kept)))


def _backward_fsdp2(s: Setup, rows: Sequence[Row], live: float, accumulates: bool) -> Moment:
    """FSDP2. A unit's gradients are copied to be scattered, and the copy stays until the next
    unit's. A unit whose input needs no gradient has no end of its own: it waits for all others."""
    states, held = [row.state for row in _once(rows)], between(s, rows)
    trained = sum(x.trained for x in states)
    # FSDP's first version holds on to what frozen layers are recomputed from (reentrantly), and so
    # to its gradient, until all is done (`_register_post_backward_reshard_only_hook`).
    freed = -1 if s.fsdp_version == 1 and s.lora_r and s.checkpoint == 1 else 1
    share = sum(x.gradients for x in states) / trained if trained else 0.0
    grows = share - accumulates  # of a unit's gradients, when they are scattered
    collected, pending, late = trained if accumulates else 0.0, 0.0, 0.0
    worst = Moment((live, collected, 0), held, len(rows) - 1)
    for number, row in reversed([*enumerate(rows)]):
        units, (whole, head) = _units(s, row), _held(s, row)
        last = len(units) - 1
        for i in range(last, -1, -1):
            x = row.segments[i]
            g, own = x.gradients, x.back[1]
            here = units[i] if i < last else 0.0  # the head's is held
            for done in {0, x.times - 1}:
                arriving = units[i] if done < x.times - 1 else units[max(0, i - 1)] * (i > 0)
                kinds = (
                    x.back[0] + live - (done * freed + 1) * x.kept,
                    collected + done * g * grows + own,
                    x.back[2],
                )
                copied = g if done else pending
                worst = _higher(worst, Moment(kinds, held + here + arriving + copied, number))
            live -= x.times * x.kept * (freed if 0 < i < last else 1)
            if i == 0 or whole and i == last:
                late += g
                collected += 0.0 if accumulates else g
            else:
                collected, pending = collected + x.times * g * grows, g
            held -= head if i == last else 0.0
    # The last gradient of a unit is still there when its share has been scattered.
    copies = late if whole else late * (1 + share)
    return _higher(worst, Moment((live, collected, 0), copies))


def moments(
    s: Setup, rows: Sequence[Row], before: float, accumulates: bool
) -> tuple[Moment, int, Moment]:
    """→ (highest moment of forward, bytes of activations between, highest moment of backward), the
    gradients of passes before among them."""
    first, live = forward(s, rows, before)
    if s.shards:
        how = _backward_fsdp2 if s.sharding == "fsdp2" else _backward_zero
        return first, live, how(s, rows, live, accumulates)
    held = sum(row.state.held for row in _once(rows)) if accumulates else 0.0
    stay = not (accumulates or s.optimizer_in_backward)
    peak, where = backward_peak(_segments(rows), live, stay)
    return first, live, Moment(plus(peak, 0, held), row=_row_of(rows, where))


# ------------------------------------------------------------------------------------- what is sent


def gathering(s: Setup, size: float, times: float = 1.0) -> Sent:
    """`times` gatherings of `size` bytes of a model's weights; each device's part comes from main
    memory where it is offloaded, FSDP2's before it is made narrow."""
    wide = s.bytes_per_weight / s.pass_bytes_per_weight
    host = size / s.replicas * wide if s.offload == "all" else 0.0
    return Sent(all_gather=size * times, host=host * times)


def passing(s: Setup, state: State, times: float = 1.0) -> Sent:
    """`times` passes without gradients through a model."""
    gathers = s.sharding in ("zero3", "fsdp2")
    sent = gathering(s, state.whole - state.stay if gathers else 0.0, times)
    return sent._replace(fetched=state.modules * times)


def training(s: Setup, rows: Sequence[Row], passes: float, steps: float) -> tuple[Sent, Sent, Sent]:
    """→ what forward, backward and the optimizer send in so many passes and steps."""
    states = [row.state for row in _once(rows)]
    whole, trained = sum(x.whole for x in states), sum(x.trained for x in states)
    paged = sum(x.paged for x in states)
    if not s.shards:
        sums = trained * steps * (s.sharding == "ddp")
        return Sent(), Sent(all_reduce=sums), Sent(paged=paged, hides=False)
    numbers, w = trained / s.pass_bytes_per_weight / s.replicas, s.bytes_per_weight
    if s.sharding in ("zero1", "zero2"):  # DeepSpeed hides nothing of these by default
        sums = trained * (passes if s.sharding == "zero2" else steps)
        first, second = Sent(), Sent(all_reduce=sums, hides=False)
        third = Sent(all_gather=trained * steps, hides=False)
    else:
        stay = sum(x.stay for x in states)
        again = max(0.0, whole - max(stay, between(s, rows)))
        first = gathering(s, (whole - stay) * len(rows) / len(states), passes)
        second = gathering(s, again * len(rows) / len(states), passes)
        scattered = trained * (passes if s.sharding == "zero3" else steps)
        fetched = sum(row.state.modules for row in rows) * passes
        first = first._replace(fetched=fetched)
        fetched *= 2 if s.checkpoint else 1
        second = second._replace(reduce_scatter=scattered, fetched=fetched)
        third = gathering(s, stay, steps)._replace(hides=False)
    if s.offload == "none":
        return first, second, third._replace(paged=paged)
    # Gradients go down, added up there in every pass but the first of a step, and once as what the
    # optimizer takes; the weights it made come up.
    down = (w if s.sharding == "fsdp2" else 4.0) * numbers * steps
    up = w * numbers * steps * (s.offload == "optimizer")
    if s.sharding != "fsdp2" and passes > steps:
        down += w * numbers * (2 * passes - steps)
    third = third._replace(host=down + up, updated=numbers * steps)
    return first, second, third
