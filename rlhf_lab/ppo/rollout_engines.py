"""Engines that sample a rollout, behind one call: `sample(prompts, keys) → responses, log π`.

    OwnLoop              `sampling.generate`, where nothing else is asked for
    ContinuousBatching   transformers' engine of that name (`use_transformers_continuous_batching`)
    VLLMEngine           vLLM in this process (`use_vllm`), in `vllm_engine.py`

An engine samples from the policy as it is at the call, adapters and all, at the temperature alone
(rule 1), and stops where our loop stops. One that computes in another way than the trainer returns
its own log-probabilities too: the update weights each token by π/π_engine, capped (rule 21).

The noise of our loop belongs to a response (`sampling.row_keys`), and so do vLLM's seeds.
Continuous batching draws for whatever rows pass together, from one seed for each rollout: a run can
be repeated and resumed, but with another number of processes other responses are sampled.
"""

from __future__ import annotations

import gc
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ..display import first_line
from .executor import Executor
from .logprobs import AnyModel

Sampled = tuple[Tensor, Tensor | None]
"""Responses (b, t), and log π of their tokens as the engine computed them (b, t): fp32, 0 after the
end; None where the trainer computes them in the same way."""
Answer = tuple[Sequence[int], Sequence[float]]
"""Token ids of a response, with the stop token where there is one, and log π of each."""
PAGE = 32
"""Tokens of a page of keys and values: responses are seldom as long as transformers' 256."""


@dataclass(frozen=True)
class Sampling:
    """What is sampled: the same for every engine."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    """empty: a response ends at `max_new_tokens` only"""
    pad_token_id: int
    temperature: float


class RolloutEngine(ABC):
    """Samples responses from a policy. `called`: the model whose calls the meter can count; of
    other engines it knows the time and the tokens."""

    called: nn.Module | None = None

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    @abstractmethod
    def sample(
        self, policy: AnyModel, prompt_ids: Tensor, prompt_mask: Tensor, keys: Tensor
    ) -> Sampled:
        """One response per prompt. prompt_ids, prompt_mask: (b, p) padded on the left; keys: (b,)
        from `row_keys`. Raises RuntimeError, one line, where the engine fails."""

    def padded(self, answers: Sequence[Answer], device: torch.device) -> tuple[Tensor, Tensor]:
        """Responses as one tensor, padded on the right, and their log-probabilities. → (b, t)."""
        shape = len(answers), max(len(ids) for ids, _ in answers)
        ids = torch.full(shape, self.sampling.pad_token_id)
        logprobs = torch.zeros(shape)
        for row, (tokens, values) in enumerate(answers):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            logprobs[row, : len(tokens)] = torch.tensor(values)
        return ids.to(device), logprobs.to(device)


def real_prompts(prompt_ids: Tensor, prompt_mask: Tensor) -> list[list[int]]:
    """Prompts without their padding. (b, p), (b, p) → b lists of token ids."""
    return [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]


def kept_random(device: torch.device) -> AbstractContextManager[None]:
    """torch's generators are afterwards as they were: another engine draws from them."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def light_heap() -> Iterator[None]:
    """Garbage is searched for only among what is made here: transformers collects twice at the end
    of every batch, each time through all of a session's objects, a quarter of a second."""
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


def base_of(policy: AnyModel) -> AnyModel:
    """The transformers model of a policy, its own adapters switched on in it."""
    model = getattr(policy, "switched", lambda: policy)()
    return model.get_base_model() if hasattr(model, "peft_config") else model


def answered(manager: Any, count: int) -> Iterator[Any]:
    """The next requests that transformers' engine is done with. Raises RuntimeError where it
    fails."""
    while count:
        one = manager.get_result(timeout=1)
        if one is not None and one.error:
            raise RuntimeError(f"continuous batching failed: {one.error}")
        if one is not None and one.is_finished():
            count -= 1
            yield one
        elif one is None and not manager.is_running():
            raise RuntimeError("continuous batching ended before its requests")


class OwnLoop(RolloutEngine):
    """Our loop over tokens. It computes as the trainer does, so its samples need no weights."""

    def __init__(self, policy: AnyModel, sampling: Sampling, executor: Executor) -> None:
        super().__init__(sampling)
        self.executor, self.called = executor, policy

    def sample(
        self, policy: AnyModel, prompt_ids: Tensor, prompt_mask: Tensor, keys: Tensor
    ) -> Sampled:
        responses = self.executor.generate(
            policy,
            prompt_ids,
            prompt_mask,
            keys,
            max_new_tokens=self.sampling.max_new_tokens,
            stop_token_ids=self.sampling.stop_token_ids or None,
            pad_token_id=self.sampling.pad_token_id,
            temperature=self.sampling.temperature,
        )
        return responses, None


