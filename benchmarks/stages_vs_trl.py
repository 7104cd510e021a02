"""Stages over TRL: what ours adds, what TRL's settings save. `python benchmarks/stages_vs_trl.py`

wrappers  SFT, reward model, DPO, KTO, RLOO and GRPO of the bundled mini: the trainer that
          `lab.train` makes, metered, watched, with tokens of the lab's making; and the class of
          TRL that it is made of, given the same models, settings and texts and nothing of ours.
          One training of each in turn, the order within a pair alternating. The median of the
          ratios ours / bare and its 95 % interval (between two of the values, by the binomial
          distribution). Of SFT, reward model, DPO and KTO both must come to the same loss, so that
          the work is known to be the same; RLOO and GRPO sample by themselves.
orders    SFT, reward model and DPO with the lab's settings, rows in random order and those of like
          length together (`train_sampling_strategy`), over seeds: time, and what was learned.

Counted are process (CPU) seconds of the training loop, on one thread, which other programs disturb
less than the clock. Writes benchmarks/results/stages_vs_trl.json, section by section.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import trl
from datasets import Dataset
from health_overhead import rank
from transformers import PrinterCallback, Trainer

import rlhf_lab as lab
from rlhf_lab.data.load import Data
from rlhf_lab.metering.meter import Meter
from rlhf_lab.runs.json_files import versions
from rlhf_lab.runs.run import Run
from rlhf_lab.stages import STAGES
from rlhf_lab.trainers.checkpoint import Checkpoints
from rlhf_lab.trainers.job import Job
from rlhf_lab.trainers.online import RewardFunction, SamplingWatch, online_trainer
from rlhf_lab.trainers.prepare import prepare
from rlhf_lab.trainers.trl import Watch, make_trainer

RESULTS = Path(__file__).parent / "results" / "stages_vs_trl.json"
STEPS = {"sft": 30, "reward": 64, "dpo": 12, "kto": 12, "rloo": 32, "grpo": 32}
"""One to ten seconds on a quiet core. A meter books each tensor in the first steps only, of RLOO
and GRPO in the first rollout: in eight of their steps that would be half of all."""
SAMPLED = "rloo", "grpo"
ORDERS = "random", "group_by_length"
LEARNED = "eval_loss", "accuracy", "noise_free_accuracy", "gold_reward", "kl"
SECTIONS = {"wrappers": [*STEPS], "orders": ["sft", "reward", "dpo"]}
COLUMNS = {
    "sft": ("prompt", "completion"),
    "reward": ("prompt", "chosen", "rejected"),
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
}
ROWS = {"sft": "sft", "reward": "preferences", "dpo": "preferences", "kto": "labelled"}
CLASSES = {
    "sft": trl.SFTTrainer,
    "reward": trl.RewardTrainer,
    "dpo": trl.DPOTrainer,
    "kto": trl.KTOTrainer,
    "rloo": trl.RLOOTrainer,
    "grpo": trl.GRPOTrainer,
}


def job_of(stage: str, model: str, meter: Meter, data: Data, folder: Path, **settings: int) -> Job:
    """A training that is ready to begin."""
    plan = lab.plan(stage, model, save_strategy="no", **settings)
    args = plan.config(str(folder / "trainer"))
    ready = prepare(plan, data, args)
    about = {"stage": stage, "model": model, "settings": dict(plan.settings), "data": data.name}
    run = Run.create(folder / "run", **about, seed=42, hardware="here")
    return Job(plan, data, run, meter, ready, args, True, None)


def wrapped(job: Job) -> Trainer:
    """The stage's trainer as `lab.train` makes it, without what comes before and after its loop."""
    stage, args, rows, tokenizer = job.plan.stage, job.args, job.ready.train, job.tokenizer
    models, log = job.ready.models, (job.run.log, job.progress)
    if stage in SAMPLED:
        scored = RewardFunction(models["reward"], tokenizer, args, meter=job.meter)
        watch: Watch = SamplingWatch(job.meter, scored, *log)
        roles = models["policy"], models.get("reference")
        trainer = online_trainer(stage, *roles, tokenizer, rows, args, scored, watch)
    else:
        watch = Watch(job.meter, *log)
        made = (models[STAGES[stage].roles[0]], tokenizer, rows, [], args, [watch])
        trainer = make_trainer(stage, *made, reference=lambda: job.plan.model.sft)
    trainer.add_callback(Checkpoints(trainer, job.meter, None, watch.counter))
    return trainer


def ours(stage: str, data: Data, steps: int, folder: Path) -> Trainer:
    how = {"max_steps": steps, "logging_steps": steps}
    return wrapped(job_of(stage, "mini", Meter(stage), data, folder, **how))


