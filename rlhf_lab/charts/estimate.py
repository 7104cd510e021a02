"""An estimate as tables and a picture: summary, memory and time by phase, what would be cheaper."""

from __future__ import annotations

from collections.abc import Sequence

from ..cost.caveats import of_main_memory
from ..cost.estimate import Estimate
from ..cost.remedies import Remedy, less_or_more
from ..cost.serving import tokens_per_pass
from ..display import escape, format_bytes, format_number, format_seconds, html_table, table
from .memory import memory_chart


def summary_row(e: Estimate) -> dict[str, str]:
    """One line of a plan: stage, memory, work, time and money."""
    s = e.setup
    return {
        "stage": s.stage,
        "memory/device": format_bytes(e.peak),
        "peak in": e.peak_phase.name,
        "fits": _in_room(e, "yes" if e.fits else _too_little(e)),
        "steps": format_number(e.steps),
        "FLOPs/step": format_number(e.flops, "FLOP"),
        "time/step": format_seconds(e.step_seconds),
        "time": format_number(None if e.hours is None else e.hours * 3600, "s"),
        "money": format_number(e.money, "USD"),
    }


def _in_room(e: Estimate, answer: str) -> str:
    """Whether it fits, with what it takes of main memory."""
    return ", ".join(filter(None, [answer, of_main_memory(e)]))


def _too_little(e: Estimate) -> str:
    has = f"{e.hardware.name} has {format_bytes(e.hardware.memory)}"
    if e.needed <= e.hardware.memory:
        return "no"  # of main memory, which is said behind it
    if e.peak > e.hardware.memory:
        return f"no: {has}"
    return f"no: may need {format_bytes(e.needed)}, {has}"


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
                "FLOPs/step": format_number(a.work.flops * a.times * a.devices, "FLOP"),
                "time/step": format_seconds(seconds.get((f.name, f.role), 0.0)),
            }
        )
    last = ("FLOPs/step", "time/step")
    columns = dict.fromkeys(c for row in rows for c in row if c not in last)
    return [{c: row.get(c, "") for c in (*columns, *last)} for row in rows]


def remedy_rows(remedies: Sequence[Remedy]) -> list[dict[str, str]]:
    """One line for each change."""
    return [
        {
            "change": r.does,
            "memory/device": format_bytes(r.estimate.peak),
            "memory": _saved(r.saves_bytes, "B"),
            "time": _saved(r.saves_hours, "s", 3600, "shorter", "longer"),
            "money": _saved(r.saves_money, "USD"),
            "fits": _in_room(r.estimate, "yes" if r.fits else "no"),
        }
        for r in remedies
    ]


LEAST = {"B": 2**19, "s": 0.5, "USD": 0.005}
"""What reads as no difference."""


def _saved(
    value: float | None, unit: str, scale: float = 1.0, less: str = "less", more: str = "more"
) -> str:
    """What is saved, in words: "39 GiB more", "2 h shorter"."""
    if value is None:
        return format_number(None)
    if abs(value) * scale < LEAST[unit]:
        return "the same"
    return less_or_more(value, format_number(abs(value) * scale, unit), less, more)


def serving_rows(e: Estimate) -> list[dict[str, str]]:
    """One line for each load of inference: from one request in flight to as many as fit, with the
    load that was asked for."""
    s, own = e.setup, e.serving
    loads = {4**i for i in range(6) if 4**i * s.replicas <= own.fits} | {own.fits // s.replicas}
    found = [(n, e.serving_at(n)) for n in loads - {0, s.batch}]
    found += [(own.in_flight / s.replicas, own)]
    return [
        {
            "in flight": format_number(round(x.in_flight, 1)) + " ←" * (x is own),
            "requests/s": format_number(x.requests_per_second),
            "waits": format_seconds(x.waiting),
            "prefill": format_seconds(x.prefill),
            "first token": format_seconds(x.first_token),
            "each further": format_seconds(x.per_token),
            "tokens/s": format_number(x.tokens_per_second),
            "USD/million": format_number(x.usd_per_million),
        }
        for _, x in sorted(found, key=lambda pair: pair[0])
    ]


def serving_note(e: Estimate) -> str:
    """What the load does, and what was assumed, as a line; "" for what is trained."""
    s = e.setup
    if s.stage != "inference":
        return ""
    own, format_ = e.serving, "" if s.weights_format == "none" else f", {s.weights_format}"
    cache = f"{s.kv_cache_dtype} keys and values, " if s.engine == "vllm" else ""
    cache += f"{tokens_per_pass(s):.3g} tokens a pass by a draft, " if s.draft else ""
    note = (
        f"{s.engine}, {s.dtype}{format_}, {cache}{s.replicas} × {s.tensor_parallel} devices: "
        f"{own.fits} requests of {s.prompt} + {s.response} tokens fit at once"
    )
    waiting = own.in_flight - own.fits if own.fits and own.most is None else 0
    return note if waiting <= 0 else f"{waiting:.0f} requests wait for others to end: {note}"


def _serving_tables(e: Estimate) -> list[list[dict[str, str]]]:
    return [serving_rows(e)] if e.setup.stage == "inference" else []


def text(e: Estimate) -> str:
    """The plan as text."""
    tables = [[summary_row(e)], phase_rows(e), *_serving_tables(e)]
    return "\n".join([*filter(None, [serving_note(e)]), *map(table, tables), _notes(e)])


def parts(e: Estimate) -> tuple[str, str, str]:
    """The plan as HTML and a picture: summary, memory, phases."""
    card = e.hardware.memory, f"memory of {e.hardware.name}"
    phases = "".join(map(html_table, [phase_rows(e), *_serving_tables(e)]))
    phases = f"{phases}<p>{escape(' '.join([serving_note(e), _notes(e)]))}</p>"
    return html_table([summary_row(e)]), memory_chart(e.ledger, [card]), phases


def _notes(e: Estimate) -> str:
    low, high = (format_bytes(e.peak * b) for b in e.memory_band)
    return f"predicted; memory {low} to {high}. Not modelled: {'; '.join(e.not_modelled)}."
