"""What was planned beside what was measured, where the cost goes, and how it grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..display import format_number
from ..runs.ledger import AROUND, COMPONENTS, PHASES, ROLES, SOURCES, UNITS, Row
from .frame import COLOURS
from .plotly_style import (
    INK,
    NOTHING,
    Figure,
    faint,
    finish,
    legend_on_top,
    line_style,
    rounded,
    safe,
    symbol,
    unit_of,
)

FILL = {"predicted": 0.3, "simulated": 0.6, "measured": 1.0}
"""How full a source's bars are, the surer the fuller. Flat, not hatched: JupyterLab keeps a PNG of
what it has drawn, and hatching made it twice as large."""
NAMES = {
    "bytes": "memory",
    "flops": "arithmetic",
    "seconds": "time",
    "tokens": "tokens",
    "money": "money",
}
_COLOURED = {
    "component": COMPONENTS,
    "role": ROLES,
    # The large ones far apart; advantages, the ninth of PPO's, take next to no time.
    "phase": (
        "rollout",
        "backward",
        "reference",
        "score",
        "value",
        "forward",
        "old_logprobs",
        "optimizer",
        "advantage",
        *PHASES[9:],
    ),
}


def sources(
    *things: Any, quantity: str = "bytes", by: str | None = None, theme: str = "both"
) -> Figure:
    """Predicted, simulated and measured beside each other, for each phase.

    `things`: whatever has a `.ledger`. Of what several say of a stage from one source, the first
    counts. A bar's parts are components (of bytes) or roles, or what `by` says; its error bar is
    the band that the ledger claims. Bytes are each phase's peak, on the process that needs most;
    seconds are an average over processes. Evaluation is left out: no plan speaks of it.
    """
    by = by or ("component" if quantity == "bytes" else "role")
    rows: list[Row] = []
    for _, thing in named(things):
        said = {(r.stage, r.source) for r in rows}
        rows += [r for r in _rows(thing, quantity) if (r.stage, r.source) not in said]
    stages = dict.fromkeys(r.stage for r in rows)
    cells: dict[str, dict[str, list[Row]]] = {}
    for stage in stages:
        for phase in (*PHASES, ""):
            for row in (r for r in rows if (r.stage, r.phase) == (stage, phase)):
                name = " ".join([stage] * (len(stages) > 1) + [phase.replace("_", " ") or "all"])
                cells.setdefault(name, {}).setdefault(row.source, []).append(row)
    what = "memory at each phase's peak" if quantity == "bytes" else NAMES[quantity]
    x_title = "phase" + (f" of {next(iter(stages))}" if len(stages) == 1 else "")
    return _bars(cells, quantity, by, x_title, what, _cards(things, quantity), theme)


def stage_costs(
    *things: Any, quantity: str = "seconds", by: str | None = None, theme: str = "both"
) -> Figure:
    """What each stage costs: seconds, flops, tokens, money, or bytes at its peak.

    A cluster for each stage; a second run (or plan) of a stage, and what a mapping names, has its
    own. Parts are phases (of bytes, roles), or what `by` says: role, phase or component. Training
    only, without evaluation.
    """
    by = by or ("role" if quantity == "bytes" else "phase")
    clusters: list[tuple[str, str, Any, dict[str, list[Row]]]] = []  # name, stage, thing, rows
    for name, thing in named(things):
        rows = _rows(thing, quantity)
        for stage in dict.fromkeys(r.stage for r in rows):
            found: dict[str, list[Row]] = {}
            for row in (r for r in rows if r.stage == stage):
                found.setdefault(row.source, []).append(row)
            own = max(found, key=SOURCES.index)  # a run's is measured, though it keeps its plan
            for other, of, _, there in clusters:
                if (other, of) == (name, stage) and own not in there:
                    there.update({s: r for s, r in found.items() if s not in there})
                    break
            else:
                clusters.append((name, stage, thing, found))
    cells: dict[str, dict[str, list[Row]]] = {}
    for name, stage, thing, found in clusters:
        twice = [(c[0], c[1]) for c in clusters].count((name, stage)) > 1
        several = len({c[1] for c in clusters if c[0] == name}) > 1
        label = f"{name}, {stage}" if name and several else name or stage
        label += f" {getattr(thing, 'name', '')}".rstrip() if twice else ""
        count = sum(1 for c in cells if c == label or c.startswith(f"{label} ("))
        peak = {s: _at_peak(r) if quantity == "bytes" else r for s, r in found.items()}
        cells[f"{label} ({count + 1})" if count else label] = peak
    what = "memory at the peak" if quantity == "bytes" else NAMES[quantity]
    return _bars(cells, quantity, by, "stage", what, (), theme)


def scaling(
    sweep: Any, quantity: str = "flops", *, x_title: str = "", theme: str = "both"
) -> Figure:
    """A series over one setting (`lab.sweep`) on log-log paper, where a power law is a straight
    line: predicted and measured, each with its exponent. `x_title`: what is varied, with unit."""
    found = {
        source: [
            (p["x"], p[f"{quantity} {source}"])
            for p in sweep.points
            if p.get(f"{quantity} {source}")
        ]
        for source in ("predicted", "measured")
    }
    top = max((y for points in found.values() for _, y in points), default=0.0)
    if not top:
        raise ValueError(f"nothing to draw: this series has no {quantity}")
    name, size = unit_of(quantity, top)
    figure, words = Figure(), [f"{quantity} over {sweep.axis}"]
    for i, (source, points) in enumerate(found.items()):
        if not points:
            continue
        slope = f", exponent {sweep.exponent(quantity, source):.2f}" if len(points) > 1 else ""
        figure.add_scatter(
            x=[rounded(x) for x, _ in points],
            y=[rounded(y / size) for _, y in points],
            mode="lines+markers",
            name=f"{source}{slope}",
            line=line_style(i),
            marker={"symbol": symbol(i), "size": 8},
            hovertemplate=f"%{{x:.4g}}: %{{y:.4g}} {name}",
        )
        ends = (format_number(y, UNITS[quantity]) for y in (points[0][1], points[-1][1]))
        words.append(f"{source}{slope}: {' to '.join(ends)}")
    figure.update_xaxes(type="log", title={"text": safe(x_title or sweep.axis)})
    figure.update_yaxes(type="log", title={"text": f"{NAMES[quantity]} ({name})"})
    finish(figure, words=words, plot=320, theme=theme)
    return legend_on_top(figure, [t.name for t in figure.data])


def named(things: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Things by name; "" for one that was given without."""
    for thing in things:
        yield from thing.items() if isinstance(thing, Mapping) else [("", thing)]


