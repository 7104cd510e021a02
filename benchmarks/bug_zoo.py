"""What shows a bug in PPO, and how soon? `nice python benchmarks/bug_zoo.py [--only NAME …]`

Trains healthy runs and every specimen of the bug zoo (`rlhf_lab/exercises/specimens.yaml`) over
seeds. From healthy runs of the learning seeds it takes the band of each metric in each iteration,
and says of each specimen which metric leaves its band first, on at least four seeds in five.

    python benchmarks/bug_zoo.py                      # all runs that are not there yet, then tables
    python benchmarks/bug_zoo.py --only late_score healthy --seeds 0 1
    python benchmarks/bug_zoo.py --tables             # no run: tables of what is there
    python benchmarks/bug_zoo.py --learn              # no run: writes what the package ships
    python benchmarks/bug_zoo.py --judge              # runs that no limit saw: confusion matrix

It may be stopped at any time: results/bug_zoo.json is written after each run, and the next call
goes on. A run that diverges counts up to where it did. `bug_zoo_reading.py` reads the results.

Why this size. Runs of `tiny` at a rate of 7e-4 cost 21 CPU seconds for twelve iterations
and jump now and then, and so does `mini` at that rate (a KL of 2 nats for one iteration, on two of
three seeds), which makes bands wide. `mini` costs 5 for eight iterations of 48 responses. At 5e-4,
falling to 0 over so few iterations, it jumps less often, and still learns: the gold reward rises
by .4. Most specimens show in
the first three iterations or, at such a size, never. A run is what `lab.train` makes, number by
number, without what that evaluates and measures, which took half of the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import zip_longest

from bug_zoo_reading import (
    CURVES,
    HEALTHY,
    JUDGED,
    JUDGED_SEEDS,
    LEARNING,
    LIMITS,
    METRICS,
    MODEL,
    RESULTS,
    SEEDS,
    SIZE,
    WIDER,
    WIDER_SEEDS,
    Series,
    by_specimen,
    confusion,
    curves_of,
    key_of,
    learned,
    load,
    rounded,
    strays,
    tables,
)

import rlhf_lab as lab
from rlhf_lab.data.load import Data, Split
from rlhf_lab.data.reward_sources import gold_metrics
from rlhf_lab.display import table
from rlhf_lab.exercises.specimens import SPECIMENS
from rlhf_lab.launch.launcher import prepare_process
from rlhf_lab.ppo.bookkeeping import Diverged
from rlhf_lab.ppo.trainer import PPOTrainer
from rlhf_lab.runs import health
from rlhf_lab.runs.json_files import replace_file, versions
from rlhf_lab.trainers.prepare import prepare

TRAIN_ROWS = 512
"""Prompts, of which eight iterations see 384. (Which ones depends on it: leave it.)"""


@cache
def stories() -> Data:
    data = lab.load_data("stories")
    return replace(data, prompts=Split(data.prompts.train[:TRAIN_ROWS], data.prompts.test[:1]))


def train(name: str, seed: int, more: Mapping[str, str | float]) -> dict[str, object]:
    """One run, as `lab.train` makes it, without what that measures before, beside and after.
    → its metrics by iteration, its seconds, and whether it diverged."""
    sick, plan = SPECIMENS.get(name), lab.plan("ppo", **{"model": MODEL, **SIZE, **more}, seed=seed)
    plan = sick.plan(plan) if sick else plan
    lines: dict[int, dict[str, float]] = {}
    said: dict[int, list[str]] = {}
    started, error = time.process_time(), ""
    with tempfile.TemporaryDirectory() as folder:
        args = plan.config(folder)
        ready = prepare(plan, stories(), args)
        roles = ready.models
        trainer = ((sick and sick.trainer) or PPOTrainer)(
            *(args, plan.model.tokenizer, roles["policy"], roles["reference"], roles["reward"]),
            *(ready.train, roles["value"]),
            metric_funcs=gold_metrics(stories()),
            on_sample=lambda step, rows: said.update({step: [str(r["response"]) for r in rows]}),
        )
        trainer.on_log = lambda step, metrics: lines.update({step: dict(metrics)})
        try:
            trainer.train()
        except Diverged as diverged:
            error = str(diverged).split("; ")[0]
    series: Series = {m: [rounded(x.get(m)) for x in lines.values()] for m in METRICS}
    repeated = [health.repeated_ngrams(said.get(step, [])) for step in lines]
    series["repeated_ngrams"] = [rounded(x) for x in repeated]
    seconds = round(time.process_time() - started, 1)
    return {"cpu_seconds": seconds, "error": error, "metrics": series}


def save(results: dict) -> None:
    """A line for each run."""
    text = json.dumps(results, separators=(",", ":")).replace('},"', '},\n"')
    RESULTS.parent.mkdir(exist_ok=True)
    replace_file(RESULTS, text + "\n")


def wanted(only: Sequence[str], seeds: Sequence[int], judge: bool) -> list[tuple[str, int, str]]:
    """(name, seed, setting) of the runs to make, the most telling first."""
    names = [*SPECIMENS]
    if judge:  # a healthy one and a sick one by turns, each specimen in two of the settings
        ways = [*JUDGED]
        healthy = [(HEALTHY, s, w) for s in JUDGED_SEEDS for w in ways]
        sick = [
            (n, JUDGED_SEEDS[i], ways[(place + i) % len(ways)])
            for i in range(2)
            for place, n in enumerate(names)
        ]
        made = [m for pair in zip_longest(healthy, sick) for m in pair if m]
    else:
        healthy = [(HEALTHY, s, "") for s in LEARNING]
        healthy += [(HEALTHY, s, w) for s in WIDER_SEEDS for w in WIDER]
        of_seed = [[(n, s, "") for n in names] for s in SEEDS]
        made = [*healthy[:5], *of_seed[0], *healthy[5:], *sum(of_seed[1:], [])]
    return [m for m in made if (not only or m[0] in only) and (not seeds or m[1] in seeds)]


def train_all(made: Sequence[tuple[str, int, str]]) -> None:
    prepare_process()
    for number, (name, seed, setting) in enumerate(made):
        key, results = key_of(name, seed, setting), load()
        if key in results["runs"]:
            continue
        run = train(name, seed, {**WIDER, **JUDGED}.get(setting, {}))
        results = load()  # another process may have written meanwhile
        results |= {"size": SIZE, "versions": versions(), "processor": platform.machine()}
        results["runs"][key] = run
        save(results)
        print(f"{number + 1}/{len(made)} {key}: {run['cpu_seconds']} s {run['error']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], choices=[HEALTHY, *SPECIMENS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--tables", action="store_true", help="no run")
    parser.add_argument("--learn", action="store_true", help="write the limits; no run")
    parser.add_argument("--judge", action="store_true", help="runs that no limit saw")
    args = parser.parse_args()
    if not args.tables and not args.learn:
        train_all(wanted(args.only, args.seeds, args.judge))
    results = load()
    if args.learn:
        replace_file(LIMITS, json.dumps(learned(results["runs"]), indent=1) + "\n")
        health.limits.cache_clear()
        text = json.dumps(curves_of(results["runs"]), separators=(",", ":"))
        replace_file(CURVES, text.replace('},"', '},\n"') + "\n")
    if args.judge:
        found = {"judged": confusion(results["runs"])}
        found["judged_by_specimen"] = by_specimen(results["runs"])
        for rows in found.values():
            print(table(rows))
        save({**load(), **found})
    else:
        first, left = tables(results["runs"]), strays(results["runs"])
        print(table(first))
        shown = sum(row["first metric"] != "none" for row in first)
        print(f"{shown} of {len(first)} leave the healthy band")
        print(f"healthy runs that leave it, by seed: { {s: m for s, m in left.items() if m} }")
        print(f"of {len(left)} healthy runs")
        save({**load(), "first": first, "strays": left})  # another process may have written


if __name__ == "__main__":
    main()
