"""Everything that a cost depends on, in one flat record, checked.

The names are those of TRL's configs and ModelConfig and of our PPOConfig; what no trainer has
(GPUs, sharding, lengths, size of the data) is in `EXTRA` (`settings.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from ..display import check_choice, counted
from ..stages import ONLINE, REWARDED, STAGES, read_table
from . import dora, fields
from .architecture import Architecture
from .optimizers import OPTIMIZERS
from .parallel import shard
from .quantization import FORMATS

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
CHOICES = fields.CHOICES | {
    "stage": tuple(STAGES),
    **dict.fromkeys(("dtype", "adapter_dtype"), tuple(BYTES_PER_WEIGHT)),
    "optim": tuple(OPTIMIZERS),
    "quantization": ("none", *FORMATS),
}
CALLED = {"optim": "of optimizers that are planned, optim"}
"""Choices of which trainers have more."""
EXTRA: dict[str, dict[str, str]] = read_table(__file__, "settings.yaml")
"""Settings of a plan that are no trainer's, and what they mean, by the stages that have them."""
CROSS_ENTROPY = "sft", "dpo", "kto"
"""Stages whose loss is made of logits of whole rows, in one of several ways (`Setup.loss`)."""


def extra_settings(stage: str) -> dict[str, str]:
    """The settings of a stage's plan that are no trainer's, and what they mean."""
    spec = STAGES[stage]
    has = {"all": True, "trained": spec.trainable, "rewarded": stage in REWARDED, stage: True}
    has |= {"sampled": not spec.trainable or spec.online, "cross_entropy": stage in CROSS_ENTROPY}
    return {
        name: what for kind, own in EXTRA.items() if has.get(kind) for name, what in own.items()
    }


class CannotBe(ValueError):
    """Of settings that can be neither planned nor trained; other errors are of what is not planned,
    and may be trained."""


