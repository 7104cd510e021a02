"""A plan before it is trained: compiled or not; on several processes, which config of accelerate,
whether it can be, what it looks like.

launch = launched(lab.plan("sft", "Qwen/Qwen2.5-7B", hardware="h100"), "fsdp2", processes=8)
launch.config                                        # accelerate's YAML
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from .cost.hardware import hardware as find_hardware
from .data.load import Data
from .defaults import BATCH, in_passes
from .display import by_surface, did_you_mean, format_bytes
from .launch.accelerate_config import CONFIGS
from .launch.accelerate_files import (
    accelerate_settings,
    check_batch,
    process_count,
    read_accelerate,
    whole_number,
)
from .launch.processes import once
from .models.device import cannot_compile
from .planning import Plan, predict
from .runs.json_files import JsonObject
from .runs.run import Run
from .stages import STAGES, Setting

ENGINES = "use_vllm", "use_transformers_continuous_batching"
"""Settings that ask for another engine of PPO's rollout."""
REALISED = "sharding", "offload", "tensor_parallel", "gradient_checkpointing", "torch_compile"
"""What accelerate makes of a file by itself; precision and passes are the trainer's."""


@dataclass(frozen=True)
class Launch:
    """What is started: `processes` on `nodes` hosts."""

    how: str
    plan: Plan
    """with the devices and the sharding of the launch"""
    config: str
    """accelerate's YAML; "" where torchrun starts processes on CPUs"""
    processes: int
    nodes: int
    rank: str = "0"
    """this host's number, and the first one's address, HOST[:PORT], where a file says them"""
    address: str = ""
    unread: tuple[str, ...] = ()
    """what a file says that is not planned"""
    planned: bool = True
    """whether the plan is that of the launch; else `unread` says why not"""

    @property
    def sharding(self) -> str:
        """How models are shared out; "" where each process has them whole."""
        return self.how if self.how.startswith(("zero", "fsdp2")) else ""

    @property
    def warning(self) -> str:
        """What the plan says against it, as a line; "" where it fits and all is planned."""
        fits, peak = _peak(self.plan) if self.config and self.planned else (True, "")
        change = "" if fits else _smaller_batch(self.plan) or _to_change(self.plan)
        lines = [] if fits else [f"does not fit: {peak}", change]
        lines += [f"not planned: {', '.join(self.unread)}"] * bool(self.unread)
        return "; ".join(filter(None, lines))


def launched(
    plan: Plan,
    how: str,
    processes: int | None = None,
    nodes: int | None = None,
    *,
    dry: bool = False,
) -> Launch:
    """How a plan is started: `how` is a name of `CONFIGS`, "auto" (the first of them that fits) or
    a file that `accelerate config` wrote; `processes`, `nodes`: as the file says, else all GPUs
    (two on a CPU) of one host. `dry`: it is only looked at, so that neither GPUs nor DeepSpeed must
    be here. Raises ValueError, one line."""
    if how not in CONFIGS and how != "auto":
        return _of_file(plan, Path(how), processes, nodes, dry)
    nodes = nodes or 1
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
    config = f"{_head(whole, how, count)}\n{whole.accelerate_config()}" if gpu else ""
    return Launch(how, whole, config, count, nodes)


def _head(plan: Plan, how: str, processes: int, says: str = "") -> str:
    """A comment: what the planner says of each device."""
    on = f"on {processes} {plan.hardware_name}: {says or _peak(plan)[1]}"
    return f"# {how}: {plan.stage} of {plan.model.name} {on}"


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
        f"{_peak(launch.plan)[1]}; {_smaller_batch(launch.plan) or _to_change(launch.plan)}"
    )


