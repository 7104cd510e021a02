"""Gold reward over what was spent, at equal seconds, FLOPs and dollars: a plotly figure."""

from __future__ import annotations

from statistics import mean, stdev
from typing import TYPE_CHECKING

from plotly.subplots import make_subplots

from ..display import format_number
from .plotly_style import Figure, finish, line_style, rounded, safe, symbol

if TYPE_CHECKING:
    from ..equal_cost import EqualBudget

TITLES = {"seconds": "seconds", "flops": "FLOPs", "dollars": "USD, labels included"}


def equal_budget_figure(found: EqualBudget, theme: str = "both") -> Figure:
    """A panel for each quantity, a line for each way: the means over seeds of its points, with
    their standard deviations. Dotted: the budgets at which the ways are compared."""
    figure, words = make_subplots(1, 3, figure=Figure(), shared_yaxes=True), [found.answer]
    for column, (quantity, title) in enumerate(TITLES.items(), 1):
        for i, (way, traces) in enumerate(found.ways.items()):
            by_point = list(zip(*(t.points for t in traces.values()), strict=True))
            gold = [[p.gold_reward for p in point] for point in by_point]
            spent = [mean(found.spent(p, quantity) for p in point) for point in by_point]
            figure.add_scatter(
                x=[rounded(x) for x in spent],
                y=[rounded(mean(y)) for y in gold],
                error_y={"array": [stdev(y) if len(y) > 1 else 0 for y in gold], "thickness": 1},
                name=safe(way),
                legendgroup=way,
                showlegend=column == 1,
                mode="lines+markers",
                line=line_style(i),
                marker={"symbol": symbol(i), "size": 6},
                row=1,
                col=column,
            )
            last = f"{mean(gold[-1]):.2f} at {format_number(spent[-1])} {title}"
            words.append(f"{way}: gold reward {last}")
        for budget in found.budgets(quantity):
            figure.add_vline(budget, line={"dash": "dot", "width": 1}, row=1, col=column)
        figure.update_xaxes(title={"text": title}, row=1, col=column)
    figure.update_yaxes(title={"text": "gold reward (0 to 10)"}, row=1, col=1)
    return finish(figure, words=words, plot=320, theme=theme, on_top=[*found.ways])
