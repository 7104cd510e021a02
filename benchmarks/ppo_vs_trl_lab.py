"""What ours promises by itself: the sections `layouts` and `resume` of `ppo_vs_trl.py`."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ppo_parity import mean_sd, permutation_test
from ppo_vs_trl_report import GIB, QUIET, Options, show, target

# ------------------------------------------------------------------------------------------ layouts

LAYOUTS: dict[str, dict] = {
    "four": {},
    "shared": {"learning_rate": 8e-4, "vf_coef": 0.01, "max_steps": 60},
    "adapters": {"lora_r": 8, "learning_rate": 3.5e-3, "vf_coef": 0.3},
}
"""Layout → settings beyond the lab's defaults, chosen for one KL on seeds 10 to 12: no seed of the
section's own. A shared trunk takes a third less time for a step, and gets as many more."""


def layouts(options: Options) -> dict:
    """The lab's PPO in each layout: gold reward and KL over seeds; memory, measured and planned."""
    import torch

    torch.set_num_threads(options.threads)
    runs: dict[str, list[dict]] = {name: [] for name in LAYOUTS}
    for seed in range(options.seeds):
        for name, more in LAYOUTS.items():  # in turn
            runs[name].append(_train(name, seed, more, options))
            last = runs[name][-1]
            print(
                f"{name}, seed {seed}: gold {last['gold']:.3f}, KL {last['kl']:.2f}, "
                f"{last['seconds']:.0f} s",
                flush=True,
            )
    show(
        "layouts: gold reward and KL on held-out prompts, mean +- sd over the seeds",
        [
            {
                "layout": n,
                **{
                    k: "{:.3f} +- {:.3f}".format(*mean_sd([r[k] for r in found]))
                    for k in ("gold", "kl", "seconds")
                },
            }
            for n, found in runs.items()
        ],
    )
    _show_memory(runs)
    targets = []
    for name, what in itertools.product(("shared", "adapters"), ("gold", "kl")):
        p = permutation_test([r[what] for r in runs["four"]], [r[what] for r in runs[name]])
        targets.append(
            target(
                f"{name} as four: {what}, p of so large a difference by chance",
                p,
                0.05,
                at_least=True,
            )
        )
    if options.seeds < 5:
        targets.append(target("layouts: seeds", options.seeds, 5, at_least=True))
    return {"settings": LAYOUTS, "runs": runs, "targets": targets}


def _train(layout: str, seed: int, more: dict, options: Options) -> dict:
    """One run of the lab; → its figures."""
    import rlhf_lab as lab

    if options.quick:
        more = {"max_steps": 2} | more
    plan = lab.plan("ppo", str(options.model.name), layout=layout, seed=seed, **more)
    data = lab.load_data("stories", seed=0)
    run = lab.train(plan, data, out=options.scratch / f"{layout}-{seed}", quiet=True)
    measured = run.ledger.filter(source="measured", quantity="bytes")
    predicted = run.ledger.filter(source="predicted", quantity="bytes")  # at the data's own lengths
    found = run.summary
    return {
        "seed": seed,
        "gold": found["gold_reward"],
        "kl": found["kl"],
        "seconds": found["seconds"],
        "before": found["before/gold_reward"],
        "peak_resident": found["process_peak_bytes"],
        "measured": measured.peak(),
        "planned": predicted.peak(),
        "plan": plan.peak,
        "measured_by_component": _by_component(measured),
        "planned_by_component": _by_component(predicted),
        "curve": {n: run.series(n)[1] for n in ("gold_reward", "kl", "score")},
    }


def _by_component(ledger) -> dict[str, float]:
    """Bytes at the worst moment, by component."""
    found: dict[str, float] = {}
    for row in ledger.at_peak():
        found[row.component] = found.get(row.component, 0.0) + row.value
    return found


def _show_memory(runs: dict[str, list[dict]]) -> None:
    rows = []
    for source in ("measured", "planned"):
        for name, found in runs.items():
            parts = found[0][f"{source}_by_component"]
            peak = found[0][source]
            rows.append(
                {
                    "": source,
                    "layout": name,
                    "peak, GiB": f"{peak / GIB:.3f}",
                    "of four": f"{peak / runs['four'][0][source]:.0%}",
                    **{c: f"{b / GIB:.3f}" for c, b in parts.items()},
                }
            )
    show("memory at the worst moment, by component (GiB)", rows)


