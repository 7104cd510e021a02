"""Title, legend and axes around the data of a chart, and the SVG elements they are made of.

Colours of text and axes follow JupyterLab's theme through `--jp-*` variables. Each has a
fallback, and the chart brings its own background, so that it stays legible where there is no
theme at all: as an image, on GitHub, on Colab. Lengths are px.
"""

from __future__ import annotations

import base64
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..display import SI, escape

# Okabe and Ito's palette, its yellow last because it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")
# Five patterns against eight colours: forty series before a pair repeats.
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2")
TEXT = "var(--jp-ui-font-color1, #222)"
FAINT = "var(--jp-ui-font-color2, #555)"
GRID = "var(--jp-border-color2, #ddd)"
BACKGROUND = "var(--jp-layout-color0, #fff)"
# What an image can use, which no page's colours reach: 4.3 : 1 against white as against
# JupyterLab's #111, the best that one colour can do for both.
GREY_TEXT, GREY_GRID = "#7A7A7A", "rgba(127,127,127,0.28)"
_FOR_IMAGES = {TEXT: GREY_TEXT, FAINT: GREY_TEXT, GRID: GREY_GRID, BACKGROUND: "none"}
FONT = "var(--jp-ui-font-family, system-ui, sans-serif)"
SMALL, NORMAL, LARGE = 10.5, 11.5, 13.0  # font sizes, px
GAP = 8  # px between the pictures of a grid
SMALLEST = 0.6  # of its size: a narrower page scrolls a picture, whose words could not be read


@dataclass(frozen=True)
class LegendEntry:
    """A name beside a piece of its line, or a filled square where `dash` is None; without a colour
    it is what the names after it are. `hint`: what the name means, shown on hover."""

    name: str
    colour: str
    dash: str | None
    hint: str = ""


