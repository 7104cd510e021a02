"""The server's process: transformers' own OpenAI-compatible handlers over continuous batching,
behind a token. By itself transformers 5.23's server takes no token, samples with the first
request's settings whatever later ones ask for, ignores `stop`, `n` and `logprobs`, answers prompts
beyond the context, and takes most of the free memory: here that is put right, or refused.

`python -m rlhf_lab.deploy.app` reads its settings as a line of JSON, writes a line when it answers
(or why it cannot), and ends when its input does: with the process that started it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..cost.architecture import architecture
from ..cost.hardware import available_memory
from ..data.chat import stop_ids
from ..data.tokenize import encode_prompt
from ..models.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..cost.decoder import Architecture

Json = dict[str, Any]

KNOWN = {"prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed"}
KNOWN |= {"model", "stream", "ignore_eos"}
HARMLESS = {"user", "metadata", "store", "stream_options"}
"""Fields that change no answer. Usage comes with the end of a stream in any case."""
NOTHING: tuple[object, ...] = (None, False, 0, "", [], {}, {"type": "text"})
"""Values with which any other field asks for nothing."""
TEXT = {"type", "text"}
"""What a part of a message has, where it is text."""
WANTED = {
    "prompt": "prompt is one text, not empty; send a list of prompts, or token ids, one by one",
    "messages": "messages is a list of objects with role and content, both texts and not empty",
}
GREEDY = 1e-10
"""The temperature that stands for 0: fp32 logits that differ at all are then worlds apart."""
STEP_TOKENS, SHARE = 256, 0.5
"""Tokens of a step, at least; of free memory what keys and values may take."""
STORY_TEMPLATE = (
    "{% if messages | length != 1 or messages[0].role != 'user' %}{{ raise_exception('this model "
    "learned requests for stories and no conversations: send one user message') }}{% endif %}"
    "{{ messages[0].content.rstrip() + '\\n' }}"
)


def checked(body: object, wanted: str) -> Json:
    """A request's fields; `wanted`: prompt or messages. Raises ValueError for what is not done."""
    if not isinstance(body, dict):
        raise ValueError("the body is no JSON object")
    for name, value in body.items():
        same = name in ("n", "best_of", "top_p") and value == 1
        if name not in KNOWN | HARMLESS and not same and value not in NOTHING:
            raise ValueError(f"{name}={value!r} is not supported by this engine: leave it out")
    given = {k: v for k, v in body.items() if k in KNOWN and v is not None}
    if "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    for name, kinds, least in (("max_tokens", (int,), 1), ("temperature", (int, float), 0)):
        value = given.get(name, 1)
        if type(value) not in kinds or not least <= value < math.inf:
            kind = "whole number" if least else "number"
            raise ValueError(f"{name}={value!r}: give a {kind} of at least {least}")
    if "seed" in given and given.get("temperature") != 0:
        raise ValueError(
            "seed: requests that are sampled together share one noise, so no answer can be "
            "repeated: leave it out, set temperature 0, or use rlhf_lab.generate"
        )
    texts = [given.get(wanted)]
    if wanted == "messages":
        messages = given[wanted] if isinstance(given.get(wanted), list) else []
        texts = [text for message in messages for text in _texts(message)]
    if not (texts and all(isinstance(text, str) and text for text in texts)):
        raise ValueError(WANTED[wanted])
    "".join(map(str, texts)).encode()  # raises ValueError for half a character
    return given


def _texts(message: object) -> list[object]:
    """Role and content of a message, whose parts become one text where all of them are text."""
    if not isinstance(message, dict):
        return [None]
    parts = message.get("content")
    if isinstance(parts, list) and all(isinstance(p, dict) and set(p) == TEXT for p in parts):
        message["content"] = " ".join(str(part["text"]) for part in parts)
    return [message.get("role"), message.get("content")]


