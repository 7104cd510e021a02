"""A real server on loopback and real clients: answers, refusals, ends.

Run: pytest tests/deploy/test_serve.py       (needs the extra `serve`; two servers are started)
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.world.generator import ANIMALS, MOODS, Request

openai = pytest.importorskip("openai", reason="needs a server: pip install 'rlhf-lab[serve]'")
pytest.importorskip("fastapi", reason="needs a server: pip install 'rlhf-lab[serve]'")

PROMPTS = [Request(m, a, "kite", "cave").prompt for a in ANIMALS for m in MOODS][:32]
HOSTILE = "<script>alert('x')</script> \x00 {{7*7}} '; DROP TABLE stories; -- <|end|> \u202e"
NEAR = 1e-4
"""Logits so near that another order of the same sums may choose either."""


@pytest.fixture(scope="module")
def server():
    with lab.serve("tiny", rows=64) as running:
        yield running


@pytest.fixture(scope="module")
def idle(server):
    """A connection that had an answer when the server was new, and when that was."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/health")
    connection.getresponse().read()
    yield connection, time.monotonic()
    connection.close()


def reply(server, path="/v1/completions", body=None, **headers):
    """→ status, type of the content, and the body of an answer."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {server.token}", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers)) as r:
            return r.status, r.headers["content-type"], json.load(r)
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read().decode()


# ------------------------------------------------------------------------------ what it answers


def test_64_requests_at_once_are_each_what_generate_gives_alone(server, idle):
    """Greedy ones, each beside one that is sampled: a request's settings are its own. Where two
    texts part, the two tokens' logits lie within NEAR, and such rows are counted."""
    jobs = [(p, t) for p in PROMPTS for t in (0.0, 1.0)]
    with ThreadPoolExecutor(64) as pool:
        ask = server.complete
        texts = list(pool.map(lambda j: ask(j[0], temperature=j[1], max_tokens=64), jobs))
    greedy, sampled = texts[::2], texts[1::2]
    tiny = lab.load("tiny")
    model, tokenizer = tiny.sft, tiny.tokenizer
    rows = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.generate(**rows, do_sample=False, max_new_tokens=64)[:, rows.input_ids.shape[1] :]
    theirs = tokenizer.batch_decode(ids, skip_special_tokens=True)
    parted = [
        apart(model, tokenizer, *row) for row in zip(PROMPTS, greedy, theirs) if row[1] != row[2]
    ]
    assert len(texts) == 64 and all(texts)
    assert len(parted) <= 2 and all(gap < NEAR for gap in parted)
    assert sum(g != s for g, s in zip(greedy, sampled)) > 16


def apart(model, tokenizer, prompt: str, one: str, other: str) -> float:
    """How far the logits of the first tokens lie apart in which two answers differ."""
    first, second = ([*tokenizer(t).input_ids, tokenizer.eos_token_id] for t in (one, other))
    k = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    with torch.no_grad():
        ids = torch.tensor([tokenizer(prompt).input_ids + first[:k]])
        logits = model(input_ids=ids).logits[0, -1]
    return abs(float(logits[first[k]] - logits[second[k]]))


def test_temperature_1_samples_as_the_model_says(server):
    """The first token of 128 answers, against the model's own probabilities: by the law of large
    numbers the share of the likeliest is within four standard errors."""
    prompt = PROMPTS[0]
    tiny = lab.load("tiny")
    with torch.no_grad():
        logits = tiny.sft(input_ids=torch.tensor([tiny.tokenizer(prompt).input_ids])).logits[0, -1]
    share, token = logits.softmax(-1).max(-1)
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(lambda _: server.complete(prompt, max_tokens=1), range(128)))
    found = sum(t == tiny.tokenizer.decode([token]) for t in texts) / 128
    assert 0.05 < share < 0.95  # or nothing would be tested
    assert abs(found - share) < 4 * (share * (1 - share) / 128) ** 0.5