class Frame:
    """Lays out title, legend and axes, then maps data to pixels and collects the shapes."""

    def __init__(
        self,
        title: str,
        x_label: str,
        y_label: str,
        keys: Sequence[LegendEntry],
        width: int,
        height: int,
        categories: Sequence[str] | None = None,
    ) -> None:
        self.title, self.x_label, self.y_label = title, x_label, y_label
        self.width, self.height, self.categories = width, height, categories
        # What is drawn, for a picture that stands by itself and for one that chart.js shows.
        self.still: list[str] = []
        self.live: list[str] = []
        self.top = 8.0
        # Bold letters are about an eighth wider than the plain ones that are measured.
        for part in wrapped(title, LARGE * 1.12, width - 20):
            self.top += 16
            self.add(svg_text(10, self.top - 3, part, size=LARGE, weight="600"))
        self._legend(keys)
        # The y label lies flat on top of its axis: read without turning the head, never cut.
        y_text = shortened(y_label, SMALL, width - 20)
        self.top += 18
        self.add(svg_text(10, self.top - 3, y_text, size=SMALL, fill=FAINT, full=y_label))
        self.top += 10

    def _legend(self, keys: Sequence[LegendEntry]) -> None:
        """Above the plot, wrapping, so that it never lies over a curve."""
        x = 10.0
        self.top += 17 if keys else 0
        for key in keys:
            swatch = 24.0 if key.colour else 0.0
            room = self.width - 20 - swatch
            name = shortened(key.name, NORMAL, room)
            needed = swatch + text_width(name, NORMAL) + 14
            if x > 10 and x + needed - 14 > self.width - 10:
                x, self.top = 10.0, self.top + 16
            y = self.top - 7
            if not key.colour:
                mark = ""
            elif key.dash is None:
                mark = (
                    f'<rect x="{x + 5:.1f}" y="{y - 5:.1f}" width="10" height="10" rx="1.5" '
                    f'style="fill:{key.colour}"/>'
                )
            else:
                mark = svg_line(x, y, x + 19, y, key.colour, 2.2, key.dash)
            self.add(mark, svg_text(x + swatch, y + 4, name, full=key.hint or key.name))
            x += needed

    def scale(
        self, xs: tuple[float, float], ys: tuple[float, float], whole_x: bool = False
    ) -> None:
        """Fix the data ranges, and with them the margins that the tick labels need."""
        self.xs, self.ys, self._whole_x = xs, ys, whole_x
        bottom = 20.0 + (17 if self.x_label else 0)
        self._slant = False
        if self.categories:
            slot = (self.width - 70) / len(self.categories)
            longest = max(text_width(c, SMALL) for c in self.categories)
            self._slant = longest > slot - 4
            bottom += min(0.6 * longest, 70) - 6 if self._slant else 0
        self.bottom = max(self.height - bottom, self.top + 40)
        # A tall legend makes the chart taller, it does not squeeze the curves away.
        self.height = max(self.height, math.ceil(self.bottom + bottom))
        y_ticks = nice_ticks(*ys, at_most=max(2, int((self.bottom - self.top) / 28)))
        y_texts = [tick_text(t, y_ticks) for t in y_ticks]
        self.left = 16 + max(text_width(t, SMALL) for t in y_texts)
        self.right = self.width - 14.0
        self._draw_axes(y_ticks, y_texts)

    def _draw_axes(self, y_ticks: Sequence[float], y_texts: Sequence[str]) -> None:
        for tick, text in zip(y_ticks, y_texts):
            y = self.y(tick)
            self.add(svg_line(self.left, y, self.right, y, GRID, 1))
            self.add(svg_text(self.left - 6, y + 3.7, text, size=SMALL, fill=FAINT, anchor="end"))
        if self.categories is None:
            room = max(2, int((self.right - self.left) / 44))
            ticks = nice_ticks(*self.xs, at_most=room, whole=self._whole_x)
            for tick in ticks:
                x = self.x(tick)
                self.add(svg_line(x, self.bottom, x, self.bottom + 4, FAINT, 1))
                label = tick_text(tick, ticks)
                self.add(
                    svg_text(x, self.bottom + 15, label, size=SMALL, fill=FAINT, anchor="middle")
                )
        else:
            self._name_bars(self.categories)
        self.add(svg_line(self.left, self.bottom, self.right, self.bottom, FAINT, 1))
        if self.x_label:
            name = shortened(self.x_label, SMALL, self.right - self.left)
            x, y = self.middle()[0], self.height - 7
            self.add(svg_text(x, y, name, size=SMALL, fill=FAINT, anchor="middle"))

    def _name_bars(self, names: Sequence[str]) -> None:
        # Where the bars stand closer than a line of text is high, every second (third...) is named.
        every = math.ceil(15 / (self.x(1) - self.x(0))) if self._slant else 1
        for i, name in list(enumerate(names))[::every]:
            x, y = self.x(i + 0.5), self.bottom + 15
            if self._slant:
                short = shortened(name, SMALL, min(116, (x - 6) / 0.82))
                self.add(
                    svg_text(x + 4, y - 3, short, size=SMALL, anchor="end", turn=-35, full=name)
                )
            else:
                self.add(svg_text(x, y, name, size=SMALL, anchor="middle"))

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.ys
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def add(self, *shapes: str) -> None:
        self.still += shapes
        self.live += shapes

    def svg(self, figures: Sequence[str], readings: Sequence[str] = ()) -> Picture:
        """The finished picture; `figures` are the values that a screen reader reads out.

        `readings` are elements that draw nothing: the values that chart.js shows on hover.
        """
        label = ". ".join([self.title or self.y_label, "; ".join(figures)])
        box = f"{self.left:.1f} {self.top:.1f} {self.right:.1f} {self.bottom:.1f}"
        plot = (
            f'<g class="plot" data-box="{box}" data-xs="{self.xs[0]!r} {self.xs[1]!r}" '
            f'data-ys="{self.ys[0]!r} {self.ys[1]!r}" data-x-label="{escape(self.x_label)}">'
        )
        size = self.width, self.height
        live = svg_document([*self.live, plot, *readings, "</g>"], label, *size)
        return Picture(svg_document(self.still, label, *size), label, live, size)


