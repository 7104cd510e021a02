"""A plan before it is trained: compiled or not; on several processes, which config of accelerate,
whether it can be, what it looks like.

launch = launched(lab.plan("sft", "Qwen/Qwen2.5-7B", hardware="h100"), "fsdp2", processes=8)
launch.config                                        # accelerate's YAML
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from .cost.hardware import hardware as find_hardware
from .data.load import Data
from .display import did_you_mean, format_bytes
from .launch.accelerate_config import CONFIGS
from .launch.processes import once
from .models.device import cannot_compile
from .planning import Plan, predict
from .runs.run import Run
from .runs.yaml_files import read_names
from .stages import STAGES

ENGINES = "use_vllm", "use_transformers_continuous_batching"
"""Settings that ask for another engine of PPO's rollout."""


@dataclass(frozen=True)
class Launch:
    """What is started: `processes` (None: as the file says) on `nodes` hosts."""

    how: str
    plan: Plan
    """with the devices and the sharding of the launch"""
    config: str
    """accelerate's YAML; "" where torchrun starts processes on CPUs"""
    processes: int | None
    nodes: int

    @property
    def sharding(self) -> str:
        """How models are shared out; "" where each process has them whole."""
        return self.how if self.how.startswith(("zero", "fsdp2")) else ""


def launched(
    plan: Plan, how: str, processes: int | None = None, nodes: int = 1, *, dry: bool = False
) -> Launch:
    """How a plan is started: `how` is a name of `CONFIGS`, "auto" (the first of them that fits) or
    a file that `accelerate config` wrote; `processes`: all GPUs, two on a CPU. `dry`: it is only
    looked at, so that neither GPUs nor DeepSpeed must be here. Raises ValueError, one line."""
    if how not in CONFIGS and how != "auto":
        return _of_file(plan, Path(how), processes, nodes, dry)
    gpu = how != "cpu" and find_hardware(plan.hardware).kind == "gpu"
    count = _count(processes, nodes, there=gpu and not dry)
    if how == "auto":
        return _smallest(plan, count, nodes, dry, gpu)
    sharding, offload = CONFIGS[how]
    settings = {"gpus": count, "nodes": nodes, "sharding": sharding, "offload": offload}
    settings = settings if gpu or sharding != "ddp" else {"gpus": count}
    whole = replace(plan, settings={**plan.settings, **settings})
    for wrong, line in _checks(plan, how, count, gpu, dry):
        if wrong:
            raise ValueError(f"--accelerate {how}: {line}")
    head = f"# {how}: {plan.stage} of {plan.model.name} on {count} {plan.hardware_name}"
    config = f"{head}: {_peak(whole)}\n{whole.accelerate_config()}" if gpu else ""
    return Launch(how, whole, config, count, nodes)


def _count(processes: int | None, nodes: int, there: bool) -> int:
    """How many processes; `there`: the GPUs of this machine are counted. Raises ValueError where
    there are not as many devices."""
    here = 0
    if there:
        import torch

        here = torch.cuda.device_count() * nodes
        if (processes or 1) > here:
            raise ValueError(
                f"--processes {processes or 1}: there are {here} GPUs here, and each needs one"
            )
    count = processes or here or 2
    if count % nodes:
        raise ValueError(f"--processes {count}: they do not split into --nodes {nodes}")
    return count


def _no_deepspeed(dry: bool) -> bool:
    return not dry and find_spec("deepspeed") is None


