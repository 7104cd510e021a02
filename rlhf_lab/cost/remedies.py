"""What to change so that a plan fits, or costs less: each change is planned, nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ..display import counted
from .caveats import of_main_memory
from .estimate import Estimate, Settings
from .hardware import nodes_for
from .optimizers import OPTIMIZERS
from .setup import Setup

WORTH = 0.01
"""A change is named when it saves at least this share of memory, time or money."""


def less_or_more(saved: float, words: str, less: str = "less", more: str = "more") -> str:
    """What a change saves, `words` being its size, without a sign: "3 GiB less", "2 h longer"."""
    return f"{words} {less if saved >= 0 else more}"


@dataclass(frozen=True)
class Remedy:
    """A change and what it does. Savings: bytes of one device, hours, USD; negative where it costs
    more, None where the size of the data or the price is not known."""

    does: str
    settings: Settings
    estimate: Estimate
    saves_bytes: float
    saves_hours: float | None
    saves_money: float | None

    @property
    def fits(self) -> bool:
        return self.estimate.fits

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        parts = [less_or_more(self.saves_bytes, f"{abs(self.saves_bytes) / 2**30:.2f} GiB")]
        for saved, unit, words in (
            (self.saves_hours, "h", ("shorter", "longer")),
            (self.saves_money, "USD", ("less", "more")),
        ):
            if saved is not None:
                parts.append(less_or_more(saved, f"{abs(saved):.2f} {unit}", *words))
        parts += filter(None, [of_main_memory(self.estimate)])
        return f"Remedy({self.does}: {settings}: {', '.join(parts)}, fits={self.fits})"


def remedies(e: Estimate) -> list[Remedy]:
    """Single changes, and where none is enough the gentlest changes at once; the best first:
    what fits before what does not, then by money (or time), then by memory."""
    found = [r for does, settings in _changes(e) if (r := _try(e, does, settings)) is not None]
    if not e.fits and not any(r.fits for r in found):
        found += _combined(e)
    return sorted(found, key=_rank)


def _rank(r: Remedy) -> tuple[bool, float, float]:
    time = r.saves_money if r.saves_money is not None else r.saves_hours
    return (not r.fits, -(time or 0.0), -r.saves_bytes)


def _try(e: Estimate, does: str, settings: Settings) -> Remedy | None:
    """The change planned; None where it cannot be made, or saves nothing worth naming."""
    try:
        new = e.changed(**settings)
        saved = e.peak - new.peak
        hours = None if e.hours is None or new.hours is None else e.hours - new.hours
        money = None if e.money is None or new.money is None else e.money - new.money
    except ValueError:
        return None
    worth = (
        saved > WORTH * e.peak
        or (hours or 0.0) > WORTH * (e.hours or 1.0)
        or (money or 0.0) > WORTH * (e.money or 1.0)
    )
    harm = not e.fits and not new.fits and saved < 0  # further from fitting than before
    return Remedy(does, settings, new, saved, hours, money) if worth and not harm else None


NAMES = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
Change: TypeAlias = tuple[str, Settings]


def _changes(e: Estimate) -> Iterator[Change]:
    """Changes that this plan does not have yet, from the gentlest to the largest."""
    s = e.setup
    if s.stage == "inference":
        yield from _serving(e)
    else:
        yield from _smaller_steps(s)
        yield from _adapters(e)
    if s.stage == "ppo" and s.layout == "four":
        yield "policy and value share a trunk", {"layout": "shared"}
        yield "one base with adapters", {"layout": "adapters", "lora_r": s.lora_r or 16}
        if not s.rule_reward:
            yield "a rule instead of the reward model", {"rule_reward": True}
    if s.stage != "inference":
        yield from _more_devices(e)
    if s.stage == "ppo":
        yield "DPO instead of PPO", {"stage": "dpo"}


def _smaller_steps(s: Setup) -> Iterator[Change]:
    """The same training in less memory."""
    optimizer = OPTIMIZERS[s.optim]
    if s.loss == "plain":
        yield "fuse head and loss", {"loss": "fused"}
    if optimizer.moments and not optimizer.fused:
        yield "fused AdamW", {"optim": "adamw_torch_fused"}
    if not s.gradient_checkpointing:
        yield "recompute activations (checkpointing)", {"gradient_checkpointing": True}
    if s.batch > 1 and s.stage != "ppo":
        smaller = max(d for d in range(1, s.batch) if s.batch % d == 0)
        more = s.gradient_accumulation_steps * s.batch // smaller
        change = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": more}
        if s.steps_per_generation:
            change["steps_per_generation"] = s.rollout_batch // smaller
        yield (
            f"smaller passes: {counted(smaller, 'row')}, accumulated {counted(more, 'time')}",
            change,
        )
    if s.stage == "ppo" and s.batch > 1:
        n = s.rollout_batch
        change = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": n}
        yield f"one row a pass, accumulated {counted(n, 'time')}", change
    if s.stage == "ppo" and s.local_rollout_forward_batch_size > 4:
        yield "score 4 rows at a time", {"local_rollout_forward_batch_size": 4}
    if not optimizer.state_bytes and s.gpu:
        yield "8-bit AdamW", {"optim": "adamw_bnb_8bit"}


def _half(e: Estimate) -> Settings:
    """Settings of 16-bit weights."""
    dtype = "bfloat16" if "bf16" in e.hardware.flops else "float16"
    return {"dtype": dtype, "bf16": False} | ({"fp16": False} if e.setup.fp16 else {})


def _serving(e: Estimate) -> Iterator[Change]:
    """Serve from fewer bytes for each weight, key and value, or a copy from more devices."""
    s = e.setup
    if not s.gpu:
        return
    if s.dtype == "float32":
        yield "16-bit weights", _half(e)
    if s.weights_format == "none":
        small = {"quantization": "awq"} if s.engine == "vllm" else {"load_in_4bit": True}
        yield f"weights in 4 bits ({'AWQ' if s.engine == 'vllm' else 'NF4'})", {**small, **_half(e)}
    if s.engine == "vllm" and s.kv_cache_dtype == "auto":
        yield "keys and values in 8 bits", {"kv_cache_dtype": "fp8"}
    gpus, k = 2 * s.gpus, 2 * s.tensor_parallel
    yield f"{counted(gpus, 'GPU')}, {k} for each copy", {"gpus": gpus, "tensor_parallel": k}


def _adapters(e: Estimate) -> Iterator[Change]:
    """Train adapters instead of the whole model."""
    s = e.setup
    if not s.lora_r:
        yield "LoRA, rank 16", {"lora_r": 16}
    if not s.load_in_4bit and s.gpu:
        change = {"lora_r": s.lora_r or 16, "load_in_4bit": True}
        yield "QLoRA: base in 4 bits, rank 16", {**change, **_half(e)}


def _more_devices(e: Estimate) -> Iterator[Change]:
    """Spread over devices what every one of them holds."""
    s = e.setup
    if s.gpus > 1 and s.sharding in ("none", "ddp"):
        yield "shard weights and states (FSDP2)", {"sharding": "fsdp2"}
    if s.shards and s.offload == "none" and s.gpu:
        what = "all" if s.sharding == "fsdp2" else "optimizer"
        yield "optimizer states wait in main memory (offload)", {"offload": what}
    if s.gpu:
        gpus = 2 * s.gpus
        nodes = nodes_for(gpus, e.hardware)
        how = s.sharding if s.shards else "fsdp2"
        change = {"gpus": gpus, "sharding": how} | ({"nodes": nodes} if nodes > s.nodes else {})
        yield f"{counted(gpus, 'GPU')}, sharded ({NAMES[how]})", change


def _combined(e: Estimate) -> list[Remedy]:
    """The gentlest changes one on top of the other until it fits."""
    settings: Settings = {}
    steps: dict[str, Settings] = {}
    for does, change in _changes(e):
        if "stage" in change or "rule_reward" in change:
            continue
        # What sets all that an earlier step set takes its place: QLoRA is LoRA too.
        kept = {name: old for name, old in steps.items() if not old.keys() <= change.keys()}
        remedy = _try(e, " + ".join([*kept, does]), {**settings, **change})
        if remedy is None:
            continue
        settings, steps = remedy.settings, {**kept, does: change}
        if remedy.fits:
            return [remedy]
    return []
