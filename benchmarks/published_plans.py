"""Today's planner on the published figures: what it can express, and how far off it is.

    python benchmarks/published_plans.py                   # both halves
    python benchmarks/published_plans.py --half open --worst 20
    python benchmarks/published_plans.py --missing         # what cannot be expressed, how often
    python benchmarks/published_plans.py --groups          # by source

`published_calls.call` turns a figure into a plan's arguments. Nothing is fitted here: this reads
the planner as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import published_figures as figures
import yaml
from published_calls import PARALLEL, call
from published_calls import TRAINING as TRAINING
from published_calls import model_config as model_config
from published_figures import Figure

from rlhf_lab.cost.estimate import Estimate
from rlhf_lab.cost.parallel import ENGINE
from rlhf_lab.cost.serving import Engine

RESULT = Path(__file__).with_name("results") / "published_plans.json"
MISSES: Mapping[str, Mapping[str, str]] = yaml.safe_load(
    Path(__file__).with_name("published_misses.yaml").read_text(encoding="utf-8")
)
"""Why plans miss, by kind and the beginning of a figure's name."""
LARGE = {"memory": 0.15, "throughput": 0.3, "hours": 0.35}
"""Misses from which on they are explained one by one."""


# -------------------------------------------------------------------------------------- in its unit


def predicted(figure: Figure, e: Estimate) -> float:
    """The plan's number in the figure's unit."""
    if figure.kind == "memory":
        everywhere = e.setup.gpus if "all GPUs" in (figure.meter or "") else 1
        peak, s = e.peak, e.setup
        if s.engine == "vllm" and "torch" in (figure.meter or ""):
            peak -= ENGINE["reserve_bytes"]  # which is beside torch's memory
        if "reserved" in (figure.meter or "") and s.stage == "inference":
            peak += _left_by_loading(e)
        return peak * everywhere / (figure.bytes_per_unit or 1)
    if figure.kind == "throughput":
        return _rate(figure, e)
    hours = e.gpu_hours if figure.unit == "GPU h" else e.hours
    return (hours or 0.0) / figures.HOURS[figure.unit]


def _left_by_loading(e: Estimate) -> float:
    """Bytes of the blocks in which weights were in 16 bits before the device made them small: the
    allocator keeps one of each size. Those of AWQ, GPTQ and fp8 are small on disk."""
    if not e.setup.weights_format.startswith(("nf4", "int")):
        return 0.0
    sizes = {x.inputs * x.outputs for y in e.setup.held.layers for x in y.linears}
    return 2.0 * sum(sizes | {e.setup.model.vocabulary * e.setup.model.head_width})


def _rate(figure: Figure, e: Estimate) -> float:
    s, part = e.setup, figure.config.get("part")
    if s.stage == "inference" and s.engine == "vllm":
        n = s.rollout_batch
        if figure.stage == "prefill":
            return n * s.prompt / Engine(s, e.hardware).step(0, n * s.prompt)
        if figure.stage == "serving":
            return e.serving_at(Engine(s, e.hardware).fits).tokens_per_second
        if "alone" in figure.open.get("rate", ""):
            return n / e.serving.per_token
        return e.serving.tokens_per_second
    if s.stage == "inference":
        if figure.stage == "prefill":
            return s.rollout_batch * s.prompt / e.seconds_of["prefill", "policy"]
        return s.rollout_batch * s.response / e.step_seconds
    if part in ("generation", "training"):
        names = {"generation": ("rollout",), "training": ("forward", "backward", "optimizer")}
        return sum(v for (phase, _), v in e.seconds_of.items() if phase in names[str(part)])
    if figure.unit == "s":
        return e.step_seconds
    per_second = s.batch * s.gradient_accumulation_steps * s.replicas / e.step_seconds
    if figure.unit == "samples/s":
        return per_second
    rate = per_second * s.length
    return rate / s.gpus if figure.unit == "tokens/s/GPU" else rate


@dataclass(frozen=True)
class Compared:
    """A figure beside today's plan. `ratio`: predicted ÷ measured; None without a plan. `band`:
    that the plan states, as factors of its own number."""

    figure: Figure
    ratio: float | None
    missing: tuple[str, ...]
    nearly: tuple[str, ...]
    band: tuple[float, float] = (1.0, 1.0)

    @property
    def inside(self) -> bool:
        """Whether what was measured lies in the plan's band; a rate's is its time's upside down."""
        low, high = self.band
        if self.figure.kind == "throughput" and self.figure.unit != "s":
            low, high = 1 / high, 1 / low
        return self.ratio is not None and low <= 1 / self.ratio <= high

    @property
    def why(self) -> str | None:
        """What is known of a large miss; None of a figure that is none. Of a locked figure that is
        what was found at the open ones of its group."""
        if self.ratio is None or self.missing or abs(self.ratio - 1) <= LARGE[self.figure.kind]:
            return None
        known = MISSES[self.figure.kind]
        own = max((p for p in known if self.figure.id.startswith(p)), key=len, default="")
        return known.get(own, "not known")


