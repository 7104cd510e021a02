"""Pairs beside columns that contradict which answer is the better one. The names of the answers are
believed; in how many rows something else is said, a report tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .labels import WORDS, Rows, direction, words
from .mapping import Fields, number, plain
from .messages import LESS, MORE, Row

SIDES_OF_PAIR = (
    ("chosen", "rejected"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("good", "bad"),
    ("win", "lose"),
)
TURNED = re.compile("flip|swap|revers|disagree")


@dataclass(frozen=True)
class Doubt:
    """What contradicts the names of a pair's answers, in words, and whether a row says it."""

    says: str
    said_by: Callable[[Row], bool]


def doubts(rows: Rows, of: Fields) -> list[Doubt]:
    """What columns say against `chosen` and `rejected`: two scores of which the chosen answer has
    the worse, and yes or no of the whole pair (`label`, `flipped`, `agree`)."""
    if not of.chosen or not of.rejected:
        return []
    columns = [c for c in dict.fromkeys(str(k) for r in rows for k in r) if c not in of.ignore]
    columns = [c for c in columns if c not in of.paths().values()]
    scores = [
        _lower(c, other, direction(stem))
        for c in columns
        for good, bad in SIDES_OF_PAIR
        if good in re.split("[^a-z]+", c)
        if (other := _with(c, good, bad)) in columns and direction(stem := _with(c, good, ""))
    ]
    flags = [c for c in columns if words(c) & WORDS["of_pair"] and _is_flag(rows, c)]
    return scores + [_flag(c) for c in flags]


def _with(column: str, word: str, instead: str) -> str:
    return re.sub(rf"(?<![a-z]){word}(?![a-z])", instead, column)


def _lower(chosen: str, rejected: str, way: int) -> Doubt:
    def said_by(row: Row) -> bool:
        one, other = number(row.get(chosen)), number(row.get(rejected))
        return one is not None and other is not None and way * (one - other) < 0

    return Doubt(f"{chosen!r} is {'lower' if way > 0 else 'higher'} than {rejected!r}", said_by)


def _is_flag(rows: Rows, column: str) -> bool:
    seen = {plain(r.get(column)) for r in rows} - {""}
    return len(seen) > 1 and seen <= MORE | LESS


def _flag(column: str) -> Doubt:
    contrary = MORE if TURNED.search(column.lower()) else LESS
    yes = "yes" if contrary is MORE else "no"
    return Doubt(f"{column!r} says {yes}", lambda row: plain(row.get(column)) in contrary)
