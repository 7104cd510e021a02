#!/usr/bin/env bash
# transformers serve FOLDER: answers name the model FOLDER@main, and a request for that name is refused.
#
# Version: transformers 5.23.0 with torch 2.13.0 (CPU), fastapi, uvicorn, openai; Python 3.11.
# Expected: the `model` of an answer can be asked for, as with other OpenAI-compatible servers; clients,
#   load generators and routers take it from the first answer.
# Behaviour: the answer says "model@main", where "main" is a revision that a local folder has not; a
#   request with it gets 400, "pinned to 'model'". Without a hub cache /v1/models, where the name could be
#   looked up instead, answers 500.
# Remedy: leave `model` out of requests, or cut "@main" off.
# Seen: "answer of model@main; asked by that name 400, by the folder's 200; /v1/models 500".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 fastapi uvicorn openai tokenizers
cat > "$folder/try.py" <<'P'
import json, os, subprocess, sys, time, urllib.error, urllib.request
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
                                     num_hidden_layers=1, num_attention_heads=1,
                                     pad_token_id=0, eos_token_id=1))
for part in (model, tokenizer):
    part.save_pretrained("model")
PORT = 18914


def get(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data,
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


program = os.path.join(os.path.dirname(sys.executable), "transformers")
server = subprocess.Popen([program, "serve", "model", "--device", "cpu", "--host", "127.0.0.1",
                           "--port", str(PORT)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    ask = {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 2}
    _, first = get("/v1/chat/completions", ask)
    again, _ = get("/v1/chat/completions", ask | {"model": first["model"]})
    folder, _ = get("/v1/chat/completions", ask | {"model": "model"})
    listed, _ = get("/v1/models")
    print(f"answer of {first['model']}; asked by that name {again}, by the folder's {folder}; /v1/models {listed}")
finally:
    server.terminate()
    server.wait()
P
seen=$(cd "$folder" && HF_HUB_OFFLINE=1 HF_HOME="$folder/empty" env/bin/python try.py 2>/dev/null | tail -1)
echo "$seen"
[ "$seen" = "answer of model@main; asked by that name 400, by the folder's 200; /v1/models 500" ]
