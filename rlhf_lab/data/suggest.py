"""Mappings that a refusal shows: what a column that nobody has explained may mean.

A mapping is shown as it can be pasted only where words and numbers say beyond doubt which way it
goes. Elsewhere a placeholder (COLUMN, VALUE, A_OR_B, GOOD_OR_BAD) stands where the user has to
decide, and a mapping that still holds one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .labels import (
    LOWER,
    OF_BAD,
    OPPOSITE,
    SURE,
    WORDS,
    WORSE,
    Rows,
    copied,
    direction,
    holds_lists,
    in_one_form,
    is_label,
    name_answers,
    names_worse,
    words,
)
from .mapping import LETTERS, SIDES, FieldMap, Fields, Refused, names_of, number, plain, tag_of
from .messages import BAD, GOOD, LESS, MORE, TABLE, TIES, listed, structure

UNKNOWN = "GOOD_OR_BAD"
"""Stands for what a value of a label means."""
NUMBERED = re.compile(r"(?:model|response|answer|option|completion|candidate|choice)?[ _-]?(\d\d?)")
INDEX = {"id", "idx", "index"}
PLACES = {"rank", "ranks", "ranking", "place", "position"}
COUNTED = {"one": "1", "two": "2", "three": "3", "four": "4"}


class Path(str):
    """A JMESPath into columns, where a column may stand as well."""


def path_of(column: str) -> str:
    """A column as a JMESPath."""
    as_it_is = isinstance(column, Path) or re.fullmatch(r"[A-Za-z_]\w*", column)
    return column if as_it_is else f'"{column}"'


def by_place(answers: Sequence[str]) -> dict[str, str]:
    return {str(i): LETTERS[i] for i in range(len(answers))}


def which(count: int) -> str:
    """Stands for the letter of an answer."""
    return "A_OR_B" if count == 2 else f"A_TO_{LETTERS[min(count, 26) - 1]}"


def likely_prompt(rows: Rows, columns: Sequence[str]) -> str:
    """The first column of texts whose name says that it holds what is asked; else a placeholder."""
    for column in columns:
        found = words(column)
        texts = [v for r in rows if isinstance(v := r.get(column), str) and " " in v.strip()]
        asks = found & (WORDS["of_prompt"] | {"inputs", "problem", "request"})
        other = (WORDS["answer"] - {"text", "texts"}) | {"system", "sys", "meta"}
        if asks and not found & other and 2 * len(texts) > len(rows):
            return column
    return "COLUMN"


# ----------------------------------------------------------------------- good and bad, one answer


def good_or_bad(value: str, column: str) -> str:
    """What a value of a label means: "good", "bad", or a placeholder where no table tells it."""
    way = direction(column)
    if value in MORE | LESS:
        return {0: UNKNOWN, 1: "good", -1: "bad"}[way * (1 if value in MORE else -1)]
    if way < 1 and words(column) & OF_BAD:  # a good word of something bad
        return UNKNOWN
    opposite = OPPOSITE.match(value)
    bare = value[opposite.end() :] if opposite else value
    if bare != value and (bare in GOOD) != (bare in BAD):
        return "bad" if bare in GOOD else "good"
    return UNKNOWN if (value in GOOD) == (value in BAD) else "good" if value in GOOD else "bad"


def says_good(rows: Rows, column: str) -> FieldMap:
    """A mapping that may say which answers a label calls good: by words of which the table knows
    what they mean; of numbers of a scale, the higher or the lower, as the column's name says."""
    cells = [structure(r.get(column)) for r in rows]
    path = column
    if holds_lists(rows, column):
        means = all(number(v) is not None for c in cells if isinstance(c, list) for v in c)
        path = f"avg({path_of(column)})" if means else f"{path_of(column)}[0]"
        cells = [
            (sum(map(float, c)) / len(c) if means else c[0]) if isinstance(c, list) and c else None
            for c in cells
        ]
    values = sorted({plain(c) for c in cells} - {""}, key=lambda v: (number(v) or 0.0, v))
    numbers = [n for v in values if (n := number(v)) is not None]
    way = direction(column) if words(column) & (WORDS["graded"] | LOWER) else 0
    if len(numbers) < len(values) or len(values) < 2 or {*values} <= {"1", "0", "-1"}:
        means_of = {v: good_or_bad(v, column) for v in values}
    elif len(values) == 2 and path == column:
        means_of = (
            dict(zip(values, ("bad", "good")[::way])) if way else dict.fromkeys(values, UNKNOWN)
        )
    else:
        inner = path_of(column) if path == column else path
        middle = f"`{(numbers[0] + numbers[-1]) / 2:g}`" if way else "NUMBER"
        return {"label": f"to_number({inner}) {'<' if way < 0 else '>'} {middle}"}
    good_first = sorted(means_of, key=lambda v: means_of[v], reverse=True)
    return {"label": path, "values": {v: means_of[v] for v in good_first}}


