"""An engine that samples (`use_vllm`): for RLOO and GRPO as TRL 1.16 runs vLLM, on the devices
that train (`vllm_mode="colocate"`) or on devices of its own ("server"); for PPO in the process that
trains.

It keeps a copy of the policy in 16 bits and keys and values in what is left of its share of the
memory, and gets new weights before each generation (trl/generation/vllm_generation.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

from .hardware import Hardware
from .serving import Engine, sampled
from .setup import Setup


def engine_setup(s: Setup) -> Setup:
    """The engine as a plan of inference: one copy, on so many devices as share its layers. A server
    has whole devices."""
    colocated = s.vllm_mode == "colocate"
    share = s.vllm_gpu_memory_utilization if colocated else Setup.gpu_memory_utilization
    tp = s.vllm_tensor_parallel_size
    like_training = s.stage == "ppo" and not s.autocast  # else 16 bits
    dtype = s.dtype if like_training else "float16" if s.fp16 else "bfloat16"
    return replace(
        s,
        stage="inference",
        engine="vllm",
        dtype=dtype,
        bf16=False,
        fp16=False,
        lora_r=0,
        load_in_4bit=False,
        load_in_8bit=False,
        sharding="none",
        offload="none",
        gpus=tp,
        nodes=1,
        tensor_parallel=tp,
        gpu_memory_utilization=share,
        batch=_requests(s),
        gradient_accumulation_steps=1,
        steps_per_generation=None,
        activation_offloading=False,
        use_liger_kernel=False,
        use_vllm=False,
        layout="four",
    )


def _requests(s: Setup) -> int:
    """Of one engine in a generation: those of the devices that share it, or of all."""
    sharing = s.vllm_tensor_parallel_size if s.vllm_mode == "colocate" else s.replicas
    return s.rollout_batch * sharing


def engine_bytes(s: Setup, hw: Hardware) -> tuple[float, float]:
    """→ bytes of the engine's weights, and of its keys and values and all else that it takes, on a
    device that trains. Raises ValueError, one line, where its share holds no request."""
    engine = Engine(engine_setup(s), hw)
    if engine.fits < 1:
        raise ValueError(
            f"vllm_gpu_memory_utilization={engine.s.gpu_memory_utilization:g} of {hw.name} does "
            f"not hold the policy's weights and a response: raise it, or "
            f"vllm_tensor_parallel_size={s.vllm_tensor_parallel_size}"
        )
    if s.vllm_mode == "server":
        return 0.0, 0.0
    return engine.weights, s.vllm_gpu_memory_utilization * hw.memory - engine.weights


def engine_seconds(s: Setup, hw: Hardware) -> float:
    """Of one generation: new weights, then all prompts at once, as many as fit at a time, until the
    longest response ends. A device's own copy is written over; a server's comes over the link."""
    one = engine_setup(s)
    engine, requests = Engine(one, hw), _requests(s)
    rows = min(requests, max(1, engine.fits))
    waves = math.ceil(requests / rows)
    chunks = math.ceil(max(1, rows * s.prompt) / one.max_num_batched_tokens)
    prefill = chunks * engine.step(0, rows * s.prompt / chunks)
    running = max(1.0, rows * sampled(s) / s.response)  # on average: those that ended have left
    decode = (s.response - 1) * engine.step(running)
    speed = hw.bandwidth / 2 if s.vllm_mode == "colocate" else hw.speed_of("link")
    return waves * (prefill + decode) + engine.weights / speed
