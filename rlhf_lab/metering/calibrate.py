"""Measure the machine at hand in twenty seconds: products, streams, exponentials, small models.

    hw = calibrate()                    # saved: hardware("here") is this machine from now on

Medians after a warm-up, with the threads torch is set to. Nothing else should run meanwhile: a busy
machine measures slower.

A product repeated on the same operands finds them in the cache, and its result's memory is there
already; in a model neither holds, and Python runs between any two operations. So a small Llama
then runs forward and backward in a few shapes, and the plan's prediction of those passes
(`cost/layers.py`) is fitted to the clock: five rates, by least squares of the relative errors, two
of them drawn towards what was measured alone; that of streams stays. The rates are those that a
model achieves, so both efficiencies are 1.
"""

from __future__ import annotations

import datetime
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..cost.architecture import architecture
from ..cost.hardware import (
    CATALOGUE,
    DTYPES,
    Hardware,
    calibration_file,
    cores,
    in_catalogue,
    save_calibration,
    usable_memory,
)
from ..cost.layers import PassConfig
from ..cost.memory import trunk, works
from ..cost.seconds import cpu_parts
from ..cost.work import Work
from ..display import counted
from ..runs.json_files import JsonObject

if TYPE_CHECKING:
    from transformers import LlamaModel

TORCH_DTYPES = dict(zip(DTYPES, (torch.float32, torch.float32, torch.bfloat16, torch.float16)))
TOKENS, WIDTHS = (256, 1024, 4096), (64, 128, 256, 512, 1024, 2048)
SAMPLE = 2e-3
"""Seconds that one timed sample lasts at least, so that clock and sync cost little of it."""
FAR_SLOWER = 4
"""A dtype this many times slower than fp32 on a CPU is emulated: the probe's rate is enough."""

BUSY = 0.25
"""Share of the processor that others may take before `calibrate` warns."""
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


def calibrate(seconds: float = 20, save: bool = True, **figures: object) -> Hardware:
    """The machine at hand as a `Hardware`, measured in about `seconds` (the small models alone
    take some); on a GPU, the current one. `save`: for later plans ("here"). `figures`: of yours,
    such as `network=1e9`, bytes/s from one process to another. Raises ValueError for others.
    """
    CATALOGUE["h100"].with_(**figures)  # refused now, not after measuring
    if isinstance(seconds, bool) or not (isinstance(seconds, (int, float)) and 0 < seconds < 3600):
        raise ValueError(f"seconds must be above 0 and below 3600, not {seconds!r}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if save:  # find out now, not after measuring, that there is no place for it
        calibration_file().parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False), torch.no_grad():
        flops, curve, taken = _products(device, _dtypes(device), 0.25 * seconds)
        bandwidth = _bandwidth(device, 0.06 * seconds)
        functions = _functions(device, 0.03 * seconds)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    measured = Hardware(
        flops=flops,
        matmul_curve=curve,
        bandwidth=bandwidth,
        function_rate=functions,
        measured=True,
        **_description(device, taken),
    )
    measured = achieved_rates(measured, device, 0.4 * seconds).with_(**figures)
    if taken > BUSY:
        warnings.warn(
            f"{_busy(taken)}: what was measured is too slow; calibrate again when it is quiet",
            stacklevel=2,
        )
    if save:
        save_calibration(measured)
    return measured


def _dtypes(device: torch.device) -> list[str]:
    """The dtypes that the device has, fp32 first."""
    if device.type != "cuda":
        return ["fp32", "bf16", "fp16"]
    modern = torch.cuda.get_device_capability()[0] >= 8  # before Ampere bf16 is emulated
    return list(TORCH_DTYPES) if modern else ["fp32", "fp16"]


def _busy(taken: float) -> str:
    return f"other programs took {taken:.0%} of the processor"


