#!/usr/bin/env bash
# litellm's cache: another server, min_p, or thinking switched off, and the answer is the stored one.
#
# Version: litellm 1.110.2 with soundfile 0.14.0, which its cache imports; Python 3.11 (of parameters:
#   BerriAI/litellm#42400, open).
# Expected: with litellm.cache = Cache() the same request is answered from the cache; one that differs is sent.
# Behaviour: the key is made of the parameters that OpenAI's API has (temperature, seed, …) and of few more. What else is
#   sent is no part of it: extra_body with min_p or chat_template_kwargs (enable_thinking), guided_json, and the server
#   itself, api_base. Of two checkpoints that are served under one name, of thinking on and off, of settings of
#   sampling, all but the first are given the first one's answers, without a word: equal scores.
# Remedy: litellm.enable_caching_on_provider_specific_optional_params = True for parameters; for servers
#   cache={"namespace": …} in each call, or a model name for each.
# Seen: "same again: stored, temperature: sent, seed: sent, min_p in extra_body: stored, thinking off: stored, other server:
#   stored; with the remedy: stored, sent, sent, sent, sent, sent"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet litellm==1.110.2 soundfile==0.14.0
cat > "$folder/try.py" <<'P'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import litellm
from litellm.caching.caching import Cache

sent = []


def serve(name):
    """A server that answers with its name, and keeps what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent.append(request)
            message = {"role": "assistant", "content": f"{name} {len(sent)}"}
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "policy",
                               "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                               "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


first, second = serve("first"), serve("second")
litellm.cache = Cache()


def answer(server=first, **settings):
    reply = litellm.completion(model="openai/policy", api_base=server, api_key="none", caching=True,
                               messages=[{"role": "user", "content": "Hi"}], **settings)
    return reply.choices[0].message.content


CHANGES = {
    "same again": {},
    "temperature": {"temperature": 0.5},
    "seed": {"seed": 1},
    "min_p in extra_body": {"extra_body": {"min_p": 0.1}},
    "thinking off": {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    "other server": {"server": second},
}
stored = answer()
seen = {}
for name, change in CHANGES.items():
    before = len(sent)
    reply = answer(**change)
    seen[name] = "sent" if len(sent) > before else "stored"
    assert (reply == stored) == (seen[name] == "stored")
litellm.cache, litellm.enable_caching_on_provider_specific_optional_params = Cache(), True
answer(cache={"namespace": "first"})
mended = {}
for name, change in CHANGES.items():
    before = len(sent)
    answer(**change, cache={"namespace": "second" if "server" in change else "first"})
    mended[name] = "sent" if len(sent) > before else "stored"
print(", ".join(f"{name}: {how}" for name, how in seen.items()) + f"; with the remedy: {', '.join(mended.values())}")
assert list(seen.values()) == ["stored", "sent", "sent", "stored", "stored", "stored"]
assert list(mended.values()) == ["stored", "sent", "sent", "sent", "sent", "sent"]
P
LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/env/bin/python" "$folder/try.py" 2>/dev/null | tail -1
