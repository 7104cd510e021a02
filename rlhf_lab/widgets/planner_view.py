"""An estimate as the planner shows it: a verdict, two pictures, figures, and what to change."""

from __future__ import annotations

from ..charts.chart import bar_chart
from ..charts.frame import Picture
from ..charts.memory import axis_unit
from ..cost.estimate import TIME_BAND, Estimate
from ..cost.phases import Phase
from ..cost.remedies import Remedy
from ..display import format_bytes, format_number, format_seconds
from ..runs.ledger import COMPONENTS, ROLES
from ..stages import STAGES
from .planner_options import Values

WIDTH, MEMORY_HEIGHT, TIME_HEIGHT = 560, 250, 200
SMALLEST_BLOCK = 1e-3
"""Share of the peak below which a block is not drawn."""
TIME_UNITS = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def verdict(e: Estimate) -> tuple[str, str]:
    """→ ("yes", "perhaps" or "no", a sentence): whether it fits, by how much, and what the peak is
    made of."""
    room, high, peak = e.hardware.memory, e.peak * e.memory_band[1], e.peak_phase
    if e.fits:
        state, word = "yes", f"Fits: {format_bytes(room - high)} to spare."
    elif e.peak <= room:
        state = "perhaps"
        word = f"May not fit: {format_bytes(high - room)} short at the upper end of the band."
    else:
        state, word = "no", f"Does not fit: {format_bytes(e.peak - room)} too much."
    card = f"{e.hardware.name} of {format_bytes(room)}"
    device = f"each {card}" if e.setup.gpus > 1 else f"one {card}"
    return state, (
        f"{word} The peak is {format_bytes(e.peak)} on {device}, in {phase_words(peak.name)}; "
        f"{_largest(peak)}."
    )


def phase_words(phase: str) -> str:
    """A phase's name as the verdict writes it."""
    return {
        "old_logprobs": "scoring (old log-probs)",
        "reference": "scoring (reference)",
        "value": "scoring (values)",
        "score": "scoring (reward)",
        "rollout": "the rollout",
        "optimizer": "the optimizer's step",
        "forward": "the forward pass",
        "backward": "the backward pass",
    }.get(phase, phase)


def _largest(peak: Phase) -> str:
    """Which role holds most at the peak, and most of what."""
    roles: dict[str, float] = {}
    for (role, _), size in peak.bytes.items():
        roles[role] = roles.get(role, 0.0) + size
    role = max(roles, key=roles.__getitem__)
    parts = {c: size for (r, c), size in peak.bytes.items() if r == role}
    part = max(parts, key=parts.__getitem__)
    who = f"the {role} holds most" if len(roles) > 1 else "it is"
    return (
        f"{who} ({format_bytes(roles[role])}), {format_bytes(parts[part])} of it "
        f"{part.replace('_', ' ')}"
    )


def memory_picture(e: Estimate) -> Picture:
    """Bytes of one device against its memory, a colour for each component. Several roles: at the
    peak, together and one by one; a single one: phase by phase."""
    peak, room = e.peak_phase, e.hardware.memory
    name, unit = axis_unit(e.peak)
    bars: dict[str, list[tuple[str, float]]] = {}
    if len({role for role, _ in peak.bytes}) > 1:
        title = f"Memory of one device at the peak ({peak.name})"
        for (role, part), size in peak.bytes.items():
            for bar in ("together", role or "all"):
                bars.setdefault(bar, []).append((part, size))
    else:
        title = "Memory of one device by phase"
        bars = {f.name: [(part, size) for (_, part), size in f.bytes.items()] for f in e.phases}
    stacks: dict[str, dict[str, float]] = {}
    for bar, parts in bars.items():
        stack = stacks.setdefault(bar, {})
        for component in COMPONENTS:
            size = sum(size for part, size in parts if part == component)
            if size > SMALLEST_BLOCK * e.peak:
                stack[component] = size / unit
    near = room < 3 * e.peak  # a line far above would press the bars flat
    card = f"{e.hardware.name}: {format_bytes(room)}"
    return bar_chart(
        stacks,
        title=title,
        y_label=name,
        references=[(room / unit, card)] if near else [],
        legend={c: c.replace("_", " ") for c in COMPONENTS},
        width=WIDTH,
        height=MEMORY_HEIGHT,
    )


def no_plan_picture() -> Picture:
    """What stands there before there is a plan."""
    return bar_chart({}, title="Memory of one device", y_label="GiB", width=WIDTH, height=120)


def time_picture(e: Estimate) -> Picture:
    """Seconds of a step by phase; a colour for each role."""
    totals: dict[str, float] = {}
    for (phase, _), seconds in e.seconds_of.items():
        totals[phase] = totals.get(phase, 0.0) + seconds
    longest = max(totals.values())
    scale, unit = next((s for s in TIME_UNITS if longest >= s[0]), TIME_UNITS[-1])
    stacks: dict[str, dict[str, float]] = {phase: {} for phase in totals}
    for (phase, role), seconds in e.seconds_of.items():
        stacks[phase][role or "all"] = seconds / scale
    legend = {role: role for role in ROLES}
    return bar_chart(
        stacks,
        title=f"Time of {_a_step(e)} by phase: {format_seconds(e.step_seconds)}",
        y_label=unit,
        legend=legend,
        width=WIDTH,
        height=TIME_HEIGHT,
    )


def _a_step(e: Estimate) -> str:
    return "an iteration" if STAGES[e.setup.stage].online else "a step"


def figures(e: Estimate) -> list[dict[str, str]]:
    """The few lines of the table: what, how much, and within what band."""
    low, high = TIME_BAND[e.hardware.kind]
    steps, hours, money = e.steps, e.hours, e.money
    run = None if hours is None else hours * 3600
    name = "iterations" if STAGES[e.setup.stage].iterates else "steps"

    def row(
        name: str, value: float | None, unit: str, band: tuple[float, float] | None = None
    ) -> dict[str, str]:
        ends = [] if band is None or value is None else [value * b for b in band]
        band_text = " – ".join(format_number(end, unit) for end in ends)
        return {"": name, "predicted": format_number(value, unit), "band": band_text}

    flops = None if steps is None else e.flops * steps * e.setup.replicas
    return [
        row("memory of one device", e.peak, "B", e.memory_band),
        row(f"time of {_a_step(e)}", e.step_seconds, "s", (low, high)),
        row(f"time of {format_number(steps)} {name}", run, "s", (low, high)),
        row("arithmetic", flops, "FLOP"),
        row(f"money ({_price(e)})", money, "USD", (low, high)),
    ]


def _price(e: Estimate) -> str:
    """What the money is reckoned from."""
    if e.hardware.price is None:
        return "no price known"
    hours = "" if e.gpu_hours is None else f"{e.gpu_hours:,.3g} device-hours, "
    return f"{hours}{format_number(e.hardware.price, 'USD')}/h"


def remedy_text(remedy: Remedy) -> str:
    """What a change does, on its button."""
    parts = [f"{format_bytes(remedy.estimate.peak)}{'' if remedy.fits else ', still too much'}"]
    seconds = None if remedy.saves_hours is None else remedy.saves_hours * 3600
    for value, unit in ((seconds, "s"), (remedy.saves_money, "USD")):
        if value and format_number(abs(value), unit) not in ("0 s", "$0.00"):
            sign = "−" if value > 0 else "+"
            parts.append(f"{sign}{format_number(abs(value), unit)}")
    return f"{remedy.does} → {', '.join(parts)}"


def settings_text(settings: Values) -> str:
    """Settings as one would write them."""
    return ", ".join(f"{k}={v!r}" for k, v in settings.items())
