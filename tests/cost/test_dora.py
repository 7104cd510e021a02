"""DoRA: its parameters, products and memory as peft has them, and a training that peft reads.

pytest tests/cost/test_dora.py
"""

import pytest
import torch
from any_config import small_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import rlhf_lab as lab
from rlhf_lab.cost.architecture import architecture
from rlhf_lab.cost.estimate import estimate
from rlhf_lab.cost.layers import PassConfig
from rlhf_lab.cost.memory import trunk, works
from rlhf_lab.metering.flop_counter import FlopCounter
from rlhf_lab.simulate.step import simulate_step

ROWS, TOKENS, R = 2, 32, 4
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}
SHAPE = {"per_device_train_batch_size": 4, "prompt_length": 24, "response_length": 40}
SHAPE |= {"padded": False, "optim": "adamw_torch", "lora_r": R}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameters_and_products_are_those_that_torch_runs(family, dropout):
    """B·A is the answer to an identity matrix, in every pass; with dropout the map is read twice.
    On the way back the norm is a constant, so none of it is undone."""
    config = small_config(family)
    read, kind = architecture(config), config.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).float()
    layers, targets = model.base_model, read.lora_targets("all-linear")
    lora = LoraConfig(
        r=R,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=True,
        lora_dropout=dropout,
    )
    adapted = get_peft_model(model, lora).train()
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert read.lora_parameters(R, "all-linear", dora=True) == trained
    with FlopCounter() as forward:
        ids = torch.randint(3, 90, (ROWS, TOKENS))
        hidden = layers(input_ids=ids, use_cache=False).last_hidden_state
    p = PassConfig(
        ROWS,
        TOKENS,
        lora_r=R,
        targets=targets,
        trained=False,
        padded=False,
        use_dora=True,
        dropout=dropout > 0,
    )
    segments = trunk(read, p)
    assert works(segments, "forward").flops == forward.total
    if family == "gpt2":
        return  # peft trains nothing twice there without dropout, and with it is refused (below)
    with FlopCounter() as backward:
        hidden.sum().backward()
    assert works(segments, "backward").flops == backward.total


def saved_by_one_map(bias: bool, dropout: float, dtype: torch.dtype) -> int:
    """Bytes that autograd saves of a map with DoRA, beside parameters and what came in."""
    x = torch.randn(ROWS * TOKENS, 48, dtype=dtype, requires_grad=True)
    one = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=bias).to(dtype))
    lora = LoraConfig(r=R, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    one = get_peft_model(one, lora).train()
    there = {t.untyped_storage().data_ptr() for t in (x, *one.parameters())}
    y = one(x)
    graph, saved = [y.grad_fn], {}
    while graph:
        node = graph.pop()
        graph += [n for n, _ in node.next_functions if n]
        for name in dir(node):
            t = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(t, torch.Tensor) and t.dim():  # not a Python number
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(size for where, size in saved.items() if where not in there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_one_map_keeps_what_autograd_saves(bias, dropout, dtype):
    from rlhf_lab.cost.decoder import Linear
    from rlhf_lab.cost.layers import linear
    from rlhf_lab.cost.tape import Tape

    size = dtype.itemsize
    lin = Linear("q_proj", 48, 80, bias)
    p = PassConfig(
        ROWS,
        TOKENS,
        bytes_per_weight=size,
        trained=False,
        lora_r=R,
        targets=("q_proj",),
        use_dora=True,
        dropout=dropout > 0,
    )
    tape = Tape()
    x = tape.new(ROWS * TOKENS * 48, size, needs=True)
    y = linear(tape, p, lin, x)
    kept = tape.live - x.store.size - y.store.size
    assert kept == saved_by_one_map(bias, dropout, dtype)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("sft", {}),
        ("sft", {"bf16": True, "lora_dropout": 0.1}),
        ("sft", {"dtype": "bfloat16", "gradient_checkpointing": True}),
        ("ppo", {"num_ppo_epochs": 1}),
    ],
    ids=str,
)
def test_a_step_is_planned_as_the_real_code_runs(stage, more):
    """Predicted against simulated: every product, and the peak as near as that of LoRA."""
    device = "h100" if "bf16" in more else "here"
    e = estimate(stage, LLAMA, device, {**SHAPE, **more, "use_dora": True})
    x = simulate_step(e.setup, LLAMA)
    assert e.peak == pytest.approx(x.peak, rel=0.01)
    assert e.ledger.total(quantity="flops") == pytest.approx(x.flops, rel=1e-6)


def test_trained_and_read_by_plain_peft(tmp_path):
    """What is saved gives, over the base, the answers of the merged model, and magnitudes moved."""
    data = lab.load_data("stories").first(32, test=8)
    settings = {"lora_r": R, "use_dora": True, "max_steps": 2, "seed": 0}
    plan = lab.plan("sft", "mini", data=data, per_device_train_batch_size=4, **settings)
    run = lab.train(plan, data, out=tmp_path / "run", quiet=True)
    base = lab.load("mini").base
    start = {
        name.removesuffix(".weight"): w.norm(dim=1)
        for name, w in base.state_dict().items()
        if w.dim() == 2
    }
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    magnitudes = {
        name.split("base_model.model.")[-1].removesuffix(".lora_magnitude_vector"): w
        for name, w in saved.items()
        if name.endswith("lora_magnitude_vector")
    }
    assert len(magnitudes) == 7 * base.config.num_hidden_layers
    assert all(0 < (w - start[name]).abs().max() < 0.01 for name, w in magnitudes.items())
    read = PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(read(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    of = {"component": "optimizer", "phase": "optimizer", "quantity": "bytes"}
    predicted, measured = (run.ledger.total(source=s, **of) for s in ("predicted", "measured"))
    assert measured == pytest.approx(predicted, rel=0.01)  # two moments of each number


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"sharding": "zero3", "gpus": 8}, "sharding='zero3': .*choose zero2 or fsdp2"),
        ({"torch_compile": True}, "torch_compile=True: .*leave it out"),
        ({"load_in_8bit": True, "dtype": "bfloat16"}, "load_in_8bit=True: .*set load_in_4bit"),
        ({"gpus": 2, "tensor_parallel": 2}, "does not go with tensor_parallel"),
    ],
)
def test_what_is_not_known_is_refused(more, line):
    with pytest.raises(ValueError, match=f"^use_dora .*{line}"):
        estimate("sft", LLAMA, "h100", {**SHAPE, **more, "use_dora": True})


def test_weights_that_peft_cannot_adapt_so_are_refused():
    """It raises for experts; over GPT-2's transposed maps it trains copies of frozen weights."""
    mixture = small_config("mixtral")
    short = {**SHAPE, "prompt_length": 8, "response_length": 8, "use_dora": True}
    with pytest.raises(ValueError, match="^use_dora is of linear maps inside layers, not of gate"):
        estimate("sft", mixture, "h100", short)
    gpt2 = small_config("gpt2")
    assert estimate("sft", gpt2, "h100", short).peak > 0
    with pytest.raises(ValueError, match="gradients of frozen weights: leave lora_dropout out"):
        estimate("sft", gpt2, "h100", {**short, "lora_dropout": 0.1})
    config = AutoConfig.for_model(mixture.pop("model_type"), **mixture)
    experts = AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(r=R, target_parameters=["mlp.experts.down_proj"], use_dora=True)
    with pytest.raises(ValueError, match="does not work with use_dora"):
        get_peft_model(experts, lora)
