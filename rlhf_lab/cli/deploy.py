"""The commands that come after training: `rlhf-lab export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cost import Commands


def add_commands(commands: Commands) -> None:
    """Add them to the parser's."""
    _add_export(commands)


def _add_export(commands: Commands) -> None:
    what = "write a run's model for the hub or llama.cpp, or look what vLLM makes of it"
    parser = commands.add_parser("export", help=what, description=f"{what}; nothing is sent")
    parser.add_argument("run", type=Path, help="folder of the run; or of a model: gguf, vllm-check")
    parser.add_argument("--to", default="hub", choices=["hub", "gguf", "vllm-check"], help="[hub]")
    parser.add_argument("--out", type=Path, help="empty or new folder [exports/NAME-TO]")
    parser.add_argument("--adapter", action="store_true", help="LoRA's adapter, not merged in")


def _export(args: argparse.Namespace) -> int:
    from ..deploy.export import export

    print(export(args.run, args.to, args.out, adapter=args.adapter))
    return 0


RUN = {"export": _export}
