"""What a tape (`tape.py`) is made of: bytes that are alive, values, and operations to undo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from .work import NOTHING, Costs, Product

if TYPE_CHECKING:
    from .tape import Tape

BYTE_KINDS = ACTIVATION, GRADIENT, LOGITS = 0, 1, 2
"""What bytes hold: intermediate values, gradients of weights, logits and what is made of them."""
Moments: TypeAlias = Sequence[Sequence[int]]
"""Bytes by kind, at one moment after the other."""


class Store:
    """Bytes that are alive as long as somebody holds this object."""

    __slots__ = ("kind", "size", "tape")

    def __init__(self, tape: Tape, size: float, kind: int = ACTIVATION):
        size = tape.allocated(int(size))
        self.tape, self.size, self.kind = tape, size, kind
        tape.by_kind[kind] += size
        tape.live += size
        if tape.live > tape.peak:
            tape.rose()

    def __del__(self) -> None:
        tape, size = self.tape, self.size
        if tape.rises:
            tape.falls()
        tape.live -= size
        tape.by_kind[self.kind] -= size


@dataclass(slots=True, eq=False)
class Value:
    """`numel` numbers of `itemsize` bytes; `needs` a gradient or not; made by `source`."""

    store: Store
    numel: int
    itemsize: int
    needs: bool = False
    source: Node | None = None


Way: TypeAlias = Store | Literal["new", "same"]
"""The gradient of an input: a new tensor, the one that came in, or written into what is there."""


@dataclass(slots=True, eq=False)
class Node:
    """One operation to undo: where gradients go, and what was saved to compute them. `joins`: it
    keeps the gradients of the parts of its result side by side. `away`: bytes that were saved and
    have to come back."""

    inputs: Sequence[tuple[Node, int, Way]] = ()
    saved: Sequence[Store] = ()
    weights: Sequence[int] = ()
    scratch: int = 0
    work: Sequence[Product] = ()
    kind: int = ACTIVATION
    costs: Costs = NOTHING
    joins: bool = False
    away: int = 0
    grad: Store | None = None
    parts: list[Store] = field(default_factory=list)
