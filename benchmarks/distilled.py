"""How far does a student come? `python benchmarks/distilled.py --teacher RUN [--seeds 0 1 2]`

A `mini` that SFT has trained learns from a `small` that PPO has trained (`rlhf-lab train ppo
--model small --out RUN`, about six minutes on two quiet cores): on what it writes itself
(`student`), on the teacher's texts (`samples`), and on the teacher's stored distributions over them
(`logits`). Of each: gold reward on 512 held-out prompts before and after, the share of the way to
the teacher, and seconds of the training loop, by the clock and of the process (all its threads: on
a busy machine the clock says little, and with one thread the process' seconds are what a quiet core
would take).

    asked: >= 60 % of the way where teacher and student are >= 1.0 apart, in <= 90 s on two cores

Writes benchmarks/results/distilled.json (what stands there of other seeds and ways stays) and
prints a table. One to three minutes a run on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

import rlhf_lab as lab
from rlhf_lab.display import table
from rlhf_lab.trainers import distill, job

RESULTS = Path(__file__).parent / "results" / "distilled.json"
WAYS = ("student", "samples", "logits")
FIGURES = ("before/gold_reward", "gold_reward", "teacher/gold_reward", "way_to_teacher")


def one_run(way: str, seed: int, teacher: Path, out: Path) -> dict:
    """Distil once. -> figures by name."""
    spent = {"loop": 0.0, "answers": 0.0}

    def timed(name, work):
        def run(*args):
            start = time.process_time()
            made = work(*args)
            spent[name] += time.process_time() - start
            return made

        return run

    plan = lab.plan("distill", "mini", teacher_model=teacher, distill_from=way, seed=seed)
    answers = patch.object(distill, "teacher_answers", timed("answers", distill.teacher_answers))
    with patch.object(job, "run_loop", timed("loop", job.run_loop)), answers:
        run = lab.train(plan, lab.load_data("stories", seed=seed), out=out / f"{way}-{seed}")
    return {
        "from": way,
        "seed": seed,
        "steps": run.last_step,
        **{name: run.summary[name] for name in FIGURES},
        "seconds": run.summary["seconds"],
        "process_seconds": spent["loop"],
        "process_seconds_of_answers": spent["answers"],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the PPO run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed in args.seeds:
        for way in args.ways:
            with tempfile.TemporaryDirectory() as scratch:
                new = one_run(way, seed, args.teacher, Path(scratch))
            rows = [row for row in rows if (row["from"], row["seed"]) != (way, seed)] + [new]
            rows.sort(key=lambda row: (WAYS.index(row["from"]), row["seed"]))
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
            print(table([{k: f"{v:.4g}" if k in FIGURES else str(v) for k, v in new.items()}]))


if __name__ == "__main__":
    main()
