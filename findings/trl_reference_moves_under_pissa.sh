#!/usr/bin/env bash
# With LoraConfig(init_lora_weights="pissa") or "olora" the reference is not the model that was given.
#
# Version: trl 1.16.0 with transformers 5.23.0, peft 0.21.2; Python 3.11.
# Expected: with peft_config, DPOTrainer (KTO, GRPO and RLOO alike) takes the model with its adapter off
#   for the reference: the model that it was given. Before the first step rewards are 0, the loss is
#   log 2 = 0.6931.
# Behaviour: these initialisations take the adapter's start out of the base's weights, so that base and
#   adapter together are the model. With the adapter off what is left is the remainder, a model that never
#   was, and that is what rewards and KL are measured from. Nothing is said.
# Remedy: init_lora_weights=True, "gaussian" or "orthogonal"; or a reference of its own (`ref_model`).
# Seen: "True 0.6931, gaussian 0.6931, orthogonal 0.6931, pissa 0.8218, olora 0.5999"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)
torch.manual_seed(0)
common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
          "logging_steps": 1, "save_strategy": "no", "max_steps": 1}
rows = [{"prompt": "a b c", "chosen": " d e f", "rejected": " g h"}] * 2


def first_loss(start):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    trainer = DPOTrainer(model, args=DPOConfig("out", per_device_train_batch_size=2, **common),
                         train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         peft_config=adapter)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


losses = {start: first_loss(start) for start in (True, "gaussian", "orthogonal", "pissa", "olora")}
print(", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
for name, loss in losses.items():
    assert (abs(loss - 0.6931) > 0.01) == (name in ("pissa", "olora")), name
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
