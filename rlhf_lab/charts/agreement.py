"""How a person's choices compare: with the gold reward, with the annotator, with their own habits.

A choice counts where the comparison knows which response is better: ties and skips are left out,
and so are pairs that the gold reward has equal, or that are equally long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..display import escape
from .frame import COLOURS, FAINT, GRID, LARGE, SMALL, Picture, svg_document, svg_line, svg_text


@dataclass(frozen=True)
class Choice:
    """One decided pair: which response was chosen, and how it compares (None: not known).

    `gold`: gold reward of the chosen less that of the rejected response. `label`: whether the
    annotator chose the same. `expected`: the annotator's probability to choose what the gold
    reward prefers. `left`: whether the chosen one stood on the left. `longer`: its words less the
    other's.
    """

    left: bool
    longer: int
    gold: float | None = None
    label: bool | None = None
    expected: float | None = None


@dataclass(frozen=True)
class Share:
    """A share (0 to 1) of `n` choices. `low` and `high`: its 95 % interval, where it has one."""

    name: str
    share: float
    n: int
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def short(self) -> str:
        """`78% of 18`, or `79% expected`."""
        return f"{self.share:.0%} " + (self.note if self.low is None else f"of {self.n}")

    def __str__(self) -> str:
        if self.low is None:
            return self.short
        text = f"{self.short}, 95% interval {self.low:.0%} to {self.high:.0%}"
        return text + f"; {self.note}" * bool(self.note)


def wilson(count: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share: Wilson's, which holds for few answers too (Wilson 1927)."""
    if not n:
        return 0.0, 1.0
    p, widening = count / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + widening / (4 * n))
    middle = p + widening / 2
    low, high = (middle - half) / (1 + widening), (middle + half) / (1 + widening)
    return max(low, 0.0), min(high, 1.0)


def shares(choices: Iterable[Choice], labels: str = "the annotator") -> list[Share]:
    """The table of agreement: a row for each comparison that can be made.

    `labels` names whoever labelled the pairs before.
    """
    choices = list(choices)
    unequal_gold = [c for c in choices if c.gold]
    unequal_length = [c for c in choices if c.longer]
    longer_better = [(c.gold > 0) == (c.longer > 0) for c in unequal_length if c.gold]
    truth = f"by the gold reward {fmean(longer_better):.0%}" if longer_better else ""
    who = f"{labels[:1].upper()}{labels[1:]}"
    rows = [
        _share("You agree with the gold reward", [c.gold > 0 for c in unequal_gold if c.gold]),
        _share(f"{who} agrees with it", [c.expected for c in unequal_gold], "expected"),
        _share(f"You agree with {labels}", [c.label for c in choices]),
        _share("You chose the left one", [c.left for c in choices], "by chance 50%"),
        _share("You chose the longer one", [c.longer > 0 for c in unequal_length], truth),
    ]
    return [row for row in rows if row]


def _share(name: str, hits: Iterable[float | None], note: str = "") -> Share | None:
    """Of what is known. What happened (True, False) was drawn, and has an interval; chances that
    were computed have none."""
    known = [hit for hit in hits if hit is not None]
    if not known:
        return None
    drawn = all(isinstance(hit, bool) for hit in known)
    low, high = wilson(sum(map(int, known)), len(known)) if drawn else (None, None)
    return Share(name, fmean(known), len(known), low, high, note)


def picture(rows: Sequence[Share], title: str, empty: str) -> Picture:
    """The shares as dots with their intervals, on one scale from 0 to 100 %; `empty` without."""
    width, left, right, top, step = 460, 210.0, 350.0, 46.0, 26.0
    bottom = top + step * len(rows)
    height = math.ceil(bottom + 16 if rows else top + 12)

    def x(share: float) -> float:
        return left + share * (right - left)

    shapes = [svg_text(10, 21, title, size=LARGE, weight="600")]
    for tick in (0, 0.5, 1) if rows else ():
        shapes.append(svg_line(x(tick), top - 12, x(tick), bottom - 12, GRID, 1))
        shapes.append(
            svg_text(x(tick), bottom + 4, f"{tick:.0%}", size=SMALL, fill=FAINT, anchor="middle")
        )
    for i, row in enumerate(rows):
        y = top + step * i
        shapes.append(svg_text(left - 14, y + 4, row.name, size=SMALL, anchor="end"))
        shapes.append(_mark(row, x, y))
        shapes.append(svg_text(right + 12, y + 4, row.short, size=SMALL, fill=FAINT, full=str(row)))
    if not rows:
        shapes.append(svg_text(10, top, empty, fill=FAINT))
    label = ". ".join([title, "; ".join(f"{row.name}: {row}" for row in rows) or empty])
    return Picture(svg_document(shapes, label, width, height), label, size=(width, height))


def _mark(row: Share, x: Callable[[float], float], y: float) -> str:
    """A dot on its interval; what is computed and not counted is a diamond."""
    title = f"<title>{escape(f'{row.name}: {row}')}</title>"
    at = x(row.share)
    if row.low is None or row.high is None:
        return (
            f'<path d="M{at - 5:.1f} {y:.1f}L{at:.1f} {y - 5:.1f}L{at + 5:.1f} {y:.1f}'
            f'L{at:.1f} {y + 5:.1f}Z" style="fill:{COLOURS[1]}">{title}</path>'
        )
    return svg_line(x(row.low), y, x(row.high), y, COLOURS[0], 3) + (
        f'<circle cx="{at:.1f}" cy="{y:.1f}" r="5" style="fill:{COLOURS[0]}">{title}</circle>'
    )
