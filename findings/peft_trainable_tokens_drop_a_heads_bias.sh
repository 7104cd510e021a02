#!/usr/bin/env bash
# trainable_token_indices on an output head forgets its bias: a fresh adapter changes the model.
#
# Version: peft 0.21.2 with transformers 5.23.0, torch 2.13.0; Python 3.11.
# Expected: a fresh adapter changes nothing, and training it is training the model that it will be merged
#   into.
# Behaviour: the wrapper around a linear layer computes its product with the merged rows and adds no bias.
#   Models with a biased head (Phi, GPT-J, CodeGen) give other logits as soon as the adapter is there, and
#   learn so; merging brings the bias back. Nothing is said. (In trl 1.16's SFTTrainer the same wrapper on
#   a tied head raises: it "has no attribute 'bias'".)
# Remedy: modules_to_save=["lm_head"], or only the embedding's rows.
# Seen: "fresh adapter 1.29, merged 0.00: largest change of a logit; largest bias 1.29"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import torch
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM

torch.manual_seed(0)
config = PhiConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                   num_attention_heads=2)
model = PhiForCausalLM(config).eval()
torch.nn.init.normal_(model.lm_head.bias)
ids, bias = torch.tensor([[2, 3, 4, 5]]), float(model.lm_head.bias.abs().max())
tokens = {"embed_tokens": [2, 3], "lm_head": [2, 3]}
with torch.no_grad():
    before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=tokens))
    fresh = float((adapted(ids).logits - before).abs().max())
    merged = float((adapted.merge_and_unload()(ids).logits - before).abs().max())
print(f"fresh adapter {fresh:.2f}, merged {merged:.2f}: largest change of a logit; largest bias {bias:.2f}")
assert merged < 1e-6 and abs(fresh - bias) < 1e-4
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
