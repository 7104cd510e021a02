"""Is our PPO the same as TRL 1.12.0's `trl.experimental.ppo.PPOTrainer`?

    python benchmarks/ppo_parity.py                # both parts, on the bundled `tiny` model
    python benchmarks/ppo_parity.py --part 1       # about a minute
    python benchmarks/ppo_parity.py --part 2 --seeds 8 --iterations 40

Part 1, exact: both trainers get the same models, prompts and responses. Rewards, advantages,
returns, losses, the gradient of every parameter, and the weights after a full iteration of 4 epochs
x 4 minibatches must agree to 1e-5 in float32, and to 1e-9 in float64 (where a difference that
float32 would excuse as rounding has nowhere to hide). Exit status 1 when they do not.

Part 2, statistical: whole runs with the same settings but each trainer's own sampling noise, over
several seeds, one after the other. Mean score and KL over the last third of each run are compared
by an exact permutation test.

TRL runs in its own environment, `.venv-trl112` beside the repository's `.venv`, made on the first
call with the versions of constraints.txt: TRL 1.12.0 runs with transformers 5.23. Where the two
trainers differ by design, ours is set as TRL's is: the score one position later where padding
exists (`as_trl`), no gradient clipping (TRL's PPO never clips, whatever `max_grad_norm` says),
and TRL's divisor of the logits, temperature + 1e-7. Results: benchmarks/results/ppo_parity.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ppo_parity_setup import (
    COMMON,
    HERE,
    ROOT,
    TRL,
    disturb,
    draw_responses,
    make_world,
    our_iteration,
    our_trainer,
    our_versions,
    run_trl,
    trl_python,
)

RESULTS = HERE / "results" / "ppo_parity.json"
LIMITS = {"float32": 1e-5, "float64": 1e-9}
ROWS = 32  # responses of part 1
ONCE = COMMON | {
    "per_device_train_batch_size": ROWS,
    "total_episodes": ROWS,
    "response_length": 24,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "local_rollout_forward_batch_size": ROWS // 2,
    "temperature": 0.7,
}
CASES = {
    "k1": {},
    "k1, whitened rewards": {"whiten_rewards": True},
    "k3": {"kl_estimator": "k3"},
    "k3, whitened rewards": {"kl_estimator": "k3", "whiten_rewards": True},
    "no penalty, gamma 0.98": {"missing_eos_penalty": None, "temperature": 1.0, "gamma": 0.98},
    "4 epochs x 4 minibatches": {
        "num_mini_batches": 4,
        "num_ppo_epochs": 4,
        "learning_rate": 1e-3,
        "whiten_rewards": True,
    },
}


# ------------------------------------------------------------------------------ part 1: exact

QUANTITIES = {  # row of the table: which tensors it covers
    "log-probs, policy": "logprobs",
    "log-probs, reference": "ref_logprobs",
    "values": "values",
    "scores": "scores",
    "rewards": "rewards",
    "advantages": "advantages",
    "returns": "returns",
    "policy loss": "pg_loss",
    "value loss": "vf_loss",
    "total loss": "loss",
    "gradients, policy": "gradient/policy.",
    "gradients, value model": "gradient/value.",
    "weights after, policy": "weight/policy.",
    "weights after, value model": "weight/value.",
}
LOGGED = {  # our metric: TRL's
    "score": "objective/scores",
    "kl": "objective/kl",
    "pg_loss": "loss/policy_avg",
    "vf_loss": "loss/value_avg",
    "clipfrac": "policy/clipfrac_avg",
    "vf_clipfrac": "val/clipfrac_avg",
}


def relative_to(gap: float, size: float) -> float:
    return gap / size if size > 1e-6 else 0.0


def difference(ours: dict, theirs: dict) -> dict[str, tuple[float, float]]:
    """For each quantity the largest absolute difference, and the same relative to its size.

    Relative: divided by the largest magnitude in TRL's tensor; left out where that is 0 but for
    rounding, as the first policy loss is (ratio 1, whitened advantages).
    """
    out = {}
    for label, key in QUANTITIES.items():
        names = [n for n in theirs if n == key or (key.endswith(".") and n.startswith(key))]
        if sorted(names) != sorted(n for n in ours if n == key or n in names):
            raise SystemExit(f"{label}: the two sides have different tensors")
        gaps, relative = [0.0], [0.0]
        for name in names:
            a, b = ours[name].double(), theirs[name].double()
            for x, y in ((a.shape, b.shape), (ours[name].dtype, theirs[name].dtype)):
                if x != y:
                    raise SystemExit(f"{name}: ours is {x}, TRL's is {y}")
            gap = (a - b).abs().max().item()
            gaps.append(gap if math.isfinite(gap) else math.inf)
            relative.append(relative_to(gaps[-1], b.abs().max().item()))
        out[label] = max(gaps), max(relative)
    return out


def logged_gap(ours: dict, theirs: dict, estimator: str) -> tuple[float, float]:
    """Largest difference between the metrics that both log under some name."""
    renamed = {"kl": "kl_k3"} if estimator == "k3" else {}  # TRL logs the estimator it uses
    pairs = [(ours[renamed.get(a, a)], theirs[b]) for a, b in LOGGED.items()]
    gaps = [abs(a - b) for a, b in pairs]
    return max(gaps), max(relative_to(g, abs(b)) for g, (_, b) in zip(gaps, pairs, strict=True))


def worst(of: list[dict]) -> dict[str, tuple[float, float]]:
    return {k: (max(d[k][0] for d in of), max(d[k][1] for d in of)) for k in of[0]}


def trl_rounding(in_32: dict, in_64: dict) -> dict[str, tuple[float, float]]:
    """How far TRL's float32 is from its own float64, by quantity."""
    return difference({name: t.to(in_32[name].dtype) for name, t in in_64.items()}, in_32)


