"""Columns that say how good answers are: which they seem to be, by their names and their values.

Nothing here decides how a file is read: names make a refusal, with a mapping that would mend it
(suggest.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .mapping import names_of, number, plain, score_in_words, tag_of
from .messages import BAD, GOOD, LESS, MORE, TABLE, TIES, Row, missing, structure

Rows: TypeAlias = Sequence[Row]

WORDS = {kind: frozenset(names.split()) for kind, names in TABLE["words"].items()}
"""Words in the names of columns, by what they say (shapes.yaml)."""
LABEL, NOT_BETTER, LOWER, BAD_NAMES, GOOD_NAMES = (
    WORDS[k] for k in ("label", "not_better", "lower", "bad", "good")
)
ANSWER = WORDS["answer"]
SURE = {"better", "best", "chosen", "preferred", "winner", "safer"}
OF_BAD = LOWER | BAD_NAMES | WORDS["turns"] | WORDS["unclear"]
WORSE = {"worse", "worst", "loser", "rejected"}
OPPOSITE = re.compile("(?:un|in|im|ir|dis|non|not)[ _-]?")


def words(column: str) -> set[str]:
    return set(re.split("[^a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", column).lower()))


def is_label(column: str, rows: Rows) -> bool:
    """Whether a column seems to hold how good answers are: by its name, and because it holds
    few values, or numbers; of names that call an answer good or bad, because it holds yes and no;
    and by few values of which one calls an answer bad, whatever the name."""
    found = words(column)
    values = [v for r in rows if not missing(v := r.get(column))]
    every = [i for v in values for i in (v if isinstance(v, list) else [v])]
    numbers = all(
        number(v) is not None or score_in_words(v) or plain(v) in ("true", "false") for v in every
    )
    seen = {plain(v) for v in values}
    if found & LABEL:
        return bool(values) and (numbers or len(seen) <= 12)
    yes_or_no, several = seen <= MORE | LESS | {""}, len(seen - {""}) > 1
    if not found & (WORDS["of_prompt"] - ({"user"} if found & GOOD_NAMES else set())):
        if several and len(seen) <= 12 and any(map(calls_bad, seen)):
            return True
        if found & (BAD_NAMES | GOOD_NAMES):
            return yes_or_no and several
    return bool(found & LOWER) and (numbers or yes_or_no) and len(seen) > 1


def calls_bad(value: str) -> bool:
    """Whether a value (as `plain` writes it) is a word that calls an answer bad."""
    opposite = OPPOSITE.match(value)
    return value in BAD - LESS or bool(opposite and value[opposite.end() :] in GOOD - MORE)


def direction(column: str) -> int:
    """What more of a column says, by its name: 1 a better answer, -1 a worse one, 0 not known."""
    found = words(column)
    low, turned = found & (LOWER | BAD_NAMES), found & WORDS["turns"]
    praised = found & (WORDS["graded"] - {"score", "scores", "rating", "ratings"})
    if found & WORDS["unclear"] or (low and (turned or praised - low)):
        return 0
    if low:
        return -1
    return (-1 if turned else 1) if found & (LABEL | GOOD_NAMES) else 0


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
        mixed = (c for c in columns if words(c) & ANSWER and not direction(c))
        return [c for c in mixed if holds_lists(rows, c)][:1]
    return sorted(stems[best], key=lambda c: tag_of(c)[1])


def holds_lists(rows: Rows, column: str) -> bool:
    """Whether the cells of a column hold lists of several texts or numbers."""
    cells = [structure(c) for r in rows if not missing(c := r.get(column))]
    return bool(cells) and all(
        isinstance(c, list) and len(c) > 1 and not any(isinstance(i, Mapping) for i in c)
        for c in cells
    )


def holds_flags(rows: Rows, column: str) -> bool:
    """Whether a column holds yes and no, and nothing else."""
    return {plain(r.get(column)) for r in rows} <= MORE | LESS | {""}


def name_answers(rows: Rows, column: str, answers: Sequence[str]) -> bool:
    """Whether a column's values name answers beyond doubt, and nothing else."""
    names, seen = names_of(answers), {plain(r.get(column)) for r in rows} - {""}
    return bool(seen & names.keys()) and seen <= names.keys() | TIES


def names_worse(rows: Rows, column: str, answers: Sequence[str]) -> bool:
    """Whether a column seems to name the answer that is the worse one."""
    numbers = all(number(v) is not None for r in rows if plain(v := r.get(column)))
    if words(column) & WORSE and (numbers or name_answers(rows, column, answers)):
        return True
    return direction(column) < 0 and name_answers(rows, column, answers)


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


def holds_texts(rows: Rows, column: str, prompts: int) -> bool:
    """Whether a column may hold answers: by its name, or because its texts differ as prompts do and
    have words in them."""
    values = [v for r in rows if not missing(v := r.get(column)) and number(v) is None]
    if words(column) & ANSWER or not values:
        return bool(values)
    differ = len({repr(v) for v in values}) * 2 > prompts
    return differ and any(re.search(r"[^\W\d_]+ [^\W\d_]+", str(v)) for v in values)


def in_one_form(values: Sequence[object]) -> bool:
    """Whether all are scores in words, of one form (`score_in_words`)."""
    forms = {found[0] if (found := score_in_words(v)) else "" for v in values}
    return len(forms) == 1 and "" not in forms
