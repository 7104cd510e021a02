"""The runs that the notebooks show beside their own: `python .ci/course_runs.py [NAME …]`

Each is trained here with a fixed seed and kept in notebooks/course_runs/NAME as a run folder that
`lab.Run.load` opens: settings, versions, thinned metrics, costs, no model; of one run, which the
documentation shows as a page, some samples too, with the figures of their tokens; of another, from
which notebook 09 distils, the model in 16 bits. Without names all are trained, one after the other:
about 25 minutes on two cores.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "notebooks" / "course_runs"
LARGEST = 50_000  # bytes of a file
STEPS = 24  # PPO's iterations; RLOO and GRPO take four optimizer steps for each
LABELS = (48, 192, 768, 3072)  # how many pairs a reward model learns from: as many steps for each
CONSTANT: dict[str, object] = {"max_steps": 2 * STEPS, "lr_scheduler_type": "constant"}
"""A rate that falls to 0 would end a run before it has gone where it goes without a penalty."""
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "ppo": ("ppo", {"max_steps": STEPS}),
    "ppo_small": ("ppo", {"model": "small"}),
    "ppo_with_kl": ("ppo", CONSTANT),
    "ppo_without_kl": ("ppo", {**CONSTANT, "kl_coef": 0.0}),
    "rloo": ("rloo", {"max_steps": 4 * STEPS}),
    "grpo": ("grpo", {"max_steps": 4 * STEPS}),
    "ppo_shared": ("ppo", {"max_steps": STEPS, "layout": "shared", "learning_rate": 0.0003}),
    "ppo_lora": ("ppo", {"max_steps": STEPS, "lora_r": 16, "learning_rate": 0.003}),
    "ppo_adapters": (
        "ppo",
        {"max_steps": STEPS, "layout": "adapters", "lora_r": 16, "learning_rate": 0.003},
    ),
    "dpo": ("dpo", {"max_steps": 64}),
    "dpo_lora": ("dpo", {"max_steps": 64, "lora_r": 16, "learning_rate": 0.003}),
    **{f"dpo_beta_{beta}": ("dpo", {"max_steps": 64, "beta": beta}) for beta in (0.05, 0.2, 2.0)},
    "kto": ("kto", {}),
    **{f"reward_{pairs}_pairs": ("reward", {"max_steps": 120}) for pairs in LABELS},
}
METRICS = ("kl", "kl_k3", "score", "gold_reward", "loss", "accuracy", "margin", "entropy")
SEED = 0
REPLAYED, SAMPLED = "ppo", (1, 4, 8, 12, 16, 20, 24)
"""The run that keeps samples, and the steps that it keeps two of."""
TEACHER = "ppo_small"
"""The run whose model is kept."""


def _short(value: object) -> object:
    if isinstance(value, (list, dict)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        short = {k: _short(v) for k, v in parts}
        return short if isinstance(value, dict) else list(short.values())
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _samples(run_folder: Path) -> str:
    """Two samples of some steps, and of the held-out ones the first two of each kind."""
    counts: Counter[tuple[object, object]] = Counter()
    kept = []
    for row in map(json.loads, (run_folder / "samples.jsonl").read_text("utf-8").splitlines()):
        which = row["step"], row.get("when")
        counts[which] += 1
        if counts[which] <= 2 and ("when" in row or row["step"] in SAMPLED):
            kept.append(json.dumps(_short(row)) + "\n")
    return "".join(kept)


def keep(run_folder: Path, folder: Path) -> None:
    """Copy of a run's folder what a notebook shows. Raises ValueError for a file that is too
    large."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = json.loads((run_folder / "run.json").read_text("utf-8"))
    (folder / "run.json").write_text(json.dumps(state, indent=1) + "\n", "utf-8")
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text("utf-8").splitlines())
    kept = ({k: _short(v) for k, v in x.items() if k in ("step", *METRICS)} for x in lines)
    metrics = "".join(json.dumps(x) + "\n" for x in kept if len(x) > 1)
    (folder / "metrics.jsonl").write_text(metrics, "utf-8")
    rows = map(json.loads, (run_folder / "ledger.jsonl").read_text("utf-8").splitlines())
    costs = ({k: _short(v) for k, v in x.items()} for x in rows if x["source"] == "measured")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(x) + "\n" for x in costs), "utf-8")
    if folder.name == REPLAYED:
        (folder / "samples.jsonl").write_text(_samples(run_folder), "utf-8")
    if folder.name == TEACHER:
        _keep_model(run_folder / "model", folder / "model")
    for path in folder.iterdir():
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes: at most {LARGEST:,}")


def _keep_model(trained: Path, folder: Path) -> None:
    """A model folder with half the bytes: its weights in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)


def main(names: list[str]) -> None:
    import rlhf_lab as lab

    for name in names or RUNS:
        stage, settings = RUNS[name]
        with tempfile.TemporaryDirectory() as place:
            plan = lab.plan(stage, **{"model": "tiny", "seed": SEED, **settings})
            data = lab.load_data("stories", seed=SEED)
            if stage == "reward":
                data = data.first(int(name.split("_")[1]))
            run = lab.train(plan, data, out=Path(place) / name)
            keep(run.folder, FOLDER / name)
            told = ("gold_reward", "kl", "noise_free_accuracy", "seconds")
            figures = [f"{key} {run.summary[key]:.3g}" for key in told if key in run.summary]
            print(f"{name}:", ", ".join(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