def check_whole(name: str, value: object, of: str) -> None:
    """Raises ValueError, one line, for what cannot be the `fields.WHOLE_NUMBERS` entry `of`."""
    least = 0 if of in ("prompt", "response") else 1
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One stage on one kind of device. Lengths in tokens; `batch` in sequences, or pairs for reward
    and DPO, of one device and one pass.

    `dtype`: of the weights; `bf16`, `fp16`: autocast over fp32 weights; `tf32`: how fp32 products
    are made. `every_n_layers`, `offload_inputs`: which layers are recomputed, and whether their
    inputs wait in main memory (`activation_checkpointing_kwargs`). `engine_bytes`: weights of an
    engine that samples (`use_vllm`) and all else it takes of a device that trains. `gpu`: kernels
    and the allocator of a GPU. `loss_type`: read of KTO alone. `critic_lora_r`,
    `critic_lora_targets`: rank and matrices of value and reward adapters that are not as the
    policy's. Raises ValueError, one line, for what cannot be.
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
    lora_dropout: float = 0.0
    use_dora: bool = False
    adapter_dtype: str = "float32"
    load_in_4bit: bool = False
    use_bnb_nested_quant: bool = False
    load_in_8bit: bool = False
    quantization: str = "none"
    gradient_checkpointing: bool = False
    every_n_layers: int = 1
    offload_inputs: bool = False
    selective_checkpointing: bool = False
    activation_offloading: bool = False
    use_liger_kernel: bool = False
    gradient_accumulation_steps: int = 1
    attn_implementation: str = "sdpa"
    optim: str = "adamw_torch_fused"
    optimizer_in_backward: bool = False
    loss: str = "fused"
    loss_type: str | tuple[str, ...] = "kto"
    padded: bool = True
    gpu: bool = True
    gpus: int = 1
    nodes: int = 1
    sharding: str = "none"
    offload: str = "none"
    tensor_parallel: int = 1
    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    ds3_gather_for_generation: bool = True
    fsdp_units: str = "accelerate"
    fsdp_version: int = 2
    pairs_together: bool = True
    reward: Architecture | None = None
    value: Architecture | None = None
    teacher: Architecture | None = None
    draft: Architecture | None = None
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    local_rollout_forward_batch_size: int = 64
    samples_per_prompt: int = 1
    num_iterations: int = 1
    steps_per_generation: int | None = None
    beta: float = 0.0
    distill_from: str = "student"
    layout: str = "four"
    critic_lora_r: int = 0
    critic_lora_targets: str | tuple[str, ...] | None = "all-linear"
    rule_reward: bool = False
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_enable_sleep_mode: bool = False
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    engine_bytes: tuple[float, float] = (0.0, 0.0)
    ema: bool = False
    joint_update: bool = True
    precompute_ref_log_probs: bool = False
    tf32: bool = False
    torch_compile: bool | str = False
    engine: str = "transformers"
    requests_per_second: float | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    num_assistant_tokens: int = 4
    accepted: float | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            check_choice(CALLED.get(name, name), getattr(self, name), choices)
        for name in fields.WHOLE_NUMBERS:
            check_whole(name, getattr(self, name), name)
        checks = (
            self._model_checks,
            self._offload_checks,
            self._batch_checks,
            self._in_backward_checks,
            self._serving_checks,
        )
        if wrong := next(chain.from_iterable(check() for check in checks), ""):
            raise CannotBe(wrong)
        if wrong := next(self._device_checks(), ""):
            raise ValueError(wrong)

    def _model_checks(self) -> Iterator[str]:
        """→ a line for everything that cannot be: lengths, precision, adapters."""
        m = self.model
        if self.stage in ONLINE and self.response >= m.context:
            yield (
                f"response_length={self.response} leaves no room for a prompt: {m.family} here "
                f"takes {m.context} tokens"
            )
        if self.length > m.context:
            yield (
                f"prompt_length + response_length = {self.length}: {m.family} here takes "
                f"{m.context} tokens"
            )
        if self.length < 1:
            yield "prompt_length + response_length must be at least 1"
        if self.bf16 and self.fp16:
            yield "bf16 and fp16: choose one"
        same = self.bf16 and self.dtype == "bfloat16" or self.fp16 and self.dtype == "float16"
        made = same and self.sharding.startswith("zero")  # by DeepSpeed, with autocast or without
        if (self.bf16 or self.fp16) and self.dtype != "float32" and not made:
            yield (
                f"bf16/fp16 autocast works on fp32 weights: leave it out with dtype={self.dtype!r}"
            )
        if self.small_base and not self.lora_r:
            yield (
                f"load_in_{4 if self.load_in_4bit else 8}bit trains adapters only: set lora_r, for "
                "example 16"
            )
        if self.lora_dropout and m.experts > 1 and "down_proj" in m.lora_targets(self.lora_targets):
            yield "peft adapts the experts of a mixture without lora_dropout: leave it out"
        yield from dora.cannot(self)
        if self.lora_r < 0:
            yield f"lora_r={self.lora_r}: choose a rank of 1 or more, or 0 for the whole model"

    def _device_checks(self) -> Iterator[str]:
        """The same of devices, how they share one layer and the groups of a generation: a training
        may have another number of them."""
        n, heads = self.gpus, self.model.heads
        rows, group = self.rollout_batch * self.replicas, self.samples_per_prompt
        if STAGES[self.stage].groups and rows % group != 0:
            yield (
                f"a generation of {rows} responses does not split into groups of "
                f"num_generations={group}: choose {_divisor(rows, group)}"
            )
        if self.fsdp_version not in (1, 2):
            yield f"fsdp_version={self.fsdp_version!r}: choose 1 or 2"
        if n % self.nodes != 0:
            yield (
                f"gpus={n} do not spread over nodes={self.nodes}: choose "
                f"{counted(_divisor(n, self.nodes), 'node')}"
            )
        tp = self.vllm_tensor_parallel_size
        if self.use_vllm and not self.server_gpus and n % tp != 0 or heads % tp != 0:
            yield (
                f"vllm_tensor_parallel_size={tp} must divide gpus={n} and the {heads} heads: "
                f"choose {_divisor(n, tp, heads)}"
            )
        if self.use_vllm and self.stage == "ppo" and n > 1:
            yield f"use_vllm samples PPO's rollouts in one process: choose gpus=1, not {n}"
        if n % self.tensor_parallel != 0 or heads % self.tensor_parallel != 0:
            yield (
                f"tensor_parallel={self.tensor_parallel} must divide gpus={n} and the "
                f"{heads} heads: choose {_divisor(n, self.tensor_parallel, heads)}"
            )

    @property
    def checkpoint(self) -> int:
        """Of so many layers one is recomputed; 0: none."""
        return self.every_n_layers * self.gradient_checkpointing

    @property
    def away(self) -> str:
        """What waits in main memory for the backward pass (`PassConfig.away`)."""
        if self.activation_offloading:
            return "all"
        return "inputs" if self.checkpoint and self.offload_inputs else ""

    def _offload_checks(self) -> Iterator[str]:
        """The same of what waits in main memory, which DeepSpeed and FSDP2 alone can do."""
        there, how = self.offload != "none", f"offload={self.offload!r}"
        for name in ("activation_offloading", "use_liger_kernel", "use_vllm"):
            if getattr(self, name) and not self.gpu:
                yield (f"{name}=True needs a GPU: leave it out")
        if there and not self.gpu:
            yield (f"{how} moves states to main memory, where a CPU has them already: leave it out")
        if there and not self.shards:
            yield (
                f"{how} needs a sharding that can do it, and sharding={self.sharding!r} cannot: "
                "choose zero1, zero2, zero3 (optimizer) or zero3, fsdp2 (all)"
            )
        if self.offload == "all" and self.sharding in ("zero1", "zero2"):
            yield (
                f"{how}: {self.sharding} keeps weights whole on every device; choose zero3, or "
                "offload='optimizer'"
            )
        if self.offload == "optimizer" and self.sharding == "fsdp2":
            yield (
                f"{how}: FSDP2 moves weights, gradients and states together; choose offload='all'"
            )

    def _batch_checks(self) -> Iterator[str]:
        """The same of batches and groups, layout and sharding."""
        batch, k = self.rollout_batch, self.num_mini_batches
        if self.stage == "ppo" and batch % k != 0:
            yield (
                f"a rollout batch of {batch} does not split into num_mini_batches={k}: choose "
                f"{_divisor(batch, k)}"
            )
        if self.layout == "adapters" and not self.lora_r:
            yield "layout='adapters' needs a rank: set lora_r, for example 16"
        if self.stage == "inference" and self.sharding in ("zero3", "fsdp2"):
            yield (
                f"sharding={self.sharding!r} of inference is not modelled: weights would be "
                "gathered for every token; choose tensor_parallel, or copies (ddp)"
            )
        if self.sharding == "none" and self.gpus > self.tensor_parallel:
            yield (
                f"gpus={self.gpus} need a way to share the work: choose sharding from "
                f"{', '.join(CHOICES['sharding'][1:])}"
            )

    def _in_backward_checks(self) -> Iterator[str]:
        """The same of weights that change while others' gradients are still to come."""
        n, on = self.gradient_accumulation_steps, self.optimizer_in_backward
        if on and n > 1:
            yield (f"optimizer_in_backward: no gradient waits for {n} passes; choose 1")
        if on and (self.shards or self.stage == "ppo"):
            yield "optimizer_in_backward is planned for whole models in one pass, not for PPO"

    def _serving_checks(self) -> Iterator[str]:
        """The same of inference: formats of weights, and engines."""
        k, kv, name = self.tensor_parallel, self.model.kv_heads, self.weights_format
        serving, engine = self.stage == "inference", self.engine == "vllm"
        if not serving and (engine or self.quantization != "none"):
            yield (
                f"engine and quantization are planned for inference, not {self.stage}: leave them "
                "out (load_in_4bit and load_in_8bit train adapters)"
            )
        if self.load_in_4bit + self.load_in_8bit + (self.quantization != "none") > 1:
            yield "load_in_4bit, load_in_8bit and quantization: choose one"
        if engine and not self.gpu:
            yield "engine='vllm' is planned for GPUs: choose transformers"
        engines = FORMATS[name].engines if name in FORMATS else CHOICES["engine"]
        if serving and self.engine not in engines:
            yield (f"weights in {name} are planned with engine={' or '.join(engines)}")
        if (
            serving
            and engine
            and self.dtype == "float32"
            and name.startswith(("awq", "gptq", "fp8"))
        ):
            yield f"engines multiply weights in {name} in 16 bits: leave dtype='float32' out"
        if self.requests_per_second is not None and not (engine and self.requests_per_second > 0):
            yield (
                f"requests_per_second={self.requests_per_second} must be above 0, "
                "with engine='vllm'"
            )
        if self.model.heads % k == 0 and kv % k != 0 and k % kv != 0:
            yield (
                f"tensor_parallel={k} does not share out {kv} heads of keys and values: choose a "
                f"divisor or a multiple of {kv}"
            )
        if self.draft and (engine or k > 1 or self.batch > 1):
            yield "with a draft is planned: engine='transformers', per_device_train_batch_size=1"

    @property
    def weights_format(self) -> str:
        """What weights of inference are kept in: of `quantization.FORMATS`, or "none"."""
        if self.load_in_4bit:
            return "nf4_nested" if self.use_bnb_nested_quant else "nf4"
        return "int8" if self.load_in_8bit else self.quantization

    @property
    def small_base(self) -> bool:
        """Whether training keeps frozen weights in 4 or 8 bits."""
        return self.stage != "inference" and (self.load_in_4bit or self.load_in_8bit)

    @property
    def whole(self) -> Setup:
        """The same for other models, which training loads whole beside a base in few bits."""
        return replace(self, load_in_4bit=False, load_in_8bit=False)

    @property
    def held(self) -> Architecture:
        """What a device holds of the model in inference; in training it is a share already
        (`parallel.in_parallel`)."""
        return shard(self.model, self.tensor_parallel) if self.stage == "inference" else self.model

    @property
    def nodes_per_copy(self) -> int:
        """Machines that one copy of a model spreads over."""
        return max(1, self.tensor_parallel * self.nodes // self.gpus)

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
    def pass_bytes_per_weight(self) -> int:
        """Of one weight in a pass: FSDP2 gathers in 16 bits what it keeps in 32 under autocast."""
        return 2 if self.autocast and self.sharding == "fsdp2" else self.bytes_per_weight

    @property
    def adapter_bytes_per_weight(self) -> int:
        """DeepSpeed makes adapters as narrow as their base."""
        zero = self.sharding.startswith("zero")
        return min(BYTES_PER_WEIGHT[self.adapter_dtype], self.bytes_per_weight if zero else 4)

    @property
    def shards(self) -> bool:
        """Whether devices keep parts of what is whole in one device's plan."""
        return self.sharding not in ("none", "ddp")

    @property
    def eager(self) -> bool:
        """Whether attention is written out, not one fused kernel."""
        facts = self.model.facts
        return self.attn_implementation == "eager" or facts.softcap or facts.sinks or facts.eager

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
    def server_gpus(self) -> int:
        """Devices beside those that train, on which an engine samples."""
        return self.vllm_tensor_parallel_size if self.use_vllm and self.vllm_mode == "server" else 0

    @property
    def replicas(self) -> int:
        """Copies of the model that see different data."""
        return self.gpus // self.tensor_parallel


def _divisor(n: int, near: int, also: int = 0) -> int:
    """The divisor of n (and of `also`) that is nearest to `near`."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    fits = [d for k in small for d in (k, n // k) if also % d == 0]
    return min(fits, key=lambda d: (abs(d - near), d))
