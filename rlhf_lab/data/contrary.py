"""Pairs beside columns that contradict which answer is the better one. The names of the answers are
believed; in how many rows something else is said, a report tells. What they call a tie is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .labels import LABEL, WORDS, Rows, direction, words
from .mapping import Fields, number, plain
from .messages import LESS, MORE, TIES, Row

SIDES_OF_PAIR = (
    ("chosen", "rejected"),
    ("preferred", "dispreferred"),
    ("accepted", "rejected"),
    ("better", "worse"),
    ("good", "bad"),
    ("win", "lose"),
)
TURNED = re.compile("flip|swap|revers|disagree")


MARGINS = {"margin", "strength", "gap", "delta", "diff", "difference"}
"""Words of numbers that say by how much the chosen answer is the better one."""
TIED = {"tie", "ties", "tied", "draw"}
OFTEN_ELSE = {"neutral", "same", "equal", "both", "neither", "draw"}
"""Words of a tie that say so only in a column about the answers."""


@dataclass(frozen=True)
class Doubt:
    """What contradicts the names of a pair's answers, in words, and whether a row says it; `tie`:
    it says that neither is better."""

    says: str
    said_by: Callable[[Row], bool]
    tie: bool = False


def doubts(rows: Rows, of: Fields) -> list[Doubt]:
    """What columns say against `chosen` and `rejected`: two scores of which the chosen answer has
    the worse, or that are equal, a margin below 0 or at it, yes or no of the whole pair (`label`,
    `flipped`, `agree`, `is_tie`), and words of a tie. Against a winner beside its answers:
    `flipped` and the like."""
    columns = [c for c in dict.fromkeys(str(k) for r in rows for k in r) if c not in of.ignore]
    columns = [c for c in columns if c not in of.paths().values()]
    flags = [c for c in columns if words(c) & (WORDS["of_pair"] | TIED) and _is_flag(rows, c)]
    if of.winner:
        return [_flag(c) for c in flags if TURNED.search(c.lower())]
    if not of.chosen or not of.rejected:
        return []
    found = [_flag(c) for c in flags]
    for c in columns:
        for good, bad in SIDES_OF_PAIR:
            if good not in re.split("[^a-z]+", c):
                continue
            other, stem = _with(c, good, bad), _with(c, good, "")
            if other in columns and direction(stem):
                found += [_lower(c, other, direction(stem)), _equal(c, other)]
        if words(c) & MARGINS and not words(c) - MARGINS - LABEL - {""} and _differs(rows, c):
            found += [_below(c), _at_nought(c)]
        found += [_tied(c)] if _says_tie(rows, c) else []
    return found


def _with(column: str, word: str, instead: str) -> str:
    return re.sub(rf"(?<![a-z]){word}(?![a-z])", instead, column)


def _lower(chosen: str, rejected: str, way: int) -> Doubt:
    def said_by(row: Row) -> bool:
        one, other = number(row.get(chosen)), number(row.get(rejected))
        return one is not None and other is not None and way * (one - other) < 0

    return Doubt(f"{chosen!r} is {'lower' if way > 0 else 'higher'} than {rejected!r}", said_by)


def _equal(chosen: str, rejected: str) -> Doubt:
    def said_by(row: Row) -> bool:
        one = number(row.get(chosen))
        return one is not None and one == number(row.get(rejected))

    return Doubt(f"{chosen!r} and {rejected!r} are equal", said_by, tie=True)


def _differs(rows: Rows, column: str) -> bool:
    return len({number(r.get(column)) for r in rows} - {None}) > 1


def _below(column: str) -> Doubt:
    return Doubt(f"{column!r} is below 0", lambda row: (number(row.get(column)) or 0) < 0)


def _at_nought(column: str) -> Doubt:
    return Doubt(f"{column!r} is 0", lambda row: number(row.get(column)) == 0, tie=True)


def _says_tie(rows: Rows, column: str) -> bool:
    """Whether a column may say that there is a tie: one about the answers with short values, in
    rows further down too; of others, one of few values of which some say so."""
    seen = {plain(r.get(column)) for r in rows}
    about = words(column) & (LABEL | WORDS["of_pair"] | MARGINS)
    if about:
        return all(len(value) <= 40 for value in seen)
    return len(seen) <= 12 and bool(seen & (TIES - OFTEN_ELSE))


def _tied(column: str) -> Doubt:
    return Doubt(f"{column!r} says so", lambda row: plain(row.get(column)) in TIES, tie=True)


def _is_flag(rows: Rows, column: str) -> bool:
    """Whether a column holds yes and no, or what contradicts nothing in all of these rows."""
    seen = {plain(r.get(column)) for r in rows} - {""}
    return bool(seen) and seen <= MORE | LESS and (len(seen) > 1 or not seen & _contrary(column))


def _contrary(column: str) -> set[str]:
    turned = words(column) & TIED or TURNED.search(column.lower())
    return MORE if turned else LESS


def _flag(column: str) -> Doubt:
    contrary, tie = _contrary(column), bool(words(column) & TIED)
    yes = "yes" if contrary is MORE else "no"
    return Doubt(f"{column!r} says {yes}", lambda row: plain(row.get(column)) in contrary, tie)
