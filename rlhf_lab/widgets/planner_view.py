"""An estimate as the planner shows it: a verdict, two pictures, figures, and what to change."""

from __future__ import annotations

from ..charts.chart import bar_chart
from ..charts.frame import Picture
from ..charts.memory import axis_unit
from ..cost.caveats import of_main_memory
from ..cost.estimate import Estimate
from ..cost.hardware import CATALOGUE, Hardware
from ..cost.phases import Phase
from ..cost.remedies import Remedy
from ..display import format_bytes, format_number, format_seconds
from ..runs.ledger import COMPONENTS, ROLES
from ..stages import STAGES, Settings
from .planner_controls import model_name

WIDTH, MEMORY_HEIGHT, TIME_HEIGHT = 560, 250, 200
SMALLEST_BLOCK = 1e-3
"""Share of the peak below which a block is not drawn."""
PHASE_WORDS = {
    "old_logprobs": "scoring (old log-probs)",
    "reference": "scoring (reference)",
    "value": "scoring (values)",
    "score": "scoring (reward)",
    "rollout": "the rollout",
    "optimizer": "the optimizer's step",
    "forward": "the forward pass",
    "backward": "the backward pass",
}
TIME_UNITS = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def verdict(e: Estimate) -> tuple[str, str]:
    """→ ("yes", "perhaps" or "no", a sentence): whether it fits, by how much, and what the peak is
    made of."""
    room, high, peak, peak_bytes = e.hardware.memory, e.needed, e.peak_phase, e.peak
    if high <= room:
        left, least = format_bytes(room - peak_bytes), format_bytes(room - high)
        band = f" ({least} at the upper end of the band)" * (least != left)
        state, word = "yes", f"Fits: {left} to spare{band}."
    elif peak_bytes <= room:
        state = "perhaps"
        word = f"May not fit: {format_bytes(high - room)} short where the plan is too low."
    else:
        state, word = "no", f"Does not fit: {format_bytes(peak_bytes - room)} too much."
    if main := of_main_memory(e):
        state, word = ("yes" if e.fits else "no" if high <= room else state), f"{word} It {main}."
    card = f"{e.hardware.name} of {format_bytes(room)}"
    device = f"each {card}" if e.setup.gpus > 1 else f"one {card}"
    return state, (
        f"{word} The peak is {format_bytes(peak_bytes)} on {device}, in "
        f"{PHASE_WORDS.get(peak.name, peak.name)}; {_largest(peak)}."
    )


def _largest(peak: Phase) -> str:
    """Which role holds most at the peak, and most of what."""
    roles = {role: _components(peak, role) for role, _ in peak.bytes}
    role = max(roles, key=lambda r: sum(roles[r].values()))
    parts = roles[role]
    part = max(parts, key=parts.__getitem__)
    who = f"the {role} holds most" if len(roles) > 1 else "it is"
    return (
        f"{who} ({format_bytes(sum(parts.values()))}), {format_bytes(parts[part])} of it "
        f"{part.replace('_', ' ')}"
    )


def _components(phase: Phase, role: str | None = None) -> dict[str, float]:
    """Bytes by component: of one role, or of all together."""
    sizes = dict.fromkeys(COMPONENTS, 0.0)
    for (owner, component), size in phase.bytes.items():
        if role in (None, owner):
            sizes[component] += size
    return sizes


def memory_picture(e: Estimate, width: int = WIDTH) -> Picture:
    """Bytes of one device against its memory, a colour for each component. Several roles: at the
    peak, together and one by one; a single one: phase by phase."""
    peak, room = e.peak_phase, e.hardware.memory
    name, unit = axis_unit(e.peak)
    if len({role for role, _ in peak.bytes}) > 1:
        title = f"Memory of one device at the peak ({peak.name})"
        bars = {"together": _components(peak)}
        bars |= {role or "all": _components(peak, role) for role, _ in peak.bytes}
    else:
        title = "Memory of one device by phase"
        bars = {f.name: _components(f) for f in e.phases}
    stacks = {
        bar: {c: size / unit for c, size in sizes.items() if size > SMALLEST_BLOCK * e.peak}
        for bar, sizes in bars.items()
    }
    near = room < 3 * e.peak  # a line far above would press the bars flat
    card = f"{e.hardware.name}: {format_bytes(room)}"
    return bar_chart(
        stacks,
        title=title,
        y_label=name,
        references=[(room / unit, card)] if near else [],
        legend={c: c.replace("_", " ") for c in COMPONENTS},
        kind="component",
        width=width,
        height=MEMORY_HEIGHT,
    )


