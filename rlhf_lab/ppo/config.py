"""The settings of PPO, under the names of TRL 1.12's PPOConfig: code written for it moves over."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

LAYOUTS = ("four", "shared", "adapters")
"""What `layouts.py` can make of the roles."""


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `PPOTrainer`; the rest comes from transformers' TrainingArguments.

    A rollout batch is `per_device_train_batch_size` × `gradient_accumulation_steps` × processes
    responses. It is cut into `num_mini_batches`, and each minibatch makes one optimizer step,
    whatever number of passes it takes. KL is in nats.
    """

    output_dir: str = field(default="runs/ppo", metadata={"help": "Folder of the run."})
    learning_rate: float = field(default=3e-6, metadata={"help": "Peak rate; annealed to 0."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Adam's ε (rule 17)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0 is off."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Responses to sample in all; else from num_train_epochs."}
    )
    save_steps: float = field(
        default=10, metadata={"help": "Iterations between checkpoints; below 1 a share of all."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    layout: str = field(
        default="four", metadata={"help": "Who plays the roles: four models, shared, adapters."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout batch."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps per pass."})
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Responses per scoring pass: bounds the logits held at once."}
    )
    response_length: int = field(default=53, metadata={"help": "Most tokens of a response."})
    stop_token: str | None = field(
        default="eos", metadata={"help": "'eos', or None to stop at stop_token_id or never."}
    )
    stop_token_id: int | None = field(default=None, metadata={"help": "Another stop token."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature, above 0."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a response that never stops."}
    )
    missing_eos_score: float | None = field(
        default=None, metadata={"help": "Replaces the score of a response that never stops."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each source: reward model, then reward_funcs."}
    )
    normalize_scores: bool = field(
        default=False, metadata={"help": "Scores of mean 0, variance 1 at the start (rule 16)."}
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Scores are clipped to ± this, after normalisation."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "β of the per-token KL penalty."})
    kl_estimator: str = field(default="k1", metadata={"help": "k1, k2 or k3 (rule 19)."})
    kl_target: float | None = field(
        default=None, metadata={"help": "Nats per response the adaptive controller aims at."}
    )
    max_kl_per_token: float | None = field(
        default=5.0,
        metadata={"help": "Nats; further out the policy has diverged: training ends."},
    )
    early_stop_kl: float | None = field(
        default=None, metadata={"help": "An iteration's update ends where approxkl is above this."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes for β to adapt (rule 18)."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards, keep the mean."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "λ of GAE."})
    cliprange: float = field(default=0.2, metadata={"help": "Policy clip range."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Value clip range."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})

    def __post_init__(self) -> None:
        TrainingArguments.__post_init__(self)
        # TrainingArguments guesses bf16 from the hardware only when asked: on a CPU it crawls.
        if not torch.cuda.is_available():
            self.use_cpu, self.bf16, self.fp16 = True, False, False
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        for wrong, line in (
            (
                batch % self.num_mini_batches,
                f"a rollout batch of {batch} does not split into "
                f"num_mini_batches={self.num_mini_batches}",
            ),
            (self.temperature <= 0, f"temperature must be above 0, got {self.temperature}"),
            (
                self.score_clip is not None and not self.score_clip > 0,
                f"score_clip must be above 0, got {self.score_clip}",
            ),
            (
                self.early_stop_kl is not None and not self.early_stop_kl > 0,
                f"early_stop_kl must be above 0, got {self.early_stop_kl}",
            ),
            (
                self.max_kl_per_token is not None and not self.max_kl_per_token > 0,
                f"max_kl_per_token must be above 0, or None, got {self.max_kl_per_token}",
            ),
            (
                self.save_total_limit is not None and self.save_total_limit < 1,
                f"save_total_limit must be 1 or more, or None, got {self.save_total_limit}",
            ),
            (self.response_length < 1, f"response_length must be ≥ 1, got {self.response_length}"),
            (
                self.kl_estimator not in ("k1", "k2", "k3"),
                f"kl_estimator {self.kl_estimator!r}: choose k1, k2 or k3",
            ),
            (
                self.layout not in LAYOUTS,
                f"layout {self.layout!r}: choose from {', '.join(LAYOUTS)}",
            ),
            (
                self.stop_token not in (None, "eos"),
                f"stop_token {self.stop_token!r}: choose 'eos' or None",
            ),
        ):
            if wrong:
                raise ValueError(line)

    def iterations(self, prompts: int, episodes: int) -> int:
        """How many there are for a data set of so many prompts, of so many episodes each."""
        if self.max_steps > 0:
            return self.max_steps
        total = self.total_episodes or self.num_train_epochs * prompts
        return max(1, -(-int(total) // episodes))

    @property
    def rollout_batch_size(self) -> int:
        """Responses of one process in one iteration."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def check_arguments(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, train: Sized, evaluation: Sized | None
) -> None:
    """Raises ValueError, one line, for data and a tokenizer that PPO cannot train with."""
    if len(train) == 0:
        raise ValueError("train_dataset has no prompts")
    if args.eval_strategy != "no" and not evaluation:
        raise ValueError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError("the tokenizer's pad token must exist and not be eos (rule 6)")
