"""Simulate one training step of a stage without weights or a GPU: what does it take?

    simulate_step(Setup(stage="sft", model=architecture(config), dtype="bfloat16"), config)

The trainers are the real ones (TRL's for SFT, reward models, DPO and KTO, ours for PPO); the
tensors are fake (see `account.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerCallback

from ..display import check_choice
from ..metering.memory_tracker import GPU_BLOCK
from ..models.device import quiet_checkpointing
from ..ppo.logprobs import AnyModel
from ..stages import XRAYED
from .account import FakeAccount, StepAccount, materialise
from .models import Config, Step, by_role, models_of
from .shortcuts import TURNS, FirstTurns, fake_answers, left_alone
from .trainers import PhaseMeter, step_trainer
from .xray import XRay, labelled, prime

if TYPE_CHECKING:
    from ..cost.setup import Setup


def simulate_step(setup: Setup, config: Config, roles: Mapping[str, Config] | None = None) -> XRay:
    """One optimizer step of a stage (PPO: one iteration), the optimizer's state being there.

    `config`: a transformers config as a dict; `roles`: see `Step`. Of the setup counts what one
    device does: every row is of its `prompt` and `response` tokens. Raises ValueError, one line,
    for what cannot be simulated.
    """
    check_choice("stage", setup.stage, XRAYED)
    if setup.use_vllm:
        raise ValueError("use_vllm: vLLM's memory is planned, not simulated: x-ray without it")
    with left_alone(), tempfile.TemporaryDirectory() as folder:
        return _simulate(Step(setup, config, roles or {}), folder)


def _simulate(step: Step, folder: str) -> XRay:
    """The step after the first, on fake tensors."""
    quiet_checkpointing()
    setup = step.setup
    with torch.device("meta"):
        models = models_of(step)
    account = FakeAccount(GPU_BLOCK if setup.gpu else 1, logit_widths(step), setup.response)
    begins: list[TrainerCallback] = [_Primed(account, foreach=True if setup.gpu else None)]
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        fake_answers(account, gpu=setup.gpu, padded=setup.padded),
        account,
    ):
        for model in reversed(models.values()):  # what is trained first: others may be parts of it
            materialise(model)
        with labelled(account, by_role(models), phases=setup.stage != "ppo"):
            if setup.stage == "ppo":
                meter, turns = PhaseMeter(account), FirstTurns(account, step)
                step_trainer(step, models, folder, 1, begins, meter, turns).train()
            else:
                passes = setup.gradient_accumulation_steps
                first = min(TURNS, passes)
                short = replace(step, setup=replace(setup, gradient_accumulation_steps=first))
                trainer = step_trainer(short, models, folder, 1, begins)
                with account.counted_as(Fraction(passes, first)):
                    trainer.train()
    return XRay.of(account, setup.stage, "gpu" if setup.gpu else "cpu")


class StepBegins(TrainerCallback):
    """Tells the account where a step begins."""

    def __init__(self, account: StepAccount):
        self.account = account

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.account.restart()


class _Primed(StepBegins):
    """Gives an optimizer of fake tensors its state, too. `foreach`: see torch.optim.AdamW."""

    def __init__(self, account: StepAccount, foreach: bool | None):
        super().__init__(account)
        self.foreach = foreach

    def on_train_begin(self, *_: object, optimizer: AnyModel = None, **__: object) -> None:
        prime(self.account, optimizer, self.foreach)


def logit_widths(step: Step) -> set[int]:
    """Last dimensions of logits: the vocabulary and the tiles of TRL's fused head."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE

    vocabulary = int(step.config["vocab_size"])
    return {vocabulary, TILE, vocabulary % TILE} - {0}
