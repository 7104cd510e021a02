"""No setting of a plan is swallowed: each is read, inert by a table, said not to be modelled, or
refused.

pytest tests/test_settings.py
"""

from __future__ import annotations

import dataclasses
import json
import random
import string

import pytest

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.cost.fields import INERT, NOT_MODELLED
from rlhf_lab.settings import (
    KEYS,
    NEEDS,
    NOT_HONOURED,
    SETTINGS,
    config_fields,
    known_settings,
)
from rlhf_lab.stages import STAGES, TRAINABLE, resolve
from rlhf_lab.studies import NO_XRAY

QLORA = {"lora_r": 8, "load_in_4bit": True, "dtype": "bfloat16"}
CHECKPOINTED = {"gradient_checkpointing": True}
ENGINE = {"use_vllm": True}
ZERO3 = {"sharding": "zero3", "gpus": 8, "nodes": 2}
READ: dict[str, tuple[str, dict, object]] = {  # stage, with these settings, another value
    "per_device_train_batch_size": ("sft", {}, 3),
    "num_train_epochs": ("sft", {}, 7),
    "max_steps": ("sft", {}, 7),
    "optim": ("sft", {}, "adafactor"),
    "total_episodes": ("ppo", {}, 100),
    "gradient_accumulation_steps": ("sft", {}, 3),
    "fp16": ("sft", {"bf16": False}, True),
    "bf16": ("sft", {}, False),
    "tf32": ("sft", {"bf16": False}, True),
    "torch_compile": ("sft", {"hardware": "cpu", "bf16": False}, True),
    "gradient_checkpointing": ("sft", {}, True),
    "activation_checkpointing": ("sft", {}, True),
    "max_length": ("sft", {}, 33),
    "layout": ("ppo", {"lora_r": 8}, "adapters"),
    "num_ppo_epochs": ("ppo", {}, 7),
    "num_mini_batches": ("ppo", {}, 4),
    "local_rollout_forward_batch_size": ("ppo", {}, 3),
    "response_length": ("ppo", {}, 33),
    "beta": ("grpo", {"beta": 0.5}, 0.0),
    "loss_type": ("kto", {}, "apo_zero_unpaired"),
    "num_generations": ("grpo", {}, 2),
    "generation_batch_size": ("grpo", {"num_generations": 2}, 128),
    "steps_per_generation": ("grpo", {}, 4),
    "num_iterations": ("grpo", {}, 3),
    "max_completion_length": ("grpo", {}, 33),
    "ds3_gather_for_generation": ("grpo", ZERO3, False),
    "dtype": ("sft", {}, "bfloat16"),
    "attn_implementation": ("sft", {}, "eager"),
    "use_peft": ("sft", {}, True),
    "lora_r": ("sft", {}, 8),
    "lora_target_modules": ("sft", {"lora_r": 8}, ["q_proj"]),
    "lora_dropout": ("sft", {"lora_r": 8}, 0.1),
    "use_dora": ("sft", {"lora_r": 8}, True),
    "disable_dropout": ("grpo", {"lora_r": 8, "lora_dropout": 0.1}, False),
    "load_in_4bit": ("sft", {"lora_r": 8, "dtype": "bfloat16"}, True),
    "use_bnb_nested_quant": ("sft", QLORA, True),
    "load_in_8bit": ("inference", {}, True),
    "packing": ("sft", {"mean_tokens": 40}, True),
    "padding_free": ("sft", {"mean_tokens": 40}, True),
    "pad_to_multiple_of": ("sft", {}, 48),
    "precompute_ref_log_probs": ("dpo", {}, True),
    "activation_offloading": ("sft", {}, True),
    "use_liger_kernel": ("sft", {}, True),
    "activation_checkpointing_kwargs": ("sft", CHECKPOINTED, {"every_n_layers": 2}),
    "gradient_checkpointing_kwargs": ("sft", CHECKPOINTED, {"offload": True}),
    "distill_from": ("distill", {}, "samples"),
    "teacher_model_name_or_path": ("distill", {}, "Qwen/Qwen2.5-1.5B"),
    "use_vllm": ("grpo", {}, True),
    "vllm_mode": ("grpo", ENGINE, "server"),
    "vllm_enable_sleep_mode": ("grpo", ENGINE, True),
    "vllm_gpu_memory_utilization": ("grpo", ENGINE, 0.5),
    "vllm_tensor_parallel_size": ("grpo", {**ENGINE, "gpus": 2}, 2),
}
"""Fields that change a plan, and where."""
FIELDS = [
    (stage, name)
    for stage in TRAINABLE
    for name in (*config_fields(stage), *SETTINGS["model"])
    if name != "model_name_or_path"
]


