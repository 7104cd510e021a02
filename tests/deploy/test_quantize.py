"""Models in fewer bits: weights and products against dequantisation written out by hand, bytes
against the plan, what is left as it was, and what is refused.

pytest tests/deploy/test_quantize.py
"""

import subprocess
import sys

import pytest
import torch
from families import make_folder
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.deploy.quantize import _dense
from rlhf_lab.runs.run import Run
from rlhf_lab.trainers.diverged import broken_weight
from rlhf_lab.trainers.evaluate import pair_scores, perplexity, policy_report

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="needs torchao: pip install 'rlhf-lab[quantize]'")


@pytest.fixture
def bnb():
    why = "needs bitsandbytes: pip install 'rlhf-lab[quantize]'"
    return pytest.importorskip("bitsandbytes", reason=why)


@pytest.fixture(params=["bf16", "int8", "int8-dynamic", "nf4"])
def to(request):
    if request.param != "bf16":
        request.getfixturevalue("bnb" if request.param == "nf4" else "torchao")
    return request.param


def rounded(x):
    """8 bits a number and one scale a row, whose largest number is 127. (n, w) → codes, (n, 1)"""
    scales = x.abs().amax(1, keepdim=True) / 127.5
    return (x / scales).round().clamp(-128, 127), scales


@torch.no_grad()
def test_int8_weights_and_products_are_those_written_out_by_hand(torchao):
    made, dense = lab.quantize("tiny", "int8", data=None), lab.load("tiny").sft
    small, layers = made.sft, 0
    for name, layer in small.named_modules():
        if not hasattr(getattr(layer, "weight", None), "qdata"):
            continue
        layers += 1
        whole = dense.get_submodule(name).weight
        codes, scales = rounded(whole)
        assert torch.allclose(layer.weight.scale, scales, rtol=1e-6)
        others = codes != layer.weight.qdata  # where fp32 cannot tell which whole number is nearer
        halves = (whole / scales - codes)[others].abs()
        assert others.float().mean() < 0.01 and torch.allclose(halves, halves * 0 + 0.5, atol=1e-4)
        whole.copy_(layer.weight.qdata * scales)
    assert layers == 7 * dense.config.num_hidden_layers
    assert torch.allclose(small(IDS).logits, dense(IDS).logits, atol=1e-4)


@torch.no_grad()
def test_dynamic_int8_rounds_its_inputs_token_by_token(torchao):
    layer = lab.quantize("tiny", "int8-dynamic", data=None).sft.model.layers[0].mlp.up_proj
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = rounded(x)
    by_hand = (codes @ layer.weight.qdata.float().T) * scales * layer.weight.scale.view(1, -1)
    assert torch.allclose(layer(x), by_hand, atol=1e-5)
    assert (layer(x) - x @ layer.weight.dequantize().T).abs().max() > 1e-3  # and not the inputs


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("name", ["mini", "small"])
def test_the_file_is_as_large_as_planned(name, stage, to):
    made = lab.quantize(name, to, stage=stage, data=None)
    (file,) = made.folder.glob("*.safetensors")
    assert made.figures["bytes"] == file.stat().st_size
    assert made.figures["planned_bytes"] == pytest.approx(file.stat().st_size, rel=0.005)
    if stage == "reward" or to == "bf16":
        return
    with safe_open(file, "pt") as weights:  # numbers, without bitsandbytes' tables
        tensors = {n: weights.get_tensor(n) for n in weights.keys() if "quant_" not in n}
    plan = lab.plan("inference", made)  # knows the format from the folder
    held = [f.bytes["policy", "parameters"] for f in plan.estimate.phases]
    assert set(held) == {sum(t.numel() * t.element_size() for t in tensors.values())}


@torch.no_grad()
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_what_is_saved_loads_as_it_was(stage, to, tmp_path):
    made = lab.quantize("tiny", to, stage=stage, out=tmp_path / "small", data=None)
    again = getattr(lab.load(tmp_path / "small"), stage)
    assert torch.equal(getattr(made, stage)(IDS).logits, again(IDS).logits)
    if stage == "sft":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
        for name, weight in again.state_dict().items():
            other = plain.state_dict()[name]
            assert torch.equal(getattr(weight, "qdata", weight), getattr(other, "qdata", other))
        (answer,) = lab.generate(tmp_path / "small", "A story.\n", max_new_tokens=4, temperature=0)
        assert lab.generate(made, "A story.", max_new_tokens=4, temperature=0) == [answer]


