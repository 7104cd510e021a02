"""Inference under a load: time to the first token and for each further one, throughput, price.

An engine (`engine="vllm"`) runs one step after another; a step reads the weights once, decodes one
token for each running request, and takes in the prompts of new ones (continuous batching with
chunked prefill: Yu et al., OSDI 2022; Agrawal et al., 2403.02310). Every product takes the longer
of its arithmetic and of moving its operands, as in `seconds.py`; what an engine fuses is not
counted operation by operation, its kernels cost a constant each (`engine.yaml`).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .architecture import Linear
from .hardware import Hardware
from .parallel import BY_INPUTS, ENGINE, all_reduce_seconds, all_reduces
from .quantization import FORMATS, Format
from .seconds import product_dtype
from .setup import Setup
from .states import states

PLAIN = {size: Format(source="", bits=8.0 * size, head=True) for size in (2, 4)}
"""Weights as they are, by their bytes."""


@dataclass(frozen=True)
class Serving:
    """What a load gets of all copies of a model together. Seconds, tokens, USD; None where the
    price is not known. `first_token` is `waiting` and `prefill`; `fits`: requests that memory holds
    at full length; `most`: requests a second that they can do, where more arrive."""

    in_flight: float
    fits: int
    waiting: float
    prefill: float
    per_token: float
    latency: float
    requests_per_second: float
    tokens_per_second: float
    usd_per_million: float | None
    most: float | None = None

    @property
    def first_token(self) -> float:
        return self.waiting + self.prefill


def _serving(s: Setup, hw: Hardware, in_flight: float, fits: int, **times: float) -> Serving:
    """Of one copy's figures those of all copies; throughput by Little's law."""
    rate = s.replicas * in_flight / times["latency"]
    tokens = rate * sampled(s)
    price = None if hw.price is None else s.gpus * hw.price / 3600 / tokens * 1e6
    most = times.pop("most", math.inf)
    return Serving(
        in_flight=in_flight * s.replicas,
        fits=fits * s.replicas,
        requests_per_second=rate,
        tokens_per_second=tokens,
        usd_per_million=price,
        most=most * s.replicas if most < math.inf else None,
        **times,
    )


def sampled(s: Setup) -> float:
    """Tokens of a response that are sampled, on average."""
    return s.response if s.mean_response is None else min(s.mean_response, s.response)


def tokens_per_pass(s: Setup) -> float:
    """Tokens that a pass of the model brings on average: with a draft that guesses k, each kept
    with probability a, 1 + a + … + a^k (Leviathan et al. 2023, 2211.17192, equation 1)."""
    guessed = s.num_assistant_tokens if s.draft else 0
    return math.fsum((s.accepted or 0.0) ** i for i in range(guessed + 1))


def static(s: Setup, hw: Hardware, seconds: dict[tuple[str, str], float], peak: float) -> Serving:
    """transformers: a batch from start to end, then the next one. `peak`: bytes of a device."""
    prefill, decode = (
        math.fsum(t for (phase, _), t in seconds.items() if phase == name)
        for name in ("prefill", "decode")
    )
    models = [s.held] if s.draft is None else [s.held, s.draft]
    held = math.fsum(states(s, model, "lm", trained=False).parameters for model in models)
    each = (peak - held) / s.batch
    times = {"waiting": 0.0, "prefill": prefill, "latency": prefill + decode}
    per_token = decode / max(1.0, sampled(s) - 1)
    fits = max(0, int((hw.memory - held) / each))
    fits = fits if s.draft is None else min(fits, 1)
    return _serving(s, hw, s.batch, fits, per_token=per_token, **times)


def around(s: Setup, hw: Hardware, phase: str) -> float:
    """Seconds that a server which runs transformers adds to a phase of inference, step by step."""
    if s.stage != "inference":
        return 0.0
    step = hw.step_seconds + hw.request_seconds * s.batch
    return (s.response - 1) * step if phase == "decode" else step + hw.arrival_seconds


# ------------------------------------------------------------------------------ an engine's memory


def token_bytes(s: Setup) -> float:
    """Of the keys and values of a token on a device."""
    m = s.held
    size = 1 if s.kv_cache_dtype == "fp8" else s.bytes_per_weight
    return 1.0 * m.cached * size


def request_bytes(s: Setup, new: float = 1) -> float:
    """Of the keys and values of a request at its full length, in whole blocks, while it takes in so
    many `new` tokens: a layer with a window holds these and the window before them.

    As vLLM 0.32 does it (v1/kv_cache_interface.py, v1/core/kv_cache_utils.py): layers of each kind
    lie in groups of one size, the last one filled up; beside chunks (Llama 4) all are whole. States
    of any length are added as transformers keeps them, not in vLLM's pages.
    """
    m, block = s.held, ENGINE["block_tokens"]
    state = m.state_bytes(s.bytes_per_weight)
    blocks = math.ceil(s.length / block)
    layers, numbers = Counter[int](), Counter[int]()
    for layer in m.layers:
        whole = layer.count - sum(n for _, n in layer.windows)
        for window, n in (*layer.windows, (0, whole)):
            layers[window] += n * (layer.cached > 0)
            numbers[window] += n * layer.cached
    counts = [n for n in layers.values() if n]
    chunks = "attention_chunk_size" in m.facts.fields.values()
    if chunks or not any(n for w, n in layers.items() if w):
        return blocks * block * token_bytes(s) + state
    group = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    near = {w: min(blocks, math.ceil((w - 1 + new) / block) + 1) if w else blocks for w in layers}
    filled = (
        near[w] * numbers[w] * math.ceil(n / group) * group / n for w, n in layers.items() if n
    )
    return sum(filled) * block * token_bytes(s) / m.cached + state


def workspace(s: Setup) -> float:
    """Bytes of a step of `max_num_batched_tokens`: hidden states, and the wider one of an MLP and
    of sampling for `max_num_seqs` requests; and what the engine keeps for itself."""
    m = s.held
    widest = max(
        sum(
            (x.inputs if x.name in BY_INPUTS else x.outputs) * min(x.copies, m.active)
            for x in layer.linears
            if x.part == "mlp"
        )
        for layer in m.layers
    )
    mlp = s.max_num_batched_tokens * widest * s.bytes_per_weight
    sampler = s.max_num_seqs * s.model.vocabulary * ENGINE["sampler_bytes"]
    hidden = 2 * s.max_num_batched_tokens * m.hidden * s.bytes_per_weight
    return hidden + max(mlp, sampler) + ENGINE["reserve_bytes"]


@dataclass(frozen=True)
class Engine:
    """One copy of a model, on `tensor_parallel` devices."""

    s: Setup
    hw: Hardware

    @cached_property
    def bandwidth(self) -> float:
        return self.hw.bandwidth * self.hw.bandwidth_efficiency

    @cached_property
    def weights(self) -> float:
        return states(self.s, self.s.held, "lm", trained=False).parameters

    @cached_property
    def cache(self) -> float:
        """Bytes that are left for keys and values; below 0 where nothing is."""
        usable = self.s.gpu_memory_utilization * self.hw.memory
        return usable - self.weights - workspace(self.s)

    @property
    def fits(self) -> int:
        """Requests that memory holds, as many as the engine runs at once."""
        s = self.s
        each = request_bytes(s)
        prompt = request_bytes(s, min(s.prompt, s.max_num_batched_tokens))  # one's is taken in
        return max(0, min(int((self.cache - (prompt - each)) / each), s.max_num_seqs))

    def step(self, rows: float, prompt: float = 0.0) -> float:
        """Seconds of a step in which `rows` requests decode, half way through their responses,
        beside so many tokens of prompts."""
        m, s, tokens = self.s.held, self.s, rows + prompt
        kind = FORMATS.get(s.weights_format, PLAIN[s.bytes_per_weight])
        busy = math.fsum(
            layer.count * self._product(x, tokens, kind)
            for layer in m.layers
            for x in layer.linears
        )
        ends = rows + prompt / max(1, s.prompt)  # tokens whose logits are wanted
        head = kind if kind.head else PLAIN[s.bytes_per_weight]
        busy += self._product(m.lm_head, ends, head) + self._attention(rows, prompt)
        size = tokens * m.hidden * s.bytes_per_weight
        one = all_reduce_seconds(size, s.tensor_parallel, s.nodes_per_copy, self.hw)
        kernels = ENGINE["kernels"] * m.depth * ENGINE["kernel_seconds"]
        around = ENGINE["step_seconds"] + ENGINE["request_seconds"] * rows
        return busy + all_reduces(m) * one + kernels + around

    def _product(self, x: Linear, tokens: float, kind: Format) -> float:
        """A map of so many tokens; of experts those that any of them is sent to."""
        share = self.s.model.active / self.s.model.experts if x.copies > 1 else 1.0
        hit = x.copies * (1 - (1 - share) ** max(1.0, tokens)) if x.copies > 1 else 1.0
        rows = tokens * share * x.copies
        read, written = kind.moved(x, rows / hit, self.s.bytes_per_weight)
        streams = rows * (x.inputs + x.outputs) * self.s.bytes_per_weight
        rate = self.hw.matmul_rate(product_dtype(self.s))
        if kind.products in self.hw.flops:
            rate = self.hw.matmul_rate(kind.products) * kind.products_share
        busy = 2 * rows * x.inputs * x.outputs / rate
        moved = (hit * read + streams) / self.bandwidth
        # What lies between maps reads and writes their inputs and outputs once more.
        return max(busy, moved) + (hit * written + streams) / self.bandwidth

    def _attention(self, rows: float, prompt: float) -> float:
        """Reading the caches of what decodes; of prompts all pairs at the rate of products, that
        is the causal half at half of it (FlashAttention: Dao, 2307.08691, section 4)."""
        m, s = self.s.held, self.s
        context = s.prompt + sampled(s) / 2 - m.beyond(s.prompt, s.prompt + sampled(s))
        before = s.prompt - 2 * m.beyond(0, s.prompt)
        pairs = 4.0 * m.heads * m.head_dim * m.depth / self.hw.matmul_rate(product_dtype(s))
        reading = rows * context * token_bytes(s) / self.bandwidth
        return max(reading, rows * context * pairs) + prompt * before * pairs

    def prefill(self, rows: float) -> float:
        """Seconds until a prompt is taken in beside what decodes, in chunks where it is long."""
        chunks = math.ceil(max(1, self.s.prompt) / self.s.max_num_batched_tokens)
        return chunks * self.step(rows, self.s.prompt / chunks)

    def latency(self, running: float) -> tuple[float, float, float, float]:
        """→ seconds of a request, and of them waiting, prefill, and for each further token, where
        so many run at once and a new one comes for each that is done."""
        s, more = self.s, sampled(self.s) - 1
        # The prompts of all others are taken in while one runs, some before its first token: in
        # the steps that it decodes in, or in as many as they need.
        others, decoding = (running - 1) * s.prompt, running if more else 0.0
        steps = max(more, others / s.max_num_batched_tokens)
        decode = steps * self.step(running * more / steps, others / steps) if steps else 0.0
        prefill = self.prefill(max(0.0, decoding - 1))
        latency, extra = prefill + decode, prefill - self.step(max(0.0, decoding - 1))
        busy = min(0.99, running * extra / latency)
        queue = min(busy / (2 * (1 - busy)), running - 1) * extra
        waiting = min(queue, decode / 2) if more else decode
        return latency, waiting, prefill, (decode - waiting) / more if more else 0.0


@lru_cache(maxsize=256)
def served(s: Setup, hw: Hardware, in_flight: float, rate: float | None = None) -> Serving:
    """So many requests in flight on each copy, or as many as `rate` a second (of all copies) keep
    there. What does not fit waits until one that runs is done (Little's law); prompts wait for each
    other as in a queue with one server (Pollaczek and Khinchine)."""
    engine, most = Engine(s, hw), math.inf
    held = max(1, engine.fits)
    if rate is not None:
        most = held / engine.latency(held)[0]
        low, high = 0.0, float(held)
        for _ in range(24):
            middle = (low + high) / 2
            enough = middle / engine.latency(max(1.0, middle))[0] >= rate / s.replicas
            low, high = (low, middle) if enough else (middle, high)
        in_flight = high
        most = math.inf if most >= rate / s.replicas else most
    running = min(float(in_flight), held)
    latency, waiting, prefill, per_token = engine.latency(max(1.0, running))
    queue = (in_flight - running) * latency / running
    times = {"waiting": waiting + queue, "prefill": prefill, "per_token": per_token}
    return _serving(s, hw, in_flight, engine.fits, latency=latency + queue, most=most, **times)


def serving_seconds(s: Setup, hw: Hardware) -> dict[tuple[str, str], float]:
    """Seconds in which as many requests as are in flight are served; prefill takes its part."""
    engine, got = Engine(s, hw), served(s, hw, s.batch, s.requests_per_second)
    total = s.batch * s.replicas / got.requests_per_second
    prompts = min(total, s.batch * (engine.prefill(0) - engine.step(0)))
    return {("prefill", "policy"): prompts, ("decode", "policy"): total - prompts}
