"""FLOPs: our counter against torch's own, and both against a formula written out by hand."""

import re

import pytest
import torch
from families import COMMON, CONFIGS, FAMILIES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rlhf_lab.metering.flop_counter import (
    FORMULAS,
    FlopCounter,
    LinearFlops,
    _look_up,
)
from rlhf_lab.metering.memory_tracker import MemoryTracker

B, S, VOCAB = 3, 12, 48
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 32,
        "head_dim": 8,
    },
}
ALL = [*FAMILIES, "phi3", *EXPERTS]


def model(family: str, auto: str = "AutoModelForCausalLM", **changes):
    """A random model of the family in eval mode (dropout would take another attention path)."""
    import transformers

    plain = {**COMMON, "num_key_value_heads": 1, **EXPERTS.get(family, {})}
    config = transformers.AutoConfig.for_model(
        family, **{**CONFIGS.get(family, plain), **changes}, vocab_size=VOCAB
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id, config.num_labels = 0, 1, 2, 1
    how = "eager" if family == "gemma2" else "sdpa"
    made = getattr(transformers, auto).from_config(config, attn_implementation=how)
    return made.eval()


def batch(rows: int = B, length: int = S) -> dict:
    ids = torch.randint(3, VOCAB, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def matrices(net) -> int:
    """Parameters that every token is multiplied by; of the experts, those of the two it visits."""
    from transformers.pytorch_utils import Conv1D

    count = sum(m.weight.numel() for m in net.modules() if isinstance(m, (nn.Linear, Conv1D)))
    if net.config.model_type in EXPERTS:
        h, layers = 16, 2
        count += layers * (4 * h + 2 * 3 * h * 32)  # the router, and two of four experts
    return count


def by_hand(net, head_rows: int = B * S) -> tuple[int, int]:
    """(forward, backward): 2 FLOPs per token and parameter, 4 per pair and channel of attention.

    Backward, the matrices count twice; attention 2.5 times where one kernel does it (the scores
    are made again: five products for two), twice where it is written out.
    """
    heads, width = 2, 8
    products = 2 * B * S * matrices(net)
    head = getattr(net, "lm_head", None) or getattr(net, "embed_out", None)
    if head is not None:
        products -= 2 * (B * S - head_rows) * head.weight.numel()
    attention = 4 * B * S**2 * heads * width * 2
    again = 2.0 if net.config._attn_implementation == "eager" else 2.5
    return products + attention, int(2 * products + again * attention)


def torch_counter() -> FlopCounterMode:
    """Torch's own FlopCounterMode with every operation of ours registered; slower, by module."""

    def raw(formula):
        def flops(*args, out_val=None, **kwargs):
            return formula(*args, **kwargs)

        flops._get_raw = True  # tensors, not shapes
        return flops

    ours = {}
    for name, formula in FORMULAS.items():
        library, operation = name.split(".")
        if hasattr(getattr(torch.ops, library), operation):
            ours[getattr(getattr(torch.ops, library), operation)] = raw(formula)
    return FlopCounterMode(display=False, custom_mapping=ours)


def both(work) -> int:
    """FLOPs of `work()` by our counter, which must equal torch's."""
    with FlopCounter() as ours:
        out = work()
    with torch_counter() as torchs:
        work()
    assert ours.total == torchs.get_total_flops() == sum(ours.by_operation.values())
    return ours.total, out


@pytest.mark.parametrize("family", ALL)
def test_every_family_by_hand_and_by_torch(family):
    net = model(family)
    forward, logits = both(lambda: net(**batch()).logits)
    backward, _ = both(lambda: logits.sum().backward(retain_graph=True))
    assert (forward, backward) == by_hand(net)


def test_one_llama_in_figures():
    """h 16, I 32, 2 layers, 2 heads of 8, 1 of keys and values, vocabulary 48; 3 × 12 tokens."""
    per_layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32  # q; k, v; o; gate, up, down
    forward, _ = both(lambda: model("llama")(**batch()))
    assert forward == 2 * 36 * (2 * per_layer + 48 * 16) + 4 * 3 * 144 * 2 * 8 * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_reward_model(family):
    net = model(family, "AutoModelForSequenceClassification")
    forward, out = both(lambda: net(**batch()).logits)
    backward, _ = both(lambda: out.sum().backward(retain_graph=True))
    assert (forward, backward) == by_hand(net)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "mixtral"])
