"""Checkpoints of the stages over TRL's trainers: transformers' own, and when one counts.

    checkpoint-40/…             as transformers' Trainer writes it: model, optimizer, random numbers
    checkpoint-40/rest.pt       written last: what the meter has measured, other counters, and the
                                reference where it moves (`sync_ref_model`)

A checkpoint without `rest.pt` was cut short, and nobody goes on from it. Whoever goes on makes the
steps that the training would have made, and logs them alike: a line of metrics, which is a mean
over steps, ends where a checkpoint is made; RLOO and GRPO make one between two generations only.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import Module
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..metering.meter import Meter
from ..runs.run import WHOLE

if TYPE_CHECKING:
    from transformers import Trainer


def steps_of_a_generation(args: TrainingArguments) -> int:
    """Optimizer steps after which RLOO and GRPO have used up what they sampled; 1 elsewhere."""
    passes: int = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
    return math.lcm(passes, args.gradient_accumulation_steps) // args.gradient_accumulation_steps


class Checkpoints(TrainerCallback):
    """Decides when a trainer writes a checkpoint, makes it count, and takes up what it holds.

    `counter`: what counts `episodes`, or nothing. `resume`: the checkpoint to go on from.
    """

    def __init__(
        self, trainer: Trainer, meter: Meter, resume: Path | None, counter: object = None
    ) -> None:
        self.trainer, self.meter, self.counter = trainer, meter, counter
        self.resume, self._start, self._due = resume, time.perf_counter(), False
        args, zero = trainer.args, trainer.accelerator.state.deepspeed_plugin
        moves = getattr(args, "sync_ref_model", False) and args.save_strategy != "no"
        if moves and (trainer.is_fsdp_enabled or zero is not None and zero.zero_stage == 3):
            raise ValueError(
                "sync_ref_model: a reference that moves is not saved where weights are sharded; "
                'use ddp, zero1 or zero2, or save_strategy="no"'
            )
        # TRL's callback moves it, and no checkpoint of transformers' holds it.
        reference = getattr(trainer, "ref_model", None) if moves else None
        self._moved: Module | None = reference and trainer.accelerator.unwrap_model(reference)

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._start = time.perf_counter()
        if self.resume is not None:
            rest = torch.load(self.resume / WHOLE, weights_only=True)
            self.meter.load_state_dict(rest["meter"])
            self._start -= rest["seconds"]
            for owner, name in self._counters():
                setattr(owner, name, rest[name])
            if self._moved is not None:
                self._moved.load_state_dict(rest["reference"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Comes after `Watch`, which knows whether training is to end here."""
        last = state.global_step == state.max_steps  # what is left is done again in no time
        stopped = control.should_training_stop and args.save_strategy != "no"
        due = self._due or control.should_save or stopped
        self._due = due and state.global_step % steps_of_a_generation(args) != 0
        control.should_save = due and not (self._due or last)
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end  # save_strategy="epoch" asks for one there

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each has written its random numbers
        if args.save_only_model:
            return
        measured = self.meter.state_dict()  # of all processes, so each takes part
        if not state.is_world_process_zero:
            return
        rest = {name: getattr(owner, name) for owner, name in self._counters()}
        rest |= {"meter": measured, "seconds": self.seconds}
        if self._moved is not None:
            rest["reference"] = self._moved.state_dict()
        path = Path(args.output_dir or "", f"checkpoint-{state.global_step}", WHOLE)
        torch.save(rest, draft := path.with_suffix(".tmp"))
        draft.replace(path)

    @property
    def seconds(self) -> float:
        """Spent in training, without pauses between runs."""
        return time.perf_counter() - self._start

    def _counters(self) -> list[tuple[object, str]]:
        """What a checkpoint of transformers leaves out: (owner, name)."""
        counters = [(self.trainer, "_total_train_tokens"), (self.counter, "episodes")]
        return [(owner, name) for owner, name in counters if hasattr(owner, name)]
