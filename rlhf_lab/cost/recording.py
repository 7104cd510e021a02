"""A segment written once, and read at every batch and length.

Every size in a layer is a sum of three terms: one that is fixed (gradients of weights), one that
grows with the tokens, one with the pairs of a token and what it attends to. `Recorder` is a tape
whose sizes are whole numbers in a large base, and the digits of each its terms: adding, comparing
and sharing them out is ordinary arithmetic, and the code that writes a layer does not notice. A
request to the allocator, which rounds, becomes a digit of its own. So a recorded segment gives its
bytes and its work for any number of tokens, as a tape that knows it would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from .architecture import Architecture
from .layers import PassConfig
from .tape import Moments, Tape
from .work import Work

BITS = 64
TOKENS, PAIRS = 1 << BITS, 1 << 2 * BITS
TERMS = 3
"""Digits of a size: fixed, of tokens, of pairs. Those above count requests, size by size."""

Digits: TypeAlias = tuple[tuple[int, int], ...]
"""Of a number: (place, digit) of each that is not 0."""


def recordable(model: Architecture, p: PassConfig) -> bool:
    """Whether every size of a pass is such a sum. Weights in few bits have broken ones, what goes
    to main memory is told by its size, and a few tokens do not reach every expert."""
    few = p.tokens * model.active < model.experts
    return not (few or p.away == "all" or p.quantized != "none")


def without_sizes(p: PassConfig) -> PassConfig:
    """The pass of any number of tokens: as one long row, or as many rows of one token that read
    what is cached."""
    if p.context:
        return replace(p, b=TOKENS, s=1, context=TOKENS)
    return replace(p, b=1, s=TOKENS)


class Recorder(Tape):
    """A tape that knows no sizes. `requests`: every size that was asked for, and its place."""

    def __init__(
        self, requests: dict[int, int], block: int = 1, autocast: bool = False, grad: bool = True
    ):
        self.requests, self.rises = requests, False
        super().__init__(block, autocast, grad)

    def allocated(self, size: int) -> int:
        if not size or size >> BITS * TERMS:  # nothing, or as much as was given once
            return size
        return 1 << BITS * (TERMS + self.requests.setdefault(size, len(self.requests)))

    def reset_peak(self) -> None:
        self._highest, self.rises = [self.by_kind[:]], False

    def rose(self) -> None:
        self.rises = True

    def falls(self) -> None:
        if self.rises:  # what was alive before is alive here too
            self._highest.append(self.by_kind[:])
            self.rises = False

    @property
    def moments(self) -> Moments:
        self.falls()
        return tuple(self._highest)


def _digits(number: int) -> Digits:
    mask = (1 << BITS) - 1
    count = -(-number.bit_length() // BITS)
    found = ((place, number >> BITS * place & mask) for place in range(count))
    return tuple((place, digit) for place, digit in found if digit)


def _within(one: Digits, other: Digits) -> bool:
    """Whether no digit is above that of the other number."""
    there = dict(other)
    return all(digit <= there.get(place, 0) for place, digit in one)


@dataclass(frozen=True)
class _Peak:
    """Moments of which each may be the highest: all bytes, and those of each kind."""

    moments: tuple[tuple[Digits, tuple[Digits, ...]], ...]

    @classmethod
    def of(cls, moments: Moments) -> _Peak:
        unlike = {sum(kinds): kinds for kinds in reversed(moments)}  # of equal ones the first
        found = [(_digits(total), kinds) for total, kinds in reversed(unlike.items())]
        rest = [
            (total, tuple(map(_digits, kinds)))
            for total, kinds in found
            if not any(total is not other and _within(total, other) for other, _ in found)
        ]
        return cls(tuple(rest))

    def at(self, values: Sequence[int]) -> tuple[int, ...]:
        _, kinds = max(self.moments, key=lambda moment: _value(moment[0], values))
        return tuple([_value(kind, values) for kind in kinds])


def _value(digits: Digits, values: Sequence[int]) -> int:
    total = 0
    for place, digit in digits:
        total += digit * values[place]
    return total


@dataclass
class Written:
    """A segment as it was written: bytes that it keeps, that it peaks at in each pass, gradients it
    leaves, what is cached, what is away, and the work of both passes (`memory.Segment`)."""

    kept: int
    peak: Moments
    forward: Work
    back: Moments = ((0, 0, 0),)
    gradients: int = 0
    cached: int = 0
    away: int = 0
    backward: Work | None = None


@dataclass(frozen=True)
class _Work:
    """`Work` in digits."""

    products: tuple[tuple[Digits, Digits, float, str], ...]
    moved: Digits
    transcendentals: Digits
    called: float
    launched: float

    @classmethod
    def of(cls, work: Work) -> _Work:
        products = tuple((_digits(f), _digits(m), n, kind) for f, m, n, kind in work.products)
        moved, functions = _digits(int(work.moved)), _digits(int(work.transcendentals))
        return cls(products, moved, functions, work.called, work.launched)

    def at(self, values: Sequence[int]) -> Work:
        products = [
            (_value(f, values), _value(m, values), n, kind) for f, m, n, kind in self.products
        ]
        moved, functions = _value(self.moved, values), _value(self.transcendentals, values)
        return Work(products, moved, functions, self.called, self.launched)


class Recorded:
    """A segment in digits. `requests`: the sizes asked of the allocator, in their order."""

    def __init__(self, written: Written, requests: Sequence[int]):
        w = written
        self.requests = tuple(map(_digits, requests))
        self.peak, self.back = _Peak.of(w.peak), _Peak.of(w.back)
        self.sizes = tuple(map(_digits, (w.kept, w.gradients, w.cached, w.away)))
        self.forward = _Work.of(w.forward)
        self.backward = w.backward and _Work.of(w.backward)

    def at(self, p: PassConfig) -> Written:
        """The segment of a pass of this many tokens."""
        values = [1, p.tokens, p.tokens * (p.context or p.s)]
        values += [-(-_value(size, values) // p.block) * p.block for size in self.requests]
        kept, gradients, cached, away = (_value(size, values) for size in self.sizes)
        forward, backward = self.forward.at(values), self.backward and self.backward.at(values)
        peak, back = [self.peak.at(values)], [self.back.at(values)]
        return Written(kept, peak, forward, back, gradients, cached, away, backward)
