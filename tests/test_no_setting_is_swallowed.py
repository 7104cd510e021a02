"""A setting that a plan takes changes the plan, or the answer says that it does not.

pytest tests/test_no_setting_is_swallowed.py
"""

from __future__ import annotations

import argparse
import json

import pytest

import rlhf_lab as lab
from rlhf_lab.cli.config_files import read_config
from rlhf_lab.cli.cost import positive
from rlhf_lab.cli.main import main
from rlhf_lab.cost.fields import INERT
from rlhf_lab.cost.setup import CHOICES, extra_settings
from rlhf_lab.settings import OF_INFERENCE

MODEL = "Qwen/Qwen2.5-1.5B"
LENGTHS = {"prompt_length": 256, "response_length": 256, "per_device_train_batch_size": 4}
ON_H100 = {"hardware": "h100", **LENGTHS}


def answer(stage: str, **settings) -> object:
    """What a plan says: its figures and its warnings, or why there is none."""
    try:
        plan = lab.plan(stage, MODEL, **{**ON_H100, **settings})
        return [row.value for row in plan.ledger], plan.warnings
    except ValueError as error:
        return str(error)


SAME_BY_RIGHT = {
    "tf32": "beside 16-bit products it changes none",
    "nodes": "one machine or two: copies of a model that serve do not talk",
    "padded": "an engine has no padding",
}


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_each_setting_of_inference_is_read(engine):
    with_engine = {"engine": engine, "gpus": 2}
    plain = answer("inference", **with_engine)
    for name in {*OF_INFERENCE, *extra_settings("inference")} - INERT.keys() - SAME_BY_RIGHT.keys():
        values = CHOICES.get(name, (True, 3, 2, 0.5, {"top_k": 5}))
        found = [answer("inference", **{**with_engine, name: value}) for value in values]
        assert any(one != plain for one in found), name


@pytest.mark.parametrize(
    ("stage", "settings", "says"),
    [
        ("inference", {"use_vllm": True}, "did you mean 'engine'"),
        ("inference", {"optim": "sgd"}, "sft, reward, ppo, .* have it"),
        ("inference", {"vllm_tensor_parallel_size": 2}, "did you mean 'tensor_parallel'"),
        ("inference", {"engine": "transformers", "kv_cache_dtype": "fp8"}, "needs engine=vllm"),
        ("inference", {"concurrency": True}, "concurrency must be a number"),
        ("inference", {"engine": "vllm", "dtype": "float32", "bf16": True}, "has no autocast"),
        ("grpo", {"samples_per_prompt": 2}, "did you mean 'num_generations'"),
        ("ppo", {"samples_per_prompt": 2}, "rloo, grpo have num_generations"),
        ("distill", {"rule_reward": True}, "ppo, rloo, grpo have it"),
        ("reward", {"loss": "plain"}, "sft, dpo, kto have it"),
        ("sft", {"mean_response": 9}, "no setting 'mean_response'"),
        ("sft", {"selective_checkpointing": True}, "needs gradient_checkpointing"),
        ("sft", {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "needs gradient_check"),
        ("sft", {"stage3_max_live_parameters": 9}, "needs sharding=zero3"),
        ("sft", {"fsdp_units": "root"}, "needs sharding=fsdp2"),
        ("sft", {"context_parallel_size": 2}, "context_parallel_size is not planned: devices "),
        ("inference", {"concurrency": 8, "requests_per_second": 2}, "choose one"),
        ("inference", {"concurrency": 8}, "concurrency=8 and per_device_train_batch_size=4"),
        ("inference", {"enable_prefix_caching": True}, "is not planned: requests that begin"),
        ("inference", {"quantization": "awq", "dtype": "float32"}, "awq in 16 bits"),
        ("sft", {"dp": 2}, "there are gpus / tensor_parallel copies"),
        (
            "sft",
            {"activation_checkpointing": True, "gradient_checkpointing": False},
            "gradient_checkpointing is activation_checkpointing: say one of them",
        ),
        ("sft", {"hardware": "v100", "bf16": True}, r"V100 .* no products in bfloat16 .*fp16=True"),
    ],
)
def test_what_would_do_nothing_is_refused(stage, settings, says):
    more = {"teacher_model": MODEL} if stage == "distill" else {}
    with pytest.raises(ValueError, match=says):
        _ = lab.plan(stage, MODEL, **{**ON_H100, **more, **settings}).ledger


def test_an_engine_multiplies_weights_as_it_keeps_them():
    """bf16=True, autocast of fp32 weights elsewhere, is not 32-bit weights in an engine."""
    half = lab.plan("inference", MODEL, **ON_H100, engine="vllm", dtype="bfloat16")
    for settings in ({"bf16": True}, {"bf16": False}, {}):
        same = lab.plan("inference", MODEL, **ON_H100, engine="vllm", **settings)
        assert list(same.ledger) == list(half.ledger)
    whole = lab.plan("inference", MODEL, **ON_H100, engine="vllm", dtype="float32").estimate
    assert not whole.setup.autocast and whole.step_seconds > half.estimate.step_seconds


def test_both_names_of_recomputing_are_one():
    old, new = (f"{word}_checkpointing" for word in ("gradient", "activation"))
    how = {"every_n_layers": 2}
    assert answer("sft", **{old: True, f"{old}_kwargs": how}) == answer(
        "sft", **{new: True, f"{new}_kwargs": how}
    )


def test_more_devices_than_a_machine_has_are_said():
    def first(nodes):
        settings = {"gpus": 64, "sharding": "zero3", "nodes": nodes}
        return lab.plan("sft", MODEL, **ON_H100, **settings).warnings

    assert first(2)[0].startswith("32 devices in one machine") and not first(8)


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("base_model: x\n", "plain"),
        ("base_model: x\ncut_cross_entropy: true\n", "fused"),
        ("base_model: x\nliger_fused_linear_cross_entropy: true\n", "fused"),
        ("base_model: x\nrl: dpo\n", None),  # TRL's trainer
        ("model_name_or_path: x\nfinetuning_type: full\n", "plain"),
        ("model_name_or_path: x\nfinetuning_type: full\nenable_liger_kernel: true\n", None),
        ("model_name_or_path: x\nfinetuning_type: lora\nstage: dpo\n", "plain"),
        ("model_name_or_path: x\nfinetuning_type: lora\nstage: rm\n", None),
    ],
)
def test_other_tools_make_logits_whole(text, loss, tmp_path):
    """Unlike TRL's trainers they leave the loss to transformers, which makes it of all logits."""
    (file := tmp_path / "theirs.yaml").write_text(text)
    assert read_config(file).planned.get("loss") == loss


