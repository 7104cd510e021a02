#!/usr/bin/env bash
# repetition_penalty in a padded batch punishes the end of the text, in the rows that are padded.
#
# Version: transformers 5.23.0, torch 2.13.0; Python 3.11.
# Expected: padding that attention_mask marks does not count: a prompt is continued in a batch as by itself.
# Behaviour: the penalty goes over all ids of the row, padding too, and the padding is the eos token for
#   every tokenizer that has none of its own (tokenizer.pad_token = tokenizer.eos_token). So each row that is
#   shorter than its batch's longest has a repeated eos before it began: its logit is divided (or, below
#   0, multiplied) by the penalty, and the row stops later than by itself, or never. Which rows, hangs on
#   their neighbours in the batch. Nothing is said. GRPOTrainer and RLOOTrainer, which take eos for a missing pad
#   token themselves, sample so with repetition_penalty; lengths and truncated responses grow.
# Remedy: a pad token of its own; or prompts of one length.
# Seen (mean probability of eos next, 40 prompts of 4 tokens, penalty 1.3, beside one of 9): "pad of its own: alone
#   AAA, padded BBB; pad is eos: alone CCC, padded DDD"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0
cat > "$folder/try.py" <<'P'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

EOS = 2
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=EOS)).eval()
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.2)
short = torch.randint(3, 32, (40, 4))
long = torch.randint(3, 32, (1, 9))


def end_next(ids, mask, pad):
    """Probability of eos as the first new token, after the penalty, in each row."""
    out = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, repetition_penalty=1.3, max_new_tokens=1,
                         pad_token_id=pad, eos_token_id=EOS, output_scores=True, return_dict_in_generate=True)
    return out.scores[0].softmax(-1)[:, EOS]


seen = {}
for name, pad in (("pad of its own", 0), ("pad is eos", EOS)):
    alone = end_next(short, torch.ones_like(short), pad)
    rows = torch.cat([torch.cat([torch.full((40, 5), pad), short], 1), long])
    mask = torch.ones_like(rows)
    mask[:40, :5] = 0
    seen[name] = float(alone.mean()), float(end_next(rows, mask, pad)[:40].mean())
print("; ".join(f"{name}: alone {a:.3f}, padded {b:.3f}" for name, (a, b) in seen.items()))
own, eos = seen["pad of its own"], seen["pad is eos"]
assert abs(own[0] - own[1]) < 1e-4 and abs(own[0] - eos[0]) < 1e-6
assert eos[1] < 0.9 * eos[0]
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
