"""Model folders as people have them: read right, trained, and saved so that others can read them.

pytest tests/models/test_as_they_come.py
"""

import json
import math

import pytest
import torch
from families import data, make_folder, make_tokenizer, rows
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import rlhf_lab as lab
from rlhf_lab.models.load import BUNDLED
from rlhf_lab.models.weights import load_causal_lm, load_reward_model

ONE_STEP = {"max_steps": 1, "seed": 0, "per_device_train_batch_size": 4}
GROUPS = {"num_generations": 2, "response_length": 4, "steps_per_generation": 1}
SETTINGS = {
    "sft": {},
    "reward": {},
    "dpo": {},
    "kto": {},
    "ppo": {"num_mini_batches": 1, "response_length": 4},
    "rloo": GROUPS,
    "grpo": GROUPS,
}
LLAMA_2 = {"temperature": 0.9, "top_p": 0.6, "do_sample": False}


def train(stage, model, folder, **settings):
    plan = lab.plan(stage, model, **{**ONE_STEP, **SETTINGS[stage], **settings})
    return lab.train(plan, data(), out=folder / stage, quiet=True)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def judged(model, folder):
    """The model with a random judge of its own size beside it."""
    model.new_reward(3).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return model.with_stage("reward", folder)


# -- what is saved ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Sampling settings that transformers reads and refuses to write, no pad token, and other ids
    of eos than the tokenizer's; the last token is where turns end too."""
    folder = tmp_path_factory.mktemp("odd")
    made = make_folder(folder / "model", "llama")
    eos = AutoTokenizer.from_pretrained(made).eos_token_id
    edit(made / "config.json", eos_token_id=1, pad_token_id=None, bos_token_id=None)
    ends = {"eos_token_id": [39, eos, 1000], "pad_token_id": None}
    edit(made / "generation_config.json", **LLAMA_2, **ends)
    return judged(lab.load(made), folder / "judge")


@pytest.mark.parametrize("stage", SETTINGS)
def test_every_stage_saves_a_model_that_others_can_use(stage, odd, tmp_path):
    """models.md 1 and 5: up to version 0.1 TRL's stages trained and lost the model when it was
    saved ("GenerationConfig is invalid"), and PPO's kept the base's eos and pad."""
    run = train(stage, odd, tmp_path)
    assert run.status == "finished"
    tokenizer = AutoTokenizer.from_pretrained(run.model_path)
    config = json.loads((run.model_path / "config.json").read_text())
    wanted = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert None not in wanted.values() and len(set(wanted.values())) == 3
    assert {name: config[name] for name in wanted} == wanted
    if stage != "reward":
        model = AutoModelForCausalLM.from_pretrained(run.model_path)
        ends = model.generation_config.eos_token_id
        assert ends == [tokenizer.eos_token_id, 39]  # no id that the model does not have
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id
        model.generation_config.max_length = 50  # changed: transformers looks at all of it
        model.save_pretrained(tmp_path / "again")


