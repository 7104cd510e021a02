"""Columns that say how good answers are: which they seem to be, and what their values may mean.

Nothing here decides how a file is read: names make a refusal, with a mapping that would mend it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .mapping import LETTERS, FieldMap, Refused, names_of, number, plain, tag_of
from .messages import BAD, TABLE, TIES, Row, missing, structure

Rows: TypeAlias = Sequence[Row]

LABEL, NOT_BETTER, LOWER, ANSWER = (set(words.split()) for words in TABLE["words"].values())
"""Words in the names of columns that say how good answers are, of those that say the opposite, of
those where lower is better, and of those that hold answers."""
SURE = {"better", "best", "chosen", "preferred", "winner"}


def words(column: str) -> set[str]:
    return set(re.split("[^a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", column).lower()))


def is_label(column: str, rows: Rows) -> bool:
    """Whether a column seems to hold how good answers are: by its name, and because it holds
    few values, or numbers."""
    values = [v for r in rows if not missing(v := r.get(column))]
    numbers = all(number(v) is not None or plain(v) in ("true", "false") for v in values)
    few = len({plain(v) for v in values})
    if not words(column) & LABEL:
        return bool(words(column) & LOWER) and numbers and few > 1
    return bool(values) and (numbers or few <= 12)


def says_better(column: str) -> bool:
    """Whether a column's name says that it tells which answer is better."""
    found = words(column)
    no = NOT_BETTER - {"id"} if found & SURE else NOT_BETTER
    return bool(found & (LABEL | LOWER)) and not found & no


def answer_columns(rows: Rows, columns: Sequence[str]) -> list[str]:
    """Columns of texts that differ by a mark only (response_a, response_b), in the marks' order;
    or one that holds lists of them; [] for none. Of several the one whose name says so, or with the
    most text."""
    stems: dict[str, list[str]] = {}
    for column in columns:
        values = [v for r in rows[:50] if not missing(v := r.get(column))]
        if tag_of(column)[1] and any(number(v) is None for v in values):
            stems.setdefault(tag_of(column)[0], []).append(column)
    weights = {}
    for stem, group in stems.items():
        size = sum(len(str(r.get(c))) for r in rows[:50] for c in group)
        large = size > 20 * len(group) * len(rows[:50])
        if len(group) > 1 and (words(stem) & ANSWER or large or not stem):
            weights[stem] = bool(words(stem) & ANSWER), size
    best = max(weights, key=weights.__getitem__, default=None)
    if best is None:
        return [c for c in columns if words(c) & ANSWER and holds_lists(rows, c)][:1]
    return sorted(stems[best], key=lambda c: tag_of(c)[1])


def holds_lists(rows: Rows, column: str) -> bool:
    """Whether the cells of a column hold lists of several texts or numbers."""
    cells = [structure(c) for r in rows if not missing(c := r.get(column))]
    return bool(cells) and all(
        isinstance(c, list) and len(c) > 1 and not any(isinstance(i, Mapping) for i in c)
        for c in cells
    )


def name_answers(rows: Rows, column: str, answers: Sequence[str]) -> bool:
    """Whether a column's values name answers beyond doubt, and nothing else."""
    names, seen = names_of(answers), {plain(r.get(column)) for r in rows} - {""}
    return bool(seen & names.keys()) and seen <= names.keys() | TIES


def copied(rows: Rows, column: str, answers: Sequence[str]) -> str:
    """A path that says which answer a column means by a copy of it, or of a name beside it (of the
    columns `model_a` and `model_b`); "" for a column that does not."""
    if len(answers) < 2:
        return ""
    marks = [tag_of(c)[1] for c in answers]
    groups: dict[str, dict[str, str]] = {"": dict(zip(marks, answers))}
    for other in dict.fromkeys(str(k) for r in rows for k in r if k != column):
        stem, mark = tag_of(other)
        groups.setdefault(stem, {})[mark] = other
    decided = [r for r in rows if plain(r.get(column)) not in {"", *TIES}]
    for group in groups.values():
        beside = [group[m] for m in marks if m in group]
        same = [sum(r[column] == r.get(c) for c in beside) for r in decided]
        if len(beside) == len(answers) and same and set(same) == {1}:
            cases = [f"""\"{column}\" == "{c}" && '{i}'""" for i, c in enumerate(beside)]
            return " || ".join([*cases, f'"{column}"'])
    return ""


