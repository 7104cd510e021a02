"""The meter as a transformers callback, for any TRL or transformers trainer.

    costs = lab.MeterCallback("dpo")
    trainer = DPOTrainer(..., callbacks=[costs])
    trainer.train()
    costs.ledger

A training step is three phases: *forward* is `compute_loss`, *backward* is accelerate's
`backward`, *optimizer* all after the last backward of a step (clipping, the step, the schedule,
gradients set to none). A reference's pass, which DPO makes inside `compute_loss`, is a phase of
its own, and so is evaluation. Trainers that sample (RLOO, GRPO) have two or three more before the
step: *rollout*, *old_logprobs* and *reference*; a reward function measures itself. A *teacher*
passes inside of the loss.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..display import check_choice
from ..runs.ledger import Ledger
from ..stages import STAGES
from .meter import Meter, NoMeter
from .model_memory import ModelInputs, call_shape

if TYPE_CHECKING:
    from transformers import Trainer

FromTrainer: TypeAlias = Any
"""A trainer of transformers' or TRL's, and what it tells its callbacks."""
Method: TypeAlias = Callable[..., object]
Batch: TypeAlias = Mapping[str, Tensor]
Samples: TypeAlias = list[list[int]] | tuple[list[list[int]], ...]
"""Token ids of responses; GRPO's with their logprobs."""


