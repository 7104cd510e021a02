"""What is exported, read by those it is for: huggingface_hub, transformers, the gguf package.

Run: pytest tests/deploy/test_export.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.deploy import export as exporting
from rlhf_lab.models.load import small_models_folder
from rlhf_lab.runs.run import Run
from rlhf_lab.stages import STAGES, TRAINABLE, resolve

MINI = small_models_folder() / "mini"
QWEN = "Qwen/Qwen2.5-0.5B"
FIGURES = {
    "seconds": 3.0,
    "gold_reward": 8.5,
    "before/gold_reward": 7.25,
    "kl": 1.5,
    "dropped": {"too long": 0},
}
PROMPTS = [
    "Write a funny story about a mouse and a key in the cave.\n",
    "Write a sad story about a wolf and a kite in the garden.\n",
]


def make(
    folder: Path, stage: str = "dpo", kind: str = "sft", status: str = "finished", **more: object
) -> Run:
    """A run whose model is a bundled one."""
    what = {"model": "mini", "data": "stories", "settings": {"beta": 0.5, "max_steps": None}}
    run = Run.create(folder, stage=stage, **{**what, **more})
    shutil.copytree(MINI / kind, folder / "model")
    run.finish(status, **FIGURES)
    return run


def texts_of(folder: Path) -> str:
    return "".join(f.read_text() for f in folder.iterdir() if f.suffix != ".safetensors")


# ------------------------------------------------------------------------------------------ hub


def test_the_card_is_what_readers_of_trl_s_cards_look_for(tmp_path):
    """Read back by huggingface_hub; `base_model` is an id of the hub, or not there."""
    run = make(tmp_path / "run", model="qwen2.5-0.5b")
    said = str(lab.export(run, out=tmp_path / "out"))
    about = ModelCard.load(tmp_path / "out/README.md").data
    assert about.base_model == QWEN and about.library_name == "transformers"
    assert {"trl", "dpo"} <= set(about.tags) and about.pipeline_tag == "text-generation"
    assert {r.metric_type: r.metric_value for r in about.eval_results} == {
        "gold_reward": 8.5,
        "kl": 1.5,
    }
    assert {r.dataset_name for r in about.eval_results} == {"stories"}
    assert about.license is None and "no licence" in said, "nobody has told it"
    assert "nothing is sent" in said and f"hf upload OWNER/NAME {tmp_path}" in said
    page = (tmp_path / "out/README.md").read_text()
    assert "| gold_reward | 7.25 | 8.5 |" in page and "- beta: 0.5" in page
    assert "max_steps" not in page


def test_a_bundled_base_is_named_and_not_linked(tmp_path):
    lab.export(make(tmp_path / "run"), out=tmp_path / "out")
    about = ModelCard.load(tmp_path / "out/README.md").data
    assert about.base_model is None and about.datasets is None
    assert about.license == ModelCard.load(MINI / "base/README.md").data.license == "apache-2.0"
    assert "dpo of mini (not on the hub) on stories" in (tmp_path / "out/README.md").read_text()


def test_no_path_of_this_machine_leaves_it(tmp_path):
    base, rows = tmp_path / "secret" / "my-base", tmp_path / "secret" / "mine.jsonl"
    shutil.copytree(MINI / "sft", base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    run = make(tmp_path / "run", model=str(base), data=str(rows), settings={"deepspeed": str(rows)})
    lab.export(run, out=tmp_path / "out")
    about = ModelCard.load(tmp_path / "out/README.md").data
    assert (about.license, about.license_name, about.base_model) == ("other", "mine", None)
    whole = texts_of(tmp_path / "out")
    assert "secret" not in whole and "my-base" in whole and "mine.jsonl" in whole


def test_what_only_looks_like_an_id_of_the_hub_is_none(tmp_path, monkeypatch):
    """A folder's relative path has the form owner/name; what the hub's cache has, is one."""
    assert exporting.hub_id("runs/model") is None and exporting.hub_id("mini") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--me--pairs").mkdir()
    assert exporting.hub_id("me/pairs") == "me/pairs"


@pytest.mark.parametrize("stage", TRAINABLE)
def test_the_stage_s_tag_is_trl_s(stage):
    theirs = resolve(STAGES[stage].trainer)._tag_names if STAGES[stage].trainer else ["trl", "ppo"]
    assert theirs == ["trl", exporting.TRL_TAGS.get(stage, stage)]


def test_of_an_unfinished_run_no_figure_is_claimed(tmp_path):
    lab.export(make(tmp_path / "run", status="stopped"), out=tmp_path / "out")
    assert not ModelCard.load(tmp_path / "out/README.md").data.eval_results
    assert "**stopped at step 0**" in (tmp_path / "out/README.md").read_text()


FRESH = """
import sys, torch, transformers
for kind, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a fox", return_tensors="pt")
    torch.save((ids.input_ids, model(**ids).logits), folder + "/logits.pt")
