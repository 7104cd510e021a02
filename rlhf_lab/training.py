"""Train what was planned: one stage from a plan to a run's figures.

    run = lab.train(lab.plan("ppo", "tiny"))          # or lab.train("ppo")
    run.show()

A run is a folder that `lab.Run.load` reads without any training code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from .data.load import Data, load_data
from .data.reward_sources import (
    RewardFunction,
    check_rewards,
    reward_functions,
    with_rewards,
)
from .display import by_surface, did_you_mean
from .launch.launcher import Follower, place
from .planning import Plan, TrainerArgs, predicted, unplannable
from .planning import plan as make_plan
from .runs.run import Run
from .stages import STAGES, resolve
from .widgets.background import Stop, Training, check_idle, open_dashboard

if TYPE_CHECKING:
    from .widgets.dashboard import Dashboard


@overload
def train(
    plan: Plan | str,
    data: Data | str | Path = ...,
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = ...,
    out: str | Path | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    quiet: bool = ...,
    should_stop: Callable[[], bool] | None = ...,
    background: Literal[False] = ...,
) -> Run: ...
@overload
def train(
    plan: Plan | str,
    data: Data | str | Path = ...,
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = ...,
    out: str | Path | None = ...,
    overwrite: bool = ...,
    resume: bool = ...,
    quiet: bool = ...,
    should_stop: Callable[[], bool] | None = ...,
    background: Literal[True],
) -> Training: ...
def train(
    plan: Plan | str,
    data: Data | str | Path = "stories",
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    should_stop: Callable[[], bool] | None = None,
    background: bool = False,
) -> Run | Training:
    """Train what was planned and return the run. `plan` may be a stage's name.

    The run's folder (`out`, else runs/<stage>-<number>) holds settings, metrics, samples, the
    ledger (predicted before, measured while it ran) and the final model. Interrupting (Ctrl-C, the
    notebook's stop button) or a true `should_stop()` ends training and keeps what there is. In a
    notebook a dashboard draws while it trains, and stays as a picture. `background`: train in a
    thread, so that the notebook stays free, and return a `Training` at once: `.stop()`, `.wait()`.
    `reward_funcs`: functions that PPO, RLOO and GRPO learn from, `f(prompts=…, completions=…,
    completion_ids=…) → list of floats` or None, beside the rewards of the plan. Raises
    ValueError before anything is written when the settings or the data do not fit the stage.

    `resume`: PPO goes on from the last checkpoint of the run in `out`, to the same figures as if it
    had never stopped; the plan must be the one that it was started with. A finished run is
    returned as it is; where there is none yet, training begins.
    """
    if isinstance(plan, str):
        plan = make_plan(plan)
    check_first(plan, out=out, overwrite=overwrite, resume=resume, reward_funcs=reward_funcs)
    check_idle()
    stop = Stop(should_stop)
    # First of all: importing the trainers takes seconds.
    dashboard = open_dashboard(plan, quiet, stop if background else None)
    try:
        work = _prepared(plan, data, reward_funcs, out, overwrite, resume, quiet)
        if isinstance(work, Run):
            return work
        if background:
            started, dashboard = Training(work, stop, dashboard), None
            return started
        return work(should_stop=stop, dashboard=dashboard)
    finally:
        if dashboard is not None:
            dashboard.end()


def _prepared(
    plan: Plan,
    data: Data | str | Path,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None,
    out: str | Path | None,
    overwrite: bool,
    resume: bool,
    quiet: bool,
) -> Run | Callable[..., Run]:
    """All that can be refused without loading a model; → what is left to do, or the run that is
    finished already."""
    rank, processes = place()
    if processes > 1 and not (STAGES[plan.stage].distributed and out):
        raise ValueError("several processes train PPO, in a folder that all of them know (out)")
    data = load_data(data)
    plan = with_rewards(plan, reward_funcs)
    folder = Path(out) if out else free_folder(plan.stage)
    args = plan.config(str(folder / "trainer"))
    functions = check(plan, data, args, reward_funcs)
    recorded = {
        "stage": plan.stage,
        "model": plan.model.name,
        "settings": dict(plan.settings),
        "data": data.name,
        "seed": plan.settings.get("seed", 42),
    }
    old = Run.reopen(folder, **recorded) if resume else None
    if old is not None and old.status == "finished":
        return old

    def open_run() -> Run:
        if rank:  # the first process writes, the others only train
            return Follower(folder)
        if old is not None:
            old.claim()
        return old or Run.create(
            folder,
            hardware=plan.hardware_name,
            overwrite=overwrite,
            sources=plan.sources,
            **recorded,
        )

    return partial(run_plan, plan, data, args, functions, open_run, quiet=quiet, resume=bool(old))


def check_first(
    plan: Plan,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
) -> None:
    """What can be refused at once: before data are read, and before anything slow is imported.

    Raises ValueError for settings and rewards, OSError for a folder that cannot be written.
    """
    _ = plan.trainer_settings
    if line := unplannable(plan.settings):
        raise ValueError(line)
    if resume:
        _check_resume(plan.stage, out, overwrite)
    elif out and not place()[0]:  # of several processes the first one writes
        Run(out).check_room(overwrite)
    check_rewards(with_rewards(plan, reward_funcs), reward_funcs)


def check(
    plan: Plan,
    data: Data,
    args: TrainerArgs,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
) -> list[RewardFunction]:
    """Refuse what cannot work before anything is loaded. `args`: the plan's `config()`. → the
    functions to learn from. Raises ValueError, one line."""
    from .trainers.prepare import room_for_prompt

    _check_reporters(args.report_to)
    if args.fp16 and args.use_cpu:
        raise ValueError("fp16 needs a GPU: leave it out")
    spec = STAGES[plan.stage]
    if not getattr(data, spec.rows).train:
        what = " and ".join(spec.columns) or "prompt"
        raise ValueError(f"{data.name} has nothing to train {plan.stage} on: no {what} fields")
    room_for_prompt(plan, args)
    return reward_functions(plan, data, reward_funcs)


def _check_reporters(names: Sequence[str]) -> None:
    """Refuse a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations import integration_utils as trackers

    known, here = trackers.INTEGRATION_TO_CALLBACK, trackers.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"report_to={name!r}: {hint}transformers has {', '.join(known)}")
        if name not in here:
            raise ValueError(
                f"report_to={name!r} is not installed: pip install {name}, or leave it out"
            )


