"""Ledgers as figures: sources beside each other by phase, what each stage costs, and how a cost
grows over one setting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..display import check_choice, format_number, numbered
from ..runs.ledger import COMPONENTS, PHASES, ROLES, SOURCES, UNITS, Ledger, Row
from .colours import COLOURS_OF, part_colour
from .ledgers import device_of, first_of_each, named, training_rows
from .plotly_style import Figure, finish, line_style, rounded, safe, symbol, unit_of
from .stacked_bars import Amount, Place, stacked_bars

if TYPE_CHECKING:
    from ..studies import Sweep

TITLES = {quantity: quantity for quantity in UNITS}
"""What an axis of a quantity is called."""
TITLES |= {"bytes": "memory", "flops": "arithmetic", "seconds": "time", "sent": "bytes sent"}


def sources(*things: object, quantity: str = "bytes", by: str | None = None) -> Figure:
    """Predicted, simulated and measured beside each other, for each phase.

    `things`: whatever has a `.ledger`; where several have rows of one stage and source, the first
    counts. A bar's parts are components (of bytes) or roles, or what `by` names; its error bar is
    the band that the ledger claims. Bytes are each phase's peak, on the process that needs most;
    seconds are an average over processes. Evaluation is left out: no plan predicts it.
    """
    by = by or ("component" if quantity == "bytes" else "role")
    rows = first_of_each(training_rows(thing, quantity) for _, thing in named(things))
    stages = dict.fromkeys(r.stage for r in rows)
    bars: dict[Place, list[Row]] = {}
    for stage in stages:
        for phase in (*PHASES, ""):
            name = " ".join([stage] * (len(stages) > 1) + [phase.replace("_", " ") or "all"])
            for row in (r for r in rows if (r.stage, r.phase) == (stage, phase)):
                bars.setdefault((name, row.source), []).append(row)
    y_title = "memory at each phase's peak" if quantity == "bytes" else TITLES[quantity]
    x_title = "phase" + (f" of {next(iter(stages))}" if len(stages) == 1 else "")
    devices = _device_memory(things) if quantity == "bytes" else []
    return _bars(bars, quantity, by, x_title, y_title, devices)


class _StageCost(NamedTuple):
    """A cluster of `stage_costs`: the rows of a stage by source, and whose they are."""

    name: str
    stage: str
    run_name: str
    rows: dict[str, list[Row]]


def stage_costs(
    *things: object, quantity: str = "seconds", by: str | None = None, theme: str = "both"
) -> Figure:
    """What each stage costs: seconds, flops, tokens, money, or bytes at its peak.

    A cluster for each stage; a second run (or plan) of a stage, and what a mapping names, has its
    own. Parts are phases (of bytes, roles), or what `by` names: role, phase or component. Training
    only, without evaluation.
    """
    by = by or ("role" if quantity == "bytes" else "phase")
    costs = _stage_costs(things, quantity)
    bars: dict[Place, list[Row]] = {}
    labels: list[str] = []
    for cost in costs:
        twice = [(c.name, c.stage) for c in costs].count((cost.name, cost.stage)) > 1
        several = len({c.stage for c in costs if c.name == cost.name}) > 1
        label = f"{cost.name}, {cost.stage}" if cost.name and several else cost.name or cost.stage
        labels.append(label + (f" {cost.run_name}".rstrip() if twice else ""))
    for cost, label in zip(costs, numbered(labels), strict=True):
        for source, rows in cost.rows.items():
            bars[label, source] = rows
    y_title = "memory at the peak" if quantity == "bytes" else TITLES[quantity]
    return _bars(bars, quantity, by, "stage", y_title, (), theme)


def _stage_costs(things: Iterable[object], quantity: str) -> list[_StageCost]:
    """A stage of a plan, its x-ray and its run are one entry; a second run is another."""
    costs: list[_StageCost] = []
    for name, thing in named(things):
        rows = training_rows(thing, quantity)
        for stage in dict.fromkeys(r.stage for r in rows):
            by_source: dict[str, list[Row]] = {}
            for row in (r for r in rows if r.stage == stage):
                by_source.setdefault(row.source, []).append(row)
            own = max(by_source, key=SOURCES.index)  # a run's is measured, though it keeps its plan
            for cost in costs:
                if (cost.name, cost.stage) == (name, stage) and own not in cost.rows:
                    cost.rows.update({s: r for s, r in by_source.items() if s not in cost.rows})
                    break
            else:
                run_name = str(getattr(thing, "name", ""))
                costs.append(_StageCost(name, stage, run_name, by_source))
    return costs


def _bars(
    bars: Mapping[Place, Sequence[Row]],
    quantity: str,
    by: str,
    x_title: str,
    y_title: str,
    references: Sequence[tuple[float, str]],
    theme: str = "both",
) -> Figure:
    """Rows as stacked bars, by a label of the rows."""
    check_choice("by", by, COLOURS_OF)
    if not bars:
        raise ValueError(f"nothing to draw: no ledger has {quantity}")
    amounts: dict[Place, dict[str, Amount]] = {}
    for at, rows in bars.items():
        share = 1 / len({r.rank for r in rows}) if quantity == "seconds" else 1.0
        parts: dict[str, list[Row]] = {}
        for row in Ledger(rows).at_peak() if quantity == "bytes" else rows:
            parts.setdefault(getattr(row, by) or "all", []).append(row)
        amounts[at] = {part: Amount.of(of_part, share) for part, of_part in parts.items()}
    order = (*{"component": COMPONENTS, "role": ROLES, "phase": PHASES}[by], "all")
    return stacked_bars(
        amounts,
        quantity=quantity,
        colours={part: part_colour(by, part) for part in order},
        x_title=x_title,
        y_title=y_title,
        legend=by,
        references=references,
        theme=theme,
    )


def _device_memory(things: Iterable[object]) -> list[tuple[float, str]]:
    """The memory of the devices that plans are for, as reference lines (bytes, label)."""
    lines: dict[tuple[float, str], None] = {}
    for _, thing in named(things):
        hardware = device_of(thing)
        if hardware is not None and math.isfinite(getattr(hardware, "memory", math.inf)):
            lines[hardware.memory, f"memory of {hardware.name}"] = None
    return list(lines)


# -- over one setting -------------------------------------------------------------------------
def scaling(series: Sweep, quantity: str = "flops", *, x_title: str = "") -> Figure:
    """A series over one setting on log-log axes, where a power law is a straight line: predicted
    and measured, each with its exponent; 0 has no place there. `x_title`: what is varied, with
    unit."""
    by_source = {
        source: [(p["x"], p[name]) for p in series.points if p["x"] > 0 and p.get(name)]
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
    figure.update_yaxes(type="log", title={"text": f"{TITLES[quantity]} ({unit})"})
    labels = [t.name for t in figure.data]
    return finish(figure, words=words, plot=320, on_top=labels)