def svg_document(shapes: Sequence[str], label: str, width: float, height: float) -> str:
    """SVG text: the shapes on their background, and what a screen reader reads in their place."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'style="max-width:100%;height:auto;font-family:{FONT}">'
    )
    background = f'<rect width="{width}" height="{height}" rx="4" style="fill:{BACKGROUND}"/>'
    return "\n".join([head, background, *filter(None, shapes), "</svg>"])


_READINGS = re.compile(r'\n<g class="plot"[^>]*>(\n<g class="curve"[^>]*/>)*\n</g>')


class Picture(str):
    """SVG text that shows itself as the last value of a cell, or through `display`.

    `words`: its last values, for who does not see it. `live` is the same picture for `live.Chart`:
    shorter, without tooltips, with the values that its script shows instead. `size`: width and
    height, px. `parts`: the pictures that it was put together from, under a `heading`.
    """

    words: str
    live: str
    size: tuple[float, float]
    parts: Sequence[Picture] = ()
    heading: str = ""

    def __new__(
        cls, svg: str, words: str, live: str = "", size: tuple[float, float] = (0, 0)
    ) -> Picture:
        picture = super().__new__(cls, svg)
        picture.words, picture.live, picture.size = words, live or svg, size
        return picture

    @property
    def bare(self) -> str:
        """Without tooltips and readings: all that shows where SVG is an image, and half as long."""
        return _READINGS.sub("", self.live)

    def image(self, mark: str = "lab-picture") -> str:
        """The picture as an HTML image, of a class `mark`.

        A notebook that its reader has not run is not trusted: JupyterLab draws no SVG there, but it
        does draw an image that brings its data. It has no background, and colours that can be read
        on a light page and on a dark one: the page's own do not reach into an image. Of several
        pictures each is an image: where a page is narrow they stand below each other.
        """
        if self.parts:
            title = f"<div><b>{escape(self.heading)}</b></div>" if self.heading else ""
            images = "\n".join(part.image(mark) for part in self.parts)
            return (
                f"{title}<div>\n{images}</div>"  # by itself an image would fill JupyterLab's line
            )
        svg = self.bare
        for themed, fixed in _FOR_IMAGES.items():
            svg = svg.replace(themed, fixed)
        data = base64.b64encode(svg.encode()).decode()
        width = f' width="{self.size[0]:.0f}"' if self.size[0] else ""
        least = f"{SMALLEST * self.size[0]:.0f}px"
        return (
            f'<img class="{mark}" alt="{escape(self.words)}"{width} '
            f'style="max-width:max(100%,{least})" '
            f'src="data:image/svg+xml;base64,{data}">'
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.image(), "text/plain": self.words}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # or IPython prints a str
        printer.text(self.words)


# -- ticks ------------------------------------------------------------------------------------
def nice_ticks(low: float, high: float, at_most: int, whole: bool = False) -> list[float]:
    """Round numbers from low to high, in steps of 1, 2 or 5 times a power of ten.

    `at_most` intervals, unless that leaves fewer than two ticks. `whole`: no fractions, for
    what is counted (there is no step 0.5).
    """
    if not high > low:
        return [low]
    rough = (high - low) / max(at_most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [m * power for m in (0.5, 1, 2, 5, 10)]
    chosen = next(i for i, s in enumerate(steps) if i and (s >= rough * (1 - 1e-9) or i == 4))
    for step in (steps[chosen], steps[chosen - 1]):
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last > first:
            break
    # Rounded to the step's own decimals: 0.30000000000000004 is not a label.
    decimals = max(0, 1 - math.floor(math.log10(step)))
    return [round(i * step, min(decimals, 300)) for i in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick's label: as many decimals as its neighbours need, k/M/G for large numbers."""
    size = max(abs(t) for t in ticks)
    step = min((b - a for a, b in zip(ticks, ticks[1:])), default=size)
    if size and (size < 1e-3 or size >= 1e15):
        return "0" if value == 0 else f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")
    scale, suffix = next((si for si in SI if size >= si[0]), (1.0, ""))
    if size < 1e4:
        scale, suffix = 1.0, ""  # 2000 is easier to read than 2k
    step = step / scale
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return "0" if value == 0 else f"{value / scale:.{min(decimals, 6)}f}{suffix}"


