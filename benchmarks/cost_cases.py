"""The cases on which the cost model is tested: models, settings and lengths, drawn with a seed.

`cases(count, seed)` mixes stages, families, precisions, LoRA, checkpointing, attention and lengths,
from tiny models to 7B. `small_cases()` are those that really run on a CPU.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.setup import Setup
from rlhf_lab.models.load import load, presets

STAGES = ("sft", "reward", "dpo", "ppo")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd")
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 5000,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
SMALL = {
    **{
        f: WIDE | {"model_type": f}
        for f in ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")
    },
    "qwen2": {k: v for k, v in WIDE.items() if k != "head_dim"} | {"model_type": "qwen2"},
    "phi3": {k: v for k, v in WIDE.items() if k != "head_dim"} | {"model_type": "phi3"},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 8,
        "n_head": 8,
        "vocab_size": 5000,
        "n_positions": 2048,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 5000,
        "max_position_embeddings": 2048,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 256,
        "ffn_dim": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 5000,
        "word_embed_proj_dim": 256,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
    },
}
"""One small model of each family whose activations are modelled; dropout off, as the lab has it."""


PRESETS = tuple(
    """
    HuggingFaceTB/SmolLM2-135M
    HuggingFaceTB/SmolLM2-360M
    Qwen/Qwen2.5-0.5B
    Qwen/Qwen2.5-1.5B
    Qwen/Qwen2.5-7B
    EleutherAI/pythia-70m
    EleutherAI/pythia-160m
    EleutherAI/pythia-410m
    EleutherAI/pythia-1b
    EleutherAI/pythia-1.4b
    EleutherAI/pythia-2.8b
    EleutherAI/pythia-6.9b
    openai-community/gpt2
    openai-community/gpt2-medium
    openai-community/gpt2-xl
    facebook/opt-350m
    facebook/opt-1.3b
    TinyLlama/TinyLlama-1.1B
    meta-llama/Llama-2-7b-hf
    meta-llama/Llama-3.2-1B
    meta-llama/Llama-3.2-3B
    mistralai/Mistral-7B-v0.1
    """.split()
)
"""Presets to draw from, up to 7B: a list of its own, so that the cases stay what they are."""

NO_DROPOUT = dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"),
    0.0,
)
"""The cost model has no dropout; GPT-2 and OPT come with it."""


@dataclass(frozen=True)
class Case:
    """One step of one stage. `name`: a preset or a small family; lengths in tokens; `batch` in
    sequences or pairs; `device`: "cpu" or "gpu"."""

    stage: str
    name: str
    batch: int = 2
    prompt: int = 64
    response: int = 64
    dtype: str = "float32"
    bf16: bool = False
    lora_r: int = 0
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"
    optim: str = "adamw_torch_fused"
    gradient_accumulation_steps: int = 1
    num_mini_batches: int = 1
    num_ppo_epochs: int = 1
    local_rollout_forward_batch_size: int = 4
    padded: bool = True
    device: str = "gpu"
    lora_dropout: float = 0.0
    every_n_layers: int = 1
    layout: str = "four"
    critic_lora_r: int = 0
    torch_compile: bool = False
    critics: str = ""
    """a small family whose reward and value model PPO has, or the policy's"""

    @property
    def roles(self) -> dict[str, dict[str, Any]]:
        """Configs of the reward and value model, where they are other ones."""
        if not self.critics:
            return {}
        config = {**SMALL[self.critics], **NO_DROPOUT}
        return {"reward": config} | ({"value": config} if self.layout == "four" else {})

    @property
    def config(self) -> dict[str, Any]:
        known = SMALL.get(self.name) or presets().get(self.name) or load(self.name).config_dict()
        return {**known, **NO_DROPOUT}

    @property
    def settings(self) -> dict[str, Any]:
        """As a plan wants them."""
        settings = asdict(self)
        for name in ("stage", "name", "device", "critics"):
            settings.pop(name)
        settings["per_device_train_batch_size"] = settings.pop("batch")
        settings["prompt_length"] = settings.pop("prompt")
        settings["response_length"] = settings.pop("response")
        return settings

    @property
    def setup(self) -> Setup:
        """As `simulate_step` takes it."""
        values = asdict(self)
        values["gpu"] = values.pop("device") == "gpu"
        values["model"] = architecture(self.config)
        values.pop("name")
        values.pop("critics")
        roles = {role: architecture(config) for role, config in self.roles.items()}
        return Setup(**values, **roles)

    def __str__(self) -> str:
        plain = asdict(Case(self.stage, self.name))
        settings = [f"{k}={v}" for k, v in asdict(self).items() if v != plain[k]]
        return f"{self.stage} {self.name.split('/')[-1]} {' '.join(settings)}"


