"""A segment written once, and read at every batch and length.

Every size in a layer is a sum of three terms: one that is fixed (gradients of weights), one that
grows with the tokens, one with the pairs of a token and what it attends to. `Recorder` is a tape
whose sizes are whole numbers in a large base, and the digits of each its terms: adding, comparing
and sharing them out is ordinary arithmetic, and the code that writes a layer does not notice. A
request to the allocator, which rounds, becomes a digit of its own. So a recorded segment gives its
bytes and its work for any number of tokens, as a tape that knows it would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from .architecture import Architecture
from .layers import PassConfig
from .tape import Tape
from .values import Moments
from .work import Product, Work

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
        return p._replace(b=TOKENS, s=1, context=TOKENS)
    return p._replace(b=1, s=TOKENS)


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
        self.peak = -1  # each rise may be the highest

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


class Written(NamedTuple):
    """A segment as it was written: bytes that it keeps, that it peaks at in each pass, gradients it
    leaves, what is cached, what is away, and the work of both passes (`memory.Segment`)."""

    kept: int
    peak: Moments
    forward: Work
    back: Moments = ((0, 0, 0),)
    gradients: int = 0
    cached: int = 0
    away: int = 0
    backward: Work = Work()


class _Places(NamedTuple):
    """`Work`, of whose numbers the places are known."""

    products: list[tuple[int, int, float, str]]
    moved: int
    transcendentals: int
    called: float
    launched: float

    def work(self, numbers: Sequence[int]) -> Work:
        products: list[Product] = [
            (numbers[flops], numbers[touched], times, kind)
            for flops, touched, times, kind in self.products
        ]
        moved, functions = numbers[self.moved], numbers[self.transcendentals]
        return Work(products, moved, functions, self.called, self.launched)


class Recorded:
    """A segment in digits. `requests`: the sizes asked of the allocator, in their order."""

    def __init__(self, written: Written, requests: Sequence[int]):
        w, self._numbers = written, dict[int, int]()
        self._requests = tuple(map(_digits, requests))
        self._sizes = tuple(map(self._place, (w.kept, w.gradients, w.cached, w.away)))
        self._peaks = self._highest(w.peak), self._highest(w.back)
        self._forward, self._backward = self._places(w.forward), self._places(w.backward)
        self._digits = tuple(map(_digits, self._numbers))

    def _place(self, number: float) -> int:
        """The place of a number among all that a size is made of, each of which is there once."""
        return self._numbers.setdefault(int(number), len(self._numbers))

    def _highest(self, moments: Moments) -> list[tuple[int, list[int]]]:
        """Moments that may be the highest, each as all bytes and those by kind."""
        unlike = {sum(kinds): kinds for kinds in reversed(moments)}  # of equal ones the first
        totals = {total: _digits(total) for total in reversed(unlike)}

        def below(total: int) -> bool:
            return any(
                _within(totals[total], digits) for other, digits in totals.items() if other != total
            )

        return [
            (self._place(total), [*map(self._place, unlike[total])])
            for total in totals
            if not below(total)
        ]

    def _places(self, work: Work) -> _Places:
        """Of the work's numbers."""
        products = [
            (self._place(f), self._place(touched), n, kind) for f, touched, n, kind in work.products
        ]
        moved, functions = self._place(work.moved), self._place(work.transcendentals)
        return _Places(products, moved, functions, work.called, work.launched)

    def at(self, p: PassConfig) -> Written:
        """The segment of a pass of this many tokens."""
        values, block = [1, p.tokens, p.tokens * (p.context or p.s)], p.block
        for size in self._requests:
            values.append(-(-sum([n * values[place] for place, n in size]) // block) * block)
        numbers = [sum([n * values[place] for place, n in number]) for number in self._digits]
        kept, gradients, cached, away = (numbers[place] for place in self._sizes)
        peak, back = (
            tuple([numbers[kind] for kind in max(moments, key=lambda m: numbers[m[0]])[1]])
            for moments in self._peaks
        )
        forward, backward = self._forward.work(numbers), self._backward.work(numbers)
        return Written(kept, [peak], forward, [back], gradients, cached, away, backward)