# ------------------------------------------------------------------------------------------- resume


def difference(whole: Path, resumed: Path) -> str:
    """The first line in which two metrics.jsonl differ, in words; '' when they are the same."""
    a, b = (f.read_bytes().splitlines() for f in (whole, resumed))
    for number, (left, right) in enumerate(itertools.zip_longest(a, b), 1):
        if left != right:
            lines = [
                t.decode(errors="replace")[:160] if t is not None else "no such line"
                for t in (left, right)
            ]
            return f"line {number}: {lines[0]} | {lines[1]}"
    return ""


def command(folder: Path, steps: int, resume: bool = False) -> list[str]:
    """A training from the command line that can be resumed after every iteration."""
    return [
        sys.executable,
        "-m",
        "rlhf_lab.cli",
        "train",
        "ppo",
        "--steps",
        str(steps),
        "--set",
        "save_steps=1",
        "--seed",
        "0",
        "--quiet",
        "--out",
        str(folder),
        *(["--resume"] if resume else []),
    ]


def start(folder: Path, steps: int, options: Options) -> subprocess.Popen:
    """Start a training, or resume it where its folder holds a run; returns once there is one."""
    env = os.environ | QUIET | {"OMP_NUM_THREADS": str(options.threads)}
    there = (folder / "run.json").is_file()
    process = subprocess.Popen(
        command(folder, steps, there),
        env=env,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not (folder / "run.json").is_file():
        time.sleep(0.02)
    return process


def to_the_end(process: subprocess.Popen) -> None:
    """Wait for a training. Raises RuntimeError with its last words if it fails."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"training ended with {process.returncode}:\n{errors[-2000:]}")


def killed(process: subprocess.Popen, after: float) -> bool:
    """SIGKILL a training after some seconds; → False if it was over before."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    to_the_end(process)
    return False


def resume(options: Options) -> dict:
    """Kill a training at a random moment, resume it, compare its metrics with an unbroken run's.

    The moments are spread over the life of a run, from its folder's first file to the end of the
    process: saving, writing and evaluation included.
    """
    from rlhf_lab.runs.run import Run

    steps = 2 if options.quick else 8
    whole = options.scratch / "whole"
    process, began = start(whole, steps, options), time.perf_counter()
    to_the_end(process)
    life = time.perf_counter() - began
    draw, rows = random.Random(0), []
    for number in range(options.kills):
        folder = options.scratch / f"killed-{number}"
        while not killed(start(folder, steps, options), after := draw.uniform(0, life)):
            shutil.rmtree(folder)  # it was faster this time: another moment
        reached = _lines(folder / "metrics.jsonl")
        if Run.load(folder).status != "finished":  # else it was killed on its way out
            to_the_end(start(folder, steps, options))
        differs = difference(whole / "metrics.jsonl", folder / "metrics.jsonl")
        rows.append(
            {
                "killed_after_s": after,
                "iterations_logged": reached,
                "difference": differs,
                "weights_equal": _same_weights(whole, folder),
            }
        )
        print(
            f"kill {number + 1} after {after:.1f} s, {reached} iterations logged: "
            f"{differs or 'identical'}",
            flush=True,
        )
    return _resume_report(steps, life, rows)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _same_weights(a: Path, b: Path) -> bool:
    files = [f / "model" / "model.safetensors" for f in (a, b)]
    return files[0].read_bytes() == files[1].read_bytes()


def _resume_report(steps: int, life: float, rows: Sequence[dict]) -> dict:
    show(
        f"{len(rows)} trainings of {steps} iterations ({life:.0f} s), each killed once",
        [
            {
                "iterations logged": n,
                "kills": sum(r["iterations_logged"] == n for r in rows),
                "same curve": sum(
                    r["iterations_logged"] == n and not r["difference"] for r in rows
                ),
            }
            for n in sorted({r["iterations_logged"] for r in rows})
        ],
    )
    same = sum(not r["difference"] for r in rows)
    weights = sum(r["weights_equal"] for r in rows)
    return {
        "steps": steps,
        "seconds": life,
        "kills": list(rows),
        "targets": [
            target("identical curves", same, len(rows), at_least=True),
            target("identical final weights", weights, len(rows), at_least=True),
        ],
    }