def test_the_fields_are_those_of_the_libraries():
    """TRL's configs and ModelConfig, transformers' TrainingArguments, our PPOConfig."""
    from transformers import TrainingArguments
    from trl import ModelConfig

    for stage in TRAINABLE:
        theirs = {f.name for f in dataclasses.fields(resolve(STAGES[stage].config)) if f.init}
        assert theirs <= set(config_fields(stage))
    known = set().union(*map(known_settings, TRAINABLE))
    for config in (TrainingArguments, ModelConfig):
        left = {f.name for f in dataclasses.fields(config) if f.init} - known
        assert left <= {"model_name_or_path"}


def test_every_field_has_one_place():
    fields = {name for _, name in FIELDS}
    assert not fields - READ.keys() - INERT.keys() - NOT_MODELLED.keys(), "in no table"
    assert not READ.keys() & INERT.keys() and not READ.keys() & NOT_MODELLED.keys()
    assert not INERT.keys() & NOT_MODELLED.keys()
    assert not (INERT.keys() | NOT_MODELLED.keys() | READ.keys()) - fields, "no field any more"
    assert len(NOT_MODELLED) <= 0.15 * len(fields), f"{len(NOT_MODELLED)} of {len(fields)}"


@pytest.mark.parametrize("name", READ)
def test_what_is_read_changes_the_plan(name):
    stage, settings, value = READ[name]
    asked = {"hardware": "h100", "prompt_length": 20, "rows": 100, **settings}
    plan, other = (
        lab.plan(stage, "Qwen/Qwen2.5-0.5B", **more) for more in (asked, {**asked, name: value})
    )
    assert not any("not modelled" in line for line in other.warnings)
    assert list(plan.ledger) != list(other.ledger)


@pytest.mark.parametrize("name", sorted(NOT_MODELLED))
def test_what_is_not_modelled_heads_the_answer(name):
    stage = next(stage for stage, own in FIELDS if own == name)
    odd = {"bool": True, "int": 7, "float": 0.37, "str": "odd", "dict": {"odd": 1}, "list": ["odd"]}
    kind = {**SETTINGS["model"], **config_fields(stage)}[name]
    values = [v for k, v in odd.items() if k in kind] + [False]
    if name in KEYS:
        values = [{KEYS[name][0]: True}]
    value = next(v for v in values if v not in NOT_MODELLED[name].unless)
    needs = {"lora_r": 8} if (name, "lora_r") in NEEDS else {}
    plan = lab.plan(stage, "tiny", hardware="h100", **{name: value}, **needs)
    first = str(plan.show()).splitlines()[0]
    assert first.startswith(f"not modelled: {name}=") and NOT_MODELLED[name].changes in first
    for neutral in NOT_MODELLED[name].unless:
        assert not lab.plan(stage, "tiny", hardware="h100", **{name: neutral}).warnings
    if name not in NOT_HONOURED:
        assert not lab.plan(stage, "tiny", hardware="h100").warnings


