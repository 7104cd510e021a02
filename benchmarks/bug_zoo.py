"""What shows a bug in PPO, and how soon? `nice python benchmarks/bug_zoo.py [--only NAME …]`

Trains healthy runs and every specimen of the bug zoo (`rlhf_lab/exercises/specimens.yaml`) over
seeds: `tiny`, 12 iterations of 48 responses of at most 64 tokens, 20 s a run on one quiet core.
From healthy runs of the learning seeds it takes the band of each metric in each iteration, and says
of each specimen which metric leaves its band first, on at least four seeds in five.

    python benchmarks/bug_zoo.py                      # all runs that are not there yet, then tables
    python benchmarks/bug_zoo.py --only late_score healthy --seeds 0 1
    python benchmarks/bug_zoo.py --tables             # no run: tables of what is there
    python benchmarks/bug_zoo.py --learn              # writes rlhf_lab/runs/health_limits.json
    python benchmarks/bug_zoo.py --judge              # runs that no threshold saw: confusion matrix

It may be stopped at any time: results/bug_zoo.json is written after each run, and the next call
goes on. A run that diverges counts up to where it did.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median, stdev

import rlhf_lab as lab
from rlhf_lab.data.load import Data, Split
from rlhf_lab.data.reward_sources import gold_metrics
from rlhf_lab.display import table
from rlhf_lab.exercises import specimens
from rlhf_lab.exercises.specimens import SPECIMENS
from rlhf_lab.launch.launcher import prepare_process
from rlhf_lab.ppo.bookkeeping import Diverged
from rlhf_lab.ppo.trainer import PPOTrainer
from rlhf_lab.runs import health
from rlhf_lab.runs.json_files import replace_file, versions
from rlhf_lab.trainers.prepare import prepare

RESULTS = Path(__file__).parent / "results" / "bug_zoo.json"
LIMITS = Path(health.__file__).with_name("health_limits.json")
CURVES = Path(specimens.__file__).with_name("specimen_curves.json")
STORED = (
    ("ppo", "ppo_adapters", "ppo_lora", "ppo_shared", "grpo", "rloo"),
    ("dpo", "dpo_beta_0.2", "dpo_beta_2.0", "dpo_lora", "reward_768_pairs", "reward_3072_pairs"),
)
"""Healthy runs that came with the course: longer ones, and other stages."""
HEALTHY = "healthy"
MODEL = "mini"
SIZE = {
    "max_steps": 8,
    "per_device_train_batch_size": 48,
    "learning_rate": 0.0005,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "response_length": 64,
    "save_strategy": "no",
    "use_cpu": True,
}
"""Settings of every run; all others are the lab's own."""
LEARNING, SEEDS = range(10), range(5)
"""Seeds of the healthy runs that bands and thresholds are learned from, and of specimens."""
WIDER = {
    "a third of the rate": {"learning_rate": 0.00017},
    "twice the rate": {"learning_rate": 0.001},
    "half the responses": {"per_device_train_batch_size": 24},
}
"""Healthy runs that limits are learned from too, and bands are not: of other settings than those
that are judged, so that a limit is not one of one setting. Seeds from 20 on."""
WIDER_SEEDS = range(20, 23)
JUDGED = {
    "other seeds": {},
    "half the rate": {"learning_rate": 0.00025},
    "smaller rollouts": {"per_device_train_batch_size": 32},
}
"""Runs that no threshold saw: seeds from 100 on, in these settings."""
JUDGED_SEEDS = range(100, 110)
TRAIN_ROWS = 512
"""Prompts, of which a run sees at most 384."""
METRICS = (
    *("reward", "score", "gold_reward", "kl", "kl_k3", "kl_per_token", "objective", "entropy"),
    *("sampled_entropy", "response_length", "stopped", "explained_variance", "pg_loss", "vf_loss"),
    *("clipfrac", "vf_clipfrac", "ratio", "approxkl", "grad_norm", "first_ratio_error"),
    *("first_approxkl", "objective_error", "reward_gold_corr"),
)
DRAWN = ("reward", "gold_reward", "kl_k3", "entropy", "response_length", "explained_variance")
"""Metrics whose curves are drawn of every specimen, beside the one that shows it first."""
WIDTH = 4.0
"""Half of a band, in standard deviations of the healthy runs."""
FLOOR = {
    "first_ratio_error": 1e-3,
    "objective_error": 1e-3,
    "first_approxkl": 1e-6,
    "kl_per_token": 0.01,
}
"""Half of a band, at the least: rounding errors, and what a KL of so few tokens may be below 0."""

