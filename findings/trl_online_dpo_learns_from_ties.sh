#!/usr/bin/env bash
# OnlineDPOTrainer learns from pairs of equal reward as if the first of the two had won.
#
# Version: trl 1.16.0 (trl.experimental.online_dpo) with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: two samples with the same reward say nothing: with a reward that is 0 for all, nothing is learned (GRPO's
#   advantages are 0 then), and with right and wrong answers only mixed pairs count.
# Behaviour: the sample of the first half is taken for the chosen one where its reward is greater or equal. At a
#   reward of 0 and 1 that is right p of the time, p² + (1 - p)² of the pairs are ties (90 % at p = .05), each a step
#   of full weight in a chance direction: the policy leaves its reference with no reward behind it. `rewards/margins`
#   and `rewards/accuracies` count such pairs in. Nothing is said.
# Remedy: a reward with a graded part, so that ties are rare; or GRPO, RLOO, which drop such groups.
# Seen: "a reward of 0 for all, 10 steps: OnlineDPO 0.0802 nats from where it began, GRPO 0.0000; OnlineDPO's smallest
#   gradient norm 1.419"
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
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")
config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     pad_token_id=0, eos_token_id=1, bos_token_id=None)
rows = Dataset.from_list([{"prompt": "a b c"}, {"prompt": "d e f"}] * 16)
common = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
          "per_device_train_batch_size": 8, "max_steps": 10, "logging_steps": 1, "learning_rate": 1e-3,
          "gradient_checkpointing": False, "weight_decay": 0.0, "disable_dropout": True}


def nothing(completions, **_):
    return [0.0] * len(completions)


def trained(trainer, config_class, **settings):
    """The log, and the divergence of the trained policy from the one it began as, in nats a token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    ids = torch.tensor([[2, 3, 4, 5, 6, 7]])
    before = model(ids).logits.detach().log_softmax(-1)
    run = trainer(model=model, reward_funcs=nothing, args=config_class(**common, **settings), train_dataset=rows,
                  processing_class=tokenizer)
    run.train()
    after = run.model.eval()(ids).logits.detach().log_softmax(-1)
    return run.state.log_history, float((after.exp() * (after - before)).sum(-1).mean())


pairs, drift = trained(OnlineDPOTrainer, OnlineDPOConfig, max_new_tokens=8)
_, other = trained(GRPOTrainer, GRPOConfig, max_completion_length=8, num_generations=2)
norms = [line["grad_norm"] for line in pairs if "grad_norm" in line]
print(f"a reward of 0 for all, 10 steps: OnlineDPO {drift:.4f} nats from where it began, GRPO {other:.4f}; OnlineDPO's "
      f"smallest gradient norm {min(norms):.3f}")
assert drift > 1e-3 and min(norms) > 1e-3 and abs(other) < 1e-6
P
cd "$folder" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
