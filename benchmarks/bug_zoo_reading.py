"""What the runs of `bug_zoo.py` say: bands, what leaves them first, limits, and how good those are.

Nothing is trained here: all comes from results/bug_zoo.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev, variance
from unittest.mock import patch

import rlhf_lab as lab
from rlhf_lab.exercises import specimens
from rlhf_lab.exercises.specimens import SPECIMENS
from rlhf_lab.runs import health

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
    "lam": 0.95,
    "max_grad_norm": 1.0,
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
    "tiny at a rate of 7e-4": {"model": "tiny", "learning_rate": 0.0007, "max_steps": 12},
}
"""Healthy runs that limits are learned from too, and bands are not: of other settings than those
that are judged, so that a limit is not one of one setting. Seeds from 20 on."""
WIDER_SEEDS = range(20, 36)
JUDGED = {
    "other seeds": {},
    "half the rate": {"learning_rate": 0.00025},
    "smaller rollouts": {"per_device_train_batch_size": 32},
}
"""Runs that no threshold saw, in these settings."""
JUDGED_SEEDS = range(110, 120)
"""Seeds from 100 to 109 were judged before, by limits of six seeds of each wider setting: two of
thirty healthy runs were called sick, so ten more were learned from, and ten new ones judged."""
UNKNOWN = [*SPECIMENS][6::7]
"""Specimens that the look-alikes do not know of while runs are judged: every seventh. (Limits are
learned from healthy runs alone: to a verdict of sick or healthy every specimen is unknown.)"""
METRICS = (
    *("reward", "score", "gold_reward", "kl", "kl_k3", "kl_per_token", "objective", "entropy"),
    *("sampled_entropy", "response_length", "stopped", "explained_variance", "pg_loss", "vf_loss"),
    *("clipfrac", "vf_clipfrac", "ratio", "approxkl", "grad_norm", "first_ratio_error"),
    *("first_approxkl", "objective_error", "reward_gold_corr"),
    *("reward_length_corr", "kl_coef"),
)
DRAWN = ("reward", "gold_reward", "kl_k3", "entropy", "response_length", "explained_variance")
"""Metrics whose curves are drawn of every specimen, beside the one that shows it first."""
SETTINGS = {"kl_coef"}
"""Logged, and no symptom: they have no band."""
WIDTH = 4.0
"""Half of a band, in standard deviations of the healthy runs."""
LIMIT = 3.5
"""From the mean of what healthy runs show at worst to a limit, in standard deviations: no healthy
run of the learning seeds was more than 3 from limits that the others made, but one."""
FLOOR = {
    "first_ratio_error": 1e-3,
    "objective_error": 1e-3,
    "first_approxkl": 1e-6,
    "kl_coef": 0.14,
    "reward_length_corr": 0.3,
    "ratio": 0.002,
    "kl_per_token": 0.01,
}
"""Half of a band, at the least: rounding errors, what a KL of so few tokens may be below 0, a
coefficient that is all but 0, as much love of length as reward models of other data have, and half
a percent of a mean ratio."""

LOGARITHMS = {"magnitude", "usual"}
NOTHING = health.magnitude([0.0])
"""What a check takes for the logarithm of 0."""

Series = dict[str, list[float | None]]


def rounded(value: float | None) -> float | None:
    """Four digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def load() -> dict:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"runs": {}}


def key_of(name: str, seed: int, setting: str) -> str:
    return "/".join(filter(None, (name, str(seed), setting)))


# ---------------------------------------------------------------------------------- the bands


def series_of(
    runs: Mapping[str, dict], name: str, seeds: Sequence[int], setting: str = ""
) -> list[Series]:
    """The metrics of a specimen's runs; those that checks divide, such as how likely its samples
    are to the policy; and the KL as a logarithm, by which one of 0 is far from all others."""
    found = [runs[k]["metrics"] for s in seeds if (k := key_of(name, s, setting)) in runs]
    divided = {c.metric for c in health.CHECKS.values() if " / " in c.metric}
    return [
        {
            **x,
            **{m: quotients(x, m) for m in sorted(divided) if x.keys() >= {*m.split(" / ")}},
            "log kl_k3": [None if k is None else health.magnitude([k]) for k in x["kl_k3"]],
        }
        for x in found
    ]


def quotients(series: Series, metric: str) -> list[float | None]:
    """Some metrics, divided, `a / b`, in each iteration."""
    first, *below = (series[name] for name in metric.split(" / "))
    rows = zip(first, zip(*below), strict=True)
    return [rounded(a / math.prod(b)) if a is not None and all(b) else None for a, b in rows]


