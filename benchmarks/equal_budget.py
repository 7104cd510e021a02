"""PPO against DPO and others at equal cost: `python benchmarks/equal_budget.py [--long]`

Seven ways from mini's pretrained model, each trained once a seed, SFT and reward model included
(`lab.equal_budget`), for about 15 seconds of one core, or (--long) about 40. What is there in
results/equal_budget.json (results/equal_budget_long.json) is not trained again, so that a stopped
run goes on. Seconds are CPU seconds of the one process with one thread: on a machine that others
use, those of the clock do not compare. Labels: 1,024 pairs for the reward model, 1,536 for DPO and
1,056 for KTO (two answers of a pair) at their ends; long: 2,048, 3,072 and 2,640. Settings
are the lab's defaults, tuned for no budget, but for every `max_steps` and those of rejection.

Writes the JSON after each training, and at the end the table with its answer (.txt) and the figure
(.svg, by headless Chromium), and of the short one a copy for the notebooks; ten minutes of a quiet
core, twenty with --long.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there

import rlhf_lab as lab  # noqa: E402

RESULTS = Path(__file__).parent / "results"
STORED = Path(__file__).parents[1] / "notebooks" / "course_runs" / "equal_budget.json"
"""What the notebooks show: the short one."""
STEPS = {"sft": 24, "reward": 32, "ppo": 15, "rloo": 36, "grpo": 36, "dpo": 48, "kto": 66}
LONG = {"sft": 24, "reward": 64, "ppo": 42, "rloo": 108, "grpo": 108, "dpo": 138, "kto": 165}
"""In place of the plan's, so that they are the same on every machine."""


def settings(long: bool) -> dict[str, object]:
    """Of `lab.equal_budget`. SFT on samples begins at a third of SFT's rate, from a model that has
    been trained."""
    each = {stage: {"max_steps": steps} for stage, steps in (LONG if long else STEPS).items()}
    sampled = {"prompts": 1536, "max_steps": 135} if long else {"prompts": 512, "max_steps": 48}
    each["rejection"] = {**sampled, "num_generations": 4, "learning_rate": 1e-3}
    how = {"budget": 40, "answers": 1024} if long else {"budget": 17}
    return {"each": each, "prompts": 128, "cpu_seconds": True, **how}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many [5]")
    parser.add_argument("--long", action="store_true", help="nearly three times the budget")
    args = parser.parse_args()
    file = RESULTS / f"equal_budget{'_long' * args.long}.json"
    found = lab.equal_budget(seeds=range(args.seeds), file=file, **settings(args.long))
    file.with_suffix(".txt").write_text(f"{found}\n", encoding="utf-8")
    print(found)
    if not args.long:
        found.save(STORED)
    from serving_frontier import svg

    file.with_suffix(".svg").write_text(svg(found.figure()), encoding="utf-8")


if __name__ == "__main__":
    main()
