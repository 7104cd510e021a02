"""How cost grows over one setting, predicted and measured: a plotly figure.

scaling(lab.sweep("model", names))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..display import format_number
from ..runs.ledger import UNITS
from .cost_bars import QUANTITY_NAMES
from .plotly_style import Figure, finish, legend_on_top, line_style, rounded, safe, symbol, unit_of


class CostSeries(Protocol):
    """What `lab.sweep` returns. A point: "x", and "flops predicted", "seconds measured", …"""

    @property
    def axis(self) -> str: ...
    @property
    def points(self) -> Sequence[Mapping[str, float]]: ...
    def exponent(self, quantity: str, source: str) -> float: ...


def scaling(
    series: CostSeries, quantity: str = "flops", *, x_title: str = "", theme: str = "both"
) -> Figure:
    """A series over one setting on log-log axes, where a power law is a straight line: predicted
    and measured, each with its exponent. `x_title`: what is varied, with unit."""
    by_source = {
        source: [(p["x"], p[name]) for p in series.points if p.get(name)]
        for source, name in ((s, f"{quantity} {s}") for s in ("predicted", "measured"))
    }
    top = max((y for points in by_source.values() for _, y in points), default=0.0)
    if not top:
        raise ValueError(f"nothing to draw: this series has no {quantity}")
    unit, size = unit_of(quantity, top)
    figure, words = Figure(), [f"{quantity} over {series.axis}"]
    for i, (source, points) in enumerate(by_source.items()):
        if not points:
            continue
        slope = f", exponent {series.exponent(quantity, source):.2f}" if len(points) > 1 else ""
        figure.add_scatter(
            x=[rounded(x) for x, _ in points],
            y=[rounded(y / size) for _, y in points],
            mode="lines+markers",
            name=f"{source}{slope}",
            line=line_style(i),
            marker={"symbol": symbol(i), "size": 8},
            hovertemplate=f"%{{x:.4g}}: %{{y:.4g}} {unit}",
        )
        ends = (format_number(y, UNITS[quantity]) for y in (points[0][1], points[-1][1]))
        words.append(f"{source}{slope}: {' to '.join(ends)}")
    figure.update_xaxes(type="log", title={"text": safe(x_title or series.axis)})
    figure.update_yaxes(type="log", title={"text": f"{QUANTITY_NAMES[quantity]} ({unit})"})
    finish(figure, words=words, plot=320, theme=theme)
    return legend_on_top(figure, [t.name for t in figure.data])