def test_openais_client_completes_chats_and_streams(server):
    """One request for a story in each of its forms; what a client leaves out of the prompt's end
    the server adds, as `lab.generate` does."""
    prompt = PROMPTS[0]
    (whole,) = lab.generate("tiny", prompt, temperature=0)
    client, given = server.client, {"model": server.model, "temperature": 0}
    text = client.completions.create(prompt=prompt.rstrip(), **given)
    assert text.choices[0].text == whole and text.choices[0].finish_reason == "stop"
    tokenizer = lab.load("tiny").tokenizer
    assert text.usage.prompt_tokens == len(tokenizer(prompt).input_ids)
    parts = [{"type": "text", "text": prompt}]
    for content in (prompt, parts):
        messages = [{"role": "user", "content": content}]
        chat = client.chat.completions.create(messages=messages, **given)
        assert chat.choices[0].message.content == whole
    stream = client.completions.create(prompt=prompt, stream=True, **given)
    pieces = [c.choices[0].text for c in stream]
    assert "".join(pieces) == whole and len(pieces) > 10
    short = client.completions.create(prompt=prompt, max_tokens=3, **given)
    assert short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "length"
    more = {"ignore_eos": True}
    long = client.completions.create(prompt=prompt, max_tokens=99, extra_body=more, **given)
    assert long.usage.completion_tokens == 99
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 1024


