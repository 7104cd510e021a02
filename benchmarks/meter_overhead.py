"""What does metering cost a run? `python benchmarks/meter_overhead.py [--pairs 7]`

PPO and SFT of the bundled tiny model with the lab's settings, metered (`Meter`) and unmetered
(`NoMeter`), alternating in one process, the order within a pair alternating too. Reports the
medians of the training loops' seconds, their ratio, and the ratio of process (CPU) seconds, which
other programs on the machine disturb less. Writes benchmarks/results/meter_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from stages_vs_trl import job_of, wrapped

import rlhf_lab as lab
from rlhf_lab.metering.meter import Meter, NoMeter
from rlhf_lab.ppo.trainer import PPOTrainer

RESULTS = Path(__file__).parent / "results" / "meter_overhead.json"
STEPS = {"ppo": 44, "sft": 40}


def trainer_of(stage: str, meter: Meter, data, steps: int, folder: Path):
    """The stage's trainer as `lab.train` makes it, without what comes before and after."""
    job = job_of(stage, "tiny", meter, data, folder, max_steps=steps)
    if stage != "ppo":
        return wrapped(job)
    roles = [job.ready.models[role] for role in ("policy", "reference", "reward", "value")]
    return PPOTrainer(
        *(job.args, job.tokenizer, *roles[:3], job.ready.train, roles[3]),
        meter=meter,
        on_log=lambda step, metrics: job.run.log(step, **metrics),
    )


def seconds(stage: str, metered: bool, data, steps: int) -> tuple[float, float]:
    """(wall, process) seconds of one training loop."""
    meter = (Meter if metered else NoMeter)(stage)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(stage, meter, data, steps, Path(scratch))
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        return time.perf_counter() - wall, time.process_time() - cpu


def compare(stage: str, pairs: int, steps: int, data) -> dict:
    """Medians over the pairs, and the ratios metered / unmetered."""
    seconds(stage, True, data, 2)  # what the first run of a process pays is neither's
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for pair in range(pairs):
        for metered in (True, False) if pair % 2 else (False, True):
            times[metered].append(seconds(stage, metered, data, steps))
    wall, cpu = ({m: statistics.median(t[i] for t in times[m]) for m in times} for i in (0, 1))
    within = statistics.median(a[0] / b[0] for a, b in zip(times[True], times[False], strict=True))
    return {
        "stage": stage,
        "steps": steps,
        "pairs": pairs,
        "metered_s": wall[True],
        "unmetered_s": wall[False],
        "ratio": wall[True] / wall[False],
        "median_ratio_of_pairs": within,
        "cpu_ratio": cpu[True] / cpu[False],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--stages", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--steps", type=int, help="instead of 44 iterations and 40 steps")
    args = parser.parse_args()
    data = lab.load_data("stories", seed=0)
    found = {}
    if RESULTS.exists():
        found = {row["stage"]: row for row in json.loads(RESULTS.read_text())["stages"]}
    for stage in args.stages:
        row = compare(stage, args.pairs, args.steps or STEPS[stage], data)
        found[stage] = row | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        print(json.dumps(found[stage]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {"torch": torch.__version__, "stages": [found[s] for s in STEPS if s in found]},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
