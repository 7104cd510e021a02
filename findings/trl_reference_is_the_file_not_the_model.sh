#!/usr/bin/env bash
# Without `ref_model`, DPO's reference is what lies where the model was loaded from, not the model given.
#
# Version: trl 1.16.0 with transformers 5.23.0, peft 0.21.2; Python 3.11.
# Expected: as the docstring says, "the model state before DPO training starts": before the first step
#   rewards are 0, the loss is log 2 = 0.6931, for a model that was fine-tuned in this process too.
# Behaviour: a reference is loaded anew from `config._name_or_path`. For a model that SFT trained a cell
#   before (or into which its adapter was merged), not saved and loaded again, that is the one from before
#   SFT: rewards, margins and KL are measured from there, and what SFT taught counts as drift, without a word.
#   KTO, GRPO and RLOO load theirs alike. precompute_ref_log_probs=True and peft_config take the model given.
# Remedy: ref_model=copy.deepcopy(model); or save the model, and load it from there.
# Seen: "left out 0.7993 (by hand from the base: 0.7993), precomputed 0.6931, with a new adapter 0.6931,
#   copied 0.6931"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/try.py" <<'P'
import copy

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

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
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
          "logging_steps": 1, "save_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 2}
rows = [{"prompt": "a b c", "chosen": " d e f", "rejected": " g h"}] * 2


def after_sft():
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    return model.merge_and_unload().requires_grad_(True)


def first_loss(model, copied=False, adapter=None, **settings):
    trainer = DPOTrainer(model, ref_model=copy.deepcopy(model) if copied else None,
                         args=DPOConfig("out", **common, **settings), peft_config=adapter,
                         train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@torch.no_grad()
def logprob(model, completion):
    ids = torch.tensor([words[w] for w in ["a", "b", "c", *completion, "<eos>"]])
    each = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
    return each[2:].sum()


policy = after_sft().eval()
ratios = [logprob(policy, text) - logprob(base.eval(), text) for text in ("def", "gh")]
hand = float(-torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])))
left_out = first_loss(after_sft())
ahead = first_loss(after_sft(), precompute_ref_log_probs=True)
adapted, copied = first_loss(after_sft(), adapter=lora), first_loss(after_sft(), copied=True)
print(f"left out {left_out:.4f} (by hand from the base: {hand:.4f}), precomputed {ahead:.4f}, "
      f"with a new adapter {adapted:.4f}, copied {copied:.4f}")
assert abs(left_out - hand) < 1e-4 and abs(hand - 0.6931) > 0.05
assert all(abs(loss - 0.6931) < 1e-4 for loss in (ahead, adapted, copied))
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
