"""What the stages over TRL's trainers share: settings that run here, and what watches them train.

What is ours: pad set before TRL sees the tokenizer, tokens made once in one place (so every stage
sees the same ids), CPU-safe defaults, over-long rows dropped *and counted*, and metrics written to
the run as they come.
"""

from __future__ import annotations

import torch
from transformers import PrinterCallback, Trainer

from ..metering.callback import MeterCallback

CPU_SAFE = {"bf16": False, "gradient_checkpointing": False, "report_to": "none"}


def trl_settings(settings: dict, output_dir: str) -> dict:
    """TRL's settings with defaults that run on the machine at hand.

    TRL defaults to bf16 and gradient checkpointing, which crawl on a CPU. Nothing is saved by
    the trainer itself: the run saves the model once, at the end.
    """
    safe = dict(CPU_SAFE, save_strategy="no", disable_tqdm=True, output_dir=output_dir)
    if not torch.cuda.is_available():
        safe["use_cpu"] = True
    else:
        safe["bf16"] = torch.cuda.get_device_capability()[0] >= 8
    return {**safe, **settings}


# ------------------------------------------------------------------------------- while it trains


class Watch(MeterCallback):
    """Writes what a trainer logs to a run, meters its phases, moves the progress bar, and stops."""

    @staticmethod
    def plain(name: str) -> str:
        """TRL's metric names in ours: `rewards/margins` → `margin`, `eval_rewards/…` → `eval_…`."""
        for old, new in (("rewards/", ""), ("accuracies", "accuracy"), ("margins", "margin")):
            name = name.replace(old, new)
        return name.replace("logps/", "logps_")

    def __init__(self, meter, role: str, log_to=None, progress=None, should_stop=None):
        super().__init__(meter, role)
        self.log_to, self.progress, self.should_stop = log_to, progress, should_stop

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.bar = self.progress(state.max_steps) if self.progress else None

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.bar:
            self.bar.update(1)
        if self.should_stop and self.should_stop():
            control.should_training_stop = True
        if state.global_step == state.max_steps or control.should_training_stop:
            control.should_log = True  # the run ends where it says it ended

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if self.bar:
            self.bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
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
