"""What the stages over TRL's trainers share: settings that run here, and what watches them train.

What is ours: pad set before TRL sees the tokenizer, tokens made once in one place (so every stage
sees the same ids), CPU-safe defaults, over-long rows dropped *and counted*, and metrics written to
the run as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import torch
from datasets import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.schema import Example
from ..metering.callback import MeterCallback
from ..metering.meter import Meter

Rows: TypeAlias = list[Example]
"""Rows with token ids, as `data/tokenize.py` makes them."""
CPU_SAFE = {"bf16": False, "gradient_checkpointing": False, "report_to": "none"}


def trl_settings(settings: Mapping[str, object], output_dir: str) -> dict[str, object]:
    """TRL's settings with defaults that run on the machine at hand.

    TRL defaults to bf16 and gradient checkpointing, which crawl on a CPU. Nothing is saved by
    the trainer itself: the run saves the model once, at the end.
    """
    safe: dict[str, object] = {
        **CPU_SAFE,
        **{"save_strategy": "no", "disable_tqdm": True, "output_dir": output_dir},
    }
    if not torch.cuda.is_available():
        safe["use_cpu"] = True
    else:
        safe["bf16"] = torch.cuda.get_device_capability()[0] >= 8
    return {**safe, **settings}


# ------------------------------------------------------------------------------- while it trains


class Bar(Protocol):
    """What counts the steps of a loop: a line of text, or a dashboard."""

    def update(self, steps: int = 1, note: str = "") -> object: ...

    def close(self) -> object: ...


class Watch(MeterCallback):
    """Writes what a trainer logs to a run, meters its phases, moves the progress bar, and stops."""

    @staticmethod
    def plain(name: str) -> str:
        """TRL's metric names in ours: `rewards/margins` → `margin`, `eval_rewards/…` → `eval_…`."""
        for old, new in (("rewards/", ""), ("accuracies", "accuracy"), ("margins", "margin")):
            name = name.replace(old, new)
        return name.replace("logps/", "logps_")

    def __init__(
        self,
        meter: Meter,
        role: str,
        log_to: Callable[..., None] | None = None,
        progress: Callable[[int], Bar | None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(meter, role)
        self.log_to, self.progress, self.should_stop = log_to, progress, should_stop
        self.bar: Bar | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.bar = self.progress(state.max_steps) if self.progress else None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.bar:
            self.bar.update(1)
        if self.should_stop and self.should_stop():
            control.should_training_stop = True
        if state.global_step == state.max_steps or control.should_training_stop:
            control.should_log = True  # the run ends where it says it ended

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self.bar:
            self.bar.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        # Times are the ledger's; the trainer's closing totals are not a step's metrics.
        numbers = {
            self.plain(k): float(v)
            for k, v in (logs or {}).items()
            if isinstance(v, int | float) and not k.endswith(("_runtime", "_per_second"))
        }
        if self.log_to and not (numbers.keys() & {"train_loss"}):
            self.log_to(state.global_step, **numbers)


def without_printer(trainer: Trainer) -> Trainer:
    """The run records every log line; printing them too would bury the progress bar."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def data_set(rows: Rows) -> Dataset | None:
    """Rows as TRL's trainers take them; None for none."""
    return Dataset.from_list(rows) if rows else None
