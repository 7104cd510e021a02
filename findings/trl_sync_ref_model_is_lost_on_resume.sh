#!/usr/bin/env bash
# sync_ref_model: a resumed run goes on with the reference of the beginning.
#
# Version: trl 1.16.0 with transformers 5.23.0; Python 3.11.
# Expected: a run that is resumed from a checkpoint goes on as the unbroken one (same data, same seed):
#   with sync_ref_model=True from the reference as it was last moved.
# Behaviour: checkpoints hold the policy alone. The resumed trainer's reference is the initial model, up to
#   the next ref_model_sync_steps: losses, rewards and gradients are others, without a word. With
#   ref_model_mixup_alpha below 1 the mixture of before never comes back. Seen in DPO; KTO, GRPO and RLOO
#   have the same callback.
# Remedy: save trainer.ref_model beside each checkpoint, and load it before resuming.
# Seen: "step 5: unbroken loss 0.6931 reward 0.00, resumed loss 0.0581 reward 0.90"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
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
model = LlamaForCausalLM(config)
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.3)
model.save_pretrained("base")
rows = [{"prompt": "a b c", "chosen": " d e f", "rejected": " g h"},
        {"prompt": "b c", "chosen": " i j", "rejected": " k l m"}] * 8
args = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 3e-2, "max_steps": 5,
        "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4,
        "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}


def fifth(checkpoint=None):
    trainer = DPOTrainer(LlamaForCausalLM.from_pretrained("base"), args=DPOConfig("out", **args),
                         train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint)
    (line,) = [x for x in trainer.state.log_history if x["step"] == 5 and "loss" in x]
    return line["loss"], line["rewards/chosen"]


unbroken, resumed = fifth(), fifth("out/checkpoint-4")
print(f"step 5: unbroken loss {unbroken[0]:.4f} reward {unbroken[1]:.2f}, "
      f"resumed loss {resumed[0]:.4f} reward {resumed[1]:.2f}")
assert abs(unbroken[0] - 0.6931) < 1e-3 and abs(resumed[0] - 0.6931) > 0.05
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
