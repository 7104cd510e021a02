"""What a pass computes: matrix products one by one, bytes moved, and how many operations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

Costs: TypeAlias = tuple[float, float, float]
"""Of undoing an operation: bytes moved, transcendentals, operations launched."""
NOTHING: Costs = (0, 0, 0)
Product: TypeAlias = tuple[float, float, float, str]
"""A matrix product: floating point operations, bytes touched, how often, and of what kind."""
PLAIN, CAUSAL, MASKED = "", "causal", "masked"
"""Kinds of products: of two matrices, or fused attention without or with a mask tensor."""


@dataclass
class Work:
    """What was computed: matrix products one by one (`Product`); of all other operations the bytes
    they move and the `transcendentals`, exponentials and the like; and how many operations,
    products too, are `called` through the Python code of a model and how many `launched` by a
    backward pass or a plain loop."""

    products: list[Product] = field(default_factory=list)
    moved: float = 0
    transcendentals: float = 0
    called: float = 0
    launched: float = 0

    @property
    def flops(self) -> float:
        return math.fsum(flops * times for flops, _, times, _ in self.products)

    def spend(self, moved: float, transcendentals: float, launched: float) -> None:
        """Work that does not follow from sizes."""
        self.moved += moved
        self.transcendentals += transcendentals
        self.launched += launched

    def add(self, other: Work, times: float = 1) -> None:
        """Put `times` times the other work on top."""
        self.products += [(f, m, n * times, kind) for f, m, n, kind in other.products]
        self.moved += other.moved * times
        self.transcendentals += other.transcendentals * times
        self.called += other.called * times
        self.launched += other.launched * times


def product(rows: int, inputs: int, outputs: int, itemsize: int, copies: int = 1) -> Product:
    """A matrix product of `rows` × `inputs` by `inputs` × `outputs`, done once; `copies`: of
    matrices that share the rows, of which no more than the rows are read."""
    touched = (rows * (inputs + outputs) + min(copies, rows) * inputs * outputs) * itemsize
    return 2 * rows * inputs * outputs, touched, 1.0, PLAIN
