"""What a user (or a named shape) says of a file's columns, and which answer a row prefers.

The same words in Python (`fields={"answers": ["a", "b"], "winner": "choice"}`), on the command line
(`--field answers=a,b --field winner=choice`) and in a YAML file (`winner: choice`). A path is the
name of a column, or a JMESPath into it (`info.post`, `annotations[0].value`).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

from ..display import did_you_mean
from .messages import TIES, Cell, Dropped, Row, missing, structure

FieldMap: TypeAlias = dict[str, Cell]
"""`Fields` as a dict: what a user, or the table of shapes, says of each."""
Get: TypeAlias = Callable[[Row], Cell]
TIE = -1
SIDES = (("first", "left"), ("second", "right"))
GROUP = "\0group"
"""Where rows of one prompt stand in the row that they make together."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Refused(ValueError):
    """What is wrong with a file or a mapping, in one line, and a mapping that would mend it.

    `{fields}` in the line stands for the mapping (`{other}`: one of another reading; `{ignore}`:
    columns that mean nothing), in the form of the surface where the user is.
    """

    def __init__(
        self,
        line: str,
        example: FieldMap,
        ignore: Sequence[str] = (),
        other: FieldMap | None = None,
    ) -> None:
        self.line, self.example, self.ignore = line, example, list(ignore)
        self.other: FieldMap = other or {}
        super().__init__(self.shown("python"))

    def shown(self, surface: str) -> str:
        """The line for "python", "flags" or "yaml"."""
        line = self.line.replace("{ignore}", spell({"ignore": self.ignore}, surface))
        line = line.replace("{other}", spell(self.other, surface))
        return line.replace("{fields}", spell(self.example, surface))

    @property
    def command_line(self) -> str:
        """The line for somebody who types flags."""
        return self.shown("flags")


def spell(example: Mapping[str, object], surface: str) -> str:
    """A mapping as it is written in Python, with flags, or in a YAML file."""
    if surface == "python":
        return f"fields={dict(example)!r}"
    if surface == "yaml":
        import yaml

        lines = yaml.safe_dump(dict(example), default_flow_style=None, sort_keys=False, width=999)
        return "; ".join(lines.strip().splitlines())
    flags = []
    for name, value in example.items():
        if isinstance(value, Mapping):
            value = ",".join(f"{k}:{v}" for k, v in value.items())
        flags.append(f"--field {shlex.quote(f'{name}={value}')}")
        if isinstance(value, list):
            flags[-1] = f"--field {shlex.quote(name + '=' + ','.join(value))}"
    return " ".join(flags)


@dataclass(frozen=True)
class Fields:
    """Where each of our fields stands in a row, and what decides between several answers.

    Paths: `prompt`, `system`, `history` (earlier turns), `tools`, and what is there of
    `completion`, `chosen`, `rejected`, `label` (true: a good answer). Several answers: `answers`,
    their paths (or one path of a list; with `each`, the path of a list of objects, and with
    `group`, rows of one prompt that follow each other, paths into each of them), and one of

    - `winner`: says which; `values` tells what its values mean ({"1": "A", "2": "B", "0": "tie"});
    - `preference`: a signed number; `positive` names the answer that is better above 0;
    - `scores`: a number for each answer, the higher is better; `ranks`: the lower.

    Answers that differ by less than `margin` are a tie. `ties`: drop, or keep both answers as
    demonstrations. `pairs`: extremes (the best answer against the worst) or all. `parted`:
    conversations that part before their last answers: drop, or pair the answers there. `rows`: the
    path at which a wrapped file keeps its rows. `ignore`: columns that mean nothing here.
    """

    prompt: str = ""
    system: str = ""
    history: str = ""
    tools: str = ""
    completion: str = ""
    chosen: str = ""
    rejected: str = ""
    label: str = ""
    answers: tuple[str, ...] = ()
    each: str = ""
    group: str = ""
    winner: str = ""
    values: Mapping[str, str] | None = None
    preference: str = ""
    positive: str = ""
    scores: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    margin: float = 0.0
    ties: str = "drop"
    pairs: str = "extremes"
    parted: str = "drop"
    rows: str = ""
    ignore: tuple[str, ...] = ()

    def paths(self) -> dict[str, str]:
        """Every path by what it is of: "prompt", "answer A", "decides", …"""
        found = {f: getattr(self, f) for f in PATHS if getattr(self, f)}
        single = len(self.answers) == 1
        found |= {
            "answers" if single else f"answer {letter(i)}": p for i, p in enumerate(self.answers)
        }
        if self.decider:
            deciding = getattr(self, self.decider)
            deciding = (deciding,) if isinstance(deciding, str) else deciding
            found |= {f"{self.decider} {i + 1}": p for i, p in enumerate(deciding)}
        return found

    @property
    def decider(self) -> str:
        """Which of "winner", "preference", "scores" and "ranks" decides; "" for none."""
        return next((d for d in DECIDERS if getattr(self, d)), "")