def test_trls_fused_head_counts_once_forward_and_three_times_backward(family):
    """On a CPU it scores every position but the last; backward makes the logits again, then two
    products, in place."""
    from trl.trainer import utils

    net, rows = model(family), B * (S - 1)
    plain_forward, plain_backward = by_hand(net, head_rows=0)
    utils.add_fused_lm_head(net)
    inputs = batch()
    inputs["labels"] = inputs["input_ids"]
    forward, loss = both(lambda: net(**inputs, fused_lm_head=True).loss)
    with FlopCounter() as counter:
        loss.backward()
    head = 2 * rows * VOCAB * 16
    assert forward - plain_forward == head
    assert counter.total - plain_backward == 3 * head
    assert counter.by_operation["aten.addmm_"] == 2 * head


def test_nothing_that_looks_like_a_matrix_product_goes_uncounted():
    """Every operation that any family runs, forward and backward, fused head and LoRA included."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer import utils

    seen = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    for family in ALL:
        net, inputs = model(family), batch()
        utils.add_fused_lm_head(net)
        targets = "all-linear" if family not in EXPERTS else ["q_proj"]
        adapted = get_peft_model(model(family), LoraConfig(r=2, target_modules=targets))
        score = model(family, "AutoModelForSequenceClassification")
        with Names():
            net(**inputs, labels=inputs["input_ids"], fused_lm_head=True).loss.backward()
            adapted(**inputs).logits.sum().backward()
            score(**inputs).logits.sum().backward()
            net(**{**inputs, "use_cache": True}, logits_to_keep=1)
    product = re.compile(r"mm|mv|dot|matmul|attention|conv|linear|einsum|bilinear")
    missed = {str(f) for f in seen if _look_up(f)[0] is None and product.search(str(f))}
    assert len(seen) > 50 and not missed


def test_fake_tensors_and_an_account_in_either_order():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def step():
        model("qwen2")(**batch()).logits.sum().backward()

    with FlopCounter() as real:
        step()
    totals = []
    for modes in (
        [FakeTensorMode, FlopCounter],
        [FakeTensorMode, FlopCounter, MemoryTracker],
        [FakeTensorMode, MemoryTracker, FlopCounter],
        [MemoryTracker, FlopCounter],
        [FlopCounter, MemoryTracker],
    ):
        open_modes = [mode() for mode in modes]
        for mode in open_modes:
            mode.__enter__()
        step()
        for mode in reversed(open_modes):
            mode.__exit__(None, None, None)
        totals += [m.total for m in open_modes if isinstance(m, FlopCounter)]
    assert totals == [real.total] * 5 and real.total > 0


def test_inference_mode_counts_as_no_grad():
    """There composite operations arrive whole and are taken apart."""
    net, inputs = model("llama"), batch()
    with torch.no_grad(), FlopCounter() as plain:
        net(**inputs)
    with torch.inference_mode(), FlopCounter() as inference:
        net(**inputs)
    assert inference.total == plain.total == by_hand(net)[0]


def test_products_in_place_and_in_groups():
    a, b, c = torch.randn(5, 3), torch.randn(3, 7), torch.zeros(5, 7)
    stack, offsets = torch.randn(2, 3, 7), torch.tensor([2, 5], dtype=torch.int32)
    with FlopCounter() as counter:
        c.addmm_(a, b)
        torch.mm(a, b, out=c)
        torch.zeros(2, 5, 7).baddbmm_(torch.randn(2, 5, 3), stack)
        a @ b[:, 0]
    assert counter.total == 2 * 5 * 3 * (7 + 7 + 2 * 7 + 1)
    custom = torch.ops.transformers.grouped_mm_fallback if model("mixtral") else None
    a.requires_grad_(), stack.requires_grad_()
    with FlopCounter() as counter:
        custom(a, stack, offsets).sum().backward()
    assert counter.total == 3 * 2 * 5 * 3 * 7


def test_a_few_counted_passes_say_every_other():
    def flops(tokens, pairs, logits):
        return 7 * tokens + 3 * pairs + 11 * logits

    fit = LinearFlops()
    assert fit.predict((1, 1, 1)) is None
    shapes = [(8, 64, 4), (8, 64, 2), (12, 144, 4), (20, 400, 9)]
    for shape in shapes[:3]:
        assert fit.predict(shape) is None
        fit.learn(shape, flops(*shape))
    assert fit.counted == 3 and fit.predict(shapes[3]) == flops(*shapes[3])
    assert fit.predict((0, 0, 0)) == 0
