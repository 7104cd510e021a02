"""The settings of PPO, under the names of TRL 1.12's PPOConfig: code written for it moves over."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from ..display import check_choice
from ..launch.processes import load_whole
from ..models.compiled_later import compiled_later
from ..settings import WITHOUT_EFFECT, check_value

with compiled_later():  # these import peft, and with it bitsandbytes
    from transformers import TrainingArguments

KL_ESTIMATORS = (
    "The estimate of the KL in the reward: k1, whose gradient is the KL's own. Those of k2 and k3 "
    "point elsewhere: between random policies that lie near each other their mean cosine with it "
    "is .2 and .0 (rule 19)."
)
LAYOUTS = ("four", "shared", "adapters")
"""What `layouts.py` can make of the roles."""
NOT_HONOURED = WITHOUT_EFFECT["ppo"] | {"torch_compile_backend", "torch_compile_mode"}
"""transformers' settings that would change what is trained or saved, and that PPO does not know."""
OF_A_TRAINER = ("schedule_free", "lomo", "adalomo", "galore", "apollo")
"""How optimizers begin that transformers' Trainer does more for than to call `step`."""
T = TypeVar("T")


def setting(default: T, help: str) -> T:
    """A field of `PPOConfig`; `help` is where transformers' HfArgumentParser looks for it."""
    made: T = field(default=default, metadata={"help": help})
    return made


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `PPOTrainer`; the rest comes from transformers' TrainingArguments.

    A rollout batch is `per_device_train_batch_size` × `gradient_accumulation_steps` × processes
    responses. It is cut into `num_mini_batches`, and each minibatch makes one optimizer step,
    whatever number of passes it takes. KL is in nats.
    """

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "transformers_continuous_batching_config",
    ]
    output_dir: str = setting("runs/ppo", "Folder of the run.")
    learning_rate: float = setting(3e-6, "Peak rate; annealed to 0.")
    adam_epsilon: float = setting(1e-5, "Adam's ε (rule 17: as in OpenAI's code).")
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0 is off.")
    total_episodes: int | None = setting(None, "Responses in all; else from num_train_epochs.")
    save_steps: float = setting(10, "Iterations between checkpoints; below 1 a share of all.")
    save_total_limit: int | None = setting(2, "Checkpoints to keep.")
    layout: str = setting("four", "Who plays the roles: four models, shared, adapters.")
    num_ppo_epochs: int = setting(4, "Passes over each rollout batch.")
    num_mini_batches: int = setting(1, "Optimizer steps per pass.")
    local_rollout_forward_batch_size: int = setting(
        64, "Responses per scoring pass: bounds the logits held at once."
    )
    response_length: int = setting(53, "Most tokens of a response.")
    stop_token: str | None = setting(
        "eos", "'eos': where the model's turns end; None: at stop_token_id, or never."
    )
    stop_token_id: int | None = setting(None, "Another stop token.")
    ds3_gather_for_generation: bool = setting(
        True, "Sharded: gather all weights once a rollout; else layer by layer for every token."
    )
    temperature: float = setting(0.7, "Sampling temperature, above 0.")
    missing_eos_penalty: float | None = setting(
        None, "Subtracted from the score of a response that never stops."
    )
    missing_eos_score: float | None = setting(None, "The score of a response that never stops.")
    reward_weights: list[float] | None = setting(
        None, "One for each source: reward model, then reward_funcs."
    )
    normalize_scores: bool = setting(False, "Scores of mean 0, variance 1 at the start (rule 16).")
    score_clip: float | None = setting(None, "Scores are clipped to ± this, after normalisation.")
    kl_coef: float = setting(0.05, "β of the per-token KL penalty.")
    kl_estimator: str = setting("k1", KL_ESTIMATORS)
    kl_target: float | None = setting(None, "Nats per response the adaptive controller aims at.")
    max_kl_per_token: float | None = setting(5.0, "Nats; further out PPO has diverged and ends.")
    early_stop_kl: float | None = setting(None, "An update ends where approxkl is above this.")
    kl_horizon: int = setting(10_000, "Episodes for β to adapt (rule 18).")
    whiten_rewards: bool = setting(False, "Scale rewards, keep the mean.")
    gamma: float = setting(1.0, "Discount per token.")
    lam: float = setting(0.95, "λ of GAE.")
    cliprange: float = setting(0.2, "Policy clip range.")
    cliprange_value: float = setting(0.2, "Value clip range.")
    vf_coef: float = setting(0.1, "Weight of the value loss.")
    use_vllm: bool = setting(False, "vLLM samples the rollouts, in this process.")
    vllm_gpu_memory_utilization: float = setting(
        0.3, "vLLM's share of a GPU's memory; on a CPU of what is free, for keys and values."
    )
    vllm_max_model_length: int | None = setting(
        None, "Most tokens of prompt and response that vLLM takes; else the model's own."
    )
    use_transformers_continuous_batching: bool = setting(
        False, "transformers' continuous batching samples the rollouts."
    )
    transformers_continuous_batching_config: dict[str, object] | str | None = setting(
        None, "Settings of its ContinuousBatchingConfig, as a dictionary or JSON."
    )
    vllm_importance_sampling_clip_max: float = setting(
        3.0, "Of samples of another engine a token counts π/π_engine, at most this (rule 21)."
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in NOT_HONOURED and getattr(self, f.name) not in (f.default, False, None):
                raise ValueError(f"{f.name} has no effect in PPO: leave it out")
        # transformers refuses bf16 on a CPU unless it is told that this is meant.
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        # transformers would have accelerate compile whole models.
        compiled, self.torch_compile = self.torch_compile, False
        if compiled not in (True, False):
            raise ValueError(
                f"torch_compile={compiled!r}: here True or False (a plan weighs 'auto')"
            )
        TrainingArguments.__post_init__(self)
        self.torch_compile = compiled
        load_whole()  # PPO shards models itself
        if (optim := str(getattr(self.optim, "value", self.optim))).startswith(OF_A_TRAINER):
            raise ValueError(
                f"optim={optim!r} needs a trainer that switches it between training and the rest, "
                "or hands it the model, which PPO's loop does not: choose another"
            )
        if self.rollout_batch_size % self.num_mini_batches:
            raise ValueError(
                f"a rollout batch of {self.rollout_batch_size} does not split into "
                f"num_mini_batches={self.num_mini_batches}"
            )
        for name, value in vars(self).items():
            check_value("ppo", name, value)
        check_choice("layout", self.layout, LAYOUTS)
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError("use_vllm and use_transformers_continuous_batching: choose one")

    @property
    def engine(self) -> str:
        """The setting that asks for another engine than our own loop; "" where none does."""
        engines = ("use_vllm", "use_transformers_continuous_batching")
        return next((name for name in engines if getattr(self, name)), "")

    def iterations(self, prompts: int, episodes: int) -> int:
        """How many there are for a data set of so many prompts, of so many episodes each."""
        if self.max_steps > 0:
            return self.max_steps
        total = self.total_episodes or self.num_train_epochs * prompts
        return max(1, -(-int(total) // episodes))

    def optimizer(self) -> tuple[Any, dict[str, Any]]:
        """Class and arguments of the optimizer (`optim`), as every trainer of transformers' has
        them; the usual ones without importing its Trainer, and with it datasets and pandas."""
        if self.optim_args or self.optim not in ("adamw_torch", "adamw_torch_fused"):
            from transformers import Trainer

            return Trainer.get_optimizer_cls_and_kwargs(self)
        fused = {"fused": True} if self.optim == "adamw_torch_fused" else {}
        betas = (self.adam_beta1, self.adam_beta2)
        return AdamW, {"lr": self.learning_rate, "betas": betas, "eps": self.adam_epsilon, **fused}

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
        raise ValueError(
            "the tokenizer needs a pad token that is not eos: how would a response end?"
        )
