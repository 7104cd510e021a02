"""The one renderer of small charts: lines over steps and stacked bars, as SVG text.

The live widget, the frozen output of a cell, report.html and the tests all show what these two
functions return. No script and no ids, so any number of charts can share a page; each has
`role="img"` and an `aria-label` with its last values. Series differ by Okabe-Ito colour *and*
dash pattern. Everything a caller writes is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypedDict, TypeGuard

from ..display import escape, format_number
from .colours import part_colour
from .frame import (
    BACKGROUND,
    DASHES,
    FAINT,
    SMALL,
    Frame,
    LegendEntry,
    Picture,
    colour,
    svg_line,
    svg_text,
    text_width,
    thinned_indices,
)

MAX_TOOLTIPS = 60
LIVE_COLUMNS = 60  # a live curve has at most three points in each: it travels at every redraw

Points = tuple[Sequence[float], Sequence[float | None]]
Reference = tuple[float, str]


class ChartSize(TypedDict, total=False):
    """px; 460 × 260 without"""

    width: int
    height: int


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str = "",
    x_label: str,
    y_label: str,
    references: Sequence[Reference] = (),
    width: int = 460,
    height: int = 260,
    band: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] | None = None,
    hints: Mapping[str, str] | None = None,
) -> Picture:
    """Curves as SVG text, which a notebook shows as a picture.

    `series` maps a name to (xs, ys); None, NaN and infinity make a gap. `references` are
    horizontal lines, (y, label). `band` maps a name to (xs, lows, highs), shaded in the colour
    of the series of that name. Labels carry their units: `y_label="KL (nats per response)"`.
    `hints`: what a series' name means, for who points at it in the legend.
    """
    curves = {name: _finite(xs, ys) for name, (xs, ys) in series.items()}
    bands = {n: _finite_band(*b) for n, b in (band or {}).items()}
    levels = _levels(references)
    all_x = [x for c in curves.values() for x, _ in c] + [x for b in bands.values() for x, *_ in b]
    all_y = [y for c in curves.values() for _, y in c if y is not None] + [y for _, y in levels]
    all_y += [y for b in bands.values() for _, *ends in b for y in ends]
    keys = [
        LegendEntry(name, colour(i), DASHES[i % len(DASHES)], (hints or {}).get(name, ""))
        for i, name in enumerate(curves)
    ]
    frame = Frame(title, x_label, y_label, keys + [key for key, _ in levels], width, height)
    whole = all(x == round(x) for x in all_x)
    frame.scale(_span(all_x, pad=0.02), _span(all_y, pad=0.06), whole_x=whole)

    names = list(curves)
    for i, (name, band_points) in enumerate(bands.items()):
        place = names.index(name) if name in names else i
        frame.add(_band_shape(frame, band_points, colour(place)))
    for key, level in levels:
        frame.add(_level_line(frame, key, level))
    readings = []
    for key, points in zip(keys, curves.values()):
        columns = int(frame.right - frame.left)
        frame.still += [*_curve(frame, key, points, columns), *_tooltips(frame, key, points)]
        frame.live += _curve(frame, key, points, min(columns, LIVE_COLUMNS))
        readings.append(_reading(key, points))
    if not all_y:
        frame.add(svg_text(*frame.middle(), "no data yet", fill=FAINT, anchor="middle"))
    lasts = [f"{name}: last {format_number(_last(points))}" for name, points in curves.items()]
    lasts += [f"{key.name}: {format_number(level)}" for key, level in levels]
    return frame.svg(lasts or ["no data yet"], readings)


def bar_chart(stacks: Mapping[str, Mapping[str, float]], **options: Any) -> Picture:
    """Stacked bars as SVG text, which a notebook shows as a picture.

    `stacks`: bar -> component -> value (zero or more). `options`: those of `cluster_chart`.
    """
    return cluster_chart({name: {"": stack} for name, stack in stacks.items()}, **options)


def cluster_chart(
    clusters: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    title: str = "",
    y_label: str,
    x_label: str = "",
    references: Sequence[Reference] = (),
    width: int = 460,
    height: int = 260,
    unit: str | None = None,
    legend: Mapping[str, str] | None = None,
    kind: str = "",
) -> Picture:
    """Stacked bars that stand together in clusters: cluster -> bar -> component -> value.

    A bar's name is written above it, and its total where it has none. `legend`: component ->
    entry of the legend, where several share one, and its colour: those are told apart by the
    lines between them and by their tooltips. Colours are those of the entries' `kind` ("role",
    "phase", "component": `colours.py`), or go by the order of all entries.
    `unit` words the totals and tooltips ("B", "s", ...); the axis shows the bare values, so
    scale them to the unit in `y_label`.
    """
    bars = [
        _Bar(i, j, len(tags), f"{cluster} {tag}".strip(), tag, stack)
        for i, (cluster, tags) in enumerate(clusters.items())
        for j, (tag, stack) in enumerate(_clean(cluster, tags).items())
    ]
    entry = dict(legend or {})
    parts = dict.fromkeys(part for bar in bars for part in bar.stack)
    entry |= {part: part for part in parts if part not in entry}
    names = dict.fromkeys(entry.values())
    colours = {n: part_colour(kind, n) if kind else colour(i) for i, n in enumerate(names)}
    shown = {entry[part] for part in parts}
    keys = [LegendEntry(f"{kind}:", "", None)] * bool(kind and shown)
    keys += [LegendEntry(name, colours[name], None) for name in colours if name in shown]
    levels = _levels(references)
    keys += [key for key, _ in levels]
    frame = Frame(title, x_label, y_label, keys, width, height, list(clusters))
    top = max([*(bar.total for bar in bars), *(y for _, y in levels)], default=0.0)
    # Room above the highest bar for its total.
    frame.scale(
        (0.0, max(len(clusters), 1)),
        (min([0.0, *(y for _, y in levels)]), top * 1.12 if top > 1e-200 else 1.0),
    )
    fills = {part: colours[entry[part]] for part in parts}
    for bar in bars:
        frame.add(*_blocks(frame, bar, fills, unit))
    frame.add(*_above_bars(frame, bars, unit))
    for key, level in levels:
        frame.add(_level_line(frame, key, level))
    if not clusters:
        frame.add(svg_text(*frame.middle(), "no data yet", fill=FAINT, anchor="middle"))
    figures = [f"{bar.name}: {format_number(bar.total, unit)}" for bar in bars]
    figures += [f"{key.name}: {format_number(level, unit)}" for key, level in levels]
    return frame.svg(figures or ["no data yet"])


def _levels(references: Sequence[Reference]) -> list[tuple[LegendEntry, float]]:
    """Horizontal lines, those that can be drawn, with their entries of the legend."""
    dashes = ("1 3", "8 4", "2 6")
    return [
        (LegendEntry(label, FAINT, dashes[i % len(dashes)]), float(y))
        for i, (y, label) in enumerate(references)
        if _real(y)
    ]


# -- lines ------------------------------------------------------------------------------------
Curve = list[tuple[float, float | None]]  # (x, y); y is None in a gap


def _real(value: float | None) -> TypeGuard[float]:
    """Whether it can be drawn. A diverged run's 1e250 is a gap too: spans must not overflow."""
    return value is not None and math.isfinite(value) and abs(value) < 1e200


