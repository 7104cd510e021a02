#!/usr/bin/env bash
# return_assistant_tokens_mask: where a turn's first or last character has no token, later turns are marked wrongly.
#
# Version: transformers 5.23.0 with tokenizers 0.23.3; Python 3.11.
# Expected: apply_chat_template marks the tokens of the assistant's turns ({% generation %}), whatever else
#   happens: turns that truncation_side="left" cuts off are gone, and those that are left are marked.
# Behaviour: the token of a turn's first character is asked for, and where there is none the loop over the turns
#   ends. Cut on the right that costs nothing; cut on the left, where it is the earliest turn that is
#   gone, every later turn is left unmarked as well: the row teaches nothing, without a word.
#   Where the last character has no token (a space or line break before {% endgeneration %}, and a tokenizer
#   that drops whitespace, as WordPiece and Whitespace do) the mask runs to the end of the row, over all that the
#   user says later.
# Met by: training on the assistant's turns alone; TRL's SFTTrainer(assistant_only_loss=True) takes this mask (it
#   cuts rows afterwards, so that only the second part is met there).
# Remedy: mask first, and cut the lists afterwards; {% endgeneration %} right behind a visible character.
# Seen (tokens marked of "u a b A c d <eos> u e f A g h <eos>"): "whole: c d <eos> g h <eos>; right 11: c d <eos>;
#   left 11: c d <eos> g h <eos>; left 8: none; space before endgeneration: c d <eos> u e f A g h <eos>"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 jinja2
cat > "$folder/try.py" <<'P'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = {w: i for i, w in enumerate("<pad> <eos> u A a b c d e f g h".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A {% generation %}{{ m['content'] }} <eos>HERE"
    "{% endgeneration %}{% else %}u {{ m['content'] }}{% endif %} {% endfor %}"
)
chat = [{"role": role, "content": text} for role, text in
        (("user", "a b"), ("assistant", "c d"), ("user", "e f"), ("assistant", "g h"))]


def marked(end="", side="right", length=None):
    tokenizer.chat_template, tokenizer.truncation_side = TEMPLATE.replace("HERE", end), side
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True,
                                        truncation=length is not None, max_length=length)
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"])
    return " ".join(t for t, m in zip(tokens, out["assistant_masks"], strict=True) if m) or "none"


seen = {
    "whole": marked(),
    "right 11": marked("", "right", 11),
    "left 11": marked("", "left", 11),
    "left 8": marked("", "left", 8),
    "space before endgeneration": marked(" "),
}
print("; ".join(f"{what}: {tokens}" for what, tokens in seen.items()))
assert list(seen.values()) == [
    "c d <eos> g h <eos>", "c d <eos>", "c d <eos> g h <eos>", "none", "c d <eos> u e f A g h <eos>"
]
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