DECIDERS = ("winner", "preference", "scores", "ranks")
PATHS = ("prompt", "system", "history", "tools", "completion", "chosen", "rejected", "label")
LISTS = ("answers", "scores", "ranks", "ignore")
KNOWN = tuple(f.name for f in fields(Fields))
CHOICES = {
    "ties": ("drop", "demonstrations"),
    "pairs": ("extremes", "all"),
    "parted": ("drop", "pair"),
}


def letter(index: int) -> str:
    return LETTERS[index] if index < len(LETTERS) else str(index + 1)


# --------------------------------------------------------------------------------- the surfaces


def from_flags(flags: Sequence[str]) -> dict[str, object]:
    """`--field` arguments ("chosen=better", "answers=a,b", "values=1:A,2:B") as a mapping."""
    found: FieldMap = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not equals or not value:
            raise ValueError(f"--field {flag!r}: write OURS=COLUMN, for example chosen=better")
        if name == "values":
            # A value may hold commas and colons itself: what it means is one word, at its end.
            pairs = re.findall(r"(.+?):\s*(\w+)\s*(?:,|$)", value) or [(value, "")]
            found[name] = {**found.get(name, {}), **{k.strip(): v for k, v in pairs}}
        elif name in LISTS:  # commas part paths, unless in brackets or quotes
            parts = re.findall(r"""(?:\[[^]]*\]|\([^)]*\)|"[^"]*"|'[^']*'|`[^`]*`|[^,])+""", value)
            found[name] = [*found.get(name, []), *parts]
        else:
            found[name] = value
    return found


def checked(given: Mapping[str, object], name: str) -> FieldMap:
    """A mapping whose names and types are right. Raises ValueError with one line.

    `name` is the source, for the message.
    """
    found: FieldMap = {}
    for ours, value in given.items():
        if ours not in KNOWN:
            near = did_you_mean(ours, KNOWN)
            raise ValueError(
                f"{name}: no field {ours!r} to map; {near}choose from {', '.join(KNOWN)}"
            )
        if ours == "values":
            found[ours] = _values(value, name)
        elif ours == "margin":
            found[ours] = number(value)
            if found[ours] is None or found[ours] < 0:
                raise ValueError(f"{name}: margin is a number of at least 0, not {value!r}")
        elif ours in LISTS:
            found[ours] = (value,) if isinstance(value, str) else value
            if not isinstance(found[ours], (list, tuple)) or not all(
                isinstance(v, str) and v for v in found[ours]
            ):
                raise ValueError(f"{name}: {ours} is a list of columns, not {value!r}")
            found[ours] = tuple(found[ours])
        elif not isinstance(value, str) or not value:
            raise ValueError(f"{name}: {ours} is a column or a path, not {value!r}")
        elif ours in CHOICES and value not in CHOICES[ours]:
            raise ValueError(f"{name}: {ours} is {' or '.join(CHOICES[ours])}, not {value!r}")
        else:
            found[ours] = value
    return found


