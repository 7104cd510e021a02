"""Static batches against slots refilled, in transformers' engine: steps exactly, tokens per second.

    python benchmarks/continuous_batching.py                 # mini, seeds 0 to 2, about two minutes

256 requests, lengths geometric with mean 64 and cut at 512, 32 slots. The two are timed in turn, a
few times each; a rate is the median. Writes benchmarks/results/continuous_batching.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from importlib.metadata import version
from pathlib import Path

import torch

import rlhf_lab as lab

RESULTS = Path(__file__).parent / "results" / "continuous_batching.json"


def measure(model: str, seed: int, times: int) -> dict:
    runs = [lab.continuous_batching(model, seed=seed) for _ in range(times)]
    found: dict = {"seed": seed}
    for name in ("static", "continuous"):
        schedules = [getattr(run, name) for run in runs]
        (steps,) = {len(one.steps) for one in schedules}  # exact: alike every time
        rates = [one.tokens_per_second for one in schedules]
        found[name] = {
            "steps": steps,
            "tokens": schedules[0].tokens,
            "slots_busy": round(schedules[0].busy, 4),
            "tokens_per_second": round(statistics.median(rates), 1),
            "each": [round(rate, 1) for rate in rates],
        }
    found["step_ratio"] = round(runs[0].step_ratio, 4)
    found["speedup"] = round(statistics.median(run.speedup for run in runs), 3)
    found["speedup_each"] = [round(run.speedup, 3) for run in runs]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    lab.continuous_batching(args.model, requests=8, longest=16)  # imports and first calls
    seeds = []
    for seed in range(args.seeds):
        seeds.append(measure(args.model, seed, args.times))
        print(seeds[-1], flush=True)
    found = {
        "model": args.model,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seeds": seeds,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