FAULTS = {
    "sampling settings, do_sample missing": ({"temperature": 0.9}, {"do_sample": True}),
    "sampling settings, greedy": ({**LLAMA_2, "min_p": 0.1}, {"top_p": None, "min_p": None}),
    "beams": ({"length_penalty": 0.5, "early_stopping": True}, {"length_penalty": None}),
    "outputs": ({"output_scores": True}, {"output_scores": None}),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_transformers_refuses_to_write_is_mended_when_it_is_read(case, tmp_path):
    """models.md 1: settings of a generation config that have no effect."""
    given, wanted = FAULTS[case]
    folder = make_folder(tmp_path / "model", "llama")
    edit(folder / "generation_config.json", **given)
    model = load_causal_lm(folder, lab.load(folder).tokenizer)
    model.generation_config.max_length = 50  # as TRL changes it
    model.save_pretrained(tmp_path / "saved")
    assert {name: getattr(model.generation_config, name) for name in wanted} == wanted


# -- sizes of vocabularies --------------------------------------------------------------------
def widen(folder, count):
    """The saved model with `count` embeddings, as models have that are padded to a round number."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(count)
    with torch.no_grad():  # rows that are as likely as the others
        model.lm_head.weight.normal_(std=0.2)
    model.save_pretrained(folder)


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_a_policy_may_have_more_embeddings_than_its_judge(stage, tmp_path):
    """models.md 9: 64 rows, of which the tokenizer names 44; the judge has 44."""
    folder = make_folder(tmp_path / "model", "llama")
    model = judged(lab.load(folder), tmp_path / "judge")
    widen(folder, 64)
    run = train(stage, model, tmp_path, response_length=6)
    ids = [i for row in run.evaluation for i in row["ids"]]
    assert run.status == "finished" and max(ids) >= 44
    known = next(r for r in run.evaluation if r["when"] == "sft" and max(r["ids"]) < 44)
    with torch.no_grad():
        whole = torch.tensor([known["prompt_ids"] + known["ids"]])
        assert float(model.reward(whole).logits) == pytest.approx(known["reward"], abs=1e-4)


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_a_tokenizer_may_leave_ids_out(stage, tmp_path):
    """models.md 9: 39 tokens, the last of them, which pads, has the id 41; the model has 41 rows
    (0 to 40)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = make_folder(tmp_path / "model", "llama")
    vocabulary = {f"w{i}": i for i in range(36)} | {"</s>": 38, "<unk>": 39, "<pad>": 41}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 41}
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**config, "pad_token_id": None, "eos_token_id": 38, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    assert len(lab.load(folder).tokenizer) == 39
    run = train(stage, lab.load(folder), tmp_path)
    assert run.status == "finished"
    embeddings = load_file(run.model_path / "model.safetensors")["model.embed_tokens.weight"]
    assert embeddings.shape[0] == 42


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_plain_peft_loads_an_adapter_on_its_base(stage, tmp_path):
    """models.md 10: GPT-2 has no token to spare, so its copy grows by one that pads."""
    from peft import PeftModel

    folder = make_folder(tmp_path / "model", "gpt2", with_pad=False)
    model = judged(lab.load(folder), tmp_path / "judge")
    assert len(model.tokenizer) == 42 and load_causal_lm(folder).config.vocab_size == 41
    first = {} if stage == "ppo" else {"warmup_steps": 0}
    run = train(stage, model, tmp_path, lora_r=8, learning_rate=1e-2, **first)
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        start = base(ids).logits
        found = PeftModel.from_pretrained(base, run.folder / "adapter")(ids).logits
        merged = load_causal_lm(run.model_path)(ids).logits
    assert torch.allclose(found, merged[..., :41], atol=1e-5)
    assert not torch.allclose(found, start, atol=1e-4)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_reference_is_as_large_as_the_policy(stage, tmp_path):
    """models.md 17: TRL loads the folder again, where the policy has no row that pads. Before the
    first step the policy is its reference: the loss is log 2 (DPO), 1 − σ(0) (KTO)."""
    model = lab.load(make_folder(tmp_path / "model", "gpt2", with_pad=False))
    run = train(stage, model, tmp_path)
    assert run.status == "finished"
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2) if stage == "dpo" else 0.5, abs=1e-4)


