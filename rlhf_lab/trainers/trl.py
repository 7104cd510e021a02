"""What the stages over TRL's trainers share: settings that run here, and what watches them train.

What is ours: pad set before TRL sees the tokenizer, tokens made once in one place (so every stage
sees the same ids), CPU-safe defaults, over-long rows dropped *and counted*, and metrics written to
the run as they come.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias
from unittest.mock import patch

import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.schema import Example
from ..launch.processes import any_process
from ..metering.callback import MeterCallback
from ..metering.meter import Meter
from ..models.device import device_settings
from ..models.structure import check_head
from ..ppo.logprobs import AnyModel
from ..ppo.sampling import ROUTERS
from ..runs.progress import Bar
from ..settings import ROUTERS_SHARE
from ..stages import STAGES, resolve
from .diverged import check_finite

Rows: TypeAlias = list[Example]
"""Rows with token ids, as `data/tokenize.py` makes them."""
OF_ROUTERS = (ROUTERS, ROUTERS_SHARE)
"""What TRL's SFT writes into a mixture's config, which would be saved with the model. Its loss
takes both from the trainer (trl 1.16, `SFTTrainer.compute_loss`)."""


def trl_settings(settings: Mapping[str, object], output_dir: str) -> dict[str, object]:
    """TRL's settings with defaults that run on the machine at hand.

    TRL defaults to bf16 and gradient checkpointing, which crawl on a CPU. The trainer saves
    checkpoints alone, the last two: the run saves the model, at the end. A loss that is no number
    is logged as it is (transformers would log 0), so that it is seen.
    """
    return {
        **device_settings(settings),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_total_limit": 2,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "output_dir": output_dir,
        **settings,
    }


# ----------------------------------------------------------------------------------- the trainers


class TokenizedDPOTrainer(DPOTrainer):
    """DPOTrainer that takes rows whose tokens were made already."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


def make_trainer(
    stage: str,
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Rows,
    held_out: Rows,
    args: TrainingArguments,
    callbacks: list[TrainerCallback],
    reference: Callable[[], AnyModel] | None = None,
    **more: object,
) -> Trainer:
    """TRL's trainer of a stage (`StageSpec.trainer`), for rows with token ids.

    `reference` makes the frozen copy where TRL wants one. By itself it would load one from where
    the policy came from, which has fewer tokens than a policy that was given a pad token. For a
    model with adapters the reference is the model with its adapters off. TRL takes adapters that
    are there already for trained ones, of which it would keep a second set as the reference: it
    gets the model without them, and their config.
    """
    disable_progress_bars()
    if stage != "reward":
        check_head(model.config.get_text_config().model_type)
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        check_rows_apart(model)
        if not getattr(args, "packing", False):
            # TRL refuses one here, and rows are cut to it already.
            args.max_length = None  # type: ignore[attr-defined]
    if "reference" in STAGES[stage].roles and hasattr(model, "peft_config"):
        more["peft_config"], model = model.peft_config["default"], model.unload()
    config = model.config.get_text_config()
    routers = {name: getattr(config, name) for name in OF_ROUTERS if hasattr(config, name)}
    loads: AbstractContextManager[object] = nullcontext()
    if reference is not None:
        home, make = importlib.import_module(f"trl.trainer.{stage}_trainer"), reference
        loads = patch.object(home, "create_model_from_path", lambda *_, **__: make())
    with loads:
        trainer: Trainer = resolve(STAGES[stage].trainer)(
            model=model,
            args=args,
            processing_class=tokenizer,
            callbacks=callbacks,
            train_dataset=Dataset.from_list(train) if train else None,
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            **more,
        )
    for name, value in routers.items():
        setattr(config, name, value)
    if train and getattr(args, "train_sampling_strategy", "") == "group_by_length":
        # By itself it looks for `input_ids`, which pairs have not, and drops a column of lengths.
        sampler = ByLength([length_of(row) for row in train], args)
        trainer._get_train_sampler = lambda *_: sampler  # type: ignore[method-assign]
        trainer._get_eval_sampler = lambda *rows: SequentialSampler(*rows)  # type: ignore[method-assign]
    trainer.remove_callback(PrinterCallback)  # the run records what it would print over the bar
    if getattr(model, "is_loaded_in_4bit", False):
        # TRL puts adapters and heads in bf16, which an fp32 pass without autocast cannot use.
        assert trainer.model is not None
        for weight in filter(lambda w: w.requires_grad, trainer.model.parameters()):
            weight.data = weight.data.float()
    return trainer


