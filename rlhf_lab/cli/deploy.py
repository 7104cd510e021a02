"""The commands that come after training: `rlhf-lab quantize`, `serve`, `bench`, `export`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .cost import Commands, positive

TOKEN = "RLHF_LAB_TOKEN"


def add_commands(commands: Commands) -> None:
    """Add them to the parser's."""
    _add_quantize(commands)
    _add_serve(commands)
    _add_export(commands)
    _add_bench(commands)


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


def _quantize(args: argparse.Namespace) -> int:
    from ..deploy.quantize import quantize

    data = None if args.source == "none" else args.source
    how = {"stage": args.stage, "out": args.out, "data": data, "prompts": args.prompts}
    print(quantize(args.model, args.to, **how))
    return 0


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

    names = ("model", "concurrency", "requests", "max_tokens")
    settings = {name: getattr(args, name) for name in names}
    print(bench(args.url, token=args.token or os.environ.get("OPENAI_API_KEY"), **settings))
    return 0


RUN = {"quantize": _quantize, "serve": _serve, "export": _export, "bench": _bench}
