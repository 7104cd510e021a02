"""The rates that a real model achieves, of those that `calibrate` measures one by one.

A product repeated on the same operands finds them in the cache, and its result's memory is there
already; in a model neither holds, and Python runs between any two operations. So a small Llama
runs forward and backward in a few shapes, and the plan's prediction of those passes
(`cost/layers.py`) is fitted to the clock: five rates, by least squares of the relative errors, two
of them drawn towards what was measured alone; that of streams stays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..cost.architecture import architecture
from ..cost.hardware import Hardware
from ..cost.layers import PassConfig
from ..cost.memory import trunk, works
from ..cost.seconds import cpu_parts
from ..cost.tape import Work

if TYPE_CHECKING:
    from transformers import LlamaModel

SHAPES = (
    # width, layers, rows, tokens: from launching alone to products alone
    (64, 4, 1, 1),
    (64, 4, 1, 24),
    (128, 4, 64, 1),
    (256, 4, 8, 1),
    (512, 2, 16, 1),
    (64, 4, 16, 48),
    (128, 4, 32, 64),
    (256, 2, 8, 128),
    (512, 2, 4, 128),
)
HOLD = 0.3
"""How firmly a rate is held to what was measured alone: as a relative error of this weight."""


def achieved_rates(hw: Hardware, device: torch.device, budget: float) -> Hardware:
    """The same hardware with the rates that small models achieve, within `budget` seconds."""
    shapes = SHAPES if device.type == "cpu" else SHAPES[:1]
    rng_state = torch.random.get_rng_state()  # a model draws its weights: the seed of yours stays
    try:
        models = [
            (_model(width, layers, device), rows, tokens) for width, layers, rows, tokens in shapes
        ]
    finally:
        torch.random.set_rng_state(rng_state)
    times: list[list[tuple[float, ...]]] = [[] for _ in models]
    end, rounds = time.perf_counter() + budget, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 60):
        for samples, case in zip(times, models, strict=True):  # in turn: a busy moment hits all
            samples.append(_timed_passes(*case))
        rounds += 1
    rows: list[tuple[Work, float]] = []
    for samples, (model, b, s) in zip(times, models, strict=True):
        medians = [statistics.median(column) for column in zip(*samples[1:], strict=True)]
        rows += zip(predicted_work(model.config.to_dict(), b, s), medians, strict=True)
    return fit_rates(hw, rows)


def _model(width: int, layers: int, device: torch.device) -> LlamaModel:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        vocab_size=512,
        max_position_embeddings=256,
        architectures=["LlamaModel"],
    )
    model = LlamaModel(config)
    nn.Module.to(model, device)  # transformers wraps `to` in a function without types
    model.eval()
    return model


def _timed_passes(model: LlamaModel, rows: int, tokens: int) -> tuple[float, ...]:
    """Seconds of a forward pass without gradients, of one with, and of the backward pass."""
    ids = torch.ones(rows, tokens, dtype=torch.long, device=model.device)
    seconds = []

    @contextmanager
    def timed() -> Iterator[None]:
        _wait(ids)
        start = time.perf_counter()
        yield
        _wait(ids)
        seconds.append(time.perf_counter() - start)

    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), timed():
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    gradient = torch.ones_like(hidden)
    with timed():
        hidden.backward(gradient)
    model.zero_grad(set_to_none=True)
    return tuple(seconds)


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def predicted_work(config: Mapping[str, object], rows: int, tokens: int) -> Iterator[Work]:
    """The plan's prediction of the same three passes."""
    model, p = architecture(config), PassConfig(rows, tokens, padded=False)
    for grad, which in ((False, "forward"), (True, "forward"), (True, "backward")):
        yield works(trunk(model, p, grad=grad), which)


def fit_rates(hw: Hardware, rows: list[tuple[Work, float]]) -> Hardware:
    """The hardware whose rates predict the seconds of these passes best."""
    if hw.kind == "gpu":  # one token: a pass lasts as long as launching it
        _, (forward, forward_seconds), (backward, backward_seconds) = rows
        return replace(
            hw,
            op_seconds=forward_seconds / forward.called,
            launch_seconds=backward_seconds / backward.launched,
        )
    # Three rates to start from; the fit is free to leave them.
    unit = replace(hw, operand_bandwidth=hw.bandwidth, op_seconds=4e-5, launch_seconds=2e-5)
    table: list[list[float]] = []
    target: list[float] = []
    for work, seconds in rows:
        *parts, streams = (part / seconds for part in cpu_parts(work, unit, "fp32"))
        table.append(parts)
        target.append(1 - streams)
    for rate in range(2):
        table.append([HOLD * (rate == column) for column in range(len(parts))])
        target.append(HOLD)
    a = torch.tensor(table, dtype=torch.float64)
    b = torch.tensor(target, dtype=torch.float64)[:, None]
    solution = torch.linalg.lstsq(a, b).solution[:, 0].tolist()
    longer = [max(0.1, x) for x in solution]  # times what the rate alone would take
    return replace(
        hw,
        flops={dtype: rate / longer[0] for dtype, rate in hw.flops.items()},
        function_rate=hw.function_rate / longer[1],
        operand_bandwidth=unit.operand_bandwidth / longer[2],
        op_seconds=unit.op_seconds * longer[3],
        launch_seconds=unit.launch_seconds * longer[4],
    )
