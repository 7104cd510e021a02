"""What does `lab.HealthCallback` cost a plain TRL script? `python benchmarks/health_overhead.py`

SFT, DPO and GRPO of the bundled mini in TRL's trainers; the callback is the only thing of ours in
them. The steps from one log to the next with it, and as many without, make a pair, the order within
a pair alternating, in one process. TRL logs every tenth step; `--every 1` is the most that the
callback can cost. It looks at as many lines as it ever does. Rows are all of one length, so that
steps are alike. Counted are process (CPU) seconds, which other programs disturb less. Reports the
median of the ratios with / without, and what the callback took of the steps that had it, over the
rest of the same steps, which a busy machine blurs far less: each with its 95 % interval (between
two of the values, by the binomial distribution: it assumes nothing of them). Writes
benchmarks/results/health_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import rlhf_lab as lab
from rlhf_lab.metering.health_callback import KEPT
from rlhf_lab.runs.json_files import versions

RESULTS = Path(__file__).parent / "results" / "health_overhead.json"
STAGES = ("sft", "dpo", "grpo")
WARM = 4
"""Logs that nobody counts."""
WORDS = 48
"""Of a row, at which it is cut: all rows are as long."""


class ByTurns(TrainerCallback):
    """Hands every other log to a callback, and times the steps from one log to the next."""

    def __init__(self, inner: lab.HealthCallback, every: int) -> None:
        self.inner, self.every = inner, every
        self.seconds, self.logs, self.block = [], [], 0
        self.started: float | None = None

    @property
    def on(self) -> bool:
        """without, with; with, without; …"""
        return self.block % 4 in (1, 2)

    def on_step_begin(self, args, state, control, **_):
        if state.global_step % self.every:
            return
        now = time.process_time()
        if self.started is not None:
            self.seconds.append(now - self.started)
            self.block += 1
        self.started = time.process_time()

    def on_log(self, args, state, control, logs=None, **_):
        if self.on:
            now = time.process_time()
            self.inner.on_log(args, state, control, logs=logs)
            self.logs.append(time.process_time() - now)


def trainer_of(stage: str, blocks: int, every: int, folder: str, callback: TrainerCallback):
    """A trainer as a script of one's own makes it."""
    model, data = lab.load("mini"), lab.load_data("stories")
    tokenizer, path = model.tokenizer, str(model.paths["sft"])
    args = {
        "output_dir": folder,
        "max_steps": blocks * every + 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    args |= {"logging_steps": every}
    args |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    given = {"processing_class": tokenizer, "callbacks": [callback]}

    def cut(text: str) -> str:
        return " ".join(text.split()[:WORDS])

    pairs = [r for r in data.preferences.train if len(r["chosen"].split()) > 20][:256]
    if stage == "sft":
        rows = Dataset.from_list([{"text": cut(r["prompt"] + r["chosen"])} for r in pairs])
        config = SFTConfig(**args, max_length=48)
        return SFTTrainer(path, config, train_dataset=rows, **given)
    if stage == "dpo":
        names = ("prompt", "chosen", "rejected")
        rows = Dataset.from_list([{n: r[n] for n in names} for r in pairs])
        return DPOTrainer(path, args=DPOConfig(**args, max_length=64), train_dataset=rows, **given)
    rows = Dataset.from_list([{"prompt": r["prompt"]} for r in pairs])
    length = {"max_completion_length": 32, "generation_kwargs": {"min_new_tokens": 32}}
    config = GRPOConfig(**args, **length, beta=0.04)

    def reward(completions, **_):
        return [float(len(set(c.split()))) for c in completions]

    return GRPOTrainer(path, reward, config, train_dataset=rows, **given)


def measure(stage: str, pairs: int, every: int) -> dict[str, object]:
    """Median of the pairs' ratios with / without and its interval; seconds of a log."""
    inner = lab.HealthCallback()
    turns = ByTurns(inner, every)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(stage, WARM + 2 * pairs, every, folder, turns)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of such a run is not the question
            trainer.add_callback(Full(inner))
            trainer.train()
    blocks = turns.seconds[WARM:]
    halves = [blocks[2 * i : 2 * i + 2][:: 1 if i % 2 == 0 else -1] for i in range(pairs)]
    ratios = sorted(with_it / without for without, with_it in halves)
    logs = turns.logs[WARM // 2 :][:pairs]
    own = sorted(log / (with_it - log) for log, (_, with_it) in zip(logs, halves, strict=True))
    low = rank(pairs)
    return {
        "stage": stage,
        "pairs": pairs,
        "every": every,
        "ratio": median(ratios),
        "low": ratios[low],
        "high": ratios[-1 - low],
        "own_share": median(own),
        "own_low": own[low],
        "own_high": own[-1 - low],
        "step_s": median(blocks) / every,
        "log_s": median(turns.logs),
        "lines": len(inner.lines),
    }


def rank(n: int) -> int:
    """The k for which the median is between the k-th lowest of n values and the k-th highest,
    counted from 0, with a probability of 95 % at the least."""
    k = 0
    while 2 * sum(math.comb(n, j) for j in range(k + 2)) <= 0.05 * 2**n:
        k += 1
    return k


class Full(TrainerCallback):
    """After the first log, as many lines as there ever are."""

    def __init__(self, inner: lab.HealthCallback) -> None:
        self.inner = inner

    def on_log(self, args, state, control, logs=None, **_):
        if self.inner.lines:
            self.inner.lines += self.inner.lines[-1:] * (KEPT + 1 - len(self.inner.lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--every", type=int, default=10, help="steps from a log to the next")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    args = parser.parse_args()
    found = {}
    if RESULTS.exists():
        found = {row["stage"]: row for row in json.loads(RESULTS.read_text("utf-8"))["stages"]}
    for stage in args.stages:
        row = measure(stage, args.pairs, args.every)
        found[stage] = {n: round(x, 6) if isinstance(x, float) else x for n, x in row.items()}
        print(json.dumps(found[stage]), flush=True)
        made = {"stages": [found[s] for s in STAGES if s in found], "versions": versions()}
        made["threads"] = torch.get_num_threads()
        RESULTS.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
