#!/usr/bin/env bash
# add_weighted_adapter of rsLoRA, DoRA or PiSSA adapters: another model, and with PiSSA the base is changed as well.
#
# Version: peft 0.21.2 with transformers 5.23.0, torch 2.13.0; Python 3.11.
# Expected: combination_type "cat" or "svd" of one adapter with weight 1 is that adapter ("precise methods", as the
#   documentation says), as it is for plain LoRA with any lora_alpha.
# Behaviour: the new adapter takes the first one's config, with r and lora_alpha set to the new rank so that its scale
#   is 1. With use_rslora=True the scale is lora_alpha / sqrt(r): what was merged counts sqrt(r) times. With
#   use_dora=True the trained magnitudes are not taken along. With init_lora_weights="pissa" or "olora" the new
#   adapter is initialised as such, which takes a part out of the base's weights: the adapters that were there, and
#   the base with adapters off, are other models from then on. Nothing is said.
# Remedy: merge the weights by hand (W + the sum of get_delta_weight); PiSSA: save with
#   path_initial_model_for_weight_conversion, and merge the plain LoRA.
# Seen (largest error of a logit as a share of the adapter's largest change: merged adapter, first adapter, base):
#   "plain 0.00 0.00 0.00, rslora 0.88 0.00 0.00, dora 0.25 0.00 0.00, pissa 1.33 1.33 1.51"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids, layers = torch.tensor([[1, 2, 3, 4, 5]]), ["q_proj", "v_proj", "up_proj", "down_proj"]


def base():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@torch.no_grad()
def errors(**kind):
    plain = base()(ids).logits
    model = get_peft_model(base(), LoraConfig(r=8, lora_alpha=16, target_modules=layers, **kind), "first").eval()
    for weight in model.parameters():  # as training leaves it
        if weight.requires_grad:
            weight += 0.1 * torch.randn_like(weight)

    def logits(adapter=None):
        if adapter is None:
            with model.disable_adapter():
                return model(ids).logits
        model.set_adapter(adapter)
        return model(ids).logits

    trained, off = logits("first"), logits()
    model.add_weighted_adapter(["first"], [1.0], "merged", combination_type="cat")
    change = (trained - plain).abs().max()
    found = [(logits("merged"), trained), (logits("first"), trained), (logits(), off)]
    return [float((now - then).abs().max() / change) for now, then in found]


kinds = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
         "pissa": {"init_lora_weights": "pissa"}}
found = {name: errors(**kind) for name, kind in kinds.items()}
print(", ".join(f"{name} " + " ".join(f"{error:.2f}" for error in errors) for name, errors in found.items()))
assert max(found["plain"]) < 1e-4 and min(found["pissa"]) > 0.1
for kind in ("rslora", "dora"):
    assert found[kind][0] > 0.1 and max(found[kind][1:]) < 1e-4
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
