#!/usr/bin/env bash
# SFT with packing or padding_free: in OPT, BLOOM, MPT, Falcon, BioGPT, XGLM rows see those before them.
#
# Version: trl 1.16.0 with transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
# Expected: rows that are laid end to end are kept apart (packing_strategy "bfd" preserves boundaries), so that
#   the loss is the one of padded rows; where a model cannot do it, an error.
# Behaviour: what keeps them apart is `position_ids`. Llama, Qwen, Gemma, GPT-2, GPT-NeoX and others make their
#   attention mask of it. Others number their positions with it and no more (OPT, Falcon, BioGPT, XGLM), or
#   take no heed of it (BLOOM, MPT): each row is read as a continuation of the rows before it, in
#   training and in eval_loss. So does Mamba on a CPU; Mamba 2 and LFM2 raise. Nothing is said.
# Remedy: packing=False, padding_free=False.
# Seen (eval_loss of six rows, random weights):
#   "llama: by hand 4.198, padded 4.198, padding_free 4.198; opt: by hand 3.858, padded 3.858, padding_free
#   3.955; bloom: … 4.334, 4.334, 4.235; falcon: … 3.563, 3.563, 3.722; mamba: … 4.305, 4.305, 3.393"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 trl==1.16.0 transformers==5.23.0
cat > "$folder/try.py" <<'P'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {w: i for i, w in enumerate("<pad> <eos> a b c d e f g h i j k l m n".split())}
raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
texts = ["a b c d e f", "g h", "i j k l m n a b", "c e g i", "b d f h j l n", "m k i g e"]
rows = Dataset.from_list([{"text": text} for text in texts])
size = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1}
kinds = {"llama": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 2, "n_head": 4},
         "falcon": {"alibi": True}, "mamba": {"state_size": 8}}


@torch.no_grad()
def by_hand(model):
    loss, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([words[w] for w in text.split()] + [1])
        logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        loss -= float(logprobs.gather(1, ids[1:, None]).sum())
        tokens += len(ids) - 1
    return loss / tokens


def eval_loss(model, free):
    args = SFTConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=6,
                     padding_free=free, max_length=None)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    return trainer.evaluate()["eval_loss"]


seen = {}
for kind, more in kinds.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**size, **more})).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    seen[kind] = by_hand(model), eval_loss(model, False), eval_loss(model, True)
print("; ".join("{}: by hand {:.3f}, padded {:.3f}, padding_free {:.3f}".format(k, *v) for k, v in seen.items()))
for kind, (hand, padded, free) in seen.items():
    assert abs(padded - hand) < 1e-3 and (abs(free - hand) < 1e-3) == (kind == "llama"), kind
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