# --------------------------------------------------------------------- which of several is better


def means_by(rows: Rows, column: str, answers: Sequence[str]) -> FieldMap:
    """A mapping that may say what the values of a winner's column mean."""
    values = {plain(r.get(column)) for r in rows} - {"", *TIES}
    lists = [structure(r.get(answers[0])) for r in rows] if len(answers) == 1 else []
    count = max((len(c) for c in lists if isinstance(c, list)), default=len(answers))
    numbers = [n for v in values if (n := number(v)) is not None]
    if path := copied(rows, column, answers):
        found: FieldMap = {"winner": path, "values": by_place(answers)}
    elif count == 2 and len(numbers) == len(values) and any(n < 0 for n in numbers):
        return {"preference": path_of(column), "positive": which(2)}
    elif len(answers) == 2 and any(0 < n < 1 for n in numbers):
        return by_chance(column, answers)
    else:
        few = values if 0 < len(values) <= 12 else {"VALUE"}
        found = {"winner": column, "values": sides(few, column, answers, count)}
    own = len(named_in(column, answers)) == 1  # which `sides` has turned round
    worse = names_worse(rows, column, answers) and not words(column) & SURE
    way = direction(column)
    if not own and (worse or way < 0 or (way == 0 and words(column) & OF_BAD)):
        # The answer of a rank may be the first or the last.
        told = count == 2 and (worse or way < 0) and not words(column) & PLACES
        swap = {"A": "B", "B": "A", "tie": "tie"} if told else {}
        found["values"] = {v: swap.get(m, which(count)) for v, m in found["values"].items()}
    return found


def by_chance(column: str, answers: Sequence[str]) -> FieldMap:
    """A mapping that reads a probability: that the answer which the column's name has is better;
    where it has none, the user says of which it is."""
    own, p = named_in(column, answers), f'to_number("{column}")'
    letters = {1: "AB", -1: "BA"}.get(direction(column) if len(own) == 1 else 0)
    if letters and own == [1]:
        letters = letters[::-1]
    means = dict(zip(("above", "below"), letters or (which(2), which(2))))
    return {"winner": _on_a_scale(p, "0.5"), "values": means}


def by_middle(of: Fields) -> FieldMap:
    """A mapping that reads a preference on a scale, once the user has said where its middle is."""
    above = of.positive or which(2)
    below = {"A": "B", "B": "A"}.get(above, above)
    path = f"to_number({path_of(of.preference)})"
    return {"winner": _on_a_scale(path, "NUMBER"), "values": {"above": above, "below": below}}


def _on_a_scale(number: str, middle: str) -> str:
    cases = (
        f"{number} {sign} `{middle}` && '{word}'" for sign, word in zip("><", ("above", "below"))
    )
    return " || ".join([*cases, f"{number} == `{middle}` && 'tie'"])


def named_in(column: str, answers: Sequence[str]) -> list[int]:
    """Which answers have their mark, or their side, in the name of a column."""
    parts = re.split("[^a-z0-9]+", column.lower())
    marks = [{tag_of(c)[1]} - {""} for c in answers]
    if len(answers) == 2 and [tag_of(c)[1] for c in answers] == sorted(
        tag_of(c)[1] for c in answers
    ):
        marks = [mark | {*side} for mark, side in zip(marks, SIDES)]
    return [i for i, names in enumerate(marks) if names & {*parts}]


