"""The commands about cost: `rlhf-lab plan`, `rlhf-lab xray`, `rlhf-lab measure`."""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable
from typing import Any

XRAYED = ("sft", "reward", "ppo", "dpo")
STAGES = (*XRAYED, "rloo", "grpo")
FLAGS = {
    "--gpus": "devices in all [1]",
    "--nodes": "machines they are in [1]",
    "--prompt-length": "tokens of a prompt",
    "--response-length": "tokens of a response",
    "--rows": "rows of the data set: samples, pairs or prompts",
    "--batch": "rows of one device in one pass (per_device_train_batch_size)",
    "--lora-r": "rank of LoRA adapters",
}
NAMES = {"batch": "per_device_train_batch_size"}


def add_commands(commands: Any, positive: Callable[[str], int]) -> None:
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
    plan.add_argument("stage", choices=[*STAGES, "inference", "project"])
    _what(plan, positive)
    plan.add_argument("--cheaper", action="store_true", help="also what to change, ranked")
    plan.add_argument(
        "--accelerate-config",
        metavar="FILE",
        help="write the YAML for accelerate launch (- prints it)",
    )
    xray = commands.add_parser(
        "xray",
        help="exact memory and FLOPs of a step, by running it on fake tensors",
        description="Run one real step of a stage on tensors without data: no weights, no GPU.",
    )
    xray.add_argument("stage", choices=XRAYED)
    _what(xray, positive)
    measure = commands.add_parser(
        "measure",
        help="measure this machine, or a few steps of a stage on it",
        description="Without a stage: how fast this machine is (kept for later plans). With one: "
        "train a few steps of the bundled model and show predicted, simulated and measured.",
    )
    measure.add_argument("stage", nargs="?", choices=STAGES)
    _what(measure, positive)
    measure.add_argument("--steps", type=positive, default=5, help="steps to train [5]")


def _what(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    parser.add_argument("--model", default="tiny", help="bundled, preset, folder or hub id [tiny]")
    parser.add_argument("--hardware", default="here", help="a device of the catalogue [here]")
    for flag, said in FLAGS.items():
        parser.add_argument(flag, type=positive, help=said)
    parser.add_argument("--sharding", help="none, ddp, zero1, zero2, zero3, fsdp2 [ddp]")
    parser.add_argument("--price", type=float, help="USD per device-hour, in place of the list's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of a plan; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="the ledger as JSON lines of rows")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The plan's settings that the arguments ask for. Raises ValueError for a bad --set."""
    made = {}
    for flag in FLAGS:
        name = flag[2:].replace("-", "_")
        if (value := getattr(args, name)) is not None:
            made[NAMES.get(name, name)] = value
    if args.sharding:
        made["sharding"] = args.sharding
    return made | assignments(args.set)


def assignments(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as settings; a value that is no Python literal is a word."""
    made: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set {pair!r}: write NAME=VALUE, for example --set beta=0.5")
        try:
            made[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            made[name] = value  # a plain word such as `cosine`
    return made


def _device(args: argparse.Namespace):
    from ..studies import hardware

    return hardware(args.hardware, **({} if args.price is None else {"price": args.price}))


def _rows(ledger) -> str:
    from dataclasses import asdict

    return json.dumps([asdict(row) for row in ledger], indent=1)


def run_plan(args: argparse.Namespace) -> int:
    from ..planning import plan
    from ..studies import project

    settings, device = settings_of(args), _device(args)
    if args.stage == "project":
        whole = project(args.model, hardware=device, **settings)
        print(_rows(whole.ledger) if args.json else whole)
        return 0
    made = plan(args.stage, args.model, hardware=device, **settings)
    print(_rows(made.ledger) if args.json else made.show())
    if args.cheaper:
        print(made.cheaper())
    if args.accelerate_config == "-":
        print(made.accelerate_config(), end="")
    elif args.accelerate_config:
        with open(args.accelerate_config, "w", encoding="utf-8") as file:
            file.write(made.accelerate_config())
        print(f"accelerate launch --config_file {args.accelerate_config} …")
    return 0


def run_xray(args: argparse.Namespace) -> int:
    from ..charts.comparison import compare
    from ..planning import plan
    from ..studies import xray

    made = plan(args.stage, args.model, hardware=_device(args), **settings_of(args))
    seen = xray(made)
    print(_rows(seen.ledger) if args.json else compare(made, seen))
    return 0


def run_measure(args: argparse.Namespace) -> int:
    from ..studies import calibrate

    if args.stage is None:
        found = calibrate()
        print(json.dumps(found.to_dict(), indent=1) if args.json else found)
        return 0
    import tempfile

    from ..charts.comparison import compare
    from ..planning import plan, train
    from ..studies import xray

    made = plan(
        args.stage,
        args.model,
        hardware=_device(args),
        **{**settings_of(args), "max_steps": args.steps},
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train(made, out=f"{folder}/run", quiet=args.json)
        seen = compare(made, *([xray(made)] if args.stage in XRAYED else []), run)
    print(_rows(seen.ledger) if args.json else seen)
    return 0


RUN = {"plan": run_plan, "xray": run_xray, "measure": run_measure}