def _description(device: torch.device, taken: float) -> JsonObject:
    """Name, memory and origin; of a GPU of the catalogue also its links and its price."""
    busy = f" while {_busy(taken)}" if taken > BUSY else ""
    today = datetime.date.today().isoformat()
    source = f"calibrated on {today} with torch {torch.__version__}{busy}"
    if device.type != "cuda":
        threads = torch.get_num_threads()
        name = f"{_processor()}, {counted(threads, 'thread')}"
        return {"kind": "cpu", "name": name, "memory": usable_memory(), "source": source}
    name = torch.cuda.get_device_name()
    entry = CATALOGUE.get(in_catalogue(name) or "")
    figures = ("link", "network", "price", "price_date", "price_source") if entry else ()
    return {
        "kind": "gpu",
        "name": name,
        "memory": torch.cuda.get_device_properties(device).total_memory,
        "devices_per_node": torch.cuda.device_count(),
        "source": source,
        **{figure: getattr(entry, figure) for figure in figures},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "CPU"


# -------------------------------------------------------------------------------------- the clock


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds_of(run: Callable[[], object], device: torch.device, budget: float = 0) -> float:
    """Median seconds of one `run()`: two to warm up, then samples until `budget` seconds are over,
    at least 3 and at most 100."""

    def sample(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        _wait(device)
        return (time.perf_counter() - start) / times

    end = time.perf_counter() + budget
    sample(1)
    times = max(1, math.ceil(SAMPLE / max(sample(1), 1e-7)))
    samples = [sample(times) for _ in range(3)]
    while time.perf_counter() < end and len(samples) < 100:
        samples.append(sample(times))
    return statistics.median(samples)


# ---------------------------------------------------------------------------------------- products


@contextmanager
def _precision(dtype: str) -> Iterator[None]:
    """fp32 products in full fp32, or in tf32, whatever was set before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product(m: int, k: int, n: int, dtype: str, device: torch.device) -> Callable[[], object]:
    """[m, k] · [k, n] on random numbers, of a generator of its own: the seed of yours stays."""
    draw = torch.Generator(device).manual_seed(0)
    left = torch.randn(m, k, generator=draw, device=device, dtype=torch.float32)
    right = torch.randn(k, n, generator=draw, device=device, dtype=torch.float32)
    left, right = left.to(TORCH_DTYPES[dtype]), right.to(TORCH_DTYPES[dtype])
    out = torch.empty(m, n, dtype=TORCH_DTYPES[dtype], device=device)
    return lambda: torch.mm(left, right, out=out)


def _products(
    device: torch.device, dtypes: list[str], budget: float
) -> tuple[dict[str, float], tuple[tuple[str, float, float], ...], float]:
    """FLOP/s of a large product by dtype, on a GPU the curve of small ones, and what share of the
    processor other programs took meanwhile."""
    end, cpu_only = time.perf_counter() + budget, device.type == "cpu"
    flops: dict[str, float] = {}
    curve: list[tuple[str, float, float]] = []
    taken: list[float] = []
    for dtype in dtypes:
        with _precision(dtype):
            flops[dtype] = _rate(256, dtype, device)
    slow = max(flops.values()) / FAR_SLOWER if cpu_only else 0
    worth = [dtype for dtype in dtypes if flops[dtype] >= slow]
    for left, dtype in zip(range(len(worth), 0, -1), worth):
        share = (end - time.perf_counter()) / left
        with _precision(dtype):
            wall, cpu = time.perf_counter(), time.process_time()
            size, flops[dtype] = _peak(dtype, device, share if cpu_only else 0.4 * share)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            points = {} if cpu_only else _curve(dtype, device, flops[dtype], 0.6 * share)
        if points:
            points[2.0 * size**3] = flops[dtype]
        curve += [(dtype, f, r) for f, r in points.items()]
        # A product that has its cores keeps all its threads at work; short ones tell nothing.
        if cpu_only and wall > 0.3:
            taken.append(1 - cpu / wall / min(torch.get_num_threads(), cores()))
    return flops, tuple(curve), max(taken, default=0.0)


def _rate(size: int, dtype: str, device: torch.device, budget: float = 0) -> float:
    return 2 * size**3 / _seconds_of(_product(size, size, size, dtype, device), device, budget)


def _peak(dtype: str, device: torch.device, budget: float) -> tuple[int, float]:
    """The largest square product that can be repeated within the budget, and its FLOP/s."""
    end = time.perf_counter() + budget
    largest, size = (8192 if device.type == "cuda" else 2048), 256
    rate = _rate(size, dtype, device)
    while size < largest:
        six_runs = 6 * 2 * (2 * size) ** 3 / rate
        if six_runs > end - time.perf_counter():
            break
        size *= 2
        rate = _rate(size, dtype, device)
    left = end - time.perf_counter()
    return size, _rate(size, dtype, device, left) if left > 0 else rate


def _curve(dtype: str, device: torch.device, peak: float, budget: float) -> dict[float, float]:
    """FLOP/s by FLOPs of the product, [tokens, width] · [width, width], small ones first. Shapes
    of equal FLOPs give their median; what the budget does not allow is left out."""
    end = time.perf_counter() + budget
    shapes = sorted(((m, k) for m in TOKENS for k in WIDTHS), key=lambda s: s[0] * s[1] ** 2)
    rates: dict[float, list[float]] = {}
    for left, (m, k) in zip(range(len(shapes), 0, -1), shapes):
        flops, spare = 2.0 * m * k * k, end - time.perf_counter()
        if not rates or max(6 * flops / peak, 5 * SAMPLE) < spare:
            run = _product(m, k, k, dtype, device)
            rates.setdefault(flops, []).append(flops / _seconds_of(run, device, spare / left))
    return {flops: statistics.median(found) for flops, found in rates.items()}


# ----------------------------------------------------------------------- streams and exponentials


def _bandwidth(device: torch.device, budget: float) -> float:
    """Bytes read and written per second by large copies or sums, whichever is faster."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else usable_memory() // 2
    size = min(2**30 if device.type == "cuda" else 2**27, free // 8)  # bytes: far beyond the caches
    a, b, c = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(3))
    copy = 2 * size / _seconds_of(lambda: c.copy_(a), device, budget / 2)
    return max(copy, 3 * size / _seconds_of(lambda: torch.add(a, b, out=c), device, budget / 2))


def _functions(device: torch.device, budget: float) -> float:
    """Exponentials per second, on as many numbers as a layer's hidden states have."""
    numbers = torch.ones(2**19, dtype=torch.float32, device=device)
    return numbers.numel() / _seconds_of(lambda: torch.exp(numbers), device, budget)


# --------------------------------------------------------------------------- what a model achieves


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
        _wait(ids.device)
        start = time.perf_counter()
        yield
        _wait(ids.device)
        seconds.append(time.perf_counter() - start)

    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), timed():
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    gradient = torch.ones_like(hidden)
    with timed():
        hidden.backward(gradient)
    model.zero_grad(set_to_none=True)
    return tuple(seconds)


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
