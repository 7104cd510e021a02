"""Memory of each phase as a picture: by component and role, from one source or several."""

from __future__ import annotations

from collections.abc import Sequence

from ..runs.ledger import COMPONENTS, SOURCES, Ledger, Row
from .chart import Reference, cluster_chart
from .frame import Picture

MIB, GIB = 2**20, 2**30


def memory_chart(ledger: Ledger, references: Sequence[Reference] = ()) -> Picture:
    """Bars by phase, a colour for each component, in it a block for each role.

    Where the ledger has several sources, each has a bar of its own: P predicted, S simulated,
    M measured. `references`: (bytes, label); one that would press the bars flat is left out.
    """
    rows = ledger.filter(quantity="bytes")
    sources = [source for source in SOURCES if any(row.source == source for row in rows)]
    legend = {component: component for component in COMPONENTS}
    clusters: dict[str, dict[str, dict[str, float]]] = {}
    for phase in dict.fromkeys(row.phase for row in rows):
        for source in sources:
            parts = _parts([row for row in rows if (row.phase, row.source) == (phase, source)])
            legend |= {name: component for name, (component, _) in parts.items()}
            tag = source[0].upper() if len(sources) > 1 else ""
            if parts:
                sizes = {name: size for name, (_, size) in parts.items()}
                clusters.setdefault(phase or "all", {})[tag] = sizes
    bars = [bar for tags in clusters.values() for bar in tags.values()]
    top = max((sum(bar.values()) for bar in bars), default=0.0)
    name, unit = axis_unit(top)
    for bar in bars:
        bar.update({part: size / unit for part, size in bar.items()})
    letters = ", ".join(f"{s[0].upper()} {s}" if len(sources) > 1 else s for s in sources)
    return cluster_chart(
        clusters,
        title=f"Memory at each phase's peak: {letters}",
        y_label=name,
        legend=legend,
        references=[(y / unit, label) for y, label in references if y < 3 * top],
        width=max(460, (44 + 26 * len(sources)) * len(clusters)),
    )


def axis_unit(top: float) -> tuple[str, int]:
    """The unit in which an axis up to `top` bytes reads well, and its size."""
    return ("GiB", GIB) if top >= GIB else ("MiB", MIB)


def _parts(rows: Sequence[Row]) -> dict[str, tuple[str, float]]:
    """→ {role and component: (component, bytes)}, components in the order of the ledger's."""
    parts: dict[str, tuple[str, float]] = {}
    for row in sorted(rows, key=lambda row: _place(row.component)):
        name = " ".join(x for x in (row.role, row.component) if x) or "all"
        _, size = parts.get(name, ("", 0.0))
        parts[name] = row.component or "all", size + row.value
    return parts


def _place(component: str) -> int:
    return COMPONENTS.index(component) if component in COMPONENTS else len(COMPONENTS)
