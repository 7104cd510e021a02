"""Checkpoints of PPO: all that decides how a training goes on, whole or not there at all.

    checkpoint-40/trained.safetensors   the parameters that are trained
    checkpoint-40/rest.pt               optimizer, schedule, β, reward constants, random numbers,
                                        what the meter has measured
    checkpoint-40/trainer_state.json    steps and metrics, as transformers' Trainer writes them

A checkpoint is written under another name, synced to the disk and then renamed: a process that is
killed at any moment leaves the older ones as they were. Sampling and shuffling are functions of
(seed, iteration), so a training that goes on from one gives the numbers that it would have given.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..data.reward_sources import RewardFunction
from ..display import first_line
from ..metering.meter import Meter
from .config import PPOConfig
from .layouts import Roles
from .logprobs import AnyModel
from .losses import StopTokens
from .rewards import Rewards
from .sharding import Replicated
from .texts import Row, Tokenizer

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

Saved = dict[str, Any]
"""Part of a checkpoint, as `torch.save` writes it."""
Metrics = dict[str, float]
WEIGHTS, REST, STATE = "trained.safetensors", "rest.pt", "trainer_state.json"


class TrainingParts:
    """What a PPO training is made of: the attributes that `PPOTrainer`, its bookkeeping and its
    checkpoints share."""

    args: PPOConfig
    tokenizer: Tokenizer
    eval_dataset: Sequence[Row] | None
    metric_funcs: Mapping[str, RewardFunction]
    meter: Meter
    on_log: Callable[[int, Metrics], None] | None
    on_sample: Callable[[int, list[Row]], None] | None
    should_stop: Callable[[], bool] | None
    accelerator: Accelerator
    sharding: Replicated
    stop_token_ids: StopTokens
    roles: Roles
    policy: AnyModel
    reference: AnyModel
    value_model: AnyModel
    reward_model: AnyModel | None
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


def save(trainer: TrainingParts) -> None:
    """Write a checkpoint of this iteration, and delete what is more than `save_total_limit`. All
    processes bring their parts of it, the first one writes."""
    weights, rest = trainer.sharding.weights(_trained(trainer)), _rest(trainer)
    if trainer.accelerator.is_main_process:
        _write(trainer, weights, rest)


def _write(trainer: TrainingParts, weights: Saved, rest: Saved) -> None:
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".checkpoint-*.tmp"):  # a process was killed while it wrote
        shutil.rmtree(left)
    final = folder / f"checkpoint-{trainer.state.global_step}"
    draft = folder / f".{final.name}.tmp"
    draft.mkdir()
    save_file(weights, draft / WEIGHTS)
    torch.save(rest, draft / REST)
    trainer.state.save_to_json(str(draft / STATE))
    for path in (*draft.iterdir(), draft):
        _sync(path)
    if final.exists():  # only one that was passed over, because it was damaged
        shutil.rmtree(final)
    draft.replace(final)
    _sync(folder)
    limit = trainer.args.save_total_limit
    for old in newest_first(folder)[limit:] if limit else ():
        shutil.rmtree(old)


def newest_first(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    folders = [p for p in Path(folder).glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def discard(folder: str | Path, step: int) -> None:
    """Delete the checkpoint of one iteration, where there is one."""
    shutil.rmtree(Path(folder) / f"checkpoint-{step}", ignore_errors=True)


def restore(trainer: TrainingParts, wanted: str | Path | None = None) -> int:
    """Take a trainer to where its newest whole checkpoint was written, or that of the folder
    `wanted`. → the number of iterations done, 0 where there is no checkpoint.

    One that cannot be read is passed over, with a line that says so. Raises ValueError for one of
    another model or layout, and for a `wanted` that cannot be read; the trainer is then unchanged.
    """
    for path in [Path(wanted)] if wanted else newest_first(trainer.args.output_dir):
        try:
            weights = load_file(path / WEIGHTS)
            rest = torch.load(path / REST, map_location="cpu", weights_only=True)
            state = TrainerState.load_from_json(str(path / STATE))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
            problem = f"{path} cannot be read ({type(error).__name__}: {first_line(error)})"
            if wanted:
                raise ValueError(problem) from None
            print(f"ppo: {problem}: going on from the one before", flush=True)
            continue
        _load(trainer, path, weights, rest, state)
        return int(state.global_step)
    return 0


def _trained(trainer: TrainingParts) -> dict[str, nn.Parameter]:
    return {n: p for n, p in trainer.roles.trained.named_parameters() if p.requires_grad}


def _stateful(trainer: TrainingParts) -> dict[str, Stateful]:
    """What has a state of its own beside the optimizer, by its name in `REST`."""
    parts: dict[str, Stateful | None] = {
        "scheduler": trainer.scheduler,
        "scaler": trainer.accelerator.scaler,  # of fp16 only
        "rewards": trainer.rewards,
        "meter": trainer.meter,
    }
    return {name: part for name, part in parts.items() if part is not None}


def _rest(trainer: TrainingParts) -> Saved:
    states: Saved = {name: part.state_dict() for name, part in _stateful(trainer).items()}
    states["optimizer"] = trainer.sharding.optimizer_state(trainer.optimizer)
    numbers = {"beta": trainer.beta, "seconds": trainer.seconds}
    return states | numbers | {"random": random_state()}


def _load(
    trainer: TrainingParts,
    path: Path,
    weights: dict[str, torch.Tensor],
    rest: Saved,
    state: TrainerState,
) -> None:
    here = _trained(trainer)
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in here.items()}  # ZeRO-3's: of the whole
    names = weights.keys() & here.keys()
    wrong = weights.keys() ^ here.keys() | {n for n in names if weights[n].shape != shapes[n]}
    if wrong:
        problem = f"{min(wrong)} does not fit"
        raise ValueError(f"{path} is a checkpoint of another model or layout: {problem}")
    trainer.sharding.load_weights(here, weights)
    if rest.get("optimizer") is not None:
        trainer.sharding.load_optimizer(trainer.optimizer, rest["optimizer"])
    groups = len(trainer.optimizer.param_groups)  # a schedule's lists have an entry for each
    schedule = rest["scheduler"].items()
    rest["scheduler"] = {k: v[:1] * groups if isinstance(v, list) else v for k, v in schedule}
    for name, part in _stateful(trainer).items():
        if rest.get(name) is not None:
            part.load_state_dict(rest[name])
    trainer.beta, trainer.seconds = rest["beta"], rest["seconds"]
    set_random_state(rest["random"])
    main = trainer.accelerator.is_main_process
    state.is_local_process_zero, state.is_world_process_zero = main, main
    trainer.state = state


OF_REWARD = frozenset(
    {"reward_model", "reward_funcs", "rewards", "reward_weights", "normalize_scores"}
)
"""What the constants of the rewards' normalisation depend on."""