def _checks(
    plan: Plan, how: str, processes: int, gpu: bool, dry: bool
) -> Iterator[tuple[bool, str]]:
    """→ (whether it cannot be, why)"""
    sharded, zero = how not in ("cpu", "ddp"), how.startswith("zero")
    ppo, small = plan.stage == "ppo", bool(plan.settings.get("load_in_4bit"))
    here = gpu or ppo and not how.endswith("offload")
    only = "cpu and ddp train on CPUs, and PPO under zero1, zero2, zero3 and fsdp2"
    compiled = sharded and bool(plan.settings.get("torch_compile"))
    yield compiled, "shards models, whose layers are not compiled: leave torch_compile out"
    yield sharded and not here, f"shards GPUs, and there is none; {only}"
    yield ppo and how == "fsdp2-offload", "PPO's weights stay on the devices: choose zero3-offload"
    split = how[:5] in ("zero3", "fsdp2")
    yield ppo and split and small, "shards no weights in 4 bits: choose zero2"
    engine = next(filter(plan.settings.get, ENGINES), "")
    yield ppo and split and bool(engine), f"{engine} samples with whole weights: leave it out"
    split = split and not ppo
    yield split and bool(plan.lora), "shards whole models, not yet adapters: choose zero2"
    yield zero and _no_deepspeed(dry), "needs DeepSpeed: pip install deepspeed, or choose fsdp2"
    s = plan.settings
    passes = s.get("steps_per_generation") or s.get("gradient_accumulation_steps", 1)
    rows, group = s.get("per_device_train_batch_size", 8) * passes * processes, 1
    if STAGES[plan.stage].groups:
        group = s.get("num_generations", 2)
    odd = f"{rows} responses ({processes} processes) do not split into num_generations={group}"
    yield rows % group != 0, odd


def _smallest(plan: Plan, processes: int, nodes: int, dry: bool, gpu: bool) -> Launch:
    """The first config that trains the stage here, and fits. Raises ValueError: none does."""
    if not gpu:
        return launched(plan, "cpu", processes, nodes, dry=dry)
    launch = None
    for how in list(CONFIGS)[1:]:
        try:
            launch = launched(plan, how, processes, nodes, dry=dry)
        except ValueError:
            if launch is None:  # what ddp cannot, none can
                raise
            continue
        if launch.plan.fits:
            return launch
    assert launch is not None
    raise ValueError(
        f"--accelerate auto: nothing fits on {processes} {plan.hardware_name}: with {launch.how} "
        f"{_peak(launch.plan)}; what to change: rlhf-lab plan {plan.stage} --cheaper"
    )


def _of_file(plan: Plan, file: Path, processes: int | None, nodes: int, dry: bool) -> Launch:
    """A config that somebody wrote. Raises ValueError, one line."""
    known, head = ", ".join([*CONFIGS, "auto"]), f"--accelerate {file}"
    if not file.is_file():
        hint = did_you_mean(str(file), CONFIGS)
        raise ValueError(f"{head}: {hint}neither {known} nor a file that `accelerate config` wrote")
    try:
        asked = read_names(file)
    except ValueError as error:
        raise ValueError(f"--accelerate {error}") from None
    kind = asked.get("distributed_type")
    if kind == "DEEPSPEED" and _no_deepspeed(dry):
        raise ValueError(f"{head} needs deepspeed: pip install deepspeed")
    second = kind == "FSDP" and asked.get("fsdp_config", {}).get("fsdp_version") == 2
    if kind == "FSDP" and plan.stage == "ppo" and not second:
        raise ValueError(f"{head}: PPO takes FSDP with fsdp_version: 2 alone, or DeepSpeed")
    return Launch(str(file), plan, file.read_text("utf-8"), processes, nodes)


def _peak(plan: Plan) -> str:
    memory = plan.estimate.hardware.memory
    return f"{format_bytes(plan.peak)} of {format_bytes(memory)} on each, as planned"


def decided(plan: Plan, data: Data, started: Path | None) -> Plan:
    """A plan whose `torch_compile` is no longer "auto": as in the run that was `started` and goes
    on, else as is predicted to be faster."""
    if plan.settings.get("torch_compile") != "auto":
        return plan

    def make() -> tuple[bool, str]:
        there = Run(started).config if started and (started / "run.json").is_file() else {}
        before = there.get("settings", {}).get("torch_compile")
        if before is not None:
            return before, ""
        if why := cannot_compile():
            return False, f"torch_compile=auto is off: {why}"
        try:
            return predict(plan, data).compiles
        except ValueError as error:
            return False, f"torch_compile=auto is off: no prediction ({error})"

    on, line = once(make)
    notes = (*plan.notes, *filter(None, [line]))
    return replace(plan, settings={**plan.settings, "torch_compile": on}, notes=notes)
