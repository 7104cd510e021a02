"""Rows out of what they come wrapped in: the object of a dump, the hub's service, a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from .mapping import Refused, getter
from .messages import Dropped

ENOUGH = 10
"""Rows that a file must have, at least."""
FIRST_ROWS = 1000
"""Rows that are looked at to recognise a source's shape."""
OF_HUB, CUT = frozenset({"row_idx", "row"}), frozenset({"truncated_cells"})


def through(make: Callable[..., object], rows: Iterable[object]) -> Iterator[object]:
    """What a user's function makes of each row: a row of ours, several, or None."""
    for number, row in enumerate(rows, 1):
        try:
            made = make(row)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"your function failed on row {number}: {what}") from error
        if made is None:
            yield Dropped("left out by your function")
        else:
            yield from made if isinstance(made, (list, tuple)) else [made]


def unwrapped(
    rows: Iterator[object], fields: Mapping[str, object] | None, name: str
) -> tuple[list[object], Iterator[object]]:
    """The first rows and the others, out of the object that a dump wraps them in."""
    path = str((fields or {}).get("rows", ""))
    if path:
        get = getter(path, (), "rows", name)
        cells = (get(r) if isinstance(r, Mapping) else None for r in rows)
        rows = (r for cell in cells for r in (cell if isinstance(cell, list) else [cell]))
    first = list(islice(rows, FIRST_ROWS))
    if path or len(first) > 1 or not isinstance(first[0] if first else None, Mapping):
        return _bare(first, rows)
    (outer,) = first
    assert isinstance(outer, Mapping)
    lists = [k for k, v in outer.items() if isinstance(v, list) and _are_rows(v)]
    if len(lists) > 1:
        longest = max(lists, key=lambda k: len(outer[k]))
        raise Refused(
            f"{name} holds several lists of rows ({', '.join(lists)}): say which, {{fields}}",
            {"rows": longest},
        )
    found = iter(outer[lists[0]]) if lists else iter(first)
    return _bare(list(islice(found, FIRST_ROWS)), found)


def _bare(first: list[object], rows: Iterator[object]) -> tuple[list[object], Iterator[object]]:
    """Rows out of what the hub's service of rows wraps each in; others as they are."""
    if all(
        isinstance(r, Mapping)
        and OF_HUB <= r.keys() <= OF_HUB | CUT
        and isinstance(r["row"], Mapping)
        for r in first
    ):
        return [*map(_of_hub, first)], map(_of_hub, rows)
    return first, rows


def _of_hub(row: object) -> object:
    """A row as the hub's service of rows wraps it; one whose cells it has cut is left out."""
    if not isinstance(row, Mapping) or "row" not in row:
        return row
    return Dropped("cells that the hub's service has cut") if row.get(*CUT) else row["row"]


def _are_rows(value: list[object]) -> bool:
    return bool(value) and all(
        isinstance(v, Mapping) and not v.keys() & {"role", "from"} for v in value
    )
