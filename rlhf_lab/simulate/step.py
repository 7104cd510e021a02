"""Rehearse one training step of a stage without weights or a GPU: what does it take?

    simulate_step("sft", config, batch=2, prompt=256, response=256, dtype="bfloat16")

The trainers are the real ones (TRL's for SFT, reward models and DPO, ours for PPO); the tensors
are fake (see `cost/xray.py`). With `real` the same step runs on real tensors of random numbers on
this machine's CPU, under the same account or under torch's profiler: how far is the x-ray off? Or
by the clock: how far are a plan's seconds?
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from ..metering.memory_tracker import GPU_BLOCK
from ..metering.patch import patched
from ..runs.ledger import Ledger
from .account import FakeAccount, StepAccount, materialise
from .models import by_role, models_of
from .shortcuts import FEW, few_passes, head_labelled, left_alone, stand_ins
from .xray import XRay, labelled, prime

TOKEN = 5
"""Every token of the rows: what they say does not matter."""

STAGES = ("sft", "reward", "dpo", "ppo")


@dataclass(frozen=True)
class Setup:
    """The arguments of `simulate_step`, under the names of TRL's configs and our PPOConfig.

    `lora_r` 0 trains the whole model; adapters are on the policy (in reward: the reward model), in
    fp32 over bf16 weights as peft makes them. DPO's reference is a frozen copy, with adapters the
    policy without them. PPO has the models of its layout.
    """

    stage: str
    config: dict
    batch: int
    prompt: int
    response: int
    dtype: str = "float32"
    """of the weights: float32 or bfloat16"""
    bf16: bool = False
    """autocast: matrix products in bf16 over fp32 weights"""
    lora_r: int = 0
    lora_targets: Any = "all-linear"
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    """sdpa or eager"""
    optim: str = "adamw_torch"
    """adamw_torch (on a GPU torch takes its foreach form), adamw_torch_fused, adafactor, sgd"""
    gradient_accumulation_steps: int = 1
    num_mini_batches: int = 1
    num_ppo_epochs: int = 4
    local_rollout_forward_batch_size: int = 64
    padded: bool = False
    """Do the rows of a batch differ in length? Then attention gets a mask."""
    device: str = "gpu"
    """gpu, or cpu: what this machine's CPU would do, to the byte"""
    value_config: dict | None = None
    reward_config: dict | None = None
    """PPO's critics; like the policy where None"""
    layout: str = "four"
    """PPO's (`stages/layouts.py`)"""
    critic_lora_r: int = 0
    critic_lora_targets: Any = "all-linear"
    """value and reward adapters on one base; like the policy's where 0"""
    own_reward: bool = False
    """one base: the reward model has weights of its own"""
    rule_reward: bool = False
    """PPO without a reward model"""
    real: bool | str = False
    """True: real tensors on the CPU under an account; "profiler": under torch's profiler; "clock":
    a few steps, timed"""

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r}: choose from {', '.join(STAGES)}")
        if self.device not in ("cpu", "gpu"):
            raise ValueError(f"device={self.device!r}: choose cpu or gpu")
        if self.stage == "ppo" and self.gradient_checkpointing:
            raise ValueError("PPO has no gradient_checkpointing: its models are in eval mode")

    @property
    def length(self) -> int:
        return self.prompt + self.response


def simulate_step(
    stage: str, config: dict, *, batch: int, prompt: int, response: int, **settings: Any
) -> XRay:
    """One optimizer step of a stage (PPO: one iteration), the optimizer's state being there.

    `config`: a transformers config as a dict; `batch`: `per_device_train_batch_size`, in sequences
    (pairs for reward and dpo); `prompt`, `response`: tokens of every row; see `Setup` for the rest.
    """
    setup = Setup(stage, config, batch, prompt, response, **settings)
    with left_alone(), tempfile.TemporaryDirectory() as folder:
        if setup.real:  # trainers hold themselves in circles: what an earlier one held goes now
            gc.collect()
        if setup.real == "profiler":
            return _profile(setup, folder)
        if setup.real == "clock":
            return _clock(setup, folder)
        return _measure(setup, folder) if setup.real else _simulate(setup, folder)