def by_place(answers: Sequence[str]) -> dict[str, str]:
    return {str(i): LETTERS[i] for i in range(len(answers))}


def means_by(rows: Rows, column: str, answers: Sequence[str]) -> FieldMap:
    """A mapping that may say what the values of a winner's column mean."""
    if path := copied(rows, column, answers):
        return {"winner": path, "values": by_place(answers)}
    values = {plain(r.get(column)) for r in rows} - {"", *TIES}
    if len(answers) == 2 and any(0 < (number(v) or 0) < 1 for v in values):
        return by_chance(column, answers)
    lists = [structure(r.get(answers[0])) for r in rows] if len(answers) == 1 else []
    count = max((len(c) for c in lists if isinstance(c, list)), default=len(answers))
    return {"winner": column, "values": sides(values or {"VALUE"}, column, answers, count)}


def by_chance(column: str, answers: Sequence[str]) -> FieldMap:
    """A mapping that reads a probability: that the answer which the column's name has is better,
    else the first."""
    likely = max(_named_in(column, answers), default=0)
    p = f'to_number("{column}")'
    cases = (f"{p} {sign} `0.5` && '{i}'" for sign, i in ((">", likely), ("<", 1 - likely)))
    return {"winner": " || ".join([*cases, f"{p} == `0.5` && 'tie'"]), "values": by_place(answers)}


def _named_in(column: str, answers: Sequence[str]) -> list[int]:
    """Which answers have their mark in the name of a column."""
    parts = re.split("[^a-z0-9]+", column.lower())
    return [i for i, c in enumerate(answers) if tag_of(c)[1] in parts]


def ask(
    name: str, rows: Rows, answers: Sequence[str], labels: Sequence[str], look: str, given: FieldMap
) -> Refused:
    """The refusal where columns beside answers may decide between them, and nothing tells how."""
    example = {**given, "answers": list(answers)}
    cells = {c: [v for r in rows if plain(v := r.get(c))] for c in labels}
    scores = [c for c, values in cells.items() if all(number(v) is not None for v in values)]
    if not len(scores) == len(answers) > 1:
        scores = [c for c in labels if holds_lists(rows, c)][:1]
    named = [c for c in labels if len(answers) > 1 and name_answers(rows, c, answers)]
    reading, other = "", {}
    if scores and not named:
        lower = any(words(c) & LOWER for c in scores)
        example["ranks" if lower else "scores"] = sorted(scores, key=lambda c: tag_of(c)[1])
        odd, other = as_order(scores[0], cells[scores[0]], lower)
        what = "rank" if lower else "score"
        if odd:
            other = {**given, "answers": list(answers), **other}
            reading = f" (of {odd} each number is an answer's {what}; where it is the order of the "
            reading += "answers, the best first: {other})"
    else:
        example |= means_by(rows, next(iter(named or labels), "COLUMN"), answers)
    beside = f", and {', '.join(map(repr, labels))} may say which is better" if labels else ""
    return Refused(
        f"{name}: {' and '.join(map(repr, answers))} {look}{beside}; say what decides, for example "
        f"{{fields}}{reading}, or what means nothing: {{ignore}}",
        example,
        ignore=labels or ["COLUMN"],
        other=other,
    )


def as_order(column: str, cells: Sequence[object], lower: bool) -> tuple[list[int], FieldMap]:
    """A list that says something else where it holds numbers of answers in their order
    and not a number of each (`lower`: the lower is better), and a mapping that reads it so. [], {}
    where some list is no order, or where both say the same."""
    lists = [[*map(number, li)] for c in cells if isinstance(li := structure(c), list)]
    least = min((n for li in lists for n in li if n is not None), default=0)
    orders = [[int(n - least) for n in li if n is not None] for li in lists]
    if len(lists) < len(cells) or least not in (0, 1):
        return [], {}
    if any(sorted(o) != [*range(len(li))] for o, li in zip(orders, lists)):
        return [], {}
    odd = [o for o in orders if len(o) > 2 and _best_first(o, lower) != o]
    if not odd:
        return [], {}
    path = column if re.fullmatch(r"[A-Za-z_]\w*", column) else f'"{column}"'
    values = {str(i + int(least)): LETTERS[i] for i in range(max(map(len, orders)))}
    shown = [n + int(least) for n in odd[0]]
    return shown, {"winner": f"{path}[0]", "values": values}


