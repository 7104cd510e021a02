"""Do the stages do what they claim? `python benchmarks/stages.py [--seeds 0 1 2] [--all]`

For each seed: SFT, reward model, PPO and DPO with the lab's default settings on the bundled world,
each from what the one before it made, then what they are worth on held-out prompts and pairs:

    SFT     held-out loss and gold reward against the base model
    reward  accuracy on >= 4,000 held-out pairs sampled from the bundled SFT model, against the
            computed ceiling, and without label noise
    PPO     mean gold reward against best-of-4 from the SFT model (chosen by the reward model),
            every part of the gold reward against SFT's, KL; `--long` runs four times as long
    DPO     mean gold reward against best-of-2 likewise
    others  KTO, RLOO and GRPO as PPO (`--all`)

A change of a part (PPO's grammar less SFT's, on the same prompts) comes with the standard error
of its mean over prompts: two changes in three are nearer to the truth than that.

Writes each seed's figures to benchmarks/results/stages.json (the others there stay) and prints a
table. About six minutes a seed on two cores, ten with `--long`, twelve with `--all`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import rlhf_lab as lab
from rlhf_lab.data.load import annotate, bundled_pairs
from rlhf_lab.display import table
from rlhf_lab.models.weights import load_causal_lm, load_reward_model
from rlhf_lab.trainers.best_of_n import draw, expected_best
from rlhf_lab.trainers.evaluate import gold_gaps, noise_free_accuracy, pair_accuracy, policy_report
from rlhf_lab.world import corpus
from rlhf_lab.world.gold_reward import GOLD_PARTS

RESULTS = Path(__file__).parent / "results" / "stages.json"


OTHERS = ("kto", "rloo", "grpo")


def one_seed(seed: int, out: Path, prompt_count: int, long: bool, others: bool) -> dict:
    """Train the stages with one seed. -> figures by name."""
    data = lab.load_data("stories", seed=seed)
    runs = lab.train_all("tiny", data, out=out, settings={"seed": seed})
    sft, reward = (runs[s].summary for s in ("sft", "reward"))
    figures = {
        "seed": seed,
        "sft eval_loss": sft["eval_loss"],
        "base gold": sft["before/gold_reward"],
        "sft gold": sft["gold_reward"],
        **accuracy(runs["reward"], data),
        "score_offset": reward["score_offset"],
    }
    prompts = [r.prompt for r, _ in zip(corpus.requests("test", seed + 31), range(prompt_count))]
    tokenizer = lab.load("tiny").tokenizer
    policy = load_causal_lm(runs["sft"].model_path)
    reward_model = load_reward_model(runs["reward"].model_path)
    drawn = draw(policy, tokenizer, reward_model, prompts, 4, gold_reward=data.gold_reward)
    for n in (2, 4):
        figures[f"best-of-{n} gold"] = float(expected_best(drawn.scores, drawn.golds, n).mean())
    model = lab.load("tiny").with_stage("sft", runs["sft"].model_path)
    model = model.with_stage("reward", runs["reward"].model_path)
    if long:
        steps = 4 * lab.plan("ppo", model).settings["max_steps"]
        plan = lab.plan("ppo", model, seed=seed, max_steps=steps)
        runs["ppo x4"] = lab.train(plan, data, out=out / "long")
    for stage in OTHERS if others else ():
        runs[stage] = lab.train(lab.plan(stage, model, seed=seed), data, out=out / stage)
    before = policy_report(policy, tokenizer, prompts)[1].texts
    for stage in [name for name in runs if name not in ("sft", "reward")]:
        trained = load_causal_lm(runs[stage].model_path)
        found, after = policy_report(
            trained, tokenizer, prompts, reference=policy, gold_reward=data.gold_reward
        )
        figures |= {
            f"{stage} gold": found["gold_reward"],
            f"{stage} KL": found["kl"],
            f"{stage} seconds": runs[stage].summary["seconds"],
            **part_changes(stage, data, prompts, before, after.texts),
        }
    figures["largest step-0 log-ratio"] = max(
        max(run.series("first_ratio_error")[1]) for stage, run in runs.items() if "ppo" in stage
    )
    return figures


def accuracy(run, data) -> dict[str, float]:
    """The reward model on every bundled held-out pair.

    Labels are drawn, so even the gold reward itself misses the ceiling by luck, about half a point
    on 5,000 pairs: "gold's accuracy" is what it reaches on the same labels.
    """
    pairs = annotate(bundled_pairs()["test"], data.annotator)
    gaps = gold_gaps(pairs, data.gold_reward).tolist()
    model, tokenizer = load_reward_model(run.model_path), lab.load("tiny").tokenizer
    share, margin = pair_accuracy(model, tokenizer, pairs)
    return {
        "rm pairs": len(pairs),
        "rm accuracy": share,
        "gold's accuracy": mean((gap > 0) + (gap == 0) / 2 for gap in gaps),
        "rm ceiling": data.accuracy_ceiling(pairs),
        "rm noise-free": noise_free_accuracy(pairs, margin, data.gold_reward),
    }


def part_changes(stage: str, data, prompts, before, after) -> dict[str, float]:
    """Every part of the gold reward after, minus before; and the standard error of each."""
    read = [
        (data.gold_parts(p, old), data.gold_parts(p, new))
        for p, old, new in zip(prompts, before, after, strict=True)
    ]
    figures = {}
    for part in GOLD_PARTS:
        changes = [new[part] - old[part] for old, new in read]
        figures[f"{stage} {part}"] = mean(changes)
        figures[f"{stage} {part} error"] = statistics.stdev(changes) / len(changes) ** 0.5
    return figures


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--long", action="store_true", help="also PPO four times as long")
    parser.add_argument("--all", action="store_true", help="also KTO, RLOO and GRPO")
    parser.add_argument("--prompts", type=int, default=2048, help="held-out prompts to evaluate on")
    args = parser.parse_args()
    rows = {}
    if RESULTS.exists():
        rows = {row["seed"]: row for row in json.loads(RESULTS.read_text())}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            rows[seed] = one_seed(seed, Path(scratch) / "all", args.prompts, args.long, args.all)
        print(json.dumps(rows[seed], indent=1), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps([rows[s] for s in sorted(rows)], indent=1) + "\n")
    names = list(dict.fromkeys(n for s in args.seeds for n in rows[s] if n != "seed"))
    columns = {f"seed {s}": rows[s] for s in args.seeds}
    print(
        table(
            [
                {"figure": n, **{c: f"{row.get(n, math.nan):.4g}" for c, row in columns.items()}}
                for n in names
            ]
        )
    )


if __name__ == "__main__":
    main()