assert "rlhf_lab" not in sys.modules
"""


def test_plain_transformers_loads_it_to_equal_logits(tmp_path):
    """In a fresh process, a policy and a reward model."""
    lab.export(make(tmp_path / "dpo"), out=tmp_path / "sft")
    lab.export(make(tmp_path / "rm", stage="reward", kind="reward"), out=tmp_path / "reward")
    kinds = {"sft": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
    given = [word for of, kind in kinds.items() for word in (kind, str(tmp_path / of))]
    subprocess.run([sys.executable, "-c", FRESH, *given], check=True)
    for of in kinds:
        ids, logits = torch.load(tmp_path / of / "logits.pt")
        with torch.no_grad():
            assert torch.equal(logits, getattr(lab.load("mini"), of)(ids).logits)
    about = ModelCard.load(tmp_path / "reward/README.md")
    assert about.data.pipeline_tag == "text-classification" and "score_offset" in about.text


def test_engines_are_told_to_sample_and_where_to_end(tmp_path):
    lab.export(make(tmp_path / "run"), out=tmp_path / "out")
    told = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (told.do_sample, told.temperature, told.top_k, told.top_p) == (True, 1.0, 0, 1.0)
    file = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert file["eos_token_id"] == 1 and not file["_from_model_config"]
    # transformers samples from all tokens then, as the model's own distribution has them
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.zeros((1, 1), dtype=torch.long)
    how = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    got = model.generate(ids, max_new_tokens=1, **how)
    assert torch.equal(got.logits[0], got.scores[0])


def test_an_adapter_alone_needs_a_base_that_others_have(tmp_path):
    run = make(tmp_path / "run", model=QWEN)
    with pytest.raises(ValueError, match="has no adapter"):
        lab.export(run, out=tmp_path / "out", adapter=True)
    lm = get_peft_model(lab.load("mini").sft, LoraConfig(r=4, task_type="CAUSAL_LM"))
    lm.save_pretrained(run.folder / "adapter")
    with pytest.raises(ValueError, match="base is not on the hub"):
        lab.export(run, out=tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()
    file = run.folder / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": QWEN}))
    lab.export(run, out=tmp_path / "out", adapter=True)
    about = ModelCard.load(tmp_path / "out/README.md").data
    assert (about.library_name, about.base_model) == ("peft", QWEN)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    for said in (
        lab.export(run, "vllm-check", adapter=True),
        lab.export(file.parent, "vllm-check"),
    ):
        assert "--max-lora-rank 4" in str(said)


# ------------------------------------------------------------------------------------- refusals


def test_nothing_is_lost_and_nothing_is_left_half_written(tmp_path, capsys):
    run, out = make(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(["export", str(run.folder), "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith("not empty: choose another folder (--out)\n")
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    (run.folder / "model/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer"):
        lab.export(run, "gguf", out=out)
    assert [*out.iterdir()] == [] and sorted(f.name for f in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"to": "onnx"}, "choose from hub, gguf, vllm-check"),
        ({"to": "vllm-check"}, "vllm-check writes nothing: leave out= out"),
        ({"run": "nowhere"}, "no model 'nowhere'"),
        ({"to": "gguf", "adapter": True}, "adapter is for a run, to hub or vllm-check"),
        (
            {"run": str(MINI / "sft")},
            "is a model: the hub's layout is for a run; to='gguf' takes it",
        ),
        ({"run": "mini"}, "mini is a model: .*; to='gguf' takes it"),
        ({"run": QWEN, "to": "gguf"}, "is not on this machine: hf download"),
    ],
)
def test_what_cannot_be_exported_is_said(tmp_path, given, line):
    with pytest.raises((ValueError, OSError), match=line):
        lab.export(**{"run": make(tmp_path / "run"), "out": tmp_path / "out", **given})
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_going_on_or_has_no_model_is_refused(tmp_path):
    going = Run.create(tmp_path / "going", stage="sft", model="mini", settings={})
    with pytest.raises(ValueError, match="still training"):
        lab.export(going, out=tmp_path / "out")
    going.finish("stopped")
    with pytest.raises(OSError, match="has no model"):
        lab.export(going, out=tmp_path / "out")


# ----------------------------------------------------------------------------------------- GGUF


def test_transformers_reads_the_gguf_file_to_equal_greedy_text(tmp_path):
    pytest.importorskip("gguf", reason="pip install gguf")
    run = make(tmp_path / "run")
    assert main(["export", str(run.folder), "--to", "gguf", "--out", str(tmp_path / "out")]) == 0
    where = {"pretrained_model_name_or_path": tmp_path / "out", "gguf_file": "run.gguf"}
    theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    ours, tokenizer = lab.load("mini").sft, AutoTokenizer.from_pretrained(**where)
    mine = AutoTokenizer.from_pretrained(MINI / "sft")
    assert tokenizer.chat_template == mine.chat_template
    for text in (*PROMPTS, "  \u00c9mile's 1234 caf\u00e9s,\n\n\tI'LL \U0001f98a <|end|> x"):
        assert tokenizer(text).input_ids == mine(text).input_ids
    ids = mine(PROMPTS, return_tensors="pt", padding=True)
    greedy = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": 1, "pad_token_id": 0}
    told, made = (model.generate(**ids, **greedy) for model in (ours, theirs))
    assert torch.equal(told, made) and told.shape[1] > 30


def test_grouped_heads_biases_a_head_of_its_own_and_spare_rows(tmp_path):
    """Of 4 heads of queries and 2 of keys; the vocabulary has more rows than the tokenizer."""
    pytest.importorskip("gguf", reason="pip install gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1030}
    more = {"initializer_range": 0.5, "attention_bias": True, "rms_norm_eps": 1e-3}
    more["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **more)).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "model")
    lab.load("mini").tokenizer.save_pretrained(tmp_path / "model")
    lab.export(tmp_path / "model", "gguf", out=tmp_path / "out")
    where = {"pretrained_model_name_or_path": tmp_path / "out", "gguf_file": "model.gguf"}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attention_bias=True)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("config.json", {"model_type": "qwen2"}, "qwen2 is not written here"),
        ("config.json", {"architectures": ["LlamaForSequenceClassification"]}, "gives scores"),
        ("config.json", {"quantization_config": {"quant_method": "x"}}, "weights are quantised"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn"}}, "positions of kind yarn"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "splits texts by Whites"),
        ("tokenizer.json", {"pre_tokenizer": None}, "splits texts by none"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "with settings of its own"),
        (
            "tokenizer.json",
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                }
            },
            "with settings of its own",
        ),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path, file, change, line):
    pytest.importorskip("gguf", reason="pip install gguf")
    folder = tmp_path / "model"
    shutil.copytree(MINI / "sft", folder)
    whole = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**whole, **change}))
    with pytest.raises(ValueError, match=line):
        lab.export(folder, "gguf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- vLLM


def test_what_vllm_says_without_vllm(tmp_path):
    """Each was seen with vLLM 0.32 on a CPU: bf16 of fp32 weights, heads of 24 numbers
    ("Unsupported CPU attention configuration"), a longer context, a folder without tokenizer."""
    said = str(lab.export(MINI / "sft", "vllm-check"))
    assert "--dtype float32 keeps them" in said and "at most 1024 tokens" in said
    assert "refused" not in said.replace("it refuses --max-model-len above", "")
    assert str(lab.export("mini", "vllm-check")) == said, "by its name too"
    assert "--runner pooling" in str(lab.export(MINI / "reward", "vllm-check"))
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((MINI / "sft/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 24}))
    said = str(lab.export(folder, "vllm-check"))
    assert "refused on a CPU: heads are 24 wide" in said and "no tokenizer" in said
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 2, "dtype": "float32"}
    rounded = {**gpt2, "quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(rounded))
    said = str(lab.export(folder, "vllm-check"))
    assert "weights in fewer bits (torchao)" in said
    assert "heads are" not in said and "float32" not in said
