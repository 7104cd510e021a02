"""A response as coloured tokens: the figures of a token, their scale of colours, and the HTML.

Blue is below the middle of a scale, orange above, nothing at the middle: Okabe and Ito's two that
no colour blindness confuses. The colours are laid over the theme's own background, and never so
thick that its own letters could not be read on them, in the light theme and in the dark one.

A text of a model or a user is shown in full: markup as text, line breaks as ⏎ and a break, and
characters that are invisible, or that reverse the line, by their number (U+202E).
"""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from ..display import escape, format_number
from ..stages import read_table
from .frame import COLOURS

_HERE = Path(__file__).parent
BELOW, ABOVE = COLOURS[0], COLOURS[1]  # blue, orange
NO_BREAK = "\N{NO-BREAK SPACE}"  # a number stays beside its name
LEVELS = 8  # shades on each side of the middle
STRONGEST = 0.72  # opacity of the last shade: letters in the theme's colour keep a contrast of 4.5


@dataclass(frozen=True)
class Quantity:
    """A figure of a token: its name, the label of its axis, and what low and high values mean."""

    name: str
    axis: str
    low: str
    high: str
    drawn: Sequence[str] = ()
    """the figures that a chart shows together; itself where empty"""


QUANTITIES: dict[str, Quantity] = {
    key: Quantity(**fields) for key, fields in read_table(__file__, "tokens.yaml").items()
}
"""The figures that colour tokens, by their key in a record."""
FIGURE_NAMES = {name: q.name for name, q in QUANTITIES.items()} | {
    "kl": "KL (k3)",
    "return": "return",
    "logprob": "log π",
}


