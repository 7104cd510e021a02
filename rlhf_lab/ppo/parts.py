"""What a PPO training is made of: the attributes that the trainer, its bookkeeping, its checkpoints
and the checks for divergence share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..metering.meter import Meter
from .config import PPOConfig
from .executor import Executor
from .layouts import Roles
from .logprobs import AnyModel
from .rewards import RewardFunction, Rewards
from .rollout import Rollout, Samples
from .texts import Row

Metrics = dict[str, float]
STATISTICS = (
    "pg_loss",
    "vf_loss",
    "clipfrac",
    "ratio",
    "approxkl",
    "entropy",
    "vf_clipfrac",
)
"""What is logged of an update: figures of `PPOTrainer.compute_losses`, in its order."""


class TrainingParts:
    """The attributes of a `PPOTrainer`."""

    args: PPOConfig
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Sequence[Row]
    eval_dataset: Sequence[Row] | None
    metric_funcs: Mapping[str, RewardFunction]
    meter: Meter
    executor: Executor
    on_log: Callable[[int, Metrics], None] | None
    on_sample: Callable[[int, list[Row]], None] | None
    should_stop: Callable[[], bool] | None
    accelerator: Accelerator
    stop_token_id: int | None
    roles: Roles
    rewards: Rewards
    model: nn.Module
    """`roles.trained`, as accelerate wraps it"""
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    iterations: int
    """in all"""
    beta: float
    """coefficient of the KL penalty"""
    seconds: float
    """spent in training, without pauses between runs"""

    def sample(self, rows: Sequence[Row], index: Tensor, iteration: int) -> Samples:
        raise NotImplementedError

    def score(self, samples: Samples, rows: Sequence[Row]) -> Rollout:
        raise NotImplementedError

    @property
    def policy(self) -> AnyModel:
        return self.roles.policy

    @property
    def reference(self) -> AnyModel:
        return self.roles.reference

    @property
    def reward_model(self) -> AnyModel | None:
        return self.roles.reward

    @property
    def value_model(self) -> AnyModel:
        return self.roles.value
