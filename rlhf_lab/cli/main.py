"""The command line: `rlhf-lab train`, `launch`, `best-of-n`, `plan`, `xray`, `measure`,
`quantize`, `serve`, `bench`, `export`, `data`, `list`, `report`, `notebooks`, `test-notebooks`,
`doctor`.

Exit codes: 0 done, 2 the user's mistake (one line says what, where and what to do), 1 ours.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __all__, __version__
from ..display import ON_COMMAND_LINE, did_you_mean, method_or_near, table
from ..stages import REWARDED, STAGES, TRAINABLE
from . import cost, deploy, launching, listing, notebooks
from .cost import Commands, Settings, add_repeated, positive

if TYPE_CHECKING:
    from ..data.load import Data
    from ..models.load import Model
    from ..runs.run import Run


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line. Flags are written out: shortened ones would
    reach the processes that a launch starts."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **how})

    def error(self, message: str) -> NoReturn:
        missing = message.partition("arguments are required: ")[2].split(", ")
        wrong = re.match(r"argument (.*): invalid choice: '(.*?)'", message)
        for action in self._actions:
            if action.dest in missing and action.choices:
                message += f"; {action.dest} is one of {', '.join(map(str, action.choices))}"
            names = "/".join(action.option_strings), action.metavar, action.dest
            if wrong and action.choices and wrong[1] in names:
                message += f"; {method_or_near(wrong[2], action.choices)}".rstrip("; ")
        if wrong and wrong[1] == "COMMAND":
            name = wrong[2].replace("-", "_")
            near = [] if "did you mean" in message else get_close_matches(name, __all__, 1)
            if name := name if name in __all__ else "".join(near):
                message = (
                    f"{wrong[2]} has no command: in Python, import rlhf_lab as lab; lab.{name}(…)"
                )
        self.exit(2, f"rlhf-lab: {' '.join(message.split())} (see {self.prog} --help)\n")

    def refuse(self, unknown: str, stage: str = "") -> NoReturn:
        """An argument that nobody knows. `stage`: whose settings are given with --set."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        name, _, value = unknown.replace("=", " ", 1).partition(" ")
        hint = "a model is given with --model" if {"--model", "--set"} <= {*flags} else ""
        if unknown.startswith("-"):
            hint = did_you_mean(name, flags)
        if (setting := name.lstrip("-").replace("-", "_")) in _settings_of(stage):
            hint = f"it is a setting: --set {setting}={value.partition(' ')[0] or 'VALUE'}"
        self.error(f"unrecognized arguments: {unknown}" + f"; {hint.strip()}" * bool(hint))


