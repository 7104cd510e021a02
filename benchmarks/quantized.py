"""What rounding costs: `python benchmarks/quantized.py [--seeds 0 1 2] [--runs FOLDER]`

Of tiny, for each seed, a short PPO run, the bundled SFT and reward model, and DPO's adapters; each
turned into bf16, int8 (weights; weights and inputs) and NF4 by `lab.quantize`:

    bytes       of the safetensors file against the plan: within 1 %
    policies    gold reward lost (same prompts, same noise), KL to the whole policy in nats a token,
                perplexity, tokens sampled a second against the whole model's in turn
    reward      pairs ordered alike, Spearman's correlation of the scores, accuracy
    LoRA        merged and then rounded to NF4 against the adapter on a base in NF4: KL of each

A seed draws the samples, for other held-out rows; the first --trained of them also train PPO and
DPO anew, the others take those in turn. Spreads are standard deviations over seeds. Runs stay in
--runs, which serving_frontier.py reads too; a run that is there is taken as it is. Writes
results/quantized.json; about twenty minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import rlhf_lab as lab
from rlhf_lab.display import table
from rlhf_lab.runs.json_files import versions

RESULTS = Path(__file__).parent / "results" / "quantized.json"
FORMATS = ("bf16", "int8", "int8-dynamic", "nf4")
STEPS = {"ppo": 24, "dpo": 64, "distill": 40}
PROMPTS = 64
LIMIT = 0.01
"""Share by which a file may differ from its plan."""


def trained(stage: str, seed: int, runs: Path, model: str = "tiny", **settings) -> lab.Run:
    """A run of a stage with its seed, trained unless it is there."""
    folder = runs / f"{stage}{'-lora' * ('lora_r' in settings)}-{seed}"
    if (folder / "run.json").is_file() and lab.Run.load(folder).status == "finished":
        return lab.Run.load(folder)
    plan = lab.plan(stage, model, max_steps=STEPS[stage], seed=seed, **settings)
    data = lab.load_data("stories", seed=seed).with_held_out(128)
    return lab.train(plan, data, out=folder, quiet=True, overwrite=True)


def cases(seed: int, runs: Path) -> dict[str, tuple[object, dict]]:
    """What is rounded, by name, and how `quantize` is told of it."""
    return {
        "SFT": ("tiny", {}),
        "PPO": (trained("ppo", seed, runs), {}),
        "reward model": ("tiny", {"stage": "reward"}),
        "LoRA": (trained("dpo", seed, runs, lora_r=16, learning_rate=0.003), {}),
    }


def one_seed(seed: int, runs: Path, trainings: int) -> list[dict]:
    rows, data = [], lab.load_data("stories")
    start = seed * PROMPTS  # each seed has held-out rows of its own
    parts = {
        part: replace(whole, test=whole.test[start : start + PROMPTS])
        for part in ("prompts", "sft", "preferences")
        for whole in [getattr(data, part)]
    }
    data = replace(data, **parts)
    for name, (of, how) in cases(seed % trainings, runs).items():
        for to in FORMATS if name != "LoRA" else ("nf4",):
            made = lab.quantize(of, to, data=data, prompts=PROMPTS, seed=1000 + seed, **how)
            rows.append({"model": name, "to": to, "seed": seed, **made.figures})
            print(name, to, {k: round(v, 4) for k, v in made.figures.items()}, flush=True)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Means and spreads over seeds of what each model in each format costs."""
    found = []
    for name, to in dict.fromkeys((r["model"], r["to"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["to"]) == (name, to)]
        line = {"model": name, "to": to}
        line["bytes against plan"] = max(
            (r["bytes"] / r["planned_bytes"] - 1 for r in mine), key=abs
        )
        values = {
            "gold_change": [r.get("gold_change") for r in mine],
            "kl_per_token": [r.get("kl_per_token") for r in mine],
            "kl_of_adapter": [r.get("kl_of_adapter") for r in mine],
            "pair_agreement": [r.get("pair_agreement") for r in mine],
            "rank_correlation": [r.get("rank_correlation") for r in mine],
            "bytes": [r["bytes"] / r["before/bytes"] for r in mine],
            "speed": [
                r["tokens_per_second"] / r["before/tokens_per_second"]
                for r in mine
                if "tokens_per_second" in r
            ],
        }
        for what, of_seeds in values.items():
            if of_seeds and None not in of_seeds:
                line[what] = mean(of_seeds)
                line[f"{what} spread"] = stdev(of_seeds) if len(of_seeds) > 1 else 0.0
        found.append(line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trained", type=int, default=3, help="seeds to train with [3]")
    parser.add_argument("--runs", type=Path, help="folder of the runs [one that goes]")
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            rows += one_seed(seed, args.runs or Path(scratch), args.trained)
            what = {"versions": versions(), "prompts": PROMPTS, "trainings": args.trained}
            report = {**what, "summary": summary(rows), "rows": rows}
            RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    found = summary(rows)
    cells = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in found]
    print(table(cells))
    worst = max(abs(r["bytes against plan"]) for r in found)
    print(f"files within {worst:.2%} of the plan (limit {LIMIT:.0%})")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
