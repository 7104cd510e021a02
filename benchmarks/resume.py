"""Killed at random moments and resumed: are curves and weights those of a run that nobody killed?

    python benchmarks/resume.py                          # SFT, reward model, DPO: 20 kills each
    python benchmarks/resume.py --stages grpo --kills 5

A run of a stage is started (`rlhf-lab train`, small settings, a checkpoint every second step), sent
SIGKILL after a random share of the time that a whole one takes, and resumed. Compared with the
undisturbed run, to the last byte: metrics, samples, held-out answers, weights. Writes
benchmarks/results/resume.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from rlhf_lab.cli.main import main as main_of_the_lab
from rlhf_lab.runs.run import Run
from rlhf_lab.stages import STAGES, resolve

RESULTS = Path(__file__).parent / "results" / "resume.json"
SMALL = {
    "per_device_train_batch_size": 8,
    "save_steps": 2,
    "logging_steps": 3,
    "gradient_accumulation_steps": 2,
}
ONLINE = {"response_length": 12, "num_generations": 2}
COMPARED = ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl", "model/model.safetensors")


def arguments(stage: str, data: Path, out: Path, resume: bool) -> list[str]:
    settings = SMALL | (ONLINE if stage in ("rloo", "grpo") else {})
    more = [x for name, value in settings.items() for x in ("--set", f"{name}={value}")]
    how = ["--model", "mini", "--steps", "24", "--data", str(data), "--out", str(out), "--quiet"]
    return ["train", stage, *how, *more, *(["--resume"] if resume else [])]


def train(line: list[str]) -> None:
    """The command line in a process of its own, which prints nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(main_of_the_lab(line))


def start(stage: str, data: Path, out: Path, resume: bool = False) -> BaseProcess:
    """A process that has imported all already: a copy of this one."""
    line = arguments(stage, data, out, resume)
    process = multiprocessing.get_context("fork").Process(target=train, args=(line,))
    process.start()
    return process


def rows(folder: Path) -> Path:
    """A few of the bundled pairs, so that evaluation takes no time."""
    from rlhf_lab.data.load import load_data

    data, file = load_data("stories"), folder / "rows.json"
    pairs = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
        for row in data.preferences.train[:256]
    ]
    file.write_text(json.dumps(pairs))
    return file


def digests(out: Path) -> dict[str, str]:
    found = (out / name for name in COMPARED)
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in found
        if p.is_file()
    }


def one(stage: str, data: Path, out: Path, seconds: float, random_moment: random.Random) -> dict:
    """Kill once at a random moment, resume to the end. → where it was killed, the outcome."""
    process = start(stage, data, out)
    moment = random_moment.uniform(0, seconds)
    process.join(moment)
    process.kill()
    process.join()
    killed = Run.load(out) if (out / "run.json").is_file() else None
    at = {"seconds": round(moment, 2), "status": killed.status if killed else "no run yet"}
    at["step"] = killed.last_step if killed else 0
    at["checkpoints"] = [p.name for p in killed.checkpoints] if killed else []
    again = start(stage, data, out, resume=True)
    again.join()
    return {**at, "exit": again.exitcode, "digests": digests(out)}


def measure(stage: str, kills: int, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, whole = rows(folder), folder / "whole"
        resolve(STAGES[stage].trainer), resolve(STAGES[stage].train)  # imported before the copies
        began = time.perf_counter()
        (undisturbed := start(stage, data, whole)).join()
        if undisturbed.exitcode:
            raise SystemExit(f"{stage}: the undisturbed run failed")
        seconds, expected = time.perf_counter() - began, digests(whole)
        random_moment, found = random.Random(seed), []
        for number in range(kills):
            out = folder / f"killed-{number}"
            result = one(stage, data, out, seconds, random_moment)
            result["same"] = result.pop("digests") == expected
            print(stage, number, result, flush=True)
            found.append(result)
            shutil.rmtree(out)
    return {"kills": kills, "same": sum(r["same"] for r in found), "each": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=["sft", "reward", "dpo"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {p: version(p) for p in ("torch", "transformers", "trl", "accelerate")}
    for stage in args.stages:
        results[stage] = measure(stage, args.kills, args.seed)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{stage}: {results[stage]['same']} of {args.kills} the same", flush=True)
    return int(any(results[stage]["same"] < args.kills for stage in args.stages))


if __name__ == "__main__":
    sys.exit(main())
