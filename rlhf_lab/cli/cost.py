"""The commands about cost: `rlhf-lab plan`, `rlhf-lab xray`, `rlhf-lab measure`."""

from __future__ import annotations

import argparse
import ast
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..stages import STAGES, TRAINABLE, XRAYED, Setting

if TYPE_CHECKING:
    from ..cost.hardware import Hardware
    from ..planning import Plan
    from ..runs.ledger import Row

SIZE_FLAGS = {
    "--gpus": "devices in all [1]",
    "--nodes": "machines they are in [1]",
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


def positive(text: str) -> int:
    """A number of 1 or more, from an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


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
        "  rlhf-lab plan sft --model Llama-2-7b-hf --hardware a100-40 --lora-r 16 --cheaper",
    )
    plan.add_argument("stage", choices=[*STAGES, "project"])
    _add_settings(plan)
    plan.add_argument("--cheaper", action="store_true", help="also what to change, ranked")
    what = "write the YAML for accelerate launch (- prints it)"
    plan.add_argument("--accelerate-config", metavar="FILE", help=what)
    xray = commands.add_parser(
        "xray",
        help="exact memory and FLOPs of a step, by running it on tensors without data",
        description="Run one real step of a stage on tensors without data: no weights, no GPU.",
    )
    xray.add_argument("stage", choices=XRAYED)
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
    parser.add_argument("--model", default="tiny", help="bundled, preset, folder or hub id [tiny]")
    parser.add_argument("--hardware", default="here", help="a device of the catalogue [here]")
    for flag, text in SIZE_FLAGS.items():
        parser.add_argument(flag, type=positive, help=text)
    parser.add_argument("--sharding", help="none, ddp, zero1, zero2, zero3, fsdp2 [ddp]")
    parser.add_argument("--price", type=float, help="USD per device-hour, in place of the list's")
    add_repeated(parser, "--set", "NAME=VALUE", "any other setting of a plan; may be repeated")
    parser.add_argument("--json", action="store_true", help="the ledger's rows as JSON")


def add_repeated(parser: argparse.ArgumentParser, flag: str, metavar: str, text: str) -> None:
    """An argument that may be given several times: a list."""
    parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)


def settings_of(args: argparse.Namespace) -> Settings:
    """The plan's settings that the arguments ask for. Raises ValueError for a bad --set."""
    settings: Settings = {}
    for flag in SIZE_FLAGS:
        name = flag[2:].replace("-", "_")
        if (value := getattr(args, name)) is not None:
            settings[SETTING_OF.get(name, name)] = value
    if args.sharding:
        settings["sharding"] = args.sharding
    return settings | assignments(args.set)


def assignments(pairs: Iterable[str]) -> Settings:
    """NAME=VALUE pairs as settings; a value that is no Python literal is a word."""
    settings: Settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {pair!r}: write NAME=VALUE, for example --set beta=0.5")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value  # a plain word such as `cosine`
    return settings


def _hardware(args: argparse.Namespace) -> Hardware:
    from ..cost.hardware import hardware

    return hardware(args.hardware, **({} if args.price is None else {"price": args.price}))


def _plan(args: argparse.Namespace, **more: int) -> Plan:
    from ..planning import plan

    settings = {**settings_of(args), **more}
    return plan(args.stage, args.model, hardware=_hardware(args), **settings)


def _print(ledger: Iterable[Row], view: Callable[[], object], as_json: bool) -> None:
    """A ledger as JSON, or what `view` makes of it."""
    print(json.dumps([asdict(row) for row in ledger], indent=1) if as_json else view())


def print_plan(args: argparse.Namespace) -> int:
    from ..studies import project

    if args.stage == "project":
        whole = project(args.model, hardware=_hardware(args), **settings_of(args))
        _print(whole.ledger, lambda: whole, args.json)
        return 0
    plan = _plan(args)
    _print(plan.ledger, plan.show, args.json)
    if args.cheaper:
        print(plan.cheaper())
    if args.accelerate_config == "-":
        print(plan.accelerate_config(), end="")
    elif args.accelerate_config:
        with open(args.accelerate_config, "w", encoding="utf-8") as file:
            file.write(plan.accelerate_config())
        print(f"accelerate launch --config_file {args.accelerate_config} …")
    return 0


def print_xray(args: argparse.Namespace) -> int:
    from ..charts.comparison import compare
    from ..studies import xray

    plan = _plan(args)
    simulated = xray(plan)
    _print(simulated.ledger, lambda: compare(plan, simulated), args.json)
    return 0


def print_measure(args: argparse.Namespace) -> int:
    import rlhf_lab

    from ..charts.comparison import compare
    from ..runs.run import Run
    from ..studies import xray
    from ..training import train

    if args.stage is None:
        measured = rlhf_lab.calibrate()
        print(json.dumps(measured.to_dict(), indent=1) if args.json else measured)
        return 0
    plan = _plan(args, max_steps=args.steps)
    with tempfile.TemporaryDirectory() as folder:
        run = train(plan, out=Path(folder, "run"), quiet=args.json)
        assert isinstance(run, Run)  # not in the background
        comparison = compare(plan, *([xray(plan)] if args.stage in XRAYED else []), run)
    _print(comparison.ledger, lambda: comparison, args.json)
    return 0


RUN = {"plan": print_plan, "xray": print_xray, "measure": print_measure}
