#!/usr/bin/env bash
# transformers.Trainer counts a mixture's load-balancing loss once for each pass of gradient accumulation.
#
# Version: transformers 5.23.0 with torch 2.13.0 (CPU), datasets 5.2.0; Python 3.11.
# Expected: eight rows give the same gradient as one batch of eight, two of four or eight of one that are
#   accumulated: since num_items_in_batch the loss does not hang on how a batch is cut.
# Behaviour: the cross entropy is divided by the tokens of all passes; what router_aux_loss_coef weighs is
#   added to it in each pass whole, and nobody divides it: with gradient_accumulation_steps=8 experts are
#   balanced eight times as hard as the coefficient says, and the logged loss is that much higher.
#   Nothing is said. (TRL's trainers divide it.)
# Remedy: router_aux_loss_coef divided by gradient_accumulation_steps; or SFTTrainer.
# Met by: Mixtral, Qwen3-MoE, OLMoE, … with output_router_logits=True.
# Seen (eight rows that are one, coefficient 1; loss without the term, of the term, the router's gradient):
#   "1 x 8: 3.46 + 2.00, gradient 0.06; 2 x 4: 3.46 + 4.00, gradient 0.12; 8 x 1: 3.46 + 16.01, gradient 0.41"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/try.py" <<'P'
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers import default_data_collator

row = [5, 6, 7, 8, 9, 10]


class Router(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        gates = [p.grad.flatten() for n, p in model.named_parameters() if "gate.weight" in n]
        self.gradient = float(torch.cat(gates).norm())


def step(accumulated, batch, coefficient):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, pad_token_id=0,
        router_aux_loss_coef=coefficient))
    args = TrainingArguments("out", use_cpu=True, report_to=[], max_steps=1, learning_rate=0.0, logging_steps=1,
                             per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
                             save_strategy="no")
    router = Router()
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row}] * 8, callbacks=[router],
                      data_collator=default_data_collator)
    trainer.train()
    return trainer.state.log_history[0]["loss"], router.gradient


seen = []
for accumulated, batch in ((1, 8), (2, 4), (8, 1)):
    plain, _ = step(accumulated, batch, 0.0)
    loss, gradient = step(accumulated, batch, 1.0)
    seen.append((accumulated, batch, plain, loss - plain, gradient))
print("; ".join(f"{a} x {b}: {p:.2f} + {x:.2f}, gradient {g:.2f}" for a, b, p, x, g in seen))
one, two, eight = seen
assert abs(one[2] - eight[2]) < 1e-4 and abs(two[3] / one[3] - 2) < 0.01 and abs(eight[3] / one[3] - 8) < 0.01
assert eight[4] > 5 * one[4]
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | grep " x "