Series = dict[str, list[float | None]]


# ---------------------------------------------------------------------------------- the runs


@cache
def stories() -> Data:
    data = lab.load_data("stories")
    return replace(data, prompts=Split(data.prompts.train[:TRAIN_ROWS], data.prompts.test[:1]))


def train(name: str, seed: int, more: Mapping[str, float]) -> dict[str, object]:
    """One run, as `lab.train` makes it, without what that measures before, beside and after.
    → its metrics by iteration, its seconds, and whether it diverged."""
    plan, sick = lab.plan("ppo", MODEL, **{**SIZE, **more, "seed": seed}), SPECIMENS.get(name)
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


def rounded(value: float | None) -> float | None:
    """Four digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def load() -> dict:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"runs": {}}


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


def key_of(name: str, seed: int, setting: str) -> str:
    return "/".join(filter(None, (name, str(seed), setting)))


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


# ---------------------------------------------------------------------------------- the bands


def series_of(runs: Mapping[str, dict], name: str, seeds: Sequence[int]) -> list[Series]:
    """The metrics of a specimen's runs; how likely its samples are to the policy, and the KL as a
    logarithm, by which one of 0 is far from all others."""
    found = [runs[k]["metrics"] for s in seeds if (k := key_of(name, s, "")) in runs]
    surprise = health.CHECKS["samples_too_likely"].metric
    return [
        {
            **x,
            surprise: [rounded(health.quotient(line, surprise)) for line in lines_of(x)],
            "log kl_k3": [None if k is None else health.magnitude([k]) for k in x["kl_k3"]],
        }
        for x in found
    ]


def bands(healthy: Sequence[Series]) -> dict[str, list[tuple[float, float]]]:
    """Of each metric in each iteration: mean ± WIDTH standard deviations of healthy runs. The
    deviation is the larger one of the iteration's and the metric's median over iterations: ten
    runs say little of one."""
    found = {}
    for metric in healthy[0]:
        columns = [[x for x in at if x is not None] for at in zip(*(r[metric] for r in healthy))]
        if not all(len(at) > 2 for at in columns):
            continue
        spreads = [stdev(at) for at in columns]
        usual = sorted(spreads)[len(spreads) // 2]
        half = [max(WIDTH * max(x, usual), FLOOR.get(metric, 0.0)) for x in spreads]
        found[metric] = [(mean(at) - h, mean(at) + h) for at, h in zip(columns, half)]
    return found


def leaves(series: Series, band: Sequence[tuple[float, float]], metric: str) -> int | None:
    """The first iteration (from 1) in which a metric is outside of its band, and in the next one
    too where there is one: one in itself may be chance. None: never."""
    out = [x is not None and not low <= x <= high for x, (low, high) in zip(series[metric], band)]
    for i, here in enumerate(out):
        if here and (i + 1 == len(out) or out[i + 1]):
            return i + 1
    return None


def beyond(series: Series, band: Sequence[tuple[float, float]], metric: str, at: int) -> float:
    """How far a metric is from the middle of its band in an iteration (from 1), in halves of it."""
    (low, high), x = band[at - 1], series[metric][at - 1]
    return math.inf if x is None else abs(2 * x - low - high) / (high - low)


def first_metrics(runs: Mapping[str, dict], name: str, band: dict) -> list[tuple[int, str, int]]:
    """(iteration by which four in five seeds have left, metric, seeds), the soonest first; of those
    that are as soon the one that is farthest out."""
    sick = series_of(runs, name, SEEDS)
    enough = math.ceil(0.8 * len(sick))
    found = []
    for metric in band:
        left = [(x, s) for s in sick if (x := leaves(s, band[metric], metric)) is not None]
        if sick and len(left) >= enough:
            at = sorted(x for x, _ in left)[enough - 1]
            far = median(beyond(s, band[metric], metric, x) for x, s in left)
            found.append((at, -far, metric, len(left)))
    return [(at, metric, seeds) for at, _, metric, seeds in sorted(found)]


def show_tables(runs: Mapping[str, dict]) -> list[dict[str, str]]:
    """Print what shows each specimen first. → the rows"""
    healthy = series_of(runs, HEALTHY, LEARNING)
    print(f"{len(healthy)} healthy runs of the learning seeds")
    band, rows = bands(healthy), []
    for name in SPECIMENS:
        count = len(series_of(runs, name, SEEDS))
        found = first_metrics(runs, name, band)
        at, metric, seeds = found[0] if found else ("", "none", "")
        others = ", ".join(f"{m} ({i})" for i, m, _ in found[1:5])
        rows.append({"specimen": name, "first metric": metric, "iteration": str(at)})
        rows[-1] |= {"seeds": f"{seeds} of {count}", "then": others}
    print(table(rows))
    shown = sum(row["first metric"] != "none" for row in rows)
    print(f"{shown} of {len(rows)} leave the healthy band")
    strays = []
    for i, one in enumerate(healthy if len(healthy) > 3 else ()):  # against the band of the others
        others = bands(healthy[:i] + healthy[i + 1 :])
        strays.append([m for m in others if leaves(one, others[m], m) is not None])
    print(f"healthy runs outside of the band of the others: {strays}")
    return rows


def curves_of(runs: Mapping[str, dict]) -> dict[str, object]:
    """What `lab.specimens` draws: bands, and each specimen's curves."""
    healthy, found = series_of(runs, HEALTHY, LEARNING), {}
    band = bands(healthy)
    for name in SPECIMENS:
        sick = series_of(runs, name, SEEDS)
        at, metric, seeds = (first_metrics(runs, name, band) or [(None, None, 0)])[0]
        shown = [*DRAWN, metric] if metric else DRAWN
        found[name] = {"first": metric, "iteration": at, "seeds": f"{seeds} of {len(sick)}"}
        found[name]["curves"] = {m: [x[m] for x in sick] for m in dict.fromkeys(shown) if sick}
    drawn = {m for x in found.values() for m in x["curves"]}
    ends = {
        m: [[rounded(x) for x in end] for end in zip(*((a, (a + b) / 2, b) for a, b in band[m]))]
        for m in sorted(drawn & band.keys())
    }
    what = f"{MODEL}, {size()}; the band is of {len(healthy)} healthy runs"
    return {"runs": what, "healthy": ends, "specimens": found}