def _rows(thing: Any, quantity: str) -> list[Row]:
    """What a thing's ledger says of a quantity in training."""
    if quantity not in UNITS:
        raise ValueError(f"quantity={quantity!r}: choose from {', '.join(UNITS)}")
    ledger = getattr(thing, "ledger", thing)
    if not hasattr(ledger, "filter"):
        raise ValueError(f"{type(thing).__name__} has no ledger")
    return [r for r in ledger.filter(quantity=quantity) if r.phase not in AROUND]


def _at_peak(rows: Sequence[Row]) -> list[Row]:
    """Bytes of the phase, and of the process, that needs the most."""
    moments: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        moments.setdefault((row.phase, row.rank), []).append(row)
    return max(moments.values(), key=lambda m: math.fsum(r.value for r in m))


def _bars(
    cells: Mapping[str, Mapping[str, Sequence[Row]]],
    quantity: str,
    by: str,
    x_title: str,
    y_title: str,
    references: Sequence[tuple[float, str]],
    theme: str,
) -> Figure:
    """Clusters of rows as stacked bars, by a label of the rows."""
    if by not in _COLOURED:
        raise ValueError(f"by={by!r}: choose from {', '.join(_COLOURED)}")
    if not cells:
        raise ValueError(f"nothing to draw: no ledger has {quantity}")
    bars: dict[str, dict[str, dict[str, Amount]]] = {}
    for cluster, found in cells.items():
        for source, rows in found.items():
            ranks = len({r.rank for r in rows})
            share = 1 / ranks if quantity == "seconds" else 1.0
            rows = _at_peak(rows) if quantity == "bytes" else rows
            parts: dict[str, list[Row]] = {}
            for row in rows:
                parts.setdefault(getattr(row, by) or "all", []).append(row)
            bars.setdefault(cluster, {})[source] = {
                p: Amount.of(r, share) for p, r in parts.items()
            }
    order = (*{"component": COMPONENTS, "role": ROLES, "phase": PHASES}[by], "all")
    colours = {p: _part_colour(by, p) for p in order}
    return stacked_bars(
        bars,
        quantity=quantity,
        colours=colours,
        x_title=x_title,
        y_title=y_title,
        legend=by,
        references=references,
        theme=theme,
    )


def _part_colour(by: str, part: str) -> str:
    """A part keeps its colour in every figure; what comes ninth has a darker one."""
    names = _COLOURED[by]
    if part not in names:
        return NOTHING
    place = names.index(part)
    return COLOURS[place] if place < len(COLOURS) else _darker(COLOURS[place % len(COLOURS)])


