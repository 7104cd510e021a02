"""What settings may be: wrong values are refused when they are planned.

pytest tests/test_setting_values.py
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys

import pytest
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

import rlhf_lab as lab
from rlhf_lab.settings import (
    ANY_NUMBER,
    NOT_HONOURED,
    NUMBERS,
    OF_OPTIMIZER,
    SETTINGS,
    SHARE_OR_STEPS,
    WITHIN_CONTEXT,
    WITHOUT_EFFECT,
    WORDS,
    config_fields,
    known_settings,
    unplannable,
)
from rlhf_lab.stages import STAGES, TRAINABLE, resolve


@pytest.mark.parametrize(
    ("stage", "settings", "line"),
    [
        ("dpo", {"padding_free": True}, "^padding_free: TRL's trainer of dpo pads"),
        ("sft", {"packing": True, "neftune_noise_alpha": 5.0}, "^neftune_noise_alpha: with pack"),
        ("sft", {"padding_free": True, "neftune_noise_alpha": 5.0}, "with padding_free a batch is"),
    ],
)
def test_what_trl_makes_otherwise_of_batches_without_padding_is_refused(stage, settings, line):
    with pytest.raises(ValueError, match=line):
        lab.plan(stage, "tiny", **settings)
    for name in settings:  # each by itself, or switched off, is as ever
        others = {k: v for k, v in settings.items() if k != name}
        assert lab.plan(stage, "tiny", **others, **{name: type(settings[name])(0)}).stage == stage


REFUSED_AT_ONCE = [
    ({"optim": "adam"}, "optim='adam': did you mean 'adamw_torch'. choose from adamw_torch_fused"),
    ({"gpus": 0}, "gpus must be a whole number of at least 1, got 0"),
    ({"gpus": 8, "nodes": 3}, "gpus=8 do not spread over nodes=3: choose 2 nodes"),
    ({"gpus": 3, "tensor_parallel": 2}, "tensor_parallel=2 must divide gpus=3"),
    ({"rows": -1}, "rows must be above 0, got -1"),
    ({"response_length": -1}, "response_length must be a whole number of at least 0, got -1"),
    ({"per_device_train_batch_size": 0.5}, "_batch_size must be a whole number of at least 1"),
    ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
    ({"total_episodes": -5}, "total_episodes must be above 0, got -5"),
    ({"kv_cache_dtype": "fp8", "stage": "inference"}, "engine='vllm' is planned for GPUs"),
    ({"gpu_memory_utilization": 1.5, "stage": "inference"}, "must be above 0, at most 1, got 1.5"),
    ({"bf16": True, "fp16": True}, "bf16 and fp16: choose one"),
    ({"lora_dropout": 1.5, "lora_r": 8}, "lora_dropout must be 0 or more, below 1, got 1.5"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin': did you mean 'cosine'"),
    ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type='greedy': choose from linear"),  # no loss
    ({"stage": "dpo", "loss_type": ["sigmod"]}, "loss_type='sigmod': did you mean 'sigmoid'"),
    ({"stage": "grpo", "max_completion_length": 0}, "response_length must be above 0, got 0"),
    ({"learning_rate": math.inf}, "learning_rate must be above 0, got inf"),
    ({"optim": "apollo_adamw"}, "^optim='apollo_adamw' needs optim_target_modules: set both"),
    (
        {"optim": "galore_adamw", "optim_target_modules": ["attn"], "stage": "sft"},
        "^optim='galore_adamw' needs the package that is imported as galore_torch, which is not",
    ),
    ({"reward_model": "me/x"}, "no model 'me/x': neither a folder here nor in the hub's cache"),
]


@pytest.mark.parametrize(("given", "line"), REFUSED_AT_ONCE)
def test_a_plan_refuses_at_once_what_cannot_be(given, line, monkeypatch):
    """Not when it is shown; what can be trained and only not planned is no mistake."""
    monkeypatch.setattr("rlhf_lab.models.hub.hub_reachable", lambda: False)
    monkeypatch.setitem(sys.modules, "galore_torch", None)  # as if it were not installed
    with pytest.raises(ValueError, match=line):
        lab.plan(**{"stage": "ppo", **given})


@pytest.mark.parametrize("optimizer", OF_OPTIMIZER)
def test_packages_of_optimizers_are_those_that_transformers_imports(optimizer):
    """What it needs is among the imports of the function that makes it."""
    make = trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(optimizer)]
    assert f"from {OF_OPTIMIZER[optimizer]}" in inspect.getsource(make)


NUMBERS_OF = {
    name: stage
    for stage in TRAINABLE
    for name, kind in (config_fields(stage) | SETTINGS["model"]).items()
    if {"int", "float"} & {*kind.replace(" ", "").split("|")} and name not in NOT_HONOURED
    if name not in WITHOUT_EFFECT.get(stage, ())
}
"""Every field of a trainer's config that is a number, and a stage that has it."""


