"""How numbers, tables and hints read: alike in a terminal, a notebook, a report and an error.

Everything here is pure text: no imports beyond the standard library, so that the ledger and
the runs can show themselves without loading anything.
"""

from __future__ import annotations

import difflib
import html
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from statistics import mean, stdev
from typing import TypeGuard, TypeVar

Item = TypeVar("Item")

UNKNOWN = "–"
SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Characters that XML 1.0 forbids outright: a model may write them, a parser stops at them.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


ON_COMMAND_LINE: ContextVar[bool] = ContextVar("ON_COMMAND_LINE", default=False)
"""Whether who reads a message types flags; the command line sets it."""


def by_surface(python: str, flags: str) -> str:
    """The words of a remedy for who reads it: arguments in Python, flags on the command line."""
    return flags if ON_COMMAND_LINE.get() else python


def escape(text: object) -> str:
    """Text (a model's too) made safe inside HTML and XML, in attributes as well."""
    return html.escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", str(text)), quote=True)


METHODS = {
    "gspo": "GSPO is importance_sampling_level='sequence' of grpo",
    "dapo": "DAPO is loss_type='dapo' of grpo",
    "drgrpo": "Dr. GRPO is loss_type='dr_grpo' of grpo",
    "bnpo": "BNPO is loss_type='bnpo' of grpo",
    "cispo": "CISPO is loss_type='cispo' of grpo",
    "sapo": "SAPO is loss_type='sapo' of grpo",
    "ipo": "IPO is loss_type='ipo' of dpo",
    "bco": "of BCO the lab has loss_type='bco_pair' of dpo",
    "apo": "APO is loss_type='apo_zero' or 'apo_down' of dpo",
    "simpo": "the lab has no SimPO; dpo is what is nearest",
    "orpo": "the lab has no ORPO; dpo after sft is what is nearest",
    "cpo": "the lab has no CPO; dpo is what is nearest",
    "onlinedpo": "the lab has no online DPO; rloo and grpo learn from their own answers",
    "reinforce": "REINFORCE with a baseline is rloo",
    "gkd": "GKD is distill",
}
"""Methods by the names that papers and TRL give them, and what the lab has in their place."""


def did_you_mean(name: object, known: Iterable[object], near: float = 0.5) -> str:
    """`did you mean 'adamw_torch'? `, or nothing where no name is near, in any case. `near`: the
    least of difflib's ratios that is, 0 to 1."""
    names = {str(k).casefold(): k for k in known}
    close = difflib.get_close_matches(str(name).casefold(), names, n=1, cutoff=near)
    return f"did you mean {str(names[close[0]])!r}? " if close else ""


def method_or_near(name: object, known: Iterable[object]) -> str:
    """`GSPO is importance_sampling_level='sequence' of grpo; ` of a stage or a loss by the name of
    a method (`METHODS`), else `did_you_mean`."""
    found = METHODS.get(re.sub("[-_ .]", "", str(name).casefold()))
    return f"{found}; " if found else did_you_mean(name, known)


def wrong_choice(what: str, value: object, known: Collection[object]) -> ValueError:
    """What to raise for a value that is none of the known ones."""
    names = ", ".join(map(str, known)) or "none"
    hint = method_or_near if what in ("stage", "loss_type") else did_you_mean
    return ValueError(f"{what}={value!r}: {hint(value, known)}choose from {names}")


def check_choice(what: str, value: object, known: Collection[object]) -> None:
    """Raises ValueError, one line, for a value that is none of the known ones."""
    if value not in known:
        raise wrong_choice(what, value, known)


def numbered(names: Iterable[str]) -> list[str]:
    """The names; one that was there before has its number behind it: `ppo (2)`."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return found


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits, without an exponent where a reader can do without it."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_number(value: float | None, unit: str | None = None) -> str:
    """A number for people: 4 significant digits, or the habits of its unit.

    Units of the ledger have their own wording (B, s, FLOP, tokens, USD); any other unit is
    written after the number. None and NaN read as a dash: unknown is not zero.
    """
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if unit == "B":
        return format_bytes(value)
    if unit == "s":
        return format_seconds(value)
    if unit == "USD":
        return f"${_significant(value)}" if 0 < abs(value) < 0.01 else f"${value:,.2f}"
    if unit in ("FLOP", "FLOP/s", "tokens"):
        scale, prefix = next((si for si in SI if abs(value) >= si[0]), (1.0, ""))
        gap = " " if prefix and unit == "tokens" else ""
        return f"{_significant(value / scale)} {prefix}{gap}{unit}"
    whole = float(value).is_integer() and abs(value) < 1e15
    text = f"{int(value):,}" if whole else _significant(value, 4)
    return f"{text} {unit}" if unit else text


def counted(number: float, noun: str) -> str:
    """`1 row`, `2,048 rows`; of what is no whole number `1.5 epochs`."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}{'s' * (number != 1)}"


