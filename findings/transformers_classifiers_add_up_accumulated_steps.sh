#!/usr/bin/env bash
# Trainer on a classifier or a scorer: gradient_accumulation_steps=8 makes gradient and logged loss eight times as large.
#
# Version: transformers 5.23.0 with accelerate 1.15.0, datasets 5.2.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: eight batches of one row, accumulated, are one batch of eight: the same gradient, the same loss in the log.
# Behaviour: a model whose forward takes **kwargs is trusted to divide its loss by num_items_in_batch, and Trainer then
#   divides no more. Models …ForSequenceClassification and …ForTokenClassification take **kwargs and pass nothing on:
#   theirs is the mean of each batch, and eight of them are added up. BERT, GPT-2, Llama and others alike, for
#   classes and for scores. eval_loss is right, so training looks eight times worse than evaluation. AdamW hides a
#   part of it; max_grad_norm=1 cuts nearly every step then, and SGD takes steps of eight times the size. Language
#   models (their loss is divided) are right, and so is TRL's RewardTrainer, which says that its loss is its own.
# Remedy: trainer.model_accepts_loss_kwargs = False; or batches without accumulation.
# Seen (gradient and logged loss of 8 x 1 rows, as a multiple of 1 x 8):
#   "bert classes 8.00 8.00, bert scores 8.00 8.00, llama classes 8.00 8.00, llama scores 8.00 8.00, llama tokens 8.00
#   8.00, llama language model 1.00 1.00; with the remedy: llama scores 1.00 1.00"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainingArguments,
)

SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
             max_position_embeddings=32, pad_token_id=0)
CASES = {
    "bert classes": (BertForSequenceClassification, BertConfig, 3, lambda i, ids: i % 3),
    "bert scores": (BertForSequenceClassification, BertConfig, 1, lambda i, ids: i / 3),
    "llama classes": (LlamaForSequenceClassification, LlamaConfig, 3, lambda i, ids: i % 3),
    "llama scores": (LlamaForSequenceClassification, LlamaConfig, 1, lambda i, ids: i / 3),
    "llama tokens": (LlamaForTokenClassification, LlamaConfig, 3, lambda i, ids: [x % 3 for x in ids]),
    "llama language model": (LlamaForCausalLM, LlamaConfig, 2, lambda i, ids: ids),
}


def one_step(case, steps, remedy=False):
    """Size of the gradient (of one step of SGD at rate 1) and the logged loss."""
    model_class, config_class, labels, label = CASES[case]
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if config_class is BertConfig else {}
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL, **dropout, num_labels=labels))
    ids = torch.randint(2, 64, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_list([{"input_ids": x, "attention_mask": [1] * 6, "labels": label(i, x)}
                              for i, x in enumerate(ids)])
    args = TrainingArguments("out", per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
                             max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd",
                             max_grad_norm=0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Trainer(model, args, train_dataset=rows)
    if remedy:
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters())]).norm()
    return float(moved), next(line["loss"] for line in trainer.state.log_history if "loss" in line)


def multiples(case, remedy=False):
    (gradient, loss), (whole, whole_loss) = one_step(case, 8, remedy), one_step(case, 1, remedy)
    return gradient / whole, loss / whole_loss


seen = {case: multiples(case) for case in CASES}
mended = multiples("llama scores", remedy=True)
print(", ".join(f"{case} {g:.2f} {x:.2f}" for case, (g, x) in seen.items())
      + f"; with the remedy: llama scores {mended[0]:.2f} {mended[1]:.2f}")
for case, values in seen.items():
    expected = 1 if case == "llama language model" else 8
    assert all(abs(v - expected) < 0.01 * expected for v in values), (case, values)
assert all(abs(v - 1) < 0.01 for v in mended), mended
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