def _simulate(setup: Setup, folder: str) -> XRay:
    """The step after the first, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu = setup.device == "gpu"
    with torch.device("meta"):
        models = models_of(setup)
    account = FakeAccount(GPU_BLOCK if gpu else 1, _widths(setup), setup.response)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        stand_ins(account, gpu=gpu, padded=setup.padded),
        account,
    ):
        for model in reversed(models.values()):  # what is trained first: others may be parts of it
            materialise(model)
        with labelled(account, by_role(models), phases=setup.stage != "ppo"):
            if setup.stage == "ppo":
                window = setup.config.get("sliding_window") or 0
                with few_passes(account, setup.prompt, setup.response, window):
                    _ppo(setup, models, folder, account, steps=1).train()
            else:
                few = min(FEW, setup.gradient_accumulation_steps)
                trainer = _trl(setup, models, folder, account, steps=1, passes=few)
                with account.standing_for(Fraction(setup.gradient_accumulation_steps, few)):
                    trainer.train()
    return XRay.of(account, setup.stage, setup.device)


def _measure(setup: Setup, folder: str) -> XRay:
    """Two steps on real tensors under an account; what is told is the second."""
    models, account = models_of(setup), StepAccount(1, _widths(setup))
    make = _ppo if setup.stage == "ppo" else _trl
    with head_labelled(account), account:
        with labelled(account, by_role(models), phases=setup.stage != "ppo"):
            make(setup, models, folder, account, steps=2).train()
    return XRay.of(account, setup.stage, "cpu", source="measured")


def _profile(setup: Setup, folder: str) -> XRay:
    """Two steps on real tensors under torch's profiler: the CPU allocator's own peak, no more."""
    from torch.profiler import ProfilerActivity, profile

    models = models_of(setup)
    held = {id(t): t for m in models.values() for t in (*m.parameters(), *m.buffers())}
    base = sum(t.untyped_storage().nbytes() for t in held.values())
    trainer = (_ppo if setup.stage == "ppo" else _trl)(setup, models, folder, None, steps=2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    return XRay(setup.stage, Ledger(), base + _allocated(profiler), device="cpu")


def _allocated(profiler) -> int:
    """The highest "Total Allocated" above what was allocated at the beginning, in bytes."""
    from torch._C._profiler import _EventType

    found, todo = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            extra = event.extra_fields
            found.append((event.start_time_ns, extra.total_allocated, extra.alloc_size))
    _, total, size = min(found)
    return max(total for _, total, _ in found) - (total - size)


TIMED = 8
"""Steps that the clock looks at, after one that it does not."""


def _clock(setup: Setup, folder: str) -> XRay:
    """Steps on real tensors, timed phase by phase and nothing else; what is told is the median."""
    from ..metering.callback import MeterCallback
    from ..metering.meter import Meter

    models, meter = models_of(setup), Meter(setup.stage, flops=False, memory=False)
    make = _ppo if setup.stage == "ppo" else _trl
    after, more = _Steps(meter), {"meter": meter}
    callbacks = [after]
    if setup.stage != "ppo":
        callbacks, more = [MeterCallback(meter), after], {}
    make(setup, models, folder, None, steps=1 + TIMED, callbacks=callbacks, **more).train()
    ledger = Ledger()
    for phase, role in meter.seconds:
        took = statistics.median(after.of(phase, role)[1:])
        ledger.add(
            stage=setup.stage,
            phase=phase,
            role=role,
            quantity="seconds",
            value=took,
            source="measured",
        )
    return XRay(setup.stage, ledger, 0, device="cpu")


class _Steps(TrainerCallback):
    """What a meter's clock says after every step."""

    def __init__(self, meter: Any):
        self.meter, self.said = meter, []

    def on_step_end(self, args, state, control, **kwargs):
        self.said.append(dict(self.meter.seconds))

    def of(self, phase: str, role: str) -> list[float]:
        """Seconds of each step."""
        sums = [0.0, *(s.get((phase, role), 0.0) for s in self.said)]
        return [after - before for before, after in pairwise(sums)]


def _widths(setup: Setup) -> set[int]:
    """Last dimensions of logits: the vocabulary and the tiles of TRL's fused head."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as TILE

    vocabulary = setup.config["vocab_size"]
    return {vocabulary, TILE, vocabulary % TILE} - {0}


# --------------------------------------------------------------------------------------- trainers


def _settings(setup: Setup, folder: str, steps: int, passes: int) -> dict[str, Any]:
    """What TRL's configs and our PPOConfig have in common."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setup.batch,
        "max_steps": steps,
        "gradient_accumulation_steps": passes,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }


def _tokenizer() -> Any:
    """The bundled one serves any model: the ids are made up."""
    from ..models.load import load

    return load("tiny").tokenizer


