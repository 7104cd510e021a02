"""When PPO breaks: seen before it is learned from, reported in one line with the likely causes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from . import checkpoint
from .parts import TrainingParts

LARGE = 10
"""A mean score beyond this may be why: rewards of about 1 are what the settings are made for."""


class Diverged(ValueError):
    """Training cannot go on: a loss is no number, or the policy has left the reference far behind.
    The step that showed it was not made."""


def check_loss(trainer: TrainingParts, figures: Mapping[str, float]) -> None:
    """Before an optimizer step: raises `Diverged` where a figure of the loss is not finite."""
    wrong = [f"{name}={value}" for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        raise Diverged(_line(trainer, f"{', '.join(wrong)} in the update"))


def check_kl(trainer: TrainingParts, metrics: Mapping[str, float]) -> None:
    """After a rollout: raises `Diverged` where KL(policy‖reference) per token is above
    `max_kl_per_token` or is no number.

    The weights that made this rollout are then broken, and so is the checkpoint that holds them:
    it is deleted.
    """
    limit, kl = trainer.args.max_kl_per_token, metrics["kl_per_token"]
    if kl <= (math.inf if limit is None else limit):  # not so for NaN
        return
    if trainer.accelerator.is_main_process:
        checkpoint.discard(trainer.args.output_dir, trainer.state.global_step)
    trainer.accelerator.wait_for_everyone()
    raise Diverged(
        _line(
            trainer,
            f"a KL of {kl:.3g} nats per token from the reference (max_kl_per_token={limit})",
            metrics,
        )
    )


def _line(trainer: TrainingParts, problem: str, metrics: Mapping[str, float] | None = None) -> str:
    args, state = trainer.args, trainer.state
    last = dict(metrics or (state.log_history[-1] if state.log_history else {}))
    causes = [
        f"learning_rate={args.learning_rate:g} is too high",
        f"kl_coef={trainer.beta:.3g} is too low",
    ]
    if abs(last.get("score", 0)) > LARGE:
        causes.append(
            f"scores are too large (mean {last['score']:.3g}: normalize_scores, score_clip)"
        )
    if not args.max_grad_norm:
        causes.append("gradients are not clipped (max_grad_norm)")
    if trainer.accelerator.mixed_precision == "fp16":
        causes.append("fp16 overflows (bf16 does not)")
    saved = checkpoint.newest_first(args.output_dir) if args.save_strategy != "no" else []
    good = f"the last good checkpoint is {Path(saved[0])}" if saved else "there is no checkpoint"
    return (
        f"PPO diverged in iteration {state.global_step + 1}: {problem}; likely causes: "
        f"{', '.join(causes)}; {good}"
    )