def _of_file(plan: Plan, file: Path, processes: int | None, nodes: int | None, dry: bool) -> Launch:
    """A config that somebody wrote: what it says of processes and machines holds where nothing else
    is said. Raises ValueError, one line."""
    known, head = ", ".join([*CONFIGS, "auto"]), f"--accelerate {file}"
    if not file.is_file():
        hint = did_you_mean(str(file), CONFIGS)
        raise ValueError(f"{head}: {hint}neither {known} nor a file that `accelerate config` wrote")
    try:
        asked = read_accelerate(file)
        count = processes or process_count(asked, file)
        nodes = nodes or whole_number(asked, "num_machines", file) or 1
        found, unread = _planned(plan.stage, {**asked, "num_processes": count or 1}, file)
    except ValueError as error:
        raise ValueError(f"--accelerate {error}") from None
    if asked["distributed_type"] == "DEEPSPEED" and _no_deepspeed(dry):
        raise ValueError(f"{head} needs deepspeed: pip install deepspeed")
    gpu = find_hardware(plan.hardware).kind == "gpu" and not asked.get("use_cpu")
    if count is None and dry:
        raise ValueError(f"{head} says no num_processes: give --processes")
    count = _count(count, nodes, there=gpu and not dry)
    of_run = {**plan.settings, "gpus": count}
    if wrong_batch := check_batch(found, unread, of_run) if plan.stage != "ppo" else []:
        raise ValueError(f"{head}: {wrong_batch[0]}")
    realised = {name: found[name] for name in REALISED if name in found}
    says = "" if found else f"not planned ({unread[0]})"
    devices = {"sharding": "ddp", "offload": "none", "gpus": count, "nodes": nodes}
    whole = replace(plan, settings={**plan.settings, **devices, **realised})
    for wrong, line in _checks(whole, _name_of(whole), count, True, dry):
        if wrong:
            raise ValueError(f"{head}: {line}")
    if not gpu and count > 1:
        raise ValueError(
            f"{head}: accelerate starts several processes on GPUs, and there is none: "
            "--accelerate cpu, or name one: --hardware h100 --dry-run"
        )
    # Which host this is, and which the first, is said where it starts.
    beside = ("machine_rank", "main_process_ip", "main_process_port")
    written = {name: value for name, value in asked.items() if name not in beside}
    written |= {"num_processes": count, "num_machines": nodes}
    import yaml

    config = f"{_head(whole, str(file), count, says)}\n{yaml.safe_dump(written, sort_keys=False)}"
    rank, host, port = (str(asked.get(name) or "") for name in beside)
    address = f"{host}:{port}" if host and port else host
    return Launch(
        str(file), whole, config, count, nodes, rank or "0", address, tuple(unread), not says
    )


def _planned(stage: str, asked: JsonObject, file: Path) -> tuple[dict[str, Setting], list[str]]:
    """What a file says as settings, and what is not planned of it. PPO shards by itself, and does
    nothing beside. Raises ValueError, one line."""
    try:
        found, unread = accelerate_settings(asked, file)
    except ValueError as error:
        if stage == "ppo" or asked.get("distributed_type") not in ("FSDP", "DEEPSPEED"):
            raise
        return {}, [str(error)]
    if tensor := found.get("tensor_parallel"):
        raise ValueError(
            f"{file}: tp_size={tensor} is planned only: the lab's trainers do not run it"
        )
    own = {"gradient_checkpointing", "torch_compile"} & found.keys()
    if stage == "ppo" and (not_done := [*sorted(own), *unread]):
        raise ValueError(f"{file}: PPO does not do this of it: {', '.join(not_done)}")
    return found, unread


def _name_of(plan: Plan) -> str:
    """The name in `CONFIGS` of how a plan is shared out."""
    how = plan.settings["sharding"], plan.settings["offload"]
    return next((name for name in list(CONFIGS)[1:] if CONFIGS[name] == how), how[0])


def _peak(plan: Plan) -> tuple[bool, str]:
    """Whether a plan fits, and what it says of each device, in words."""
    try:
        memory = plan.estimate.hardware.memory
        peak = f"{format_bytes(plan.peak)} of {format_bytes(memory)} on each, as planned"
        return plan.fits, peak
    except ValueError as error:  # it can be trained, and not planned
        return True, f"not planned ({error})"


def _smaller_batch(plan: Plan) -> str:
    """Where nobody gave the batch: the largest that fits, with as many rows a step; or ""."""
    whole = int(plan.settings["per_device_train_batch_size"])
    if BATCH - {"gpus"} & plan.given:
        return ""
    for batch in (whole >> halved for halved in range(1, whole.bit_length())):
        smaller = in_passes(plan.stage, whole, batch)
        if _peak(replace(plan, settings={**plan.settings, **smaller}))[0]:
            pairs = [f"{name}={value}" for name, value in smaller.items()]
            how = by_surface(", ".join(pairs), " ".join(f"--set {pair}" for pair in pairs))
            return f"the batch of {whole} rows is a default, and this one fits: {how}"
    return ""


def _to_change(plan: Plan) -> str:
    """What to ask for changes that make it fit."""
    s, name = plan.settings, plan.model.name
    asked = {key: s[key] for key in ("gpus", "nodes", "sharding", "offload")}
    asked |= {key: s[key] for key in sorted(plan.given - asked.keys() - {"seed"}) if key in s}
    more = {**plan.model.others, **asked}
    python = ", ".join(f"{key}={value!r}" for key, value in more.items())
    words = ["rlhf-lab", "plan", plan.stage, "--model", name, "--hardware", plan.hardware_name]
    for key, value in plan.model.others.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    for key, value in asked.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else repr(value)}"]
    made = f"lab.plan({plan.stage!r}, {name!r}, hardware={plan.hardware_name!r}, {python})"
    return f"what to change: {by_surface(f'{made}.cheaper()', shlex.join([*words, '--cheaper']))}"


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
