#!/usr/bin/env bash
# RewardTrainer with a LoraConfig that names no task trains and saves a reward model without its head.
#
# Version: trl 1.16.0 with transformers 5.23.0, peft 0.21.2; Python 3.11.
# Expected: RewardTrainer(peft_config=LoraConfig(r=8)) trains the adapters and the new score head, and
#   save_model keeps both: it makes the sequence classifier itself, and knows that the head is random.
# Behaviour: only with task_type="SEQ_CLS" does peft train and save the head. Without a task_type, which is
#   peft's default, the head stays what chance made it, and the adapter's file has none. The loss falls
#   all the same. Whoever loads the adapter gets a new random head: scores of another model. Nothing is
#   said in training ("CAUSAL_LM" raises).
# Remedy: task_type="SEQ_CLS", or modules_to_save=["score"].
# Seen (order of 45 pairs of texts kept by the loaded model): "None: head saved False, order kept of 18;
#   SEQ_CLS: head saved True, order kept of 45"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import itertools

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)
torch.manual_seed(0)
base = LlamaForCausalLM(config)
for weight in base.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.3)
base.save_pretrained("base")
tokenizer.save_pretrained("base")
rows = Dataset.from_list([{"chosen": "a b c d", "rejected": "a b e"}] * 8)


@torch.no_grad()
def scores(model):
    return [float(model.eval()(torch.tensor([[words[w], 1]])).logits) for w in "abcdefghij"]


def kept(task):
    """→ whether the head was saved, of how many pairs the loaded model keeps the order."""
    args = RewardConfig(f"out-{task}", use_cpu=True, bf16=False, gradient_checkpointing=False,
                        report_to="none", save_strategy="no", max_steps=2, seed=1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task)
    trainer = RewardTrainer("base", args, train_dataset=rows, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    names = load_file(f"out-{task}/adapter_model.safetensors")
    torch.manual_seed(2)  # another process
    again = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)
    before, after = scores(trainer.model), scores(PeftModel.from_pretrained(again, f"out-{task}"))
    pairs = itertools.combinations(range(10), 2)
    same = sum((before[i] > before[j]) == (after[i] > after[j]) for i, j in pairs)
    return any("score" in name for name in names), same


seen = {task: kept(task) for task in (None, "SEQ_CLS")}
print("; ".join(f"{t}: head saved {saved}, order kept of {same}" for t, (saved, same) in seen.items()))
assert seen["SEQ_CLS"] == (True, 45) and not seen[None][0] and seen[None][1] < 40
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
