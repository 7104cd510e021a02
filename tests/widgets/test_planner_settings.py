"""The planner's controls: settings to controls and back, what is shown of them, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_kit import GIB, move, open_planner, open_quick_planner, visible_controls

import rlhf_lab as lab
from rlhf_lab.cost.hardware import CATALOGUE
from rlhf_lab.models.names import BUNDLED
from rlhf_lab.widgets.planner_controls import ALL, ANOTHER, CONTROLS, Controls, doublings
from rlhf_lab.widgets.planner_view import call

# ------------------------------------------------------------------------------ state, plan, code


STATES = [
    {},
    {"stage": "sft", "model": "tiny", "hardware": "laptop", "num_train_epochs": 3},
    {
        "stage": "ppo",
        "model": "Qwen/Qwen2.5-7B",
        "hardware": "h100",
        "gpus": 8,
        "lora_r": 16,
        "prompt_length": 512,
        "response_length": 512,
        "rows": 20_000,
        "sharding": "zero3",
    },
    {
        "stage": "dpo",
        "model": "meta-llama/Llama-3.2-1B",
        "hardware": "a100-40",
        "lora_r": 8,
        "load_in_4bit": True,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    },
    {
        "stage": "grpo",
        "gpus": 16,
        "nodes": 2,
        "sharding": "fsdp2",
        "offload": "all",
        "prompt_length": 300,
        "per_device_train_batch_size": 12,
        "num_generations": 6,
        "fp16": True,
    },
    {
        "stage": "reward",
        "hardware": "t4",
        "model": "gpt2",
        "prompt_length": 100,
        "bf16": False,
        "response_length": 60,
        "optim": "adafactor",
    },
    {"stage": "inference", "tensor_parallel": 2, "gpus": 2, "sharding": "none", "rows": 777},
    {"layout": "adapters", "lora_r": 32, "num_ppo_epochs": 5, "rule_reward": True, "kl_coef": 0.1},
]


def test_a_setting_of_another_stage_is_left_aside_and_said():
    planner = open_planner(stage="dpo", beta=0.3)
    assert planner.state["beta"] == 0.3 and "beta" not in str(planner).splitlines()[1]
    planner.apply(stage="ppo")
    assert planner.error == "" and "beta" not in planner.state
    assert "beta is no setting of ppo" in str(planner).splitlines()[1]
    planner.apply(stage="dpo")
    assert planner.state["beta"] == 0.3
    assert "did you mean 'kl_coef'" in open_planner(kl_koef=0.1).error


@pytest.mark.parametrize("state", STATES, ids=lambda s: s.get("stage", "ppo"))
def test_the_state_brings_the_planner_back_and_is_a_plan(state):
    planner = open_planner(**state)
    assert planner.error == ""
    assert open_quick_planner(**planner.state).state == planner.state
    plan = lab.plan(**planner.state)
    assert (planner.plan.peak, planner.plan.settings) == (plan.peak, plan.settings)
    written = eval(planner.code, {"lab": lab})
    assert (written.stage, written.settings) == (plan.stage, plan.settings)
    assert written.estimate.money == planner.plan.estimate.money
    for name, value in state.items():  # no setting that was given is lost
        assert planner.state.get(name, ALL[name].default if name in ALL else None) in (
            value,
            planner.plan.model.name,
        )


def test_a_line_of_the_offline_trainers_is_as_long_as_planned():
    planner = open_planner(stage="dpo", prompt_length=1000, response_length=200)
    assert planner.state["max_length"] == 1200  # the lab's own max_length would cut at 512
    move(planner, "response_length", 256)
    assert planner.state["max_length"] == 1256
    assert open_planner(**planner.state).controls.other == {}
    assert open_planner(stage="dpo", max_length=64).state["max_length"] == 64  # given on purpose


def test_a_device_of_ones_own_survives_in_state_and_code():
    own = lab.hardware("h100", price=2.49, memory=60 * GIB)
    planner = open_planner(hardware=own)
    assert planner.state["hardware"] is own
    assert 'lab.hardware("h100", memory=' in planner.code and "price=2.49" in planner.code
    written = eval(planner.code, {"lab": lab})
    assert written.hardware == own and written.estimate.money == planner.plan.estimate.money


def test_a_handle_is_a_model_too():
    handle = lab.load("tiny")
    planner = open_planner(stage="sft", model=handle)
    assert planner.plan.model is handle and planner.state["model"] is handle
    assert planner.code.startswith('lab.plan("sft", "tiny", ')


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_setting_of_the_controls_is_a_plan_or_one_line(data):
    planner = PLANNER  # one for all: whatever was set before must not matter
    for name in data.draw(st.lists(st.sampled_from(sorted(set(ALL) - {"path"})), max_size=6)):
        options = [o[1] for o in getattr(planner.controls.widgets[name], "options", ())]
        options = [o for o in options if o not in (ANOTHER, *BUNDLED, "here")]
        move(planner, name, data.draw(st.sampled_from(options or [True, False])))
    state = planner.state
    if planner.error:
        assert planner.error and "\n" not in planner.error and "Error" not in planner.error
        with pytest.raises(ValueError) as caught:
            lab.plan(**state).estimate  # noqa: B018
            lab.plan(**state).estimate.seconds_of  # noqa: B018
        assert planner.error in str(caught.value)
    else:
        assert lab.plan(**state).peak == planner.plan.peak
        assert eval(planner.code, {"lab": lab}).settings == planner.plan.settings
    reopened = CONTROLS_ALONE
    reopened.other.clear()
    reopened.apply({**START, **state})
    assert reopened.settings() == state


PLANNER = open_quick_planner()
CONTROLS_ALONE = Controls({}, lambda name: None)
"""To be set to `START` and a state: new ones would take most of the time."""
START = {name: c.start for name, c in ALL.items() if name not in ("path", "precision")}
START["dtype"] = "float32"  # `precision` is automatic


@given(st.text(), st.text())
def test_whatever_is_written_becomes_python_again(model, word):
    line = call({"stage": "sft", "model": model, "hardware": "here", "optim": word})
    arguments = eval(line, {"lab": type("L", (), {"plan": lambda *a, **k: (a, k)})})
    assert arguments == (("sft", model), {"hardware": "here", "optim": word})


def test_doublings():
    assert doublings(1, 8) == (1, 2, 4, 8)
    assert doublings(16, 64, between=True) == (16, 24, 32, 48, 64)
    assert doublings(4, 6, between=True) == (4, 6)


# ------------------------------------------------------------------------------- what can be moved


def test_only_what_matters_is_shown():
    planner = open_planner()
    assert {"layout", "num_mini_batches", "num_ppo_epochs"} <= visible_controls(planner)
    assert not {"path", "nodes", "load_in_4bit", "num_generations", "offload"} & visible_controls(
        planner
    )
    move(planner, "lora_r", 16)
    assert "load_in_4bit" in visible_controls(planner)
    move(planner, "gpus", 4)
    assert "nodes" in visible_controls(planner)
    move(planner, "sharding", "zero2")
    assert "offload" in visible_controls(planner)
    move(planner, "model", ANOTHER)
    assert "path" in visible_controls(planner)
    move(planner, "stage", "grpo")
    assert "num_generations" in visible_controls(planner) and "layout" not in visible_controls(
        planner
    )
    move(planner, "stage", "inference")
    assert not {
        "lora_r",
        "optim",
        "gradient_checkpointing",
        "sharding",
        "offload",
        "num_train_epochs",
        "gradient_accumulation_steps",
    } & visible_controls(planner)
    assert "load_in_4bit" in visible_controls(planner)


def test_what_does_not_matter_is_not_in_the_state():
    planner = open_planner(layout="shared", lora_r=16, load_in_4bit=True)
    move(planner, "lora_r", 0)
    assert not {"load_in_4bit", "lora_r"} & planner.state.keys()
    move(planner, "stage", "sft")
    assert not {"layout", "num_mini_batches"} & planner.state.keys()
    move(planner, "stage", "ppo")
    assert planner.state["layout"] == "shared"  # but it is remembered


@pytest.mark.parametrize(
    ("settings_given", "key", "state"),
    [
        ({}, "auto", {}),
        ({"bf16": True}, "bf16", {"bf16": True}),
        ({"bf16": False}, "float32", {"bf16": False}),
        ({"fp16": True}, "fp16", {"fp16": True}),
        ({"dtype": "bfloat16", "bf16": False}, "bfloat16", {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, "auto", {}),
        ({"dtype": "float16"}, "float16", {"dtype": "float16"}),
    ],
)
def test_precision_stands_for_three_settings(settings_given, key, state):
    planner = open_planner(**settings_given)
    assert planner.controls.widgets["precision"].value == key
    precision = {k: v for k, v in planner.state.items() if k in ("dtype", "bf16", "fp16")}
    assert precision == state
    assert planner.plan.peak == lab.plan(**{**planner.state, **settings_given}).peak


def test_nodes_follow_the_devices_and_the_machine():
    planner = open_planner(gpus=8)
    move(planner, "gpus", 32)
    assert planner.state["nodes"] == 4  # an H100 node has 8
    move(planner, "hardware", "t4")
    assert planner.state["nodes"] == 8  # one of T4s has 4
    move(planner, "gpus", 2)
    assert "nodes" not in planner.state
    assert open_planner(gpus=16, nodes=1).error == ""  # given on purpose: left alone


def test_values_between_the_marks_of_a_slider_are_kept():
    planner = open_planner(prompt_length=300, num_train_epochs=2.5)
    slider = planner.controls.widgets["prompt_length"]
    values = [value for _, value in slider.options]
    assert slider.value == 300 and values == sorted(values) and 256 in values and 384 in values
    assert planner.state["num_train_epochs"] == 2.5


def test_settings_without_a_control_are_shown_and_can_be_taken_back():
    planner = open_planner(local_rollout_forward_batch_size=4)
    (button,) = planner.controls.extras.children
    move(planner, "rows", 1000)
    assert planner.controls.extras.children == (button,)
    assert button.description.startswith("local_rollout_forward_batch_size=4")
    button.click()
    assert planner.controls.extras.children == ()
    assert "local_rollout_forward_batch_size" not in planner.state


def test_every_control_is_named_and_explained():
    for name, widget in open_planner().controls.widgets.items():
        assert widget.description, name
        trait = "tooltip" if widget.has_trait("tooltip") else "description_tooltip"  # before 8
        assert getattr(widget, trait) or name == "optim", name
    assert set(CONTROLS) == {"Job", "Machine", "Data", "Training", "Rollouts"}


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"gpus": "8"}, "gpus must be a number, got '8'"),
        ({"stage": "pppo"}, "stage='pppo': did you mean 'ppo'"),
        ({"sharding": "zero9"}, "sharding='zero9': did you mean 'zero"),
        ({"hardware": "h1000"}, "hardware='h1000': did you mean"),
        ({"lora_r": True}, "lora_r must be a number, got True"),
        ({"load_in_4bit": 1}, "load_in_4bit must be True or False, got 1"),
        ({"dtype": "bfloat16", "bf16": True}, "bf16/fp16 autocast works on fp32 weights"),
        ({"dtype": "int8"}, "precision='int8'"),
    ],
)
def test_what_no_control_can_show_is_refused_in_a_line(state, line):
    with pytest.raises(ValueError) as caught:
        open_planner(**state)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    planner = open_quick_planner()
    before = planner.state
    with pytest.raises(ValueError):
        planner.apply(rows=50, **state)
    assert planner.state == before


def test_the_catalogue_is_offered_and_marked_by_memory():
    labels = dict(open_planner().controls.widgets["hardware"].options)
    assert set(labels.values()) == {"here", *CATALOGUE}
    assert labels["H100 SXM 80GB · 79.1 GiB"] == "h100"
