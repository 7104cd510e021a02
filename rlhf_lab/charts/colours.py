"""The one table of colours: what a role, a phase or a component looks like in every chart.

A chart's colours mean one of the three, which its legend says. A phase that is one model's own pass
has its role's; else no two kinds share one: charts stand beside each other. Roles and most phases:
Okabe and Ito's palette; components: after Tol's "muted" scheme.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..stages import read_table

NEUTRAL = "#9A9A9A"
"""What belongs to none: "all", "other"."""

COLOURS_OF: Mapping[str, Mapping[str, str]] = read_table(__file__)


def part_colour(kind: str, part: str) -> str:
    """The colour of a role, a phase or a component (`kind`), under its name or in words."""
    return COLOURS_OF[kind].get(part.replace(" ", "_"), NEUTRAL)
