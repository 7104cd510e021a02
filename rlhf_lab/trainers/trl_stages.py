"""SFT, reward model and DPO: thin over TRL's trainers.

Each function takes a model that is already loaded, rows of data and TRL's own settings, and
returns the trainer after training. What is ours: pad set before TRL sees the tokenizer, tokens
made once in one place (so every stage sees the same ids), CPU-safe defaults, over-long rows
dropped *and counted*, and metrics written to the run as they come.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import PrinterCallback

from ..metering.callback import MeterCallback
from ..ppo.texts import score_texts

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


def _unprinted(trainer):
    """The run records every log line; printing them too would bury the progress bar."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def sft_trainer(model, tokenizer, train, held_out, args, watch):
    """Supervised fine-tuning with TRL's SFTTrainer; loss on the response only."""
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=[watch],
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
    )
    return _unprinted(trainer)


def reward_trainer(model, tokenizer, train, held_out, args, watch):
    """A reward model with TRL's RewardTrainer: the Bradley–Terry loss on pairs."""
    from trl import RewardTrainer

    trainer = RewardTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=[watch],
        train_dataset=Dataset.from_list([_whole(r) for r in train]),
        eval_dataset=Dataset.from_list([_whole(r) for r in held_out]) if held_out else None,
    )
    return _unprinted(trainer)


def _whole(row: dict) -> dict:
    """RewardTrainer wants prompt and response as one sequence."""
    prompt = row["prompt_ids"]
    return {f"{k}_ids": prompt + row[f"{k}_ids"] for k in ("chosen", "rejected")}


def dpo_trainer(model, tokenizer, train, held_out, args, watch):
    """Direct preference optimisation with TRL's DPOTrainer.

    The reference is a frozen copy, for a model with adapters the model with its adapters off. TRL
    takes adapters that are there already for trained ones, of which it would keep a second set as
    the reference: it gets the model without them, and their config.
    """
    from trl import DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):
        """DPOTrainer that takes rows whose tokens were made already."""

        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            return dataset

    lora = None
    if hasattr(model, "peft_config"):
        lora, model = model.peft_config["default"], model.unload()
    trainer = TokenizedDPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=[watch],
        peft_config=lora,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
    )
    return _unprinted(trainer)


def set_score_offset(model, tokenizer, demonstrations: list[dict]) -> float:
    """Rule 16: a bias in the model's config so that demonstrations score 0 on average.

    `demonstrations`: rows with a `completion`, or a `chosen` response. → the offset.
    """
    response = "completion" if "completion" in demonstrations[0] else "chosen"
    model.config.score_offset = 0.0
    scores = score_texts(
        model,
        tokenizer,
        [r["prompt"] for r in demonstrations],
        [r[response] for r in demonstrations],
    )
    model.config.score_offset = -float(scores.mean())
    return model.config.score_offset
