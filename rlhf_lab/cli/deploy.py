"""The commands that come after training: `rlhf-lab serve`."""

from __future__ import annotations

import argparse
import os

from .cost import Commands, positive

TOKEN = "RLHF_LAB_TOKEN"


def add_commands(commands: Commands) -> None:
    """Add them to the parser's."""
    _add_serve(commands)


def _add_serve(commands: Commands) -> None:
    what = f"serve a model until Ctrl-C, OpenAI-compatible; {TOKEN} in the environment is its token"
    serve = commands.add_parser("serve", help=what.partition(";")[0], description=what)
    serve.add_argument("model", help="folder of a run or model, a bundled name, or a hub id")
    flags: dict[str, tuple[str | int, str]] = {
        "engine": ("transformers", "transformers (continuous batching), or vllm where installed"),
        "stage": ("sft", "of a model's name: sft or base"),
        "host": ("127.0.0.1", "address to listen on"),
        "port": (8000, "0: one that is free"),
        "rows": (64, "requests that run at once"),
        "dtype": ("float32", "of the weights: float32, bfloat16, float16"),
    }
    for name, (default, text) in flags.items():
        kind = positive if name == "rows" else type(default)
        serve.add_argument(f"--{name}", type=kind, default=default, help=f"{text} [{default}]")
    context = "tokens of the longest prompt with its answer [as many as memory holds]"
    serve.add_argument("--context", type=positive, help=context)
    serve.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt anew")


def _serve(args: argparse.Namespace) -> int:
    from ..deploy.serve import serve

    names = ("engine", "stage", "host", "port", "rows", "context", "dtype")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"token": os.environ.get(TOKEN) or None, "prefix_cache": not args.no_prefix_cache}
    with serve(args.model, show_log=True, **settings) as server:
        print(
            f"serving {server.model} at {server.url}/v1 until Ctrl-C; token {server.token}\n"
            f"  curl {server.url}/v1/completions -H 'Authorization: Bearer {server.token}' "
            "-H 'Content-Type: application/json' -d '"
            '{"prompt": "Write a happy story about a fox and a kite in the cave."}' + "'",
            flush=True,
        )
        try:
            return int(server.process.wait())
        except KeyboardInterrupt:
            return 0


RUN = {"serve": _serve}