def misspelt(count: int) -> list[tuple[str, str]]:
    """Names with a letter dropped, doubled, changed, or two of them exchanged."""
    rng, out = random.Random(0), []
    while len(out) < count:
        stage, name = rng.choice(FIELDS)
        at, letter = rng.randrange(len(name) - 1), rng.choice(string.ascii_lowercase)
        wrong = rng.choice(
            [
                name[:at] + name[at + 1 :],
                name[:at] + name[at] + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            ]
        )
        if wrong not in known_settings(stage):
            out.append((stage, wrong))
    return out


def test_misspelt_names_are_refused():
    """Three hundred of them, from a plan and so from the x-ray that takes one."""
    for stage, name in misspelt(300):
        with pytest.raises(ValueError, match=f"has no setting '{name}'") as refused:
            lab.plan(stage, "tiny", **{name: 1})
        assert "\n" not in str(refused.value)


CASES = {  # plan.md 1, 2: swallowed, "the same answer to the byte"
    "foo=1": "no setting 'foo'",
    "lora_rank=16": "no setting 'lora_rank'; did you mean 'lora_r'?",
    "gradient_checkpoint=True": "did you mean 'gradient_checkpointing'?",
    "lerning_rate=1e-5": "did you mean 'learning_rate'?",
    "learning_rate=abc": "learning_rate must be a number, got 'abc'",
    "quantization='int8'": "no setting 'quantization'; did you mean 'load_in_8bit'?",
    "micro_batch_size=1": "did you mean 'per_device_train_batch_size'?",
}


