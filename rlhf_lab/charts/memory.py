"""Memory of each phase as a picture: by component and role, or by role, from several sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..runs.ledger import AROUND, COMPONENTS, ROLES, SOURCES, Ledger, Row
from .chart import Reference, cluster_chart
from .frame import Picture

MIB, GIB = 2**20, 2**30
Clusters = dict[str, dict[str, dict[str, float]]]
"""phase → the source's letter, where there are several sources → part → bytes"""


def memory_chart(ledger: Ledger, references: Sequence[Reference] = ()) -> Picture:
    """Bars by phase, a colour for each component, in it a block for each role.

    Where the ledger has several sources, each has a bar of its own: P predicted, S simulated,
    M measured. `references`: (bytes, label); one that would press the bars flat is left out.
    """
    rows = list(ledger.filter(quantity="bytes"))
    sources = _sources(rows)
    clusters = _clusters(rows, _role_and_component, lambda r: _place(r.component, COMPONENTS))
    top = _highest(clusters)
    name, unit = axis_unit(top)
    letters = ", ".join(f"{s[0].upper()} {s}" if len(sources) > 1 else s for s in sources)
    legend = {component: component for component in COMPONENTS}
    return cluster_chart(
        _scaled(clusters, unit),
        title=f"Memory at each phase's peak: {letters}",
        y_label=name,
        legend=legend | {_role_and_component(row): row.component or "all" for row in rows},
        references=[(y / unit, label) for y, label in references if y < 3 * top],
        width=max(460, (44 + 26 * len(sources)) * len(clusters)),
    )


def role_memory_chart(
    ledger: Ledger, limit: float | None = None, *, width: int = 460, height: int = 260
) -> Picture:
    """Bytes at each phase's peak, stacked by role, predicted (P) beside measured (M); the plan's
    peak and the machine's memory (`limit`) as lines, and in words where a line would press the
    bars flat."""
    rows = ledger.filter(quantity="bytes", source=("predicted", "measured"))
    training = [row for row in rows if row.phase not in AROUND]
    sources = _sources(training)
    clusters = _clusters(training, lambda r: r.role or "other", lambda r: _place(r.role, ROLES))
    top = _highest(clusters)
    name, unit = axis_unit(top)
    planned = ledger.filter(source="predicted").peak() / unit
    lines = [(planned, "planned peak")] if planned else []
    title = "memory by role"
    if limit and limit < 2 * top:
        lines.append((limit / unit, "this machine's memory"))
    elif limit and top:
        title += f" ({top / limit:.1%} of the machine's {limit / GIB:.0f} GiB)"
    letters = f" ({', '.join(f'{s[0].upper()} {s}' for s in sources)})" if len(sources) > 1 else ""
    return cluster_chart(
        _scaled(clusters, unit),
        title=title,
        y_label=f"{name} at each phase's peak{letters}",
        references=lines,
        width=width,
        height=height,
    )


def axis_unit(top: float) -> tuple[str, int]:
    """The unit in which an axis up to `top` bytes reads well, and its size."""
    return ("GiB", GIB) if top >= GIB else ("MiB", MIB)


def _sources(rows: Sequence[Row]) -> list[str]:
    return [source for source in SOURCES if any(row.source == source for row in rows)]


def _clusters(
    rows: Sequence[Row], part: Callable[[Row], str], place: Callable[[Row], int]
) -> Clusters:
    """Phases in their order in the ledger, sources in theirs, parts by their `place`."""
    several = len(_sources(rows)) > 1
    clusters: Clusters = {row.phase or "all": {} for row in rows}
    for row in sorted(rows, key=lambda row: (SOURCES.index(row.source), place(row))):
        letter = row.source[0].upper() if several else ""
        bar = clusters[row.phase or "all"].setdefault(letter, {})
        bar[part(row)] = bar.get(part(row), 0.0) + row.value
    return clusters


def _highest(clusters: Clusters) -> float:
    return max((sum(bar.values()) for c in clusters.values() for bar in c.values()), default=0.0)


def _scaled(clusters: Clusters, unit: float) -> Clusters:
    return {
        phase: {
            letter: {part: size / unit for part, size in bar.items()}
            for letter, bar in bars.items()
        }
        for phase, bars in clusters.items()
    }


def _role_and_component(row: Row) -> str:
    return " ".join(x for x in (row.role, row.component) if x) or "all"


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)
