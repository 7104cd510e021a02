"""The bug zoo to look at: what each specimen's curves show beside healthy runs, and what it was.

lab.specimens()                  all of them: what is wrong, and what shows it first
lab.specimens(7)                 case 7 as a riddle: its curves, and not its name
lab.specimens("late_score")      the answer: curves, mechanism, where it was met, the cure
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .charts.chart import line_chart
from .charts.curves import METRICS
from .charts.frame import Picture, grid
from .display import Display, escape, html_table, table
from .exercises import specimens as zoo
from .stages import read_table

HEALTHY = "healthy"


@cache
def stored() -> dict[str, Any]:
    """`specimen_curves.json`: `runs` (which these are), `healthy` (by metric the low, middle and
    high end of the band, in each iteration), and by name in `specimens` what shows one `first`, in
    which `iteration`, on how many `seeds`, and its `curves`: by metric one a seed."""
    return dict(read_table(zoo.__file__, "specimen_curves.json"))


def chart(name: str, metric: str) -> Picture:
    """A metric of a specimen's runs, a curve for each seed, over the band of healthy ones."""
    low, middle, high = stored()["healthy"][metric]
    steps = list(range(1, len(middle) + 1))
    seeds = stored()["specimens"][name]["curves"][metric]
    curves = {f"seed {i}": (steps[: len(x)], x) for i, x in enumerate(seeds)}
    title, unit = METRICS.get(metric, (metric, ""))
    return line_chart(
        {HEALTHY: (steps, middle), **curves},
        title=title,
        x_label="iteration",
        y_label=unit or metric,
        band={HEALTHY: (steps, low, high)},
        height=220,
    )


def specimens(name: str | int | None = None) -> Display:
    """All specimens of the bug zoo as a table; with a number that case as a riddle, its curves over
    seeds beside the band of healthy runs; with a name the answer too: what shows it first and in
    which iteration, what is wrong, where it was met, and the cure. Raises ValueError for a name or
    number that there is not."""
    if name is None:
        rows = [
            {
                "specimen": x.name,
                "case": str(zoo.CASES.index(x.name) + 1),
                "what is wrong": x.mechanism,
                "seen first in": seen(x.name),
                "met in": x.wild,
            }
            for x in zoo.SPECIMENS.values()
        ]
        return Display(table(rows), html_table(rows))
    one = zoo.find(name)
    case = f"case {zoo.CASES.index(one.name) + 1}: {stored()['runs']}"
    text = case if isinstance(name, int) else f"{one}\nSeen first in: {seen(one.name)}\n{case}"
    charts = [
        chart(one.name, metric) for metric in sorted(stored()["specimens"][one.name]["curves"])
    ]
    return Display(text, f'<pre style="white-space:pre-wrap">{escape(text)}</pre>', grid(charts))


def seen(name: str) -> str:
    """What shows a specimen first, when, and on how many of its seeds."""
    one = stored()["specimens"][name]
    if one["first"] is None:
        return f"nothing that was logged ({one['seeds']} seeds)"
    return f"{one['first']}, iteration {one['iteration']}, on {one['seeds']} seeds"
