"""Predicted, simulated and measured side by side: one table and one picture of several ledgers.

lab.compare(plan, lab.xray(plan), lab.train(plan))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..display import Display, format_number, html_table, table
from ..runs.json_files import to_json_object
from ..runs.ledger import SOURCES, UNITS, Ledger, Row
from ..runs.run import Run
from .frame import Picture
from .ledgers import HasLedger, first_of_each
from .memory import memory_chart

if TYPE_CHECKING:
    from .plotly_style import Figure


class Comparison(Display):
    """One table: a row for each phase and quantity, a column for each source."""

    def __init__(self, ledger: Ledger, rows: Sequence[Mapping[str, str]]) -> None:
        self.ledger, self.rows = ledger, rows
        super().__init__(table(rows), html_table(rows), self.picture())

    def picture(self) -> Picture:
        """Memory of each phase, predicted, simulated and measured: an SVG."""
        return memory_chart(self.ledger)

    def figure(self, quantity: str = "bytes") -> Figure:
        """The sources beside each other by phase, with the bands they claim: a plotly figure."""
        from .cost_bars import sources

        return sources(self, quantity=quantity)


def compare(*things: HasLedger) -> Comparison:
    """Plans, x-rays and runs (whatever has a `.ledger`) in one table and one picture.

    A run knows how long its rows were, which its plan may not have known: where a plan is compared
    with the run that it became, the run's prediction is shown.
    """
    runs = [thing for thing in things if isinstance(thing, Run)]
    runs = [run for run in runs if run.ledger.filter(source="predicted")]
    shown = [thing for thing in things if not any(_became(thing, run) for run in runs)]
    ledger, rows = Ledger(first_of_each(thing.ledger for thing in shown)), []
    for quantity in ("bytes", "flops", "seconds", "tokens"):
        sums = {s: _by_phase(ledger.filter(quantity=quantity, source=s)) for s in SOURCES}
        for phase in dict.fromkeys(p for by_phase in sums.values() for p in by_phase):
            rows.append(
                {
                    "phase": phase or "all",
                    "quantity": quantity,
                    **{s: format_number(sums[s].get(phase), UNITS[quantity]) for s in SOURCES},
                    "predicted / real": _ratio(sums, phase),
                }
            )
    return Comparison(ledger, rows)


def _became(thing: object, run: Run) -> bool:
    """Whether a thing is the plan that a run was trained from."""
    settings, model = getattr(thing, "settings", None), getattr(thing, "model", None)
    if not isinstance(settings, Mapping):
        return False
    here = (getattr(thing, "stage", ""), getattr(model, "name", ""), to_json_object(settings))
    return here == (run.stage, run.config["model"], run.config["settings"])


def _by_phase(rows: Iterable[Row]) -> dict[str, float]:
    """→ {phase: sum}."""
    sums: dict[str, float] = {}
    for row in rows:
        sums[row.phase] = sums.get(row.phase, 0.0) + row.value
    return sums


def _ratio(sums: Mapping[str, Mapping[str, float]], phase: str) -> str:
    """The prediction over what was measured (or, without a run, simulated)."""
    predicted = sums["predicted"].get(phase)
    real = sums["measured"].get(phase) or sums["simulated"].get(phase)
    return f"{predicted / real:.2f}" if predicted and real else ""
