"""Published, measured figures and the plans that predict them. Facts are cited with their source.

`memory()` and `time()` give (what, predicted, published, unit, source, note) for each figure.
DeepSpeed prints GiB under the name GB; its logs are read here as they are printed, and the old
OPT attention they ran kept one score matrix more than today's: the two nearly cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.hardware import hardware
from rlhf_lab.models.load import presets

UNITS = {"GB": 1e9, "GiB": 2**30}
LLAMA2, OPT, OPT_SMALL = "meta-llama/Llama-2-7b-hf", "facebook/opt-1.3b", "facebook/opt-350m"
CHAT = "DeepSpeedExamples, DeepSpeed-Chat training logs"


class Figure(NamedTuple):
    """One published figure beside ours, in the same unit."""

    what: str
    predicted: float
    published: float
    unit: str
    source: str
    note: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def _plan(stage: str, name: str, device: str, roles: dict | None = None, **settings) -> Estimate:
    return estimate(stage, presets()[name], device, settings, **(roles or {}))


def _chat(stage: str, name: str, batch: int, **more) -> Estimate:
    """A step of DeepSpeed-Chat: fp16, 512 tokens, attention written out."""
    return _plan(
        stage,
        name,
        "v100",
        fp16=True,
        per_device_train_batch_size=batch,
        prompt_length=256,
        response_length=256,
        attn_implementation="eager",
        **more,
    )


def _chat_ppo() -> Estimate:
    small = presets()[OPT_SMALL]
    return _chat(
        "ppo",
        OPT,
        4,
        roles={"value": small, "reward": small},
        sharding="zero2",
        gpus=16,
        nodes=1,
        ema=True,
        joint_update=False,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=4,
    )


def _peak(
    what: str, e: Estimate, published: float, unit: str, source: str, note: str = ""
) -> Figure:
    """A plan's peak of one device beside a published one. `unit`: of `UNITS`."""
    return Figure(what, e.peak / UNITS[unit], published, unit, source, note)


def memory() -> list[Figure]:
    """Peaks of one device."""
    return [*_chat_memory(), *_torchtune_memory(), *_litgpt_memory(), kv_blocks()]


def _chat_memory() -> Iterator[Figure]:
    sft = _chat("sft", OPT, 8, sharding="zero2", gpus=16, nodes=1, loss="plain")
    yield _peak("SFT OPT-1.3b, ZeRO-2 on 16, batch 8", sft, 22.95, "GB", CHAT)
    reward = _chat("reward", OPT_SMALL, 4, sharding="zero1")
    yield _peak("RM OPT-350m, batch 4 pairs", reward, 12.81, "GB", CHAT)
    what, note = (
        "PPO OPT-1.3b and 350m, ZeRO-2 on 16, EMA",
        "actor and critic are updated one after the other",
    )
    yield _peak(what, _chat_ppo(), 20.55, "GB", CHAT, note)


def _torchtune_memory() -> Iterator[Figure]:
    def tune(**more) -> Estimate:
        lengths = {"per_device_train_batch_size": 2, "prompt_length": 0, "response_length": 4096}
        llama3 = "meta-llama/Llama-3.2-3B"
        return _plan("sft", llama3, "a100-80", dtype="bfloat16", padded=False, **lengths, **more)

    source = "torchtune README, memory table"
    what = "SFT Llama-3.2-3B, bf16, 2 x 4096, plain loss"
    yield _peak(what, tune(loss="plain"), 60.0, "GiB", source)
    what = "the same, fused loss, checkpointing"
    yield _peak(what, tune(gradient_checkpointing=True), 24.9, "GiB", source)


def _litgpt_memory() -> Iterator[Figure]:
    one_row = {"dtype": "bfloat16", "per_device_train_batch_size": 1}
    lora = {
        "adapter_dtype": "bfloat16",
        "lora_r": 8,
        "loss": "plain",
        "padded": False,
        "lora_target_modules": ("q_proj", "v_proj"),
        "prompt_length": 0,
        "response_length": 1304,
    }
    source = "litgpt tutorials/resource-tables.md"
    what, note = "LoRA r=8 q,v Llama-2-7B, bf16", "litgpt's longest Alpaca sample has 1304 tokens"
    e = _plan("sft", LLAMA2, "a100-40", **one_row, **lora)
    yield _peak(what, e, 21.3, "GB", source, note)
    four = {"load_in_4bit": True, "prompt_length": 16, "response_length": 256, **one_row}
    e = _plan("inference", LLAMA2, "a100-40", **four)
    yield _peak("Llama-2-7B in NF4", e, 4.57, "GB", source)
    e = _plan("inference", LLAMA2, "a100-40", use_bnb_nested_quant=True, **four)
    yield _peak("Llama-2-7B in NF4, scales quantised too", e, 4.26, "GB", source)


def kv_blocks() -> Figure:
    """Blocks of 16 tokens of cache beside the weights at 0.9 of the memory, as vLLM counts them: it
    takes off what a pass over its longest batch (4096 tokens) needs."""
    e = _plan(
        "inference",
        LLAMA2,
        "a100-80",
        dtype="bfloat16",
        per_device_train_batch_size=1,
        prompt_length=4095,
        response_length=1,
    )
    parts = e.peak_phase.bytes
    passing = sum(v for (_, part), v in parts.items() if part in ("activations", "logits"))
    weights = parts["policy", "parameters"]
    model = e.setup.model
    block = 16 * 2 * model.depth * model.kv_heads * model.head_dim * 2
    room = 0.9 * e.hardware.memory - weights - passing
    return Figure(
        "KV blocks, Llama-2-7B, A100-80", room // block, 7351, "blocks", "vLLM pull request 2031"
    )


def time() -> list[Figure]:
    """Rates and times."""
    long = dict(prompt_length=0, response_length=2048, padded=False, loss="plain")
    mpt = _plan(
        "sft", LLAMA2, "a100-80", sharding="fsdp2", gpus=8, per_device_train_batch_size=6, **long
    )
    tiny = _plan(
        "sft", "TinyLlama/TinyLlama-1.1B", "a100-40", per_device_train_batch_size=8, **long
    )
    # Compiled into one graph: no launch of single kernels.
    compiled = hardware("a100-80", op_seconds=1e-6)
    lengths = {"per_device_train_batch_size": 1, "prompt_length": 5, "response_length": 200}
    settings = {"dtype": "bfloat16", **lengths}
    fast = estimate("inference", presets()[LLAMA2], compiled, settings)
    chat = _chat_ppo().seconds_of
    train = sum(
        v for (phase, _), v in chat.items() if phase in ("forward", "backward", "optimizer")
    )
    note = "hardware not stated; planned on the 16 V100-32 of one DGX-2"
    return [
        Figure(
            "7B pretraining, 8 x A100-80",
            6 * 2048 / mpt.step_seconds,
            4641,
            "tokens/s/GPU",
            "llm-foundry training benchmarks",
        ),
        Figure(
            "TinyLlama-1.1B, A100-40",
            8 * 2048 / tiny.step_seconds,
            24000,
            "tokens/s/GPU",
            "TinyLlama README",
        ),
        Figure(
            "Llama-2-7B, batch 1, A100-80, compiled",
            200 / fast.step_seconds,
            104.9,
            "tokens/s",
            "gpt-fast README",
        ),
        Figure("PPO OPT-1.3b: generation", chat["rollout", "policy"], 2.552, "s", CHAT, note),
        Figure("PPO OPT-1.3b: training", train, 1.036, "s", CHAT, note),
    ]
