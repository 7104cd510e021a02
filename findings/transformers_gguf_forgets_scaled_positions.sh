#!/usr/bin/env bash
# from_pretrained(…, gguf_file=…) loads a model with scaled positions (Llama 3.1, YaRN) as one without.
#
# Version: transformers 5.23.0 with gguf 0.19.0, torch 2.13.0; Python 3.11.
# Expected: a GGUF file in fp32 gives the model back that it was written from; what transformers cannot read in
#   it is refused, as unknown architectures are.
# Behaviour: of Llama files the keys rope.scaling.* and the tensor rope_freqs.weight, in which llama.cpp's
#   converter stores what Llama 3.1 and later do to frequencies (ggml-org/llama.cpp#8676), are passed over (level INFO;
#   only gpt_oss is read). The config says rope_type "default", and the logits are another model's, at short
#   contexts too. A model that is fine-tuned or judged so is not the one that llama.cpp serves from that file.
# Remedy: config.rope_parameters of the original, given to from_pretrained as `config`.
# Seen (largest error of a logit in 64 tokens, random weights; share of tokens with the same most likely next one):
#   "default 0.00 1.00, linear 5.12 0.36, yarn 5.32 0.55, llama3 4.02 0.61; with the original's config 0.00"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cat > "$folder/try.py" <<'P'
import math

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
]


def llama3_factors(rope, width):
    """What llama.cpp's converter writes as rope_freqs.weight: by how much each frequency is divided."""
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def write(model, file):
    c, writer = model.config, gguf.GGUFWriter(file, "llama")
    rope, kind = c.rope_parameters, c.rope_parameters["rope_type"]
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, c.head_dim))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for key, weight in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        if "attn_q" in name or "attn_k" in name:  # llama.cpp turns neighbours, transformers the two halves
            halves = weight.reshape(c.num_attention_heads, 2, -1, c.hidden_size)
            weight = halves.swapaxes(1, 2).reshape(weight.shape).contiguous()
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ids = torch.randint(0, 32, (1, 64), generator=torch.Generator().manual_seed(0))
seen, with_config = {}, 0.0
for rope in ROPES:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, rope_parameters={**rope, "rope_theta": 10000.0})).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    write(model, "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32).eval()
    told = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32,
                                                config=model.config).eval()
    assert loaded.config.rope_parameters["rope_type"] == "default"
    with torch.no_grad():
        own, new, other = model(ids).logits, loaded(ids).logits, told(ids).logits
    seen[rope["rope_type"]] = float((own - new).abs().max()), float((own.argmax(-1) == new.argmax(-1)).float().mean())
    with_config = max(with_config, float((own - other).abs().max()))
print(", ".join(f"{k} {e:.2f} {s:.2f}" for k, (e, s) in seen.items()) + f"; with the original's config {with_config:.2f}")
assert seen["default"][0] < 1e-3 and with_config < 1e-3
assert all(error > 1 for kind, (error, _) in seen.items() if kind != "default")
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null