def _values(given: object, name: str) -> dict[str, str]:
    """What each value of the winner or the label means, with values as `plain` writes them."""
    right = isinstance(given, Mapping) and bool(given)
    means = (
        {plain(k): str(v).strip() for k, v in given.items()} if isinstance(given, Mapping) else {}
    )
    wrong = [v for v in means.values() if not re.fullmatch("(?i)[a-z]|tie|good|bad|true|false", v)]
    if not right or wrong:
        problem = f"not {wrong[0]!r}" if wrong else f"not {given!r}"
        raise ValueError(
            f"{name}: values says what each value means: A, B, … (the answers in their order) or "
            f"tie, of a label good or bad; {problem}"
        )
    return {k: v.lower() if len(v) > 1 else v.upper() for k, v in means.items()}


# ----------------------------------------------------------------------------------- reading a row


def getter(path: str, columns: Sequence[str] | set[str], what: str, name: str) -> Get:
    """What reads a path: the column of that name, or a JMESPath. Raises ValueError, one line."""
    if path in columns or path == GROUP:
        return lambda row: row.get(path)
    import jmespath
    from jmespath.exceptions import JMESPathError

    try:
        compiled = jmespath.compile(path)
    except JMESPathError:
        raise ValueError(
            f"{name}: {what}={path!r} is neither a column nor a JMESPath; there are "
            f"{shown_list(columns)} (a name with dots or spaces inside a path stands in quotes)"
        ) from None

    goes_into = [c for c in columns if mentions(path, c)]

    def get(row: Row) -> Cell:
        inside = {c: structure(row[c]) for c in goes_into if isinstance(row.get(c), str)}
        try:
            return compiled.search({**row, **inside} if inside else row)  # JSON in a table's cells
        except (JMESPathError, TypeError):  # a function, or a sign, met what it does not take
            return None

    return get


def mentions(path: str, column: str) -> bool:
    """Whether a path goes through a column."""
    return path == column or bool(re.search(rf"(?<![\w.]){re.escape(column)}(?!\w)", path))


def shown_list(names: Sequence[str] | set[str]) -> str:
    shown = [str(n) for n in list(names)[:12]] + ["…"] * (len(names) > 12)
    return f"[{', '.join(shown)}]"


def plain(value: object) -> str:
    """A label as it is compared: lower case; true, false; 1 for 1.0; "" for none.

    What annotation tools wrap (`[{"selected": "left"}]`) is unwrapped.
    """
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return plain(value[0])
    if isinstance(value, Mapping):
        inside = next((value[k] for k in ("selected", "choices", "value") if k in value), None)
        return plain(inside)
    if isinstance(value, bool) or missing(value):
        return str(value).lower() if isinstance(value, bool) else ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found = str(value).strip().lower()
    if re.fullmatch(r"-?\d+\.0+", found):  # a table's 1.0
        found = found.partition(".")[0]
    return "" if found in ("nan", "n/a", "none", "null", "na", "<na>", "unlabeled") else found


