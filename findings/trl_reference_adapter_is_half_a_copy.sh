#!/usr/bin/env bash
# The reference of a trained adapter is not that adapter where its weights lie in a ParameterDict.
#
# Version: trl 1.16.0 with transformers 5.23.0, peft 0.21.2; Python 3.11.
# Expected: DPOTrainer (KTO, GRPO and RLOO alike) given a trained PeftModel keeps a frozen copy, "ref", so
#   that before the first step policy and reference are one: rewards 0, loss log 2 = 0.6931.
# Behaviour: weights are copied where a name holds ".default.". A LoRA of an embedding
#   (lora_embedding_A.default), (IA)3 (ia3_l.default) and trainable_token_indices
#   (trainable_tokens_delta.default) end in the adapter's name: their copy keeps fresh values. Rewards,
#   margins and KL are measured from a model that never was, without a word. Linear LoRA and DoRA are right.
# Remedy: copy parameters whose names end in ".default" to their ".ref" after making the trainer; or
#   merge the adapter into the base, and train a new one.
# Seen: "linear 0.6931, embedding 0.4902, ia3 0.6019, tokens 0.8883"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
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


def first_loss(adapter):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model = get_peft_model(model, adapter)
    for weight in model.parameters():  # as training leaves it
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight)
    trainer = DPOTrainer(model, args=DPOConfig("out", per_device_train_batch_size=2, **common),
                         train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


losses = {
    "linear": first_loss(LoraConfig(r=4, target_modules=["q_proj"])),
    "embedding": first_loss(LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])),
    "ia3": first_loss(IA3Config(target_modules=["k_proj", "v_proj", "down_proj"],
                                feedforward_modules=["down_proj"])),
    "tokens": first_loss(LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[2, 3, 4])),
}
print(", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
assert abs(losses.pop("linear") - 0.6931) < 1e-3
assert all(abs(loss - 0.6931) > 0.01 for loss in losses.values())
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
