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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from .parts import TrainingParts

Saved = dict[str, Any]
"""Part of a checkpoint, as `torch.save` writes it."""
WEIGHTS, REST, STATE = "trained.safetensors", "rest.pt", "trainer_state.json"


def save(trainer: TrainingParts) -> Path:
    """Write a checkpoint of this iteration, and delete what is more than `save_total_limit`."""
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".checkpoint-*.tmp"):  # a process was killed while it wrote
        shutil.rmtree(left)
    final = folder / f"checkpoint-{trainer.state.global_step}"
    draft = folder / f".{final.name}.tmp"
    draft.mkdir()
    save_file(
        {n: p.detach().cpu().contiguous() for n, p in _trained(trainer).items()}, draft / WEIGHTS
    )
    torch.save(_rest(trainer), draft / REST)
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
    return final


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
            line = (str(error).splitlines() or [""])[0]
            problem = f"{path} cannot be read ({type(error).__name__}: {line})"
            if wanted:
                raise ValueError(problem) from None
            print(f"ppo: {problem}: going on from the one before", flush=True)
            continue
        _load(trainer, path, weights, rest, state)
        return int(state.global_step)
    return 0


def _trained(trainer: TrainingParts) -> dict[str, torch.Tensor]:
    return {n: p for n, p in trainer.roles.trained.named_parameters() if p.requires_grad}


def _rest(trainer: TrainingParts) -> Saved:
    scaler = trainer.accelerator.scaler
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "beta": trainer.beta,
        "rewards": trainer.rewards.state_dict(),
        "meter": trainer.meter.state_dict(),
        "seconds": trainer.seconds,
        "random": _random_state(),
    }


def _load(
    trainer: TrainingParts,
    path: Path,
    weights: dict[str, torch.Tensor],
    rest: Saved,
    state: TrainerState,
) -> None:
    here = _trained(trainer)
    shapes = {n: t.shape for n, t in weights.items()}
    if shapes != {n: p.shape for n, p in here.items()}:
        name = min(
            n
            for n in shapes.keys() | here.keys()
            if n not in here or shapes.get(n) != here[n].shape
        )
        raise ValueError(f"{path} is a checkpoint of another model or layout: {name} does not fit")
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(weights[name])
    trainer.optimizer.load_state_dict(rest["optimizer"])
    trainer.scheduler.load_state_dict(rest["scheduler"])
    if rest["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(rest["scaler"])
    trainer.beta, trainer.seconds = rest["beta"], rest["seconds"]
    trainer.rewards.load_state_dict(rest["rewards"])
    trainer.meter.load_state_dict(rest["meter"])
    _set_random_state(rest["random"])
    main = trainer.accelerator.is_main_process
    state.is_local_process_zero, state.is_world_process_zero = main, main
    trainer.state = state


def _random_state() -> Saved:
    """Of every library: ours needs none of them, a reward function may."""
    name, keys, *where = np.random.get_state(legacy=True)
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *where),
        "torch": torch.get_rng_state(),
        "cuda": devices,
    }


def _set_random_state(state: Saved) -> None:
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
