"""What a plan stands on: sizes, precision and settings, and which of them are yours."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..display import counted, format_number
from ..stages import ONLINE, STAGES
from .estimate import Estimate

LENGTHS = ("prompt_length", "response_length", "max_length", "max_completion_length")
AMOUNT = ("num_train_epochs", "max_steps", "rows", "total_episodes")
PRECISION = ("dtype", "bf16", "fp16", "load_in_4bit", "load_in_8bit")


@dataclass(frozen=True)
class Assumption:
    """One thing that a plan stands on. `source`: "yours", "default", or what it was read from."""

    what: str
    value: str
    source: str

    def __str__(self) -> str:
        return f"{self.what} {self.value}"


def assumptions(e: Estimate, given: Collection[str], lengths: str = "default") -> list[Assumption]:
    """Of an estimate whose settings `given` are yours. `lengths`: where lengths come from that
    were not given."""

    def one(what: str, value: object, *names: str, otherwise: str = "default") -> Assumption:
        yours = any(name in given for name in names)
        return Assumption(what, str(value), "yours" if yours else otherwise)

    s = e.setup
    noun = "pair" if STAGES[s.stage].answers == 2 else "row"
    found = [one("batch", counted(s.batch, noun), "per_device_train_batch_size")]
    if STAGES[s.stage].trainable:
        n = s.gradient_accumulation_steps
        found.append(one("accumulation", n, "gradient_accumulation_steps"))
    found.append(one("lengths", f"{s.prompt} + {s.response} tokens", *LENGTHS, otherwise=lengths))
    found += [one(*entry) for entry in _training(e)]
    found.append(one("precision", _precision(e), *PRECISION))
    if s.stage in ONLINE and s.mean_response is not None:
        like = "their limit" if s.mean_response >= s.response else f"the answers {lengths}"
        mean = f"of {s.mean_response:.0f} tokens on average"
        found.append(one("responses", mean, "mean_response", otherwise=f"taken as long as {like}"))
    if s.gpus > 1 or s.server_gpus:
        nodes = f" in {counted(s.nodes, 'node')}" * (s.nodes > 1)
        beside = f" and {s.server_gpus} that sample, paid as well" * (s.server_gpus > 0)
        found.append(one("devices", f"{s.gpus}{nodes}{beside}", "gpus", "nodes"))
    if s.gpus > 1:
        offload = f", {s.offload} offloaded" * (s.offload != "none")
        if s.tensor_parallel > 1:
            found.append(one("tensor parallel", s.tensor_parallel, "tensor_parallel"))
        if s.replicas > 1 or s.sharding != "ddp":
            found.append(one("sharding", s.sharding + offload, "sharding", "offload"))
    return found


def _training(e: Estimate) -> Iterator[tuple[str, ...]]:
    """(what, value, names of settings) of what only training has."""
    s = e.setup
    if not STAGES[s.stage].trainable:
        return
    rows = "an unknown number of rows" if s.rows is None else counted(s.rows, "row")
    amount = (
        counted(s.steps, "step") if s.steps else f"{counted(float(s.epochs), 'epoch')} of {rows}"
    )
    yield "length of the run", amount, *AMOUNT
    if s.stage == "ppo":
        yield "PPO epochs", str(s.num_ppo_epochs), "num_ppo_epochs"
        yield "minibatches", str(s.num_mini_batches), "num_mini_batches"
    if STAGES[s.stage].groups:
        yield "responses to a prompt", str(s.samples_per_prompt), "num_generations"
        batches = s.steps_per_generation or s.gradient_accumulation_steps
        yield "batches to a rollout", str(batches), "steps_per_generation", "generation_batch_size"
        yield "passes over a rollout", str(s.num_iterations), "num_iterations"
    if s.teacher:
        yield "teacher", f"{format_number(s.teacher.parameters())} parameters", "teacher_model"
    adapters = "DoRA" if s.use_dora else "LoRA"
    trained = f"{adapters} of rank {s.lora_r}" if s.lora_r else "all weights"
    yield "trained", trained, "lora_r", "use_peft"
    yield "optimizer", s.optim, "optim"
    on = "on" if s.gradient_checkpointing else "off"
    yield "checkpointing", on, "gradient_checkpointing", "activation_checkpointing"


def _precision(e: Estimate) -> str:
    s = e.setup
    autocast = "bf16" if s.bf16 else "fp16" if s.fp16 else ""
    base = ", base in NF4" * s.load_in_4bit + ", base in int8" * s.load_in_8bit
    return f"{s.dtype}{f', {autocast} autocast' if autocast else ''}{base}"


def head(found: list[Assumption]) -> list[str]:
    """A line for each source: "yours: batch 4 rows; …"."""
    by_source: dict[str, list[str]] = {}
    for assumption in found:
        by_source.setdefault(assumption.source, []).append(str(assumption))
    return [f"{source}: {', '.join(parts)}" for source, parts in by_source.items()]