def test_logits_of_an_axolotl_file_by_hand(tmp_path, capsys):
    """12 bytes of each of 2 x 2048 tokens' logits in backward: in bf16, in fp32, and gradients of
    both."""
    text = "base_model: Llama-3.1-8B\nsequence_len: 2048\nmicro_batch_size: 2\nbf16: true\n"
    (file := tmp_path / "theirs.yaml").write_text(text)
    found = read_config(file)
    plan = lab.plan("sft", found.model, hardware="h200", **found.planned)
    kept = plan.ledger.filter(phase="backward", component="logits", quantity="bytes")
    assert sum(row.value for row in kept) == pytest.approx(12 * 2 * 2048 * 128256, rel=0.01)
    assert main(["plan", "sft", "--config", str(file), "--hardware", "h200"]) == 0
    assert "loss plain" in capsys.readouterr().out.splitlines()[0]


def test_sizes_of_another_zero_stage_wait_for_it(tmp_path):
    (file := tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 9, '
        '"stage3_max_live_parameters": 9}}'
    )
    found = read_config(file)
    assert found.settings == {"sharding": "zero2", "reduce_bucket_size": 9} and not found.unread


def test_numbers_on_the_command_line():
    assert positive("1e4") == positive("10_000") == 10000
    for text in ("10k", "2.5", "1e-1", "1e999", "nan", "0"):
        with pytest.raises(argparse.ArgumentTypeError, match="write a whole number|1 or more"):
            positive(text)


def test_a_name_that_is_empty_is_not_the_smallest_model(capsys):
    """As a script writes whose variable is not set."""
    for stage in ("sft", "project"):
        assert main(["plan", stage, "--model", ""]) == 2
        assert "no model ''" in capsys.readouterr().err
    assert main(["plan", "sft", "--sharding", ""]) == 2
    with pytest.raises(ValueError, match="budget must be a number of at least 0, got nan"):
        lab.project(MODEL, hardware="h100", budget=float("nan"))


