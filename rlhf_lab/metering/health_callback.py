"""The checks of `runs/health.py` while a trainer of transformers or TRL trains.

    trainer = GRPOTrainer(..., callbacks=[lab.HealthCallback(on_critical="stop")])

It reads what the trainer logs, and nothing else of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..display import check_choice
from ..runs.health import Health, examine

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
else:
    TrainerCallback = object  # until one is made: importing it takes seconds

TRL = {
    "kl": "kl_per_token",
    "completions/mean_length": "response_length",
    "clip_ratio/region_mean": "clipfrac",
}
"""What TRL's trainers log → what the checks call it. (A line of ours has both KLs.)"""
CUT_OFF = "completions/clipped_ratio"
"""TRL: the share of responses that do not stop."""
KEPT = 100
"""Logged lines that are looked at, beside the first: a log costs the same after a day."""


class HealthCallback(TrainerCallback):
    """Warns, once a check, when a training shows what healthy ones do not.

    `on_critical`: "stop" also ends the training, after its step, where a check is far beyond its
    limit or a logged figure is no number; "warn" lets it go on. `health` is what all checks say of
    what was logged so far. Raises ValueError for another word.
    """

    def __new__(cls, on_critical: str = "warn") -> HealthCallback:
        check_choice("on_critical", on_critical, ("warn", "stop"))
        from transformers import TrainerCallback

        bases = (cls,) if issubclass(cls, TrainerCallback) else (cls, TrainerCallback)
        return super().__new__(type(cls.__name__, bases, {}))

    def __init__(self, on_critical: str = "warn") -> None:
        self.on_critical = on_critical
        self.lines: list[dict[str, float]] = []
        self._said: set[tuple[str, bool]] = set()

    @property
    def health(self) -> Health:
        return Health(self.lines)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        line = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if not line or any(name.startswith(("eval_", "train_")) for name in line):
            return  # of held-out rows, or the closing totals
        self.lines = [*self.lines[:1], *self.lines[1:][-KEPT:], as_ours(line)]
        broken = [f"{name}={value}" for name, value in line.items() if not math.isfinite(value)]
        findings = examine(self.lines)
        if broken:
            self._say(("", True), state, f"critical: {', '.join(broken)}: no number")
        for f in findings:
            self._say((f.check.name, f.critical), state, str(f))
        if self.on_critical == "stop" and (broken or any(f.critical for f in findings)):
            control.should_training_stop = True

    def _say(self, what: tuple[str, bool], state: TrainerState, text: str) -> None:
        if what not in self._said and state.is_world_process_zero:
            warnings.warn(f"step {state.global_step}: {text}", stacklevel=3)
        self._said.add(what)


def as_ours(line: Mapping[str, float]) -> dict[str, float]:
    """Logged figures, TRL's also under the names that the checks know."""
    more = {ours: line[name] for name, ours in TRL.items() if name in line}
    if CUT_OFF in line:
        more["stopped"] = 1 - line[CUT_OFF]
    return {**more, **line}
