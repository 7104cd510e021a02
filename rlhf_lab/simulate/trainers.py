"""The trainers of a simulated step: the real ones, on rows whose tokens do not matter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from ..metering.meter import Meter, NoMeter
from ..metering.patch import patched
from ..models.load import load
from ..ppo.config import PPOConfig
from ..ppo.executor import Executor
from ..ppo.layouts import Roles
from ..ppo.logprobs import AnyModel
from ..ppo.rewards import Rewards
from ..ppo.texts import Row, Tokenizer
from ..ppo.trainer import PPOTrainer
from ..trainers.dpo import TokenizedDPOTrainer
from ..trainers.kto import TokenizedKTOTrainer
from .account import StepAccount
from .models import Step
from .xray import prime


class Trainable(Protocol):
    """A trainer, of TRL or ours."""

    def train(self) -> object: ...


TOKEN = 5
"""Every token of the rows: which one it is does not matter."""


def _tokenizer() -> Tokenizer:
    """The bundled one serves any model: the ids are made up."""
    tokenizer: Tokenizer = load("tiny").tokenizer
    return tokenizer


def _common(step: Step, folder: str, steps: int, passes: int) -> dict[str, Any]:
    """What TRL's configs and our PPOConfig have in common."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": step.setup.batch,
        "max_steps": steps,
        "gradient_accumulation_steps": passes,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "optim": step.setup.optim,
    }


class StepBegins(TrainerCallback):
    """Tells the account where a step begins; gives an optimizer of fake tensors its state."""

    def __init__(self, step: Step, account: StepAccount | None):
        self.step, self.account = step, account

    def on_train_begin(self, *_: object, optimizer: AnyModel = None, **__: object) -> None:
        if not self.step.real and self.account is not None:
            prime(self.account, optimizer, foreach=True if self.step.setup.gpu else None)

    def on_step_begin(self, *_: object, **__: object) -> None:
        if self.account is not None:
            self.account.restart()


def _row(step: Step, number: int) -> Row:
    """Ids of one row; where rows are padded, every other one is a token shorter."""
    setup = step.setup
    answer, question = [TOKEN] * setup.response, [TOKEN] * setup.prompt
    shorter = answer[1:] if setup.padded else answer
    if setup.stage == "sft":
        answer = answer if number % 2 else shorter
        mask = [0] * len(question) + [1] * len(answer)
        return {"input_ids": question + answer, "completion_mask": mask}
    if setup.stage == "reward":
        return {"chosen_ids": question + answer, "rejected_ids": question + shorter}
    if setup.stage == "dpo":
        return {"prompt_ids": question, "chosen_ids": answer, "rejected_ids": shorter}
    if setup.stage == "kto":
        answer = answer if number % 2 else shorter
        row: Row = {"prompt_ids": question, "completion_ids": answer, "label": bool(number % 2)}
        return {**row, "KL_completion_ids": answer}  # of another row, as long
    return {"input_ids": question if number % 2 or not setup.padded else question[1:]}


# -------------------------------------------------------------------------------------------- TRL


def trl_trainer(
    step: Step,
    models: Mapping[str, AnyModel],
    folder: str,
    account: StepAccount | None,
    steps: int,
    passes: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainable:
    """TRL's trainer of the stage, with rows for one step more than it makes."""
    trl: AnyModel = importlib.import_module("trl")

    setup = step.setup
    settings = _common(step, folder, steps, passes) | {
        "bf16": setup.bf16 or setup.fp16,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "max_length": setup.length,
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    kind, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "dpo": (TokenizedDPOTrainer, trl.DPOConfig),
        "kto": (TokenizedKTOTrainer, trl.KTOConfig),
    }[setup.stage]
    rows = [_row(step, i) for i in range((steps + 1) * setup.batch * passes)]
    model, more = next(iter(models.values())), dict[str, AnyModel]()
    patch: AbstractContextManager[object] = nullcontext()
    if "reference" in models:
        more["ref_model"] = models["reference"]
    elif setup.stage in ("dpo", "kto"):  # TRL puts adapters in itself: they are there already
        adapted, model = model, model.get_base_model()
        more["peft_config"] = adapted.peft_config["default"]
        patch = patched(
            sys.modules[kind.__base__.__module__], "get_peft_model", lambda *_, **__: adapted
        )
    with patch:
        trainer = kind(
            model=model,
            args=config(**settings),
            processing_class=_tokenizer(),
            train_dataset=Dataset.from_list(rows),
            callbacks=[StepBegins(step, account), *callbacks],
            **more,
        )
    trainer.remove_callback(PrinterCallback)
    ready: Trainable = trainer
    return ready


# -------------------------------------------------------------------------------------------- PPO


class PhaseMeter(NoMeter):
    """The trainer tells its meter which phase begins, and the meter tells the account."""

    def __init__(self, account: StepAccount | None):
        super().__init__("ppo")
        self.account = account

    def phase(self, *at: object, **_: object) -> AbstractContextManager[None]:
        if self.account is not None:
            phase, role = (*map(str, at), "")[:2]
            self.account.enter(phase, role)
        return nullcontext()


class ReadyTrainer(PPOTrainer):
    """Its roles are made: adapters cannot be put into fake tensors."""

    def build_roles(self, *models: AnyModel) -> Roles:
        ready: Roles = models[0]
        return ready


class NoTextRewards(Rewards):
    """A rule reads texts, of which there are none here: its scores are zeros."""

    def score(self, ids: Tensor, *_: object) -> Tensor:
        return torch.zeros(len(ids), device=ids.device)


def ppo_trainer(
    step: Step,
    models: Mapping[str, AnyModel],
    folder: str,
    account: StepAccount | None,
    steps: int,
    passes: int,
    callbacks: Sequence[TrainerCallback] = (),
    meter: Meter | None = None,
    executor: Executor | None = None,
) -> PPOTrainer:
    """Our PPOTrainer, with prompts for one iteration more than it makes."""
    setup = step.setup
    args = PPOConfig(
        **_common(step, folder, steps, passes),
        temperature=1.0,
        response_length=setup.response,
        stop_token=None,
        num_ppo_epochs=setup.num_ppo_epochs,
        num_mini_batches=setup.num_mini_batches,
        local_rollout_forward_batch_size=setup.local_rollout_forward_batch_size,
    )
    args.bf16 = setup.bf16 or setup.fp16  # which PPOConfig refuses on a CPU
    roles = Roles(**{"reward": None, **models})
    tokenizer, rule = _tokenizer(), [_no_reward] if setup.rule_reward else None
    trainer = ReadyTrainer(
        args,
        tokenizer,
        roles,
        None,
        None,
        [_row(step, i) for i in range((steps + 1) * args.rollout_batch_size)],
        reward_funcs=rule,
        meter=meter or PhaseMeter(account),
        callbacks=[StepBegins(step, account), *callbacks],
        executor=executor,
    )
    if rule:
        trainer.rewards = NoTextRewards(None, rule, tokenizer, args)
    return trainer


def _no_reward(**_: object) -> list[float]:
    return []
