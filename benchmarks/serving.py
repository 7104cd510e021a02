"""Is inference as fast as planned? `python benchmarks/serving.py [--every]`

Plans every figure of `serving_figures.json` (measured by others, each with its source) and prints
predicted ÷ measured by kind, for the half that constants were fitted to and for the other one.
bitsandbytes is planned as its version 0.45 did it: one row a fused kernel. Seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rlhf_lab.cost.estimate import Estimate, estimate
from rlhf_lab.cost.quantization import FORMATS
from rlhf_lab.cost.serving import Engine
from rlhf_lab.display import table

FIGURES = json.loads(Path(__file__).with_name("serving_figures.json").read_text())
OLD = {name: replace(FORMATS[name], fused_rows=1) for name in ("nf4", "nf4_nested")}
MILLI = 1000.0


def plan(figure: dict[str, Any]) -> Estimate:
    settings = dict(figure["settings"])
    k = settings.get("tensor_parallel", 1)
    settings |= {"prompt_length": figure["prompt"], "response_length": figure["response"]}
    settings |= {"per_device_train_batch_size": max(1, figure["batch"]), "gpus": k}
    settings |= {"dtype": "bfloat16", "padded": False, "sharding": "none"}
    settings["engine"] = "transformers" if figure["kind"] == "step" else "vllm"
    config = FIGURES["models"][figure["model"]]
    return estimate("inference", config, figure["device"], settings)


def predicted(figure: dict[str, Any]) -> float:
    """The same quantity as the figure's, in its unit."""
    kind, unit, n = figure["kind"], figure["unit"], figure["batch"]
    prompt, response = figure["prompt"], figure["response"]
    e = plan(figure)
    if kind == "step":
        return e.seconds_of["decode", "policy"] / (response - 1) * MILLI
    engine = Engine(e.setup, e.hardware)
    if kind == "cache":
        return engine.cache / 2**30
    if kind == "first token":
        return engine.prefill(0) * MILLI
    if kind == "batch":  # all prompts at once, in chunks, then all decode
        steps = -(-n * prompt // e.setup.max_num_batched_tokens)
        seconds = steps * engine.step(0, n * prompt / steps) + (response - 1) * engine.step(n)
        rate = n * response / seconds / (e.setup.gpus if unit.endswith("GPU") else 1)
        return seconds * MILLI if unit == "ms" else rate
    if kind == "peak load":  # as many as are fastest
        e = plan({**figure, "settings": {**figure["settings"], "max_num_seqs": 4096}})
        return e.serving_at(Engine(e.setup, e.hardware).fits).tokens_per_second
    got = e.serving
    of = {"first token": got.first_token, "per token": got.per_token}
    name = kind.partition(": ")[2]
    return of[name] * MILLI if name in of else got.tokens_per_second


def rows() -> list[dict[str, Any]]:
    """Every figure with what is planned for it."""
    with patch.dict(FORMATS, OLD):
        return [{**f, "predicted": predicted(f)} for f in FIGURES["figures"]]


def ratios(found: Iterable[dict[str, Any]]) -> list[float]:
    return [f["predicted"] / f["value"] for f in found]


def summary(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind and half: how many, median and range of predicted ÷ measured, median error."""
    out = {}
    groups = [(k, h) for k in dict.fromkeys(f["kind"] for f in found) for h in ("fit", "locked")]
    for kind, half in [*groups, ("all", "fit"), ("all", "locked")]:
        values = ratios(f for f in found if f["half"] == half and kind in (f["kind"], "all"))
        if values:
            out[f"{kind}, {half}"] = {
                "figures": len(values),
                "median ratio": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "median error": statistics.median(abs(v - 1) for v in values),
            }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", action="store_true", help="each figure too")
    found = rows()
    if parser.parse_args().every:
        for f in found:
            settings = " ".join(f"{k}={v}" for k, v in f["settings"].items() if v != "none")
            load = f"{f['batch']} x {f['prompt']}+{f['response']}"
            what = f"{f['kind']}: {f['model']} {f['device']} {load} {settings}"
            print(f"{f['predicted'] / f['value']:5.2f} {f['predicted']:9.4g}", end=" ")
            print(f"{f['value']:9.4g} {f['unit']:12} {f['half']:6} {what}")
    lines = [
        {"": k, **{n: f"{v:.3g}" for n, v in line.items()}} for k, line in summary(found).items()
    ]
    print(table(lines))


if __name__ == "__main__":
    main()