def bands(healthy: Sequence[Series]) -> dict[str, list[tuple[float, float]]]:
    """Of each metric in each iteration: mean ± WIDTH standard deviations of healthy runs. The
    deviation is the larger one of the iteration's and the metric's median over iterations: ten
    runs say little of one."""
    found = {}
    for metric in (m for m in healthy[0] if m not in SETTINGS):
        columns = [[x for x in at if x is not None] for at in zip(*(r[metric] for r in healthy))]
        spreads = [stdev(at) for at in columns if len(at) > 2]
        if not spreads:
            continue
        usual = sorted(spreads)[len(spreads) // 2]
        found[metric] = [band_at(at, usual, FLOOR.get(metric, 0.0)) for at in columns]
    return found


def band_at(values: Sequence[float], usual: float, floor: float) -> tuple[float, float]:
    """Of one iteration; without an end where fewer than three runs have a value."""
    if len(values) < 3:
        return -math.inf, math.inf
    half = max(WIDTH * max(stdev(values), usual), floor)
    return mean(values) - half, mean(values) + half


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


def first_metrics(
    runs: Mapping[str, dict], name: str, band: dict, share: float = 0.8
) -> list[tuple[int, str, int]]:
    """(iteration by which four in five seeds have left, metric, seeds), the soonest first; of those
    that are as soon the one that is farthest out."""
    sick = series_of(runs, name, SEEDS)
    enough = math.ceil(share * len(sick))
    found = []
    for metric in band:
        left = [(x, s) for s in sick if (x := leaves(s, band[metric], metric)) is not None]
        if left and len(left) >= enough:
            at = sorted(x for x, _ in left)[enough - 1]
            far = median(beyond(s, band[metric], metric, x) for x, s in left)
            found.append((at, -far, metric, len(left)))
    return [(at, metric, seeds) for at, _, metric, seeds in sorted(found)]


def tables(runs: Mapping[str, dict]) -> list[dict[str, str]]:
    """What shows each specimen first, four in five of its seeds at the least; where nothing does,
    on how many seeds a metric leaves its band at the most."""
    band, rows = bands(series_of(runs, HEALTHY, LEARNING)), []
    for name in SPECIMENS:
        count = len(series_of(runs, name, SEEDS))
        found = first_metrics(runs, name, band)
        at, metric, seeds = found[0] if found else ("", "none", 0)
        if not found:
            any_seed = first_metrics(runs, name, band, 1e-9)
            seeds = max((seeds for _, _, seeds in any_seed), default=0)
        others = ", ".join(f"{m} ({i})" for i, m, _ in found[1:5])
        rows.append({"specimen": name, "first metric": metric, "iteration": str(at)})
        rows[-1] |= {"seeds": f"{seeds} of {count}", "then": others}
    return rows


def strays(runs: Mapping[str, dict]) -> dict[str, list[str]]:
    """Healthy runs that leave the band of a metric too: those that it is made of, from the band of
    the others; and those of other seeds, judged in the same setting."""
    healthy, found = series_of(runs, HEALTHY, LEARNING), {}
    if len(healthy) > 3:
        for i, one in enumerate(healthy):
            band = bands(healthy[:i] + healthy[i + 1 :])
            found[str(i)] = [m for m in band if leaves(one, band[m], m) is not None]
    band, setting = bands(healthy), next(iter(JUDGED))
    for seed in JUDGED_SEEDS:
        for one in series_of(runs, HEALTHY, [seed], setting):
            found[str(seed)] = [m for m in band if leaves(one, band[m], m) is not None]
    return found


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


def worst_of(check: health.Check, lines: list) -> float:
    """The worst value of a check at any time of a run; NaN where there is none."""
    values = [check.value(lines[: n + 1]) for n in range(len(lines))]
    known = [v for v in values if math.isfinite(v)]
    return (max if check.side == "high" else min)(known) if known else math.nan


def limit_of(check: health.Check, runs: Mapping[str, Sequence[list]]) -> dict | None:
    """Warn LIMIT standard deviations beyond the mean of the worst values of healthy runs, critical
    three times as far; None for what no run could fail. runs: the logged lines of each, by where
    they come from. The mean is that of the source that is farthest out, the deviation that of runs
    within one source: what differs between settings makes no limit loose. None of these runs is
    beyond it. A run in which nothing happened, as none of its tokens was clipped, has no logarithm
    and says nothing of how much is much."""
    worst, sources = [], []
    for source, logged in runs.items():
        values = (worst_of(check, lines) for lines in logged)
        least = NOTHING if check.figure in LOGARITHMS else -math.inf
        found = [x for x in values if math.isfinite(x) and x > least]
        worst += [found] * bool(found)
        sources += [f"{len(found)} {source}"] * bool(found)
    free = sum(len(found) - 1 for found in worst)
    if free < 2:
        return None
    sign = 1 if check.side == "high" else -1
    squares = sum((len(found) - 1) * variance(found) for found in worst if len(found) > 1)
    step = sign * max(LIMIT * math.sqrt(squares / free), FLOOR.get(check.metric, 0.0))
    middle = sign * max(sign * mean(found) for found in worst)
    if check.figure == "trend" and abs(middle + step) >= (2 if check.against else 1):
        return None  # no run could fail it
    every = [x for found in worst for x in found]
    warn = sign * max(sign * x for x in (middle + step, *every))
    limit = {"warn": rounded(warn), "critical": rounded(warn + 2 * step)}
    return {**limit, "origin": f"{'; '.join(sources)}: {min(every):.3g} to {max(every):.3g}"}


def learned(runs: Mapping[str, dict]) -> dict[str, dict]:
    """The limits, which checks each specimen fails, and by which iteration it shows."""
    ours = f"healthy PPO runs of {MODEL}, {size()}, seeds from {LEARNING[0]}"
    healthy = {ours: [lines_of(x) for x in series_of(runs, HEALTHY, LEARNING)]}
    for way in WIDER:
        keys = [key_of(HEALTHY, s, way) for s in WIDER_SEEDS]
        healthy[way] = [lines_of(runs[k]["metrics"]) for k in keys if k in runs]
    for names in STORED:
        stored = [health.logged_lines(lab.Run.stored(name)) for name in names]
        healthy[f"stored runs of the course ({', '.join(names)})"] = stored
    found = {check.name: limit_of(check, healthy) for check in health.CHECKS.values()}
    made = {"limits": {name: x for name, x in found.items() if x}, "specimens": {}}
    with patch.object(health, "limits", lambda: made):
        for name in SPECIMENS:
            sick = [lines_of(x) for x in series_of(runs, name, SEEDS)]
            failed = [f.check.name for lines in sick for f in health.examine(lines)]
            shares = {n: rounded(failed.count(n) / len(sick)) for n in sorted({*failed})}
            made["specimens"][name] = {"shown": shown_by(sick), "fails": shares}
    return made


def shown_by(sick: Sequence[list]) -> int | None:
    """The iteration by which four in five runs have failed a check; None: never."""
    for n in range(1, SIZE["max_steps"] + 1):
        failed = [any(health.examine(lines[:k]) for k in range(1, n + 1)) for lines in sick]
        if sick and sum(failed) >= 0.8 * len(sick):
            return n
    return None


# ---------------------------------------------------------------------------------- the judgement


def judgements(runs: Mapping[str, dict]) -> list[tuple[str, str, bool, bool]]:
    """(name, setting, called sick, right one named) of the runs that no limit saw. What is unknown
    stands in no table of specimens while they are judged."""
    shown = health.limits()["specimens"]
    known = {name: one for name, one in shown.items() if name not in UNKNOWN}
    found = []
    with patch.dict(shown, known, clear=True):
        for key, run in sorted(runs.items()):
            name, _, setting = [*key.split("/"), ""][:3]
            if setting in JUDGED:
                verdict = health.Health(lines_of(run["metrics"]))
                sick = not verdict or bool(run["error"])
                found.append((name, setting, sick, name in verdict.look_alikes))
    return found


def confusion(runs: Mapping[str, dict]) -> list[dict[str, str]]:
    """What `lab.health` says of the runs that no limit saw: rows of a table."""
    judged = judgements(runs)
    of = {
        "healthy": [j for j in judged if j[0] == HEALTHY],
        "sick": [j for j in judged if j[0] != HEALTHY],
        "sick, a specimen of the table": [j for j in judged if j[0] not in (HEALTHY, *UNKNOWN)],
        "sick, unknown": [j for j in judged if j[0] in UNKNOWN],
    }
    for setting in JUDGED:
        of |= {
            f"{kind}, {setting}": [j for j in of[kind] if j[1] == setting]
            for kind in ("healthy", "sick")
        }
    rows = []
    for title, found in of.items():
        named = f"{sum(j[3] for j in found)} of {len(found)}" if "table" in title else ""
        rows.append({"runs": title, "called healthy": str(sum(not j[2] for j in found))})
        rows[-1] |= {
            "called sick": str(sum(j[2] for j in found)),
            f"right in first {health.LIKE}": named,
        }
    return rows


def by_specimen(runs: Mapping[str, dict]) -> list[dict[str, str]]:
    """Of each specimen, how many of its judged runs are called sick, and by its name."""
    judged, rows = judgements(runs), []
    for name in SPECIMENS:
        found = [j for j in judged if j[0] == name]
        of, named = f" of {len(found)}", "unknown" if name in UNKNOWN else ""
        rows.append({"specimen": name, "called sick": f"{sum(j[2] for j in found)}{of}"})
        rows[-1]["named"] = named or f"{sum(j[3] for j in found)}{of}"
    return rows
