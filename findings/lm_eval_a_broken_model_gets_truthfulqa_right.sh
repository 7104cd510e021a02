#!/usr/bin/env bash
# lm-evaluation-harness: a model whose logits are all NaN answers 100 % of TruthfulQA (mc1) and BLiMP rightly.
#
# Version: lm_eval 0.4.13 with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: a model that overflowed (fp16, a bad merge, a diverged run) has no log-likelihoods: accuracy is nan or 0, or
#   an error says that they are no numbers, as perplexity is nan.
# Behaviour: the answer is numpy's argmax of the choices' log-likelihoods, and of NaN it is the first choice. So accuracy
#   is the share of rows whose first choice is right: about one in four where answers are spread, which looks like an
#   untrained model, and all of them in tasks that list the right one first (doc_to_target: 0: truthfulqa_mc1, all of
#   BLiMP). acc_norm does the same, standard errors are given, nothing is said.
# Remedy: log_samples=True, and a look whether resps are finite; torch.isfinite(model(ids).logits).all() before.
# Seen (accuracy on 100 questions of four choices): "right one first: random model 0.21, all NaN 1.00; right one spread:
#   random model 0.25, all NaN 0.25; 1.00 ± 0.00 as reported; packaged tasks with the right one first: truthfulqa_mc1,
#   blimp"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
"$folder/env/bin/pip" install --quiet lm_eval==0.4.13
cat > "$folder/try.py" <<'P'
import json
import random
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnop"
TASK = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {task}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: {target}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
chance = random.Random(0)
for task, target in (("first", "0"), ("spread", "right")):
    rows = [{"question": " ".join(chance.sample(LETTERS, 4)), "choices": chance.sample(LETTERS, 4), "right": i % 4}
            for i in range(100)]
    Path(f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path(f"{task}.yaml").write_text(TASK.format(task=task, target=target))

words = {word: i for i, word in enumerate(["<pad>", "<eos>", *LETTERS])}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=64, pad_token_id=0,
                                     eos_token_id=1)).eval()
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.5)


def figures():
    judged = lm_eval.simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=20),
                                     tasks=["first", "spread"], bootstrap_iters=10,
                                     task_manager=TaskManager(include_path=".", include_defaults=False))
    return judged["results"]


healthy = figures()
with torch.no_grad():
    model.model.norm.weight.fill_(float("nan"))
assert not torch.isfinite(model(torch.tensor([[2, 3]])).logits).any()
broken = figures()
folder = Path(lm_eval.__file__).parent / "tasks"
first = [name for name, file in (("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1.yaml"), ("blimp", "blimp/_template_yaml"))
         if "\ndoc_to_target: 0\n" in (folder / file).read_text()]
parts = [f"right one {task}: random model {healthy[task]['acc,none']:.2f}, all NaN {broken[task]['acc,none']:.2f}"
         for task in ("first", "spread")]
error = broken["first"]["acc_stderr,none"]
print(f"{'; '.join(parts)}; {broken['first']['acc,none']:.2f} ± {error:.2f} as reported; packaged tasks with the right one "
      f"first: {', '.join(first)}")
assert healthy["first"]["acc,none"] < 0.5
assert all(broken["first"][f"{metric},none"] == 1.0 for metric in ("acc", "acc_norm")) and error == 0.0
assert broken["spread"]["acc,none"] == 0.25 and first == ["truthfulqa_mc1", "blimp"]
P
cd "$folder" && HF_HOME="$folder" HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