def take_settings(trainer: TrainingParts, changed: Collection[str]) -> None:
    """Put a restored trainer's own settings in place of those that its checkpoint brought: the rate
    and the optimizer's; β and the rewards' normalisation where they are `changed`. The optimizer's
    moments stay, and the place in the schedule."""
    args, schedule = trainer.args, trainer.scheduler
    assert isinstance(schedule, LambdaLR)  # as all schedules that PPO takes (`config.CHOICES`)
    groups = trainer.optimizer.param_groups
    schedule.base_lrs = [args.learning_rate] * len(groups)
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [rate * f(schedule.last_epoch) for rate, f in rates]
    for group, rate in zip(groups, schedule._last_lr, strict=True):
        group |= {**args.optimizer()[1], "weight_decay": args.weight_decay}
        group |= {"lr": rate, "initial_lr": args.learning_rate}
    if "kl_coef" in changed or args.kl_target is None:
        trainer.beta = args.kl_coef
    if OF_REWARD & set(changed):
        trainer.rewards.mean = trainer.rewards.std = None


def random_state() -> Saved:
    """Of every library: ours needs none of them, a reward function may."""
    name, keys, *where = np.random.get_state(legacy=True)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *where),
        "torch": torch.get_rng_state(),
        "cuda": devices,
    }


def set_random_state(state: Saved) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