def _settings_of(stage: str) -> frozenset[str]:
    """Names that --set takes; none where the command has no stage."""
    from ..settings import known_settings

    names = STAGES if stage in ("all", "project") else [stage] if stage in STAGES else []
    return frozenset[str]().union(*map(known_settings, names))


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="rlhf-lab",
        description="What RLHF does and what it costs, on a model small enough to train here.",
    )
    parser.add_argument("--version", action="version", version=f"rlhf-lab {__version__}")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of `train(accelerate=…)`
    parser.set_defaults(parser=parser, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_train(commands)
    _add_best_of_n(commands)
    data = commands.add_parser(
        "data",
        help="what a file or data set holds, before you train on it",
        description="Show what a file or data set holds: its shape, rows, token lengths, drops.",
    )
    data.add_argument("source", help="a file, a folder saved by datasets, or a hub id")
    _add_model_and_data(data)
    data.add_argument("--max-length", type=positive, default=512, help="tokens of a row [512]")
    cost.add_commands(commands)
    deploy.add_commands(commands)
    commands.add_parser(
        "doctor",
        help="check this machine: what works, what to fix",
        description="Check this machine: what works, what to fix, and how.",
    )
    listing.add_command(commands)
    notebooks.add_commands(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train one stage, or four in a row",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train one stage, or four in a row (all: SFT, reward model, PPO, DPO).",
        epilog="examples:\n"
        "  rlhf-lab train all                          the bundled model and world, minutes\n"
        "  rlhf-lab train ppo --steps 20 --seed 1      a short PPO run\n"
        "  rlhf-lab train grpo --set num_generations=8 without a critic; or rloo\n"
        "  rlhf-lab train ppo --reward gold            the gold reward instead of the model's\n"
        "  rlhf-lab train all --data mine.json         your own instructions and preferences\n"
        "  rlhf-lab train dpo --data p.csv --field chosen=better --field rejected=worse\n"
        "  rlhf-lab train dpo --set beta=0.5           any field of the stage's settings",
    )
    _add_training(train, [*TRAINABLE, "all"])
    _add_training(launching.add_command(commands), TRAINABLE)


def _add_training(train: argparse.ArgumentParser, stages: Sequence[str]) -> None:
    """The arguments of a training."""
    train.add_argument("stage", choices=stages)
    what = "a file for TRL's command line (YAML); flags win over what it says"
    train.add_argument("--config", metavar="FILE", help=what)
    _add_model_and_data(train)
    train.add_argument("--out", type=Path, help="folder of the run [runs/<stage>-<number>]")
    train.add_argument("--steps", type=positive, help="optimizer steps (PPO: iterations) a stage")
    train.add_argument("--seed", type=int, help="seed of data and training [0]")
    titles = ", ".join(STAGES[name].title for name in REWARDED)
    train.add_argument("--reward-model", help=f"{titles}: folder of the reward model")
    train.add_argument(
        "--teacher-model", help="distill: a name, or the model folder of a run [small]"
    )
    rewards = "learn from this: model, gold, gold/<part>; may be repeated [model]"
    add_repeated(train, "--reward", "NAME", rewards)
    add_repeated(train, "--set", "NAME=VALUE", "a setting of the stage's trainer; may be repeated")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    resume = "continue from the last checkpoint in --out"
    train.add_argument("--resume", action="store_true", help=resume)
    clone = "PPO: go on from a checkpoint of this run with other settings, in a folder of its own"
    train.add_argument("--clone", metavar="RUN[@STEP]", help=clone)
    launching.add_arguments(train)
    train.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_best_of_n(commands: Commands) -> None:
    best = commands.add_parser(
        "best-of-n",
        help="the baseline without training: the best of n responses",
        description="Draw n responses to each held-out prompt, keep the reward model's favourite.",
    )
    _add_model_and_data(best)
    what = "sizes to compare [1 2 4 8 16]"
    best.add_argument(
        "-n", type=positive, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help=what
    )
    best.add_argument("--prompts", type=positive, default=256, help="held-out prompts [256]")
    best.add_argument("--response-length", type=positive, default=64, help="most tokens [64]")
    best.add_argument("--reward-model", help="folder of the reward model [the model's own]")
    best.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that name the model and the rows."""
    parser.add_argument("--model", default="tiny", help="bundled name, folder or hub id [tiny]")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    if parser.prog.endswith(("train", "launch", "best-of-n")):
        what = "'stories', a file, or a hub id [stories]"
        parser.add_argument("--data", default="stories", dest="source", help=what)
    cost.add_columns(parser)
    rows = "keep N rows, a random sample [100,000 or 50 MB]"
    parser.add_argument("--rows", type=positive, metavar="N", help=rows)


def _settings(args: argparse.Namespace) -> Settings:
    """The trainer settings that the arguments ask for."""
    settings: Settings = {} if args.clone and args.seed is None else {"seed": args.seed or 0}
    if args.steps:
        settings["max_steps"] = args.steps
    if args.reward:
        if args.stage not in (*REWARDED, "all"):
            raise ValueError(
                f"--reward is for {', '.join(REWARDED)}: {args.stage} learns from none"
            )
        settings["rewards"] = args.reward
    settings |= cost.assignments(args.set)
    return settings


def _model(args: argparse.Namespace) -> Model:
    """The model's handle that the arguments name, with the reward model that they name."""
    from ..models.load import ADAPTER_FILE, load

    model = load(args.model, trust_remote_code=args.trust_remote_code)
    if not (given := getattr(args, "reward_model", None)):
        return model
    if (Path(given) / ADAPTER_FILE).is_file():
        if "layout=adapters" not in getattr(args, "set", []):
            raise ValueError(
                f"{given} is an adapter: it needs --set layout=adapters (PPO); "
                "its run saved the whole model beside it"
            )
        return model.with_stage("reward_adapter", given)
    paths = load(given).paths
    return model.with_stage("reward", paths.get("reward", paths["base"]))


def _rows(args: argparse.Namespace, seed: int) -> Data:
    """The data that the arguments name; prints what was read, and how."""
    data = cost.read_rows(args, seed, args.rows)
    for note in data.notes:
        print(note)
    return data


def _data(args: argparse.Namespace) -> int:
    from .. import pipeline

    model, data = _model(args), None
    if args.source != "stories" or cost.fields_of(args):
        data = _rows(args, seed=0)
    if data and data.report:
        became = data.report.columns.items()
        print(table([{"column": column, "what became of it": use} for column, use in became]))
    described = pipeline.describe_data(data or "stories", model, args.max_length)
    print(table(described))
    if not any(map(pipeline.usable, described)):
        raise ValueError(f"{args.source}: {pipeline.why_unusable(described, args.max_length)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    findings = examine()
    rows = [{"": f.state, "what": f.what, "found": f.found, "to do": f.remedy} for f in findings]
    print(table(rows))
    return int(any(f.state == "fix" for f in findings))


def _best_of_n(args: argparse.Namespace) -> int:
    from ..studies import best_of_n

    model, data = _model(args), _rows(args, seed=0)
    how = {"prompts": args.prompts, "response_length": args.response_length, "quiet": args.quiet}
    print(best_of_n(model, data, args.n, **how))
    return 0


def _train(args: argparse.Namespace) -> int:
    """Train. What can be refused is refused before data are read, or anything slow imported."""
    from .. import pipeline
    from ..launch.processes import place
    from ..planning import plan
    from ..settings import check_settings
    from ..training import check_first, free_folder, train

    settings, (rank, processes) = _settings(args), place()
    for flag in ("processes", "dry_run"):
        if getattr(args, flag) and not args.accelerate:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} needs --accelerate: say how, for example --accelerate ddp")
    whole = args.stage == "all"
    for flag in ("resume", "accelerate"):
        if whole and getattr(args, flag):
            raise ValueError(f"--{flag} is for one stage, not all")
    if whole and args.teacher_model:
        raise ValueError("--teacher-model is for distill, not all")
    if args.clone:
        return _clone(args, settings)
    if not whole:
        check_settings(args.stage, settings)
    model, common = _model(args), {"overwrite": args.overwrite}
    folder = args.out or free_folder(args.stage)
    if whole:
        pipeline.check_all(model, settings, folder, **common)
    else:
        teacher = {"teacher_model": args.teacher_model}
        planned = plan(args.stage, model, hardware=args.hardware, **teacher, **settings)
        check_first(planned, out=args.out, resume=args.resume, **common)
    if args.command == "launch" or args.accelerate and processes == 1:
        return launching.start(args, planned, folder)
    if rank:  # the first process speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    data, common = _rows(args, args.seed or 0), {**common, "quiet": args.quiet}
    if whole:
        runs = pipeline.train_all(model, data, out=folder, settings=settings, **common)
    else:
        run = train(planned, data, out=args.out, resume=args.resume, **common)
        runs = {args.stage: run}
    return 0 if rank else _show(runs, folder / "report.html" if whole else None)


def _clone(args: argparse.Namespace, settings: Settings) -> int:
    """Train on from a checkpoint of a run."""
    from ..cloning import clone
    from ..runs.run import Run

    if args.resume or args.accelerate or args.stage != "ppo":
        raise ValueError("--clone is for ppo, without --resume and --accelerate")
    folder, step = re.fullmatch(r"(.+?)(?:@(\d+))?", args.clone).groups()  # type: ignore[union-attr]
    run = Run.load(folder)
    if args.model not in ("tiny", run.config["model"]):
        raise ValueError(f"{folder} is of {run.config['model']}, not {args.model}")
    settings |= {"reward_model": args.reward_model} if args.reward_model else {}
    data = _rows(args, run.config["settings"].get("seed", 0))
    how = {"out": args.out, "overwrite": args.overwrite, "quiet": args.quiet}
    made = clone(run, int(step) if step else None, data=data, **how, **settings)
    assert isinstance(made, Run)  # it trained in the foreground
    return _show({"ppo": made})


def _show(runs: dict[str, Run], report: Path | None = None) -> int:
    """Show what was trained; → exit code. `report`: of all stages."""
    from .. import pipeline
    from ..launch.processes import place

    last = list(runs.values())[-1]
    print(table(pipeline.stage_table(runs)))
    if report:
        print(table(pipeline.cost_table(runs)))
    print(f"curves and stories: {report}" if report else f"run: {last.folder}")
    if last.status == "stopped":  # Ctrl-C
        print(f"rlhf-lab: interrupted: {last.name} {last.what_is_left()}", file=sys.stderr)
        return 130 if place()[1] == 1 else 0  # a launcher takes it for a failure
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; → exit code."""
    token = ON_COMMAND_LINE.set(True)
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    finally:
        ON_COMMAND_LINE.reset(token)


def _main(argv: list[str]) -> int:
    args = _parsed(argv)
    if args.command is None and not args.job:
        args.parser.print_help()
        return 0
    run = {"train": _train, "launch": _train, "best-of-n": _best_of_n, "data": _data}
    run |= {"doctor": _doctor, "list": listing.run_list, "report": listing.run_report}
    run |= {**notebooks.RUN, **cost.RUN, **deploy.RUN}
    try:
        if args.job:
            from ..training import run_job

            return run_job(args.job)
        if args.command in ("train", "launch") and args.config:
            from .config_files import as_flags

            args = _parsed([argv[0], *as_flags(args.config, args.stage), *argv[1:]])
        code = run[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("rlhf-lab: interrupted before there was anything to keep", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"rlhf-lab: {_who(error)}{_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug:
            raise
        what = _lost(error)
        what = what or f"internal error: {type(error).__name__}: {_one_line(error)}"
        what += " (--debug shows where)"
        print(f"rlhf-lab: {_who(error)}{what}", file=sys.stderr)
        return 1


def _parsed(argv: list[str]) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.refuse(" ".join(unknown), str(getattr(args, "stage", "")))
    args.argv = argv
    return args


def _who(error: BaseException) -> str:
    """Of several processes the one whose error this is."""
    from ..launch.processes import EVERYWHERE, place

    rank, processes = place()
    alone = processes == 1 or EVERYWHERE in getattr(error, "__notes__", ())
    return "" if alone else f"process {rank} of {processes}: "


def _lost(error: BaseException) -> str:
    """What there is to say where the connection to another process broke; "" for another error."""
    import torch.distributed as dist

    from ..launch.processes import place

    line = _one_line(error)
    broken = isinstance(error, dist.DistError) or "/gloo/" in line
    if place()[1] == 1 or not broken:
        return ""
    line = re.sub(r"\[/\S+\] ", "", line).partition(". This is typically")[0]
    return (
        f"another process is gone, or its host cannot be reached: {line}; its own last line says "
        "why; start all again with --resume"
    )


def _one_line(error: BaseException) -> str:
    line = getattr(error, "command_line", None) or str(error)  # in flags, where it knows them
    return " ".join(line.split()) or type(error).__name__
