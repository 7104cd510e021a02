"""Layouts of PPO from a plan to a run: predicted, simulated and measured; what is on disk.

pytest tests/test_layout_runs.py
"""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import rlhf_lab as lab
from rlhf_lab.cli.main import main

LAYOUTS = {"shared": {}, "adapters": {"lora_r": 4}}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 16, "response_length": 24, "seed": 0}


@pytest.fixture(autouse=True, scope="module")
def data(few_stories):
    """Prompts of one length: a plan is for the longest rows, which so few batches may not hold."""
    tokenizer = lab.load("tiny").tokenizer
    rows = [(len(tokenizer(row["prompt"]).input_ids), row) for row in few_stories.prompts.train]
    (usual, _), *_ = Counter(length for length, _ in rows).most_common()
    alike = [row for length, row in rows if length == usual]
    return replace(few_stories, prompts=replace(few_stories.prompts, train=alike))


def train(layout, data, folder, **settings):
    plan = lab.plan("ppo", "tiny", data=data, layout=layout, **SHORT, **settings)
    return plan, lab.train(plan, data, out=folder, quiet=True)


def by_phase(ledger, quantity, source):
    out = {}
    for row in ledger.filter(quantity=quantity, source=source):
        out[row.phase] = out.get(row.phase, 0.0) + row.value
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_planned_is_simulated_and_measured(layout, data, tmp_path):
    """FLOPs of every scoring pass to a percent; bytes at the peak to 5 %."""
    plan, run = train(layout, data, tmp_path / "run", **LAYOUTS[layout])
    seen = lab.xray(plan)
    own = () if layout == "shared" else ("value",)  # else from the pass of the policy
    assert ("value" in by_phase(run.ledger, "flops", "measured")) == bool(own)
    for phase in ("old_logprobs", "reference", *own, "score", "forward", "backward"):
        predicted = by_phase(plan.ledger, "flops", "predicted")[phase]
        assert by_phase(seen.ledger, "flops", "simulated")[phase] == pytest.approx(predicted, 1e-3)
        assert by_phase(run.ledger, "flops", "measured")[phase] == pytest.approx(predicted, 0.03)
    assert seen.peak == pytest.approx(plan.peak, rel=0.05)
    measured = max(by_phase(run.ledger, "bytes", "measured").values())
    assert measured == pytest.approx(plan.peak, rel=0.05)


def test_less_memory_with_every_step():
    """At lengths and batch alike, parameters and states: four > shared > adapters."""
    resident = {}
    for layout, more in ({"four": {}} | LAYOUTS).items():
        plan = lab.plan("ppo", "tiny", layout=layout, **SHORT, **more)
        rows = plan.ledger.filter(quantity="bytes", phase="optimizer")
        stands = ("parameters", "optimizer", "gradients")
        resident[layout] = sum(r.value for r in rows if r.component in stands)
    assert resident["four"] > 1.5 * resident["shared"] > 3 * resident["adapters"]


def test_a_shared_run_saves_a_plain_policy(data, tmp_path):
    from transformers import AutoModelForCausalLM

    _, run = train("shared", data, tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(run.model_path)
    start = lab.load("tiny").sft.state_dict()
    assert start.keys() == loaded.state_dict().keys()
    assert any(not torch.equal(w, start[n]) for n, w in loaded.state_dict().items())


def test_an_adapters_run_saves_one_adapter_and_the_whole(data, tmp_path):
    """Plain peft on the SFT model says what the merged model says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, run = train("adapters", data, tmp_path / "run", lora_r=4)
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert {w.shape[0] for n, w in saved.items() if "lora_A" in n} == {4}
    ids = torch.tensor([[5, 9, 77, 300]])
    adapted = PeftModel.from_pretrained(lab.load("tiny").sft, run.folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run.model_path)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_reward_adapter_of_ones_own(data, tmp_path, capsys):
    """`train reward` with LoRA makes one, offset and all; `--reward-model` takes its folder."""
    reward = lab.train(
        lab.plan("reward", "tiny", lora_r=2, max_steps=2, seed=0),
        data,
        out=tmp_path / "reward",
        quiet=True,
    )
    folder = reward.folder / "adapter"
    saved = json.loads((folder / "score.json").read_text())
    assert saved["score_offset"] == reward.summary["score_offset"] != 0
    line = ["train", "ppo", "--reward-model", str(folder), "--quiet", "--set", "lora_r=4"]
    line += ["--set", "response_length=24", "--set", "per_device_train_batch_size=8"]
    line += ["--steps", "1", "--out", str(tmp_path / "ppo")]
    assert main([*line, "--set", "layout=adapters"]) == 0
    assert lab.Run.load(tmp_path / "ppo").status == "finished"
    assert main([*line[:-1], str(tmp_path / "four")]) == 2
    assert "is an adapter: it needs --set layout=adapters" in capsys.readouterr().err
    assert not (tmp_path / "four").exists()


def test_a_base_in_4_bits(data, tmp_path):
    """QLoRA: the ratio of the first step is 1 all the same; what is merged was never rounded."""
    pytest.importorskip("bitsandbytes")
    plan, run = train("adapters", data, tmp_path / "run", lora_r=4, load_in_4bit=True)
    assert all(line["first_ratio_error"] < 1e-5 for line in run.metrics)
    whole = lab.plan("ppo", "tiny", data=data, layout="adapters", **SHORT, lora_r=4)
    parameters = [by_component(p.ledger)["parameters"] for p in (plan, whole)]
    assert parameters[0] < 0.6 * parameters[1]
    measured = by_component(run.ledger.filter(source="measured"))["parameters"]
    assert measured == pytest.approx(parameters[0], rel=0.05)
    for phase in ("reference", "score", "forward"):
        predicted = by_phase(plan.ledger, "flops", "predicted")[phase]
        assert by_phase(run.ledger, "flops", "measured")[phase] == pytest.approx(predicted, 0.03)
    weights = load_file(run.model_path / "model.safetensors")
    start = lab.load("tiny").sft.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[name] - start[name]).abs().max() < 0.05  # two steps of adapters, no NF4
    assert torch.equal(weights["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="no x-ray of load_in_4bit"):
        lab.xray(plan)


def by_component(ledger):
    """Bytes of the optimizer's phase by component."""
    out = {}
    for row in ledger.filter(quantity="bytes", phase="optimizer"):
        out[row.component] = out.get(row.component, 0.0) + row.value
    return out


def test_4_bits_of_ppo_need_one_base_and_bitsandbytes(monkeypatch, data, tmp_path):
    import sys

    plan = lab.plan("ppo", "tiny", load_in_4bit=True, lora_r=4, **SHORT)
    with pytest.raises(ValueError, match="one base in 4 bits alone: set layout=adapters"):
        lab.train(plan, data, out=tmp_path / "four", quiet=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="load_in_4bit needs bitsandbytes: pip install"):
        lab.load("tiny").in_4bit()