def size() -> str:
    return f"{SIZE['max_steps']} iterations of {SIZE['per_device_train_batch_size']} responses"


# ---------------------------------------------------------------------------------- the limits


def lines_of(series: Series) -> list[dict[str, float]]:
    """A run's metrics as `health.examine` takes them."""
    columns = {m: [math.nan if x is None else x for x in v] for m, v in series.items()}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def limit_of(check: health.Check, runs: Mapping[str, Sequence[list]]) -> dict | None:
    """Warn beyond the mean of the worst values of healthy runs by WIDTH standard deviations,
    critical beyond three times that. runs: the logged lines of each, by where they come from."""
    worst, sources = [], []
    for source, logged in runs.items():
        found = [x for lines in logged if math.isfinite(x := check.worst(lines))]
        worst += found
        sources += [f"{len(found)} {source}"] * bool(found)
    if len(worst) < 3:
        return None
    sign = 1 if check.side == "high" else -1
    step = sign * WIDTH * max(stdev(worst), FLOOR.get(check.metric, 0.0) / WIDTH)
    if check.figure == "trend" and abs(mean(worst) + step) >= (2 if check.against else 1):
        return None  # no run could fail it
    limit = {"warn": rounded(mean(worst) + step), "critical": rounded(mean(worst) + 3 * step)}
    return {**limit, "origin": f"{'; '.join(sources)}: {min(worst):.3g} to {max(worst):.3g}"}


