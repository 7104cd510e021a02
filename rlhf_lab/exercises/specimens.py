"""The bug zoo: PPO runs with one thing wrong, by name, to see what shows it.

    lab.train(lab.plan("ppo"), specimen="late_score")  a run that is sick, and says so in run.json

`specimens.yaml` is the table; a specimen is a trainer of `sick_trainers.py`, or settings. `zoo.py`
shows them, with the curves of `specimen_curves.json` (`benchmarks/bug_zoo.py --learn`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from zlib import crc32

from ..display import did_you_mean
from ..stages import Setting, read_table

if TYPE_CHECKING:
    from ..planning import Plan
    from ..ppo.trainer import PPOTrainer


@dataclass(frozen=True)
class Specimen:
    """One entry of `specimens.yaml`."""

    name: str
    mechanism: str
    """what goes wrong, in a sentence"""
    wild: str
    """where it was met: repository, kind and number of a thread"""
    fix: str
    rule: int = 0
    """of `ppo/RULES.md`; 0: none of them"""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """settings in place of the plan's"""
    times: Mapping[str, float] = field(default_factory=dict)
    """settings of the plan that are multiplied"""

    @property
    def address(self) -> str:
        """Of the thread."""
        repository, kind, number = self.wild.split()
        return f"https://github.com/{repository}/{kind}/{number}"

    @property
    def trainer(self) -> type[PPOTrainer] | None:
        """The trainer of a sick run; None where settings are enough."""
        from .sick_trainers import TRAINERS

        return TRAINERS.get(self.name)

    def plan(self, healthy: Plan) -> Plan:
        """The plan of a sick run. Raises ValueError, one line, for a plan that it cannot be in."""
        layout = healthy.settings.get("layout", "four")
        if healthy.stage != "ppo" or layout != "four":
            raise ValueError(
                f"specimen={self.name!r}: specimens are of ppo with four models, and the plan is "
                f"{healthy.stage} with layout={layout!r}"
            )
        scaled = {name: healthy.settings[name] * by for name, by in self.times.items()}
        return replace(healthy, settings={**healthy.settings, **self.settings, **scaled})

    def __str__(self) -> str:
        rule = f"Rule {self.rule} of PPO is broken.\n" if self.rule else ""
        return f"{self.name}: {self.mechanism}\n{rule}Met in: {self.address}\nCure: {self.fix}"


SPECIMENS = {name: Specimen(name, **entry) for name, entry in read_table(__file__).items()}
"""Every specimen by name."""
CASES = sorted(SPECIMENS, key=lambda name: crc32(name.encode()))
"""Their names in an order that tells nothing."""


def find(name: str | int) -> Specimen:
    """By name, or by the number of its case: from 1, in an order that tells nothing. Raises
    ValueError for what there is not."""
    if isinstance(name, int):
        if not 0 < name <= len(CASES):
            raise ValueError(f"no case {name}: they are numbered from 1 to {len(CASES)}")
        return SPECIMENS[CASES[name - 1]]
    if name not in SPECIMENS:
        hint = did_you_mean(name, SPECIMENS)
        raise ValueError(f"no specimen {name!r}: {hint}lab.specimens() lists them")
    return SPECIMENS[name]
