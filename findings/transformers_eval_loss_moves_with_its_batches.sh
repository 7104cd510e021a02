#!/usr/bin/env bash
# eval_loss of a language model is no mean over tokens: it moves with per_device_eval_batch_size.
#
# Version: transformers 5.23.0 with torch 2.13.0 (CPU), accelerate 1.15.0, datasets 5.2.0; Python 3.11.
# Expected: at the same weights, over the same rows, loss and eval_loss are one number, the mean over all tokens
#   that are learned, as the training loss has been since num_items_in_batch, however a batch is cut.
# Behaviour: the training loss is. eval_loss takes the mean over the tokens of each batch, and the mean of those, each
#   weighted by its rows: in batches of one a short answer counts as much as a long one, in one batch of all rows
#   each token counts alike. Held-out loss and perplexity of two runs differ with a setting that is there for memory,
#   lie below or above the training loss without any overfitting, and pick other checkpoints
#   (load_best_model_at_end). SFTTrainer does alike.
# Remedy: one eval batch size for all that is compared; or sum and count tokens in compute_metrics.
# Seen (six rows of 2 tokens, two of 60, random weights): "by hand 4.108 a token; accumulated over 8, 4, 2 and 1 batches:
#   loss 4.108 4.108 4.108 4.108, eval_loss 3.636 3.636 3.744 4.108"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4)).eval()
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.2)
draw = torch.Generator().manual_seed(0)
rows = [{"input_ids": torch.randint(3, 32, (n,), generator=draw).tolist()} for n in [2] * 6 + [60] * 2]


def padded(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    cells = [{"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]),
              "labels": row["input_ids"]} for row in batch]
    return {k: torch.tensor([c[k] + [fill] * (longest - len(c[k])) for c in cells]) for k, fill in filled.items()}


total, count = 0.0, 0
with torch.no_grad():
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        total, count = total - float(logps.sum()), count + len(logps)
seen = []
for batch in (1, 2, 4, 8):
    args = TrainingArguments("out", use_cpu=True, report_to=[], per_device_eval_batch_size=batch, max_steps=1,
                             per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
                             learning_rate=0.0, logging_steps=1, save_strategy="no")
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=padded)
    held_out = trainer.evaluate()["eval_loss"]
    trainer.train()
    seen.append((next(line["loss"] for line in trainer.state.log_history if "loss" in line), held_out))
losses, held_out = zip(*seen, strict=True)
told = [" ".join(f"{x:.3f}" for x in found) for found in (losses, held_out)]
print(f"by hand {total / count:.3f} a token; accumulated over 8, 4, 2 and 1 batches: loss {told[0]}, eval_loss {told[1]}")
assert all(abs(loss - total / count) < 1e-3 for loss in losses)
assert held_out[0] < held_out[2] - 0.05 < held_out[3] - 0.3 and abs(held_out[3] - total / count) < 1e-3
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | grep "by hand"
