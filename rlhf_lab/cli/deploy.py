"""The commands that come after training: `rlhf-lab bench`."""

from __future__ import annotations

import argparse
import os

from .cost import Commands, positive


def add_commands(commands: Commands) -> None:
    """Add them to the parser's."""
    _add_bench(commands)


def _add_bench(commands: Commands) -> None:
    what = "measure a server under load: time to the first token, for each further one, throughput"
    parser = commands.add_parser("bench", help=what, description=f"{what}; GuideLLM sends it")
    parser.add_argument("url", help="of an OpenAI-compatible endpoint: http://127.0.0.1:8000")
    parser.add_argument("--token", help="its token [$OPENAI_API_KEY]")
    parser.add_argument("--model", help="the name it has there [the server's only one]")
    what = "requests in flight, levels [1,4,16]"
    parser.add_argument("--concurrency", type=_levels, default=[1, 4, 16], metavar="N,N", help=what)
    what = "requests of each level; as many as are in flight twice over, if that is more [32]"
    parser.add_argument("--requests", type=positive, default=32, help=what)
    parser.add_argument("--max-tokens", type=positive, default=64, help="of an answer [64]")


def _levels(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _bench(args: argparse.Namespace) -> int:
    from ..deploy.load import bench

    print(
        bench(
            args.url,
            token=args.token or os.environ.get("OPENAI_API_KEY"),
            model=args.model,
            concurrency=args.concurrency,
            requests=args.requests,
            max_tokens=args.max_tokens,
        )
    )
    return 0


RUN = {"bench": _bench}
