"""A server under load, by GuideLLM: time to the first token, for each further one, throughput.

    lab.bench("http://127.0.0.1:8000", concurrency=(1, 4, 16))

GuideLLM (`pip install "rlhf-lab[bench]"`, or in an environment of its own) sends the requests:
`concurrency` of them at once, a new one for each that is answered. Its exit status is 0 and its
rates count where requests fail, so figures here are made of single answers, and a load in which one
failed is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..cost.hardware import cores
from ..data.load import load_data
from ..display import Display, format_number, html_table, table
from ..runs.ledger import Ledger

INSTALL = "pip install 'rlhf-lab[bench]', or GuideLLM elsewhere and its program in $GUIDELLM"


class Answer(NamedTuple):
    """One answered request: tokens, and clock times (s) of its start, first token and end."""

    prompt: int
    tokens: int
    start: float
    first: float
    end: float

    @property
    def first_token(self) -> float:
        return self.first - self.start

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def per_token(self) -> float | None:
        """Seconds of each token after the first; None of an answer that has only one."""
        return (self.end - self.first) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Level:
    """What a load of so many requests in flight gets."""

    concurrency: int
    answers: tuple[Answer, ...]

    @property
    def seconds(self) -> float:
        return max(a.end for a in self.answers) - min(a.start for a in self.answers)

    @property
    def tokens(self) -> int:
        """Of the answers; prompts are not among them."""
        return sum(a.tokens for a in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def percentile(self, time: str, share: float) -> float:
        """Seconds of a `time` (first_token, per_token, latency) that this share of the answers
        keeps to: a measured one (nearest rank); NaN where no answer has it."""
        found = sorted(x for a in self.answers if (x := getattr(a, time)) is not None)
        return float(found[max(0, math.ceil(share * len(found)) - 1)]) if found else math.nan

    @property
    def ledger(self) -> Ledger:
        """Seconds and tokens of one round of requests in flight, as a plan of inference has
        them: the median prefill, and the rest of the time in which they are served."""
        made = Ledger()
        rounds = len(self.answers) / self.concurrency
        prefill = self.percentile("first_token", 0.5)
        decode = max(0.0, self.seconds / rounds - prefill)
        prompts = sum(a.prompt for a in self.answers)
        for phase, seconds, tokens in (
            ("prefill", prefill, prompts),
            ("decode", decode, self.tokens),
        ):
            row = {"stage": "inference", "role": "policy", "phase": phase, "source": "measured"}
            made.add(**row, quantity="seconds", value=seconds)
            made.add(**row, quantity="tokens", value=tokens / rounds)
        return made


class Load(Display):
    """The figures of a server, by requests in flight: `levels`."""

    def __init__(self, levels: Sequence[Level], url: str, model: str, version: str) -> None:
        self.levels, self.url, self.model, self.version = tuple(levels), url, model, version
        rows = [_row(level) for level in levels]
        note = f"{model} at {url}, measured by GuideLLM {version}; times: median / 99th percentile"
        super().__init__(f"{table(rows)}\n{note}", f"{html_table(rows)}<p>{note}</p>")

    @property
    def ledger(self) -> Ledger:
        """That of the last level."""
        return self.levels[-1].ledger

    def around(self, plan: Any) -> dict[str, float]:
        """What the server adds to the plan's passes: to each step and to each request in it (least
        squares over the levels), and once to each that arrives (their median). For plans of other
        models: `lab.hardware("here", **load.around(plan))`. Raises ValueError for less than two
        levels.
        """
        streams = [float(level.concurrency) for level in self.levels]
        if len(set(streams)) < 2:
            raise ValueError("around: give two levels of concurrency or more")
        pairs = [(level, plan.estimate.serving_at(level.concurrency)) for level in self.levels]
        more = [level.percentile("per_token", 0.5) - bare.per_token for level, bare in pairs]
        slope, step = (max(0.0, x) for x in statistics.linear_regression(streams, more))
        first = (
            level.percentile("first_token", 0.5) - bare.first_token - slope * level.concurrency
            for level, bare in pairs
        )
        arrival = max(0.0, statistics.median(first) - step)
        return {"step_seconds": step, "request_seconds": slope, "arrival_seconds": arrival}


def _row(level: Level) -> Mapping[str, object]:
    def both(time: str) -> str:
        ends = (format_number(level.percentile(time, share), "s") for share in (0.5, 0.99))
        return " / ".join(ends)

    return {
        "in flight": level.concurrency,
        "first token": both("first_token"),
        "each further token": both("per_token"),
        "whole answer": both("latency"),
        "tokens/s": round(level.tokens_per_second, 1),
        "tokens an answer": round(level.tokens / len(level.answers), 1),
    }


def bench(
    server: Any,
    *,
    token: str | None = None,
    model: str | None = None,
    concurrency: Sequence[int] = (1, 4, 16),
    requests: int = 32,
    max_tokens: int = 64,
    prompts: Sequence[str] | None = None,
) -> Load:
    """Measure an OpenAI-compatible endpoint: a URL, or what `lab.serve` gives.

    `concurrency`: requests in flight, one level after the other; each gets `requests`, or as many
    as are in flight twice over. `max_tokens`: at most, an answer may end sooner. `prompts`: those
    of the stories without. Raises ValueError, one line, where GuideLLM is missing, where the server
    cannot be reached or refuses, and where a request of the load fails.
    """
    if not concurrency or min(*concurrency, requests, max_tokens) < 1:
        raise ValueError("bench: concurrency, requests and max_tokens are at least 1")
    url = str(getattr(server, "url", server)).rstrip("/").removesuffix("/v1")
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"bench: {url!r} is no address; one is http://127.0.0.1:8000")
    program = shutil.which(os.environ.get("GUIDELLM") or "guidellm", path=_places())
    if not program:
        raise ValueError(f"bench needs GuideLLM: {INSTALL}")
    token = token or getattr(server, "token", None)
    asked = model or getattr(server, "model", None)
    name = _probe(url, token, asked, max_tokens)
    counts = [max(requests, 2 * streams) for streams in concurrency]
    backend = {
        **{"kind": "openai_http", "target": url, "model": name, "api_key": token},
        **{"request_format": "/v1/completions", "max_tokens": max_tokens},
        **{"validate_backend": False, "http2": False, "verify": True},
        "extras": {"body": {"temperature": 0}},  # the same answers, as long, every time
    }
    spec = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": list(concurrency)},
        "constraints": [{"kind": "max_requests", "count": counts}],
    }
    if not prompts:
        rows = load_data("stories").prompts.train[: max(counts)]
        prompts = [str(row["prompt"]) for row in rows]
    report = _guidellm(program, spec, prompts)
    found = zip(concurrency, counts, report["benchmarks"], strict=True)
    levels = [Level(streams, read_answers(one, count)) for streams, count, one in found]
    return Load(levels, url, name, report["metadata"]["guidellm_version"])


def _places() -> str:
    """Where programs are: beside this Python too, which a kernel's PATH need not have."""
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def _probe(url: str, token: str | None, model: str | None, max_tokens: int) -> str:
    """One request before the load: whether the server is there and answers. → its model's name."""
    import httpx

    body = {"prompt": "Once", "max_tokens": min(4, max_tokens)} | (
        {"model": model} if model else {}
    )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
    except httpx.HTTPError as error:
        raise ValueError(f"bench: no server answers at {url}: {error}") from error
    if reply.status_code != 200:
        text = " ".join(reply.text.split())[:200]
        raise ValueError(f"bench: {url} answers with {reply.status_code}: {text}")
    try:
        return model or str(reply.json()["model"]).removesuffix("@main")  # transformers' addition
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"bench: {url} does not answer as OpenAI's API does") from None


