"""Does the code still give the same numbers? `python benchmarks/same_numbers.py [--only plans]`

A net for changes that must change nothing. Recorded in `results/same_numbers.json`, and compared:

    runs    four steps of every stage (PPO in its three layouts) with the bundled model, seed 0, one
            thread: every metric that is no time or memory, what was sampled, the final weights
    plans   the whole ledger of the cases of `cost_cases.py`, and of every preset with each stage
            and way of sharding; the x-ray's ledger of a few small cases

    python benchmarks/same_numbers.py --record       # from code that is known to be right

Weights, samples and ledgers are kept as hashes, metrics as numbers; all must be equal to the last
digit. So that one x86 CPU computes what another does, the libraries are held to their plainest
kernels. Metrics that have other names now are listed in `rlhf_lab/runs/renamed.json`.
About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "same_numbers.json"
PLAIN_KERNELS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "reward": ("reward", {}),
    "dpo": ("dpo", {}),
    "ppo four": ("ppo", {}),
    "ppo shared": ("ppo", {"layout": "shared"}),
    "ppo adapters": ("ppo", {"layout": "adapters", "lora_r": 8}),
    "rloo": ("rloo", {}),
    "grpo": ("grpo", {}),
}
NOT_COMPARED = ("seconds", "second", "bytes", "time", "runtime", "memory", "ids")
NOT_COMPARED += ("objective_error", "gold_corr", "length_corr")
"""Parts of the names of metrics that no two runs share, or that older runs lack."""
STAGES = ("sft", "reward", "dpo", "ppo", "rloo", "grpo", "inference")
SHARDING = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp2")
XRAYS = 8
"""Cases of `cost_cases.small_cases` that are x-rayed: every fourth."""


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if value != value else value
        for name, value in metrics.items()
        if not any(part in name for part in NOT_COMPARED)
    }


def weights(folder: Path) -> str:
    """A hash of every tensor of the run's models, by file and name."""
    from safetensors.torch import load_file

    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            total.update(f"{file.relative_to(folder)} {name} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:24]


def run_of(name: str, folder: Path) -> dict[str, Any]:
    """Train one of `RUNS`. -> what is compared of it."""
    import torch

    import rlhf_lab as lab

    torch.set_num_threads(1)
    stage, settings = RUNS[name]
    data = lab.load_data("stories", seed=0)
    plan = lab.plan(stage, "tiny", max_steps=4, logging_steps=1, seed=0, **settings)
    run = lab.train(plan, data, out=folder / name.replace(" ", "-"), quiet=True)
    return {
        "metrics": [timeless(line) for line in run.metrics],
        "summary": timeless({k: v for k, v in run.summary.items() if not isinstance(v, dict)}),
        "samples": digest([timeless(row) for row in run.samples]),
        "weights": weights(run.folder),
    }


def rows_of(ledger: Any) -> str:
    names = ("stage", "role", "phase", "component", "quantity", "value", "low", "high", "unit")
    return digest([[getattr(row, name) for name in names] + [row.source] for row in ledger])


def plans() -> dict[str, str]:
    """Every plan's ledger, by the plan in words; the line of a plan that is refused."""
    import cost_cases

    import rlhf_lab as lab
    from rlhf_lab.cost.estimate import estimate
    from rlhf_lab.models.load import presets
    from rlhf_lab.simulate.step import simulate_step

    device = {"gpu": "h100", "cpu": "laptop"}
    found = {}
    for case in cost_cases.cases(208, 0):
        made = estimate(case.stage, case.config, device[case.device], case.settings)
        found[str(case)] = rows_of(made.ledger)
    for name in presets():
        for stage in STAGES:
            for sharding in SHARDING:
                gpus = 1 if sharding == "none" else 8
                try:
                    plan = lab.plan(
                        stage,
                        name,
                        hardware="h100",
                        gpus=gpus,
                        sharding=sharding,
                        rows=20_000,
                        prompt_length=256,
                        response_length=256,
                    )
                    rows = rows_of(plan.ledger)
                except ValueError as error:
                    rows = f"refused: {error}"
                found[f"{stage} {name} {sharding}"] = rows
    for case in cost_cases.small_cases()[::4][:XRAYS]:
        seen = simulate_step(case.setup, case.config)
        found[f"x-ray of {case}"] = rows_of(seen.ledger)
    return found


def under_new_names(recorded: dict[str, Any]) -> dict[str, Any]:
    from rlhf_lab.runs.run import name_today

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {name_today(name): value for name, value in row.items()}

    metrics = [named(row) for row in recorded["metrics"]]
    return {**recorded, "metrics": metrics, "summary": named(recorded["summary"])}


def differences(name: str, old: Any, new: Any) -> list[str]:
    """Where two recordings of a run or a plan differ, in words; samples are hashed as they are."""
    if isinstance(old, str):
        return [] if old == new else [f"{name}: another ledger"]
    lines = [f"{name}: other {part}" for part in ("samples", "weights") if old[part] != new[part]]
    pairs = list(zip(old["metrics"], new["metrics"])) + [(old["summary"], new["summary"])]
    if len(old["metrics"]) != len(new["metrics"]):
        lines.append(f"{name}: {len(old['metrics'])} lines of metrics, now {len(new['metrics'])}")
    for before, after in pairs:
        lines += [
            f"{name}, step {before.get('step', 'summary')}: {key} was {before.get(key)!r}, "
            f"is {after.get(key)!r}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", nargs="+", choices=("runs", "plans"), default=["runs", "plans"])
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in PLAIN_KERNELS.items()):
        command = [sys.executable, __file__, *sys.argv[1:]]
        return subprocess.call(command, env={**os.environ, **PLAIN_KERNELS})
    found: dict[str, dict[str, Any]] = {}
    if "plans" in args.only:
        found["plans"] = plans()
    if "runs" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found["runs"] = {name: run_of(name, Path(folder)) for name in RUNS}
    old = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if args.record:
        RESULTS.write_text(json.dumps({**old, **found}, indent=1, sort_keys=True) + "\n")
        return 0
    lines = []
    for part, things in found.items():
        for name, recorded in old[part].items():
            recorded = recorded if part == "plans" else under_new_names(recorded)
            lines += differences(name, recorded, things[name])
    print("\n".join(lines[:60]))
    print(f"{sum(map(len, found.values()))} compared, {len(lines)} differences")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
