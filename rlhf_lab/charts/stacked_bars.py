"""Stacked bars that stand beside each other in clusters, with bands: a plotly figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..display import format_number
from ..runs.ledger import SOURCES, UNITS, Row
from .colours import NEUTRAL
from .frame import GREY_TEXT
from .plotly_style import Figure, finish, rounded, safe, translucent, unit_of

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


Place = tuple[str, str]
"""(cluster, source): where a bar stands"""
Bars = Mapping[Place, Mapping[str, Amount]]
"""bar → part → amount; bars of a cluster stand beside each other in the order of SOURCES"""


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
    stacks, figure = _Stacks(bars, quantity), Figure()
    _add_blocks(figure, stacks, colours)
    for source in stacks.sources:
        _add_tops(figure, stacks, source)
    for level, label in references:
        if level > 3 * stacks.top:  # would press the bars flat
            continue
        figure.add_hline(
            y=rounded(level / stacks.size),
            line={"color": NEUTRAL, "dash": "dot"},
            annotation={"text": safe(label), "xanchor": "right"},
        )
    figure.update_xaxes(
        tickvals=list(range(len(stacks.clusters))),
        ticktext=[_in_lines(c) for c in stacks.clusters],
        range=[-0.5, len(stacks.clusters) - 0.5],
        title={"text": x_title},
    )
    figure.update_yaxes(title={"text": f"{y_title} ({stacks.axis_unit})"}, rangemode="tozero")
    figure.update_layout(
        barmode="overlay",
        legend={"title": {"text": legend}, "traceorder": "reversed"},
        legend2={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        legend2_bgcolor="rgba(0,0,0,0)",
    )
    words = [f"{y_title} by {x_title}", *map(stacks.line, stacks.clusters)]
    return finish(figure, words=words, plot=330, theme=theme)


def _in_lines(name: str) -> str:
    """A word a line, where there are at most three: a slanted label is hard to read."""
    parts = name.split()
    return "<br>".join(map(safe, parts)) if len(parts) <= 3 else safe(name)


class _Stacks:
    """Bars with their sums and places, and `size`: how much of the ledger's unit is one of the
    axis."""

    def __init__(self, bars: Bars, quantity: str) -> None:
        self.bars, self.unit = bars, UNITS[quantity]
        # Ends add up with ends: bands are of a kind, not independent.
        columns = {at: zip(*parts.values(), strict=True) for at, parts in bars.items()}
        self.sums = {at: Amount(*map(math.fsum, ends)) for at, ends in columns.items()}
        ends = [v for amount in self.sums.values() for v in amount if math.isfinite(v)]
        self.top = max(ends, default=0.0)
        self.axis_unit, self.size = unit_of(quantity, self.top)
        self.clusters = list(dict.fromkeys(cluster for cluster, _ in bars))
        self.sources = [s for s in SOURCES if any(source == s for _, source in bars)]
        self.edges: dict[Place, tuple[float, float, float]] = {}
        """centre of its cluster, offset of its left edge, width; clusters are 1 apart"""
        for i, cluster in enumerate(self.clusters):
            sources = self.sources_of(cluster)
            width = min(0.8 / len(sources), 0.5)
            for j, source in enumerate(sources):
                left = (j - len(sources) / 2) * width
                self.edges[cluster, source] = i, left, width * 0.92

    def sources_of(self, cluster: str) -> list[str]:
        return [s for s in SOURCES if (cluster, s) in self.bars]

    def ratio(self, at: Place) -> str:
        """What a number is of the measured one."""
        measured = self.sums.get((at[0], "measured"))
        if at[1] == "measured" or not measured or not 0 < measured.value < math.inf:
            return ""
        return f"{self.sums[at].value / measured.value:.2f} × measured"

    def line(self, cluster: str) -> str:
        """A cluster in words."""
        sources = self.sources_of(cluster)
        parts = [f"{s} {self.sums[cluster, s].text(self.unit)}" for s in sources]
        ratio = self.ratio((cluster, "predicted")) if "predicted" in sources else ""
        parts += [f"predicted {ratio}"] if ratio else []
        return f"{cluster}: {'; '.join(parts)}"


def _add_blocks(figure: Figure, stacks: _Stacks, colours: Mapping[str, str]) -> None:
    """All parts of all bars, the lowest first, each on top of what is there; their legend."""
    drawn = {part for parts in stacks.bars.values() for part in parts}
    bases = dict.fromkeys(stacks.bars, 0.0)
    for part in (p for p in colours if p in drawn):
        for source in SOURCES:
            blocks = []
            for at, parts in stacks.bars.items():
                amount = parts.get(part)
                if at[1] != source or amount is None or not math.isfinite(amount.value):
                    continue
                text = f"{safe(at[0])}, {source}: {safe(amount.text(stacks.unit), 60)}"
                sizes = (*stacks.edges[at], bases[at] / stacks.size, amount.value / stacks.size)
                blocks.append((*map(rounded, sizes), text))
                bases[at] += amount.value
            if blocks:
                names = ("x", "offset", "width", "base", "y", "customdata")
                figure.add_bar(
                    **dict(zip(names, zip(*blocks, strict=True), strict=True)),
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


def _add_tops(figure: Figure, stacks: _Stacks, source: str) -> None:
    """At the top of each bar of a source: its band, its letter (or its total), all in words."""
    several, rows = len(stacks.sources) > 1, []
    for at, amount in stacks.sums.items():
        if at[1] != source or not math.isfinite(amount.value):
            continue
        centre, offset, width = stacks.edges[at]
        value, least, most = (v if math.isfinite(v) else amount.value for v in amount)
        lines = [f"{at[0]}, {source}: {amount.text(stacks.unit)}", stacks.ratio(at)]
        rows.append(
            (
                rounded(centre + offset + width / 2),
                rounded(value / stacks.size),
                rounded((most - value) / stacks.size),
                rounded((value - least) / stacks.size),
                source[0].upper() if several else safe(format_number(value, stacks.unit)),
                "<br>".join(safe(line, 80) for line in lines if line),
            )
        )
    x, y, high, low, label, hover = zip(*rows, strict=True) if rows else [()] * 6
    looks = {"type": "data", "symmetric": False, "thickness": 1.6, "width": 3, "color": GREY_TEXT}
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
