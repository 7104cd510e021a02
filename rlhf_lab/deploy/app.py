"""The server's process: transformers' own OpenAI-compatible handlers over continuous batching,
behind a token, with what they would ignore or get wrong put right, or refused in one line.

By itself transformers 5.23's server takes no token, samples with the first request's settings
whatever later ones ask for, ignores `stop`, `n` and `logprobs`, answers prompts longer than the
context, and takes most of the free memory.

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
from typing import TYPE_CHECKING, Any, cast

import psutil

from ..cost.architecture import architecture
from ..data.chat import stop_ids
from ..data.tokenize import encode_prompt
from ..models.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Json = dict[str, Any]

KNOWN = {"model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature"}
KNOWN |= {"seed", "stream", "ignore_eos"}
HARMLESS = {"user", "metadata", "store", "stream_options"}
"""Fields that change no answer. Usage comes with the end of a stream in any case."""
NOTHING: tuple[object, ...] = (None, False, 0, "", [], {}, {"type": "text"})
"""Values with which any other field asks for nothing."""
GREEDY = 1e-10
"""The temperature that stands for 0: fp32 logits that differ at all are then worlds apart."""
PAGE, STEP_TOKENS, SHARE = 32, 256, 0.5
"""Tokens of a page of keys and values; of a step, at least; of free memory what they may take."""
STORY_TEMPLATE = (
    "{% if messages | length != 1 or messages[0].role != 'user' %}{{ raise_exception('this model "
    "learned requests for stories and no conversations: send one user message') }}{% endif %}"
    "{{ messages[0].content.rstrip() + '\\n' }}"
)


class Refused(ValueError):
    """A request that gets an error of HTTP `status`, in OpenAI's form."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def checked(body: object, wanted: str, name: str) -> Json:
    """A request's fields; `wanted`: prompt or messages. Raises Refused for what is not done."""
    if not isinstance(body, dict):
        raise Refused("the body is no JSON object")
    for field, value in body.items():
        same = field in ("n", "best_of", "top_p") and value == 1
        if field not in KNOWN | HARMLESS and not same and value not in NOTHING:
            raise Refused(f"{field}={value!r} is not supported by this engine: leave it out")
    given = {k: v for k, v in body.items() if k in KNOWN and v is not None}
    if given.pop("model", name) != name:
        raise Refused(f"this server has one model, {name!r}", 404)
    if "seed" in given and given.get("temperature") != 0:
        raise Refused(
            "seed: requests that are sampled together share one noise, so no answer can be "
            "repeated: leave it out, set temperature 0, or use rlhf_lab.generate"
        )
    if not 0 <= given.get("temperature", 1) < math.inf:
        raise Refused(f"temperature={given['temperature']!r} is no number of at least 0")
    prompt, texts = given.get(wanted), [given.get(wanted)]
    if wanted == "messages":
        if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
            raise Refused("messages must be a list of them")
        for message in prompt:
            parts = message.get("content")
            if isinstance(parts, list) and all(set(part) == {"type", "text"} for part in parts):
                message["content"] = " ".join(part["text"] for part in parts)
        texts = [message.get(key) for message in prompt for key in ("role", "content")]
    if not (prompt and all(isinstance(text, str) for text in texts)):
        raise Refused(f"{wanted} must be text (of messages role and content), and not empty")
    return given


