"""The 7B recipes: `python .ci/recipes.py [--check]` writes recipes/*.yaml and the tables of
docs/recipes.md from `.ci/recipes.yaml`, with the planner's figures.

A recipe is a file for TRL's command line that `rlhf-lab train STAGE --config FILE` reads too. With
--check nothing is written: exit status 1 says that a file is out of step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from written_file import ROOT, with_blocks, write_or_check

sys.path.insert(0, str(ROOT))

import rlhf_lab as lab  # noqa: E402
from rlhf_lab.display import format_bytes  # noqa: E402
from rlhf_lab.stages import ONLINE, STAGES  # noqa: E402

PAGE = ROOT / "docs" / "recipes.md"
TABLE = yaml.safe_load(Path(__file__).with_name("recipes.yaml").read_text("utf-8"))


def planned(stage: str, kind: str) -> lab.Plan:
    of = TABLE["stages"][stage]
    settings = TABLE["all"] | TABLE["kinds"][kind] | of["all"] | of[kind]
    return lab.plan(stage, of["model"], hardware=TABLE["hardware"], **settings)


def reward_of(stage: str, kind: str) -> str | None:
    """Where the reward recipe of the same kind has put what an online stage learns from."""
    if stage not in ONLINE:
        return None
    adapter = stage == "ppo" and kind != "full"
    return f"runs/reward-{kind}/{'adapter' if adapter else 'model'}"


def figures(plan: lab.Plan) -> dict[str, str]:
    e = plan.estimate
    return {
        "memory of a GPU": f"{format_bytes(e.peak)} of {format_bytes(e.hardware.memory)}",
        "steps": f"{e.steps:,}",
        "time of one": f"{e.step_seconds:.2g} s"
        if e.step_seconds < 10
        else f"{e.step_seconds:.0f} s",
        "hours": f"{e.hours:.1f}",
        "list price": f"${e.money:,.0f}",
    }


def recipe(stage: str, kind: str) -> str:
    """A recipe's file."""
    of, plan = TABLE["stages"][stage], planned(stage, kind)
    gpus = plan.settings.get("gpus", 1)
    script = {"dataset_name": of["data"], "dataset_train_split": of.get("split")}
    script |= {"reward_model_name_or_path": reward_of(stage, kind)}
    script |= {"accelerate_config": plan.settings.get("sharding", "single_gpu")}
    script |= {"num_processes": gpus}
    said = ", ".join(f"{name} {value}" for name, value in figures(plan).items())
    what = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[kind]
    where = f"{gpus} {plan.estimate.hardware.name}"
    head = [
        f"# {STAGES[stage].title}, {what}, {where}. Predicted: {said}.",
        f"# rlhf-lab train {stage} --config recipes/{stage}-{kind}.yaml --out runs/{stage}-{kind}",
    ]
    ours, *rest = plan.trl_config().splitlines()
    written = yaml.safe_dump({k: v for k, v in script.items() if v is not None}, sort_keys=False)
    return "\n".join([*head, ours, *rest, written])


def rows() -> list[dict[str, str]]:
    return [
        {"recipe": f"[{stage}-{kind}](../recipes/{stage}-{kind}.yaml)"}
        | {"GPUs": str(plan.settings.get("gpus", 1))}
        | figures(plan)
        for stage in TABLE["stages"]
        for kind in TABLE["kinds"]
        for plan in (planned(stage, kind),)
    ]


def markdown(lines: list[dict[str, str]]) -> str:
    head = list(lines[0])
    shown = [head, ["---"] * len(head), *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


def data_rows() -> list[dict[str, str]]:
    return [
        {
            "stage": stage,
            "model": f"`{of['model']}`",
            "data": f"`{of['data']}`",
            "split": of.get("split", "train"),
        }
        for stage, of in TABLE["stages"].items()
    ]


if __name__ == "__main__":
    files = {
        ROOT / "recipes" / f"{stage}-{kind}.yaml": recipe(stage, kind)
        for stage in TABLE["stages"]
        for kind in TABLE["kinds"]
    }
    tables = {"recipes": markdown(rows()), "data": markdown(data_rows())}
    sys.exit(write_or_check({**files, PAGE: with_blocks(PAGE.read_text("utf-8"), tables)}))