def engine_room(
    read: Architecture, numbers: float, rows: int, most: int, step: int
) -> tuple[int, int]:
    """→ tokens of the longest request that memory for so many numbers holds, `most` at most, and
    pages, each of all layers, for `rows` of them, or as many as fit.

    By the planner's arithmetic: keys and values, of which layers with a window keep the last; their
    copies in a step; and a mask of the step's tokens for each kind of layer, as wide as all pages
    would hold if the kind that has fewer layers had them alone (transformers 5.23).
    """
    from ..ppo.rollout_engines import PAGE

    def whole(tokens: int) -> int:
        return -(-tokens // PAGE) * PAGE

    near = sum(count for layer in read.layers for _, count in layer.windows)
    kinds = [count for count in (near, read.depth - near) if count]
    paged = (tuple((whole(w), n) for w, n in layer.windows) for layer in read.layers)
    pairs = zip(read.layers, paged, strict=True)
    read = replace(read, layers=tuple(replace(layer, windows=w) for layer, w in pairs))

    def taken(tokens: int) -> float:
        kept = read.kept(whole(tokens))
        wide = len(kinds) * read.depth / min(kinds) / max(1, read.cached)
        return kept * (1 + step * wide) + 3 * read.heads * read.head_dim * tokens

    longest = bisect_right(range(1, most + 1), numbers, key=taken)
    each = math.ceil(read.kept(whole(longest)) / (max(1, read.cached) * PAGE))
    # What is handed out to a kind of layers at a time is a multiple of both kinds' pages.
    started = len(kinds) * -(-math.lcm(*kinds) // read.depth)
    return longest, int(min(rows, numbers / max(1.0, taken(longest))) * each) + started


def start_engine(model: PreTrainedModel, rows: int, context: int | None, share: bool) -> Any:
    """transformers' continuous batching, each request with the settings that are put into `asked`
    under its id before it comes. `rows`: requests at once; `share`: pages of equal beginnings.

    Its `context`, tokens of the longest request, is what model and memory hold (`engine_room`).
    Raises ValueError, one line.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.cli.serving.utils import CBGenerateManager

    from ..ppo.rollout_engines import engine_sizes

    step, read = max(STEP_TOKENS, 2 * rows), architecture(model.config.to_dict())
    if read.state_bytes(1):
        raise ValueError(
            f"{read.family} keeps a state of each request beside keys and values, for which "
            "transformers' continuous batching has no place: serve it with engine='vllm'"
        )
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else available_memory()
    most = min(context or read.context, read.context)
    longest, blocks = engine_room(read, SHARE * free / model.dtype.itemsize, rows, most, step)
    if longest < (context or 2):
        raise ValueError(f"context={context}: model and free memory hold {longest} tokens")
    how = {"allow_block_sharing": share, "per_request_processors": True}
    engine: Any = CBGenerateManager(engine_sizes(rows, blocks, step, **how))
    engine.context, engine.asked = longest, {}
    # A temperature other than 1, or transformers makes no processor whose value a request can set.
    shared = {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 1.0}
    engine.init_cb(model, GenerationConfig(**shared, eos_token_id=-1))
    batching, add = engine._cb, engine._cb.add_request
    batching.add_request = lambda _, request_id, **settings: add(
        request_id=request_id, **{**settings, **engine.asked.pop(request_id)}
    )
    while batching.batch_processor is None and batching.is_running():
        time.sleep(0.01)  # its thread makes the pages
    if (error := batching.background_thread_status.fatal_error) is not None:
        raise ValueError(f"transformers' continuous batching does not start: {error}")
    return engine


class App:
    """The ASGI application for `settings` (of `serve.serve`)."""

    def __init__(self, settings: Json) -> None:
        import torch
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.completion import CompletionHandler
        from transformers.cli.serving.model_manager import ModelManager, TimedModel
        from transformers.cli.serving.utils import GenerationState
        from transformers.utils import logging

        logging.set_verbosity_error()  # transformers warns of every request
        self.policy = Policy(**settings["policy"])
        self.name, self.bearer = self.policy.name, f"Bearer {settings['token']}".encode()
        model, self.tokenizer = self.policy.load()
        if self.policy.world:
            self.tokenizer.chat_template = STORY_TEMPLATE
        if torch.cuda.is_available():
            model.cuda()  # type: ignore[call-arg]  # of transformers' wrapper
        if settings["dtype"] != "float32":  # as it is loaded, where it is not quantised
            model.to(getattr(torch, settings["dtype"]))
        sizes = (settings[name] for name in ("rows", "context", "prefix_cache"))
        self.engine = start_engine(model, *sizes)
        manager, state = ModelManager(), GenerationState(continuous_batching=True)
        manager.force_model, key = self.name, f"{self.name}@main"
        manager.loaded_models[key] = TimedModel(model, -1, self.tokenizer)  # type: ignore[arg-type]
        state._cb_manager, state._cb_model_id = self.engine, key
        self.stops = list(stop_ids(self.tokenizer))
        self.handlers: dict[str, tuple[str, Any]] = {
            "/v1/completions": ("prompt", CompletionHandler(manager, state)),
            "/v1/chat/completions": ("messages", ChatCompletionHandler(manager, state)),
        }
        routes = [Route(path, self.answer, methods=["POST"]) for path in self.handlers]
        routes += [Route("/v1/models", self.models), Route("/health", self.health)]
        errors: Any = dict.fromkeys((HTTPException, ValueError, RuntimeError), self.failed)
        self.inner = Starlette(routes=routes, exception_handlers=errors)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app: Any = self.inner
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "http" and scope["path"] != "/health":
            if not hmac.compare_digest(given, self.bearer):
                error = HTTPException(401, "send the server's token: Authorization: Bearer …")
                app = await self.failed(None, error)
        await app(scope, receive, send)

    async def answer(self, request: Request) -> Response:
        wanted, handler = self.handlers[request.url.path]
        body = checked(await request.json(), wanted)
        if body.pop("model", self.name) != self.name:
            raise HTTPException(404, f"this server has one model, {self.name!r}")
        body[wanted] = self.policy.prompt(body[wanted])
        ids = encode_prompt(self.tokenizer, body[wanted])  # as in training
        context = self.engine.context
        room = context - len(ids)
        if (wanted_tokens := body.setdefault("max_tokens", max(room, 1))) > room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_tokens is {wanted_tokens}: both "
                f"together at most the context of {context}"
            )
        own = str(uuid.uuid4())  # what a client calls it may be another's name too
        self.engine.asked[own] = {
            "input_ids": ids,
            "temperature": float(body.pop("temperature", 1)) or GREEDY,
            "eos_token_id": -1 if body.pop("ignore_eos", False) else self.stops,
        }
        reply: Response = await handler.handle_request(body, own)
        return reply

    async def failed(self, _: object, error: Exception) -> Response:
        """In OpenAI's form: the client's fault, but for a RuntimeError, with which engines die."""
        ours = isinstance(error, RuntimeError) and not isinstance(error, RecursionError)
        status = getattr(error, "status_code", 503 if ours else 400)
        kind = "server_error" if ours else "invalid_request_error"
        message = getattr(error, "detail", str(error))
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)

    async def models(self, _: object) -> Response:
        about = {"id": self.name, "object": "model", "owned_by": "rlhf_lab", "created": 0}
        about |= {"max_model_len": self.engine.context}
        return JSONResponse({"object": "list", "data": [about]})

    async def health(self, _: object) -> Response:
        return JSONResponse({}, 200 if self.engine.is_alive() else 503)


# -------------------------------------------------------------------------------------- the process


def _transformers(settings: Json, listening: socket.socket) -> None:
    """Answer until the process ends."""
    import uvicorn

    # Idle connections longer than any client keeps them: uvicorn's own 5 s are httpx's 5 s too, and
    # a request that is sent while they close is lost.
    config = uvicorn.Config(App(settings), log_level="warning", timeout_keep_alive=300)
    _ready(settings)
    uvicorn.Server(config).run([listening])
    os._exit(0)  # the engine's thread would first write what was asked for


def _vllm(settings: Json, listening: socket.socket) -> None:
    """vLLM's own server, in a process of its own, under the same token."""
    listening.close()
    policy, url = settings["policy"], f"http://{settings['host']}:{settings['port']}/health"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [f"--{flag}={settings[flag]}" for flag in ("host", "port", "dtype")]
    command += [f"--model={policy['weights']}", f"--tokenizer={policy['tokenizer']}"]
    command += [f"--served-model-name={policy['name']}", f"--max-num-seqs={settings['rows']}"]
    command += [f"--max-model-len={settings['context']}"] * bool(settings["context"])
    command += ["--trust-remote-code"] * policy["trust_remote_code"]
    command += ["--no-enable-prefix-caching"] * (not settings["prefix_cache"])
    environment = {**os.environ, "VLLM_API_KEY": settings["token"]}
    server = subprocess.Popen(command, stdout=sys.stderr, env=environment)
    while server.poll() is None:
        with contextlib.suppress(OSError):  # not yet
            urllib.request.urlopen(url, timeout=5)
            _ready(settings)
            server.wait()
        time.sleep(0.2)
    raise ValueError(f"vLLM ended with exit code {server.returncode}")


def _ready(settings: Json) -> None:
    print(json.dumps({"port": settings["port"]}), flush=True)
    os.dup2(2, 1)  # nobody reads further lines


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


def main() -> None:
    settings: Json = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        listening = socket.create_server((settings["host"], settings["port"]))  # 0: a free one
        settings["port"] = listening.getsockname()[1]
        {"transformers": _transformers, "vllm": _vllm}[settings["engine"]](settings, listening)
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(json.dumps({"error": line}), flush=True)
        os._exit(2)


if __name__ == "__main__":
    main()
