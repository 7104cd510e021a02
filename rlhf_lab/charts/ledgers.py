"""Plans, x-rays and runs that a table or a figure of costs is given, and their ledgers' rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from ..runs.ledger import UNITS, Ledger, Row


class HasLedger(Protocol):
    """A plan, an x-ray, a run: whatever knows its costs."""

    @property
    def ledger(self) -> Ledger: ...


def named(things: Iterable[object]) -> Iterator[tuple[str, object]]:
    """Things by name; "" for one that was given without."""
    for thing in things:
        yield from thing.items() if isinstance(thing, Mapping) else [("", thing)]


def training_rows(thing: object, quantity: str) -> Ledger:
    """The rows of a quantity in a thing's ledger, without those around training."""
    if quantity not in UNITS:
        raise ValueError(f"quantity={quantity!r}: choose from {', '.join(UNITS)}")
    ledger = getattr(thing, "ledger", thing)
    if not isinstance(ledger, Ledger):
        raise ValueError(f"{type(thing).__name__} has no ledger")
    return ledger.training(quantity=quantity)


def first_of_each(ledgers: Iterable[Iterable[Row]]) -> list[Row]:
    """The rows of all ledgers; of each stage and source, only those of the first that has it."""
    rows: list[Row] = []
    for ledger in ledgers:
        known = {(row.stage, row.source) for row in rows}
        rows += [row for row in ledger if (row.stage, row.source) not in known]
    return rows
