"""Predicted, simulated and measured side by side: one table and one picture of several ledgers.

lab.compare(plan, lab.xray(plan), lab.train(plan))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from ..display import Display, escape, format_number, html_table, numbered, table
from ..runs.json_files import to_json_object
from ..runs.ledger import SOURCES, UNITS, Ledger, Row
from ..runs.run import Run
from .frame import Picture
from .ledgers import first_of_each, named
from .memory import memory_chart

if TYPE_CHECKING:
    from .plotly_style import Figure


class Comparison(Display):
    """One table: a row for each phase and quantity, a column for each source; of several plans or
    runs (`each`: their ledgers by name) a column for each of them."""

    def __init__(
        self,
        ledger: Ledger,
        rows: Sequence[Mapping[str, str]],
        each: Mapping[str, Ledger] | None = None,
        per: str = "the whole run",
    ) -> None:
        self.ledger, self.rows, self.each = ledger, rows, each or {}
        pictures = [
            part
            for name, one in self.each.items()
            for part in (f"<p>{escape(name)}</p>", memory_chart(one))
        ]
        note = f"bytes: of tensors, at each phase's peak; flops, seconds, tokens: of {per}"
        note += "" if each else "; real: measured, or simulated where nothing was measured"
        if any(row["quantity"] == "sent" for row in rows):
            note += "; sent: by the process that sends most, as a ring passes it on"
        page = f"{html_table(rows)}<p>{note}</p>"
        super().__init__(f"{table(rows)}\n{note}", page, *(pictures or [self.picture()]))

    def picture(self) -> Picture:
        """Memory of each phase, predicted, simulated and measured: an SVG."""
        return memory_chart(self.ledger)

    def figure(self, quantity: str = "bytes") -> Figure:
        """The sources beside each other by phase, with the bands they claim; of several plans or
        runs their costs beside each other: a plotly figure."""
        from .cost_bars import sources, stage_costs

        if self.each:
            return stage_costs(self.each, quantity=quantity)
        return sources(self, quantity=quantity)


def compare(*things: object) -> Comparison:
    """Plans, x-rays and runs (whatever has a `.ledger`, or a run's folder) in one table.

    A plan, its x-ray and its run have a column for each source, and one picture. A run knows how
    long its rows were, which its plan may not have known: where a plan is compared with the run
    that it became, the run's prediction is shown. Several plans, or several runs, have a column
    each, by what sets them apart or the names of a mapping: `compare({"full": a, "lora": b})`.
    Raises ValueError for what has no ledger.
    """
    found = [*named(things)]
    for _, thing in found:
        if not isinstance(getattr(thing, "ledger", None), Ledger):
            raise ValueError(f"{type(thing).__name__} has no ledger: give plans, x-rays or runs")
    runs = [thing for _, thing in found if isinstance(thing, Run)]
    runs = [run for run in runs if run.ledger.filter(source="predicted")]
    shown = [(n, t) for n, t in found if n or not any(_became(t, run) for run in runs)]
    ledgers = [thing.ledger for _, thing in shown]  # type: ignore[attr-defined]
    steps = [getattr(getattr(thing, "estimate", thing), "steps", 1) for _, thing in shown]
    per = "one step" if None in steps else "the whole run"
    own = [max((r.source for r in one), key=SOURCES.index, default="") for one in ledgers]
    if len(set(own)) < len(own) or any(name for name, _ in shown):
        names = numbered(name or title for (name, _), title in zip(shown, _titles(shown)))
        best = (Ledger(one.filter(source=s)) for one, s in zip(ledgers, own, strict=True))
        each = dict(zip(names, best, strict=True))
        return Comparison(Ledger(chain(*each.values())), _rows(each), each, per)
    ledger = Ledger(first_of_each(ledgers))
    sources = {source: ledger.filter(source=source) for source in SOURCES}
    return Comparison(ledger, _rows(sources, real=True), per=per)


def _rows(each: Mapping[str, Ledger], real: bool = False) -> list[dict[str, str]]:
    """A row for each phase and quantity, a column for each; of two, the second over the first.
    `real`: they are the sources, and predictions stand over what was measured (or, without a run,
    simulated)."""
    rows = []
    for quantity in ("bytes", "flops", "seconds", "tokens", "sent", *["money"] * (not real)):
        sums = {name: _by_phase(one.filter(quantity=quantity)) for name, one in each.items()}
        for phase in dict.fromkeys(chain(*sums.values())):
            values = [by_phase.get(phase) for by_phase in sums.values()]
            shown = (format_number(value, UNITS[quantity]) for value in values)
            row = {"phase": phase or "all", "quantity": quantity, **dict(zip(each, shown))}
            if real:
                predicted, simulated, measured = values
                row["predicted / real"] = _over(predicted, measured or simulated)
            elif len(values) == 2:
                row["second / first"] = _over(values[1], values[0])
            rows.append(row)
    return rows


def _titles(shown: Sequence[tuple[str, object]]) -> list[str]:
    """What sets each apart: a run's name; of plans the stage, model, hardware and settings."""
    facts = []
    for _, thing in shown:
        model, own = getattr(thing, "model", None), getattr(thing, "settings", None) or {}
        named_facts = {"stage": getattr(thing, "stage", ""), "model": getattr(model, "name", "")}
        facts.append({**named_facts, "hardware": getattr(thing, "hardware_name", ""), **own})
    every = dict.fromkeys(name for one in facts for name in one)
    differ = [n for n in every if len({str(one.get(n)) for one in facts}) > 1]
    return [
        str(getattr(thing, "name", ""))
        or ", ".join(f"{name}={one[name]}" for name in differ if name in one)
        or type(thing).__name__.lower()
        for one, (_, thing) in zip(facts, shown, strict=True)
    ]


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


def _over(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}" if one and other else ""
