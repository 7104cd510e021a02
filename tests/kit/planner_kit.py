"""A planner without a page: its controls moved as by hand, its pictures read back."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import rlhf_lab as lab
from rlhf_lab.widgets.planner import Planner

SVG = "{http://www.w3.org/2000/svg}"
GIB = 2**30


class QuickPlanner(Planner):
    """Without the changes that would be cheaper, which take longer than all the rest."""

    def cheaper(self):
        return []


def open_planner(**state) -> Planner:
    return Planner(lab.plan, **state)


def open_quick_planner(**state) -> Planner:
    return QuickPlanner(lab.plan, **state)


def move(planner: Planner, name: str, value) -> None:
    """What a hand does: the page sets the value, and the widget gets it."""
    planner.controls.widgets[name].value = value


def visible_controls(planner: Planner) -> set[str]:
    return {
        name for name, widget in planner.controls.widgets.items() if widget.layout.display != "none"
    }


def blocks(svg: str) -> dict[str, float]:
    """{"bar, component": value} as the tooltips of a picture read."""
    titles = [
        r.find(f"{SVG}title").text
        for r in ET.fromstring(svg).iter(f"{SVG}rect")
        if r.get("class") == "block"
    ]
    return {t.rsplit(": ", 1)[0]: float(t.rsplit(": ", 1)[1].replace(",", "")) for t in titles}