def test_what_a_library_leaves_as_it_was_is_said(torchao, tmp_path):
    made = lab.quantize("tiny", "int8", data=None)
    assert made.dense == {
        "an embedding: looked up, not multiplied": ["model.embed_tokens"],
        "is model.embed_tokens": ["lm_head"],
    }
    assert "left as it was: model.embed_tokens (an embedding" in repr(made)
    untied = lab.quantize(make_folder(tmp_path, "llama", tie_word_embeddings=False), data=None)
    assert untied.dense["left by transformers: a head"] == ["lm_head"]
    with pytest.raises(ValueError, match=r"reaches no matrix.*Conv1D: only nn.Linear is rounded"):
        lab.quantize(make_folder(tmp_path, "gpt2"), data=None, out=tmp_path / "gpt2-8")
    assert not (tmp_path / "gpt2-8").exists()


def test_int4_says_which_layers_its_groups_do_not_fit():
    """On a GPU torchao leaves them without a word."""
    layers = torch.nn.ModuleDict({"narrow": torch.nn.Linear(96, 8), "wide": torch.nn.Linear(64, 8)})
    layers["wide"].weight.qdata = None  # as a rounded one
    assert _dense(layers, "int4") == {"96 wide, no multiple of the groups of 64": ["narrow"]}


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"to": "int4"}, "int4 needs a GPU"),
        ({"to": "nf3"}, "to='nf3': did you mean 'nf4'. choose from fp32"),
        ({"to": "INT8"}, "to='INT8': did you mean 'int8'"),
        ({"stage": "value"}, "no 'value' of tiny: it has base, sft, reward"),
        ({"prompts": 0}, "prompts=0: 1 or more, or data=None"),
        ({"response_length": 1024}, "no prompt that leaves room"),
        ({"of": Run.stored("ppo_small"), "stage": "reward"}, "ppo_small is a run: leave stage"),
    ],
)
def test_what_cannot_be_is_one_line(how, line, tmp_path):
    with pytest.raises(ValueError, match=line) as refused:
        lab.quantize(**{"of": "tiny", "out": tmp_path / "small", **how})
    assert "\n" not in str(refused.value) and not (tmp_path / "small").exists()


REFUSED = """
import sys
from rlhf_lab.cli.main import main
assert main(["quantize", "tiny", "--to", "bad"]) == main(["quantize", "tiny", "--out", "."]) == 2
assert main(["quantize", "tiny", "--stage", "value"]) == 2
print({"torch", "transformers"} & set(sys.modules))
"""


def test_what_can_be_refused_at_once_is(tmp_path):
    """Six seconds went into imports before a misspelled format was refused."""
    (tmp_path / "here").touch()
    run = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", REFUSED], **run)
    assert done.stdout == "set()\n", done.stdout + done.stderr
    assert done.stderr.count("rlhf-lab: ") == 3


def test_packages_and_folders_that_are_missing_or_in_the_way(bnb, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="4 bits: .* is 96 wide.*use a GPU, or more bits"):
        lab.quantize(make_folder(tmp_path, "llama", hidden_size=96), "nf4", data=None)
    made = lab.quantize("mini", "nf4", out=tmp_path / "small", data=None)
    with pytest.raises(FileExistsError, match="is not empty: choose another folder"):
        lab.quantize("mini", "nf4", out=tmp_path / "small", data=None)
    with pytest.raises(ValueError, match="is in nf4 already: round the whole model"):
        lab.quantize(made, "nf4", data=None)
    rows = lab.load_data("stories").first(8, test=2)
    for stage in ("sft", "reward", "dpo", "ppo"):
        with pytest.raises(ValueError, match=r"in fewer bits \(bitsandbytes\): it can be eval"):
            lab.train(lab.plan(stage, tmp_path / "small"), rows, out=tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="is in fewer bits"):  # its value model would start there
        lab.train(lab.plan("ppo", lab.load("mini").with_stage("reward", made.folder)), rows)
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"int8 needs torchao: pip install 'rlhf-lab\[quantize\]'"):
        lab.quantize("mini", "int8", data=None)


