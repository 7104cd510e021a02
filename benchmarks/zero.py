"""ZeRO-2 and ZeRO-3 on a CPU: is what the lab saves what one process has?

    DEEPSPEED_PYTHON=…/bin/python python benchmarks/zero.py

SFT, DPO and PPO of `mini`, a few steps of SGD in fp32, as `lab.train` makes them: once in one
process with twice the accumulation, once in two that `accelerate launch` starts with the lab's own
config.
That config is for GPUs; here DeepSpeed takes the CPU (`DS_ACCELERATOR`), and accelerate counts two
processes once it is told of gloo. Writes benchmarks/results/zero.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "zero.json"
TOLERANCE = 1e-4
STAGES = {"sft": "loss", "dpo": "loss", "ppo": "pg_loss"}
"""Each with the curve that is compared."""
SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "logging_steps": 1,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "optim": "sgd",
    "save_strategy": "no",
    "seed": 0,
}


def train(folder: Path, ranks: int) -> None:
    """Both stages, in this process or as one of two."""
    import torch

    import rlhf_lab as lab
    from rlhf_lab.data import load
    from rlhf_lab.trainers import prepare, trl

    torch.set_num_threads(1)
    prepare.HELD_OUT = 16
    load.STORY_ROWS |= {"sft": 128, "preferences": 128, "prompts": 64, "test": 16, "test_pairs": 16}
    if ranks > 1:
        # It would be compiled for minutes, and is for speed only.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        on_cpu = {"use_cpu": False, "bf16": False, "fp16": False, "ddp_backend": "gloo"}
        trl.device_settings = lambda given: on_cpu
    for stage in STAGES:
        plan = lab.plan(stage, "mini", **SETTINGS, gradient_accumulation_steps=2 // ranks)
        lab.train(plan, out=folder / stage, quiet=True)


def zero(folder: Path, how: str) -> None:
    """The same in two processes with a config of the lab's."""
    from rlhf_lab.launching import launched
    from rlhf_lab.planning import plan

    config = folder / f"{how}.yaml"
    settings = {"hardware": "h100", "bf16": False, "gradient_accumulation_steps": 1}
    config.write_text(launched(plan("sft", "mini", **settings), how, 2, dry=True).config)
    python = os.environ.get("DEEPSPEED_PYTHON", sys.executable)
    line = [python, "-m", "accelerate.commands.launch", "--config_file", str(config), __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*line, str(folder / how), "2"], env=env, check=True)


def compared(one: Path, two: Path) -> dict:
    """Of a stage: how far apart weights and curves are, and how far it went."""
    from safetensors.torch import load_file

    from rlhf_lab.models.load import load
    from rlhf_lab.runs.run import Run

    weights, others = (load_file(p / "model" / "model.safetensors") for p in (one, two))
    assert weights.keys() == others.keys(), weights.keys() ^ others.keys()
    stage = Run.load(one).stage
    start = load("mini").base if stage == "sft" else load("mini").sft
    before = dict(start.named_parameters())
    (_, losses), (_, same) = (Run.load(p).series(STAGES[stage]) for p in (one, two))
    moved = max(float((w - before[n]).abs().max()) for n, w in weights.items() if n in before)
    figures, theirs = Run.load(one).summary, Run.load(two).summary
    return {
        "weights": max(float((w - others[n]).abs().max()) for n, w in weights.items()),
        "moved": moved,
        "loss": max(abs(a - b) for a, b in zip(losses, same, strict=True)),
        **{n: abs(figures[n] - theirs[n]) for n in ("eval_loss", "kl") if n in figures},
        "evaluated": sorted(theirs.keys() & {"kl", "gold_reward"}),
    }


def main() -> int:
    if len(sys.argv) == 3:
        train(Path(sys.argv[1]), int(sys.argv[2]))
        return 0
    results: dict[str, object] = {"tolerance": TOLERANCE, "settings": SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder / "one", 1)
        for how in ("zero2", "zero3"):
            zero(folder, how)
            for stage in STAGES:
                found = compared(folder / "one" / stage, folder / how / stage)
                print(how, stage, found, flush=True)
                results[f"{how}, {stage}"] = found
    packages = ("torch", "transformers", "trl", "accelerate")
    results["versions"] = {p: version(p) for p in packages}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [k for k, v in results.items() if "," in k and v["weights"] > TOLERANCE]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