def _finite(xs: Sequence[float], ys: Sequence[float | None]) -> Curve:
    """Pairs with every kind of missing y as None; a point without an x is left out."""
    if len(xs) != len(ys):
        raise ValueError(f"a series has {len(xs)} xs but {len(ys)} ys")
    return [(float(x), float(y) if _real(y) else None) for x, y in zip(xs, ys) if _real(x)]


def _finite_band(
    xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> list[tuple[float, float, float]]:
    points = zip(xs, lows, highs)
    return [(float(x), float(a), float(b)) for x, a, b in points if all(map(_real, (x, a, b)))]


def _last(points: Curve) -> float | None:
    return next((y for _, y in reversed(points) if y is not None), None)


def _span(values: Sequence[float], pad: float) -> tuple[float, float]:
    """The range to show: a little more than the data, never empty, never below a natural 0."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if max(abs(low), abs(high)) < 1e-200:
        return (-0.5, 0.5) if low < 0 else (0.0, 0.5)
    room = (high - low) * pad
    # A constant (or one that differs by rounding only) sits in the middle of a range around it.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 0.5
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def _curve(frame: Frame, key: LegendEntry, points: Curve, columns: int) -> Iterator[str]:
    """The polyline, broken at gaps; a point with gaps on both sides becomes a dot."""
    path: list[str] = []
    for piece in _pieces(points):
        if len(piece) == 1:
            x, y = frame.x(piece[0][0]), frame.y(piece[0][1])
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" style="fill:{key.colour}"/>'
        else:
            places = (f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in _thinned(piece, columns))
            path.append("M" + "L".join(places))
    if path:
        dash = f' stroke-dasharray="{key.dash}"' if key.dash else ""
        yield (
            f'<path d="{"".join(path)}" fill="none" stroke-width="1.9" stroke-linejoin="round"'
            f'{dash} style="stroke:{key.colour}"/>'
        )


def _pieces(points: Curve) -> Iterator[list[tuple[float, float]]]:
    """The runs of points between gaps."""
    for _, run in groupby(points, key=lambda point: point[1] is None):
        if piece := [(x, y) for x, y in run if y is not None]:
            yield piece


def _thinned(piece: list[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """At most four points per pixel column; a spike survives."""
    return [piece[i] for i in thinned_indices([y for _, y in piece], at_most=4 * columns)]


def _tooltips(frame: Frame, key: LegendEntry, points: Curve) -> Iterator[str]:
    """Invisible discs that a pointer finds, evenly thinned, the last point always among them."""
    known = [(x, y) for x, y in points if y is not None]
    count = min(len(known), MAX_TOOLTIPS)
    for i in range(count):
        x, y = known[round(i * (len(known) - 1) / max(count - 1, 1))]
        text = f"{key.name}: {format_number(y)} ({frame.x_label} {format_number(x)})"
        yield (
            f'<circle class="point" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="5" '
            f'fill-opacity="0" style="fill:{key.colour}"><title>{escape(text)}</title></circle>'
        )


def _reading(key: LegendEntry, points: Curve) -> str:
    """The values of a curve for chart.js, worded as a tooltip words them."""
    known = _thinned([(x, y) for x, y in points if y is not None], LIVE_COLUMNS)
    xs, ys = (" ".join(format_number(p[i]) for p in known) for i in (0, 1))
    return (
        f'<g class="curve" data-name="{escape(key.name)}" data-colour="{key.colour}" '
        f'data-x="{xs}" data-y="{ys}"/>'
    )


def _band_shape(frame: Frame, points: list[tuple[float, float, float]], fill: str) -> str:
    if not points:
        return ""
    there = [f"{frame.x(x):.1f} {frame.y(high):.1f}" for x, _, high in points]
    back = [f"{frame.x(x):.1f} {frame.y(low):.1f}" for x, low, _ in reversed(points)]
    return f'<path d="M{"L".join(there + back)}Z" fill-opacity="0.18" style="fill:{fill}"/>'


def _level_line(frame: Frame, key: LegendEntry, level: float) -> str:
    """A horizontal reference line; a thick invisible one under it carries the tooltip."""
    y = frame.y(level)
    title = f"<title>{escape(f'{key.name}: {format_number(level)}')}</title>"
    return svg_line(frame.left, y, frame.right, y, key.colour, 1.4, key.dash or "") + (
        f'<rect x="{frame.left:.1f}" y="{y - 4:.1f}" width="{frame.right - frame.left:.1f}" '
        f'height="8" fill-opacity="0" style="fill:{key.colour}">{title}</rect>'
    )


# -- bars -------------------------------------------------------------------------------------
class _Bar(NamedTuple):
    """A bar: the number of its cluster, its own in it, how many stand there; part → value."""

    cluster: int
    number: int
    beside: int
    name: str
    tag: str
    stack: Mapping[str, float]

    @property
    def total(self) -> float:
        return math.fsum(self.stack.values())

    def place(self, frame: Frame) -> tuple[float, float]:
        """(left edge, width) in px: a cluster's bars have 70 % of its slot, 70 px each at most."""
        room = frame.x(1) - frame.x(0)
        width = min(0.7 * room / self.beside, 70.0)
        return frame.x(self.cluster + 0.5) + (self.number - self.beside / 2) * width, width


def _clean(cluster: str, tags: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Unknown parts are left out; a negative one has no place in a stack."""
    clean: dict[str, dict[str, float]] = {}
    for tag, stack in tags.items():
        clean[tag] = {part: float(value) for part, value in stack.items() if _real(value)}
        for part, value in clean[tag].items():
            if value < 0:
                bar = f"bar {f'{cluster} {tag}'.strip()!r}, {part!r}"
                raise ValueError(f"{bar}: {value} is negative, a stack cannot show it")
    return clean


def _blocks(frame: Frame, bar: _Bar, fills: Mapping[str, str], unit: str | None) -> Iterator[str]:
    """The parts of one bar on top of each other, each with its value as a tooltip."""
    (x, width), base = bar.place(frame), 0.0
    for part, value in bar.stack.items():
        top, bottom = frame.y(base + value), frame.y(base)
        yield (
            f'<rect class="block" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{bottom - top:.1f}" stroke-width="0.8" '
            f'style="fill:{fills[part]};stroke:{BACKGROUND}">'
            f"<title>{escape(f'{bar.name}, {part}: {format_number(value, unit)}')}</title></rect>"
        )
        base += value


def _above_bars(frame: Frame, bars: Sequence[_Bar], unit: str | None) -> Iterator[str]:
    """A label above each bar, if there is room to write every one."""
    room = frame.x(1) - frame.x(0) - 2
    texts = [bar.tag or format_number(bar.total, unit) for bar in bars]
    for bar, text in zip(bars, texts, strict=True):
        if text_width(text, SMALL) > (bar.place(frame)[1] + 4 if bar.tag else room):
            return
    for bar, text in zip(bars, texts, strict=True):
        x, width = bar.place(frame)
        height = frame.y(bar.total) - 4
        yield svg_text(x + width / 2, height, text, size=SMALL, anchor="middle")