def test_targets_of_llama_factory_are_a_list(tmp_path):
    (file := tmp_path / "theirs.yaml").write_text(
        "model_name_or_path: x\nfinetuning_type: lora\nlora_target: q_proj, v_proj\n"
    )
    assert read_config(file).settings["lora_target_modules"] == ["q_proj", "v_proj"]


def test_a_teacher_is_shared_out_like_its_student():
    """By hand: k devices of one layer hold k-ths of both models' matrices (fp32)."""
    of = {"teacher_model": "Qwen/Qwen2.5-7B", "gpus": 2, **ON_H100}
    whole = lab.plan("distill", MODEL, **of, sharding="ddp").ledger
    shared = lab.plan("distill", MODEL, **of, tensor_parallel=2).ledger
    kept = {"role": "teacher", "phase": "forward", "component": "parameters"}
    sizes = [one.total(quantity="bytes", **kept) for one in (whole, shared)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=1e-3)


@pytest.mark.parametrize("sharding", ["ddp", "zero3", "fsdp2"])
def test_16_bit_weights_come_back_from_the_files_of_a_plan(sharding, tmp_path, capsys):
    """From TRL's and accelerate's together, in either order."""
    asked = {"gpus": 8, "sharding": sharding, "dtype": "bfloat16"}
    plan = lab.plan("sft", MODEL, **ON_H100, **asked)
    trl, accelerate = tmp_path / "trl.yaml", tmp_path / "accelerate.yaml"
    trl.write_text(plan.trl_config())
    accelerate.write_text(plan.accelerate_config())
    for one, other in ((trl, accelerate), (accelerate, trl)):
        files = ["--config", str(one), "--config", str(other)]
        assert main(["plan", "sft", *files, "--hardware", "h100", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["peak_bytes"] == plan.peak
        assert found["step_seconds"] == plan.estimate.step_seconds


def test_devices_of_a_server_are_said_where_they_are_paid():
    """By hand: 4 that train and 2 that sample, for the hours of the run."""
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2}
    plan = lab.plan("grpo", MODEL, **ON_H100, gpus=4, sharding="zero3", **server)
    assert "devices 4 and 2 that sample, paid as well" in map(str, plan.assumptions)
    e = plan.estimate
    assert e.money == pytest.approx(6 * e.hours * e.hardware.price)


@pytest.mark.parametrize(
    ("settings", "first", "gib"),
    [
        # 6.98e9 numbers of matrices in layers at 4.5 bits, the other 1.05e9 at 16: 5.6 GiB.
        ({}, "weights in 4 bits (NF4)", 5.6),
        # The table of embeddings and the head, and 4.15 bits of each other number.
        ({"engine": "vllm", "dtype": "float32"}, "weights in 4 bits (AWQ)", 5.4),
    ],
)
def test_serving_what_does_not_fit_has_remedies(settings, first, gib):
    settings = {**LENGTHS, **settings}
    plan = lab.plan("inference", "Llama-3.1-8B", hardware="rtx4090", **settings)
    found = {remedy.does: remedy.estimate for remedy in plan.cheaper() if remedy.fits}
    assert not plan.fits and found.keys() >= {first, "16-bit weights", "2 GPUs, 2 for each copy"}
    kept = {"component": "parameters", "quantity": "bytes", "phase": "decode"}
    weights = [found[does].ledger.total(**kept) for does in (first, "16-bit weights")]
    assert weights == [pytest.approx(gib * 2**30, rel=0.05), pytest.approx(2 * 8.03e9, rel=0.01)]


def test_json_is_one_document(tmp_path, capsys):
    """Whatever is written beside it."""
    files = {"--yaml": tmp_path / "trl.yaml", "--accelerate-config": tmp_path / "acc.yaml"}
    beside = [word for flag, path in files.items() for word in (flag, str(path))]
    assert main(["plan", "sft", "--json", *beside]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "sft"
    assert all(path.is_file() for path in files.values())
    assert main(["plan", "sft", *beside]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("accelerate launch --") and lines[-1].startswith("trl sft --config")
    assert main(["plan", "sft", "--json", "--yaml", "-"]) == 2
    assert "give a file in place of -" in capsys.readouterr().err
