"""What a tape (`tape.py`) is made of: bytes that are alive, values, and operations to undo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from .work import NOTHING, Costs, Product, Work

if TYPE_CHECKING:
    from .tape import Tape

BYTE_KINDS = ACTIVATION, GRADIENT, LOGITS = 0, 1, 2
"""What bytes hold: intermediate values, gradients of weights, logits and what is made of them."""
Moments: TypeAlias = Sequence[Sequence[int]]
"""Bytes by kind, at one moment after the other."""


class Store:
    """Bytes that are alive as long as somebody holds this object. `adds`: those that saving it
    would add, without rounding."""

    __slots__ = ("adds", "kind", "size", "tape")

    def __init__(self, tape: Tape, size: float, kind: int = ACTIVATION):
        self.adds = size = int(size)
        size = tape.allocated(size)
        self.tape, self.size, self.kind = tape, size, kind
        tape.by_kind[kind] += size
        tape.live += size
        if tape.live > tape.peak:
            tape.rose()

    def write(self, work: Work) -> Store:
        """As it is when a product reads it; `work` grows by what that takes."""
        return self

    @property
    def roots(self) -> Sequence[Store]:
        """What it is computed from in compiled code: it is there."""
        return (self,)

    def __del__(self) -> None:
        tape, size = self.tape, self.size
        if tape.rises:
            tape.falls()
        tape.live -= size
        tape.by_kind[self.kind] -= size


class Fused(Store):
    """What compiled code computes where it is read, and does not write down: it has no bytes, and
    holds its `roots`, what it is made of. `whole`: its bytes where a product reads it after all: it
    is made of those from then on."""

    __slots__ = ("roots", "whole")

    def __init__(self, tape: Tape, size: float, of: Iterable[Store], kind: int = ACTIVATION):
        super().__init__(tape, 0, kind)
        self.roots, self.whole = [*dict.fromkeys(x for store in of for x in store.roots)], size

    def write(self, work: Work) -> Store:
        if self.whole:
            work.moved += self.whole + sum(x.size for x in self.roots)
            work.launched += 1
            self.roots, self.whole = [Store(self.tape, self.whole, self.kind)], 0
        return self.roots[0]


@dataclass(slots=True, eq=False)
class Value:
    """`numel` numbers of `itemsize` bytes; `needs` a gradient or not; made by `source`."""

    store: Store
    numel: int
    itemsize: int
    needs: bool = False
    source: Node | None = None
    cast: Value | None = None
    """the same in another precision, in compiled code"""


Way: TypeAlias = Store | Literal["new", "same"]
"""The gradient of an input: a new tensor, the one that came in, or written into what is there."""


@dataclass(slots=True, eq=False)
class Node:
    """One operation to undo: where gradients go, and what was saved to compute them. `joins`: it
    keeps the gradients of the parts of its result side by side. `away`: bytes that were saved and
    have to come back. `fused`: compiled code writes down none of its gradients."""

    inputs: Sequence[tuple[Node, int, Way]] = ()
    saved: Sequence[Store] = ()
    weights: Sequence[int] = ()
    scratch: int = 0
    work: Sequence[Product] = ()
    kind: int = ACTIVATION
    costs: Costs = NOTHING
    joins: bool = False
    away: int = 0
    fused: bool = False
    grad: Store | None = None
    parts: list[Store] = field(default_factory=list)