def allowed(dtype: str, label: str, rounding: dict) -> float:
    """The limit, or twice TRL's own rounding where that is larger: two float32 results, each so far
    from the float64 that both agree on. Adam divides a gradient by its own size, so that after 16
    steps a parameter that hardly has one shows it."""
    return max(LIMITS[dtype], 2 * rounding[label][0] if dtype == "float32" else 0)


def table(title: str, rows: dict, limits: dict[str, float] | None) -> None:
    print(f"\n{title}")
    print(f"  {'quantity':30} {'largest difference':>19} {'relative':>10}")
    for label, (gap, relative) in rows.items():
        verdict = "" if limits is None else "ok" if gap <= limits[label] else "DIFFERS"
        if limits and verdict == "ok" and gap > min(limits.values()):
            verdict += f" (TRL is {limits[label] / 2:.1e} from its own float64)"
        print(f"  {label:30} {gap:19.2e} {relative:10.1e}  {verdict}")


def part1(python: Path, model: str, threads: int, compiled: bool = False) -> tuple[bool, dict]:
    """One iteration on injected rollouts, in every case and both precisions; ours `compiled`."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_world(folder, model, ROWS)
        disturb(folder)
        responses = draw_responses(folder, ONCE["response_length"])
        jobs = []
        for i, (dtype, (name, change)) in enumerate(itertools.product(LIMITS, CASES.items())):
            settings = ONCE | change
            shuffle = random.Random(i % len(CASES))  # the same order in both precisions
            orders = [shuffle.sample(range(ROWS), ROWS) for _ in range(settings["num_ppo_epochs"])]
            jobs.append(
                {
                    "name": f"job{i}",
                    "case": name,
                    "dtype": dtype,
                    "inject": True,
                    "settings": settings,
                    "orders": orders,
                }
            )
        versions = run_trl(python, folder, jobs, threads)
        gaps: dict = {d: {} for d in LIMITS}
        trl: dict = {d: {} for d in LIMITS}
        for job in jobs:
            ours = job | {"settings": job["settings"] | {"torch_compile": compiled}}
            found, log = our_iteration(folder, ours, responses)
            theirs = load_file(folder / f"{job['name']}.trl.safetensors")
            trl_log = json.loads((folder / f"{job['name']}.trl.json").read_text())["log"][0]
            trl[job["dtype"]][job["case"]] = theirs
            result = difference(found, theirs)
            if job["dtype"] == "float32":  # both log in float32
                kind = job["settings"]["kl_estimator"]
                result["logged metrics"] = logged_gap(log, trl_log, kind)
            gaps[job["dtype"]][job["case"]] = result
            if job["case"] == "4 epochs x 4 minibatches" and job["dtype"] == "float32":
                clipped = log["clipfrac"], log["vf_clipfrac"]
        late, default = (
            our_iteration(folder, jobs[0] | {"late_score": flag}, responses)[0]
            for flag in (True, False)
        )
        placement = difference(default, late)  # what our default changes

    print(
        f"\nPart 1{', ours compiled' * compiled}: one iteration on {ROWS} injected responses, "
        f"model {model}, "
        f"{len(CASES)} cases: {'; '.join(CASES)}"
    )
    ok = True
    rounding = worst([trl_rounding(trl["float32"][c], trl["float64"][c]) for c in CASES])
    rounding["logged metrics"] = (0.0, 0.0)
    for dtype, limit in LIMITS.items():
        rows = worst(list(gaps[dtype].values()))
        limits = {label: allowed(dtype, label, rounding) for label in rows}
        table(f"{dtype}: ours - TRL, worst of all cases (limit {limit:g})", rows, limits)
        ok &= all(gap <= limits[label] for label, (gap, _) in rows.items())
    print(
        f"  (in the 16 steps of the last case {clipped[0]:.0%} of policy ratios and "
        f"{clipped[1]:.0%} of values were clipped)"
    )
    title = "For information: our default (score on the stop token) - the placement of TRL and N+"
    table(title, placement, None)
    print(f"\nPart 1: {'equal' if ok else 'NOT EQUAL'}")
    return ok, {
        "model": model,
        "equal": ok,
        "limits": LIMITS,
        "gaps": gaps,
        "trl_rounding": rounding,
        "trl": versions,
        "clipped": clipped,
        "default_placement": placement,
    }


# ----------------------------------------------------------------- part 2: whole runs, statistical


def permutation_test(a: list[float], b: list[float]) -> float:
    """Two-sided p-value of the difference of means, over every split of the pooled values."""
    pooled, n = a + b, len(a)
    if math.comb(len(pooled), n) <= 200_000:
        splits = itertools.combinations(range(len(pooled)), n)
    else:
        draw = random.Random(0)
        splits = [draw.sample(range(len(pooled)), n) for _ in range(100_000)]
    total, observed, as_large, count = sum(pooled), abs(sum(a) / n - sum(b) / len(b)), 0, 0
    for group in splits:
        part = sum(pooled[i] for i in group)
        gap = abs(part / n - (total - part) / len(b))
        as_large += gap >= observed - 1e-12
        count += 1
    return as_large / count


def mean_sd(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def bands_overlap(a: list[list[float]], b: list[list[float]]) -> float:
    """Share of iterations at which mean +- sd over the seeds of the two sides overlap."""
    hits = 0
    for x, y in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        (m, s), (n, t) = mean_sd(list(x)), mean_sd(list(y))
        hits += abs(m - n) <= s + t + 1e-3  # the KL before any update is 0, all but rounding
    return hits / len(a[0])


def part2(python: Path, model: str, threads: int, seeds: int, iterations: int, rate: float):
    """Whole runs of both trainers, seed by seed, never two at a time."""
    common = COMMON | {"learning_rate": rate}
    batch = common["per_device_train_batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_world(folder, model, 1024)
        jobs = [
            # Seeds far apart: accelerate reseeds with seed + epoch, so that in TRL the second pass
            # over the prompts with seed 1 would have the order and the noise of seed 2's first.
            {
                "name": f"seed{1000 * s}",
                "dtype": "float32",
                "inject": False,
                "settings": common | {"seed": 1000 * s, "total_episodes": batch * iterations},
            }
            for s in range(1, seeds + 1)
        ]
        print(
            f"\nPart 2: {seeds} seeds x {iterations} iterations of {batch} responses, "
            f"model {model}",
            flush=True,
        )
        versions = run_trl(python, folder, jobs, threads)
        theirs = [json.loads((folder / f"{j['name']}.trl.json").read_text()) for j in jobs]
        ours = []
        for job in jobs:
            trainer = our_trainer(folder, job)
            began = time.perf_counter()
            log = trainer.train().log_history
            ours.append({"seconds": time.perf_counter() - began, "log": log})
            print(f"ours {job['name']}: {ours[-1]['seconds']:.1f} s", flush=True)

    rates = [[line["learning_rate"] for line in run["log"]] for run in ours]
    trl_rates = [[line["lr"] for line in run["log"] if "lr" in line] for run in theirs]
    if rates != trl_rates:
        raise SystemExit(f"the learning rates differ: {rates[0]}, TRL has {trl_rates[0]}")

    result: dict = {
        "model": model,
        "settings": common,
        "seeds": seeds,
        "iterations": iterations,
        "trl": versions,
        "quantities": {},
    }
    last = max(1, iterations // 3)
    print(f"\n  mean over the last {last} of {iterations} iterations; mean +- sd over the seeds")
    heads = f"{'ours':>18} {'TRL':>18} {'ours - TRL, 2 SE':>20} {'p':>7} {'bands overlap':>14}"
    print(f"  {'':8} {heads}")
    same = True
    for name in ("score", "kl"):
        curves = [[line[name] for line in run["log"]] for run in ours]
        key = LOGGED[name]
        trl_curves = [[line[key] for line in run["log"] if key in line] for run in theirs]
        a, b = ([statistics.mean(c[-last:]) for c in side] for side in (curves, trl_curves))
        (m, s), (n, t), p = mean_sd(a), mean_sd(b), permutation_test(a, b)
        error = 2 * math.sqrt((s**2 + t**2) / seeds)
        share = bands_overlap(curves, trl_curves)
        same &= p > 0.05 and share >= 0.9
        print(
            f"  {name:8} {m:9.3f} +- {s:5.3f} {n:9.3f} +- {t:5.3f} {m - n:11.3f} +- {error:5.3f} "
            f"{p:7.3f} {share:13.0%}"
        )
        result["quantities"][name] = {
            "ours": a,
            "trl": b,
            "ours_mean_sd": (m, s),
            "trl_mean_sd": (n, t),
            "p": p,
            "difference": m - n,
            "two_standard_errors": error,
            "bands_overlap": share,
            "ours_curves": curves,
            "trl_curves": trl_curves,
        }
        for side, lines in (("ours", curves), ("TRL", trl_curves)):
            first, final = (statistics.mean(c[i] for c in lines) for i in (0, -1))
            print(f"           {side}: {first:.3f} at the first iteration, {final:.3f} at the last")
    if (least := 2 / math.comb(2 * seeds, seeds)) > 0.05:
        verdict, same = f"too few seeds to tell (p cannot fall below {least:.2f})", None
    else:
        verdict = "indistinguishable" if same else "DIFFERENT"
    print(f"\nPart 2: {verdict}; needs p > 0.05 and overlapping bands in 90% of the iterations")
    result["indistinguishable"] = same
    return same, result


def main() -> int:
    bundled = ROOT / "small_models" / "tiny"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=("1", "2", "both"), default="both")
    parser.add_argument(
        "--model",
        default=os.path.relpath(bundled) if (bundled / "reward").is_dir() else "random",
        help="folder with sft/ and reward/ (default: small_models/tiny), or 'random'",
    )
    parser.add_argument("--compiled", action="store_true", help="part 1: ours by torch_compile")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each trainer in part 2")
    parser.add_argument("--iterations", type=int, default=20, help="iterations of a run in part 2")
    parser.add_argument("--learning-rate", type=float, default=COMMON["learning_rate"])
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's choice)")
    parser.add_argument("--trl-python", type=Path, help=f"an interpreter that has TRL {TRL}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the numbers go")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
    python = args.trl_python or trl_python()
    sys.path.insert(0, str(ROOT))

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    results["ours"], fine = our_versions(), True
    if args.part in ("1", "both"):
        kept = "part1_compiled" if args.compiled else "part1"
        equal, results[kept] = part1(python, args.model, args.threads, args.compiled)
        fine &= equal
    if args.part in ("2", "both"):
        same, results["part2"] = part2(
            python, args.model, args.threads, args.seeds, args.iterations, args.learning_rate
        )
        fine &= same is not False
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