def _check_resume(stage: str, out: str | Path | None, overwrite: bool) -> None:
    resume, folder = by_surface("resume", "--resume"), by_surface("out", "--out")
    if not STAGES[stage].resumable:
        raise ValueError(f"only PPO can be resumed, not {stage}: leave {resume} out")
    if not out:
        raise ValueError(f"{resume} needs the run's folder: say which ({folder})")
    if overwrite:
        other = by_surface("overwrite", "--overwrite")
        raise ValueError(f"{resume} goes on with a run, {other} replaces it: say one of them")


def free_folder(stage: str) -> Path:
    """The first of runs/STAGE-1, runs/STAGE-2, … that is not there yet."""
    number = 1
    while (folder := Path("runs") / f"{stage}-{number}").exists():
        number += 1
    return folder


def run_plan(
    plan: Plan,
    data: Data,
    args: TrainerArgs,
    functions: Sequence[RewardFunction],
    open_run: Callable[[], Run],
    *,
    quiet: bool,
    should_stop: Callable[[], bool] | None,
    resume: bool,
    dashboard: Dashboard | None = None,
) -> Run:
    """Train what was planned, with all that surrounds it; → the run that `open_run` makes, once
    everything is loaded. `args`: the trainer's settings; `dashboard`: shows the run."""
    from .launch.launcher import prepare_process
    from .metering.meter import Meter
    from .trainers.diverged import check_finite
    from .trainers.job import Job
    from .trainers.prepare import prepare

    prepare_process()
    say = dashboard.say if dashboard is not None else lambda text: None
    say("loading models and data")
    if plan.defaults_note and not quiet:
        print(f"{plan.stage}: {plan.defaults_note}", flush=True)
    ready = prepare(plan, data, args, quiet)
    prediction = predicted(plan, data, quiet)
    run, meter = open_run(), Meter(plan.stage)
    quiet = quiet or not run.writes  # of several processes the first one speaks
    shown = dashboard if run.writes else None
    job = Job(
        plan, data, run, meter, ready, args, quiet, should_stop, functions, resume, dashboard=shown
    )
    try:
        if job.dashboard is not None:
            job.dashboard.open(run, lambda: prediction + meter.ledger())
            say("evaluating the model before training")
        figures = resolve(STAGES[plan.stage].train)(job)
        check_finite(plan.stage, args, figures)
    except KeyboardInterrupt:  # before the loop, or after it
        meter.close()
        job.stopped, figures = True, {}
    except BaseException as error:
        meter.close()  # what was being counted would be counted on and on
        run.save_ledger(prediction + meter.ledger())
        run.finish("failed", error=f"{type(error).__name__}: {error}")
        raise
    run.save_ledger(prediction + meter.ledger())
    run.finish("stopped" if job.stopped else "finished", **figures)
    if job.stopped and not quiet and (line := by_surface(run.what_is_left(), "")):
        print(f"{plan.stage}: {line}", flush=True)  # the command line says it last
    if not job.stopped and run.writes:  # the model is there: its checkpoints have served
        shutil.rmtree(run.folder / "trainer", ignore_errors=True)
    return run