def test_embeddings_that_are_missing_are_the_same_in_every_copy(tmp_path):
    """models.md 9 and 17: drawn anew for each copy, the reference would not be what the policy was
    at first, and a run not that of its seed."""
    folder = make_folder(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<a>", "<b>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    one, other = (lab.load(folder).base.get_input_embeddings().weight for _ in range(2))
    assert len(one) == 46 and torch.equal(one, other)


def test_a_token_that_ends_turns_does_not_pad(tmp_path):
    """Llama's classification head reads a score at the last token that is no padding: with such a
    pad token TRL would train it one position before where PPO reads it."""
    from templates import OURS, chat_tokenizer

    folder = make_folder(tmp_path / "model", "llama")
    tokenizer = chat_tokenizer(OURS["no system role"][0])
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    talks = [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows()]
    plan = lab.plan("reward", folder, **ONE_STEP)
    run = lab.train(plan, data(talks), out=tmp_path / "run", quiet=True)
    config = json.loads((run.model_path / "config.json").read_text())
    saved = AutoTokenizer.from_pretrained(run.model_path)
    assert config["pad_token_id"] == saved.pad_token_id != saved.convert_tokens_to_ids("<|end|>")


# -- reward models ----------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [False, True])
def test_the_bias_of_a_reward_head_is_kept(shards, tmp_path):
    """models.md 13: transformers' own heads have none, and leave it out without a word."""
    model = lab.load(make_folder(tmp_path / "model", "llama"))
    judge = judged(model, tmp_path / "judge").reward
    file = tmp_path / "judge" / "model.safetensors"
    weights = load_file(file) | {"score.bias": torch.tensor([1.5])}
    save_file(weights, file, metadata={"format": "pt"})
    if shards:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
        file.rename(file.with_name("part.safetensors"))
        file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    again = load_reward_model(tmp_path / "judge", model.tokenizer)
    assert again.config.score_offset == 1.5 and judge.config.score_offset == 0
    again.save_pretrained(tmp_path / "saved")
    assert load_reward_model(tmp_path / "saved").config.score_offset == 1.5  # once, not twice


def test_a_damaged_generation_config_is_not_one_without_stops(tmp_path):
    """It names the tokens at which a text ends: left out without a word, nothing would stop."""
    folder = make_folder(tmp_path, "llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1,')
    with pytest.raises(ValueError, match="generation_config.json is not JSON"):
        _ = lab.load(folder).tokenizer


# -- 4 bits -----------------------------------------------------------------------------------
def by_hand(weight):
    """NF4 (Dettmers et al., 2305.14314): two codes a byte, the high half first; every 64 weights of
    the matrix, row after row, share a scale."""
    state, packed = weight.quant_state, weight.data.flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    scales = state.absmax.repeat_interleave(64)[: codes.numel()]
    return (state.code[codes] * scales).view(state.shape)


@pytest.fixture
def bnb(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("name", BUNDLED)
def test_4_bits_are_read_as_by_hand(bnb, name):
    """Logits and gradients; and the rounding moves the model by less than .1 nats a token."""
    model = lab.load(name)
    quantised, dense, before = model.in_4bit(), model.sft, model.sft
    layers = {n: m for n, m in quantised.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 7 * model.config.num_hidden_layers
    with torch.no_grad():
        for path, layer in layers.items():
            dense.get_submodule(path).weight.copy_(by_hand(layer.weight))
    x = torch.arange(3, 43).view(2, 20)
    vectors = [m.get_input_embeddings()(x).detach().requires_grad_() for m in (quantised, dense)]
    outs = [m(inputs_embeds=v).logits for m, v in zip((quantised, dense), vectors, strict=True)]
    assert torch.allclose(*[out.log_softmax(-1) for out in outs], atol=1e-4)
    for out in outs:
        out.pow(2).mean().backward()
    assert torch.allclose(vectors[0].grad, vectors[1].grad, rtol=1e-3, atol=1e-5)
    rows = lab.load_data("stories").sft.test[:64]
    ids = [model.tokenizer(r["prompt"] + r["completion"])["input_ids"] for r in rows]
    with torch.no_grad():
        nats = torch.cat([kl_of(before, quantised, torch.tensor([row])) for row in ids])
    assert nats.mean() < 0.1


def kl_of(model, other, ids):
    """KL between the distributions of every next token, in nats. (1, t) -> (t,)"""
    p, q = (m(ids).logits[0].log_softmax(-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize(("width", "taken"), [(96, False), (128, True)])
def test_4_bits_of_a_width_that_is_read_wrongly(bnb, tmp_path, width, taken):
    """models.md 24: bitsandbytes decodes a width of 96 wrongly on a CPU."""
    folder = make_folder(tmp_path, "llama", hidden_size=width, intermediate_size=64)
    if taken:
        lab.load(folder).in_4bit()
        return
    with pytest.raises(ValueError, match=rf"q_proj is {width} wide.*use a GPU") as refused:
        lab.load(folder).in_4bit()
    assert "\n" not in str(refused.value)


# -- mixtures of experts ------------------------------------------------------------------------
MIXTURE = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


def mixture(folder, asks):
    """A tiny Qwen3-MoE whose config asks for its routers' loss, or not."""
    tokenizer = make_tokenizer("qwen3", True)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {**MIXTURE, "vocab_size": len(tokenizer), "output_router_logits": asks}
    config = AutoConfig.for_model("qwen3_moe", **sizes, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asks", [False, True])
def test_a_mixture_is_trained_with_its_routers_loss_and_saved_as_it_came(asks, tmp_path):
    """TRL's SFT asks for that loss in the config, with which no response could be sampled."""
    model = mixture(tmp_path / "model", asks)
    losses = {}
    for weight in (None, 0):  # a whole number, where the config takes floats alone
        run = train("sft", model, tmp_path / str(weight), router_aux_loss_coef=weight)
        losses[weight] = run.metrics[0]
        saved = json.loads((run.model_path / "config.json").read_text())
        assert saved["output_router_logits"] is asks
        assert saved["router_aux_loss_coef"] == 0.001
    routers = losses[None]["aux_loss"]
    assert routers > 1  # at least that, and that for even use (Switch Transformers, eq. 4)
    assert losses[None]["loss"] == pytest.approx(losses[0]["loss"] + 0.001 * routers, rel=1e-6)
    assert "aux_loss" not in losses[0]


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_a_mixture_that_asks_for_its_routers_loss_goes_through_other_stages(stage, tmp_path):
    model = judged(lab.load(mixture(tmp_path / "model", True)), tmp_path / "judge")
    run = train(stage, model, tmp_path)
    assert run.status == "finished"
    assert json.loads((run.model_path / "config.json").read_text())["output_router_logits"]
