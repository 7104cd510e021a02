"""Memory of each phase as a picture: by component and role, or by role, from several sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..display import check_choice
from ..runs.ledger import COMPONENTS, ROLES, SOURCES, Ledger, Row
from .chart import ChartSize, Reference, bar_chart, cluster_chart
from .frame import Picture
from .ledgers import device_of, named, training_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

MIB, GIB = 2**20, 2**30
Clusters = dict[str, dict[str, dict[str, float]]]
"""phase → the source's letter, where there are several sources → part → bytes"""


def memory_chart(ledger: Ledger, references: Sequence[Reference] = ()) -> Picture:
    """Bars by phase, a colour for each component, in it a block for each role.

    Where the ledger has several sources, each has a bar of its own: P predicted, S simulated,
    M measured. `references`: (bytes, label); one that would press the bars flat is left out.
    """
    rows = ledger.filter(quantity="bytes")
    clusters, top, name, unit = _clusters(rows, _role_and_component, "component", COMPONENTS)
    sources = _sources(rows)
    letters = ", ".join(f"{s[0].upper()} {s}" if len(sources) > 1 else s for s in sources)
    legend = {component: component for component in COMPONENTS}
    return cluster_chart(
        clusters,
        title=f"Memory at each phase's peak: {letters}",
        y_label=name,
        kind="component",
        legend=legend | {_role_and_component(row): row.component or "all" for row in rows},
        references=[(y / unit, label) for y, label in references if y < 3 * top],
        width=max(460, (44 + 26 * len(sources)) * len(clusters)),
    )


def role_memory_chart(
    ledger: Ledger, limit: float | None = None, **size: Unpack[ChartSize]
) -> Picture:
    """Bytes at each phase's peak, stacked by role, predicted (P) beside measured (M); the plan's
    peak and the machine's memory (`limit`) as lines, and in words where a line would press the
    bars flat."""
    training = ledger.training(quantity="bytes", source=("predicted", "measured"))
    sources = _sources(training)
    clusters, top, name, unit = _clusters(training, lambda r: r.role or "other", "role", ROLES)
    planned = ledger.filter(source="predicted").peak() / unit
    lines = [(planned, "planned peak")] if planned else []
    title = "memory by role"
    if limit and limit < 2 * top:
        lines.append((limit / unit, "this machine's memory"))
    elif limit and top:
        title += f" ({top / limit:.1%} of the machine's {limit / GIB:.0f} GiB)"
    letters = f" ({', '.join(f'{s[0].upper()} {s}' for s in sources)})" if len(sources) > 1 else ""
    return cluster_chart(
        clusters,
        title=title,
        y_label=f"{name} at each phase's peak{letters}",
        references=lines,
        kind="role",
        **size,
    )


def peaks(*things: object, by: str = "role") -> Picture:
    """Memory at the peak of several plans, x-rays or runs beside each other, by "role" or by
    "component": an SVG. A mapping names them; else a bar has its stage's name. Of a run what was
    measured. The memory of the plans' devices is a line.

        lab.peaks({"PPO": ppo, "DPO": dpo})

    Raises ValueError for what has no bytes in its ledger, and for two of one name.
    """
    orders = {"role": ROLES, "component": COMPONENTS}
    check_choice("by", by, orders)
    bars: dict[str, dict[str, float]] = {}
    for name, thing in named(things):
        rows = training_rows(thing, "bytes")
        if not rows:
            raise ValueError(f"{name or type(thing).__name__}: no bytes in its ledger")
        source = max((r.source for r in rows), key=SOURCES.index)
        at_peak = rows.at_peak(source=source)
        if (label := name or at_peak[0].stage) in bars:
            raise ValueError(f"two are called {label!r}: name them, {{'one': …, 'other': …}}")
        sums = at_peak.pivot(by, "quantity").items()
        bars[label] = {part or "other": of_part["bytes"] for part, of_part in sums}
    unit, size = axis_unit(max(sum(bar.values()) for bar in bars.values()))
    lines: dict[str, float] = {}
    for _, thing in named(things):
        device = device_of(thing)
        if device is not None and device.kind == "gpu":
            lines[f"memory of {device.name}"] = device.memory / size
    return bar_chart(
        {name: {p: v / size for p, v in bar.items()} for name, bar in bars.items()},
        title=f"Memory at the peak, by {by}",
        y_label=unit,
        kind=by,
        legend={part: part for part in (*orders[by], "other")},
        references=[(y, label) for label, y in lines.items()],
        width=max(460, 130 * len(bars)),
    )


def axis_unit(top: float) -> tuple[str, int]:
    """The unit in which an axis up to `top` bytes reads well, and its size."""
    return ("GiB", GIB) if top >= GIB else ("MiB", MIB)


def _sources(rows: Iterable[Row]) -> list[str]:
    known = {row.source for row in rows}
    return [source for source in SOURCES if source in known]


def _clusters(
    rows: Sequence[Row], part: Callable[[Row], str], label: str, order: Sequence[str]
) -> tuple[Clusters, float, str, int]:
    """Phases in their order in the ledger, sources in theirs, parts by their `label` in `order`.

    → the bars, the highest in bytes, and the unit they are in: its name and its size.
    """
    several = len(_sources(rows)) > 1
    clusters: Clusters = {row.phase or "all": {} for row in rows}

    def place(row: Row) -> tuple[int, int]:
        name = getattr(row, label)
        return SOURCES.index(row.source), order.index(name) if name in order else len(order)

    for row in sorted(rows, key=place):
        letter = row.source[0].upper() if several else ""
        bar = clusters[row.phase or "all"].setdefault(letter, {})
        bar[part(row)] = bar.get(part(row), 0.0) + row.value
    bars = [bar for by_source in clusters.values() for bar in by_source.values()]
    top = max((sum(bar.values()) for bar in bars), default=0.0)
    name, unit = axis_unit(top)
    for bar in bars:
        bar.update({part: size / unit for part, size in bar.items()})
    return clusters, top, name, unit


def _role_and_component(row: Row) -> str:
    return " ".join(x for x in (row.role, row.component) if x) or "all"
