"""The command line: `rlhf-lab train`, `best-of-n`, `plan`, `xray`, `measure`, `data`, `doctor`.

Exit codes: 0 done, 2 the user's mistake (one line says what, where and what to do), 1 ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .. import __version__
from ..stages import ONLINE
from . import cost as cost_commands


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str):
        self.exit(2, f"rlhf-lab: {' '.join(message.split())} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rlhf-lab",
        description="What RLHF does and what it costs, on a model small enough to train here.",
    )
    parser.add_argument("--version", action="version", version=f"rlhf-lab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    train.add_argument("stage", choices=["sft", "reward", "ppo", "dpo", "rloo", "grpo", "all"])
    _model_and_data(train)
    train.add_argument("--out", type=Path, help="folder of the run [runs/<stage>-<number>]")
    train.add_argument("--steps", type=_positive, help="optimizer steps (PPO: iterations) a stage")
    train.add_argument("--seed", type=int, default=0, help="seed of data and training [0]")
    train.add_argument("--reward-model", help="PPO, RLOO, GRPO: folder of the reward model")
    train.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="learn from this: model, gold, gold/<part>; may be repeated [model]",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the stage's trainer; may be repeated",
    )
    train.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    train.add_argument(
        "--resume", action="store_true", help="PPO: go on from the last checkpoint in --out"
    )
    train.add_argument(
        "--accelerate", metavar="HOW", help="PPO on several processes: ddp, or accelerate's config"
    )
    train.add_argument(
        "--processes", type=_positive, metavar="N", help="how many [one for each GPU; 2 on a CPU]"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    best = commands.add_parser(
        "best-of-n",
        help="the baseline without training: the best of n responses",
        description="Draw n responses to each held-out prompt, keep the reward model's favourite.",
    )
    _model_and_data(best)
    best.add_argument(
        "-n",
        type=_positive,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        metavar="N",
        help="sizes to compare [1 2 4 8 16]",
    )
    best.add_argument("--prompts", type=_positive, default=256, help="held-out prompts [256]")
    best.add_argument("--response-length", type=_positive, default=64, help="most tokens [64]")
    best.add_argument("--reward-model", help="folder of the reward model [the model's own]")
    best.add_argument("--quiet", action="store_true", help="no progress bar")
    about = commands.add_parser(
        "data",
        help="what a file or data set holds, before you train on it",
        description="Say what a file or data set holds: its shape, rows, token lengths, drops.",
    )
    about.add_argument("source", help="a file, a folder saved by datasets, or a hub id")
    _model_and_data(about)
    about.add_argument("--max-length", type=_positive, default=512, help="tokens of a row [512]")
    cost_commands.add_commands(commands, _positive)
    commands.add_parser(
        "doctor",
        help="look this machine over: what works, what to mend",
        description="Look this machine over; say what to mend, and how.",
    )
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_and_data(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model and which rows."""
    parser.add_argument("--model", default="tiny", help="bundled name, folder or hub id [tiny]")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    if parser.prog.endswith(("train", "best-of-n")):
        parser.add_argument(
            "--data",
            default="stories",
            dest="source",
            help="'stories', a file, or a hub id [stories]",
        )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="OURS=COLUMN",
        help="prompt, completion, chosen or rejected is this column",
    )
    parser.add_argument("--split", default="train", help="split of a hub data set [train]")
    parser.add_argument("--subset", help="configuration of a hub data set")
    parser.add_argument(
        "--rows",
        type=_positive,
        metavar="N",
        help="keep N rows, a random sample [100,000 or 50 MB]",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def _settings(args: argparse.Namespace) -> dict:
    """The trainer settings that the arguments ask for."""
    settings: dict = {"seed": args.seed}
    if args.steps:
        settings["max_steps"] = args.steps
    if args.reward:
        if args.stage not in (*ONLINE, "all"):
            raise ValueError(f"--reward is for {', '.join(ONLINE)}: {args.stage} learns from none")
        settings["rewards"] = args.reward
    settings |= cost_commands.assignments(args.set)
    return settings


def _load(args: argparse.Namespace, seed: int):
    """The model's handle and the data that the arguments name; says what was read, and how."""
    from ..data.load import load_data
    from ..models.load import load

    fields = {}
    for pair in args.field:
        ours, equals, column = pair.partition("=")
        if not equals or not column:
            raise ValueError(f"--field {pair!r}: write OURS=COLUMN, for example chosen=better")
        fields[ours] = column
    data = load_data(
        args.source, seed=seed, fields=fields, split=args.split, subset=args.subset, limit=args.rows
    )
    for note in data.notes:
        print(note)
    return load(args.model, trust_remote_code=args.trust_remote_code), data


def _data(args: argparse.Namespace) -> int:
    from .. import pipeline
    from ..display import table

    model, data = _load(args, seed=0)
    print(table(pipeline.describe_data(data, model, args.max_length)))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from ..display import table
    from .doctor import examine

    findings = examine()
    print(
        table(
            [{"": f.state, "what": f.what, "found": f.found, "to do": f.remedy} for f in findings]
        )
    )
    return int(any(f.state == "fix" for f in findings))


def _judged(model, args: argparse.Namespace):
    """The model with the reward model that the arguments name."""
    from ..models.load import ADAPTER_FILE, load

    if not args.reward_model:
        return model
    if (Path(args.reward_model) / ADAPTER_FILE).is_file():
        if "layout=adapters" not in getattr(args, "set", []):
            raise ValueError(
                f"{args.reward_model} is an adapter: it needs layout=adapters (PPO); "
                "its run saved the whole model beside it"
            )
        return model.with_stage("reward_adapter", args.reward_model)
    return model.with_stage("reward", load(args.reward_model).paths["base"])


def _best_of_n(args: argparse.Namespace) -> int:
    from ..studies import best_of_n

    model, data = _load(args, seed=0)
    print(
        best_of_n(
            _judged(model, args),
            data,
            args.n,
            prompts=args.prompts,
            response_length=args.response_length,
            quiet=args.quiet,
        )
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    from .. import pipeline, planning, training
    from ..display import table

    settings, (rank, processes) = _settings(args), training.place()
    if args.accelerate and processes == 1:
        return _launch(args, settings)
    if args.processes and not args.accelerate:
        raise ValueError("--processes needs --accelerate: say how, for example --accelerate ddp")
    if rank:  # the first process speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    model, data = _load(args, args.seed)
    model = _judged(model, args)
    common = {"overwrite": args.overwrite, "quiet": args.quiet}
    if args.resume and (args.stage != "ppo" or not args.out):
        raise ValueError("--resume is for PPO, and needs --out, the folder of its run")
    if args.stage == "all":
        folder = args.out or training.free_folder("all")
        runs = pipeline.train_all(model, data, out=folder, settings=settings, **common)
        print(table(pipeline.stage_table(runs)))
        print(table(pipeline.cost_table(runs)))
        print(f"curves and stories: {folder / 'report.html'}")
        return 0
    run = training.train(
        planning.plan(args.stage, model, **settings),
        data,
        out=args.out,
        resume=args.resume,
        **common,
    )
    if rank == 0:
        print(table(pipeline.stage_table({args.stage: run})))
        print(f"run: {run.folder}")
    return 0


def _launch(args: argparse.Namespace, settings: dict) -> int:
    """Start the same command in several processes; what is wrong with it is said by one."""
    from .. import planning, training
    from ..launch.launcher import launch

    if args.stage != "ppo":
        raise ValueError(f"--accelerate is for PPO, not {args.stage}")
    planning.plan(args.stage, args.model, **settings)
    told = [] if args.out else ["--out", str(training.free_folder(args.stage))]
    return launch(args.accelerate, [*args.argv, *told], args.processes)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; → exit code."""
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run = {
            "train": _train,
            "best-of-n": _best_of_n,
            "data": _data,
            "doctor": _doctor,
            **cost_commands.RUN,
        }
        return run[args.command](args)
    except KeyboardInterrupt:
        print("rlhf-lab: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"rlhf-lab: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug:
            raise
        print(
            f"rlhf-lab: internal error: {type(error).__name__}: {_one_line(error)} "
            "(--debug shows where)",
            file=sys.stderr,
        )
        return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