def no_plan_picture() -> Picture:
    """What stands there before there is a plan."""
    return bar_chart({}, title="Memory of one device", y_label="GiB", width=WIDTH, height=120)


def time_picture(e: Estimate, width: int = WIDTH) -> Picture:
    """Seconds of a step by phase; a colour for each role."""
    stacks: dict[str, dict[str, float]] = {}
    for (phase, role), seconds in e.seconds_of.items():
        stacks.setdefault(phase, {})[role or "all"] = seconds
    longest = max(sum(bar.values()) for bar in stacks.values())
    scale, unit = next((s for s in TIME_UNITS if longest >= s[0]), TIME_UNITS[-1])
    return bar_chart(
        {phase: {k: t / scale for k, t in bar.items()} for phase, bar in stacks.items()},
        title=f"Time of {_a_step(e)} by phase: {format_seconds(e.step_seconds)}",
        y_label=unit,
        legend={role: role for role in ROLES},
        kind="role",
        width=width,
        height=TIME_HEIGHT,
    )


def _a_step(e: Estimate) -> str:
    return "an iteration" if STAGES[e.setup.stage].online else "a step"


def figures(e: Estimate) -> list[dict[str, str]]:
    """The few lines of the table: what, how much, and within what band."""
    whole, steps = e.hours_band, e.steps
    run = None if e.hours is None else e.hours * 3600
    name = "iterations" if STAGES[e.setup.stage].iterates else "steps"

    def row(
        name: str, value: float | None, unit: str, band: tuple[float, ...] = ()
    ) -> dict[str, str]:
        ends = [format_number(value * b, unit) for b in band] if value is not None else []
        return {"": name, "predicted": format_number(value, unit), "band": " – ".join(ends)}

    flops = None if steps is None else e.flops * steps * e.setup.replicas
    return [
        row("memory of one device", e.peak, "B", e.memory_band),
        row(f"time of {_a_step(e)}", e.step_seconds, "s", e.time_band),
        row(f"time of {format_number(steps)} {name}", run, "s", whole),
        row(f"arithmetic of {format_number(steps)} {name}", flops, "FLOP"),
        row(f"money ({_price(e)})", e.money, "USD", whole),
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
    parts += filter(None, [of_main_memory(remedy.estimate)])
    seconds = None if remedy.saves_hours is None else remedy.saves_hours * 3600
    for value, unit in ((seconds, "s"), (remedy.saves_money, "USD")):
        if value and format_number(abs(value), unit) not in ("0 s", "$0.00"):
            sign = "−" if value > 0 else "+"
            parts.append(f"{sign}{format_number(abs(value), unit)}")
    return f"{remedy.does} → {', '.join(parts)}"


def settings_text(settings: Settings) -> str:
    """Settings as one would write them."""
    return ", ".join(f"{k}={v!r}" for k, v in settings.items())


def call(settings: Settings) -> str:
    """The line of Python that makes this plan."""
    first = [_literal(settings["stage"]), _literal(model_name(settings["model"]))]
    named = {**settings, **getattr(settings["model"], "others", {})}
    rest = [f"{k}={_literal(v)}" for k, v in named.items() if k not in ("stage", "model")]
    return f"lab.plan({', '.join(first + rest)})"


def _literal(value: object) -> str:
    """A value as Python; a device as the catalogue's with figures of one's own."""
    if not isinstance(value, Hardware):
        plain = isinstance(value, str) and not set(repr(value)[1:-1]) & set("\"'\\")
        return f'"{value}"' if plain else repr(value)
    for key, known in sorted(CATALOGUE.items(), key=lambda item: item[1].name != value.name):
        figures = known.to_dict()
        own = {name: figure for name, figure in value.to_dict().items() if figure != figures[name]}
        if known.with_(**own) == value:
            changes = "".join(f", {k}={v!r}" for k, v in own.items())
            return f'lab.hardware("{key}"{changes})'
    return _literal(value.name)
