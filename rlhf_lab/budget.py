"""A whole project: its stages on their devices, labels, failed runs, energy, storage; and a budget.

    lab.project("Llama-3.2-1B", hardware="a100", rows=50_000, labels=50_000, budget=20_000)

Each input beside the plans has a default with its source (`budget.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .cost.device import is_finite
from .cost.estimate import Estimate
from .cost.hardware import Hardware, in_catalogue
from .display import Display, escape, format_bytes, format_number, html_table, table
from .models.load import Model, load
from .planning import plan as make_plan
from .runs.ledger import Ledger
from .settings import check_names, own_settings
from .stages import read_table

if TYPE_CHECKING:
    from .stages import Setting, Settings

INPUTS: dict[str, dict[str, Setting]] = read_table(__file__)
"""Inputs by name: value and source."""
WATTS: Mapping[str, Setting] = INPUTS.pop("devices")


class Cost(NamedTuple):
    """A line of the bill; `usd` is None where it is not known."""

    name: str
    of: str
    usd: float | None
    source: str = "planned"


@dataclass(repr=False)
class Project(Display):
    """The whole project: a plan of each stage, and what all of it costs. Stages that do not fit in
    memory cannot be run: they are in no sum. `yours`: inputs in place of the defaults."""

    stages: dict[str, Estimate]
    yours: dict[str, float] = field(default_factory=dict)
    budget: float | None = None
    warnings: Sequence[str] = ()
    """What is not as it looks in the plans of its stages (`Plan.warnings`)."""

    def __post_init__(self) -> None:
        tables = self.rows, self.bill
        super().__init__(
            "\n".join([*self.warnings, self.verdict, *map(table, tables)]),
            *(f"<p>{escape(line)}</p>" for line in [*self.warnings, self.verdict]),
            *map(html_table, tables),
        )

    def _input(self, name: str) -> float:
        return float(self.yours.get(name, INPUTS[name]["value"]) or 0)

    def _line(self, name: str, of: str, usd: float | None, *inputs: str) -> Cost:
        """A line of the bill, with the sources of its inputs."""
        sources = ("yours" if i in self.yours else INPUTS[i]["source"] for i in inputs)
        return Cost(name, of, usd, "; ".join(sources))

    @property
    def fitting(self) -> dict[str, Estimate]:
        """Stages that fit in their devices' memory."""
        return {name: e for name, e in self.stages.items() if e.fits}

    @property
    def hours(self) -> float | None:
        """Of the stages that fit, one after the other."""
        return _sum(e.hours for e in self.fitting.values())

    @property
    def money(self) -> float | None:
        """USD for the devices of the stages that fit."""
        return _sum(e.money for e in self.fitting.values())

    @property
    def kwh(self) -> float | None:
        """Energy of the devices, failed runs and the data centre's share (PUE) with it; None where
        a device's power is not known."""
        energy: list[float | None] = []
        for e in self.fitting.values():
            watts = self._input("watts") or WATTS.get(in_catalogue(e.hardware.name) or "")
            energy.append(e.gpu_hours * watts / 1000 if e.gpu_hours and watts else None)
        once = _sum(energy)
        return (
            None if once is None else once * (1 + self._input("failed_runs")) * self._input("pue")
        )

    @property
    def stored(self) -> float:
        """Bytes of a checkpoint of what each stage trains."""
        total = 0.0
        for s in (e.setup for e in self.fitting.values()):
            if s.lora_r:
                adapters = s.model.lora_parameters(s.lora_r, s.lora_targets, dora=s.use_dora)
                total += adapters * s.adapter_bytes_per_weight
            else:
                total += s.model.parameters() * s.bytes_per_weight
        return total

    @property
    def costs(self) -> list[Cost]:
        """The bill, line by line."""
        share, labels, price = map(self._input, ("failed_runs", "labels", "label_price"))
        power, months = self._input("electricity_price"), self._input("storage_months")
        money, kwh, number = self.money, self.kwh, format_number
        reserve = None if money is None else money * share
        energy = 0.0 if not power else None if kwh is None else kwh * power
        stored = self.stored / 1e9 * months * self._input("storage_price")
        kept = f"{format_bytes(self.stored)} for {number(months)} month{'s' * (months != 1)}"
        again = f"{number(100 * share)} % of the devices' cost"
        bought = f"{number(labels)} at {number(price)} USD"
        used = f"{number(kwh)} kWh at {number(power)} USD"
        stages = self.fitting.items()
        return [
            *(Cost(n, f"{number(e.gpu_hours)} device-hours", e.money) for n, e in stages),
            self._line("failed runs", again, reserve, "failed_runs"),
            self._line("labels", bought, labels * price, "labels", "label_price"),
            self._line("energy", used, energy, "watts", "pue", "electricity_price"),
            self._line("storage", kept, stored, "storage_price", "storage_months"),
        ]

    @property
    def total(self) -> float | None:
        """USD for everything; None where a part is not known."""
        return _sum(cost.usd for cost in self.costs)

    @property
    def verdict(self) -> str:
        """What fits and what does not, and by how much: the first line."""
        words = [
            f"{name} does not fit in memory ({format_bytes(e.peak)} of "
            f"{format_bytes(e.hardware.memory)}) and is not in the total"
            for name, e in self.stages.items()
            if not e.fits
        ]
        if self.total is None:
            unknown = ", ".join(c.name for c in self.costs if c.usd is None)
            why = f"rows or a price are missing for {unknown}" if self.fitting else "no stage fits"
            return "; ".join([*words, f"no total: {why}"])
        words.append(f"{format_number(self.total, 'USD')} in all")
        if self.budget is not None:
            off, money = abs(self.total - self.budget), format_number(self.budget, "USD")
            over = self.total > self.budget
            words.append(f"{'over' if over else 'within'} the budget of {money}")
            words.append(f"{format_number(off, 'USD')} {'too much' if over else 'left'}")
        return "; ".join(words)

    @property
    def bill(self) -> list[dict[str, str]]:
        """One line for each cost; with a budget, what is left when they are paid in turn."""
        rows, paid = [], 0.0
        for cost in [*self.costs, Cost("all", "", self.total, "")]:
            paid += (cost.usd or 0.0) * (cost.name != "all")
            row = {"cost": cost.name, "of": cost.of, "USD": format_number(cost.usd)}
            if self.budget is not None:
                left = self.budget - paid
                row["fits"] = "–" if cost.usd is None else "yes" if left >= 0 else "no"
                row["left"] = "−" * (left < 0) + format_number(abs(left))
            rows.append({**row, "source": cost.source})
        return rows

    def report(self, path: str | Path = "project.html") -> Path:
        """Write the project as one page of HTML that needs nothing else: the verdict, the stages,
        the bill with its sources, memory of each stage. → where it is."""
        from .charts.memory import peaks
        from .charts.report import write_page

        parts = [f"<p>{escape(line)}</p>" for line in [self.verdict, *self.warnings]]
        for title, rows in (("Stages (predicted)", self.rows), ("The bill", self.bill)):
            parts += [f"<h2>{title}</h2>", f'<div class="scroll">{html_table(rows)}</div>']
        parts.append(f'<div class="grid"><figure>{peaks(self.stages)}</figure></div>')
        return write_page(path, "What the project costs", parts)

    @property
    def ledger(self) -> Ledger:
        """Rows of all stages; of those that do not fit, memory alone."""
        rows = ((row, e.fits) for e in self.stages.values() for row in e.ledger)
        return Ledger(row for row, fits in rows if fits or row.quantity == "bytes")

    @property
    def rows(self) -> list[dict[str, str]]:
        """One line for each stage, and their sum."""
        from .charts.estimate import summary_row

        seconds = None if self.hours is None else self.hours * 3600
        total = {
            "stage": "all" if len(self.fitting) == len(self.stages) else "all that fit",
            "time": format_number(seconds, "s"),
            "money": format_number(self.money, "USD"),
        }
        return [*(summary_row(e) for e in self.stages.values()), total]


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one is not known, or there is none."""
    every = list(values)
    known = [v for v in every if v is not None]
    return math.fsum(known) if known and len(known) == len(every) else None


def project(
    model: str | Path | Model = "tiny",
    *,
    hardware: Hardware | str = "here",
    stages: Sequence[str] = ("sft", "reward", "ppo"),
    each: Mapping[str, Settings] | None = None,
    budget: float | None = None,
    **settings: Setting,
) -> Project:
    """Plan several stages of one model: settings for all of them, and `each` stage's own.

    `budget`: USD to plan against. Of `settings` those of `INPUTS` (labels, label_price,
    failed_runs, watts, pue, electricity_price, storage_price, storage_months) are the project's.
    Raises ValueError, one line, for a number below 0 and for what a stage cannot be.
    """
    yours = {name: settings.pop(name) for name in INPUTS if name in settings}
    for name, value in (yours if budget is None else {**yours, "budget": budget}).items():
        if not is_finite(value) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    for stage in each or {}:
        if stage not in stages:
            raise ValueError(f"each={stage!r}: planned are {', '.join(stages)}")
    check_names(settings, *stages)
    handle, plans = load(model), {}
    for stage in stages:
        own = {**own_settings(stage, settings), **(each or {}).get(stage, {})}
        plans[stage] = make_plan(stage, handle, hardware=hardware, **own)
    warnings = dict.fromkeys(line for plan in plans.values() for line in plan.warnings)
    estimates = {stage: plan.estimate for stage, plan in plans.items()}
    return Project(estimates, yours, budget, tuple(warnings))