def _darker(hex_colour: str) -> str:
    return "#" + "".join(f"{round(0.7 * int(hex_colour[i : i + 2], 16)):02X}" for i in (1, 3, 5))


def _cards(things: Sequence[Any], quantity: str) -> list[tuple[float, str]]:
    """The memory of the device that a plan is for."""
    found: dict[tuple[float, str], None] = {}
    for _, thing in named(things) if quantity == "bytes" else ():
        hardware = getattr(getattr(thing, "estimate", thing), "hardware", None)
        if math.isfinite(getattr(hardware, "memory", math.inf)):
            found[hardware.memory, f"memory of {hardware.name}"] = None
    return list(found)


# -- stacked bars -----------------------------------------------------------------------------
class Amount(NamedTuple):
    """A value with its band, in the ledger's unit."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[Row], share: float = 1.0) -> Amount:
        """The sum of rows, times `share`; where a row claims no band, its value is both ends."""
        low = (r.value if r.low is None else r.low for r in rows)
        high = (r.value if r.high is None else r.high for r in rows)
        return cls(*(share * math.fsum(v) for v in ((r.value for r in rows), low, high)))

    def words(self, unit: str) -> str:
        said = format_number(self.value, unit)
        if self.low == self.value == self.high:
            return said
        return f"{said} ({format_number(self.low, unit)} to {format_number(self.high, unit)})"


Bars = Mapping[str, Mapping[str, Mapping[str, Amount]]]
"""cluster → source → part → amount"""


def total(parts: Mapping[str, Amount]) -> Amount:
    """Parts on top of each other. Ends add up with ends: bands are of a kind, not independent."""
    return Amount(*(math.fsum(ends) for ends in zip(*parts.values(), strict=True)))


def stacked_bars(
    bars: Bars,
    *,
    quantity: str,
    colours: Mapping[str, str],
    x_title: str,
    y_title: str,
    legend: str,
    references: Sequence[tuple[float, str]] = (),
    theme: str = "both",
) -> Figure:
    """Clusters of stacked bars, a bar for each source, its band as an error bar.

    `colours`: part → colour, in the order of stacking, lowest first. `references`: horizontal lines
    (value, label). Positions and bases are given, not left to plotly: before 6.0 it could not stack
    bars that stand side by side.
    """
    unit, sums = (
        UNITS[quantity],
        {(c, s): total(parts) for c, found in bars.items() for s, parts in found.items()},
    )
    known = [v for a in sums.values() for v in a if math.isfinite(v)]
    name, size = unit_of(quantity, max(known, default=0.0))
    shown = {p for found in bars.values() for parts in found.values() for p in parts}
    places = _places(bars)
    figure = Figure()
    bases = dict.fromkeys(places, 0.0)
    for part in (p for p in colours if p in shown):
        for source in SOURCES:
            made = _blocks(bars, part, source, places, bases, size, unit, colours[part])
            figure.add_bar(**made) if made["x"] else None
        figure.add_bar(
            x=[None],
            y=[None],
            name=safe(part),
            marker={"color": colours[part]},
            legendgroup=part,
            legend="legend",
        )
    sources = [s for s in SOURCES if any(s in found for found in bars.values())]
    for source in sources:
        _tops(figure, source, places, sums, size, unit, len(sources) > 1)
    for level, label in references:
        if level > 3 * max(known, default=0.0):  # would press the bars flat
            continue
        figure.add_hline(
            y=rounded(level / size),
            line={"color": NOTHING, "dash": "dot"},
            annotation={"text": safe(label), "xanchor": "right"},
        )
    figure.update_xaxes(
        tickvals=list(range(len(bars))),
        ticktext=[_in_lines(c) for c in bars],
        range=[-0.5, len(bars) - 0.5],
        title={"text": x_title},
    )
    figure.update_yaxes(title={"text": f"{y_title} ({name})"}, rangemode="tozero")
    figure.update_layout(
        barmode="overlay",
        legend={"title": {"text": legend}, "traceorder": "reversed"},
        legend2={
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
        },
    )
    words = [f"{y_title} by {x_title}", *_said(bars, sums, unit)]
    return finish(figure, words=words, plot=330, theme=theme)


def _in_lines(name: str) -> str:
    """A word a line, where they are few: a slanted label is hard to read."""
    parts = name.split()
    return "<br>".join(map(safe, parts)) if len(parts) <= 3 else safe(name)


def _places(bars: Bars) -> dict[tuple[str, str], tuple[int, float, float]]:
    """→ {(cluster, source): (centre of the cluster, offset of the bar's left edge, width)}."""
    out = {}
    for i, (cluster, found) in enumerate(bars.items()):
        width = min(0.8 / max(len(found), 1), 0.5)
        for j, source in enumerate(s for s in SOURCES if s in found):
            out[cluster, source] = i, (j - len(found) / 2) * width, width * 0.92
    return out


def _blocks(
    bars: Bars,
    part: str,
    source: str,
    places: Mapping,
    bases: dict,
    size: float,
    unit: str,
    fill: str,
) -> dict[str, Any]:
    """One part of all bars of a source, on top of what is there: `bases` grow."""
    columns: dict[str, list] = {k: [] for k in ("x", "offset", "width", "base", "y", "customdata")}
    for cluster, found in bars.items():
        amount = found.get(source, {}).get(part)
        if amount is None or not math.isfinite(amount.value):
            continue
        at = cluster, source
        said = f"{safe(cluster)}, {source}: {safe(amount.words(unit), 60)}"
        values = (*places[at], bases[at] / size, amount.value / size)
        for name, value in zip(columns, (*map(rounded, values), said), strict=True):
            columns[name].append(value)
        bases[at] += amount.value
    return {
        **columns,
        "name": safe(part),
        "legendgroup": part,
        "showlegend": False,
        "marker": _filled(fill, source),
        "hovertemplate": f"%{{customdata}}<extra>{safe(part)}</extra>",
    }


def _tops(
    figure: Figure,
    source: str,
    places: Mapping,
    sums: Mapping,
    size: float,
    unit: str,
    several: bool,
) -> None:
    """At the top of each bar of a source: its band, its letter (or its total), all in words."""
    columns: dict[str, list] = {k: [] for k in ("x", "y", "high", "low", "label", "said")}
    for at, amount in sums.items():
        if at[1] != source or not math.isfinite(amount.value):
            continue
        centre, offset, width = places[at]
        value, low, high = (v if math.isfinite(v) else amount.value for v in amount)
        said = [f"{at[0]}, {source}: {amount.words(unit)}", _ratio(sums, at)]
        row = (
            rounded(centre + offset + width / 2),
            rounded(value / size),
            rounded((high - value) / size),
            rounded((value - low) / size),
            source[0].upper() if several else safe(format_number(value, unit)),
            "<br>".join(safe(line, 80) for line in said if line),
        )
        for name, entry in zip(columns, row, strict=True):
            columns[name].append(entry)
    x, y, high, low, label, said = columns.values()
    band = {
        "type": "data",
        "symmetric": False,
        "array": high,
        "arrayminus": low,
        "thickness": 1.6,
        "width": 3,
        "color": INK,
    }
    figure.add_scatter(
        x=x,
        y=y,
        customdata=said,
        name=source,
        mode="markers",
        showlegend=False,
        marker={"size": 8, "opacity": 0},
        hovertemplate="%{customdata}<extra></extra>",
        error_y=band if any(high + low) else None,
    )
    tops = [rounded(v + h) for v, h in zip(y, high, strict=True)]
    figure.add_scatter(
        x=x,
        y=tops,
        text=label,
        mode="text",
        textposition="top center",
        textfont={"size": 10},
        showlegend=False,
        hoverinfo="skip",
    )
    figure.add_bar(
        x=[None],
        y=[None],
        name=f"{source[0].upper()} {source}" if several else source,
        legend="legend2",
        marker=_filled(NOTHING, source),
    )


def _filled(fill: str, source: str) -> dict[str, Any]:
    return {"color": faint(fill, FILL[source]), "line": {"color": fill, "width": 1}}


def _ratio(sums: Mapping, at: tuple[str, str]) -> str:
    """What a number is of the measured one."""
    measured = sums.get((at[0], "measured"))
    if at[1] == "measured" or not measured or not 0 < measured.value < math.inf:
        return ""
    return f"{sums[at].value / measured.value:.2f} × measured"


def _said(bars: Bars, sums: Mapping, unit: str) -> list[str]:
    lines = []
    for cluster, found in bars.items():
        parts = [f"{s} {sums[cluster, s].words(unit)}" for s in SOURCES if s in found]
        parts += [
            f"predicted {r}"
            for r in [_ratio(sums, (cluster, "predicted")) if "predicted" in found else ""]
            if r
        ]
        lines.append(f"{cluster}: {'; '.join(parts)}")
    return lines