def sides(values: set[str], column: str, answers: Sequence[str], count: int) -> dict[str, str]:
    """What the values of a label mean, where that is certain: names of the `count` answers what
    they say; yes and no of an answer that the column names; numbers that number the answers."""
    unknown = which(count)
    own, way = named_in(column, answers), direction(column)
    if len(own) == 1 and len(answers) == 2 and values <= MORE | LESS:
        first = own[0] if way > 0 else 1 - own[0]
        return {
            v: LETTERS[first if v in MORE else 1 - first] if way else unknown
            for v in sorted(values)
        }
    names = names_of(answers) if len(answers) > 1 else {}
    means = {v: _named(v, names, unknown) for v in sorted(values)}
    if any(m != unknown for m in means.values()):
        return means
    digits = {v: m[1] for v in values if (m := NUMBERED.fullmatch(COUNTED.get(v, v)))}
    if len(digits) < len(values):
        return means
    marks = [tag_of(c)[1] for c in answers] if len(answers) > 1 else []
    by_name = not values <= {*digits.values()}  # "response 1", not 1
    places = _places({*digits.values()}, column, marks, count, by_name)
    return {v: LETTERS[places[digits[v]]] if places else unknown for v in sorted(values)}


def _named(value: str, names: Mapping[str, int], unknown: str) -> str:
    """The letter of the answer with which a value begins ("a is better", "a>b"), or "tie"."""
    begins = [n for n in names if re.match(rf"\W*{re.escape(n)}\b", value)]
    if not begins:
        return unknown
    name = max(begins, key=len)
    rest = value[value.index(name) + len(name) :]
    besides = set(re.split(r"\W+", rest)) - {""}
    signs = {c for c in rest if c in "<>=≈~"}
    if besides & {"tie", "draw", "equal", "equally", "same"} or (signs and not signs & {*"<>"}):
        return "tie"
    if len(signs) > 1 or besides & (WORDS["not_better"] | WORDS["bad"] | {"lost", "loses"}):
        return unknown
    others = {n for n in names if names[n] != names[name]} & besides
    if "<" in signs:
        return LETTERS[1 - names[name]] if len({*names.values()}) == 2 else unknown
    sure = {"better", "wins", "won", "beats", "preferred", "best", "stronger"}
    if (others or (besides and len(name) == 1)) and not signs and not besides & sure:
        return unknown  # "a and b", "a bit of both"
    return LETTERS[names[name]]


def _places(
    digits: set[str], column: str, marks: Sequence[str], count: int, by_name: bool
) -> dict[str, int]:
    """The answers that numbers stand for; {} where they may count from 0 or from 1, or may say
    something else: how much, or whether the first is better (1) or not (0)."""
    found = words(column)
    index = by_name or bool(found & INDEX)
    sure = index or bool(found & (SURE | WORSE))
    flag = digits <= {"0", "1"} and count == 2
    if not index and found & ((WORDS["graded"] | LOWER) - SURE):
        return {}
    if any(m.isdigit() for m in marks):
        return (
            {m: i for i, m in enumerate(marks)} if digits <= {*marks} and (sure or not flag) else {}
        )
    if [*marks] != sorted(marks):
        return {}
    zero, one = ({str(i + at): i for i in range(count)} for at in (0, 1))
    if "0" in digits and digits <= zero.keys():
        listed = not marks and not found & {"label", "labels", "preference"}
        return zero if index or listed or not flag else {}
    return one if str(count) in digits and digits <= one.keys() else {}


# ------------------------------------------------------------------------------------- refusals