class MeterCallback(TrainerCallback):
    """Meters the trainer it is given to. `meter`: a stage's name, or a meter of it; `role`: whose
    the trained model is, by default the first of the stage's. `ledger`: what was measured so far.
    """

    def __init__(self, meter: Meter | str, role: str = "") -> None:
        if isinstance(meter, str):
            check_choice("meter", meter, STAGES)
            meter = Meter(meter)
        self.meter = meter
        self.role = role or STAGES[self.meter.stage].roles[0]
        self._undo: list[Callable[[], None]] = []
        self._optimizer_block: AbstractContextManager[None] | None = None  # while it is open
        self._in_loss = False
        self._shape: tuple[int, ...] = ()  # of the batch at hand, and its tokens
        self._tokens = 0

    @property
    def ledger(self) -> Ledger:
        return self.meter.ledger()

    # -------------------------------------------------------------------- what the trainer calls

    def on_train_begin(self, *_: FromTrainer, **kwargs: FromTrainer) -> None:
        self.close()  # a run that was interrupted may have left something open
        if isinstance(self.meter, NoMeter):
            return
        self.meter.watch(self.role, kwargs["model"], kwargs.get("optimizer"))
        trainer = _running_trainer()
        if trainer is None:
            raise ValueError("MeterCallback works inside a transformers Trainer's train() only")
        self._replace(trainer, "compute_loss", self._loss)
        self._replace(trainer, "evaluate", self._evaluate)
        self._replace(trainer.accelerator, "backward", functools.partial(self._backward, trainer))
        if hasattr(trainer, "ref_model"):
            if trainer.ref_model is not None:
                self.meter.watch("reference", trainer.ref_model)
            # With adapters the reference is the policy itself, with adapters off and no gradients.
            for scoring in filter(None, (trainer.ref_model, trainer.model)):
                frozen = scoring is trainer.ref_model
                self._hook_reference(scoring, "reference" if frozen else "")
        stored = getattr(trainer, "answers", None) is not None  # nothing is sampled
        if hasattr(trainer, "_generate_single_turn") and not stored:
            rollout = functools.partial(self._rollout, trainer.model)
            self._replace(trainer, "_generate_single_turn", rollout)
            if hasattr(trainer, "_get_per_token_logps_and_entropies"):
                self._replace(trainer, "_get_per_token_logps_and_entropies", self._logprobs)
        if teacher := getattr(trainer, "teacher_model", None):
            self.meter.watch("teacher", teacher)
            self._hook_reference(trainer.accelerator.unwrap_model(teacher).base_model, "teacher")

    def on_step_end(self, *_: FromTrainer, **__: FromTrainer) -> None:
        self._end_step()

    def on_train_end(self, *_: FromTrainer, **__: FromTrainer) -> None:
        self.close()

    def close(self) -> None:
        """Leave the trainer as it was."""
        self._optimizer_block, self._in_loss = None, False
        self.meter.close()
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------------------- the phases

    def _replace(self, owner: object, name: str, around: Callable[..., object]) -> None:
        """Run `around(original, …)` in place of a method of one object."""
        original = getattr(owner, name)
        wrapped = functools.wraps(original)(functools.partial(around, original))
        setattr(owner, name, wrapped)
        self._undo.append(lambda: delattr(owner, name))

    def _loss(
        self, original: Method, model: nn.Module, inputs: Batch, *args: object, **kwargs: object
    ) -> object:
        if not model.training:
            return original(model, inputs, *args, **kwargs)
        self._end_step()
        self.meter.hold(*inputs.values())
        rows = concat_prompt_completion(inputs) if "completion_ids" in inputs else inputs
        self._shape, self._tokens = batch_shape(model, rows), count_tokens(rows)
        self._in_loss = True
        try:
            with self.meter.phase("forward", self.role, self._shape, self._tokens):
                return original(model, inputs, *args, **kwargs)
        finally:
            self._in_loss = False

    def _backward(
        self, trainer: Trainer, original: Method, *args: object, **kwargs: object
    ) -> None:
        with self.meter.phase("backward", self.role, self._shape, self._tokens):
            original(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            self._optimizer_block = self.meter.phase("optimizer", self.role)
            self._optimizer_block.__enter__()

    def _end_step(self) -> None:
        if self._optimizer_block is not None:
            self._optimizer_block.__exit__(None, None, None)
            self._optimizer_block = None

    def _rollout(
        self, model: nn.Module, original: Callable[..., Samples], *args: object, **kwargs: object
    ) -> Samples:
        """Sampling: every call of the model is a pass of its own."""
        inner = getattr(model, "get_base_model", lambda: model)()  # below peft's wrapper
        with self.meter.phase("rollout", self.role, calls=inner):
            out = original(*args, **kwargs)
        ids = out[0] if isinstance(out, tuple) else out
        self.meter.count("rollout", self.role, sum(map(len, ids)))
        return out

    def _logprobs(
        self,
        original: Method,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        logits_to_keep: int,
        *args: object,
        **kwargs: object,
    ) -> object:
        """A scoring pass between sampling and the step: the policy's, or the reference's.

        ids, mask: (b, t), of which the last `logits_to_keep` are the response.
        """
        if self._in_loss:
            return original(model, ids, mask, logits_to_keep, *args, **kwargs)
        policy = model.training and not adapters_off(model)
        at = ("old_logprobs", self.role) if policy else ("reference", "reference")
        response_mask = mask.clone()
        response_mask[:, :-logits_to_keep] = 0
        shape = batch_shape(model, {"input_ids": ids, "completion_mask": response_mask})
        self.meter.hold(ids, mask)
        with self.meter.phase(*at, shape, int(mask.sum())):
            return original(model, ids, mask, logits_to_keep, *args, **kwargs)

    def _evaluate(self, original: Method, *args: object, **kwargs: object) -> object:
        with self.meter.phase("evaluation"):
            return original(*args, **kwargs)

    def _hook_reference(self, model: nn.Module, frozen: str) -> None:
        """Passes without gradients inside a loss, between a hook before and one after, are a phase
        of the frozen model's role, or of "": the policy makes one too, as the reference with its
        adapters off, or where the loss wants its KL (KTO)."""
        open_blocks: list[AbstractContextManager[None]] = []

        def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
            if self._in_loss and not torch.is_grad_enabled():
                shape = batch_shape(module, kwargs, args)
                role = frozen or ("reference" if adapters_off(module) else self.role)
                phase = frozen or "reference"
                open_blocks.append(self.meter.phase(phase, role, shape, self._tokens))
                open_blocks[-1].__enter__()

        def after(module: nn.Module, args: object, output: object) -> None:
            if open_blocks:
                open_blocks.pop().__exit__(None, None, None)

        for hook in (
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ):
            self._undo.append(hook.remove)


def batch_shape(
    model: nn.Module, inputs: ModelInputs, args: Sequence[Tensor] = ()
) -> tuple[int, ...]:
    """`call_shape` of inputs (b, t), and the rows that TRL's fused head scores: on a GPU only those
    with a label."""
    shape = call_shape(model, args, inputs)
    labels = inputs.get("labels")
    labelled = (labels != -100) if labels is not None else inputs.get("completion_mask")
    if labelled is None or not labelled.is_cuda:
        return shape
    return (*shape, int(labelled[:, 1:].sum()))


def concat_prompt_completion(inputs: Batch) -> dict[str, Tensor]:
    """Prompts (b, t) and sampled completions (b, u) as the rows of the model, (b, t + u)."""
    masks = inputs["prompt_mask"], inputs["completion_mask"]
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        "attention_mask": torch.cat(masks, 1),
        "completion_mask": torch.cat([torch.zeros_like(masks[0]), masks[1]], 1),
    }


def adapters_off(model: nn.Module) -> bool:
    """Whether a model has adapters that do nothing now (whole models have a method so named)."""
    switches = (getattr(m, "disable_adapters", None) for m in model.modules())
    return next((s for s in switches if isinstance(s, bool)), False)


def count_tokens(inputs: Batch) -> int:
    """Tokens of a batch that are not padding."""
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()


def _running_trainer() -> FromTrainer:
    """The trainer that calls this callback, from the call stack: callbacks are not given it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(caller, "compute_loss") and hasattr(caller, "accelerator"):
            return caller
        frame = frame.f_back
    return None