def _best_first(merits: Sequence[int], lower: bool) -> list[int]:
    return sorted(range(len(merits)), key=merits.__getitem__, reverse=not lower)


def maps_answers(rows: Rows, column: str) -> FieldMap:
    """A mapping that may read a column of answers: as lists of objects with a number each, or as
    it is."""
    lists = [li for r in rows if isinstance(li := structure(r.get(column)), list)]
    items = [i for li in lists for i in li if isinstance(i, Mapping)]
    keys = dict.fromkeys(str(k) for i in items for k in i)
    sizes = {
        k: sum(len(str(v)) for i in items if isinstance(v := i.get(k), str | list)) for k in keys
    }
    decides = [k for k in keys if words(k) & (LABEL | LOWER) and is_label(k, items)]
    if not decides or len(keys) < 2:
        return {"completion": column}
    way = "ranks" if words(decides[0]) & LOWER else "scores"
    return {"each": column, "answers": [max(sizes, key=sizes.__getitem__)], way: decides[:1]}


def sides(values: set[str], column: str, answers: Sequence[str], count: int) -> dict[str, str]:
    """What the values of a label may mean: names and numbers of the `count` answers what they say;
    of more numbers those below the middle of their scale A, those above it B, the middle a tie."""
    names = names_of(answers) if len(answers) > 1 else {}
    own = _named_in(column, answers)
    if len(own) == 1 and len(answers) == 2 and values <= {"0", "1", "true", "false"}:
        return {v: LETTERS[own[0] if v in ("1", "true") else 1 - own[0]] for v in sorted(values)}
    means: dict[str, str] = {}
    for value in sorted(values):
        begins = (n for n in names if re.match(rf"\W*{re.escape(n)}\b", value))
        name = max(begins, key=len, default="")
        means |= {value: "tie" if "=" in value else LETTERS[names[name]]} if name else {}
    if means:
        return means
    order = sorted(values, key=lambda v: (number(v) or 0.0, v != "true", v))
    marks = [tag_of(c)[1] for c in answers] if len(answers) > 1 else list(map(str, range(count)))
    if not set(order) <= set(marks):  # then they count from 0 or from 1
        marks = [str(i + (order[0] != "0")) for i in range(count)]
    if set(order) <= set(marks):
        return {v: LETTERS[marks.index(v)] for v in order}
    if len(order) <= count:
        return dict(zip(order, LETTERS))
    numbers = [n for v in order if (n := number(v)) is not None]
    at = dict(zip(order, numbers if len(numbers) == len(order) else range(len(order))))
    middle = (at[order[0]] + at[order[-1]]) / 2
    return {v: "A" if at[v] < middle else "B" if at[v] > middle else "tie" for v in order}


def says_good(rows: Rows, column: str) -> FieldMap:
    """A mapping that may say which answers a label calls good: the higher of two values, of two
    words the one that the other contains (helpful, unhelpful), more than the middle of several."""
    values = sorted({plain(r.get(column)) for r in rows} - {""}, key=lambda v: (number(v) or 0, v))
    lower = bool(words(column) & LOWER)
    if len(values) <= 2:
        values = values if lower else values[::-1]
        longer = {v for v in values for o in values if v != o and v.endswith(o)}
        values.sort(key=lambda v: not lower and v in BAD | NOT_BETTER | longer)
        return {"label": column, "values": dict(zip(values, ("good", "bad")))}
    path = column if re.fullmatch(r"[A-Za-z_]\w*", column) else f'"{column}"'
    middle = ((number(values[0]) or 0) + (number(values[-1]) or 0)) / 2
    return {"label": f"to_number({path}) {'<' if lower else '>'} `{middle:g}`"}


def holds_texts(rows: Rows, column: str, prompts: int) -> bool:
    """Whether a column may hold answers: by its name, or because its texts differ as prompts do and
    have words in them."""
    values = [v for r in rows if not missing(v := r.get(column)) and number(v) is None]
    if words(column) & ANSWER or not values:
        return bool(values)
    differ = len({repr(v) for v in values}) * 2 > prompts
    return differ and any(re.search(r"[^\W\d_]+ [^\W\d_]+", str(v)) for v in values)
