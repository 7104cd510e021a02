#!/usr/bin/env bash
# RewardTrainer's eval_accuracy is not the share of pairs that are ranked rightly.
#
# Version: trl 1.16.0 with transformers 5.23.0; Python 3.11.
# Expected: of nine held-out pairs eight are right: eval_accuracy .889, as eval_loss is the mean of nine.
# Behaviour: eval_loss counts rows. Accuracy, margin and mean reward of the same line are means of batches,
#   each with the same weight: with per_device_eval_batch_size=8 the ninth pair, in a batch of its own,
#   counts as much as the eight others together. DPO's and KTO's eval_rewards/… and eval_logps/… are made
#   alike. The figure moves with the batch size, at the same weights.
# Remedy: a number of rows that the batch divides, or batches of one; or count from predictions.
# Seen: "batches of 8: loss 0.403 accuracy 0.500, batches of 3: loss 0.403 accuracy 0.889, of 1: 0.403 0.889"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import itertools

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                     num_attention_heads=2, pad_token_id=0, eos_token_id=1)
torch.manual_seed(0)
config.num_labels = 1
model = LlamaForSequenceClassification(config).eval()
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.3)


@torch.no_grad()
def score(text):
    return float(model(torch.tensor([[words[text], 1]])).logits)


pairs = list(itertools.permutations("abcdefghij", 2))
right = [pair for pair in pairs if score(pair[0]) > score(pair[1])]
wrong = [pair for pair in pairs if score(pair[0]) < score(pair[1])]
rows = Dataset.from_list([{"chosen": c, "rejected": r} for c, r in right[:8] + wrong[:1]])
seen = []
for batch in (8, 3, 1):
    args = RewardConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=batch)
    trainer = RewardTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    figures = trainer.evaluate()
    seen.append((batch, figures["eval_loss"], figures["eval_accuracy"]))
print(", ".join(f"batches of {b}: loss {x:.3f} accuracy {a:.3f}" for b, x, a in seen))
assert max(x for _, x, _ in seen) - min(x for _, x, _ in seen) < 1e-4
assert [round(a, 3) for *_, a in seen] == [0.5, 0.889, 0.889]
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