def number(value: object) -> float | None:
    """A score as a number, also out of text ("4"); None for "N/A", gaps and the like."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


OF_MOST = re.compile(r"(\d+(?:\.\d+)?) ?(?:/|out of|of) ?(\d+(?:\.\d+)?)", re.IGNORECASE)
PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%")
STARS = re.compile("(?:★\ufe0f?|⭐\ufe0f?)*☆*")


def score_in_words(value: object) -> tuple[str, float] | None:
    """(form, score) of "9/10", "4.5 out of 5", "80%" and "★★★☆☆": scores of one form can be
    compared, and the form has the most that can be given. None for any other text."""
    text = value.strip() if isinstance(value, str) else ""
    if (found := OF_MOST.fullmatch(text)) and float(found[1]) <= float(found[2]):
        return f"of {float(found[2]):g}", float(found[1])
    if found := PERCENT.fullmatch(text):
        return "%", float(found[1])
    if text and STARS.fullmatch(text):
        full, empty = sum(text.count(star) for star in "★⭐"), text.count("☆")
        return f"of {full + empty} stars" if empty else "stars", float(full)
    return None


def scores_of(values: Sequence[object]) -> list[float | None]:
    """Numbers, or scores in words of one form; None for gaps. Raises Dropped for several forms."""
    found = [("", n) if (n := number(v)) is not None else score_in_words(v) for v in values]
    forms = {score[0] for score in found if score}
    if len(forms) > 1:
        raise Dropped(
            f"scores of several forms ({', '.join(sorted(f or 'numbers' for f in forms))})"
        )
    return [score[1] if score else None for score in found]


def names_of(answers: Sequence[str]) -> dict[str, int]:
    """Values that name an answer beyond doubt → its index: the column, its letter, `model_a` for
    the answer whose column ends in a, first, second, left, right. Bare numbers name none."""
    found = {path.lower(): i for i, path in enumerate(answers)}
    tags = [tag_of(path)[1] for path in answers]
    words = ("model", "response", "answer", "option", "completion", "assistant", "output")
    letters = sorted(tags) == list("abcd")[: len(tags)]
    if letters or sorted(tags) == ["1", "2"]:
        found |= {f"{w}{gap}{t}": i for i, t in enumerate(tags) for w in words for gap in "_ "}
    if letters:
        found |= {tag: i for i, tag in enumerate(tags)}
    if len(answers) == 2 and tags[0] in ("", "a", "0", "1", "first", "left"):
        found |= {word: i for i, words in enumerate(SIDES) for word in words}
    return found


def tag_of(column: str) -> tuple[str, str]:
    """A column's name without the mark that tells it from its like, and the mark: `response_a` →
    `response`, `a`. The mark is "" where there is none."""
    found = re.fullmatch(r"(.*?)[_\-. ]?(a|b|c|d|\d\d?|first|second|left|right)", column.lower())
    if not found:
        return column.lower(), ""
    stem, mark = found.groups()
    glued = mark.isalpha() and column[: -len(mark)] == column[: -len(mark)].rstrip("_-. ")
    camel = column[-len(mark)].isupper() and not column[0].isupper()  # responseA
    return (column.lower(), "") if glued and stem and not camel else (stem, mark)


def winner_index(value: object, meanings: Mapping[str, int]) -> int:
    """The answer that a label names, or TIE. Raises Dropped for none and for what is not known."""
    label = plain(value)
    if label in meanings:
        return meanings[label]
    if not label:
        raise Dropped("no label")
    if label in TIES:
        return TIE
    raise Dropped("a label that says none of the answers")


def merits(
    given: Fields, cells: Sequence[object], count: int, meanings: Mapping[str, int]
) -> list[float | None]:
    """How good each of `count` answers is, by what decides (`cells`: what stands there)."""
    if given.decider == "winner":
        won = winner_index(cells[0], meanings)
        if won >= count:
            raise Dropped("a label that says none of the answers")
        return [float(i == won) for i in range(count)]
    if given.decider == "preference":
        strength = number(cells[0])
        if strength is None:
            raise Dropped("no label")
        return [strength, 0.0] if given.positive == "A" else [0.0, strength]
    listed = structure(cells[0]) if len(cells) == 1 else cells
    if not isinstance(listed, (list, tuple)) or len(listed) != count:
        raise Dropped(f"answers and {given.decider} differ in number")
    sign = -1.0 if given.decider == "ranks" else 1.0
    return [None if n is None else sign * n for n in scores_of(listed)]


def preferred(found: Sequence[float | None], given: Fields) -> list[tuple[int, int]]:
    """(better, worse) pairs of answers. Raises Dropped for ties and for fewer than two merits."""
    known = [(m, -i) for i, m in enumerate(found) if m is not None]
    if len(known) < 2:
        raise Dropped("no label")
    known.sort(reverse=True)  # of equals the first
    far = [
        (-i, -j)
        for place, (one, i) in enumerate(known)
        for other, j in known[place + 1 :]
        if one - other > 0 and one - other >= given.margin
    ]
    if not far:
        raise Dropped("a tie")
    return far if given.pairs == "all" else [(-known[0][1], -known[-1][1])]
