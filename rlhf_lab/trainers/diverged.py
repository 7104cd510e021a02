"""When training diverges: seen in metrics and weights, an error of one line (PPO has its own in
`ppo/bookkeeping.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from transformers import TrainingArguments

from ..ppo.bookkeeping import Diverged
from ..stages import STAGES

NUMBERS = ("loss", "grad_norm", "eval_loss", "accuracy", "score_offset", "reward", "kl")
"""Figures, logged or final, that are NaN or infinite only where weights are."""


def check_finite(
    stage: str, args: TrainingArguments, figures: Mapping[str, object], when: str = "at the end"
) -> None:
    """Raises `Diverged` where a figure is NaN or infinite."""
    values = {name: figures[name] for name in NUMBERS if name in figures}
    if args.fp16:  # which leaves out a step whose gradients overflowed
        values.pop("grad_norm", None)
    wrong = [
        f"{name}={value:g}"
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if wrong:
        raise diverged(stage, args, f"{', '.join(wrong)} {when}")


def broken_weight(model: object) -> str:
    """The first parameter of a model that is not finite; "" where all are, or it is no model."""
    for name, weight in model.named_parameters() if isinstance(model, nn.Module) else ():
        numbers = getattr(weight.detach(), "scale", weight.detach())  # torchao's rounded ones
        if numbers.is_floating_point() and numbers.numel():
            if not all(math.isfinite(end) for end in numbers.aminmax()):
                return name
    return ""


def diverged(stage: str, args: TrainingArguments, problem: str) -> Diverged:
    """The line: the problem, and what may be why."""
    causes = {
        f"learning_rate={args.learning_rate:g} is too high": True,
        "gradients are not clipped (max_grad_norm)": not args.max_grad_norm,
        "fp16 overflows (bf16 does not)": args.fp16,
    }
    likely = ", ".join(cause for cause, here in causes.items() if here)
    return Diverged(f"{STAGES[stage].title} diverged: {problem}; likely causes: {likely}")
