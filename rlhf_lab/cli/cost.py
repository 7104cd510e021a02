"""The commands about cost: `rlhf-lab plan`, `rlhf-lab xray`, `rlhf-lab measure`."""

from __future__ import annotations

import argparse
import ast
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..stages import STAGES, TRAINABLE, XRAYED, Setting

if TYPE_CHECKING:
    from ..cost.estimate import Estimate
    from ..cost.hardware import Hardware
    from ..data.load import Data
    from ..planning import Plan
    from ..runs.ledger import Row

SIZE_FLAGS = {
    "--gpus": "devices in all [1]",
    "--nodes": "machines they are in [as many as the devices need]",
    "--prompt-length": "tokens of a prompt",
    "--response-length": "tokens of a response",
    "--rows": "rows of the data set: samples, pairs or prompts",
    "--batch": "rows of one device in one pass (per_device_train_batch_size)",
    "--lora-r": "rank of LoRA adapters",
}
SETTING_OF = {"batch": "per_device_train_batch_size"}
"""Flags whose setting has another name."""
Settings: TypeAlias = dict[str, Setting]
"""Settings of a plan by name; it checks them."""
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def positive(text: str, least: int = 1) -> int:
    """A whole number of 1 or more, from an argument; 1e4 is one."""
    try:
        number = int(float(text) if "e" in text.lower() and float(text).is_integer() else text)
    except ValueError:
        what = f"write a whole number such as 10000, not {text!r}"
        raise argparse.ArgumentTypeError(what) from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
    return number


def not_negative(text: str) -> int:
    """A whole number of 0 or more, from an argument."""
    return positive(text, 0)


def add_commands(commands: Commands) -> None:
    """Add the three commands to the parser's."""
    plan = commands.add_parser(
        "plan",
        help="what a stage or a whole project will cost, before it runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Predict memory, FLOPs, time and money of a stage, or of a whole project.",
        epilog="examples:\n"
        "  rlhf-lab plan ppo --model Qwen/Qwen2.5-7B --hardware h100 --gpus 8 --rows 20000\n"
        "  rlhf-lab plan project --model Llama-3.2-1B --hardware a100 --rows 50000 --json\n"
        "  rlhf-lab plan sft --model Llama-2-7b-hf --hardware a100-40 --lora-r 16 --cheaper\n"
        "  rlhf-lab plan sft --model Llama-3.2-1B --hardware mycard.json\n"
        "  rlhf-lab plan dpo --data pairs.jsonl --field chosen=better --field rejected=worse",
    )
    plan.add_argument("stage", choices=[*STAGES, "project"])
    _add_settings(plan)
    what = "'stories', a file, or a hub id: a plan for rows as long, and as many unless --rows"
    plan.add_argument("--data", dest="source", help=what)
    add_columns(plan)
    plan.add_argument("--reward-model", help="reward model of another size (ppo, rloo, grpo)")
    plan.add_argument("--value-model", help="value model of another size (ppo)")
    plan.add_argument("--teacher-model", help="what is distilled from (distill)")
    plan.add_argument("--draft-model", help="what guesses tokens ahead (inference)")
    plan.add_argument("--budget", type=float, help="USD to plan a project against")
    plan.add_argument("--cheaper", action="store_true", help="also what to change, ranked")
    what = "write the YAML for accelerate launch (- prints it)"
    plan.add_argument("--accelerate-config", metavar="FILE", help=what)
    what = "write the plan as a config file of TRL's command line (- prints it)"
    plan.add_argument("--yaml", metavar="FILE", help=what)
    xray = commands.add_parser(
        "xray",
        help="exact memory and FLOPs of a step, by running it on tensors without data",
        description="Run one real step of a stage on tensors without data: no weights, no GPU.",
    )
    xray.add_argument("stage", choices=XRAYED)
    xray.add_argument("--teacher-model", help="what is distilled from (distill)")
    _add_settings(xray)
    measure = commands.add_parser(
        "measure",
        help="measure this machine, or a few steps of a stage on it",
        description="Without a stage: how fast this machine is (kept for later plans). With one: "
        "train a few steps of the bundled model and show predicted, simulated and measured.",
    )
    measure.add_argument("stage", nargs="?", choices=TRAINABLE)
    _add_settings(measure)
    measure.add_argument("--steps", type=positive, default=5, help="steps to train [5]")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="bundled, preset, folder or hub id [tiny]")
    what = "a config file of TRL, accelerate, DeepSpeed, axolotl or LLaMA-Factory; repeatable"
    parser.add_argument("--config", metavar="FILE", action="append", help=what)
    device = "a device (rlhf-lab list hardware), or a file of figures, .json or .yaml [here]"
    parser.add_argument("--hardware", default="here", help=device)
    for flag, text in SIZE_FLAGS.items():
        kind = not_negative if flag == "--prompt-length" else positive
        parser.add_argument(flag, type=kind, help=text)
    parser.add_argument("--sharding", help="none, ddp, zero1, zero2, zero3, fsdp2 [ddp]")
    parser.add_argument("--price", type=float, help="USD per device-hour, in place of the list's")
    add_repeated(parser, "--set", "NAME=VALUE", "any other setting of a plan; may be repeated")
    parser.add_argument("--json", action="store_true", help="the answer as JSON")


