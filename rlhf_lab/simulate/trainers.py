"""The trainers of a simulated step: the real ones, on rows whose tokens do not matter."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..metering.meter import Meter, NoMeter
from ..models.load import load
from ..ppo.config import PPOConfig
from ..ppo.executor import Executor
from ..ppo.layouts import Roles
from ..ppo.logprobs import AnyModel
from ..ppo.rewards import Rewards
from ..ppo.texts import Row, Tokenizer
from ..ppo.trainer import PPOTrainer
from ..stages import STAGES, Setting, Settings, resolve
from ..trainers.distill import distillation_trainer
from ..trainers.trl import make_trainer
from .account import StepAccount
from .models import Step

TOKEN = 5
"""Every token of the rows: which one it is does not matter."""


def step_trainer(
    step: Step,
    models: Mapping[str, AnyModel],
    folder: str,
    steps: int,
    callbacks: list[TrainerCallback],
    meter: Meter | None = None,
    executor: Executor | None = None,
) -> Trainer | PPOTrainer:
    """The stage's trainer, with rows for a step more than it makes. `meter`, `executor`: PPO's."""
    setup = step.setup
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": setup.batch,
        "max_steps": steps,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "optim": setup.optim,
    }
    count = (steps + 1) * setup.batch * setup.gradient_accumulation_steps
    rows = [_row(step, number) for number in range(count)]
    tokenizer: Tokenizer = load("tiny").tokenizer  # serves any model: the ids are made up
    if setup.stage != "ppo":
        return _trl_trainer(step, models, tokenizer, rows, settings, callbacks)
    args = _ppo_config(step, settings)
    rule = [lambda **_: list[float]()] if setup.rule_reward else None
    trainer = ReadyTrainer(
        args,
        tokenizer,
        Roles(**{"reward": None, **models}),
        None,
        None,
        rows,
        reward_funcs=rule,
        meter=meter,
        callbacks=callbacks,
        executor=executor,
    )
    if rule:
        trainer.rewards = NoTextRewards(None, rule, tokenizer, args)
    return trainer


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
    if setup.stage in ("ppo", "distill"):
        return {"input_ids": question if number % 2 or not setup.padded else question[1:]}
    raise ValueError(f"no rows of {setup.stage} are made up yet: write them here")


def _trl_trainer(
    step: Step,
    models: Mapping[str, AnyModel],
    tokenizer: Tokenizer,
    rows: list[Row],
    settings: Settings,
    callbacks: list[TrainerCallback],
) -> Trainer:
    setup = step.setup
    own: dict[str, Setting] = {"max_length": setup.length}
    if setup.stage == "distill":
        own = {"response_length": setup.response, "beta": setup.beta}
        own["distill_from"] = setup.distill_from
    elif setup.stage == "kto":
        own["loss_type"] = setup.loss_type
    if setup.checkpoint > 1:
        own["activation_checkpointing_kwargs"] = {"every_n_layers": setup.checkpoint}
    args = resolve(STAGES[setup.stage].config)(
        **settings,
        **own,
        bf16=setup.bf16 or setup.fp16,
        activation_checkpointing=setup.gradient_checkpointing,
        logging_strategy="no",
        train_sampling_strategy="sequential",
    )
    if setup.stage == "distill":
        return _distillation_trainer(models, tokenizer, rows, args, callbacks)
    model, more = next(iter(models.values())), dict[str, AnyModel]()
    if "reference" in models:
        more["ref_model"] = models["reference"]
    with ExitStack() as stack:
        if hasattr(model, "peft_config"):  # a trainer that puts adapters in anew finds them there
            home = importlib.import_module(f"trl.trainer.{setup.stage}_trainer")
            stack.enter_context(patch.object(model, "unload", model.get_base_model))
            stack.enter_context(patch.object(home, "get_peft_model", lambda *_, **__: model))
        return make_trainer(setup.stage, model, tokenizer, rows, [], args, callbacks, **more)


def _distillation_trainer(
    models: Mapping[str, AnyModel],
    tokenizer: Tokenizer,
    rows: list[Row],
    args: Setting,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Responses are not sampled: every one is as long as may be."""
    for row in rows:
        row |= {"prompt": "", "prompt_ids": row.pop("input_ids")}
    whole = [TOKEN] * args.response_length
    sampled = {"_generate_single_turn": lambda prompt_ids, *_, **__: [whole for _ in prompt_ids]}
    answers, teacher = None, models.get("teacher")
    if teacher is None:
        k = args.loss_top_k if args.distill_from == "logits" else 1
        top = {"top_ids": [[TOKEN] * k for _ in whole], "top_logprobs": [[-9.0] * k for _ in whole]}
        answers = [top] * len(rows)
    roles = models["student"], teacher
    trainer = distillation_trainer(*roles, tokenizer, rows, args, callbacks, answers=answers)
    vars(trainer).update(sampled)
    return trainer


# -------------------------------------------------------------------------------------------- PPO


class PhaseMeter(NoMeter):
    """The trainer tells its meter which phase begins, and the meter tells the account."""

    def __init__(self, account: StepAccount):
        super().__init__("ppo")
        self.account = account

    def phase(
        self, phase: str, role: str = "", *_: object, **__: object
    ) -> AbstractContextManager[None]:
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


def _ppo_config(step: Step, settings: Settings) -> PPOConfig:
    setup = step.setup
    args = PPOConfig(
        **settings,
        layout=setup.layout,
        temperature=1.0,
        response_length=setup.response,
        stop_token=None,
        num_ppo_epochs=setup.num_ppo_epochs,
        num_mini_batches=setup.num_mini_batches,
        local_rollout_forward_batch_size=setup.local_rollout_forward_batch_size,
        activation_checkpointing=setup.gradient_checkpointing,
        activation_checkpointing_kwargs={"every_n_layers": setup.every_n_layers},
    )
    args.bf16 = setup.bf16 or setup.fp16  # which PPOConfig refuses on a CPU
    return args
