#!/usr/bin/env bash
# precompute_ref_log_probs: a second run takes the figures of the first, made under other settings.
#
# Version: trl 1.16.0 with transformers 5.23.0, datasets 5.2.0; Python 3.11.
# Expected: log-probabilities of the reference are found again for the same rows, model and settings. Before
#   the first step policy and reference are one: loss log 2 = 0.6931, whatever ld_alpha and max_length are.
# Behaviour: the file beside the data set's cache is named by rows and weights alone. `ld_alpha` (LD-DPO: how
#   much of the longer answer's end counts) and, with truncation_mode="keep_end", `max_length` change the sums
#   and not the name: in a sweep each run after the first learns from a reference that is cut or weighed as
#   in the first, without a word. (With "keep_start" and a max_length a step in between happens to depend
#   on all settings; max_length=None has no such step.)
# Met with data sets that have a cache: load_dataset, load_from_disk. Dataset.from_list has none.
# Remedy: precompute_ref_log_probs=False, or a cache_dir for each run.
# Seen: "ld_alpha None 0.6931, 0.5 0.5998, in each step 0.6931; keep_end 8 0.6931, 6 0.8743, in each step 0.6931"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
import json
from pathlib import Path

import torch
from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)
common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
          "logging_steps": 1, "save_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 2}
row = {"prompt": "a b c", "chosen": " d e f", "rejected": " g h"}
Path("pairs.jsonl").write_text("\n".join(json.dumps(row) for _ in range(2)))


def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(config)
    for weight in made.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return made


def first_loss(cache, ahead=True, **settings):
    rows = load_dataset("json", data_files="pairs.jsonl", split="train", cache_dir=cache)
    args = DPOConfig("out", precompute_ref_log_probs=ahead, **common, **settings)
    trainer = DPOTrainer(model(), ref_model=model(), args=args, train_dataset=rows,
                         processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


alphas = [first_loss("one", ld_alpha=a, max_length=None) for a in (None, 0.5)]
alphas.append(first_loss("one", ahead=False, ld_alpha=0.5, max_length=None))
cuts = [first_loss("two", truncation_mode="keep_end", max_length=n) for n in (8, 6)]
cuts.append(first_loss("two", ahead=False, truncation_mode="keep_end", max_length=6))
print("ld_alpha None {:.4f}, 0.5 {:.4f}, in each step {:.4f}; "
      "keep_end 8 {:.4f}, 6 {:.4f}, in each step {:.4f}".format(*alphas, *cuts))
for first, later, right in (alphas, cuts):
    assert max(abs(loss - 0.6931) for loss in (first, right)) < 1e-4 < 0.05 < abs(later - 0.6931)
P
cd "$folder" && HF_HUB_OFFLINE=1 HF_HOME="$folder/home" env/bin/python try.py 2>/dev/null | tail -1