def add_repeated(parser: argparse.ArgumentParser, flag: str, metavar: str, text: str) -> None:
    """An argument that may be given several times: a list."""
    parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is read of a file or data set."""
    fields = "prompt, completion, chosen, rejected, label, answers, winner, … is this column"
    add_repeated(parser, "--field", "OURS=COLUMN", fields)
    parser.add_argument("--fields", metavar="FILE", help="the same in a YAML file")
    parser.add_argument("--split", default="train", help="split of a hub data set [train]")
    parser.add_argument("--subset", help="configuration of a hub data set")


def read_rows(args: argparse.Namespace, seed: int, limit: int | None = None) -> Data:
    """The data that the arguments name; of more than `limit` rows a sample."""
    from ..data.load import load_data

    how = {"split": args.split, "subset": args.subset, "limit": limit}
    return load_data(args.source, seed=seed, fields=fields_of(args), **how)


def fields_of(args: argparse.Namespace) -> str | dict[str, object]:
    """What the arguments say of the columns."""
    from ..data.mapping import from_flags

    if args.field and args.fields:
        raise ValueError("--field and --fields: say all in the file, or all with --field")
    return args.fields or from_flags(args.field)


def settings_of(args: argparse.Namespace) -> Settings:
    """The plan's settings that the arguments ask for. Raises ValueError for a bad --set."""
    settings: Settings = {}
    for flag in SIZE_FLAGS:
        name = flag[2:].replace("-", "_")
        if (value := getattr(args, name)) is not None:
            settings[SETTING_OF.get(name, name)] = value
    if args.sharding is not None:
        settings["sharding"] = args.sharding
    return settings | assignments(args.set)


def assignments(pairs: Iterable[str]) -> Settings:
    """NAME=VALUE pairs as settings, of Python's literals or YAML's; another value is a word."""
    settings: Settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {pair!r}: write NAME=VALUE, for example --set beta=0.5")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            # As configs write them; else a plain word such as `cosine`.
            settings[name] = {"true": True, "false": False, "null": None}.get(value, value)
    return settings


def _hardware(args: argparse.Namespace) -> Hardware:
    from ..cost.hardware import hardware

    return hardware(args.hardware, **({} if args.price is None else {"price": args.price}))


def _plan(args: argparse.Namespace, **more: int) -> Plan:
    from ..launch.accelerate_files import MIXED
    from ..planning import plan
    from .config_files import read_configs

    files, model = read_configs(args.config or ()), args.model
    settings: Settings = {}
    for found in files:
        if found.stage not in (None, args.stage):
            raise ValueError(f"{found.tool}'s file is of {found.stage}, not of {args.stage}")
        for name, value in found.planned.items():  # bf16: false does not undo accelerate's
            if value is not False or name not in MIXED or not settings.get(name):
                settings[name] = value
        model = found.model if model is None else model
    settings |= (given := {**settings_of(args), **more})
    others = {n: getattr(args, n, None) for n in OTHER_MODELS}
    others["data"] = data = read_rows(args, 0) if getattr(args, "source", None) else None
    made = plan(
        args.stage,
        "tiny" if model is None else model,
        hardware=_hardware(args),
        **others,
        **settings,
    )
    notes = [line for found in files for line in found.notes(args.stage, given, made.settings)]
    return replace(made, notes=(*(data.notes if data else ()), *notes))


def _print(ledger: Iterable[Row], view: Callable[[], object], as_json: bool) -> None:
    """A ledger as JSON, or what `view` makes of it."""
    print(json.dumps([asdict(row) for row in ledger], indent=1) if as_json else view())