def bare(stage: str, data: Data, steps: int, folder: Path) -> Trainer:
    """TRL's own trainer, with the same models, settings and texts."""
    plan = lab.plan(stage, "mini", max_steps=steps, logging_steps=steps, save_strategy="no")
    model, args = plan.model, copy.copy(plan.config(str(folder / "trainer")))
    given = {"args": args, "processing_class": model.tokenizer}
    if stage in SAMPLED:
        rows = [{"prompt": row["prompt"]} for row in data.prompts.train]
        given |= {"reward_funcs": model.reward, "reward_processing_classes": model.tokenizer}
    else:
        read = getattr(data, ROWS[stage]).train
        rows = [{name: row[name] for name in COLUMNS[stage]} for row in read]
        if stage == "kto":  # of which TRL shuffles nothing
            random.Random(args.seed).shuffle(rows)
    if stage in ("dpo", "kto"):
        given["ref_model"] = model.sft
    start = {"sft": lambda: model.base, "reward": lambda: model.new_reward(42)}.get(stage)
    start = start() if start else model.sft
    trainer = CLASSES[stage](start, train_dataset=Dataset.from_list(rows), **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


SIDES = {"ours": ours, "bare": bare}


def loop(side: str, stage: str, data: Data, steps: int) -> tuple[float, float]:
    """CPU seconds of a training loop, and its mean loss."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SIDES[side](stage, data, steps, Path(scratch))
        started = time.process_time()
        done = trainer.train()
        return time.process_time() - started, done.training_loss


def compare(stage: str, pairs: int, data: Data) -> dict[str, object]:
    """The median of ours / bare over the pairs, its interval, and both losses."""
    for side in SIDES:
        loop(side, stage, data, 2)  # what the first run of a process pays is neither's
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for pair in range(pairs):
        for side in [*SIDES][:: 1 if pair % 2 else -1]:
            found[side].append(loop(side, stage, data, STEPS[stage]))
    both = zip(found["ours"], found["bare"], strict=True)
    ratios, low = sorted(ours[0] / bare[0] for ours, bare in both), rank(pairs)
    losses = {side: median(loss for _, loss in found[side]) for side in SIDES}
    if stage not in SAMPLED and not math.isclose(losses["ours"], losses["bare"], rel_tol=1e-4):
        raise SystemExit(f"{stage}: other work: losses of {losses}")
    seconds = {f"{side}_s": median(cpu for cpu, _ in found[side]) for side in SIDES}
    shown = {"ratio": median(ratios), "low": ratios[low], "high": ratios[-1 - low]}
    about = {"stage": stage, "steps": STEPS[stage], "pairs": pairs}
    return {**about, **shown, **seconds, "losses": losses}


def trained(stage: str, order: str, seed: int, data: Data) -> dict[str, float]:
    """CPU seconds of the training loop of a whole run, and what it came to on held-out rows."""
    how = {"seed": seed, "save_strategy": "no", "train_sampling_strategy": order}
    spent, train = [], Trainer.train

    def timed(self: Trainer, **more: object) -> object:
        started = time.process_time()
        done = train(self, **more)
        spent.append(time.process_time() - started)
        return done

    with tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "train", timed):
        run = lab.train(lab.plan(stage, "mini", **how), data, out=folder, quiet=True)
        return {"cpu_s": spent[0], **{n: run.summary[n] for n in LEARNED if n in run.summary}}


def orders(stage: str, seeds: int, data: Data) -> dict[str, object]:
    """Medians over seeds in both orders, and the median of random / by length."""
    runs = {order: [trained(stage, order, s, data) for s in range(seeds)] for order in ORDERS}
    random_, grouped = runs.values()
    faster = median(a["cpu_s"] / b["cpu_s"] for a, b in zip(random_, grouped, strict=True))
    return {"stage": stage, "seeds": seeds, "faster": faster, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[*SECTIONS], choices=SECTIONS)
    parser.add_argument("--pairs", type=int, default=15, help="of wrappers")
    parser.add_argument("--seeds", type=int, default=3, help="of orders")
    parser.add_argument("--stages", nargs="+", default=list(STEPS), choices=list(STEPS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, found = lab.load_data("stories"), {}
    few = data.first(1024, test=8)  # as many as the steps of wrappers see: tokens are made anew
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text("utf-8"))
    for section in args.only:
        measure, often = {"wrappers": (compare, args.pairs), "orders": (orders, args.seeds)}[
            section
        ]
        for stage in (s for s in args.stages if s in SECTIONS[section]):
            row = measure(stage, often, few if section == "wrappers" else data)
            print(json.dumps(row), flush=True)
            found.setdefault(section, {})[stage] = row
            found |= {"versions": versions(), "threads": torch.get_num_threads()}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
