"""The accelerate config that realises a plan, as YAML for `accelerate launch --config_file`."""

from __future__ import annotations

from collections.abc import Mapping

from ..cost.seconds import product_dtype
from ..cost.setup import Setup

CONFIGS: Mapping[str, tuple[str, str]] = {
    "cpu": ("ddp", "none"),
    "ddp": ("ddp", "none"),
    "zero1": ("zero1", "none"),
    "zero2": ("zero2", "none"),
    "fsdp2": ("fsdp2", "none"),
    "zero3": ("zero3", "none"),
    "zero1-offload": ("zero1", "optimizer"),
    "zero2-offload": ("zero2", "optimizer"),
    "fsdp2-offload": ("fsdp2", "all"),
    "zero3-offload": ("zero3", "all"),
}
"""What `--accelerate` knows: name → sharding and offload of a plan, those that need more of every
device first."""

FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": True,
}

SIZES = (
    *("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters"),
    "stage3_param_persistence_threshold",
)
"""DeepSpeed's that a plan knows, and accelerate's configuration does not."""


def accelerate_config(s: Setup, kind: str = "gpu") -> str:
    """YAML of accelerate's configuration file. `kind`: of the device. Raises ValueError for what it
    cannot run."""
    if kind == "tpu":
        raise ValueError("a TPU is planned only: no accelerate config is written for one")
    if s.tensor_parallel > 1:
        raise ValueError(
            f"tensor_parallel={s.tensor_parallel} is planned only: the lab's trainers do not run it"
        )
    for name in (*SIZES, "fsdp_units"):
        if (value := getattr(s, name)) != getattr(Setup, name):
            raise ValueError(
                f"{name}={value!r} is planned only: accelerate's configuration has no field for it"
            )
    # Autocast beside 16-bit weights would make FSDP2 keep what is trained in fp32; DeepSpeed makes
    # 16-bit weights of a model only where it is told so.
    mixed = s.bf16 or s.fp16 or s.sharding.startswith("zero")
    precision = product_dtype(s) if mixed else "no"
    several = "MULTI_GPU" if s.gpu else "MULTI_CPU"
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO" if s.gpus == 1 else several,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": precision if precision in ("bf16", "fp16") else "no",
        "num_machines": s.nodes,
        "num_processes": s.gpus,
        "rdzv_backend": "static" if s.nodes == 1 else "c10d",
        "same_network": True,
        "use_cpu": not s.gpu,
    }
    if s.sharding.startswith("zero"):
        config |= {"distributed_type": "DEEPSPEED", "deepspeed_config": _deepspeed(s)}
    elif s.sharding == "fsdp2":
        offload = {"fsdp_offload_params": s.offload != "none"}
        # False: checkpointing is the trainer's own gradient_checkpointing.
        fsdp = {**FSDP2, **offload, "fsdp_activation_checkpointing": False}
        # PPO shards by itself, from models that every process has loaded.
        fsdp |= {"fsdp_cpu_ram_efficient_loading": False} if s.stage == "ppo" else {}
        config |= {"distributed_type": "FSDP", "fsdp_config": fsdp}
    import yaml

    return str(yaml.safe_dump(config, sort_keys=False))


def _deepspeed(s: Setup) -> dict[str, object]:
    stage = int(s.sharding[-1])
    made: dict[str, object] = {
        "zero_stage": stage,
        "gradient_accumulation_steps": s.gradient_accumulation_steps,
        "offload_optimizer_device": "none" if s.offload == "none" else "cpu",
        "offload_param_device": "cpu" if s.offload == "all" else "none",
        "zero3_init_flag": stage == 3,
    }
    if s.nodes > 1:  # a launcher on each host, as everywhere; the default wants pdsh
        made |= {"deepspeed_multinode_launcher": "standard"}
    return made | ({"zero3_save_16bit_model": True} if stage == 3 else {})