# ------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stop": ["."]}, "stop=['.'] is not supported"),
        ({"n": 2}, "n=2 is not supported"),
        ({"logprobs": 5}, "logprobs=5 is not supported"),
        ({"seed": 1}, "seed: requests that are sampled together share one noise"),
        ({"top_p": 0.9}, "top_p=0.9 is not supported"),
        ({"top_k": 3}, "top_k=3 is not supported"),
        ({"max_tokens": 0}, "max_tokens=0: give a whole number of at least 1"),
        ({"max_tokens": -1}, "max_tokens=-1: give a whole number of at least 1"),
        ({"max_tokens": "7"}, "max_tokens='7': give a whole number"),
        ({"max_tokens": 1.5}, "max_tokens=1.5: give a whole number"),
        ({"max_tokens": 1020}, "together at most the context of 1024"),
        ({"prompt": "a kite " * 900}, "together at most the context of 1024"),
        ({"temperature": -1}, "temperature=-1: give a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan: give a number"),
        ({"temperature": "hot"}, "temperature='hot': give a number"),
        ({"prompt": ""}, "prompt is one text, not empty"),
        ({"prompt": ["a", "b"]}, "send a list of prompts, or token ids, one by one"),
        ({"prompt": [3, 4]}, "send a list of prompts, or token ids, one by one"),
        ({"prompt": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused_in_one_line(server, changes, says):
    status, kind, text = reply(server, body={"prompt": PROMPTS[0], **changes})
    assert (status, kind) == (400, "application/json")
    assert says in json.loads(text)["error"]["message"] and "\n" not in text


def test_values_that_ask_for_nothing_are_taken(server):
    body = {"prompt": PROMPTS[0], "n": 1, "stop": None, "logprobs": None, "presence_penalty": 0}
    body |= {"temperature": 0, "seed": 3, "user": "me", "max_tokens": 2}
    assert reply(server, body=body)[0] == 200


def test_conversations_and_pictures_are_refused_by_a_model_of_stories(server):
    chat = "/v1/chat/completions"
    two = [{"role": r, "content": "Hello"} for r in ("user", "assistant", "user")]
    status, _, text = reply(server, chat, {"messages": two})
    assert status == 400 and "no conversations: send one user message" in text
    picture = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    status, _, text = reply(server, chat, {"messages": [{"role": "user", "content": picture}]})
    assert status == 400 and "role and content" in text
    for wrong in (
        [],
        5,
        "Hello",
        ["Hello"],
        [{"role": "user"}],
        [{"role": "user", "content": [3]}],
    ):
        status, _, text = reply(server, chat, {"messages": wrong})
        assert status == 400 and "role and content" in text


def test_bodies_that_are_no_requests_and_places_that_are_not_there(server):
    for body in (b"{", b"\xff", b"[" * 100_000, b"[]", b'"text"'):
        assert reply(server, body=body)[0] == 400
    assert reply(server, body={"prompt": "a", "model": "gpt-9"})[0] == 404
    for path in ("/load_model", "/reset", "/v1/responses", "/docs", "/openapi.json"):
        assert reply(server, path, body={})[0] == 404
    assert reply(server, body={"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 1})[0] == 200


def test_without_the_token_nothing_is_told(server):
    for given in ("", "Bearer", "Bearer wrong", f"Basic {server.token}", server.token):
        for path in ("/v1/completions", "/v1/models", "/nowhere"):
            status, _, text = reply(server, path, body={"prompt": "a"}, Authorization=given)
            assert status == 401 and "tiny" not in text and server.token not in text
    assert reply(server, "/health", Authorization="")[0] == 200
    # Nor by a look at the process.
    assert not any(server.token in part for part in psutil.Process(server.process.pid).cmdline())


def test_hostile_text_comes_back_as_the_text_that_it_is(server):
    same = {"prompt": HOSTILE, "max_tokens": 9, "temperature": 0}
    status, kind, answer = reply(server, body=same)
    assert (status, kind) == (200, "application/json")
    again = server.client.completions.create(model=server.model, **same)
    assert again.choices[0].text == answer["choices"][0]["text"]
    _, kind, refused = reply(server, body={"prompt": "a", HOSTILE: HOSTILE})
    assert kind == "application/json" and repr(HOSTILE) in json.loads(refused)["error"]["message"]


def test_what_cannot_be_served_is_refused_before_anything_starts(monkeypatch, server):
    with pytest.raises(ValueError, match="stage 'reward' writes nothing"):
        lab.serve("tiny", stage="reward")
    with pytest.raises(ValueError, match="engine='llama': .*choose from transformers, vllm"):
        lab.serve("tiny", engine="llama")
    with pytest.raises(ValueError, match="dtype='int4': .*choose from float32, bfloat16, float16"):
        lab.serve("tiny", dtype="int4")
    for name, value in (("rows", 0), ("context", 1), ("port", 99999), ("port", -1)):
        with pytest.raises(ValueError, match=f"serve: {name}={value}: give "):
            lab.serve("tiny", **{name: value})
    monkeypatch.setattr("rlhf_lab.deploy.serve.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"serve needs fastapi, .*pip install 'rlhf-lab\[serve\]'"):
        lab.serve("tiny")


def test_a_port_that_is_taken_is_said_in_one_line(server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ValueError, match="^serve: .*[Aa]ddress already in use"):
        lab.serve("tiny", port=port)


# ------------------------------------------------------------------------------ how it ends


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process has ended, or does so soon."""
    end = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_an_idle_connection_outlives_what_clients_keep(server, idle):
    """httpx gives one up after 5 s, as uvicorn by itself does: a request in between was lost."""
    connection, since = idle
    time.sleep(max(0.0, since + 5.5 - time.monotonic()))
    connection.auto_open = False  # or a new one would be made
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def test_killed_in_the_middle_it_fails_its_clients_and_starts_again_on_the_same_port(server):
    """The last test of the shared server; the new one ends with its block."""
    failed = []

    def ask():
        try:
            server.complete(PROMPTS[0], max_tokens=1000, extra_body={"ignore_eos": True})
        except openai.APIConnectionError as error:
            failed.append(error)

    clients = [threading.Thread(target=ask) for _ in range(8)]
    for thread in clients:
        thread.start()
    time.sleep(0.3)
    server.process.kill()
    for thread in clients:
        thread.join(10)
    assert len(failed) == 8
    port = int(server.url.rpartition(":")[2])
    with lab.serve("tiny", port=port, token="again", rows=2, context=64) as again:
        assert (again.url, again.token) == (server.url, "again")
        texts = few_at_once(again)
    assert gone(again.process.pid) and repr(again) == "Server('tiny', closed)"
    assert len(set(texts)) == 1 and len(texts) == 6


def few_at_once(server) -> list[str]:
    """Six requests at full length to a server with room for two: the others wait."""
    room = 64 - len(lab.load("tiny").tokenizer(PROMPTS[0]).input_ids)
    long = {"temperature": 0, "max_tokens": room, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(lambda _: server.complete(PROMPTS[0], **long), range(6)))


def test_the_python_that_started_it_is_killed_and_it_ends_too():
    code = "import rlhf_lab as lab; lab.serve('tiny')"
    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        end = time.monotonic() + 60
        while not (children := psutil.Process(starter.pid).children()):
            assert time.monotonic() < end and starter.poll() is None
            time.sleep(0.02)
        starter.kill()
        assert all(gone(child.pid) for child in children)


@contextmanager
def interrupted_soon():
    """As a notebook's interrupt does: SIGINT in the main thread."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
    timer.start()
    try:
        yield
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_it_starts_leaves_nothing_behind():
    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), interrupted_soon():
        lab.serve("tiny")
    assert set(psutil.Process().children()) <= before