def engine_sizes(rows: int, pages: int, tokens: int, **more: Any) -> ContinuousBatchingConfig:
    """transformers' engine for so many requests at once, in all so many pages of keys and values,
    and so many tokens a step. Without sizes it takes most of the free memory."""
    sizes: dict[str, Any] = {"page_size": PAGE, "num_blocks": pages, "max_batch_tokens": tokens}
    return ContinuousBatchingConfig(max_requests_per_batch=rows, **{**sizes, **more})


class ContinuousBatching(RolloutEngine):
    """transformers' continuous batching: requests that come and go, over paged keys and values.

    The weights are the policy's own, so nothing is copied. The pages of a rollout are made for it
    and freed after it: kept ones would answer from the weights of an iteration before. `settings`:
    of transformers' `ContinuousBatchingConfig`, in place of the sizes that a rollout needs.
    """

    def __init__(
        self, policy: AnyModel, sampling: Sampling, settings: dict[str, object] | str | None
    ) -> None:
        super().__init__(sampling)
        if isinstance(settings, str):
            raise ValueError(f"transformers_continuous_batching_config={settings!r} is no JSON")
        self.settings = settings or {}
        if fixed := self.settings.keys() & {"seed", "return_logprobs", "allow_block_sharing"}:
            raise ValueError(
                f"transformers_continuous_batching_config: {min(fixed)} is set by the trainer"
            )
        try:  # what transformers does not take (a setting, a kind of attention) it says at once
            self._answers(policy, [[sampling.pad_token_id]], seed=0, limit=1)
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            line = f"use_transformers_continuous_batching: {first_line(error)}"
            raise ValueError(line) from error

    def sample(
        self, policy: AnyModel, prompt_ids: Tensor, prompt_mask: Tensor, keys: Tensor
    ) -> Sampled:
        prompts, seed = real_prompts(prompt_ids, prompt_mask), int(keys.sum()) & (2**31 - 1)
        answers = self._answers(policy, prompts, seed, self.sampling.max_new_tokens)
        return self.padded(answers, prompt_ids.device)

    def _answers(
        self, policy: AnyModel, prompts: list[list[int]], seed: int, limit: int
    ) -> list[Answer]:
        """The answers to prompts, in their order.

        `generate_batch` starts its thread before it hands over the prompts: which of them share the
        first passes is then chance, and so are the responses. Here all wait when the thread starts.
        """
        model, device = base_of(policy), policy.device
        with light_heap(), kept_random(device):  # transformers seeds torch's generators
            manager = model.init_continuous_batching(
                self._generation(limit), self._sizes(prompts, seed, limit)
            )
            names = manager.add_requests(prompts, max_new_tokens=limit)
            manager.start()
            try:
                done = answered(manager, len(names))
                found = {one.request_id: (one.generated_tokens, one.logprobs) for one in done}
            finally:
                manager.stop(block=True, hard_stop=sys.exc_info()[0] is not None)
                manager.destroy()
        return [found[name] for name in names]

    def _generation(self, limit: int) -> GenerationConfig:
        """Rule 1: the temperature only. Nothing of the model's own generation config is taken."""
        stops = list(self.sampling.stop_token_ids)
        return GenerationConfig(
            do_sample=True,
            temperature=self.sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=limit,
            eos_token_id=stops or -1,  # -1: none; transformers would take the model's for None
            pad_token_id=self.sampling.pad_token_id,
        )

    def _sizes(self, prompts: list[list[int]], seed: int, limit: int) -> ContinuousBatchingConfig:
        """Room for all of the rollout at once; transformers itself would take most of the free
        memory, however small the rollout."""
        page = int(str(self.settings.get("page_size", PAGE)))
        pages = sum(-(-(len(ids) + limit) // page) + 1 for ids in prompts)
        sizes: dict[str, object] = {
            "page_size": page,
            "num_blocks": pages,
            "max_batch_tokens": max(sum(map(len, prompts)), page),
            "max_requests_per_batch": len(prompts),
        }
        if "max_memory_percent" in self.settings:  # transformers then divides that
            sizes = {"page_size": page}
        fixed = {"return_logprobs": True, "allow_block_sharing": False, "seed": seed}
        return ContinuousBatchingConfig(**{**sizes, **self.settings, **fixed})  # type: ignore[arg-type]