def first_line(error: object) -> str:
    """What an error says, in its first line, and in the next where that one ends in a colon; its
    type where it says nothing."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first


def plus_minus(values: Sequence[float], decimals: int = 2) -> str:
    """Mean ± standard deviation over seeds; a dash where one of them is no number."""
    if not all(map(math.isfinite, values)):
        return UNKNOWN
    spread = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{mean(values):.{decimals}f}{spread}"


def format_bytes(value: float | None) -> str:
    """Bytes in powers of 1024: `512 B`, `3.4 MiB`, `13.5 GiB`."""
    if value is None or not math.isfinite(value):
        return format_number(value)
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        # 0.9995 so that a value never reads as "1,024 MiB".
        if abs(value) >= 0.9995 * 1024**power:
            return f"{_significant(value / 1024**power)} {name}"
    return f"{_significant(value)} B"


def format_seconds(value: float | None) -> str:
    """Seconds in the largest units that matter: `120 µs`, `12.3 s`, `1 h 2 min`, `3 d 4 h`."""
    if value is None or not math.isfinite(value):
        return format_number(value)
    if value < 0:
        return f"-{format_seconds(-value)}"
    if value == 0:
        return "0 s"
    if value < 59.95:
        for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if value >= 0.9995 * scale:
                return f"{_significant(value / scale)} {name}"
        return f"{_significant(value / 1e-9)} ns"
    whole = round(value)
    for limit, large, small, names in (
        (3600, 60, 1, ("min", "s")),
        (86400, 3600, 60, ("h", "min")),
        (math.inf, 86400, 3600, ("d", "h")),
    ):
        rounded = round(whole / small) * small
        rest = rounded % large // small
        text = f"{rounded // large} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
        if rounded < limit:
            break
    return text


def _cell(value: object) -> str:
    return format_number(value) if value is None or is_number(value) else str(value)


def _columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Every key in the order of its first appearance."""
    return list(dict.fromkeys(k for row in rows for k in row))


def _right_aligned(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    """A column reads as numbers when it holds one and nothing but numbers and gaps."""
    values = [row[column] for row in rows if row.get(column) not in (None, "", UNKNOWN)]
    texts = [v for v in values if not is_number(v)]
    return bool(values) and all(re.match(r"[-+$≈~<>]*\d", str(v)) for v in texts)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows (column -> value) as an aligned plain-text table; numbers stand on the right."""
    names = _columns(rows)
    if not names:
        return "(nothing to show)"
    lines = [names] + [[" ".join(_cell(r.get(c, "")).split()) for c in names] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    right = [_right_aligned(rows, c) for c in names]

    def write(line: Sequence[str]) -> str:
        cells = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right))
        return "  ".join(cells).rstrip()

    return "\n".join([write(names), "  ".join("-" * w for w in widths), *map(write, lines[1:])])


PROSE = 30
"""Characters from which on a cell is a sentence."""
AS_TYPED = "mathjax_ignore"
"""The class that tells Jupyter and Sphinx to look for no formula in an element."""


def html_table(rows: Sequence[Mapping[str, object]], caption: str = "") -> str:
    """The same table as HTML; every cell is escaped."""
    names = _columns(rows)
    sides = {c: "right" if _right_aligned(rows, c) else "left" for c in names}
    # On a narrow page the table scrolls, and neither numbers nor prose stand in many short lines.
    prose = {c for c in names if any(len(_cell(row.get(c, ""))) > PROSE for row in rows)}
    room = {"left": "", "right": ";white-space:nowrap"}
    more = {c: f";min-width:{PROSE // 3}em" if c in prose else room[sides[c]] for c in names}
    style = {c: f' style="text-align:{sides[c]}{more[c]}"' for c in names}
    head = "".join(f'<th scope="col"{style[c]}>{escape(c)}</th>' for c in names)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{style[c]}>{escape(_cell(r.get(c, '')))}</td>" for c in names)
        + "</tr>"
        for r in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<table class="lab-table {AS_TYPED}">{title}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table>"
    )


class Display:
    """What `.show()` returns: plain text in a terminal, HTML and pictures in a notebook.

    A picture is an output of its own. Inside HTML its SVG would be taken out, and its words left
    as a heap, on GitHub and wherever a notebook is not trusted.
    """

    def __init__(self, text: str, *parts: str) -> None:
        self.text, self.parts = text, parts

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return "".join(map(str, self.parts))

    def _ipython_display_(self) -> None:
        from IPython.display import display

        show: Callable[..., object] = display
        text = {"text/plain": self.text}  # shown once, beside the first part
        for part in self.parts:
            if hasattr(part, "words"):
                show(part)
            else:
                # Two dollar signs in a line are no formula.
                show({"text/html": f'<div class="{AS_TYPED}">{part}</div>'} | text, raw=True)
                text = {}


class Tabled:
    """What shows its `rows` as a table, and its `notes` as lines below."""

    @property
    def rows(self) -> Sequence[Mapping[str, object]]:
        raise NotImplementedError

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def __repr__(self) -> str:
        return "\n".join([table(self.rows), *self.notes])

    def _repr_html_(self) -> str:
        return html_table(self.rows) + "".join(f"<p>{escape(line)}</p>" for line in self.notes)


class Listed(list[Item]):
    """A list that shows itself as a table; `rows` turns it into the table's lines."""

    def __init__(
        self,
        items: Iterable[Item],
        rows: Callable[[Sequence[Item]], Sequence[Mapping[str, object]]],
    ) -> None:
        super().__init__(items)
        self.rows = rows

    def __repr__(self) -> str:
        return table(self.rows(self))

    def _repr_html_(self) -> str:
        return html_table(self.rows(self))