def ask(
    name: str, rows: Rows, answers: Sequence[str], labels: Sequence[str], look: str, given: FieldMap
) -> Refused:
    """The refusal where columns beside answers may decide between them, and nothing tells how."""
    example = {**given, "answers": list(answers)}
    every = [*dict.fromkeys(str(k) for r in rows for k in r)]
    guess: FieldMap = {}
    if not labels and not _one_for_each(rows, every, answers):
        used = {*answers, *map(str, given.values())}
        labels = [c for c in every if c not in used and _few(rows, c)][:1]
        values = {plain(r.get(c)) for c in labels for r in rows} - {"", *TIES}
        choice = dict.fromkeys(sorted(values), which(len(answers)))
        guess = {"winner": labels[0], "values": choice} if labels else {}
    named = [c for c in labels if len(answers) > 1 and name_answers(rows, c, answers)]
    several = [] if named else _one_for_each(rows, labels, answers)
    hidden = [] if labels else _one_for_each(rows, every, answers)
    voted = {} if named or several or not labels else _votes(rows, labels[0], answers)
    listed = [] if named or several or voted else [c for c in labels if holds_lists(rows, c)][:1]
    reading = ""
    other: FieldMap = {}
    if guess:
        example |= guess
    elif several or hidden or listed:
        found, reading, other = _numbers(rows, several or hidden or listed, answers, given)
        example |= found
    elif not named and labels and (lone := _lone(rows, labels[0], answers)):
        example |= {"scores": lone}
    elif voted:
        example |= voted
    else:
        example |= means_by(rows, next(iter(named or labels), "COLUMN"), answers)
    beside = f", and {', '.join(map(repr, labels))} may say which is better" if labels else ""
    if [*answers] == ["completions"] and listed:
        reading += " (steps of one answer, as TRL's stepwise format has them, are none to compare)"
    return Refused(
        f"{name}: {' and '.join(map(repr, answers))} {look}{beside}; say what decides, for example "
        f"{{fields}}{reading}, or what means nothing: {{ignore}}",
        example,
        ignore=list(labels) or ["COLUMN"],
        other=other,
    )


def _few(rows: Rows, column: str) -> bool:
    """Whether a column holds two to five short values, as a choice does."""
    seen = {plain(r.get(column)) for r in rows} - {""}
    return 1 < len(seen) <= 5 and all(len(v) <= 20 for v in seen)


