"""What an engine's scheduler does, read off a real engine: which request has which slot, when.

The engine is transformers' continuous batching over paged keys and values; a step is one call of
the model, in which every running request gets one token. Two ways to feed it the same requests:

    continuous   all at once: a slot that falls free is given to the next request before the next
                 step (iteration-level scheduling: Yu et al., OSDI 2022)
    static       batch after batch: the next one starts when the longest request of this one ends
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import GenerationConfig

from ..ppo.logprobs import AnyModel
from ..ppo.rollout_engines import PAGE, answered, engine_sizes, kept_random, light_heap


class Occupied(NamedTuple):
    """A slot that one request has, from step `first` to step `last`, both included."""

    request: int
    slot: int
    first: int
    last: int


@dataclass(frozen=True)
class Schedule:
    """A trace. `steps`: for each step the requests that got a token in it; `seconds`: from the
    first step's beginning to the last answer."""

    slots: int
    steps: tuple[tuple[int, ...], ...]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.steps))

    @property
    def busy(self) -> float:
        """Share of slots × steps that made a token; the rest stood empty."""
        return self.tokens / (self.slots * len(self.steps))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def occupied(self) -> list[Occupied]:
        """Who had which slot: each request the lowest that was free when it began."""
        spans = dict[int, list[int]]()
        for i, requests in enumerate(self.steps):
            for request in requests:
                spans.setdefault(request, [i, i])[1] = i
        free_from, found = [0] * self.slots, []
        for request, (first, last) in spans.items():
            slot = next(i for i, step in enumerate(free_from) if step <= first)
            free_from[slot] = last + 1
            found.append(Occupied(request, slot, first, last))
        return found


def trace(
    model: AnyModel,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    slots: int,
    *,
    static: bool = False,
) -> Schedule:
    """The requests through the engine, greedily, each until it has its length; no stop ends it.

    prompts: token ids; lengths: new tokens of each; slots: requests that run at once. Raises
    RuntimeError where the engine fails.
    """
    prompt = max(map(len, prompts))
    pages = math.ceil((prompt + max(lengths)) / PAGE) + 1
    # Memory for every slot at the longest request, so that a free slot is all that one waits for;
    # transformers' own margin of .15 lets no new request in while memory is short, and its async
    # batching would schedule a request once more than it has tokens.
    how = {"safety_margin": 0.0, "allow_block_sharing": False, "use_async_batching": False}
    sizes = engine_sizes(slots, slots * pages, slots * prompt, **how)
    groups = [range(len(prompts))]
    if static:
        groups = [groups[0][i : i + slots] for i in range(0, len(prompts), slots)]
    steps = list[tuple[int, ...]]()
    with light_heap(), kept_random(model.device):
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1), sizes
        )
        manager.warmup()  # makes the scheduler, which is asked once before each step
        schedule_batch = manager.batch_processor.scheduler.schedule_batch

        def recorded(token_budget: int, cache_budget: int) -> object:
            batch = schedule_batch(token_budget, cache_budget)
            if batch[0]:
                steps.append(tuple(int(x.state.request_id) for x in batch[0] if x.has_new_token))
            return batch

        manager.batch_processor.scheduler.schedule_batch = recorded
        manager.start()
        try:
            began = time.perf_counter()
            for group in groups:
                with manager.pause():  # else the first ones would start without the others
                    for i in group:
                        manager.add_request(
                            list(prompts[i]), request_id=str(i), max_new_tokens=lengths[i]
                        )
                for _ in answered(manager, len(group)):
                    pass
            seconds = time.perf_counter() - began
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
    return Schedule(slots, tuple(steps), seconds)
