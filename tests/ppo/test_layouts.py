"""Layouts of PPO against models of their own: who is who, and the same algorithm.

pytest tests/ppo/test_layouts.py
"""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_kit import check_step_0, close, naive_logprobs, naive_score, one_rollout, prefixes, swap
from torch.testing import assert_close

from rlhf_lab.ppo import adapters, layouts
from rlhf_lab.ppo.rollout import trunk_of

KINDS = ["llama", "gpt2"]
RANK = 4


def lora(task="CAUSAL_LM", **settings):
    return LoraConfig(task_type=task, r=RANK, lora_alpha=8, target_modules="all-linear", **settings)


def draw(model, seed=3):
    """Adapters that do something: peft's begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def as_critic(tiny, kind, base):
    """A reward model with the trunk of a language model, and a head of its own."""
    critic = tiny.rm(1, kind)
    trunk_of(critic).load_state_dict(trunk_of(base).state_dict())
    return critic


def adapted_critic(tiny, kind, base):
    return draw(
        get_peft_model(as_critic(tiny, kind, base), lora("SEQ_CLS", modules_to_save=["score"]))
    )


@pytest.fixture
def folder(tiny, tmp_path):
    """`folder(kind)` → where a reward adapter for the base `tiny.lm(0, kind)` was saved."""

    def save(kind="llama"):
        path = tmp_path / f"adapter-{kind}"
        adapted_critic(tiny, kind, tiny.lm(0, kind)).save_pretrained(path)
        (path / adapters.SCORE_FILE).write_text(json.dumps({"score_offset": 0.75}))
        return path

    return save


@pytest.fixture
def one_base(make, folder, tiny):
    """`one_base(kind)` → a trainer with all roles on one base."""

    def trainer(kind="llama", reward=None, **settings):
        models = {"value_model": None, "reward_model": reward or folder(kind)}
        return make(kind, models, {"peft_config": lora()}, layout="adapters", **settings)

    return trainer


@pytest.fixture
def shared(make):
    def trainer(kind="llama", **settings):
        return make(kind, {"value_model": None}, layout="shared", **settings)

    return trainer


# --------------------------------------------------------------------------------- who is who


@pytest.mark.parametrize("kind", KINDS)
def test_each_role_gives_what_a_model_of_its_own_would(one_base, folder, tiny, kind):
    """The same adapters in models that plain peft loads: log-probs, scores, values."""
    trainer = one_base(kind)
    draw(trainer.policy, 9)
    base = tiny.lm(0, kind)
    critic = PeftModel.from_pretrained(as_critic(tiny, kind, base), folder(kind))
    critic = critic.merge_and_unload()
    trainer.policy.save_pretrained(folder(kind) / "policy")
    policy = PeftModel.from_pretrained(tiny.lm(0, kind), folder(kind) / "policy")
    r, *_ = one_rollout(trainer)
    for row in range(3):
        n = int(r.mask[row].sum())
        close(r.logprobs[row, :n], naive_logprobs(policy, r, row))
        close(r.ref_logprobs[row, :n], naive_logprobs(base, r, row))
        prompt, response = prefixes(r, row)
        with torch.no_grad():
            close(r.scores_raw[row], naive_score(critic, prompt + response) + 0.75)
            for t in range(n):  # rule 15: the value model starts as the reward model
                close(r.values[row, t], naive_score(critic, prompt + response[:t]) + 0.75)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_value_is_a_head_on_the_policys_trunk(shared, kind):
    trainer = shared(kind)
    r, *_ = one_rollout(trainer)
    assert (r.values == 0).all()  # rule 15: a zero head
    with torch.no_grad():
        trainer.value_model.score.weight.normal_()
    r, *_ = one_rollout(trainer)
    head = trainer.value_model.score.weight[0].detach()
    for row in range(3):
        prompt, response = prefixes(r, row)
        for t in range(len(response)):
            out = trainer.policy(torch.tensor([prompt + response[:t]]), output_hidden_states=True)
            close(r.values[row, t], (out.hidden_states[-1][0, -1] @ head).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_has_ratio_1_in_every_layout(one_base, shared, kind):
    """Step-0 invariant (3), and KL 0 from the reference before any update."""
    for trainer in (one_base(kind), shared(kind)):
        check_step_0(trainer)


def test_a_switch_that_does_not_switch_is_seen(one_base, monkeypatch):
    """The invariant has teeth: with the value adapter left on, ratio 1 is gone."""
    swap(
        monkeypatch, adapters.Switch, "to", lambda to: lambda self, name: to(self, name or "value")
    )
    with pytest.raises(AssertionError):
        check_step_0(one_base())


# --------------------------------------------------------------------------- the same algorithm


def test_adapters_on_one_base_train_as_four_models_do(one_base, make, tiny):
    """10 steps in float64: the same parameters as policy, value and reward with bases of their own.

    peft's own training path: each model has one adapter, and nothing is ever switched.
    """
    settings = {"num_ppo_epochs": 5, "total_episodes": 16, "max_grad_norm": 0.0}
    torch.manual_seed(0)
    one = one_base(**settings)
    one.roles.trained.double()
    with torch.random.fork_rng():
        draw(one.policy, 5)
    base = tiny.lm(0)
    policy = get_peft_model(tiny.lm(0), lora())
    parameters = dict(one.roles.trained.base.named_parameters())
    for name, p in policy.named_parameters():
        p.data = parameters[name].data.clone()
    critic = adapted_critic(tiny, "llama", base)
    critic.base_model.model.config.score_offset = 0.75
    models = {
        "model": policy,
        "ref_model": base.double(),
        "reward_model": critic.double(),
        "value_model": copy.deepcopy(critic).double(),
    }
    models["value_model"].train().requires_grad_(False)
    for name, p in models["value_model"].named_parameters():
        p.requires_grad_("lora_" in name or "modules_to_save" in name)
    four = make(models=models, **settings)
    history = [t.train().log_history for t in (one, four)]
    moved = 0
    trained = dict(four.roles.trained.named_parameters())
    for name, p in parameters.items():
        role = "value" if ".value." in name else "policy"
        if not p.requires_grad:
            continue
        other = f"{role}.{name.replace('.value.', '.default.')}"
        assert_close(p, trained[other], atol=1e-9, rtol=0)
        moved += 1
    assert moved == 2 * sum("lora_" in n for n in dict(policy.named_parameters()))
    head = four.value_model.base_model.model.score.modules_to_save["default"].weight
    assert_close(one.value_model.score.weight, head, atol=1e-9, rtol=0)
    for a, b in zip(*history, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"grad_norm"}:  # not computed where nothing is clipped
            close(a[name], b[name], atol=1e-6)


def test_the_value_loss_reaches_the_shared_trunk(shared):
    """By hand: the gradient of a step is that of policy loss plus vf_coef · value loss."""
    trainer = shared(num_ppo_epochs=1, total_episodes=8, max_grad_norm=0.0)
    with torch.no_grad():
        trainer.value_model.score.weight.normal_()
    r, adv, _ = one_rollout(trainer)
    tokens = r.mask.sum()
    weight = trunk_of(trainer.policy).layers[0].mlp.up_proj.weight

    def gradient():
        loss, *_ = trainer.compute_losses(r, adv, tokens)
        return torch.autograd.grad(loss, weight)[0]

    found = {}
    for trainer.args.vf_coef in (0.0, 1.0, 2.0):
        found[trainer.args.vf_coef] = gradient()
    assert (found[1.0] - found[0.0]).abs().max() > 1e-4
    assert_close(found[2.0] - found[1.0], found[1.0] - found[0.0], atol=1e-5, rtol=1e-4)


def test_only_what_is_trained_moves(one_base):
    trainer = one_base()
    before = {n: p.clone() for n, p in trainer.roles.trained.named_parameters()}
    trainer.train()
    for name, p in trainer.roles.trained.named_parameters():
        trained = "lora_" in name and ".reward." not in name or name == "score.weight"
        assert p.requires_grad == trained, name
        assert torch.equal(p, before[name]) == (not trained), name


# ------------------------------------------------------------------------------------- on disk


def test_the_saved_policy_is_one_adapter_for_plain_peft(one_base, tiny, tmp_path):
    trainer = one_base()
    trainer.train()
    trainer.policy.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir() if p.is_dir()) == []
    loaded = PeftModel.from_pretrained(tiny.lm(0), tmp_path / "saved")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert_close(loaded(ids).logits, trainer.policy(ids).logits)
        assert not torch.allclose(loaded(ids).logits, trainer.reference(ids).logits)


def test_a_whole_reward_model_scores_adapters_too(one_base, tiny):
    """Then the value adapter starts as nothing on the base, under a head of zeros (15)."""
    trainer = one_base(reward=tiny.rm(1))
    r, *_ = one_rollout(trainer)
    prompt, response = prefixes(r, 0)
    close(r.scores_raw[0], naive_score(tiny.rm(1), prompt + response).detach())
    assert (r.values == 0).all()
    start = trainer.value_model.score.weight.clone()
    trainer.train()
    assert not torch.equal(start, trainer.value_model.score.weight)


# -------------------------------------------------------------------------------- what is refused


def test_what_a_layout_has_no_place_for(make, folder, tiny, tmp_path):
    plain = {"value_model": None}
    config = {"peft_config": lora()}
    for models, extra, layout, line in (
        ({}, None, "shared", "makes its own value head"),
        ({**plain}, None, "four", "needs a value_model"),
        ({**plain, "reward_model": folder()}, None, "adapters", "give peft_config"),
        ({**plain, "ref_model": tiny.lm(2)}, config, "adapters", "leave ref_model out"),
        (plain, {"peft_config": lora(init_lora_weights="pissa")}, "adapters", "changes the base"),
        ({**plain, "reward_model": tmp_path / "no"}, config, "adapters", "cannot load a reward"),
        ({**plain, "reward_model": folder("gpt2")}, config, "adapters", "made for another base"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            make("llama", models, extra, layout=layout)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="layout='five': choose from four, shared, adapters"):
        make(layout="five")


def test_a_policys_adapter_is_no_reward_adapter(make, tiny, tmp_path):
    get_peft_model(tiny.lm(0), lora()).save_pretrained(tmp_path / "policy")
    models = {"value_model": None, "reward_model": tmp_path / "policy"}
    with pytest.raises(ValueError, match="no reward adapter: a LoRA adapter with one score head"):
        make("llama", models, {"peft_config": lora()}, layout="adapters")


def test_every_layout_is_planned_and_made(make):
    from rlhf_lab.cost.setup import CHOICES
    from rlhf_lab.ppo.config import LAYOUTS

    assert CHOICES["layout"] == LAYOUTS
    assert layouts.__doc__.count("\n    ") >= len(LAYOUTS)
