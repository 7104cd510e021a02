#!/usr/bin/env bash
# load_adapter under a name that is taken loads the new weights under the old lora_alpha; merging anew does nothing.
#
# Version: peft 0.21.2 with transformers 5.23.0, torch 2.13.0; Python 3.11.
# Expected: model.load_adapter(folder, "default") makes "default" what lies in the folder (its config and weights), or
#   says that the name is taken, as `add_adapter` and add a new name do.
# Behaviour: where the name is taken the folder's adapter_config.json is not read. Weights of the same shapes go in
#   under the old lora_alpha, use_rslora and alpha_pattern ("All keys matched successfully"); of other layers, those
#   that the old adapter has not are left out, and those that the folder has not keep the last adapter's weights.
#   add_weighted_adapter under a taken name returns at once: other weights in the same cell give the same model.
# Met by comparing the checkpoints of a sweep in one process, and by running a notebook's cell again.
# Remedy: delete_adapter(name) before; or a name for each.
# Seen (largest error of a logit, as a share of the change that the folder's adapter makes): "same settings: 0.00,
#   alpha 32 for 8: 0.80, rslora: 0.63, more layers: 0.82, fewer layers: 2.10; merging with weights 1.0 and then 0.1
#   under one name: 0.00 between them"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.tensor([[1, 2, 3, 4, 5]])


def base():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def save(name, **kind):
    """An adapter as training leaves it, in a folder: its logits."""
    config = LoraConfig(**{"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **kind})
    model = get_peft_model(base(), config).eval()
    torch.manual_seed(1 + len(name))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(name)
    return model(ids).logits.detach()


save("first")
kinds = {"same settings": {}, "alpha 32 for 8": {"lora_alpha": 32}, "rslora": {"use_rslora": True},
         "more layers": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
         "fewer layers": {"target_modules": ["q_proj"]}}
plain, found = base()(ids).logits.detach(), {}
for name, kind in kinds.items():
    right = save(name, **kind)
    model = PeftModel.from_pretrained(base(), "first").eval()
    model.load_adapter(name, "default")
    found[name] = float((model(ids).logits - right).abs().max() / (right - plain).abs().max())

model = PeftModel.from_pretrained(base(), "first").eval()
merged = []
for weight in (1.0, 0.1):
    model.add_weighted_adapter(["default"], [weight], "merged", combination_type="cat")
    model.set_adapter("merged")
    merged.append(model(ids).logits.detach())
same = float((merged[0] - merged[1]).abs().max())
print(", ".join(f"{name}: {error:.2f}" for name, error in found.items())
      + f"; merging with weights 1.0 and then 0.1 under one name: {same:.2f} between them")
assert found.pop("same settings") < 1e-5 and min(found.values()) > 0.1 and same == 0
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