def draw(rng: random.Random, stage: str, name: str, small: bool) -> Case:
    """One case; sizes such that a GPU of today would hold it, or nearly."""
    precision = rng.choice(("float32", "bfloat16", "bfloat16", "autocast"))
    length = rng.choice((64, 128, 300) if small else (128, 256, 512, 1024))
    prompt = rng.choice((length // 4, length // 2))
    accumulate = rng.choice((1, 1, 2))
    batch = rng.choice((1, 2, 4))
    return Case(
        stage,
        name,
        batch=batch,
        prompt=prompt,
        response=length - prompt,
        dtype="bfloat16" if precision == "bfloat16" else "float32",
        bf16=precision == "autocast",
        lora_r=rng.choice((0, 0, 8, 32)),
        gradient_checkpointing=stage != "ppo" and rng.random() < 0.35,
        attn_implementation="eager" if name == "gemma2" or rng.random() < 0.25 else "sdpa",
        optim="adamw_torch" if stage == "ppo" else rng.choice(OPTIMIZERS),
        gradient_accumulation_steps=accumulate,
        padded=rng.random() < 0.6 and batch > 1,  # a row alone has no padding
        num_mini_batches=1,
        local_rollout_forward_batch_size=rng.choice((2, 4)),
        device=rng.choice(("cpu", "gpu")) if small else "gpu",
    )


def cases(count: int, seed: int = 0) -> list[Case]:
    """`count` cases, half of small models of every family, half of presets up to 7B."""
    rng = random.Random(seed)
    drawn = []
    for number in range(count):
        small = number % 2 == 0
        name = rng.choice(list(SMALL) if small else PRESETS)
        drawn.append(draw(rng, STAGES[number // 2 % 4], name, small))
    return drawn


SMALL_PRESETS = PRESETS[:3] + PRESETS[5:8] + PRESETS[12:13]
"""Half a billion parameters at most."""


def option_cases(count: int, seed: int = 1) -> list[Case]:
    """`count` cases of what `cases` leaves out: optimizers that keep less, dropout of adapters, few
    layers recomputed, KTO, layouts of PPO, critics of another family and rank."""
    rng, drawn = random.Random(seed), []
    for number in range(count):
        small = number % 4 > 0
        stage = ("sft", "reward", "dpo", "kto", "ppo")[number // 4 % 5]
        case = draw(rng, stage, rng.choice(list(SMALL) if small else SMALL_PRESETS), small)
        changes: dict[str, Any] = {
            "optim": rng.choice(("adamw_torch", "adafactor", "adamw_bnb_8bit")),
            "lora_dropout": rng.choice((0.0, 0.05)) if stage == "sft" and case.lora_r else 0.0,
            "every_n_layers": rng.choice((1, 2, 3)) if case.gradient_checkpointing else 1,
            "batch": max(2, case.batch) if stage == "kto" else case.batch,  # its KL takes two rows
        }
        if stage in ("dpo", "kto"):
            changes["every_n_layers"] = 1  # which TRL's trainers of these lose
        if stage == "ppo":
            layout = rng.choice(("four", "shared", "adapters"))
            other = rng.choice(("", "llama", "gpt2", "qwen2")) if small else ""
            one_base = layout == "adapters"
            changes |= {
                "layout": layout,
                "lora_r": case.lora_r or 8 if one_base else 0 if other else case.lora_r,
                "critic_lora_r": rng.choice((0, 4)) if one_base else 0,
                "critics": "" if one_base else other,
                "optim": "adamw_torch",
            }
        drawn.append(replace(case, **changes))
    return drawn


def small_cases() -> list[Case]:
    """Cases that run on a CPU: every stage with each of what changes its memory."""
    common = dict(batch=2, prompt=24, response=40, device="cpu")
    variants = [
        {},
        {"attn_implementation": "eager"},
        {"lora_r": 8},
        {"bf16": True},
        {"padded": False},
        {"gradient_accumulation_steps": 2},
        {"optim": "adamw_torch"},
    ]
    names = ("llama", "gpt2", "qwen3", "opt", "gpt_neox", "gemma3_text", "phi3")
    drawn = []
    for stage in STAGES:
        for number, variant in enumerate(variants):
            name = names[(number + STAGES.index(stage)) % len(names)]
            more = {"optim": "adamw_torch"} if stage == "ppo" else {}
            drawn.append(Case(stage, name, **{**common, **more, **variant}))
        if stage != "ppo":
            drawn.append(Case(stage, "llama", gradient_checkpointing=True, **common))
    return drawn


def compiled_cases() -> list[Case]:
    """Cases of `torch_compile` that run on a CPU, in which activations are much of the memory: ten
    families, each stage, and what changes what a compiled layer keeps."""
    common = dict(batch=8, prompt=64, response=96, device="cpu", torch_compile=True)
    ppo = common | dict(optim="adamw_torch", padded=False)
    low = {"dtype": "bfloat16", "lora_r": 8}
    return [
        Case("sft", "llama", **common),
        Case("sft", "gpt2", **common | dict(padded=False)),
        Case("sft", "qwen3", **common, bf16=True),
        Case("sft", "mistral", **common, **low),
        Case("sft", "phi3", **common, gradient_checkpointing=True),
        Case("sft", "gemma2", **common, attn_implementation="eager"),
        Case("reward", "gpt_neox", **common, gradient_accumulation_steps=2),
        Case("dpo", "qwen2", **common, lora_r=8),
        Case("dpo", "opt", **common),
        Case("ppo", "llama", **ppo),
        Case("ppo", "gemma3_text", **ppo, layout="adapters", **low),
        Case("ppo", "qwen2", **ppo, layout="shared", bf16=True),
    ]


def timed_cases() -> list[Case]:
    """Cases to run by the clock on a CPU: every stage, six models, lengths and batches that differ;
    PPO with two epochs of two passes each, its rollout included. None of them calibrates."""
    shapes = {
        "tiny": (16, 16, 32),
        "small": (8, 20, 40),
        "llama": (4, 32, 64),
        "gpt2": (4, 24, 72),
        "gpt_neox": (6, 16, 64),
        "qwen3": (8, 16, 48),
    }
    drawn = []
    for stage in STAGES:
        more = {}
        if stage == "ppo":
            more = dict(
                gradient_accumulation_steps=2,
                num_ppo_epochs=2,
                optim="adamw_torch",
                local_rollout_forward_batch_size=16,
            )
        for name, (batch, prompt, response) in shapes.items():
            drawn.append(Case(stage, name, batch, prompt, response, device="cpu", **more))
        drawn.append(Case(stage, "llama", 8, 16, 24, device="cpu", lora_r=8, **more))
    return drawn
