"""How long a plan takes: for `cost_accuracy.py --only speed [--before TREE]`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IMPORT = """
import sys, time
start = time.perf_counter()
import rlhf_lab.cost.estimate
print(time.perf_counter() - start, sorted({'torch', 'pandas', 'transformers'} & set(sys.modules)))
"""
XRAY = """
import time
from rlhf_lab.metering.meter import peak_bytes
from rlhf_lab.models.load import presets
start = time.perf_counter()
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.setup import Setup
from rlhf_lab.simulate.step import simulate_step
config = presets()["meta-llama/Llama-2-7b-hf"]
setup = Setup(stage="sft", model=architecture(config), batch=1, prompt=256, response=256,
              dtype="bfloat16", padded=False, optim="adamw_torch")
seen = simulate_step(setup, config)
print(time.perf_counter() - start, peak_bytes())
"""


PLANS = """
import json, sys, time
from rlhf_lab.cost import memory
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.remedies import remedies
from rlhf_lab.models.load import presets
config = presets()["Qwen/Qwen2.5-7B"]
settings = {"gpus": 8, "prompt_length": 512, "rows": 20_000, "per_device_train_batch_size": 4}

def plan(stage, response):
    e = estimate(stage, config, "h100", {**settings, "response_length": response})
    return e, (e.peak, e.fits, e.hours, e.money)

def timed(what, *args):
    start = time.thread_time()
    what(*args)
    return (time.thread_time() - start) * 1e3

found = {"plan ppo, first, ms": [timed(plan, "ppo", 300)]}
for stage in ("sft", "reward", "dpo", "ppo"):
    plan(stage, 301)
    found[f"plan {stage}, ms"] = times = []
    for n in range(20):
        for cached in (memory.ending, memory.trunk, *vars(memory).values()):
            if getattr(cached, "__name__", "") in ("_embedding", "_layers", "ending", "trunk"):
                getattr(cached, "cache_clear", str)()  # no segment is known at its size
        times.append(timed(plan, stage, 310 + n))
remedies(plan("ppo", 400)[0])
found["cheaper, ms"] = [timed(remedies, plan("ppo", 401 + n)[0]) for n in range(5)]
json.dump(found, sys.stdout)
"""
COLD = {
    "numpy and yaml": ["-c", "import numpy, yaml"],
    "tiny": ["-m", "rlhf_lab.cli", "plan", "ppo", "--model", "tiny"],
    "7B": ["-m", "rlhf_lab.cli", "plan", "ppo", "--model", "Qwen/Qwen2.5-7B"],
}
ROUNDS = 11


def _run(line: list[str], tree: str) -> str:
    env = {**os.environ, "PYTHONPATH": tree}
    done = subprocess.run(
        [sys.executable, *line], capture_output=True, text=True, check=True, env=env, cwd="/"
    )
    return done.stdout


def speed(before: str | None = None) -> dict[str, Any]:
    """Processor time of a plan of lengths that were not planned before, of the first plan of a
    model, of remedies; both trees in turn where there is one from before. Then the import, the
    command from a cold start as a ratio, and the x-ray of a 7B step."""
    trees = {"": str(Path(__file__).parents[1])} | ({", before": before} if before else {})
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for when, tree in trees.items():
            for name, measured in json.loads(_run(["-c", PLANS], tree)).items():
                times.setdefault(name + when, []).extend(measured)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = {
        f"{name}, ratio": medians[name] / medians[f"{name}, before"]
        for name in list(medians)
        if f"{name}, before" in medians
    }
    cold: dict[str, list[float]] = {name: [] for name in COLD}
    for _ in range(ROUNDS):
        for name, line in COLD.items():
            start = time.perf_counter()
            _run(line, trees[""])
            cold[name].append(time.perf_counter() - start)
    least = statistics.median(cold.pop("numpy and yaml"))
    seconds, heavy = _run(["-c", IMPORT], trees[""]).split(maxsplit=1)
    xray, rss = _run(["-c", XRAY], trees[""]).split()[-2:]
    return {
        "summary": {
            **medians,
            **ratios,
            **{f"cold {k}, times": statistics.median(v) / least for k, v in cold.items()},
            "import, s": float(seconds),
            "loads": heavy.strip(),
            "xray 7B, s": float(xray),
            "xray 7B, GiB": float(rss) / 2**30,
        }
    }
