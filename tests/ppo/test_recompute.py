"""PPO with activation checkpointing: the same numbers from less memory, in every layout.

pytest tests/ppo/test_recompute.py
"""

import shutil

import pytest
import torch
from families import CONFIGS
from peft import LoraConfig
from ppo_kit import check_step_0

from rlhf_lab.metering.meter import Meter
from rlhf_lab.ppo import checkpoint, recompute

ON = {"activation_checkpointing": True}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}


@pytest.fixture
def build(make, tiny):
    """`build(layout, **settings)` → a trainer; `like`: changes of the models' config."""

    def build(layout="four", like=None, meter=None, **settings):
        extra = {"meter": meter} if meter else {}
        models = {} if layout == "four" else {"value_model": None}
        if like:
            models |= {"model": tiny.lm(0, **like), "reward_model": tiny.rm(1, **like)}
            models |= {"value_model": tiny.rm(1, **like)}
        if layout == "adapters":
            extra["peft_config"] = LoraConfig("CAUSAL_LM", r=2, target_modules="all-linear")
        return make(models=models, extra=extra, layout=layout, **settings)

    return build


@pytest.mark.parametrize("layout", ["four", "shared", "adapters"])
def test_weights_are_those_without_it(build, layout):
    """Three iterations of two steps each; before the first of them the ratio is 1."""
    plain, again = build(layout, save_strategy="no"), build(layout, **ON, save_strategy="no")
    check_step_0(plain)
    check_step_0(again)
    assert again.roles.trained.recomputed and not plain.roles.trained.recomputed
    for a, b in zip(plain.roles.trained.parameters(), again.roles.trained.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def gradients(trainer):
    """Of the first minibatch of an iteration, by parameter."""
    found = {}

    def keep():
        found.update({n: p.grad.clone() for n, p in parameters if p.grad is not None})

    parameters = list(trainer.roles.trained.named_parameters())
    trainer.optimizer.step = keep
    trainer.iterate(0)
    return found


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradients_under_both_names(build, name):
    plain, again = (
        gradients(build(num_ppo_epochs=1)),
        gradients(build(num_ppo_epochs=1, **{name: True, f"{name}_kwargs": {"every_n_layers": 2}})),
    )
    assert plain.keys() == again.keys() and any(x.abs().max() > 1e-3 for x in plain.values())
    for key, gradient in plain.items():
        assert torch.allclose(gradient, again[key], atol=1e-6), key


def test_an_adapter_that_is_not_switched_back_is_seen(build, monkeypatch):
    """Two passes go through one base, each with its adapter: each runs again with that one."""
    plain = gradients(build("adapters", num_ppo_epochs=1))
    trainer = build("adapters", num_ppo_epochs=1, **ON)
    first = trainer.update

    def update(*args):
        trainer.roles.trained.switch = None
        return first(*args)

    monkeypatch.setattr(trainer, "update", update)
    try:
        broken = gradients(trainer)
    except (torch.utils.checkpoint.CheckpointError, RuntimeError):
        return  # torch sees it too, where shapes or the number of tensors differ
    assert broken.keys() != plain.keys() or any(
        not torch.allclose(x, broken[n], atol=1e-6) for n, x in plain.items()
    )


def test_a_family_whose_layers_drop_activations_in_training():
    """OPT's layer does so by itself; recomputed, it still does not (rule 4)."""
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(**CONFIGS["opt"], dropout=0.9, vocab_size=40)).eval()
    ids = torch.arange(6).unsqueeze(0)
    plain = model(ids, use_cache=False).logits
    layers = recompute.recomputed_layers(model, {})
    with recompute.recomputed(layers, None):
        logits = model(ids, use_cache=False).logits
    assert len(layers) == 2 and torch.equal(logits, plain)
    expected = torch.autograd.grad(plain.square().sum(), model.parameters())
    for a, b in zip(expected, torch.autograd.grad(logits.square().sum(), model.parameters())):
        assert torch.allclose(a, b, atol=1e-6)
    assert not any(module.training for module in model.modules())


def test_goes_on_to_the_same_numbers(build):
    whole = build(**ON, save_steps=1, save_total_limit=None)
    expected = whole.train().log_history
    shutil.rmtree(checkpoint.newest_first(whole.args.output_dir)[0])
    again = build(**ON, save_steps=1, save_total_limit=None)
    assert again.train(resume_from_checkpoint=True).log_history == expected
    for a, b in zip(whole.roles.trained.parameters(), again.roles.trained.parameters()):
        assert torch.equal(a, b)


def test_memory_falls(build):
    """Of eight layers: what the meter finds at the peak of backward, by model."""
    found = []
    for on in (False, True):
        trainer = build(
            like=WIDE, meter=(meter := Meter("ppo")), max_steps=1, gradient_checkpointing=on
        )
        trainer.train()
        rows = meter.ledger().filter(phase="backward", component="activations", quantity="bytes")
        found.append([rows.total(role=role) for role in ("policy", "value")])
    for plain, again in zip(*found, strict=True):
        assert again < 0.4 * plain