@torch.no_grad()
def check_rows_apart(model: AnyModel) -> None:
    """Raises ValueError, one line, for a model that reads rows which are laid end to end as one.

    Models that do not make their mask of `position_ids` (OPT, BLOOM, MPT, Falcon, Mamba without its
    kernels; transformers 5.23) let a row see those before it, without a word. So it is tried:
    a row behind another one has the logits (t, vocab) that it has alone. A model that is sharded
    as it is loaded cannot be tried here.
    """
    if any(weight.is_meta or not weight.numel() for weight in model.parameters()):
        return
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)

    def last_three(*rows: list[int]) -> torch.Tensor:
        batch = collate([{"input_ids": row} for row in rows])
        tensors = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        logits: torch.Tensor = model(**{**batch, **tensors, "labels": None}, use_cache=False).logits
        return logits[0, -3:].float()

    trains = model.training
    model.eval()
    alone, behind = last_three([5, 6, 7]), last_three([1, 2, 3, 4], [5, 6, 7])
    model.train(trains)
    exact = next(model.parameters()).dtype == torch.float32
    if (alone - behind).abs().max() > (1e-3 if exact else 0.1) * alone.std():
        kind = model.config.get_text_config().model_type
        raise ValueError(
            f"packing and padding_free lay rows end to end, and {kind} reads them as one: a row "
            "would be learned as an answer to others; leave them out"
        )


class ByLength(LengthGroupedSampler):
    """transformers' order for `train_sampling_strategy="group_by_length"`, drawn from the seed and
    the epoch alone, so that a run that is resumed sees the rows that it would have seen."""

    def __init__(self, lengths: list[int], args: TrainingArguments) -> None:
        batch = args.train_batch_size * args.gradient_accumulation_steps
        super().__init__(batch, lengths=lengths)
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader at the start of an epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def length_of(row: Example) -> int:
    """Tokens of a row as it is padded: of a pair, those of the longer one."""
    if "input_ids" in row:
        return len(row["input_ids"])
    answers = (len(row[name]) for name in ("chosen_ids", "rejected_ids"))
    return len(row.get("prompt_ids", ())) + max(answers)


# ------------------------------------------------------------------------------- while it trains


class Counter(Protocol):
    """What counts the episodes of a stage that samples, and measures what is sampled."""

    episodes: int

    def metric_names(self, args: TrainingArguments) -> dict[str, str]:
        """TRL's metrics that are kept → ours; what a step logs twice or times is left out."""


class Watch(MeterCallback):
    """Writes what a trainer logs to a run, meters its phases, moves the progress bar, and stops."""

    counter: Counter | None = None

    @staticmethod
    def plain(name: str) -> str:
        """TRL's metric names in ours: `rewards/margins` → `margin`, `eval_rewards/…` → `eval_…`."""
        for old, new in (("rewards/", ""), ("accuracies", "accuracy"), ("margins", "margin")):
            name = name.replace(old, new)
        return name.replace("logps/", "logps_")

    def __init__(
        self,
        meter: Meter,
        log_to: Callable[..., None] | None = None,
        progress: Callable[[int, int], Bar | None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(meter)
        self.log_to, self.progress, self.should_stop = log_to, progress, should_stop
        self.bar: Bar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        super().on_train_begin(args, state, control, **more)
        self.bar = self.progress(state.max_steps, state.global_step) if self.progress else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        super().on_step_end(args, state, control)
        if self.bar:
            self.bar.update(1)
        if self.should_stop and any_process(self.should_stop()):
            control.should_training_stop = True
        if state.global_step == state.max_steps or control.should_training_stop:
            control.should_log = True  # the run ends where it says it ended

    def on_train_end(self, *args: object, **more: object) -> None:
        super().on_train_end(*args, **more)
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
        check_finite(self.meter.stage, args, logs or {}, f"at step {state.global_step}")
        # Times are the ledger's; the trainer's closing totals are not a step's metrics.
        numbers = {
            self.plain(k): float(v)
            for k, v in (logs or {}).items()
            if isinstance(v, int | float) and not k.endswith(("_runtime", "_per_second"))
        }
        if self.log_to and not (numbers.keys() & {"train_loss"}):
            self.log_to(state.global_step, **numbers)
