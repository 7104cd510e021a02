"""Stacked bars that stand beside each other in clusters, with bands: a plotly figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..display import format_number
from ..runs.ledger import SOURCES, UNITS, Row
from .plotly_style import NEUTRAL, TEXT_GREY, Figure, finish, rounded, safe, translucent, unit_of

FILL = {"predicted": 0.3, "simulated": 0.6, "measured": 1.0}
"""How full a source's bars are, the surer the fuller. Flat, not hatched: JupyterLab keeps a PNG of
what it has drawn, and hatching made it twice as large."""


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

    def text(self, unit: str) -> str:
        value, low, high = (format_number(v, unit) for v in self)
        return value if self.low == self.value == self.high else f"{value} ({low} to {high})"


Bars = Mapping[str, Mapping[str, Mapping[str, Amount]]]
"""cluster → source → part → amount"""
Place = tuple[str, str]
"""(cluster, source): where a bar stands"""


class _Scale(NamedTuple):
    """The unit of the ledger, and how many of it are one of the axis."""

    unit: str
    size: float


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
    sums = {(c, s): total(parts) for c, by_source in bars.items() for s, parts in by_source.items()}
    top = max((v for a in sums.values() for v in a if math.isfinite(v)), default=0.0)
    axis_unit, size = unit_of(quantity, top)
    scale = _Scale(UNITS[quantity], size)
    sources = [s for s in SOURCES if any(s in by_source for by_source in bars.values())]
    figure = Figure()
    _add_blocks(figure, bars, colours, scale)
    for source in sources:
        _add_tops(figure, source, bars, sums, scale, len(sources) > 1)
    for level, label in references:
        if level > 3 * top:  # would press the bars flat
            continue
        figure.add_hline(
            y=rounded(level / size),
            line={"color": NEUTRAL, "dash": "dot"},
            annotation={"text": safe(label), "xanchor": "right"},
        )
    figure.update_xaxes(
        tickvals=list(range(len(bars))),
        ticktext=[_in_lines(c) for c in bars],
        range=[-0.5, len(bars) - 0.5],
        title={"text": x_title},
    )
    figure.update_yaxes(title={"text": f"{y_title} ({axis_unit})"}, rangemode="tozero")
    figure.update_layout(
        barmode="overlay",
        legend={"title": {"text": legend}, "traceorder": "reversed"},
        legend2={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        legend2_bgcolor="rgba(0,0,0,0)",
    )
    words = [f"{y_title} by {x_title}", *_cluster_lines(bars, sums, scale.unit)]
    return finish(figure, words=words, plot=330, theme=theme)


def _in_lines(name: str) -> str:
    """A word a line, where there are at most three: a slanted label is hard to read."""
    parts = name.split()
    return "<br>".join(map(safe, parts)) if len(parts) <= 3 else safe(name)


def _geometry(bars: Bars) -> Mapping[Place, tuple[float, float, float]]:
    """→ {bar: (centre of its cluster, offset of its left edge, width)}; clusters are 1 apart."""
    places = {}
    for i, (cluster, by_source) in enumerate(bars.items()):
        width = min(0.8 / max(len(by_source), 1), 0.5)
        for j, source in enumerate(s for s in SOURCES if s in by_source):
            places[cluster, source] = i, (j - len(by_source) / 2) * width, width * 0.92
    return places


def _add_blocks(figure: Figure, bars: Bars, colours: Mapping[str, str], scale: _Scale) -> None:
    """All parts of all bars, the lowest first, each on top of what is there; their legend."""
    geometry = _geometry(bars)
    drawn = {p for by_source in bars.values() for parts in by_source.values() for p in parts}
    bases = dict.fromkeys(geometry, 0.0)
    for part in (p for p in colours if p in drawn):
        for source in SOURCES:
            columns: dict[str, list[object]] = {
                name: [] for name in ("x", "offset", "width", "base", "y", "customdata")
            }
            for cluster, by_source in bars.items():
                amount = by_source.get(source, {}).get(part)
                if amount is None or not math.isfinite(amount.value):
                    continue
                at = cluster, source
                text = f"{safe(cluster)}, {source}: {safe(amount.text(scale.unit), 60)}"
                values = (*geometry[at], bases[at] / scale.size, amount.value / scale.size)
                for column, value in zip(
                    columns.values(), (*map(rounded, values), text), strict=True
                ):
                    column.append(value)
                bases[at] += amount.value
            if columns["x"]:
                figure.add_bar(
                    **columns,
                    name=safe(part),
                    legendgroup=part,
                    showlegend=False,
                    marker=_filled(colours[part], source),
                    hovertemplate=f"%{{customdata}}<extra>{safe(part)}</extra>",
                )
        figure.add_bar(
            x=[None],
            y=[None],
            name=safe(part),
            marker={"color": colours[part]},
            legendgroup=part,
            legend="legend",
        )


def _add_tops(
    figure: Figure,
    source: str,
    bars: Bars,
    sums: Mapping[Place, Amount],
    scale: _Scale,
    several: bool,
) -> None:
    """At the top of each bar of a source: its band, its letter (or its total), all in words."""
    geometry = _geometry(bars)
    rows = []
    for at, amount in sums.items():
        if at[1] != source or not math.isfinite(amount.value):
            continue
        centre, offset, width = geometry[at]
        value, least, most = (v if math.isfinite(v) else amount.value for v in amount)
        lines = [f"{at[0]}, {source}: {amount.text(scale.unit)}", _ratio(sums, at)]
        rows.append(
            (
                rounded(centre + offset + width / 2),
                rounded(value / scale.size),
                rounded((most - value) / scale.size),
                rounded((value - least) / scale.size),
                source[0].upper() if several else safe(format_number(value, scale.unit)),
                "<br>".join(safe(line, 80) for line in lines if line),
            )
        )
    x, y, high, low, label, hover = zip(*rows, strict=True) if rows else [()] * 6
    looks = {"type": "data", "symmetric": False, "thickness": 1.6, "width": 3, "color": TEXT_GREY}
    band = {**looks, "array": high, "arrayminus": low}
    figure.add_scatter(
        x=x,
        y=y,
        customdata=hover,
        name=source,
        mode="markers",
        showlegend=False,
        marker={"size": 8, "opacity": 0},
        hovertemplate="%{customdata}<extra></extra>",
        error_y=band if any(high + low) else None,
    )
    figure.add_scatter(
        x=x,
        y=[rounded((v or 0.0) + (h or 0.0)) for v, h in zip(y, high, strict=True)],
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
        marker=_filled(NEUTRAL, source),
    )


def _filled(fill: str, source: str) -> dict[str, object]:
    return {"color": translucent(fill, FILL[source]), "line": {"color": fill, "width": 1}}


def _ratio(sums: Mapping[Place, Amount], at: Place) -> str:
    """What a number is of the measured one."""
    measured = sums.get((at[0], "measured"))
    if at[1] == "measured" or not measured or not 0 < measured.value < math.inf:
        return ""
    return f"{sums[at].value / measured.value:.2f} × measured"


def _cluster_lines(bars: Bars, sums: Mapping[Place, Amount], unit: str) -> list[str]:
    """A line of words for each cluster."""
    lines = []
    for cluster, by_source in bars.items():
        parts = [f"{s} {sums[cluster, s].text(unit)}" for s in SOURCES if s in by_source]
        ratio = _ratio(sums, (cluster, "predicted")) if "predicted" in by_source else ""
        parts += [f"predicted {ratio}"] if ratio else []
        lines.append(f"{cluster}: {'; '.join(parts)}")
    return lines
