"""Train what was planned: one stage from a plan to a run's figures.

    run = lab.train(lab.plan("ppo", "tiny"))          # or lab.train("ppo")
    run.show()

A run is a folder that `lab.Run.load` reads without any training code.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from .data.load import Data, load_data
from .data.reward_sources import (
    RewardFunction,
    check_rewards,
    functions_of,
    reward_functions,
    with_rewards,
)
from .data.rows_left import check_rows, digest, room_for_prompt
from .display import by_surface
from .launch.processes import Follower, meet, merged, once, place, sharding, stop_asked
from .launching import Launch, decided, launched
from .models.load import small_models_folder
from .models.structure import not_loaded
from .planning import Plan, TrainerArgs, predicted
from .planning import plan as make_plan
from .runs.run import Run
from .settings import check_packages, unplannable
from .settings_of_model import no_reward_head, small_weights
from .stages import STAGES, resolve
from .widgets.background import Stop, Training, check_idle, open_dashboard

if TYPE_CHECKING:
    from .exercises.book import Function
    from .exercises.specimens import Specimen
    from .ppo.trainer import PPOTrainer
    from .widgets.dashboard import Dashboard


class Options(TypedDict, total=False):
    """What `train` takes in the foreground and in the background."""

    reward_funcs: RewardFunction | Sequence[RewardFunction] | None
    losses: Mapping[str, Function] | None
    specimen: str | int | None
    out: str | Path | None
    overwrite: bool
    resume: bool
    quiet: bool
    should_stop: Callable[[], bool] | None
    accelerate: str | None
    processes: int | None


@overload
def train(
    plan: Plan | str,
    data: Data | str | Path = ...,
    *,
    background: Literal[False] = ...,
    **options: Unpack[Options],
) -> Run: ...
@overload
def train(
    plan: Plan | str,
    data: Data | str | Path = ...,
    *,
    background: Literal[True],
    **options: Unpack[Options],
) -> Training: ...
def train(
    plan: Plan | str,
    data: Data | str | Path = "stories",
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
    losses: Mapping[str, Function] | None = None,
    specimen: str | int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    should_stop: Callable[[], bool] | None = None,
    background: bool = False,
    accelerate: str | None = None,
    processes: int | None = None,
) -> Run | Training:
    """Train what was planned and return the run. `plan` may be a stage's name.

    The run's folder (`out`, else runs/<stage>-<number>) holds settings, metrics, samples, the
    ledger (predicted before, measured while it ran) and the final model. Interrupting (Ctrl-C, the
    notebook's stop button) or a true `should_stop()` ends training and keeps what there is. In a
    notebook a dashboard draws while it trains, and stays as a picture. `background`: train in a
    thread, so that the notebook stays free, and return a `Training` at once: `.stop()`, `.wait()`.
    `reward_funcs`: functions that PPO, RLOO and GRPO learn from, `f(prompts=…, completions=…,
    completion_ids=…) → list of floats` or None, beside the rewards of the plan. `losses`: your
    own solutions of PPO's exercises, such as `{"gae": my_gae}`, to train with. `specimen`: what is
    to be wrong with the run, a name or case of `lab.specimens()`; run.json says it. Raises
    ValueError before anything is written when settings, data or losses do not fit the stage.

    `accelerate`: train in several `processes` (all GPUs; two on a CPU) by a config of `launched`,
    such as "ddp" or "auto". They get the plan, the data and the functions by pickle.

    `resume`: training goes on from the last checkpoint of the run in `out`, to the same figures as
    if it had never stopped; the plan must be the one that it was started with. A finished run is
    returned as it is; where there is none yet (a line says so), or no checkpoint, training begins.
    """
    if isinstance(plan, str):
        plan = make_plan(plan)
    sick = find_specimen(specimen)
    plan = sick.plan(plan) if sick is not None else plan
    check_first(plan, out=out, overwrite=overwrite, resume=resume, reward_funcs=reward_funcs)
    own = own_losses(plan.stage, losses)
    check_idle()
    if accelerate is not None:
        given: dict[str, Any] = {"reward_funcs": reward_funcs, "losses": losses, "quiet": quiet}
        given |= {"out": out or free_folder(plan.stage), "overwrite": overwrite, "resume": resume}
        if sick is not None:
            raise ValueError(f"specimen={specimen!r} trains in one process: leave accelerate out")
        if background or should_stop:
            raise ValueError("accelerate= trains in the foreground, and an interrupt stops it")
        _refuse_local(reward_funcs, *(losses or {}).values())
        return _in_processes(launched(plan, accelerate, processes), plan, data, given)
    where: dict[str, Any] = {"out": out, "overwrite": overwrite, "resume": resume, "quiet": quiet}
    work = partial(prepared, plan, data, reward_funcs, own, sick, **where)
    return begin(plan, work, quiet, should_stop, background)


def begin(
    plan: Plan,
    prepare: Callable[[], Run | Callable[..., Run]],
    quiet: bool,
    should_stop: Callable[[], bool] | None,
    background: bool,
) -> Run | Training:
    """Train what `prepare` gives, under a dashboard, here or in a thread."""
    wanted = should_stop or (lambda: False)
    # A process among others ends with them, after a step: nothing interrupts it alone.
    stop = Stop(lambda: stop_asked() or wanted(), interrupts=place()[1] == 1)
    # First of all: importing the trainers takes seconds.
    dashboard = open_dashboard(plan, quiet, stop if background else None)
    try:
        work = prepare()
        if isinstance(work, Run):
            return work
        if background:
            started, dashboard = Training(work, stop, dashboard), None
            return started
        return work(should_stop=stop, dashboard=dashboard)
    finally:
        if dashboard is not None:
            dashboard.end()


def _refuse_local(functions: object, *more: object) -> None:
    """Raises ValueError for a function of a notebook's cells, which other processes cannot have."""
    for function in [*(functions if isinstance(functions, Sequence) else [functions]), *more]:
        if getattr(function, "__module__", None) == "__main__":
            raise ValueError(f"{name_of(function)} is of this notebook: put it into a module")


def _in_processes(made: Launch, plan: Plan, data: object, given: Mapping[str, Any]) -> Run:
    """Train in processes that are started for it; → the run. Raises RuntimeError where they fail,
    after their messages."""
    from .launch.launcher import INTERRUPTED, Hosts, launch

    if made.warning and not given["quiet"]:
        print(f"{plan.stage}: {made.warning}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job")
        job.write_bytes(pickle.dumps((plan, data, given)))
        hosts = Hosts(made.processes, made.nodes, made.rank, made.address, made.sharding)
        code = launch(made.config, ["--job", str(job)], hosts, given["quiet"])
    if code not in (0, INTERRUPTED):
        raise RuntimeError(f"training in {made.processes} processes failed: its line is above")
    return Run.load(given["out"])


def run_job(file: str) -> int:
    """A process' part of `train(accelerate=…)`. → exit code"""
    plan, data, given = pickle.loads(Path(file).read_bytes())
    given["quiet"] = given["quiet"] or place()[0] > 0
    train(plan, data, **given)
    return 0


def prepared(
    plan: Plan,
    data: Data | str | Path,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None,
    losses: Mapping[str, Function],
    sick: Specimen | None,
    out: str | Path | None,
    overwrite: bool,
    resume: bool,
    quiet: bool,
    clone: Mapping[str, object] | None = None,
    inherit: Callable[[Run], object] | None = None,
) -> Run | Callable[..., Run]:
    """All that can be refused without loading a model; → what is left to do, or the run that is
    finished already. `inherit` brings a `clone` what it goes on from."""
    rank, processes = place()
    if processes > 1 and not out:
        raise ValueError("several processes train in a folder that all of them know (out)")
    data = load_data(data)
    plan = with_rewards(plan, reward_funcs)
    folder = Path(out) if out else free_folder(plan.stage)
    plan = decided(plan, data, folder if resume else None)
    args = plan.config(str(folder / "trainer"))
    functions = check(plan, data, args, reward_funcs)
    settings = dict(plan.settings)
    if "teacher" in STAGES[plan.stage].roles:
        settings["teacher_model"] = plan.model.paths["teacher"]
    bundled = f"{small_models_folder()}/"  # which is elsewhere on another machine
    others = {k: p.removeprefix(bundled) for k, p in plan.model.replaced.items() if k != "teacher"}
    recorded = {
        "stage": plan.stage,
        "model": plan.model.name,
        "settings": settings,
        "data": data.name,
        "rows": digest(plan.stage, data),
        "seed": plan.settings.get("seed", 42),
        "processes": processes,
        "losses": {name: name_of(function) for name, function in losses.items()} or None,
        "specimen": sick and sick.name,
        "models": others or None,
        "reward_funcs": [name_of(f) for f in functions_of(reward_funcs)] or None,
    }
    # None: there is none; "": it was killed before its first checkpoint, and begins anew.
    there = once(lambda: _what_is_there(folder, recorded)) if resume else None
    if there == "finished":
        return Run(folder)
    if resume and there is None and not rank and not quiet:
        print(f"{plan.stage}: nothing to resume in {folder}: starting anew", flush=True)

    def open_run() -> Run:
        if rank:  # the first process writes, the others only train
            return Follower(folder)
        if there:
            (run := Run(folder)).claim()
            return run
        run = Run.create(
            folder,
            hardware=plan.hardware_name,
            overwrite=overwrite or there == "",
            keep=["teacher"] if there == "" else [],
            sources=plan.sources,
            clone=clone,
            **recorded,
        )
        if inherit:
            inherit(run)
        return run

    what = plan, data, args, functions, open_run
    how: dict[str, Any] = {"quiet": quiet, "resume": bool(there or inherit), "losses": losses}
    return partial(run_plan, *what, **how, trainer=sick.trainer if sick is not None else None)


def _what_is_there(folder: Path, recorded: Mapping[str, Any]) -> str | None:
    """The status of a run to go on with; "" where it has no checkpoint, None where there is no run.
    Raises ValueError for one that was started otherwise."""
    run = Run.reopen(folder, **recorded)
    if run is None:
        return None
    return run.status if run.checkpoints or run.status == "finished" else ""


def own_losses(stage: str, given: Mapping[str, Function] | None) -> dict[str, Function]:
    """A student's functions by the names that the trainer has for them. Raises ValueError."""
    if not given:
        return {}
    from .exercises import own_losses

    return own_losses(stage, given)


def find_specimen(name: str | int | None) -> Specimen | None:
    """Raises ValueError for a name that there is not."""
    if name is None:
        return None
    from .exercises.specimens import find

    return find(name)


def name_of(function: Function) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


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
    meet(float(plan.settings.get("ddp_timeout", 1800)))
    _ = plan.trainer_settings
    paths, kinds = plan.model.paths, ("base", "reward", "value", "teacher")
    configs = (plan.model.config_dict(kind) for kind in kinds if paths.get(kind))
    lines = [unplannable(plan.stage, plan.settings), *map(not_loaded, configs)]
    lines += [no_reward_head(plan.model)] * (plan.stage == "reward")
    if line := next(filter(None, lines), ""):
        raise ValueError(line)
    check_packages(plan.settings)
    _check_reporters(plan.settings.get("report_to"))
    if plan.settings.get("torch_compile") is True:
        from .models.device import cannot_compile

        if why := cannot_compile():
            raise ValueError(f"torch_compile: {why}")
    if resume:
        _check_resume(out, overwrite)
    elif out and not place()[0]:  # of several processes the first one writes
        Run(out).check_room(overwrite)
    weights = small_weights(plan.stage, plan.model, plan.settings)
    if not weights.items() <= plan.settings.items():  # its model was put in another's place
        raise ValueError(f"{plan.model.name} is in fewer bits, of which its plan does not know")
    check_rewards(with_rewards(plan, reward_funcs), reward_funcs)
    if "teacher" in STAGES[plan.stage].roles:
        _ = plan.model.teacher


def check(
    plan: Plan,
    data: Data,
    args: TrainerArgs,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
) -> list[RewardFunction]:
    """Refuse what cannot work before anything is loaded. `args`: the plan's `config()`. → the
    functions to learn from. Raises ValueError, one line."""
    if args.fp16 and args.use_cpu:
        raise ValueError("fp16 needs a GPU: leave it out")
    check_rows(plan.stage, data)
    room_for_prompt(plan.model, plan.settings)
    return reward_functions(plan, data, reward_funcs)


def _check_reporters(given: str | Sequence[str] | None) -> None:
    """Refuse a tracker that is not installed."""
    names = {given} if isinstance(given, str) else {*(given or ())}
    if not (names := names - {"none", "all"}):
        return
    from transformers.integrations import integration_utils

    here = integration_utils.get_available_reporting_integrations()
    for name in sorted(names):
        if name not in here:
            raise ValueError(
                f"report_to={name!r} is not installed: pip install {name}, or leave it out"
            )


def _check_resume(out: str | Path | None, overwrite: bool) -> None:
    resume, folder = by_surface("resume", "--resume"), by_surface("out", "--out")
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
    losses: Mapping[str, Function],
    trainer: type[PPOTrainer] | None = None,
    dashboard: Dashboard | None = None,
) -> Run:
    """Train what was planned, with all that surrounds it; → the run that `open_run` makes, once
    everything is loaded. `args`: the trainer's settings; `trainer`: in place of PPO's own;
    `dashboard`: shows the run."""
    from .launch.launcher import prepare_process
    from .metering.meter import Meter
    from .trainers.diverged import check_finite
    from .trainers.job import Job
    from .trainers.prepare import prepare

    prepare_process()
    say = dashboard.say if dashboard is not None else lambda text: None
    say("loading models and data")
    for line in filter(None, (*plan.warnings, plan.defaults_note)):
        if not quiet:
            print(f"{plan.stage}: {line}", flush=True)
    ready = prepare(plan, data, args, quiet)
    how = {"gpus": place()[1], "sharding": sharding()} if place()[1] > 1 else {}
    prediction = predicted(replace(plan, settings={**plan.settings, **how}), data, quiet)
    run, meter = open_run(), Meter(plan.stage)
    quiet = quiet or not run.writes  # of several processes the first one speaks
    job = Job(
        *(plan, data, run, meter, ready, args, quiet, should_stop, functions),
        losses=losses,
        trainer=trainer,
        resume=resume,
        dashboard=dashboard if run.writes else None,
    )
    try:
        if job.dashboard is not None:
            job.dashboard.open(run, lambda: prediction + meter.ledger())
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
    run.save_ledger(prediction + merged(meter.ledger()))
    run.finish("stopped" if job.stopped else "finished", **figures)
    if job.stopped and not quiet and (line := by_surface(run.what_is_left(), "")):
        print(f"{plan.stage}: {line}", flush=True)  # the command line says it last
    if not job.stopped and run.writes and args.save_total_limit:  # checkpoints have served
        shutil.rmtree(run.folder / "trainer", ignore_errors=True)
    return run