@pytest.mark.parametrize(("given", "line"), CASES.items())
@pytest.mark.parametrize("command", ["plan", "xray"])
def test_plan_row_1_on_the_command_line(command, given, line, capsys):
    assert main([command, "sft", "--set", given]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_batch_of_one_row_needs_no_other_setting():
    """plan.md 20: it failed on num_mini_batches=2, which nobody had set."""
    assert (
        lab.plan("ppo", "tiny", per_device_train_batch_size=1).estimate.setup.num_mini_batches == 1
    )
    assert (
        lab.plan("ppo", "tiny", per_device_train_batch_size=6).estimate.setup.num_mini_batches == 2
    )
    with pytest.raises(ValueError, match="num_mini_batches=2: choose 1"):
        _ = lab.plan("ppo", "tiny", per_device_train_batch_size=1, num_mini_batches=2).estimate


def test_episodes_are_counted():
    """plan.md 2: a field of PPOConfig was ignored. 100 responses, 64 an iteration."""
    assert lab.plan("ppo", "tiny", total_episodes=100).estimate.steps == 2
    assert lab.plan("ppo", "tiny", total_episodes=6400).estimate.steps == 100


# ------------------------------------------------------------------------- what a plan stands on


def test_the_head_says_what_is_assumed_and_whose_it_is():
    """plan.md 10: 64 + 64 tokens, batch 64 and 3 epochs were nowhere said."""
    plan = lab.plan("ppo", "Qwen/Qwen2.5-7B", hardware="h100", rows=20_000, num_ppo_epochs=1)
    found = {a.what: (a.value, a.source) for a in plan.assumptions}
    assert found["batch"] == ("64 rows", "default")
    assert found["lengths"] == ("64 + 64 tokens", "default")
    assert found["length of the run"] == ("3 epochs of 20,000 rows", "yours")
    assert found["PPO epochs"] == ("1", "yours")
    lines = str(plan.show()).splitlines()
    assert lines[0].startswith("rows of 64 + 64 tokens are a default, not yours")
    assert "yours: length of the run" in lines[2] and "PPO epochs 1" in lines[2]


def test_json_is_one_document(capsys):
    """plan.md 19: it was a bare array."""
    line = ["plan", "dpo", "--hardware", "h100", "--gpus", "2", "--sharding", "zero2", "--json"]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    plan = lab.plan("dpo", "tiny", hardware="h100", gpus=2, sharding="zero2")
    assert found["peak_bytes"] == plan.peak and found["fits"] is plan.fits
    assert sum(row["value"] > 0 for row in found["ledger"]) == len(plan.ledger)
    assert {"what": "sharding", "value": "zero2", "source": "yours"} in found["assumptions"]


def test_the_x_ray_says_what_it_does_not_show(capsys):
    line = ["xray", "sft", "--batch", "2", "--set", "neftune_noise_alpha=5"]
    assert main([*line, "--prompt-length", "8", "--response-length", "8"]) == 0
    assert capsys.readouterr().out.startswith("not modelled: neftune_noise_alpha=5")
    short = {"per_device_train_batch_size": 1, "prompt_length": 4, "response_length": 4}
    seen = lab.xray(lab.plan("sft", "tiny", hardware="h100", gpus=2, sharding="fsdp2", **short))
    assert seen.notes == ("the x-ray shows one device alone, without sharding='fsdp2'",)


@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo"])
@pytest.mark.parametrize("part", [{"every_n_layers": 2}, {"offload": True}])
def test_what_a_trainer_cannot_do_is_refused_in_one_line(stage, part):
    """TRL's own words come a step later: "Unexpected keyword arguments: every_n_layers"."""
    kwargs = {"use_reentrant": False, **part}
    with pytest.raises(ValueError, match=f"TRL's trainer of {stage} fails with {next(iter(part))}"):
        lab.plan(stage, "tiny", **CHECKPOINTED, activation_checkpointing_kwargs=kwargs)


KEPT = {**CHECKPOINTED, "activation_checkpointing_kwargs": {"offload": True}}


@pytest.mark.parametrize(
    ("name", "stage", "settings"),
    [
        ("load_in_4bit", "sft", QLORA),
        ("load_in_8bit", "sft", {"lora_r": 8, "load_in_8bit": True}),
        ("precompute_ref_log_probs", "dpo", {"precompute_ref_log_probs": True}),
        ("use_liger_kernel", "sft", {"use_liger_kernel": True}),
        ("activation_offloading", "sft", {"activation_offloading": True}),
        ("offload_inputs", "sft", KEPT),
        ("selective_checkpointing", "sft", {**CHECKPOINTED, "selective_checkpointing": True}),
        ("optimizer_in_backward", "sft", {"optimizer_in_backward": True}),
        ("loss", "sft", {"loss": "plain"}),
        ("pairs_together", "reward", {"pairs_together": False}),
        ("joint_update", "ppo", {"joint_update": False}),
        ("ema", "ppo", {"ema": True}),
        ("adapter_dtype", "sft", {"lora_r": 8, "adapter_dtype": "bfloat16"}),
    ],
)
def test_the_x_ray_refuses_what_it_cannot_run(name, stage, settings):
    """It ran the step without them, and said nothing."""
    with pytest.raises(ValueError, match=f"no x-ray of {name}="):
        lab.xray(lab.plan(stage, "tiny", hardware="h100", **settings))


def test_the_list_of_what_no_x_ray_shows_is_tested_whole():
    marks = test_the_x_ray_refuses_what_it_cannot_run.pytestmark
    assert {name for name, *_ in marks[0].args[1]} == NO_XRAY.keys()


@pytest.mark.parametrize(
    ("stage", "setting", "package"),
    [("sft", "use_liger_kernel", "liger-kernel"), ("grpo", "use_vllm", "vllm")],
)
def test_a_package_that_is_not_there_is_a_users_error(stage, setting, package, tmp_path, capsys):
    """plan.md 23: it was an internal error, ImportError."""
    line = ["train", stage, "--set", f"{setting}=True", "--out", str(tmp_path / "run")]
    assert main([*line, "--hardware", "h100"]) == 2
    assert (
        capsys.readouterr().err == f"rlhf-lab: {setting} needs {package}: pip install {package}\n"
    )
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_max_length_are_not_planned_as_if_they_fitted():
    with pytest.raises(ValueError, match="rows of 80 tokens .* cut at max_length=64: say one"):
        lab.plan("sft", "tiny", max_length=64, prompt_length=40, response_length=40)
    setup = lab.plan("sft", "tiny", hardware="h100", max_length=64, prompt_length=40).estimate.setup
    assert (setup.prompt, setup.response) == (40, 24)


def test_the_labs_own_max_length_does_not_cut_rows_of_your_lengths():
    """The lab's default of 512 tokens would train other rows than those that were planned."""
    lengths = {"prompt_length": 1024, "response_length": 512}
    for stage in ("sft", "reward", "dpo", "kto"):
        assert lab.plan(stage, "Qwen/Qwen2.5-7B", **lengths).settings["max_length"] == 1536
        assert lab.plan(stage, "tiny", response_length=16).settings["max_length"] == 512


def test_a_setting_of_another_stage_says_whose_it_is():
    """plan.md 1."""
    with pytest.raises(ValueError, match="no setting 'use_vllm'; grpo, rloo have it|rloo, grpo"):
        lab.plan("sft", "tiny", use_vllm=True)
    with pytest.raises(ValueError, match="SFTConfig has no setting 'num_ppo_epochs'; ppo has it"):
        lab.plan("sft", "tiny", num_ppo_epochs=1)


@pytest.mark.parametrize("given", [["--prompt-length", "0"], ["--set", "prompt_length=0"]])
def test_a_prompt_of_no_tokens_is_planned_however_it_is_said(given, capsys):
    """plan.md 20: refused by the flag, taken by --set."""
    assert main(["plan", "sft", "--hardware", "h100", *given]) == 0
    assert "yours: lengths 0 + 64 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "sft", "--prompt-length", "-1"])
    assert main(["plan", "sft", "--set", "prompt_length=-1"]) == 2
    assert "at least 0, got -1" in capsys.readouterr().err


def test_reward_and_value_models_of_another_size(capsys):
    """plan.md 17: `plan` did not know --reward-model, which `train` knows."""
    line = ["plan", "ppo", "--model", "Qwen/Qwen2.5-7B", "--hardware", "h100", "--json"]
    small = "Qwen/Qwen2.5-0.5B"

    def parameters(*more):
        assert main([*line, *more]) == 0
        rows = json.loads(capsys.readouterr().out)["ledger"]
        return {
            row["role"]: row["value"]
            for row in rows
            if (row["component"], row["phase"]) == ("parameters", "rollout")
        }

    plain, other = parameters(), parameters("--reward-model", small)
    numbers = {"7B": 7_070_619_136 + 3584, "0.5B": 494_032_768 + 896}  # without an LM's head
    assert plain["reward"] == plain["value"] == 4 * numbers["7B"]
    assert other["reward"] == other["value"] == 4 * numbers["0.5B"]  # which starts from it
    assert other["policy"] == plain["policy"]
    mixed = parameters("--reward-model", small, "--value-model", "Qwen/Qwen2.5-7B")
    assert (mixed["reward"], mixed["value"]) == (other["reward"], plain["value"])
    assert main(["plan", "sft", "--reward-model", small]) == 2
    assert "sft has no reward model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rloo has no value model"):
        lab.plan("rloo", "tiny", value_model="tiny")


@pytest.mark.parametrize(
    ("stage", "order", "words"),
    [
        ("dpo", "batch_rebalance", "choose 'group_by_length'"),
        ("sft", "group_by_lengths", "did you mean 'group_by_length'?"),
        ("kto", "group_by_length", "sequential"),
        ("grpo", "sequential", "random"),
        ("sft", "group_by_length", "leave it or packing out"),
    ],
)
def test_an_order_of_rows_that_a_trainer_does_not_keep_to_is_refused(stage, order, words):
    with pytest.raises(ValueError, match="^train_sampling_strategy") as refused:
        packed = {"packing": True} if stage == "sft" and order == "group_by_length" else {}
        lab.plan(stage, "tiny", train_sampling_strategy=order, **packed)
    assert words in str(refused.value) and "\n" not in str(refused.value)