@pytest.mark.parametrize("name", sorted(NUMBERS_OF))
def test_no_field_takes_a_number_that_it_cannot_be(name):
    """Trainers find out late, or never: a negative warm-up was trained without a word."""
    span = NUMBERS.get(f"{NUMBERS_OF[name]}.{name}", NUMBERS.get(name, ANY_NUMBER))
    wrong = [math.nan] + [-3] * ("-inf" not in span) + [1.5] * ("1]" in span or "1)" in span)
    for value in wrong if name != "local_rank" else ():
        with pytest.raises(ValueError, match="must be") as refused:
            lab.plan(NUMBERS_OF[name], "tiny", **{name: value})
        assert "\n" not in str(refused.value) and f"got {value}" in str(refused.value)


def test_values_are_of_settings_that_there_are_and_words_those_of_the_libraries():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import (
        HubStrategy,
        IntervalStrategy,
        SaveStrategy,
        SchedulerType,
    )
    from transformers.training_args import trainer_log_levels

    known = frozenset().union(*map(known_settings, STAGES))
    named = NUMBERS.keys() | WORDS.keys() | SHARE_OR_STEPS | WITHIN_CONTEXT
    assert {name.rpartition(".")[2] for name in named} <= known
    theirs = {"hub_strategy": HubStrategy, "save_strategy": SaveStrategy}
    theirs |= {"lr_scheduler_type": SchedulerType, "eval_strategy": IntervalStrategy}
    assert {k: set(WORDS[k]) for k in theirs} == {
        k: {x.value for x in v} for k, v in theirs.items()
    }
    assert {*WORDS["log_level"]} == {*trainer_log_levels}
    assert {*WORDS["report_to"]} == {*INTEGRATION_TO_CALLBACK, "none", "all"}
    for stage, name in (("dpo", "truncation_mode"), ("sft", "packing_strategy")):
        field = next(f for f in dataclasses.fields(resolve(STAGES[stage].config)) if f.name == name)
        assert {*field.metadata["choices"]} <= {*WORDS[name]}


def test_what_training_would_drop_is_planned_only():
    """peft's and the hub's settings that the lab's own loading does not hand on."""
    for name, value in {"lora_modules_to_save": ["lm_head"], "model_revision": "v2"}.items():
        assert unplannable("sft", {name: value, "lora_r": 8}).startswith(f"{name}={value!r} is")
    assert unplannable("sft", {"model_revision": "main", "use_dora": True, "lora_r": 8}) is None
    trained = lab.plan("sft", "tiny", lora_r=8, use_rslora=True, use_dora=True).lora
    assert trained["use_rslora"] is trained["use_dora"] is True


def test_a_rank_above_a_matrix_is_planned_with_a_word():
    """peft makes adapters of any rank; of 128 rows no more than 128 are independent."""
    e = lab.plan("sft", "tiny", lora_r=129).estimate
    assert "lora_r=129: ranks above 128, a matrix's width, add no more" in e.caveats
    assert not any("ranks above" in line for line in lab.plan("sft", lora_r=128).warnings)


def test_what_can_be_trained_and_not_planned_is_no_mistake():
    plan = lab.plan("ppo", optim="rmsprop", max_steps=1e1)
    assert plan.settings["optim"] == "rmsprop"
    assert plan.warnings[0].startswith("no prediction (of optimizers that are planned, optim='r")
    with pytest.raises(ValueError, match="optim='rmsprop'"):
        _ = plan.estimate


def test_whole_numbers_may_be_written_as_floats():
    """As DeepSpeed's documentation and YAML write them."""
    given = {"gpus": 8.0, "per_device_train_batch_size": 1e1, "reduce_bucket_size": 5e8}
    plan = lab.plan("sft", "Qwen/Qwen2.5-7B", hardware="h100", sharding="zero2", **given)
    same = {name: int(value) for name, value in given.items()}
    assert plan.settings == lab.plan("sft", "Qwen/Qwen2.5-7B", sharding="zero2", **same).settings
    assert not isinstance(plan.settings["gpus"], float)
    with pytest.raises(ValueError, match="gpus must be a whole number"):
        lab.plan("sft", gpus=1.5)


def test_an_older_name_of_the_order_of_rows_is_known():
    with pytest.raises(ValueError, match="did you mean 'train_sampling_strategy'"):
        lab.plan("sft", "tiny", group_by_length=True)


def test_rows_longer_than_the_model_reads_are_planned_as_they_are_cut():
    rows = [
        {"prompt": "a b", "completion": " word" * (900 if i % 9 == 0 else 9)} for i in range(99)
    ]
    plan = lab.plan("sft", "tiny", data=rows)
    assert plan.settings["prompt_length"] + plan.settings["response_length"] == 512
    assert plan.settings["max_length"] == 512 and plan.estimate.hours