def thinned_indices(*columns: Sequence[float | None], at_most: int) -> list[int]:
    """Which points of curves over the same x are drawn: first, last, and of every segment the
    lowest and the highest of each column, and one gap. No spike is lost."""
    count = len(columns[0])
    if count <= at_most:
        return list(range(count))
    segments = max(1, at_most // (2 * len(columns)))
    indices = {0, count - 1}
    for i in range(segments):
        part = range(i * count // segments, (i + 1) * count // segments)
        for column in columns:
            real = [(value, j) for j in part if (value := column[j]) is not None]
            if real:
                indices |= {min(real)[1], max(real, key=lambda at: (at[0], -at[1]))[1]}
            indices |= set([j for j in part if column[j] is None][:1])
    return sorted(indices)


# -- SVG elements ------------------------------------------------------------------------------
def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def svg_line(
    x1: float, y1: float, x2: float, y2: float, stroke: str, width: float, dash: str = ""
) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke-width="{width}"{dashed} style="stroke:{stroke}"/>'
    )


def svg_text(
    x: float,
    y: float,
    text: str,
    *,
    size: float = NORMAL,
    fill: str = TEXT,
    anchor: str = "start",
    weight: str = "400",
    turn: float = 0,
    full: str = "",
) -> str:
    """One line of text. `full` is what a shortened text stands for, shown on hover."""
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    title = f"<title>{escape(full)}</title>" if full and full != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}"{turned} style="fill:{fill}">{escape(text)}{title}</text>'
    )


def text_width(text: str, size: float) -> float:
    """A generous guess at a text's width, since no font can be asked: em per kind of letter."""
    ems = 0.0
    for letter in text:
        if unicodedata.east_asian_width(letter) in "WF":
            ems += 1.0
        elif letter in "ijlI.,:;'|!()[]tfr ":
            ems += 0.36
        else:
            ems += 0.86 if letter in "mwMW@%<>=+~#" else 0.7 if letter.isupper() else 0.58
    return ems * size


def shortened(text: str, size: float, room: float) -> str:
    """The text, cut with an ellipsis where it is wider than `room`."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, size: float, room: float) -> list[str]:
    """The text in lines no wider than `room`; a word too long for a line is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(shortened(word, size, room))
    return lines


# -- several pictures as one ----------------------------------------------------------------------


def grid(pictures: Sequence[Picture], columns: int = 2, title: str = "") -> Picture:
    """Several pictures as one, row by row; as an image, each by itself."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    widths = [
        max(p.size[0] for p in pictures[i::columns]) for i in range(min(columns, len(pictures)))
    ]
    still: list[str] = []
    live: list[str] = []
    top = 0.0
    if title:
        still.append(svg_text(10, 20, title, size=LARGE + 1, weight="600"))
        live, top = [*still], 28
    for row in rows:
        left = 0.0
        for picture, width in zip(row, widths):
            still.append(placed(str(picture), left, top, picture.size))
            live.append(placed(picture.live, left, top, picture.size))
            left += width + GAP
        top += max(p.size[1] for p in row) + GAP
    size = sum(widths) + GAP * max(len(widths) - 1, 0), max(top - GAP, 0)
    text = ". ".join(filter(None, [title, *(p.words for p in pictures)]))
    one = Picture(svg_document(still, text, *size), text, svg_document(live, text, *size), size)
    one.parts, one.heading = pictures, title
    return one


def placed(svg: str, x: float, y: float, size: tuple[float, float]) -> str:
    """A picture inside another: its first tag has the place in it, and no longer a label."""
    width, height = size
    return (
        f'<svg x="{x:.0f}" y="{y:.0f}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">' + svg[svg.index(">") + 1 :]
    )
