"""A server on this machine: how fast it starts, and whether its answers are those of `generate`.

    python benchmarks/server.py            # a minute or two; needs rlhf-lab[serve]

start    seconds from `lab.serve(…)` until it answers, at most 15, and seconds of CPU in them
equal    64 requests at once, greedy, over several sets of prompts: each answered, each equal to
         transformers' `generate`, or first different where two logits lie within 1e-4 (counted)
memory   resident bytes of the process after them

Exit status 1 where a target is missed. Results go to results/server.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "server.json"
sys.path.insert(0, str(ROOT))

import rlhf_lab as lab  # noqa: E402
from rlhf_lab.world.generator import draw_request  # noqa: E402

AT_ONCE, NEW, NEAR, SECONDS = 64, 64, 1e-4, 15


def greedy(model, tokenizer, prompts: list[str]) -> list[str]:
    """Plain transformers, one padded batch."""
    rows = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**rows, do_sample=False, max_new_tokens=NEW)
    return tokenizer.batch_decode(ids[:, rows.input_ids.shape[1] :], skip_special_tokens=True)


def gap(model, tokenizer, prompt: str, one: str, other: str) -> float:
    """Between the logits of the first tokens in which two answers differ."""
    first, second = ([*tokenizer(t).input_ids, tokenizer.eos_token_id] for t in (one, other))
    k = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(prompt).input_ids + first[:k]])).logits
    return abs(float(logits[0, -1, first[k]] - logits[0, -1, second[k]]))


def measure(name: str, rounds: int) -> dict:
    handle, rng = lab.load(name), random.Random(0)
    model, tokenizer = handle.sft.eval(), handle.tokenizer
    start = time.perf_counter()
    with lab.serve(name, rows=AT_ONCE) as server:
        seconds = time.perf_counter() - start
        process = psutil.Process(server.process.pid)
        on_cpu = sum(process.cpu_times()[:2])
        gaps, answered = [], 0
        for _ in range(rounds):
            prompts = [draw_request(rng).prompt for _ in range(AT_ONCE)]

            def ask(prompt: str) -> str:
                return server.complete(prompt, temperature=0, max_tokens=NEW)

            with ThreadPoolExecutor(AT_ONCE) as pool:
                texts = list(pool.map(ask, prompts))
            answered += len(texts)
            for row in zip(prompts, texts, greedy(model, tokenizer, prompts)):
                if row[1] != row[2]:
                    gaps.append(gap(model, tokenizer, *row))
        resident = process.memory_info().rss
    return {
        "model": name,
        "start_seconds": round(seconds, 2),
        "start_cpu_seconds": round(on_cpu, 2),
        "requests": rounds * AT_ONCE,
        "answered": answered,
        "equal": rounds * AT_ONCE - len(gaps),
        "first_different_within_1e-4": sum(x < NEAR for x in gaps),
        "largest_gap_of_logits": max(gaps, default=0.0),
        "resident_bytes": resident,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="sets of 64 prompts [4]")
    rounds = parser.parse_args().rounds
    rows = [measure(name, rounds) for name in ("mini", "tiny", "small")]
    packages = ("torch", "transformers", "fastapi", "uvicorn", "openai")
    found = {
        "versions": {p: version(p) for p in packages},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "models": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    for row in rows:
        print(row)
    good = all(
        r["answered"] == r["requests"] == r["equal"] + r["first_different_within_1e-4"]
        and r["start_seconds"] <= SECONDS
        for r in rows
    )
    print("all targets met" if good else "a target is missed")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
