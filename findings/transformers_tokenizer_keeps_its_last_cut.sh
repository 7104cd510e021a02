#!/usr/bin/env bash
# A tokenizer that is saved after a call with truncation or padding cuts and pads, for whoever reads tokenizer.json.
#
# Version: transformers 5.23.0 with tokenizers 0.23.3; Python 3.11.
# Expected: truncation=True, max_length=3 is of one call. What save_pretrained writes beside a model is how texts
#   become tokens, whatever was tokenised last.
# Behaviour: the call sets the limit in the backend, and save_pretrained writes it into tokenizer.json. transformers
#   resets it at each call and shows nothing; tokenizers' own Tokenizer.from_file, and servers and browsers that are
#   built on it, cut each text to the length of that last batch (an evaluation's, a length filter's), or fill it up
#   with padding tokens and no remark. The same script that saves before its last call writes another file.
# Remedy: tokenizer.backend_tokenizer.no_truncation() and .no_padding() before save_pretrained; or the same two
#   after Tokenizer.from_file.
# Seen (tokens of a text of six by tokenizers, by transformers, from the saved folder): "after no call 6 6, after
#   truncation to 3: 3 6, after padding to 12: 12 6, after a plain call 6 6"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/try.py" <<'P'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
text, seen = "a b c d e f", {}


def saved(**call):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    if call:
        tokenizer([text], **call)
    tokenizer.save_pretrained("folder")
    by_tokenizers = Tokenizer.from_file("folder/tokenizer.json").encode(text).ids
    return len(by_tokenizers), len(AutoTokenizer.from_pretrained("folder")(text).input_ids)


seen["no call"] = saved()
seen["truncation to 3:"] = saved(truncation=True, max_length=3)
seen["padding to 12:"] = saved(padding="max_length", max_length=12)
seen["a plain call"] = saved(truncation=False, padding=False)
print(", ".join(f"after {what} {a} {b}" for what, (a, b) in seen.items()))
assert list(seen.values()) == [(6, 6), (3, 6), (12, 6), (6, 6)]
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
