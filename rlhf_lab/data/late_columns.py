"""Columns that are empty in the rows by which a file is recognised, and not in later ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .labels import is_label
from .mapping import Refused
from .messages import Row, missing
from .report import Report


def watched(rows: Iterable[object], first: int, report: Report) -> Iterator[object]:
    """The rows, in turn. Raises Refused at their end for a column that says how good answers are
    and was empty in the `first` ones, by which the shape was recognised."""
    shape, name = report.shape, report.name
    ignored = report.filled.union(shape.fields.ignore)
    late: list[Row] = []
    for row in rows:
        if isinstance(row, Mapping) and len(late) < first:
            new = {k: v for k, v in row.items() if str(k) not in ignored and not missing(v)}
            late += [new] if new else []
        yield row
    if shape.name or shape.fields.label or not shape.fields.completion:
        return
    columns = dict.fromkeys(str(k) for row in late for k in row)
    if labels := [c for c in columns if is_label(c, late)]:
        raise Refused(
            f"{name}: {labels[0]!r} stands in no row of the first {first}, and looks as if it "
            "said how good each answer is, and bad answers are no demonstrations; put a row that "
            "has it first, or say that it means nothing: {ignore}",
            {},
            ignore=labels,
        )
