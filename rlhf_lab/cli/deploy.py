"""The command line of what comes after training: `rlhf-lab quantize`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cost import Commands, positive


def add_commands(commands: Commands) -> None:
    _add_quantize(commands)


def _add_quantize(commands: Commands) -> None:
    parser = commands.add_parser(
        "quantize",
        help="a model in fewer bits, and what that costs",
        description="Round a model's weights, save it, and say what that takes and costs.",
    )
    what = "a run's folder, a bundled name, a model folder or a hub id"
    parser.add_argument("model", metavar="RUN", help=what)
    parser.add_argument("--to", default="int8", help="bf16, int8, int8-dynamic, nf4, int4 [int8]")
    parser.add_argument("--stage", default="", help="of a model: base, sft or reward [sft]")
    parser.add_argument("--out", type=Path, help="new folder for the rounded model [not kept]")
    what = "to evaluate on; none: not at all [stories]"
    parser.add_argument("--data", default="stories", dest="source", help=what)
    count = "held-out prompts, or pairs, to evaluate on [128]"
    parser.add_argument("--prompts", type=positive, default=128, help=count)


def quantize(args: argparse.Namespace) -> int:
    from ..deploy.quantize import quantize

    data = None if args.source == "none" else args.source
    how = {"stage": args.stage, "out": args.out, "data": data, "prompts": args.prompts}
    print(quantize(args.model, args.to, **how))
    return 0


RUN = {"quantize": quantize}
