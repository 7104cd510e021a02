"""FLOPs of layers with adapters, as PyTorch's dispatcher runs them.

pytest tests/cost/test_adapted_flops.py
"""

import pytest
import torch
from any_config import small_config
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.layers import PassConfig
from rlhf_lab.cost.memory import trunk, works
from rlhf_lab.metering.flop_counter import FlopCounter

ROWS, TOKENS, R = 2, 32, 4


@pytest.mark.parametrize("r", [0, R])
@pytest.mark.parametrize("family", "llama mixtral qwen2_moe deepseek_v2 deepseek_v3".split())
def test_products_are_those_that_torch_runs(family, r):
    """Forward and backward, to the last product: latent attention, experts whose merged weights
    peft makes twice on the way forward, and routers that are bare parameters."""
    config = small_config(family)
    if "kv_lora_rank" in config:  # there it is the rotated part of a head, by itself
        del config["head_dim"]
    read = architecture(config)
    kind = config.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).float().eval()
    for weight in model.parameters():  # experts begin as they happen to lie in memory
        torch.nn.init.normal_(weight, std=0.02)
    layers, targets = model.model, ()
    if r:
        targets = read.lora_targets("all-linear")
        get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.randint(3, 90, (ROWS, TOKENS))
    with FlopCounter() as forward:
        hidden = layers(input_ids=ids, use_cache=False).last_hidden_state
    with FlopCounter() as backward:
        hidden.sum().backward()
    p = PassConfig(ROWS, TOKENS, lora_r=r, targets=targets, trained=not r, padded=False)
    segments = trunk(read, p)
    assert works(segments, "forward").flops == forward.total
    assert works(segments, "backward").flops == backward.total