def _one_for_each(rows: Rows, columns: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Columns that hold a number (or what seems to be one) of each answer, in the answers' order;
    those with plain numbers first."""
    groups: dict[str, list[str]] = {}
    for column in columns:
        if tag_of(column)[1] and column not in answers:
            groups.setdefault(tag_of(column)[0], []).append(column)
    marks = [tag_of(c)[1] for c in answers]
    order = [sorted(marks).index(m) for m in marks]
    if len({*marks}) < 2 or len({*marks}) < len(marks):
        return []
    whole = [sorted(g, key=lambda c: tag_of(c)[1]) for g in groups.values() if len(g) == len(marks)]
    whole = [[g[i] for i in order] for g in whole]
    plainly = [g for g in whole if all(_holds_numbers(rows, c) for c in g)]
    asked = [g for g in whole if all(is_label(c, rows) for c in g)]
    return next(iter(plainly or asked), [])


def _holds_numbers(rows: Rows, column: str) -> bool:
    values = [v for r in rows if plain(v := r.get(column))]
    return bool(values) and (all(number(v) is not None for v in values) or in_one_form(values))


def _lone(rows: Rows, column: str, answers: Sequence[str]) -> list[str]:
    """The numbers of one answer, which stand without those of the others; [] for other columns."""
    marks = [tag_of(c)[1] for c in answers]
    flags = {plain(r.get(column)) for r in rows} - {""} <= MORE | LESS
    if len(answers) < 2 or flags or tag_of(column)[1] not in marks:
        return []
    return [column if m == tag_of(column)[1] else "COLUMN" for m in marks]


def _votes(rows: Rows, column: str, answers: Sequence[str]) -> FieldMap:
    """A mapping by votes: an object with a number for each answer's name, or a list of names, of
    each the more the better; a list that holds every name once is an order, the best first or
    last."""
    cells = [structure(r.get(column)) for r in rows if plain(r.get(column)) or r.get(column)]
    names = names_of(answers) if len(answers) > 1 else {}
    inside = [[*c] for c in cells if isinstance(c, (list, dict))]
    spelled = {i: n for c in inside for n in map(str, c) if (i := names.get(n.lower())) is not None}
    if len(inside) < len(cells) or not {*range(len(answers))} <= spelled.keys():
        return {}
    if not all(isinstance(n, str) and n.lower() in names for c in inside for n in c):
        return {}
    path = path_of(column)
    if all(isinstance(c, dict) and all(number(v) is not None for v in c.values()) for c in cells):
        return {"scores": [f'{path}."{spelled[i]}"' for i in range(len(answers))]}
    if not all(isinstance(c, list) for c in cells):
        return {}
    if all(len({*c}) == len(c) == len(answers) for c in inside):
        return {"winner": f"{path}[FIRST_OR_LAST]"}
    return {"scores": [f"length({path}[?@ == '{n}'])" for _, n in sorted(spelled.items())]}


def _numbers(
    rows: Rows, columns: Sequence[str], answers: Sequence[str], given: FieldMap
) -> tuple[FieldMap, str, FieldMap]:
    """A mapping by a number for each answer, in columns of theirs or in a list; what else the line
    says, and the mapping of another reading."""
    first, way = columns[0], direction(columns[0])
    if words(first) & {"grade"}:  # 1 is the best in some countries
        way = 0
    word = {1: "scores", -1: "ranks", 0: "SCORES_OR_RANKS"}[way]
    cells = [v for c in columns for r in rows if plain(v := r.get(c))]
    lists = [structure(v) for v in cells]
    each = [i for v in lists for i in (v if isinstance(v, list) else [v])]
    odd = next((plain(v) for v in each if plain(v) and number(v) is None), "")
    odd = "" if in_one_form([v for v in each if plain(v)]) else odd
    if odd and len(columns) == 1:
        return {"scores": [f"map(&@ == '{_good_word(each)}', {path_of(first)})"]}, "", {}
    if odd:
        line = f" ({first!r} holds {odd!r}, which is no number: make numbers of it in Python, "
        return {"scores": ["COLUMN"] * len(columns)}, line + "fields=FUNCTION)", {}
    orders, other = as_order(first, cells, way < 0) if len(columns) == 1 and way else ([], {})
    if not orders:
        return {word: list(columns)}, "", {}
    what = "rank" if way < 0 else "score"
    reading = f" (of {orders} each number is an answer's {what}; where it is the order of the "
    reading += "answers, the best first: {other})"
    return {word: list(columns)}, reading, {**given, "answers": list(answers), **other}


def _good_word(values: Sequence[object]) -> str:
    """The one of two words that says good, where the other says bad; else a placeholder."""
    seen = {plain(v): str(v) for v in values if plain(v)}
    means = {good_or_bad(v, "label"): v for v in seen}
    return seen[means["good"]] if len(seen) == 2 and {*means} == {"good", "bad"} else "VALUE"


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
    values = {str(i + int(least)): LETTERS[i] for i in range(max(map(len, orders)))}
    numbers = [n + int(least) for n in odd[0]]
    return numbers, {"winner": f"{path_of(column)}[0]", "values": values}


def _best_first(merits: Sequence[int], lower: bool) -> list[int]:
    return sorted(range(len(merits)), key=merits.__getitem__, reverse=not lower)


def maps_answers(rows: Rows, columns: Sequence[str]) -> FieldMap:
    """A mapping that may read columns of answers: as a better and a worse one by their names, as
    lists of objects with a number each, or the first as it is."""
    by_name = {re.sub("[ -]", "_", c.lower()): c for c in columns}
    for better, worse in TABLE["likely_pairs"]:
        if by_name.keys() >= {better, worse}:
            return {"chosen": by_name[better], "rejected": by_name[worse]}
    for column in columns:  # one that names the others
        others = {c.lower(): c for c in columns if c != column}
        named = {plain(r.get(column)) for r in rows} - {"", *TIES}
        if named and named <= others.keys() and len(others) > 1 and direction(column) > 0:
            values = {c: LETTERS[i] for i, c in enumerate(others)}
            return {"answers": [*others.values()], "winner": column, "values": values}
    column = columns[0]
    lists = [li for r in rows if isinstance(li := listed(r.get(column)), list)]
    items = [i for li in lists for i in li if isinstance(i, Mapping)]
    keys = dict.fromkeys(str(k) for i in items for k in i)
    sizes = {
        k: sum(len(str(v)) for i in items if isinstance(v := i.get(k), str | list)) for k in keys
    }
    decides = [k for k in keys if direction(k) and is_label(k, items)]
    if not decides or len(keys) < 2:
        return {"completion": column}
    way, path = "ranks" if direction(decides[0]) < 0 else "scores", decides[0]
    if not _holds_numbers(items, path):
        way, path = "scores", f"{path_of(path)} == '{_good_word([i.get(path) for i in items])}'"
    text = max((k for k in keys if k not in decides), key=sizes.__getitem__)
    return {"each": column, "answers": [text], way: [path]}