def start_engine(model: PreTrainedModel, rows: int, context: int | None, share: bool) -> Any:
    """transformers' continuous batching, each request with its own temperature and stops, put into
    `asked` under its id before it comes. `rows`: requests at once; `share`: pages of equal prompts.

    Its `context`, tokens of the longest request, is what model and memory hold, by the planner's
    arithmetic: keys and values, their copies in a step, and a mask. Raises ValueError, one line.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.cli.serving.utils import CBGenerateManager
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    step, read = max(STEP_TOKENS, 2 * rows), architecture(model.config.to_dict())
    each = model.dtype.itemsize * (read.cached + 3 * read.heads * read.head_dim + step)
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    pages = int(SHARE * free / each) // PAGE
    longest = min(context or read.context, read.context, pages * PAGE)
    if longest < (context or 2):
        raise ValueError(f"context={context}: model and free memory hold {longest} tokens")
    sizes = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=min(rows * -(-longest // PAGE), pages) + 1,
        max_batch_tokens=step,
        max_requests_per_batch=rows,
        allow_block_sharing=share,
        per_request_processors=True,
    )
    engine: Any = CBGenerateManager(sizes)
    engine.context, engine.asked = longest, {}
    # A temperature other than 1, or transformers makes no processor whose value a request can set.
    engine.init_cb(model, GenerationConfig(do_sample=True, temperature=0.5, top_k=0, top_p=1.0))
    batching = engine._cb
    add = batching.add_request
    batching.add_request = lambda _, request_id, **settings: add(
        request_id=request_id, **{**settings, **engine.asked.pop(request_id)}
    )
    while batching.batch_processor is None and batching.is_running():
        time.sleep(0.01)  # its thread makes the pages
    if (error := batching.background_thread_status.fatal_error) is not None:
        raise ValueError(f"transformers' continuous batching does not start: {error}")
    return engine


def make_app(settings: Json) -> Any:
    """The ASGI application for `settings` (of `serve.serve`)."""
    import torch
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.utils import GenerationState
    from transformers.utils import logging

    logging.set_verbosity_error()  # transformers warns of every request
    policy, name = Policy(**settings["policy"]), settings["policy"]["name"]
    model, tokenizer = policy.load()
    if policy.world:
        tokenizer.chat_template = STORY_TEMPLATE
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]  # of transformers' wrapper
    if settings["dtype"] != "float32":  # as it is loaded, where it is not quantised
        model.to(getattr(torch, settings["dtype"]))
    engine = start_engine(model, settings["rows"], settings["context"], settings["prefix_cache"])
    manager, state = ModelManager(), GenerationState(continuous_batching=True)
    manager.force_model, state._cb_manager, state._cb_model_id = name, engine, f"{name}@main"
    manager.loaded_models[f"{name}@main"] = TimedModel(model, -1, cast(Any, tokenizer))
    stops, started = list(stop_ids(tokenizer)), int(time.time())
    handlers: dict[str, tuple[str, Any]] = {
        "/v1/completions": ("prompt", CompletionHandler(manager, state)),
        "/v1/chat/completions": ("messages", ChatCompletionHandler(manager, state)),
    }

    def failed(message: str, status: int) -> Response:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)

    async def ask(request: Request, own: str) -> Response:
        wanted, handler = handlers[request.url.path]
        body = checked(await request.json(), wanted, name)
        body[wanted] = policy.prompt(body[wanted])
        ids = encode_prompt(tokenizer, body[wanted])  # as in training
        room, most = engine.context - len(ids), body.pop("max_completion_tokens", None)
        body["max_tokens"] = most = most or body.get("max_tokens", max(room, 1))
        if not 1 <= most <= room:
            raise Refused(
                f"the prompt has {len(ids)} tokens and max_tokens is {most}: it is at least 1, and "
                f"both together at most the context of {engine.context}"
            )
        engine.asked[own] = {
            "input_ids": ids,
            "temperature": float(body.pop("temperature", 1)) or GREEDY,
            "eos_token_id": -1 if body.pop("ignore_eos", False) else stops,
        }
        reply: Response = await handler.handle_request(body, own)
        return reply

    async def answer(request: Request) -> Response:
        own = str(uuid.uuid4())  # what a client calls it may be another's name too
        try:
            return await ask(request, own)
        except Refused as error:
            return failed(str(error), error.status)
        except (ValueError, TypeError, RecursionError) as error:  # of JSON, UTF-8, a template
            return failed(f"not understood: {error}", 400)
        except RuntimeError as error:  # the engine died
            return failed(str(error), 503)
        finally:
            engine.asked.pop(own, None)

    async def models(_: Request) -> Response:
        about = {"id": name, "object": "model", "created": started, "owned_by": "rlhf_lab"}
        return JSONResponse({"object": "list", "data": [about | {"max_model_len": engine.context}]})

    async def health(_: Request) -> Response:
        return JSONResponse({"alive": engine.is_alive()}, 200 if engine.is_alive() else 503)

    routes = [Route(path, answer, methods=["POST"]) for path in handlers]
    inner = Starlette(routes=[*routes, Route("/v1/models", models), Route("/health", health)])
    bearer = f"Bearer {settings['token']}".encode()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        app: Starlette | Response = inner
        if scope["type"] == "http" and scope["path"] != "/health":
            if not hmac.compare_digest(given, bearer):
                app = failed("send the server's token: Authorization: Bearer …", 401)
        await app(scope, receive, send)

    return guarded


# -------------------------------------------------------------------------------------- the process


def _transformers(settings: Json, listening: socket.socket) -> None:
    """Answer until the process ends."""
    import uvicorn

    app = make_app(settings)
    _ready(settings)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])
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
