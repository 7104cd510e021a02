#!/usr/bin/env bash
# merge_and_unload of a LoRA with layer_replication writes each copy's adapter into the same weights.
#
# Version: peft 0.21.2 with transformers 5.23.0, torch 2.13.0; Python 3.11.
# Expected: merging gives a model of plain layers that computes what the adapted one did, or refuses, as it does where
#   it cannot (lora_bias on layers without bias, tied weights with a warning).
# Behaviour: layer_replication=[[0, 2], [1, 3]] makes four layers of three; copies share the base's weights, and have
#   adapters of their own. Merging adds both copies' adapters to the one shared weight: after it both layers have the
#   sum of both. merge_adapter does the same until unmerge_adapter. What is saved and served is not what was trained.
#   Adding or loading a second such adapter picks layers once more, out of those that were picked: "default" is
#   another model from then on. Nothing is said.
# Remedy: give each copy its weights first (clone the parameters of layers that share them), then merge; and one
#   replicated adapter in a model.
# Seen (largest error of a logit as a share of the adapter's largest change): "merged 0.49, merged after cloning 0.00;
#   with a second adapter beside it 0.79"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.tensor([[1, 2, 3, 4, 5]])
config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], layer_replication=[[0, 2], [1, 3]])


def base():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                         num_attention_heads=2)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


model = get_peft_model(base(), copy.deepcopy(config)).eval()
start = model(ids).logits.detach()
for weight in model.parameters():  # as training leaves it
    if weight.requires_grad:
        weight.data += 0.1 * torch.randn_like(weight)
model.save_pretrained("adapter")
trained = model(ids).logits.detach()
change = (trained - start).abs().max()


@torch.no_grad()
def error(model):
    return float((model(ids).logits - trained).abs().max() / change)


def loaded():
    return PeftModel.from_pretrained(base(), "adapter").eval()


assert error(loaded()) < 1e-5
merged = error(loaded().merge_and_unload())
cloned = loaded()
for module in cloned.modules():
    if hasattr(module, "base_layer"):
        module.base_layer.weight = torch.nn.Parameter(module.base_layer.weight.detach().clone())
cloned = error(cloned.merge_and_unload())
two = loaded()
two.add_adapter("second", copy.deepcopy(config))
two.set_adapter("default")
beside = error(two.eval())
print(f"merged {merged:.2f}, merged after cloning {cloned:.2f}; with a second adapter beside it {beside:.2f}")
assert merged > 0.1 and cloned < 1e-4 and beside > 0.1
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
