"""How steady are PPO's defaults on `tiny`? `python benchmarks/ppo_defaults.py [--only WAY …]`

PPO with the lab's settings, one of them changed, from five seeds (of data, order and sampling); 24
iterations, and 44, the lab's default, of those that came out best. The gold reward and the KL are
those of the sampled responses: means of the last four iterations, 256 responses. A jump is told by
the highest KL of any iteration.

Writes results/ppo_defaults.json after each training, so that a stopped run goes on; a way and seed
that is there is not trained again. About 45 CPU seconds of one thread each, 80 of the long ones.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there

import rlhf_lab as lab  # noqa: E402
from rlhf_lab.display import table  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "ppo_defaults.json"
SEEDS = range(5)
SHORT, LONG = 24, 44
BEFORE = {"learning_rate": 7e-4, "lam": 0.95, "max_grad_norm": 1.0}
"""The defaults that this study was made to replace."""
MONTE_CARLO = {"learning_rate": 5e-4, "lam": 1.0, "max_grad_norm": 1.0}
NOW = MONTE_CARLO | {"max_grad_norm": 0.1}
WAYS: dict[str, dict[str, object]] = {
    "7e-4, λ .95": BEFORE,
    "5e-4, λ .95": BEFORE | {"learning_rate": 5e-4},
    "7e-4, λ .95, warm-up 4": BEFORE | {"warmup_steps": 4},
    "7e-4, λ .95, clipped": BEFORE | {"max_grad_norm": 0.1},
    "7e-4, λ 1": BEFORE | {"lam": 1.0},
    "5e-4, λ 1": MONTE_CARLO,
    "5e-4, λ 1, long": MONTE_CARLO | {"max_steps": LONG},
    "4e-4, λ 1, long": MONTE_CARLO | {"learning_rate": 4e-4, "max_steps": LONG},
    "5e-4, λ 1, clipped": NOW,
    "5e-4, λ 1, clipped, long": NOW | {"max_steps": LONG},
}
"""Clipped: gradients to a norm of .1, half of what most minibatches have."""
LAST = 4
"""Iterations at the end whose mean is told."""


def train(way: str, seed: int) -> dict[str, float]:
    """One run, without what is evaluated before and after it. → its figures."""
    settings = {"max_steps": SHORT, **WAYS[way]}
    plan = lab.plan("ppo", "tiny", seed=seed, save_strategy="no", **settings)
    data = lab.load_data("stories", seed=seed).with_held_out(8)
    with tempfile.TemporaryDirectory() as place:
        run = lab.train(plan, data, out=Path(place) / "run", quiet=True)
        trained = [m for m in run.metrics if "kl" in m]
    return {
        "gold": mean(m["gold_reward"] for m in trained[-LAST:]),
        "kl": mean(m["kl"] for m in trained[-LAST:]),
        "kl_max": max(m["kl"] for m in trained),
    }


def shown(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for each way: every seed's gold reward, and the rest at its worst."""
    rows = [
        {
            "way": way,
            "gold reward, each seed": ", ".join(f"{f['gold']:.2f}" for f in seeds.values()),
            "mean": f"{mean(f['gold'] for f in seeds.values()):.2f}",
            "KL at the end": f"{mean(f['kl'] for f in seeds.values()):.2f}",
            "highest KL": f"{max(f['kl_max'] for f in seeds.values()):.1f}",
        }
        for way, seeds in found.items()
        if seeds
    ]
    return str(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    for way in args.only:
        for seed in args.seeds:
            if str(seed) not in found.setdefault(way, {}):
                found[way][str(seed)] = train(way, seed)
                RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
                print(f"{way}, seed {seed}: gold {found[way][str(seed)]['gold']:.2f}", flush=True)
    print(shown(found))


if __name__ == "__main__":
    main()