@dataclass
class Tokens:
    """The tokens of a response and their figures; without a record, its words and no figures.

    `special`: indices of special tokens. `figures`: name → a value for each token, None where it is
    not known.
    """

    text: list[str]
    special: frozenset[int] = frozenset()
    figures: dict[str, list[float | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, record: object, response: str) -> Tokens:
        """From a sample's `tokens`, of which nothing is sure; without, the response by words."""
        texts = record.get("text") if isinstance(record, Mapping) else None
        if not isinstance(record, Mapping) or not isinstance(texts, list) or not texts:
            return cls(re.findall(r"\s*\S+|\s+", response))
        figures = {}
        for name in ("logprob", "log_ratio", "value", "reward", "advantage", "return"):
            numbers = record.get(name)
            if isinstance(numbers, list) and len(numbers) == len(texts):
                figures[name] = [real(x) for x in numbers]
        if "log_ratio" in figures:
            figures["kl"] = [_k3(x) for x in figures["log_ratio"]]
        places = record.get("special")
        special = [p for p in places if isinstance(p, int)] if isinstance(places, list) else []
        known = {n: xs for n, xs in figures.items() if any(x is not None for x in xs)}
        return cls([str(t) for t in texts], frozenset(special), known)

    @property
    def kl(self) -> float | None:
        """KL of the whole response, in nats: the sum of its log-ratios (k1)."""
        known = [x for x in self.figures.get("log_ratio", []) if x is not None]
        return math.fsum(known) if known else None

    def words(self, at: int) -> str:
        """One token and all of its figures, in a line."""
        shown = f"“{plain(self.text[at])}”" if self.text[at] else "(part of the next character)"
        known = [
            f"{FIGURE_NAMES[n]} {format_number(self.figures[n][at])}".replace(" ", NO_BREAK)
            for n in FIGURE_NAMES
            if n in self.figures
        ]
        return " · ".join([f"{at + 1}/{len(self.text)} {shown}", *known])


def real(x: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return None
    return float(x) if math.isfinite(x) else None


def _k3(k1: float | None) -> float | None:
    """KL's k3 estimate e^(−k1) − 1 + k1; None where it is far too large to be drawn."""
    return None if k1 is None or k1 < -50 else math.expm1(-k1) + k1


# -- the scale of colours ---------------------------------------------------------------------
@dataclass(frozen=True)
class Scale:
    """Values to shades: `middle` has none, `middle ± reach` and all beyond have the last one."""

    middle: float
    reach: float
    one_sided: bool = False

    def level(self, value: float | None) -> int:
        """The shade of a value, −LEVELS … LEVELS; 0 for None."""
        if value is None:
            return 0
        share = max(-1.0, min(1.0, (value - self.middle) / self.reach))
        return round(share * LEVELS)

    @property
    def start(self) -> str:
        """The left end of a legend."""
        low = format_number(self.middle - (0 if self.one_sided else self.reach))
        return low if self.one_sided else f"≤ {low}"

    @property
    def end(self) -> str:
        return f"≥ {format_number(self.middle + self.reach)}"


def scale_of(key: str, responses: Sequence[Tokens]) -> Scale | None:
    """One scale for all responses, so that colours can be compared; None where none has the figure.

    It reaches as far as 98 of 100 tokens; of the reward, without the last token of each response:
    beside the score nothing else would be seen.
    """
    every = math.ceil(len(responses) / 400)  # enough of them for the scale
    values: list[float] = []
    for tokens in responses[:: every or 1]:
        numbers = tokens.figures.get(key, [])
        values += [x for x in (numbers[:-1] if key == "reward" else numbers) if x is not None]
    if not values:
        return None
    middle = statistics.median(values) if key == "value" else 0.0
    away = sorted(abs(x - middle) for x in values)
    reach = _round_up(away[min(len(away) - 1, int(0.98 * len(away)))])
    if key == "value":  # a number that can be read in a legend
        middle = round(middle / (reach / 4)) * (reach / 4)
    return Scale(middle, reach, key == "kl")


def _round_up(x: float) -> float:
    """The next number that is easy to read; 1 for nothing at all."""
    if not 1e-9 < x < 1e9:
        return 1.0 if x <= 1e-9 else 1e9
    power = 10.0 ** math.floor(math.log10(x))
    easy = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(f * power for f in easy if f * power >= x * (1 - 1e-9))


def shade(level: int) -> tuple[str, float]:
    """Colour and opacity of a level."""
    return (ABOVE if level > 0 else BELOW), abs(level) / LEVELS * STRONGEST


# -- any text, as text ------------------------------------------------------------------------
NEW_LINE = '<i class="nl"></i>\n'  # the style sheet writes the ⏎, so that it is not copied


def _unseen(letter: str) -> bool:
    """Whether it is invisible or moves the text around it. Joiners are not: they make emoji and
    letters of many scripts."""
    if letter in "\n\t\u200c\u200d":
        return False
    code = ord(letter)
    none = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return none or unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    """The text as HTML: everything in it is visible, and none of it is markup."""
    parts, shown = [], 0
    for at, letter in enumerate(text):
        if letter == "\n" or _unseen(letter):
            mark = NEW_LINE if letter == "\n" else f'<i class="un">{_code(letter)}</i>'
            parts += [escape(text[shown:at]), mark]
            shown = at + 1
    return "".join([*parts, escape(text[shown:])])


def plain(text: str) -> str:
    """The text in one line, for places that take no markup."""
    swap = {"\n": "⏎", "\t": "⇥"}
    return "".join(swap.get(c) or (f"[{_code(c)}]" if _unseen(c) else c) for c in text)


def _code(letter: str) -> str:
    return f"U+{ord(letter):04X}"


# -- HTML -------------------------------------------------------------------------------------
def _rule(level: int) -> str:
    red, green, blue = (int(shade(level)[0][i : i + 2], 16) for i in (1, 3, 5))
    name = f"p{level}" if level > 0 else f"m{-level}"
    return f".lab-tk .{name}{{background:rgba({red},{green},{blue},{shade(level)[1]:.2f})}}"


STYLE = (
    "<style>"
    + "".join(_rule(i) for i in range(-LEVELS, LEVELS + 1) if i)
    + (_HERE / "tokens.css").read_text("utf-8")
    + "</style>"
)


def tokens_html(
    tokens: Tokens, key: str = "", scale: Scale | None = None, search: str = "", selected: int = -1
) -> str:
    """The response, token by token. `search`: a text to mark; `selected`: the number of a token."""
    numbers = tokens.figures.get(key) if scale else None
    hits = _hits(tokens.text, search)
    spans = []
    for i, text in enumerate(tokens.text):
        level = scale.level(numbers[i]) if scale and numbers else 0
        marks = [
            "t",
            f"p{level}" if level > 0 else f"m{-level}" if level else "",
            "sp" if i in tokens.special else "",
            "hit" if i in hits else "",
            "sel" if i == selected else "",
        ]
        tip = f' data-tip="{escape(tokens.words(i))}"' if tokens.figures else ""
        spans.append(f'<span class="{" ".join(filter(None, marks))}"{tip}>{visible(text)}</span>')
    return "".join(spans)


def marked(text: str, search: str) -> str:
    """A text as HTML, with every place of `search` marked."""
    folded, parts, start = text.casefold(), list[str](), 0
    for begin, end in _found(folded, search) if len(folded) == len(text) else ():
        parts += [visible(text[start:begin]), f"<mark>{visible(text[begin:end])}</mark>"]
        start = end
    return "".join([*parts, visible(text[start:])])


def _hits(texts: Sequence[str], search: str) -> set[int]:
    """The numbers of the tokens that a searched text touches."""
    low = [text.casefold() for text in texts]
    ends = [0, *accumulate(map(len, low))]
    return {
        i
        for begin, end in _found("".join(low), search)
        for i in range(len(low))
        if ends[i] < end and ends[i + 1] > begin
    }


def _found(folded: str, search: str) -> Iterator[tuple[int, int]]:
    """Where a text, of which letters are folded, holds the search: begin and end."""
    if search:
        yield from (m.span() for m in re.finditer(re.escape(search.casefold()), folded))


def legend_html(key: str, scale: Scale | None) -> str:
    """What the colours mean, in numbers and in words."""
    if scale is None:
        return ""
    quantity = QUANTITIES[key]
    first = 0 if scale.one_sided else -LEVELS
    swatches = "".join(
        f'<span class="{f"p{i}" if i > 0 else f"m{-i}" if i else ""}"></span>'
        for i in range(first, LEVELS + 1)
    )
    middle = f" (no colour: {format_number(scale.middle)})" if scale.middle else ""
    return (
        f'<div class="lab-tk"><div class="legend"><b>{escape(quantity.axis)}</b>'
        f"<span>{escape(f'{scale.start} {quantity.low}'.strip())}</span>"
        f'<span class="bar" aria-hidden="true">{swatches}</span>'
        f"<span>{escape(f'{scale.end} {quantity.high}{middle}')}</span></div></div>"
    )


def facts(figures: Mapping[str, float], tokens: Tokens) -> list[tuple[str, str]]:
    """The figures of a whole response, as (name, number)."""
    known = [(n.replace("_", " "), format_number(x)) for n, x in figures.items()]
    if tokens.kl is not None:
        known.append(("KL", f"{format_number(tokens.kl)} nats"))
    count = f"{len(tokens.text)} " + ("tokens" if tokens.figures else "words")
    return [*known, ("", count)]


def facts_html(pairs: Iterable[tuple[str, str]]) -> str:
    parts = (
        f"{escape(plain(name))} <b>{escape(number)}</b>" if name else escape(number)
        for name, number in pairs
    )
    return f'<div class="facts">{" · ".join(parts)}</div>'


def token_rows(tokens: Tokens) -> list[dict[str, object]]:
    """A table's lines: every token and its figures."""
    return [
        {"#": i + 1, "token": plain(text)}
        | {FIGURE_NAMES[n]: xs[i] for n in FIGURE_NAMES if (xs := tokens.figures.get(n))}
        for i, text in enumerate(tokens.text)
    ]
