#!/usr/bin/env bash
# litellm's cache: another server, min_p, or thinking switched off, and the answer is the stored one.
#
# Version: litellm 1.110.2; Python 3.11 (of parameters: BerriAI/litellm#42400, open).
# Expected: with litellm.cache = Cache() the same request is answered from the cache; one that differs is sent.
# Behaviour: the key is made of the parameters that OpenAI's API has (temperature, seed, …) and of few more. What else is
#   sent is no part of it: extra_body with min_p or chat_template_kwargs (enable_thinking), guided_json, and the server
#   itself, api_base. Of two checkpoints that are served under one name, of thinking on and off, of settings of
#   sampling, all but the first are given the first one's answers, without a word: equal scores.
#   (completion() asks the cache so; a stored answer needs fastapi and soundfile there, of litellm[proxy].)
# Remedy: litellm.enable_caching_on_provider_specific_optional_params = True for parameters; for servers
#   cache={"namespace": …} in each call, or a model name for each.
# Seen: "same again: stored, temperature: sent, seed: sent, min_p in extra_body: stored, thinking off: stored, other server:
#   stored; with the remedy: stored, sent, sent, sent, sent, sent"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet litellm==1.110.2
cat > "$folder/try.py" <<'P'
import litellm
from litellm.caching.caching import Cache

REQUEST = {"model": "openai/policy", "messages": [{"role": "user", "content": "Hi"}], "api_base": "http://one/v1"}
CHANGES = {
    "same again": {},
    "temperature": {"temperature": 0.5},
    "seed": {"seed": 1},
    "min_p in extra_body": {"extra_body": {"min_p": 0.1}},
    "thinking off": {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    "other server": {"api_base": "http://two/v1"},
}


def outcomes(namespace=lambda request: None):
    """Whether the cache has an answer to a request that differs by one thing from the one it knows."""

    def of(change):
        request = {**REQUEST, **change}
        name = namespace(request)
        return {**request, **({"cache": {"namespace": name}} if name else {})}

    seen = []
    for change in CHANGES.values():
        cache = Cache()
        cache.add_cache({"content": "the first one's answer"}, **of({}))
        seen.append("sent" if cache.get_cache(**of(change)) is None else "stored")
    return seen


plain = outcomes()
litellm.enable_caching_on_provider_specific_optional_params = True
mended = outcomes(namespace=lambda request: request["api_base"])
print(", ".join(f"{name}: {how}" for name, how in zip(CHANGES, plain)) + f"; with the remedy: {', '.join(mended)}")
assert plain == ["stored", "sent", "sent", "stored", "stored", "stored"]
assert mended == ["stored", "sent", "sent", "sent", "sent", "sent"]
P
LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/env/bin/python" "$folder/try.py" 2>/dev/null | tail -1