def test_rounded_weights_are_looked_at_for_what_is_no_number(torchao):
    """A teacher and a reward model may be rounded; torchao's tensors know no minimum."""
    model = lab.quantize("mini", "int8", data=None).sft
    assert broken_weight(model) == ""
    model.model.layers[1].mlp.up_proj.weight.scale.data[0] = torch.nan
    assert broken_weight(model) == "model.layers.1.mlp.up_proj.weight"


# -- what it costs ----------------------------------------------------------------------------
@torch.no_grad()
def test_perplexity_is_that_of_transformers_loss():
    tokenizer, model = lab.load("mini").tokenizer, lab.load("mini").sft
    rows = lab.load_data("stories").sft.test[:20]
    nats = tokens = 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        nats += float(model(ids, labels=labels).loss) * len(answer)
        tokens += len(answer)
    by_hand = torch.tensor(nats / tokens).exp()
    assert perplexity(model, tokenizer, rows) == pytest.approx(float(by_hand), rel=1e-5)


def test_figures_of_a_policy(bnb):
    made = lab.quantize("mini", "nf4", prompts=24, response_length=16)
    f = made.figures
    assert f["gold_change"] == pytest.approx(f["gold_reward"] - f["before/gold_reward"], abs=1e-5)
    assert f["gold_change_error"] > 0 and f["tokens_per_second"] > 0
    assert f["perplexity"] > f["before/perplexity"] > 1
    # The same samples, and at each of their tokens the sum over the whole vocabulary.
    models, nats, tokens = (made.sft, lab.load("mini").sft), 0.0, 0
    rows = lab.load_data("stories").prompts.test[:24]
    how = {"max_new_tokens": 16, "seed": 1234}
    _, answers = policy_report(models[0], made.tokenizer, rows, **how)
    for prompt, ids in zip(answers.prompt_ids, answers.ids, strict=True):
        at = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            logits = [m(torch.tensor([prompt + ids])).logits[0, at] for m in models]
        small, whole = (x.log_softmax(-1) for x in logits)
        nats, tokens = nats + float((small.exp() * (small - whole)).sum()), tokens + len(ids)
    assert f["kl_per_token"] == pytest.approx(nats / tokens, rel=0.3)
    assert "KL to whole, nats/token" in made._repr_html_()


def test_figures_of_a_reward_model(bnb):
    data, made = lab.load_data("stories"), lab.quantize("mini", "nf4", stage="reward", prompts=40)
    models, pairs = (lab.load("mini").reward, made.reward), data.preferences.test[:40]
    old, new = (pair_scores(m, made.reward_tokenizer, pairs) for m in models)
    alike = ((old[:, 0] > old[:, 1]) == (new[:, 0] > new[:, 1])).float().mean()
    assert made.figures["pair_agreement"] == pytest.approx(float(alike))
    places = [x.flatten().argsort().argsort() for x in (old, new)]
    n, gaps = len(places[0]), (places[0] - places[1]).double()
    by_hand = 1 - 6 * float(gaps.square().sum()) / (n * (n * n - 1))
    assert made.figures["rank_correlation"] == pytest.approx(by_hand, abs=1e-3)  # ties aside
    assert 0.9 < by_hand < 1


def test_a_lora_that_was_merged_before_it_was_rounded(bnb, tmp_path):
    data = lab.load_data("stories").first(32, test=8)
    settings = {"lora_r": 4, "max_steps": 2, "learning_rate": 0.02, "warmup_steps": 0}
    run = lab.train(lab.plan("sft", "mini", **settings), data, out=tmp_path / "run", quiet=True)
    made = lab.quantize(run.folder, "nf4", data=data, prompts=8, response_length=8)
    merged, apart = made.figures["kl_per_token"], made.figures["kl_of_adapter"]
    assert merged > 0 and apart > 0 and merged != apart
    assert "KL, adapter on rounded base" in repr(made)
    weights = [m.sft.state_dict()["model.norm.weight"] for m in (made, lab.load(run.model_path))]
    assert torch.equal(*weights)  # the run's model, not the one that it began as


def test_the_command(bnb, tmp_path, capsys):
    out = str(tmp_path / "small")
    assert main(["quantize", "mini", "--to", "nf4", "--prompts", "4", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "file as planned" in printed and "rounded and saved in" in printed and out in printed
    assert main(["quantize", "mini", "--to", "int4", "--out", out + "-4"]) == 2
    assert "int4 needs a GPU" in capsys.readouterr().err