def _step(setup: Setup, account: StepAccount | None) -> Any:
    """Tells the account where a step begins; gives an optimizer of fake tensors its state."""

    class Step(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            if not setup.real:
                prime(account, optimizer, foreach=True if setup.device == "gpu" else None)

        def on_step_begin(self, args, state, control, **kwargs):
            if account is not None:
                account.restart()

    return Step()


def _trl(
    setup: Setup,
    models: dict,
    folder: str,
    account: StepAccount | None,
    steps: int,
    passes: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
):
    """TRL's trainer of the stage, with rows for one step more than it makes."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    passes = passes or setup.gradient_accumulation_steps
    settings = _settings(setup, folder, steps, passes) | {
        "bf16": setup.bf16,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "optim": setup.optim,
        "max_length": setup.length,
        "logging_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    made, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "dpo": (_tokenized(trl.DPOTrainer), trl.DPOConfig),
    }[setup.stage]
    rows = [_row(setup, i) for i in range((steps + 1) * setup.batch * passes)]
    model, more, patch = next(iter(models.values())), {}, nullcontext()
    if "reference" in models:
        more["ref_model"] = models["reference"]
    elif setup.stage == "dpo":  # TRL puts adapters in itself: they are there already
        adapted, model = model, model.get_base_model()
        more["peft_config"] = adapted.peft_config["default"]
        patch = patched(
            sys.modules[trl.DPOTrainer.__module__], "get_peft_model", lambda *_, **__: adapted
        )
    with patch:
        trainer = made(
            model=model,
            args=config(**settings),
            processing_class=_tokenizer(),
            train_dataset=Dataset.from_list(rows),
            callbacks=[_step(setup, account), *callbacks],
            **more,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenized(trainer: type) -> type:
    """A trainer that takes rows whose tokens were made already."""

    class Tokenized(trainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    return Tokenized


def _row(setup: Setup, number: int) -> dict:
    """Ids of one row; where rows are padded, every other one is a token shorter."""
    answer = [TOKEN] * setup.response
    shorter = answer[1:] if setup.padded else answer
    question = [TOKEN] * setup.prompt
    if setup.stage == "sft":
        answer = answer if number % 2 else shorter
        mask = [0] * len(question) + [1] * len(answer)
        return {"input_ids": question + answer, "completion_mask": mask}
    if setup.stage == "reward":
        return {"chosen_ids": question + answer, "rejected_ids": question + shorter}
    if setup.stage == "dpo":
        return {"prompt_ids": question, "chosen_ids": answer, "rejected_ids": shorter}
    return {"input_ids": question if number % 2 or not setup.padded else question[1:]}


def _ppo(
    setup: Setup,
    models: dict,
    folder: str,
    account: StepAccount | None,
    steps: int,
    meter: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
):
    """Our PPOTrainer, with prompts for one iteration more than it makes."""
    from ..metering.meter import NoMeter
    from ..ppo.config import PPOConfig
    from ..ppo.layouts import Roles
    from ..ppo.trainer import PPOTrainer

    class Phases(NoMeter):
        """The trainer tells its meter which phase begins."""

        def phase(self, phase, role="", *_, **__):
            if account is not None:
                account.enter(phase, role)
            return nullcontext()

    class Ready(PPOTrainer):
        """Its roles are made: adapters cannot be put into fake tensors."""

        def build_roles(self, *_):
            return Roles(**{"reward": None, **models})

    class Once(Ready):
        """Its first minibatch stands for all of them, and of that the first passes."""

        def train_minibatch(self, minibatch):
            if not hasattr(self, "told"):
                rows, first = len(minibatch.ids), FEW * setup.batch
                if rows % setup.batch == 0 and rows > first:
                    minibatch = minibatch.rows(torch.arange(first))
                steps = setup.num_ppo_epochs * setup.num_mini_batches
                with account.standing_for(Fraction(steps * rows, len(minibatch.ids))):
                    self.told = super().train_minibatch(minibatch)
            return self.told

    args = PPOConfig(
        **_settings(setup, folder, steps, setup.gradient_accumulation_steps),
        temperature=1.0,
        response_length=setup.response,
        stop_token=None,
        num_ppo_epochs=setup.num_ppo_epochs,
        optim=setup.optim,
        num_mini_batches=setup.num_mini_batches,
        local_rollout_forward_batch_size=setup.local_rollout_forward_batch_size,
    )
    args.bf16 = setup.bf16  # which PPOConfig refuses on a CPU
    rows = [_row(setup, i) for i in range((steps + 1) * args.rollout_batch_size)]
    trainer = (Ready if setup.real else Once)(
        args,
        _tokenizer(),
        models["policy"],
        models["reference"],
        models.get("reward"),
        rows,
        models["value"],
        reward_funcs=print if setup.rule_reward else None,
        meter=meter or Phases("ppo"),
        callbacks=[_step(setup, account), *callbacks],
    )
    if setup.rule_reward:  # a rule reads texts, of which there are none here
        trainer.rewards.score = lambda ids, *_: torch.zeros(len(ids), device=ids.device)
    return trainer
