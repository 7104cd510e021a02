#!/usr/bin/env bash
# TRL's fused head leaves out what some models do between their trunk and their last matrix.
#
# Version: trl 1.16.0 with transformers 5.23.0, torch 2.13.0; Python 3.11.
# Expected: the log-probabilities that SFT, DPO, KTO, GRPO and RLOO train on are those of the model that
#   generates: `model(ids).logits.log_softmax(-1)`.
# Behaviour: these trainers take the trunk's hidden states times the output matrix. Scales and caps under
#   the names final_logit_softcapping, logit_scale, output_multiplier, lm_head_multiplier and
#   logits_scaling are known. ModernBertDecoder's head (dense, activation, norm) is left out: it gets no
#   gradient, and the loss is another model's. RecurrentGemma's cap, `logits_soft_cap`, is left out too.
#   No word is said, by SFTTrainer or by any other.
# Remedy: compare the two on a row before training such a model; `transformers.Trainer` is right for SFT.
# Seen (mean log-probability of 14 tokens, random weights):
#   "ModernBertDecoder: own -8.77, trained on -10.03, head's gradient None",
#   "RecurrentGemma: own -4.75, trained on -6.52" (another run: -4.65, -6.41)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import torch
from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from trl.trainer.utils import add_fused_lm_head

ids = torch.randint(2, 15, (2, 8), generator=torch.Generator().manual_seed(0))
common = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3,
          "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
bert = ModernBertDecoderConfig(**common, cls_token_id=1, sep_token_id=1, global_attn_every_n_layers=1)
gemma = RecurrentGemmaConfig(**common, lru_width=16, num_key_value_heads=1, attention_window_size=8,
                             logits_soft_cap=5.0)


def compared(model):
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits
    own = logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    add_fused_lm_head(model)  # as SFTTrainer and the others do
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True)
    fused.loss.backward()
    return float(own.mean()), float(fused.log_probs.mean())


own, fused = compared(bert_model := ModernBertDecoderForCausalLM(bert))
print(f"ModernBertDecoder: own {own:.2f}, trained on {fused:.2f}, "
      f"head's gradient {bert_model.lm_head.dense.weight.grad}")
assert abs(own - fused) > 0.1 and bert_model.lm_head.dense.weight.grad is None
own, fused = compared(RecurrentGemmaForCausalLM(gemma))
print(f"RecurrentGemma: own {own:.2f}, trained on {fused:.2f}")
assert abs(own - fused) > 0.01
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
