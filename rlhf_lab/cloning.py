"""A PPO run started again from one of its checkpoints, with something changed.

run = lab.train(lab.plan("ppo", "tiny", save_total_limit=None))  # keeps its checkpoints
other = lab.clone(run, step=20, kl_coef=0.05)
lab.curves(run, other)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .data.load import Data, load_data
from .data.reward_sources import RewardFunction, functions_of
from .data.tokenize import prompt_text
from .models.load import load, small_models_folder
from .planning import Plan
from .planning import plan as make_plan
from .runs.json_files import json_lines, replace_file
from .runs.run import Run
from .settings import LORA
from .training import begin, check_first, find_specimen, name_of, own_losses, prepared
from .widgets.background import Training, check_idle

if TYPE_CHECKING:
    from .exercises.book import Function
    from .stages import Setting

FIXED = {*LORA, "critic_lora_r", "critic_lora_targets", "layout", "value_model", "optim"}
FIXED |= {"optim_args", "load_in_4bit", "use_bnb_nested_quant"}
"""What the weights and the optimizer's state in a checkpoint are made for."""


def clone(
    run: Run | str | Path,
    step: int | None = None,
    *,
    data: Data | str | Path = "stories",
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
    losses: Mapping[str, Function] | None = None,
    specimen: str | int | None = "same",
    out: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    should_stop: Callable[[], bool] | None = None,
    background: bool = False,
    **changed: Setting,
) -> Run | Training:
    """Go on from a checkpoint of a PPO run, live or on disk, with settings `changed`; → a run, or
    a `Training` in the `background`. The run is only read.

    `step`: an iteration that has a checkpoint [the newest before the last]; 0: from the start,
    which needs none. What was logged up to there is copied, so that `lab.curves(run, clone)` shows
    both whole; costs are those from the first iteration on. With nothing changed the figures are
    the run's own to the last bit, on a CPU with as many threads.

    May change: `reward_model` and every setting but `FIXED` (from step 0 these too); the rate
    follows the new schedule from the place that was reached. May not: model, data. The run's
    `reward_funcs` and `losses` must be given again ([], {}: without). `specimen=None` takes out
    what was wrong on purpose, but for its settings. The rest is as in `lab.train`. Raises
    ValueError, one line, before anything is written.
    """
    parent = run if isinstance(run, Run) else Run.load(run)
    config, given = parent.config, {"reward_funcs": reward_funcs, "losses": losses}
    for name, functions in given.items():
        if functions is None and config.get(name):
            raise ValueError(f"{parent.name} was trained with {name} of yours: give them again")
    plan, what = _plan(parent, changed), dict(changed)
    sick = find_specimen(config.get("specimen") if specimen == "same" else specimen)
    if (sick and sick.name) != config.get("specimen"):
        plan, what["specimen"] = sick.plan(plan) if sick else plan, sick and sick.name
    if (names := [name_of(f) for f in functions_of(reward_funcs)]) != config.get(
        "reward_funcs", []
    ):
        what["reward_funcs"] = names
    if out and Path(out).resolve() == parent.folder.resolve():
        raise ValueError(f"{out} is the run itself: a clone has a folder of its own")
    check_first(plan, out=out, overwrite=overwrite, reward_funcs=reward_funcs)
    step = _step(parent, step, int(plan.settings.get("max_steps", -1)), what)
    check_idle()
    if (data := load_data(data)).name != config.get("data"):
        raise ValueError(f"{parent.name} learned from {config.get('data')}: not {data.name}")
    _check_rows(parent, data)
    held = TemporaryDirectory()  # a live run deletes its old checkpoints
    try:
        if step:
            name = f"checkpoint-{step}"
            shutil.copytree(parent.folder / "trainer" / name, Path(held.name, name))
        work = partial(
            prepared,
            *(plan, data, reward_funcs, own_losses("ppo", losses), sick),
            out=out,
            overwrite=overwrite,
            resume=False,
            quiet=quiet,
            clone={"run": str(parent.folder), "step": step, "changed": what},
            inherit=partial(_inherit, parent, held, what) if step else None,
        )
        return begin(plan, work, quiet, should_stop, background)
    except BaseException:
        held.cleanup()
        raise


def _plan(parent: Run, changed: Mapping[str, Setting]) -> Plan:
    """The plan of a run, with settings changed. Raises ValueError."""
    config = parent.config
    if parent.stage != "ppo" or config.get("processes", 1) > 1:
        raise ValueError(f"{parent.name} cannot be cloned: PPO runs of one process can")
    if fixed := {"stage", "model", "hardware"} & changed.keys():
        raise ValueError(f"a clone is of the same model, and trains here: leave {min(fixed)} out")
    model, settings = load(config["model"]), {**config["settings"], **changed}
    for kind, path in config.get("models", {}).items():
        bundled = small_models_folder() / path
        model = model.with_stage(kind, bundled if bundled.is_dir() else path)
    if "rewards" in changed:
        settings.pop("rule_reward", None)
    return make_plan("ppo", model, **settings)


def _check_rows(parent: Run, data: Data) -> None:
    """Raises ValueError for data of the same name without the prompts that the run recorded."""
    there, learned = set(map(prompt_text, data.prompts.train)), parent.samples
    if other := [r["prompt"] for r in learned if "when" not in r and r["prompt"] not in there]:
        what = f"{parent.name} learned from other rows than this {data.name} has"
        raise ValueError(f"{what}: among them {other[0]!r:.60}")


def _step(parent: Run, step: int | None, last: int, changed: Collection[str]) -> int:
    """The iteration to start from. Raises ValueError where it cannot be."""
    every = [int(path.name.split("-")[1]) for path in parent.checkpoints]
    there = [n for n in every if n < last or last < 0] + [0]
    step = step if step is not None else there[0] or -1
    if step not in there:
        what = f"{parent.name} has no checkpoint to go on from" + f" at step {step}" * (step >= 0)
        which = ", ".join(map(str, there[::-1]))
        how = "a finished run has those that save_total_limit=None kept"
        if step in every:
            what = f"max_steps={last} leaves nothing to train after step {step} of {parent.name}"
            how = "or give more max_steps"
        raise ValueError(f"{what}: choose from {which} ({how})")
    if step and (fixed := FIXED & set(changed)):
        raise ValueError(f"{min(fixed)} is that of the checkpoint: to change it, clone from step 0")
    return step


def _inherit(
    parent: Run, held: TemporaryDirectory[str], changed: Collection[str], mine: Run
) -> None:
    """Copy what a run had logged and saved; the trainer cuts it at the checkpoint. Responses from
    before training are scored anew where rewards are others."""
    from .ppo.checkpoint import OF_REWARD

    kept = parent.samples
    if OF_REWARD & set(changed):
        kept = [row for row in kept if "when" not in row]
    elif (rows := parent.folder / "evaluation.jsonl").exists():
        shutil.copy(rows, mine.folder)
    replace_file(mine.folder / "samples.jsonl", json_lines(kept))
    shutil.copy(parent.folder / "metrics.jsonl", mine.folder)
    shutil.copytree(held.name, mine.folder / "trainer")
    held.cleanup()
