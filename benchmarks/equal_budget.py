"""PPO against DPO and others at equal cost: `python benchmarks/equal_budget.py [--seeds 5]`

Seven ways from mini's pretrained model, each trained once a seed for about 17 seconds of one core,
SFT and reward model included (`lab.equal_budget`); what is there in results/equal_budget.json is
not trained again, so that a stopped run goes on. Seconds are CPU seconds of the one process with
one thread: on a machine that others use, those of the clock do not compare. Labels: 1,024 pairs for
the reward model, 1,536 for DPO, 1,056 for KTO (a pair gives it two answers).

Writes results/equal_budget.json after each training, and at the end results/equal_budget.txt (the
table, the answer) and results/equal_budget.svg (headless Chromium); ten minutes of a quiet core.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there

import rlhf_lab as lab  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "equal_budget.json"
EACH = {
    "sft": {"max_steps": 24},
    "reward": {"max_steps": 32},
    "ppo": {"max_steps": 15},
    "rloo": {"max_steps": 36},
    "grpo": {"max_steps": 36},
    "dpo": {"max_steps": 48},
    "kto": {"max_steps": 66},
    "rejection": {"prompts": 512, "num_generations": 4, "max_steps": 48, "learning_rate": 1e-3},
}
"""Steps in place of the plan's, so that they are the same on every machine; SFT on samples begins
at a third of SFT's rate, from a model that has been trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many [5]")
    parser.add_argument("--file", type=Path, default=RESULTS, help="what is there already")
    args = parser.parse_args()
    how = {"budget": 17, "each": EACH, "prompts": 128, "cpu_seconds": True}
    found = lab.equal_budget(seeds=range(args.seeds), file=args.file, **how)
    args.file.with_suffix(".txt").write_text(f"{found}\n", encoding="utf-8")
    print(found)
    from serving_frontier import svg

    args.file.with_suffix(".svg").write_text(svg(found.figure()), encoding="utf-8")


if __name__ == "__main__":
    main()
