"""Plans, x-rays and runs that a table or a figure of costs is given, and their ledgers' rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..display import check_choice
from ..runs.ledger import UNITS, Ledger, Row
from ..runs.run import Run

if TYPE_CHECKING:
    from ..cost.hardware import Hardware


def named(things: Iterable[object]) -> Iterator[tuple[str, object]]:
    """Things by name; "" for one that was given without. A folder is the run in it."""
    for thing in things:
        for name, one in thing.items() if isinstance(thing, Mapping) else [("", thing)]:
            yield str(name), Run.load(one) if isinstance(one, (str, Path)) else one


def device_of(thing: object) -> Hardware | None:
    """The device that a plan is for; None for what is no plan."""
    found: Hardware | None = getattr(getattr(thing, "estimate", thing), "hardware", None)
    return found


def training_rows(thing: object, quantity: str) -> Ledger:
    """The rows of a quantity in a thing's ledger, without those around training."""
    check_choice("quantity", quantity, UNITS)
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
