"""Which way models are kept over processes: as `accelerate launch` has asked for it."""

from __future__ import annotations

import os
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .config import PPOConfig
from .sharding import FullyShard, Replicated
from .zero import Zero

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
"""The variables by which `accelerate launch` asks for them."""


def make_sharding(args: PPOConfig) -> Replicated:
    """How models are kept, as `accelerate launch` has asked for it, with the accelerator that it
    needs. Raises ValueError, one line, for what PPO cannot do so."""

    def asked(variable: str) -> bool:
        return os.environ.get(variable, "false").lower() == "true"

    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if asked(DEEPSPEED):
        # Forget what transformers' arguments have told accelerate: DeepSpeed is ours to start.
        AcceleratorState._reset_state(reset_partial_state=True)
        with patch.dict(os.environ, {DEEPSPEED: "false"}):  # which makes 16-bit models itself
            return Zero(Accelerator(cpu=args.use_cpu), args)
    if not asked(FSDP):
        return Replicated(Accelerator(mixed_precision=precision, cpu=args.use_cpu), args)
    if asked("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("PPO under FSDP2 keeps weights on the devices: no fsdp_offload_params")
    with patch.dict(os.environ, {FSDP: "false"}):  # accelerate would shard by itself, on GPUs only
        accelerator = Accelerator(mixed_precision=precision, cpu=args.use_cpu)
    return (FullyShard if accelerator.num_processes > 1 else Replicated)(accelerator, args)
