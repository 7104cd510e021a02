"""An estimate as tables and a picture: summary, memory and time by phase, what would be cheaper."""

from __future__ import annotations

from collections.abc import Sequence

from ..cost.estimate import Estimate
from ..cost.remedies import Remedy
from ..display import escape, format_bytes, format_number, format_seconds, html_table, table
from .memory import memory_chart


def summary_row(e: Estimate) -> dict[str, str]:
    """One line of a plan: stage, memory, work, time and money."""
    s = e.setup
    return {
        "stage": s.stage,
        "memory/device": format_bytes(e.peak),
        "peak in": e.peak_phase.name,
        "fits": "yes" if e.fits else f"no: {e.hardware.name} has {format_bytes(e.hardware.memory)}",
        "steps": format_number(e.steps),
        "FLOPs/step": format_number(e.flops, "FLOP"),
        "time/step": format_seconds(e.step_seconds),
        "time": format_number(None if e.hours is None else e.hours * 3600, "s"),
        "money": format_number(e.money, "USD"),
    }


def phase_rows(e: Estimate) -> list[dict[str, str]]:
    """One line for each phase: bytes in memory, FLOPs and seconds of a step."""
    seconds = e.seconds_of
    rows = []
    for f, a in zip(e.phases, e.average, strict=True):
        parts: dict[str, float] = {}
        for (_, component), size in f.bytes.items():
            parts[component] = parts.get(component, 0.0) + size
        rows.append(
            {
                "phase": f.name,
                "role": f.role,
                "memory": format_bytes(f.total),
                **{c: format_bytes(v) for c, v in parts.items()},
                "FLOPs": format_number(a.work.flops * a.times, "FLOP"),
                "time": format_seconds(seconds.get((f.name, f.role), 0.0)),
            }
        )
    columns = dict.fromkeys(c for row in rows for c in row if c not in ("FLOPs", "time"))
    return [{c: row.get(c, "") for c in (*columns, "FLOPs", "time")} for row in rows]


def remedy_rows(remedies: Sequence[Remedy]) -> list[dict[str, str]]:
    """One line for each change."""
    return [
        {
            "change": r.does,
            "memory/device": format_bytes(r.estimate.peak),
            "saves": _signed(r.saves_bytes, "B"),
            "time saved": _signed(None if r.saves_hours is None else r.saves_hours * 3600, "s"),
            "money saved": _signed(r.saves_money, "USD"),
            "fits": "yes" if r.fits else "no",
        }
        for r in remedies
    ]


def _signed(value: float | None, unit: str) -> str:
    if value is None:
        return format_number(None)
    return ("−" if value < 0 else "") + format_number(abs(value), unit)


def text(e: Estimate) -> str:
    """The plan as text."""
    return f"{table([summary_row(e)])}\n{table(phase_rows(e))}\n{_notes(e)}"


def parts(e: Estimate) -> tuple[str, str, str]:
    """The plan as HTML and a picture: summary, memory, phases."""
    card = e.hardware.memory, f"memory of {e.hardware.name}"
    phases = f"{html_table(phase_rows(e))}<p>{escape(_notes(e))}</p>"
    return html_table([summary_row(e)]), memory_chart(e.ledger, [card]), phases


def _notes(e: Estimate) -> str:
    low, high = (format_bytes(e.peak * b) for b in e.memory_band)
    return f"predicted; memory {low} to {high}. Not modelled: {'; '.join(e.not_modelled)}."