BLOCKING = ("model", "hardware", "weights in", "micro-batch", "length", "size of")
"""What is missing in these words leaves no plan worth making; the rest is a gap in one."""


def compare(figure: Figure) -> Compared:
    c = call(figure)
    if figure.unit == "blocks":
        c.missing.append("size of the cache in blocks")
    if any(m.startswith((*BLOCKING, *PARALLEL)) for m in c.missing):
        return Compared(figure, None, tuple(c.missing), tuple(c.nearly))
    try:
        e = c.plan()
        ratio = predicted(figure, e) / figure.value
    except ValueError as error:
        return Compared(figure, None, (*c.missing, f"refused: {error}"), tuple(c.nearly))
    bands = {"memory": e.memory_band, "throughput": e.time_band, "hours": e.hours_band}
    return Compared(figure, ratio, tuple(c.missing), tuple(c.nearly), bands[figure.kind])


# ------------------------------------------------------------------------------------------ report


def summary(rows: Sequence[Compared]) -> dict[str, float]:
    """Of predicted ÷ measured: how many, median, deciles, and the error's median and 90th
    percentile; and the share of figures inside the plan's band."""
    ratios = sorted(r.ratio for r in rows if r.ratio is not None)
    if not ratios:
        return {"n": 0}
    errors = sorted(abs(r - 1) for r in ratios)
    return {
        "n": len(ratios),
        "median": statistics.median(ratios),
        "low": _quantile(ratios, 0.1),
        "high": _quantile(ratios, 0.9),
        "error": statistics.median(errors),
        "error90": _quantile(errors, 0.9),
        "inside": sum(r.inside for r in rows) / len(ratios),
        "width": statistics.median((r.band[1] - r.band[0]) / 2 for r in rows),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def _lines(rows: Sequence[Compared]) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    for kind in figures.KINDS:
        for half in figures.HALVES:
            these = [r for r in rows if r.figure.kind == kind and r.figure.half == half]
            planned = [r for r in these if r.ratio is not None]
            yield kind, half, "expressed", summary([r for r in planned if not r.missing])
            yield kind, half, "with gaps", summary([r for r in planned if r.missing])
            yield kind, half, "not planned", {"n": len(these) - len(planned)}


def _group(row: Compared) -> str:
    return f"{row.figure.id.split('/')[0]} {row.figure.kind}"


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--half", choices=figures.HALVES)
    parser.add_argument("--worst", type=int, default=0, metavar="N")
    parser.add_argument("--missing", action="store_true", help="what cannot be expressed")
    parser.add_argument("--groups", action="store_true", help="a line for each source's group")
    args = parser.parse_args()
    rows = [compare(f) for f in figures.load() if args.half in (None, f.half)]
    heads = ("n", "median", "10 %", "90 %", "error", "90 %", "inside", "±")
    print(f"{'':32}{heads[0]:>5}", *(f"{head:>7}" for head in heads[1:]))
    result = []
    for kind, half, what, s in _lines(rows):
        result.append({"kind": kind, "half": half, "what": what} | _rounded(s))
        numbers = ""
        if "median" in s:
            numbers = " {median:7.3f} {low:7.3f} {high:7.3f} {error:7.1%}".format(**s)
            numbers += " {error90:7.1%} {inside:7.1%} {width:7.1%}".format(**s)
        print(f"{kind:12}{half:8}{what:12}{s['n']:5}{numbers}")
    if args.half is None:
        each = [
            {"id": r.figure.id, "kind": r.figure.kind, "half": r.figure.half, "ratio": r.ratio}
            | {"gaps": len(r.missing), "inside": r.inside}
            | ({"why": r.why} if r.why else {})
            for r in rows
            if r.ratio is not None
        ]
        text = json.dumps({"summary": result, "figures": each}, indent=1)
        RESULT.write_text(text + "\n", encoding="utf-8")
    if args.groups:
        for name in dict.fromkeys(_group(r) for r in rows):
            print(f"{name:34}", _rounded(summary([r for r in rows if _group(r) == name])))
    if args.missing:
        for what, n in Counter(m.split(":")[0] for r in rows for m in r.missing).most_common():
            print(f"{n:5}  {what}")
    complete = [r for r in rows if r.ratio is not None and not r.missing]
    for r in sorted(complete, key=lambda r: -abs((r.ratio or 0) - 1))[: args.worst]:
        print(f"{r.figure.id:60} {r.figure.half:7}{r.ratio:7.3f}  {', '.join(r.nearly)}")


if __name__ == "__main__":
    main()
