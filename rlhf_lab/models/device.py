"""Which device trains, and in which precision: one answer for every stage.

| machine | device | precision |
| --- | --- | --- |
| GPU of compute capability 8 or more (Ampere, 2020) | it | bf16 autocast over fp32 weights |
| older GPU (T4, V100) | it | fp16 autocast: torch only emulates bf16 there |
| Apple's GPU (MPS) | the CPU | fp32: MPS has no float64, which sampling needs |
| no GPU | the CPU | fp32: bf16 crawls on most |
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def compute_dtype() -> torch.dtype:
    """What products are computed in here. torch says of older GPUs, too, that they have bf16."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def device_settings(given: Mapping[str, object]) -> dict[str, bool]:
    """`use_cpu`, `bf16` and `fp16` of this machine, where `given` says nothing of them.

    Raises ValueError for `use_cpu=False` where there is no device but the CPU that can train.
    """
    import torch

    gpu = torch.cuda.is_available()
    if given.get("use_cpu") is False and not gpu:
        apple = torch.backends.mps.is_available()
        why = (
            "Apple's GPU has no float64, which sampling needs" if apple else "there is no GPU here"
        )
        raise ValueError(f"use_cpu=False: {why}; leave it out, and the CPU trains")
    taken = {"use_cpu": not gpu} | dict.fromkeys(("bf16", "fp16"), False)
    if gpu and not given.get("use_cpu") and not given.keys() & {"bf16", "fp16"}:
        taken["fp16" if compute_dtype() is torch.float16 else "bf16"] = True
    return {name: value for name, value in taken.items() if name not in given}


def quiet_checkpointing() -> None:
    """transformers 5.20 renamed gradient_checkpointing; TRL 1.16 and peft still call it that, which
    is nothing to warn a user of."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")


def cannot_compile() -> str:
    """Why inductor cannot compile on this machine, and what to do; "" where it can."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"no C++ compiler ({compiler}) is installed: install it, or leave torch_compile out"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are missing: install python3-dev, or leave torch_compile out"
    return ""