def plan_document(plan: Plan, cheaper: bool = False) -> dict[str, object]:
    """A plan as one JSON document. Bytes of one device; hours and USD of the run, None where its
    length or the price is not known."""
    e = plan.estimate
    document = {
        "stage": plan.stage,
        "model": plan.model.name,
        "hardware": e.hardware.name,
        "warnings": plan.warnings,
        "assumptions": [asdict(assumption) for assumption in plan.assumptions],
        **_figures(e),
        "not_modelled": e.not_modelled,
        "ledger": [asdict(row) for row in e.ledger],
    }
    if cheaper:
        document["cheaper"] = [
            {
                "change": r.does,
                "settings": r.settings,
                "saves_bytes": r.saves_bytes,
                "saves_hours": r.saves_hours,
                "saves_usd": r.saves_money,
                "fits": r.fits,
                "main_memory_bytes": r.estimate.main_memory,
            }
            for r in plan.cheaper()
        ]
    return document


def _figures(e: Estimate) -> dict[str, object]:
    low, high = e.memory_band
    return {
        "peak_bytes": e.peak,
        "peak_bytes_band": [e.peak * low, e.peak * high],
        "memory_bytes": e.hardware.memory,
        "main_memory_bytes": e.main_memory,  # of one machine, what is offloaded to it
        "fits": e.fits,
        "steps": e.steps,
        "step_seconds": e.step_seconds,
        "hours": e.hours,
        "money_usd": e.money,
    }


OTHER_MODELS = "reward_model", "value_model", "teacher_model", "draft_model"
OF_ONE_STAGE = "config", "cheaper", "accelerate_config", "yaml", "source", *OTHER_MODELS
"""Arguments of a plan that a project has not."""


def _print_project(args: argparse.Namespace) -> int:
    from ..budget import project

    for name in OF_ONE_STAGE:
        if getattr(args, name):
            flag = "data" if name == "source" else name.replace("_", "-")
            raise ValueError(f"--{flag} is for the plan of one stage")
    asked = {"hardware": _hardware(args), "budget": args.budget, **settings_of(args)}
    whole = project("tiny" if args.model is None else args.model, **asked)
    document = {
        "verdict": whole.verdict,
        "warnings": whole.warnings,
        "total_usd": whole.total,
        "hours": whole.hours,
        "kwh": whole.kwh,
        "costs": [cost._asdict() for cost in whole.costs],
        "stages": {name: _figures(e) for name, e in whole.stages.items()},
        "ledger": [asdict(row) for row in whole.ledger],
    }
    print(json.dumps(document, indent=1) if args.json else whole)
    return 0


def print_plan(args: argparse.Namespace) -> int:
    if args.stage == "project":
        return _print_project(args)
    if args.budget is not None:
        raise ValueError(f"--budget is planned for a project, not {args.stage}: plan project")
    if args.json and "-" in (args.accelerate_config, args.yaml):
        raise ValueError("--json is all that is printed: give a file in place of -")
    plan = _plan(args)
    if args.json:
        print(json.dumps(plan_document(plan, args.cheaper), indent=1))
    else:
        print(plan.show())
    if args.cheaper and not args.json:
        print(plan.cheaper())
    if file := args.accelerate_config:
        used = f"accelerate launch --config_file {file} …\n"
        _write(file, plan.accelerate_config(), used * (not args.json))
    if file := args.yaml:
        used = f"trl {plan.stage} --config {file} …\n"
        _write(file, plan.trl_config(), used * (not args.json))
    return 0


def _write(path: str, text: str, used: str) -> None:
    """Into a file, and say how it is `used`; or (-) on the screen."""
    if path != "-":
        Path(path).write_text(text, encoding="utf-8")
    print(text if path == "-" else used, end="")


def print_xray(args: argparse.Namespace) -> int:
    from ..charts.comparison import compare
    from ..studies import xray

    plan = _plan(args)
    simulated = xray(plan)
    notes = "".join(f"{note}\n" for note in simulated.notes)
    _print(simulated.ledger, lambda: f"{notes}{compare(plan, simulated)}", args.json)
    return 0


def print_measure(args: argparse.Namespace) -> int:
    import rlhf_lab

    from ..charts.comparison import compare
    from ..studies import xray
    from ..training import train

    if args.stage is None:
        measured = rlhf_lab.calibrate(**assignments(args.set))
        print(json.dumps(measured.to_dict(), indent=1) if args.json else measured)
        return 0
    plan = _plan(args, max_steps=args.steps)
    with tempfile.TemporaryDirectory() as folder:
        run = train(plan, out=Path(folder, "run"), quiet=args.json)
        comparison = compare(plan, *([xray(plan)] if args.stage in XRAYED else []), run)
    _print(comparison.ledger, lambda: comparison, args.json)
    return 0


RUN = {"plan": print_plan, "xray": print_xray, "measure": print_measure}
