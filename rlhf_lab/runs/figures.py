"""The figures of a run as tables: what each means, its span, what training changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..display import format_bytes, format_seconds
from ..stages import read_table
from .json_files import JsonObject

if TYPE_CHECKING:
    from .run import Run

_TABLE = read_table(__file__, "glosses.yaml")
GLOSSES: dict[str, str] = {name: text for k, text in _TABLE.items() for name in k.split(", ")}
"""What a metric means, in a line."""
_FAMILIES = {
    **{"before/": "before training: ", "eval_": "on held-out data: "},
    **{"teacher/": "of the teacher: "},
    **{"gold/": "a part of the gold reward, 0 to 1: ", "rewards/": "one of the rewards added up: "},
}


class Unfinished(JsonObject):
    """The figures of a run that did not go to its end."""

    def __init__(self, figures: JsonObject, status: str) -> None:
        super().__init__(figures)
        self._status = status

    def __missing__(self, name: str) -> object:
        end = "held-out figures are those of a run that went to its end: train it again, to the end"
        raise KeyError(f"no {name} of a run that is {self._status}; {end}")


def gloss(name: str) -> str:
    """What a metric or figure means, in a line; "" for one that the lab does not know."""
    for start, words in _FAMILIES.items():
        if name.startswith(start):
            rest = name.removeprefix(start)
            return words + (gloss(rest) or rest)
    return GLOSSES.get(name, "")


def spans(run: Run) -> list[dict[str, object]]:
    """Every metric of a run: first, last, lowest, highest value, and what it means."""
    rows = []
    for name in run.metric_names:
        real = [v for v in run.series(name)[1] if math.isfinite(v)]
        ends = (real[0], real[-1], min(real), max(real)) if real else (math.nan,) * 4
        values = dict(zip(("first", "last", "lowest", "highest"), ends))
        rows.append({"metric": name, **values, "what it means": gloss(name)})
    return rows


def changes(summary: Mapping[str, object]) -> list[dict[str, object]]:
    """What a summary knows from before training and from after it."""
    return [
        {"held-out": name, "before": summary[f"before/{name}"], "after": after}
        for name, after in summary.items()
        if summary.get(f"before/{name}") is not None
    ]


def facts(summary: JsonObject) -> list[dict[str, object]]:
    """The rest of a summary, seconds and bytes in words."""
    words = {"seconds": format_seconds}
    words |= {f"{what}_peak_bytes": format_bytes for what in ("tensor", "process")}
    rest = [n for n in summary if not n.startswith("before/") and f"before/{n}" not in summary]
    return [{"summary": n, "value": words.get(n, _fact)(summary[n])} for n in rest]


def with_meanings(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows of `changes` or `facts`, each with what its figure means."""
    return [{**row, "what it means": gloss(str(next(iter(row.values()))))} for row in rows]


def _fact(value: object) -> object:
    if isinstance(value, Mapping):  # rows dropped, by reason
        return ", ".join(f"{name}: {_fact(part)}" for name, part in value.items())
    return value if isinstance(value, (int, float, str)) or value is None else json.dumps(value)