def _guidellm(program: str, spec: dict[str, Any], prompts: Sequence[str]) -> Any:
    """Run it on a file, which the token is in instead of a command line that all can read. → its
    report."""
    with tempfile.TemporaryDirectory() as name:  # only its owner can read it
        folder = Path(name)
        rows = folder / "prompts.jsonl"
        rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        spec["data"] = [{"kind": "json_file", "path": str(rows)}]
        spec["outputs"] = [{"kind": "json", "path": str(folder / "report.json")}]
        (folder / "spec.json").write_text(json.dumps({"spec": spec}))
        line = [program, "run", "-c", str(folder / "spec.json"), "--disable-console"]
        # Up to ten processes without this: they would take from the server on a small machine.
        env = {"GUIDELLM__MAX_WORKER_PROCESSES": str(max(1, min(10, cores() // 4)))} | os.environ
        done = subprocess.run(line, check=False, capture_output=True, text=True, env=env)
        try:
            return json.loads((folder / "report.json").read_text())
        except OSError:
            lines = (done.stderr or done.stdout).strip().splitlines()
            why = lines[-1].strip() if lines else f"exit status {done.returncode}"
            raise ValueError(f"bench: GuideLLM wrote no report: {why}") from None


def read_answers(benchmark: Mapping[str, Any], count: int) -> tuple[Answer, ...]:
    """The answers of a benchmark in GuideLLM's report (0.8). Raises ValueError unless there are
    `count`, each of them whole."""
    groups = {name: found or [] for name, found in benchmark["requests"].items()}
    if failed := groups["errored"] + groups["incomplete"]:
        why = str(failed[0]["info"].get("error") or "not finished").split("\\n")[0]
        raise ValueError(f"bench: {len(failed)} of {count} requests failed, the first: {why}")
    answers = []
    for one in groups["successful"]:
        times = one["info"]["timings"]
        first, last = times["first_token_iteration"], times["last_token_iteration"]
        if not one["output_tokens"] or first is None:
            raise ValueError("bench: a request was answered without a token")
        tokens = int(one["prompt_tokens"] or 0), int(one["output_tokens"])
        answers.append(Answer(*tokens, times["request_start"], first, last))
    if len(answers) != count:
        found = f"{len(answers)} of {count} requests"
        raise ValueError(f"bench: {found} are in GuideLLM's report: run it again")
    return tuple(answers)
