#!/usr/bin/env bash
# GRPOTrainer and RLOOTrainer sample with dropout on, a LoRA's included.
#
# Version: trl 1.16.0 with transformers 5.23.0, peft 0.21.2; Python 3.11.
# Expected: what is sampled is the policy's, as `model.generate` gives it: at a temperature near 0 all
#   responses to a prompt are one; and RLOO's ratio before the first step is 1, nothing is clipped.
# Behaviour: the model is in training mode while it samples and while its old log-probabilities are taken.
#   `disable_dropout` is False here, other than in DPO, KTO and the reward trainer. With
#   LoraConfig(lora_dropout=0.1) or GPT-2's own dropout each response comes from another thinned model, and
#   RLOO clips before anything has been learned (GRPO takes the ratio for 1 there and shows nothing).
# Remedy: disable_dropout=True.
# Seen: "GRPO: 1 greedy response without dropout, 6 with; RLOO clips 0.00 without, 0.62 with"
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
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)
torch.manual_seed(0)
common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
          "logging_steps": 1, "save_strategy": "no", "max_steps": 1, "beta": 0.0}
common |= {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 8}


def sampled(trainer, settings, **more):
    torch.manual_seed(0)
    model, responses = LlamaForCausalLM(config), []
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)

    def reward(completion_ids, **_):
        responses.extend(map(tuple, completion_ids))
        return [float(len(set(ids))) for ids in completion_ids]

    adapter = LoraConfig(r=4, lora_dropout=0.1, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    made = trainer(model, reward, args=settings("out", temperature=more.pop("temperature", 1.0), **common, **more),
                   train_dataset=Dataset.from_list([{"prompt": "a b c"}] * 8), processing_class=tokenizer,
                   peft_config=adapter)
    made.train()
    return len(set(responses)), made.state.log_history[0]["clip_ratio/region_mean"]


greedy = [sampled(GRPOTrainer, GRPOConfig, temperature=1e-4, disable_dropout=off)[0] for off in (True, False)]
clipped = [sampled(RLOOTrainer, RLOOConfig, disable_dropout=off)[1] for off in (True, False)]
print(f"GRPO: {greedy[0]} greedy response without dropout, {greedy[1]} with; "
      f"RLOO clips {clipped[0]:.2f} without, {clipped[1]:.2f} with")
assert greedy[0] == 1 < greedy[1] and clipped[0] == 0 < clipped[1]
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
