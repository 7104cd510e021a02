"""Plans from the files that people have, and as files that TRL and accelerate read.

pytest tests/cli/test_config_files.py
"""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest
import yaml

import rlhf_lab as lab
from rlhf_lab.cli.config_files import as_flags, read_config
from rlhf_lab.cli.main import main
from rlhf_lab.stages import STAGES, TRAINABLE, resolve

SETTINGS = {
    "sft": {"packing": True, "max_length": 256, "lora_r": 4},
    "reward": {"per_device_train_batch_size": 4},
    "ppo": {"num_ppo_epochs": 1, "total_episodes": 640},
    "dpo": {"beta": 0.3, "gradient_checkpointing": True, "prompt_length": 20, "rows": 900},
    "kto": {"precompute_ref_log_probs": True},
    "rloo": {"num_generations": 2, "response_length": 32},
    "grpo": {"num_generations": 8, "response_length": 32},
    "distill": {"beta": 0.5, "response_length": 32, "teacher_model": "mini"},
}


@pytest.mark.parametrize("stage", TRAINABLE)
def test_trls_own_parser_reads_what_is_written(stage, tmp_path, monkeypatch):
    """And the plan made of the file is the plan it was written from."""
    from trl import ModelConfig, TrlParser

    plan = lab.plan(stage, "tiny", **SETTINGS[stage])
    file = tmp_path / "trl.yaml"
    file.write_text(plan.trl_config())
    found = read_config(file)
    again = lab.plan(found.stage, found.model, **found.settings)
    assert not found.unread
    assert list(again.ledger) == list(plan.ledger)
    if stage == "ppo":
        return  # TRL has no PPO any more
    parser = TrlParser((resolve(STAGES[stage].config), ModelConfig))
    config, model = parser.parse_args_and_config(
        ["--config", str(file), "--output_dir", str(tmp_path)]
    )
    assert model.model_name_or_path == "tiny"
    for name in SETTINGS[stage].keys() & vars(config).keys():
        assert getattr(config, name) == SETTINGS[stage][name]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"gpus": 1}, "NO"),
        ({"gpus": 4, "sharding": "ddp"}, "MULTI_GPU"),
        ({"gpus": 8, "sharding": "zero3", "offload": "all"}, "DEEPSPEED"),
        ({"gpus": 8, "sharding": "zero2", "offload": "optimizer"}, "DEEPSPEED"),
        ({"gpus": 16, "nodes": 2, "sharding": "fsdp2"}, "FSDP"),
    ],
)
def test_accelerates_own_parser_and_ours_read_the_same(settings, kind, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    plan = lab.plan("sft", "Qwen/Qwen2.5-0.5B", hardware="h100", **settings)
    file = tmp_path / "acc.yaml"
    file.write_text(plan.accelerate_config())
    theirs = load_config_from_file(str(file))
    assert theirs.distributed_type.value == kind and theirs.num_processes == settings["gpus"]
    found = read_config(file)
    again = lab.plan("sft", "Qwen/Qwen2.5-0.5B", hardware="h100", **found.settings)
    assert list(again.ledger) == list(plan.ledger)


UNREAD = [
    ("{zero_optimization: {stage: 3, zero_nonsense: 1}}", "zero_optimization.zero_nonsense: 1"),
    (
        "{zero_optimization: {stage: 3, zero_hpz_partition_size: 8, overlap_comm: true}}",
        "zero_optimization.zero_hpz_partition_size: 8",
    ),
    ("{optimizer: {type: SGD}, zero_optimization: {stage: 1}}", "optimizer.type: SGD"),
    ("{optimizer: {type: AdamW, params: {lr: auto}}, zero_optimization: {stage: 1}}", ""),
    (
        "{tensor_parallel: {autotp_size: 2}, activation_checkpointing: "
        "{partition_activations: true}, zero_optimization: {stage: 1}}",
        "tensor_parallel: {'autotp_size': 2}, activation_checkpointing: "
        "{'partition_activations': True}",
    ),
    (
        "{distributed_type: MULTI_GPU, num_processes: 8, mixed_precision: fp8, same_network: true, "
        "dynamo_config: {dynamo_mode: max-autotune}, nonsense: 3}",
        "mixed_precision: fp8, dynamo_config.mode: max-autotune, nonsense: 3",
    ),
    (
        "{distributed_type: FSDP, num_processes: 8, fsdp_config: {fsdp_version: 2, offload_params: "
        "'false', fsdp_transformer_layer_cls_to_wrap: Qwen2DecoderLayer, fsdp_layers: 3}}",
        "fsdp_config.layers: 3",
    ),
]


@pytest.mark.parametrize(("text", "line"), UNREAD)
def test_keys_that_are_not_understood_head_the_answer(text, line, tmp_path, capsys):
    (file := tmp_path / "file.yaml").write_text(text)
    how = ["--model", "mini", "--hardware", "h100", "--gpus", "8"]
    assert main(["plan", "sft", "--config", str(file), *how]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    tool = "accelerate" if "distributed_type" in text else "DeepSpeed"
    assert first == f"not read: {line} ({tool})" if line else not first.startswith("not read")


FSDP2 = {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}}


def test_what_accelerate_does_by_itself_is_planned(tmp_path):
    """Layers that FSDP recomputes, layers shared by devices, compiled ones: as by our own names."""
    fsdp = {"fsdp_version": 2, "fsdp_activation_checkpointing": True}
    tensor = {"parallelism_config_tp_size": 2, "parallelism_config_dp_shard_size": 4}
    ours = {"gpus": 8, "sharding": "fsdp2"}
    file = tmp_path / "acc.yaml"
    for more, expected in [
        ({"fsdp_config": fsdp}, {"gradient_checkpointing": True}),
        ({"parallelism_config": tensor}, {"tensor_parallel": 2}),
    ]:
        file.write_text(yaml.safe_dump(FSDP2 | more))
        found = read_config(file)
        assert not found.unread
        how = {"hardware": "h100", "per_device_train_batch_size": 4, "max_length": 1024}
        plans = [
            lab.plan("sft", "Qwen/Qwen2.5-7B", **how, **s)
            for s in (found.settings, ours | expected, ours)
        ]
        assert plans[0].peak == plans[1].peak < plans[2].peak
    file.write_text("distributed_type: NO\ndynamo_backend: INDUCTOR\n")
    assert read_config(file).settings == {"gpus": 1, "torch_compile": True}


def test_a_rank_that_trl_does_not_use_is_said(tmp_path, capsys):
    (file := tmp_path / "trl.yaml").write_text("model_name_or_path: mini\nlora_r: 16\n")
    assert main(["plan", "sft", "--config", str(file), "--hardware", "h100"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("not read: lora_r (TRL trains all weights without use_peft: true)")
    assert any("trained all weights" in line for line in rest)
    assert main(["train", "sft", "--config", str(file)]) == 2
    assert "without use_peft: true): write it, or leave lora_r out" in capsys.readouterr().err
    file.write_text(file.read_text() + "use_peft: true\n")
    assert read_config(file).settings["lora_r"] == 16 and not read_config(file).unread


def test_files_that_a_file_names_are_read(tmp_path, capsys, monkeypatch):
    """DeepSpeed's as accelerate finds it, accelerate's as TRL does, FSDP's part in axolotl's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    ds = {"deepspeed_config_file": "configs/ds.json"}
    for name, text in {
        "ds.json": json.dumps({"zero_optimization": {"stage": 3, "nonsense": 1}}),
        "acc.yaml": yaml.safe_dump(
            FSDP2 | {"distributed_type": "DEEPSPEED"} | {"deepspeed_config": ds}
        ),
        "trl.yaml": "model_name_or_path: mini\naccelerate_config: configs/acc.yaml\n",
        "fsdp1.yaml": "model_name_or_path: mini\naccelerate_config: fsdp1\n",
    }.items():
        (tmp_path / "configs" / name).write_text(text)
    line = ["plan", "sft", "--hardware", "h100", "--config"]
    assert main([*line, "configs/trl.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("not read: zero_optimization.nonsense: 1 (accelerate)")
    assert "devices 8, sharding zero3" in out
    assert main([*line, "configs/fsdp1.yaml"]) == 0
    assert capsys.readouterr().out.startswith("not read: accelerate_config: fsdp1 (TRL)")
    fsdp = {"offload_params": True, "activation_checkpointing": True, "layers": 3}
    more = {"base_model": "tiny", "fsdp_config": fsdp}
    (file := tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(more | {"fsdp_version": 2}))
    found = read_config(file)
    expected = {"sharding": "fsdp2", "offload": "all", "gradient_checkpointing": True}
    assert found.settings == expected and found.unread == ["fsdp_config.layers: 3"]
    file.write_text(yaml.safe_dump(more))
    with pytest.raises(ValueError, match="FSDP 1 is not planned"):
        read_config(file)


AXOLOTL = """
base_model: Qwen/Qwen2.5-7B
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: paged_adamw_8bit
bf16: auto
flash_attention: true
gradient_checkpointing: true
datasets: [{path: rows.jsonl, type: alpaca}]
wandb_project: mine
unheard_of: 3
"""
FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
dataset: dpo_en_demo
template: qwen
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
bf16: true
deepspeed: ds.json
"""


def test_axolotls_file(tmp_path):
    file = tmp_path / "axolotl.yaml"
    file.write_text(AXOLOTL)
    found = read_config(file)
    assert (found.tool, found.stage, found.unread) == ("axolotl", "sft", ["unheard_of"])
    plan = lab.plan(found.stage, found.model, hardware="a100", **found.settings)
    s = plan.estimate.setup
    assert (s.batch, s.gradient_accumulation_steps, s.length) == (2, 4, 4096)
    assert (s.lora_r, s.load_in_4bit, s.dtype, s.padded) == (32, True, "bfloat16", False)
    assert (s.optim, s.attn_implementation) == ("paged_adamw_8bit", "flash_attention_2")
    assert s.gradient_checkpointing and s.epochs == 3


def test_llama_factorys_file(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    file = tmp_path / "factory.yaml"
    file.write_text(FACTORY)
    found = read_config(file)
    assert (found.tool, found.stage, found.unread) == ("llama-factory", "dpo", [])
    s = lab.plan("dpo", found.model, hardware="a100", gpus=4, **found.settings).estimate.setup
    assert (s.lora_r, s.sharding, s.dtype, s.length) == (8, "zero2", "bfloat16", 2048)
    assert s.gradient_checkpointing, "on where its file does not disable it"


@pytest.mark.parametrize(
    ("text", "expected", "heads"),
    [
        (
            "base_model: Qwen/Qwen2.5-7B\nadapter: lora\n",
            {"batch": 1, "length": 512, "dtype": "bfloat16", "epochs": 1, "lora_r": 0},
            [
                "not read: adapter without lora_r (axolotl)",
                "not in the file, so axolotl's: per_device_train_batch_size 1, ",
            ],
        ),
        (
            "model_name_or_path: Qwen/Qwen2.5-7B\nfinetuning_type: full\npure_bf16: true\n",
            {"batch": 8, "length": 2048, "dtype": "bfloat16", "epochs": 3, "lora_r": 0},
            ["not in the file, so llama-factory's: per_device_train_batch_size 8, "],
        ),
        (
            "model_name_or_path: Qwen/Qwen2.5-7B\nfinetuning_type: lora\npure_bf16: true\n"
            "stage: pt\nmax_steps: 9\n",
            {"lora_r": 8, "adapter_dtype": "bfloat16", "padded": False, "steps": 9},
            ["not in the file, so llama-factory's: per_device_train_batch_size 8, "],
        ),
    ],
)
def test_what_a_file_leaves_out_is_its_tools(tmp_path, capsys, text, expected, heads):
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    found = read_config(file)
    setup = lab.plan("sft", found.model, hardware="h200", **found.planned).estimate.setup
    assert {name: getattr(setup, name) for name in expected} == expected
    assert main(["plan", "sft", "--config", str(file), "--hardware", "h200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, head in zip(lines, heads, strict=False):
        assert line.startswith(head)


@pytest.mark.parametrize("stage", [s for s in TRAINABLE if s not in ("ppo", "distill")])
def test_what_a_file_of_trls_leaves_out_is_said(tmp_path, capsys, stage):
    """Against TRL's own configs: each value that the line calls TRL's is its default."""
    (file := tmp_path / "trl.yaml").write_text("learning_rate: 1e-5\n")
    assert main(["plan", stage, "--config", str(file), "--hardware", "h200"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("not in the file, so the lab's: ")
    said = re.findall(r"(\w+) \S+ \(TRL: (\S+)\)", first)
    trls = {field.name: field.default for field in fields(resolve(STAGES[stage].config))}
    trls |= {"steps_per_generation": trls["gradient_accumulation_steps"]}  # where it says None
    assert said and all(float(trls[name]) == float(yaml.safe_load(v.lower())) for name, v in said)
    file.write_text("activation_checkpointing: true\n")  # its newer name
    line = ["plan", stage, "--config", str(file), "--hardware", "h200", "--batch", "4"]
    assert main(line) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "per_device_train_batch_size" not in first and "gradient_checkpointing" not in first


def test_steps_of_grpo_are_trls_where_the_file_says_its_batches(tmp_path, capsys):
    """8 answers to each of 20,000 prompts, 8 * 4 * 8 of them a step: 625."""
    sizes = "per_device_train_batch_size: 8\ngradient_accumulation_steps: 4\nnum_train_epochs: 1\n"
    group = "num_generations: 8\nnum_iterations: 1\nsteps_per_generation: 4\nbeta: 0.0\n"
    (file := tmp_path / "trl.yaml").write_text(sizes + group + "output_dir: out\neos_token: x\n")
    line = ["plan", "grpo", "--config", str(file), "--hardware", "h200", "--gpus", "8", "--json"]
    assert main([*line, "--rows", "20000"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == 625
    assert not any("num_iterations" in warning for warning in document["warnings"])
    assert as_flags(file, "grpo")[:2] == ["--out", "out"]


def test_a_file_on_the_command_line(tmp_path, capsys):
    """What is not understood heads the answer; flags win over the file."""
    file = tmp_path / "axolotl.yaml"
    file.write_text(AXOLOTL)
    line = ["plan", "sft", "--config", str(file), "--hardware", "a100", "--batch", "1"]
    assert main(line) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "not read: unheard_of (axolotl)"  # nothing else: the file says the rest
    assert any("yours:" in text and "batch 1 row," in text for text in rest)
    assert main(["plan", "dpo", *line[2:]]) == 2
    assert "axolotl's file is of sft, not of dpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- a\n- b\n", "holds no names with values, but"),
        ("", "it is empty"),
        ("# beta: 1\n", "holds nothing: write lines like NAME: VALUE"),
        ("beta: 1\nbf16: true\n\nbeta: 2", "lines 1 and 4 both say beta: leave one of them out"),
        ("a: [", "line 1 is not YAML: expected the node content"),
        ("distributed_type: MEGATRON_LM\n", "distributed_type MEGATRON_LM is not planned"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "FSDP 1 is not planned"),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {offload_param_device: nvme}\n",
            "offload to NVMe is not planned",
        ),
        ("base_model: tiny\ndeepspeed: gone.json\n", "gone.json"),
        ("distributed_type: FSDP\nfsdp_config:\n", "FSDP 1 is not planned"),
        ("distributed_type: FSDP\nfsdp_config: 2\n", "fsdp_config holds no names with values"),
        ("distributed_type: MULTI_GPU\nnum_processes: many\n", "num_processes='many': write a"),
        (
            "{distributed_type: FSDP, num_processes: 8, fsdp_config: {version: 2}, "
            "parallelism_config: {dp_replicate_size: 2, dp_shard_size: 4}}",
            "dp_replicate_size=2 is not planned",
        ),
        (
            "{distributed_type: FSDP, num_processes: 8, fsdp_config: {version: 2}, "
            "parallelism_config: {tp_size: 2, dp_shard_size: 2}}",
            "dp_shard_size=2 times tp_size=2 are not num_processes=8",
        ),
    ],
)
def test_a_file_that_cannot_be_planned_is_one_line(text, line, tmp_path, capsys):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert main(["plan", "sft", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_plan_is_written_for_trl(tmp_path, capsys):
    file = tmp_path / "out.yaml"
    assert main(["plan", "dpo", "--yaml", str(file), "--set", "beta=0.2"]) == 0
    assert f"trl dpo --config {file}" in capsys.readouterr().out
    assert yaml.safe_load(file.read_text())["beta"] == 0.2


def test_switches_are_set_as_yaml_or_python_writes_them():
    from rlhf_lab.cli.cost import assignments

    written = ["bf16=true", "fp16=False", "max_length=null", "lr_scheduler_type=cosine"]
    settings = {"bf16": True, "fp16": False, "max_length": None, "lr_scheduler_type": "cosine"}
    assert assignments(written) == settings


def test_a_rate_without_a_point_is_a_number(tmp_path):
    """YAML 1.1 takes 1e-5 for a word."""
    from rlhf_lab.cli.config_files import read_config

    (file := tmp_path / "c.yaml").write_text("learning_rate: 1e-5\nbeta: 2E3\nrun_name: 1e-5x\n")
    found = read_config(file).settings
    assert found == {"learning_rate": 1e-5, "beta": 2000.0, "run_name": "1e-5x"}
