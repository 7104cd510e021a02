#!/usr/bin/env bash
# DistillationTrainer with bf16=True, its default, runs both models' training passes in fp32.
#
# Version: trl 1.16.0 with transformers 5.23.0, accelerate 1.15.0, torch 2.13.0; Python 3.11.
# Expected: mixed precision, as in TRL's other trainers: weights in fp32, products in bfloat16.
# Behaviour: accelerate puts autocast around the model's `forward`. The trainer puts its loss in that
#   method's place and calls the trunks inside of it, past autocast: the student's passes and the
#   teacher's are fp32, without a word. Sampling, which calls `forward`, is bfloat16: what learns and
#   what samples differ in precision. SFTTrainer under the same settings is bfloat16.
# Remedy: `with trainer.accelerator.autocast():` around `_compute_loss`, or models loaded in bfloat16.
# Seen: "sampling bfloat16, student float32, teacher float32, SFT bfloat16".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 tokenizers
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>",
                                    padding_side="left")
config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, pad_token_id=0, eos_token_id=1)
common = {"bf16": True, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none",
          "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
seen = {}


def watched(name):
    model = LlamaForCausalLM(config)

    def note(module, args, out):
        what = "sampling" if name == "student" and not torch.is_grad_enabled() else name
        seen.setdefault(what, set()).add(str(out.dtype).removeprefix("torch."))

    model.model.layers[0].mlp.register_forward_hook(note)
    return model


DistillationTrainer(model=watched("student"), teacher_model=watched("teacher"),
                    args=DistillationConfig("out", max_completion_length=4, **common),
                    train_dataset=Dataset.from_list([{"prompt": "a b c"}] * 4),
                    processing_class=tokenizer).train()
SFTTrainer(model=watched("SFT"), args=SFTConfig("out", max_length=8, **common),
           train_dataset=Dataset.from_list([{"text": "a b c"}] * 4),
           processing_class=tokenizer).train()
print(", ".join(f"{name} {'+'.join(sorted(seen[name]))}" for name in ("sampling", "student", "teacher", "SFT")))
P
seen=$(cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1)
echo "$seen"
[ "$seen" = "sampling bfloat16, student float32, teacher float32, SFT bfloat16" ]