def learn(results: dict) -> None:
    """Write the limits, and which checks each specimen fails."""
    runs = results["runs"]
    ours = f"healthy PPO runs of {MODEL}, {size()}, seeds from {LEARNING[0]}"
    healthy = {ours: [lines_of(x) for x in series_of(runs, HEALTHY, LEARNING)]}
    wider = [key_of(HEALTHY, s, w) for w in WIDER for s in WIDER_SEEDS]
    healthy[f"at {', '.join(WIDER)}"] = [lines_of(runs[k]["metrics"]) for k in wider if k in runs]
    healthy |= {
        f"stored runs of the course ({', '.join(names)})": [
            health.logged_lines(lab.Run.stored(name)) for name in names
        ]
        for names in STORED
    }
    found = {check.name: limit_of(check, healthy) for check in health.CHECKS.values()}
    made = {"limits": {name: x for name, x in found.items() if x}, "specimens": {}}
    replace_file(LIMITS, json.dumps(made))  # the specimens are examined by these
    health.limits.cache_clear()
    for name in SPECIMENS:
        sick = [lines_of(x) for x in series_of(runs, name, SEEDS)]
        failed = [f.check.name for lines in sick for f in health.examine(lines)]
        shares = {n: rounded(failed.count(n) / len(sick)) for n in sorted({*failed})}
        made["specimens"][name] = {"shown": shown_by(sick), "fails": shares}
    replace_file(LIMITS, json.dumps(made, indent=1) + "\n")
    health.limits.cache_clear()


def shown_by(sick: Sequence[list]) -> int | None:
    """The iteration by which four in five runs have failed a check; None: never."""
    for n in range(1, SIZE["max_steps"] + 1):
        failed = [any(health.examine(lines[:k]) for k in range(1, n + 1)) for lines in sick]
        if sick and sum(failed) >= 0.8 * len(sick):
            return n
    return None


def show_confusion(runs: Mapping[str, dict]) -> None:
    """What `lab.health` says of the runs that no limit saw."""
    counts: dict[tuple[bool, bool], int] = {}
    named = sick = 0
    for key, run in runs.items():
        name, _, setting = [*key.split("/"), ""][:3]
        if setting not in JUDGED:
            continue
        verdict = health.Health(lines_of(run["metrics"]))
        is_sick, called = name != HEALTHY, not verdict or bool(run["error"])
        counts[is_sick, called] = counts.get((is_sick, called), 0) + 1
        sick += is_sick
        named += name in verdict.look_alikes
    rows = [
        {
            "runs": "sick" if s else "healthy",
            "called healthy": str(counts.get((s, False), 0)),
            "called sick": str(counts.get((s, True), 0)),
        }
        for s in (False, True)
    ]
    print(table(rows))
    print(f"the right specimen among the first {health.LIKE}: {named} of {sick}")


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
        learn(results)
        text = json.dumps(curves_of(results["runs"]), separators=(",", ":"))
        replace_file(CURVES, text.replace('},"', '},\n"') + "\n")
    if args.judge:
        show_confusion(results["runs"])
    else:
        first = show_tables(results["runs"])
        save({**load(), "first": first})  # another process may have written meanwhile


if __name__ == "__main__":
    main()
