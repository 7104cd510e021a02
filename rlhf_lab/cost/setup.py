"""Everything that a cost depends on, in one flat record, checked.

The names are those of TRL's configs and ModelConfig and of our PPOConfig; what no trainer has
(GPUs, sharding, lengths, size of the data) is in `EXTRA` (`settings.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import yaml

from ..display import did_you_mean
from ..stages import ONLINE, STAGES, Setting
from .architecture import Architecture
from .hardware import Hardware
from .optimizers import OPTIMIZERS

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
CHOICES = {
    "stage": tuple(STAGES),
    "dtype": tuple(BYTES_PER_WEIGHT),
    "attn_implementation": ("sdpa", "eager", "flash_attention_2"),
    "optim": tuple(OPTIMIZERS),
    "loss": ("fused", "plain"),
    "layout": ("four", "shared", "adapters"),
    "sharding": ("none", "ddp", "zero1", "zero2", "zero3", "fsdp2"),
    "offload": ("none", "optimizer", "all"),
}
EXTRA: dict[str, str] = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text("utf-8"))
"""Settings of a plan that are no trainer's, and what they mean."""


WHOLE_NUMBERS = tuple(
    "batch prompt response gpus nodes tensor_parallel gradient_accumulation_steps num_ppo_epochs "
    "num_mini_batches local_rollout_forward_batch_size samples_per_prompt num_iterations".split()
)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One stage on one kind of device. Lengths in tokens; `batch` in sequences, or pairs for reward
    and DPO, of one device and one pass.

    `dtype`: of the weights; `bf16`, `fp16`: autocast over fp32 weights. `gpu`: kernels and the
    allocator of a GPU. `loss_type`: read of KTO alone. `critic_lora_r`, `critic_lora_targets`: rank
    and matrices of value and reward adapters that are not as the policy's. Raises ValueError, one
    line, for what cannot be.
    """

    stage: str
    model: Architecture
    batch: int = 8
    prompt: int = 64
    response: int = 64
    padded_prompt: float | None = None
    padded_response: float | None = None
    padded_update: float | None = None
    padded_scoring: float | None = None
    mean_tokens: float | None = None
    mean_response: float | None = None
    rows: int | None = None
    epochs: float = 1.0
    steps: int | None = None
    dtype: str = "float32"
    bf16: bool = False
    fp16: bool = False
    lora_r: int = 0
    lora_targets: str | tuple[str, ...] | None = "all-linear"
    adapter_dtype: str = "float32"
    load_in_4bit: bool = False
    use_bnb_nested_quant: bool = False
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    attn_implementation: str = "sdpa"
    optim: str = "adamw_torch_fused"
    loss: str = "fused"
    loss_type: str | tuple[str, ...] = "kto"
    padded: bool = True
    gpu: bool = True
    gpus: int = 1
    nodes: int = 1
    sharding: str = "none"
    offload: str = "none"
    tensor_parallel: int = 1
    pairs_together: bool = True
    reward: Architecture | None = None
    value: Architecture | None = None
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    local_rollout_forward_batch_size: int = 64
    samples_per_prompt: int = 1
    num_iterations: int = 1
    steps_per_generation: int | None = None
    beta: float = 0.0
    layout: str = "four"
    critic_lora_r: int = 0
    critic_lora_targets: str | tuple[str, ...] | None = "all-linear"
    rule_reward: bool = False
    ema: bool = False
    joint_update: bool = True

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name}={value!r}; {did_you_mean(value, choices)}choose from "
                    f"{', '.join(choices)}"
                )
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            if type(value) is not int or value < (0 if name in ("prompt", "response") else 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        checks = (self._model_checks, self._device_checks, self._batch_checks)
        for wrong, line in chain.from_iterable(check() for check in checks):
            if wrong:
                raise ValueError(line)

    def _model_checks(self) -> Iterator[tuple[bool, str]]:
        """→ (whether something cannot be, the line that names it): lengths, precision, adapters."""
        m = self.model
        yield (
            self.length > m.context,
            f"prompt_length + response_length = {self.length}: {m.family} here takes "
            f"{m.context} tokens",
        )
        yield self.length < 1, "prompt_length + response_length must be at least 1"
        yield self.bf16 and self.fp16, "bf16 and fp16: choose one"
        yield (
            (self.bf16 or self.fp16) and self.dtype != "float32",
            f"bf16/fp16 autocast works on fp32 weights: leave it out with dtype={self.dtype!r}",
        )
        yield (
            self.load_in_4bit and not self.lora_r and self.stage != "inference",
            "load_in_4bit trains adapters only: set lora_r, for example 16",
        )
        side = min(min(x.inputs, x.outputs) for y in m.layers for x in y.linears)
        yield (
            self.lora_r > side or self.lora_r < 0,
            f"lora_r={self.lora_r}: the narrowest matrix is {side} wide; choose 1 to {side}",
        )

    def _device_checks(self) -> Iterator[tuple[bool, str]]:
        """The same of devices, and of how they share one layer."""
        n, heads = self.gpus, self.model.heads
        yield (
            n % self.nodes != 0,
            f"gpus={n} do not spread over nodes={self.nodes}: choose "
            f"{_divisor(n, self.nodes)} nodes",
        )
        yield (
            n % self.tensor_parallel != 0 or heads % self.tensor_parallel != 0,
            f"tensor_parallel={self.tensor_parallel} must divide gpus={n} and the "
            f"{heads} heads: choose {_divisor(n, self.tensor_parallel, heads)}",
        )

    def _batch_checks(self) -> Iterator[tuple[bool, str]]:
        """The same of batches and groups, layout and sharding."""
        batch, k = self.rollout_batch, self.num_mini_batches
        yield (
            self.stage == "ppo" and batch % k != 0,
            f"a rollout batch of {batch} does not split into num_mini_batches={k}: choose "
            f"{_divisor(batch, k)}",
        )
        group = self.samples_per_prompt
        yield (
            STAGES[self.stage].groups and batch * self.replicas % group != 0,
            f"a generation of {batch * self.replicas} responses does not split into groups of "
            f"num_generations={group}: choose {_divisor(batch * self.replicas, group)}",
        )
        yield (
            self.layout == "adapters" and not self.lora_r,
            "layout='adapters' needs a rank: set lora_r, for example 16",
        )
        yield (
            self.stage == "inference" and self.sharding in ("zero3", "fsdp2"),
            f"sharding={self.sharding!r} of inference is not modelled: weights would be "
            "gathered for every token; choose tensor_parallel, or copies (ddp)",
        )
        yield (
            self.sharding == "none" and self.gpus > self.tensor_parallel,
            f"gpus={self.gpus} need a way to share the work: choose sharding from "
            f"{', '.join(CHOICES['sharding'][1:])}",
        )

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def bytes_per_weight(self) -> int:
        """Of one weight while it is used; DeepSpeed makes a 16-bit model itself."""
        deepspeed = self.sharding.startswith("zero") and (self.bf16 or self.fp16)
        return 2 if deepspeed else BYTES_PER_WEIGHT[self.dtype]

    @property
    def autocast(self) -> bool:
        return (self.bf16 or self.fp16) and self.bytes_per_weight == 4

    @property
    def adapter_bytes_per_weight(self) -> int:
        return BYTES_PER_WEIGHT[self.adapter_dtype]

    @property
    def eager(self) -> bool:
        """Whether attention is written out, not one fused kernel."""
        return self.attn_implementation == "eager" or self.model.facts.softcap

    @property
    def pass_rows(self) -> int:
        """Responses of one device in one pass of PPO's update."""
        return min(self.batch, self.rollout_batch // self.num_mini_batches)

    @property
    def rollout_batch(self) -> int:
        """Responses of one device in one PPO iteration, or one generation of RLOO and GRPO."""
        return self.batch * (self.steps_per_generation or self.gradient_accumulation_steps)

    @property
    def passes_per_generation(self) -> int:
        """Passes that learn from one generation of RLOO or GRPO."""
        return self.num_iterations * self.rollout_batch // self.batch

    @property
    def updates(self) -> float:
        """Optimizer steps that one generation of RLOO or GRPO is good for."""
        return self.passes_per_generation / self.gradient_accumulation_steps

    @property
    def old_logprobs(self) -> bool:
        """Whether the sampling policy scores what it sampled: RLOO's always does, GRPO's unless
        a step ends with every generation."""
        in_step = self.gradient_accumulation_steps % self.passes_per_generation == 0
        return self.stage == "rloo" or not in_step

    @property
    def replicas(self) -> int:
        """Copies of the model that see different data."""
        return self.gpus // self.tensor_parallel


def _divisor(n: int, near: int, also: int = 0) -> int:
    """The divisor of n (and of `also`) that is nearest to `near`."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    fits = [d for k in small for d in (k, n // k) if also % d == 0]
    return min(fits, key=lambda d: (abs(d - near), d))


RENAMED = {
    "per_device_train_batch_size": "batch",
    "prompt_length": "prompt",
    "response_length": "response",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "lora_target_modules": "lora_targets",
    "num_generations": "samples_per_prompt",
    "activation_checkpointing": "gradient_checkpointing",
}


def make_setup(
    stage: str,
    model: Architecture,
    hw: Hardware,
    settings: Mapping[str, object],
    **roles: Architecture,
) -> Setup:
    """A Setup from a plan's settings; what they leave out is what the lab's trainers do.

    `roles`: architectures of other models, `reward=` and `value=`. Without lengths a row fills
    `max_length` (or the model's context), half of it the prompt.
    """
    names = {f.name for f in fields(Setup)}
    given: dict[str, Setting] = {
        RENAMED.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if value is not None
    }
    known = {k: v for k, v in given.items() if k in names} | roles
    known["gpu"] = hw.kind == "gpu"
    if known.get("dtype", "float32") == "float32" and not {"bf16", "fp16"} & known.keys():
        known["bf16"] = known["gpu"] and "bf16" in hw.flops
        known["fp16"] = known["gpu"] and not known["bf16"] and "fp16" in hw.flops
    if stage in STAGES:
        known = {**STAGES[stage].library_defaults, **known}
    if whole := given.get("generation_batch_size"):  # TRL's other name for the same
        once = known.get("batch", Setup.batch) * known.get("gpus", 1)
        known["steps_per_generation"] = max(1, int(whole) // once)
    if known.get("steps", 0) <= 0:
        known.pop("steps", None)
    room = min(int(given.get("max_length") or model.context), model.context)
    if stage in ONLINE:
        known.setdefault("response", 53)
        known.setdefault("prompt", max(1, min(64, room - known["response"])))
    elif not {"prompt", "response"} & known.keys():
        known["prompt"], known["response"] = room // 2, room - room // 2
    if known.get("gpus", 1) > 1:
        known.setdefault("sharding", "ddp")
    return Setup(stage=stage, model=model, **known)
