"""What the table says of an optimizer, against the state of the real one after a step.

pytest tests/cost/test_optimizers.py
"""

from __future__ import annotations

import pytest
import torch

from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.optimizers import OPTIMIZERS

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def state_bytes(name: str, folder) -> int:
    """Bytes that transformers' optimizer of this name keeps, counters of steps aside; of a factored
    one without those of vectors, which the plan leaves out."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    args = TrainingArguments(str(folder), optim=name, use_cpu=True)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = cls(model.parameters(), **kwargs)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [
        value
        for parameter, state in optimizer.state.items()
        for value in state.values()
        if parameter.dim() > 1 or not OPTIMIZERS[name].factored
    ]
    return sum(v.numel() * v.element_size() for v in tensors if torch.is_tensor(v) and v.dim())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" not in name])
def test_the_plan_has_the_state_of_the_real_optimizer(name, tmp_path):
    e = estimate("sft", CONFIG, "laptop", {"optim": name, "per_device_train_batch_size": 1})
    rows = e.ledger.filter(quantity="bytes", component="optimizer", phase="optimizer")
    assert sum(row.value for row in rows) == state_bytes(name, tmp_path)


def test_eight_bit_optimizers_keep_two_bytes_and_the_scales_of_blocks():
    """Two moments in a byte each, and an fp32 scale of each for 256 numbers."""
    for name in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        assert OPTIMIZERS[name].state_bytes == 2 * (1 + 4 / 256)
