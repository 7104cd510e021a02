"""The planner without a browser: its state, what it says, what its buttons do, what it refuses.

The numbers it shows are checked against `lab.plan` called with the same settings, and the verdict
against devices whose memory is set to lie where it should turn.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlhf_lab as lab
from rlhf_lab.cost.hardware import CATALOGUE
from rlhf_lab.widgets import planner as planner_module
from rlhf_lab.widgets.planner import Planner
from rlhf_lab.widgets.planner_options import ALL, ANOTHER, CONTROLS, call, doublings
from rlhf_lab.widgets.planner_view import figures, memory_picture, time_picture, verdict

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script>//\"'><img src=x onerror=alert(2)>\x07\x1b[31m\nnext"
GIB = 2**30


def made(**state) -> Planner:
    return Planner(lab.plan, **state)


def move(planner: Planner, name: str, value) -> None:
    """What a hand does: the page sets the value, and the widget hears of it."""
    planner.controls.widgets[name].value = value


def shown(planner: Planner) -> set[str]:
    return {
        name for name, widget in planner.controls.widgets.items() if widget.layout.display != "none"
    }


def blocks(svg: str) -> dict[str, float]:
    """{"bar, component": value} as the tooltips of a picture say them."""
    titles = [
        r.find(f"{SVG}title").text
        for r in ET.fromstring(svg).iter(f"{SVG}rect")
        if r.get("class") == "block"
    ]
    return {t.rsplit(": ", 1)[0]: float(t.rsplit(": ", 1)[1].replace(",", "")) for t in titles}


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
    {"layout": "adapters", "lora_r": 32, "num_ppo_epochs": 5, "rule_reward": True, "beta": 0.1},
]


@pytest.mark.parametrize("state", STATES, ids=lambda s: s.get("stage", "ppo"))
def test_the_state_brings_the_planner_back_and_is_a_plan(state):
    planner = made(**state)
    assert planner.error == ""
    assert made(**planner.state).state == planner.state
    theirs = lab.plan(**planner.state)
    assert (planner.plan.peak, planner.plan.settings) == (theirs.peak, theirs.settings)
    written = eval(planner.code, {"lab": lab})
    assert (written.stage, written.settings) == (theirs.stage, theirs.settings)
    assert written.estimate.money == planner.plan.estimate.money
    for name, value in state.items():  # nothing that was asked for is lost
        assert planner.state.get(name, ALL[name].off if name in ALL else None) in (
            value,
            planner.plan.model.name,
        )


def test_a_line_of_the_offline_trainers_is_as_long_as_planned():
    planner = made(stage="dpo", prompt_length=1000, response_length=200)
    assert planner.state["max_length"] == 1200  # the lab's own max_length would cut at 512
    move(planner, "response_length", 256)
    assert planner.state["max_length"] == 1256
    assert made(**planner.state).controls.other == {}
    assert made(stage="dpo", max_length=64).state["max_length"] == 64  # said on purpose


def test_a_device_of_ones_own_survives_in_state_and_code():
    own = lab.hardware("h100", price=2.49, memory=60 * GIB)
    planner = made(hardware=own)
    assert planner.state["hardware"] is own
    assert 'lab.hardware("h100", memory=' in planner.code and "price=2.49" in planner.code
    written = eval(planner.code, {"lab": lab})
    assert written.hardware == own and written.estimate.money == planner.plan.estimate.money


def test_a_handle_is_a_model_too():
    handle = lab.load("tiny")
    planner = made(stage="sft", model=handle)
    assert planner.plan.model is handle and planner.state["model"] is handle
    assert planner.code.startswith('lab.plan("sft", "tiny", ')


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_setting_of_the_controls_is_a_plan_or_one_line(data):
    planner = PLANNER
    for name in data.draw(st.lists(st.sampled_from(sorted(set(ALL) - {"path"})), max_size=6)):
        options = [o[1] for o in getattr(planner.controls.widgets[name], "options", ())]
        options = [o for o in options if o not in (ANOTHER, "tiny", "small", "here")]
        move(planner, name, data.draw(st.sampled_from(options or [True, False])))
    state = planner.state
    if planner.error:
        assert planner.error and "\n" not in planner.error and "Error" not in planner.error
        with pytest.raises(ValueError) as raised:
            lab.plan(**state).estimate  # noqa: B018
            lab.plan(**state).estimate.seconds_of  # noqa: B018
        assert planner.error in str(raised.value)
    else:
        assert lab.plan(**state).peak == planner.plan.peak
        assert eval(planner.code, {"lab": lab}).settings == planner.plan.settings
    assert made(**state).state == state


PLANNER = made()


@given(st.text(), st.text())
def test_whatever_is_written_becomes_python_again(model, word):
    line = call({"stage": "sft", "model": model, "hardware": "here", "optim": word})
    found = eval(line, {"lab": type("L", (), {"plan": lambda *a, **k: (a, k)})})
    assert found == (("sft", model), {"hardware": "here", "optim": word})


def test_doublings():
    assert doublings(1, 8) == (1, 2, 4, 8)
    assert doublings(16, 64, between=True) == (16, 24, 32, 48, 64)
    assert doublings(4, 6, between=True) == (4, 6)


# ------------------------------------------------------------------------------------ what it says


@pytest.mark.parametrize(
    ("share", "state", "start"),
    [
        (1.2, "yes", "Fits: "),
        (1.0601, "yes", "Fits: "),
        (1.0599, "perhaps", "May not fit: "),
        (1.0001, "perhaps", "May not fit: "),
        (0.9999, "no", "Does not fit: "),
    ],
)
def test_the_verdict_turns_where_peak_and_band_cross_the_memory(share, state, start):
    peak = lab.plan("sft", "Qwen/Qwen2.5-0.5B", hardware="h100", prompt_length=9).peak
    e = lab.plan(
        "sft",
        "Qwen/Qwen2.5-0.5B",
        prompt_length=9,
        hardware=lab.hardware("h100", memory=share * peak),
    ).estimate
    assert verdict(e)[0] == state
    assert verdict(e)[1].startswith(start)
    assert e.fits == (state == "yes")


def test_the_verdict_says_by_how_much_and_who_holds_most():
    plan = lab.plan(
        "ppo",
        "Qwen/Qwen2.5-7B",
        hardware="h100",
        gpus=8,
        sharding="zero3",
        prompt_length=64,
        response_length=64,
        rows=1000,
    )
    e = plan.estimate
    sentence = verdict(e)[1]
    over = (e.peak - e.hardware.memory) / GIB
    assert (f"{over:.3g} GiB too much" in sentence) == (over > 0)
    by_role: dict[str, float] = {}
    for (role, _), size in e.peak_phase.bytes.items():
        by_role[role] = by_role.get(role, 0) + size
    assert f"the {max(by_role, key=by_role.get)} holds most" in sentence
    assert "each H100" in sentence


def test_the_memory_picture_adds_up():
    e = made().plan.estimate
    found = blocks(memory_picture(e))
    together = {k.split(", ")[1]: v for k, v in found.items() if k.startswith("together")}
    assert sum(together.values()) == pytest.approx(e.peak / GIB, rel=3e-3)
    for part, size in together.items():  # each colour is the roles' together
        roles = [v for k, v in found.items() if k.endswith(f", {part}") and k[:8] != "together"]
        assert sum(roles) == pytest.approx(size, rel=2e-3)
    assert {k.split(", ")[0] for k in found} == {
        "together",
        "policy",
        "reference",
        "value",
        "reward",
    }


def test_a_single_model_is_drawn_phase_by_phase():
    e = made(stage="sft").plan.estimate
    found = blocks(memory_picture(e))
    for f in e.phases:
        bar = [v for k, v in found.items() if k.startswith(f"{f.name}, ")]
        assert sum(bar) == pytest.approx(f.total / GIB, rel=3e-3)


def test_a_device_far_larger_than_the_peak_does_not_press_the_bars_flat():
    small = made(stage="sft", model="EleutherAI/pythia-70m", prompt_length=16, response_length=16)
    assert "H100 SXM 80GB: 79.1 GiB" not in memory_picture(small.plan.estimate)
    assert "H100 SXM 80GB: 79.1 GiB" in memory_picture(made().plan.estimate)


def test_the_time_picture_adds_up():
    e = made().plan.estimate
    found = blocks(time_picture(e))
    assert sum(found.values()) == pytest.approx(e.step_seconds, rel=2e-3)
    assert {k.split(", ")[0] for k in found} == {phase for phase, _ in e.seconds_of}


def test_the_table_has_peak_times_arithmetic_and_money():
    e = lab.plan(
        "sft",
        "Qwen/Qwen2.5-0.5B",
        hardware="h100",
        gpus=2,
        rows=1000,
        prompt_length=100,
        response_length=100,
        num_train_epochs=2,
        per_device_train_batch_size=5,
    ).estimate
    rows = {r[""]: r for r in figures(e)}
    assert rows["memory of one device"]["predicted"].startswith(f"{e.peak / GIB:.3g}")
    assert "time of 200 steps" in rows  # 1,000 rows · 2 epochs / (5 rows · 2 devices)
    name = next(n for n in rows if n.startswith("money"))
    assert "$3.99/h" in name
    assert rows[name]["predicted"] == f"${e.step_seconds * 200 / 3600 * 2 * 3.99:,.2f}"


def test_its_representation_is_one_line_that_stays():
    planner = made(model="Qwen/Qwen2.5-7B", gpus=8, sharding="zero3")
    peak = planner.plan.peak / GIB
    assert repr(planner) == (
        f"Planner(ppo, Qwen/Qwen2.5-7B, 8 x h100: {peak:.3g} GiB of 79.1 GiB, does not fit)"
    )
    assert repr(made(**planner.state)) == repr(planner)


def test_outside_a_notebook_it_is_text_with_everything(capsys):
    planner = made()
    planner._ipython_display_()
    said = capsys.readouterr().out
    for part in (
        repr(planner),
        planner.code,
        "memory of one device",
        "money",
        "What to change",
        planner.cheaper()[0].does,
    ):
        assert part in said


# ------------------------------------------------------------------------------- what can be moved


def test_only_what_matters_is_shown():
    planner = made()
    assert {"layout", "num_mini_batches", "num_ppo_epochs"} <= shown(planner)
    assert not {"path", "nodes", "load_in_4bit", "num_generations", "offload"} & shown(planner)
    move(planner, "lora_r", 16)
    assert "load_in_4bit" in shown(planner)
    move(planner, "gpus", 4)
    assert "nodes" in shown(planner)
    move(planner, "sharding", "zero2")
    assert "offload" in shown(planner)
    move(planner, "model", ANOTHER)
    assert "path" in shown(planner)
    move(planner, "stage", "grpo")
    assert "num_generations" in shown(planner) and "layout" not in shown(planner)
    move(planner, "stage", "inference")
    assert not {
        "lora_r",
        "optim",
        "gradient_checkpointing",
        "sharding",
        "offload",
        "num_train_epochs",
        "gradient_accumulation_steps",
    } & shown(planner)
    assert "load_in_4bit" in shown(planner)


def test_what_does_not_matter_is_not_said():
    planner = made(layout="shared", lora_r=16, load_in_4bit=True)
    move(planner, "lora_r", 0)
    assert not {"load_in_4bit", "lora_r"} & planner.state.keys()
    move(planner, "stage", "sft")
    assert not {"layout", "num_mini_batches"} & planner.state.keys()
    move(planner, "stage", "ppo")
    assert planner.state["layout"] == "shared"  # but it is remembered


@pytest.mark.parametrize(
    ("said", "key", "state"),
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
def test_precision_stands_for_three_settings(said, key, state):
    planner = made(**said)
    assert planner.controls.widgets["precision"].value == key
    found = {k: v for k, v in planner.state.items() if k in ("dtype", "bf16", "fp16")}
    assert found == state
    assert planner.plan.peak == lab.plan(**{**planner.state, **said}).peak


def test_nodes_follow_the_devices_and_the_machine():
    planner = made(gpus=8)
    move(planner, "gpus", 32)
    assert planner.state["nodes"] == 4  # an H100 node has 8
    move(planner, "hardware", "t4")
    assert planner.state["nodes"] == 8  # one of T4s has 4
    move(planner, "gpus", 2)
    assert "nodes" not in planner.state
    assert made(gpus=16, nodes=1).error == ""  # said on purpose: left alone


def test_values_between_the_marks_of_a_slider_are_kept():
    planner = made(prompt_length=300, num_train_epochs=2.5)
    slider = planner.controls.widgets["prompt_length"]
    held = [value for _, value in slider.options]
    assert slider.value == 300 and held == sorted(held) and 256 in held and 384 in held
    assert planner.state["num_train_epochs"] == 2.5


def test_settings_without_a_control_are_shown_and_can_be_taken_back():
    planner = made(local_rollout_forward_batch_size=4)
    (button,) = planner.controls.extras.children
    move(planner, "rows", 1000)
    assert planner.controls.extras.children == (button,)
    assert button.description.startswith("local_rollout_forward_batch_size=4")
    button.click()
    assert planner.controls.extras.children == ()
    assert "local_rollout_forward_batch_size" not in planner.state


def test_every_control_is_named_and_explained():
    for name, widget in made().controls.widgets.items():
        assert widget.description, name
        said = "tooltip" if widget.has_trait("tooltip") else "description_tooltip"  # before 8
        assert getattr(widget, said) or name == "optim", name
    assert set(CONTROLS) == {"Job", "Machine", "Data", "Training", "Rollouts"}


# ----------------------------------------------------------------------------------------- remedies


REMEDIED = [
    {},
    {"model": "Qwen/Qwen2.5-7B", "gpus": 8},
    {"stage": "sft", "rows": 500},
    {"stage": "reward", "model": "Qwen/Qwen2.5-7B"},
    {"stage": "grpo", "optim": "adamw_torch"},
    {"stage": "dpo", "model": "mistralai/Mistral-7B-v0.1", "hardware": "a10g", "loss": "plain"},
    {"stage": "inference", "model": "Qwen/Qwen2.5-7B", "hardware": "t4"},
]


@pytest.mark.parametrize("state", REMEDIED, ids=lambda s: s.get("stage", "ppo"))
def test_every_change_applies_itself_to_the_controls(state):
    changes = made(**state).plan.cheaper()
    for change in changes:
        planner = made(**state)
        planner.apply(**change.settings)
        assert planner.error == ""
        assert planner.plan.peak == change.estimate.peak, change
        assert planner.plan.estimate.money == change.estimate.money, change
        assert made(**planner.state).state == planner.state


def test_a_click_on_a_change_makes_it():
    planner = made()
    best = planner.cheaper()
    assert not planner.plan.fits and best[0].fits
    buttons = [b for b in planner._buttons if b.layout.display != "none"]
    assert [b.description.split(" → ")[0] for b in buttons] == [r.does for r in best]
    assert len(buttons) == 3
    buttons[0].click()
    assert planner.plan.fits and planner.plan.peak == best[0].estimate.peak
    assert planner.controls.widgets["layout"].value == "shared"
    assert planner._verdict.value.count("Fits: ") == 1
    assert planner._buttons[0].description.split(" → ")[0] != best[0].does


def test_in_a_kernel_the_changes_wait_until_the_controls_rest(monkeypatch):
    asked = []
    planner = made()

    async def drag():
        cheaper = Planner.cheaper
        monkeypatch.setattr(Planner, "cheaper", lambda self: asked.append(1) or cheaper(self))
        before = [b.description for b in planner._buttons]
        for size in (16, 32, 64):
            move(planner, "per_device_train_batch_size", size)
            await asyncio.sleep(0)
        peak = planner.plan.peak / GIB
        assert f"{peak:.3g} GiB" in planner._verdict.value  # at once
        assert [b.description for b in planner._buttons] == before and not asked
        planner._buttons[0].click()  # does what it says, though the rest has moved on
        assert planner.state["layout"] == "shared"
        await asyncio.sleep(0.2)
        assert asked == [1] and [b.description for b in planner._buttons] != before

    asyncio.run(drag())


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"gpus": "8"}, "gpus must be a number, got '8'"),
        ({"stage": "pppo"}, "stage='pppo'; did you mean 'ppo'"),
        ({"sharding": "zero9"}, "sharding='zero9'; did you mean 'zero"),
        ({"hardware": "h1000"}, "hardware 'h1000': did you mean"),
        ({"lora_r": True}, "lora_r must be a number, got True"),
        ({"load_in_4bit": 1}, "load_in_4bit must be True or False, got 1"),
        ({"dtype": "bfloat16", "bf16": True}, "bf16/fp16 autocast works on fp32 weights"),
        ({"dtype": "int8"}, "precision='int8'"),
    ],
)
def test_what_no_control_can_show_is_refused_in_a_line(state, line):
    with pytest.raises(ValueError) as raised:
        made(**state)
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)
    planner = made()
    before = planner.state
    with pytest.raises(ValueError):
        planner.apply(rows=50, **state)
    assert planner.state == before


def test_what_cannot_be_planned_is_one_line_and_the_last_picture_stays():
    planner = made()
    picture, svg = planner.chart.picture, planner.chart.svg
    move(planner, "num_mini_batches", 64)
    assert planner.error.startswith("a rollout batch of 8 does not split into num_mini_batches=64")
    assert "does not split" in planner._verdict.value and 'class="lab-verdict error"' in (
        planner._verdict.value
    )
    assert planner.chart.picture is picture and planner.chart.svg == svg
    assert "lab-stale" in planner._pictures._dom_classes and planner._buttons[0].disabled
    with pytest.raises(ValueError, match="does not split"):
        planner.plan  # noqa: B018
    assert "does not split" in repr(planner) and planner.code in str(planner)
    move(planner, "num_mini_batches", 4)
    assert planner.error == "" and planner.plan.settings["num_mini_batches"] == 4
    assert "lab-stale" not in planner._pictures._dom_classes and not planner._buttons[0].disabled


def test_another_model_is_a_folder_a_config_or_one_line(tmp_path):
    planner = made(stage="sft")
    move(planner, "model", ANOTHER)
    assert planner.error.startswith("name a model")
    folder = ROOT / "small_models" / "tiny" / "base"
    for name in (str(folder), f" {folder}/config.json "):
        move(planner, "path", name)
        assert planner.error == "" and planner.plan.model.name == str(folder)
    move(planner, "path", str(tmp_path))
    assert planner.error == f"no config.json in the model folder {tmp_path}"
    assert made(**planner.state).error == planner.error


@pytest.mark.parametrize("name", [HOSTILE, "a/b/c", "../../etc", "~", "\x00", "owner/" + "x" * 500])
def test_hostile_names_are_text(name):
    planner = made(stage="sft", model=name)
    assert planner.error and "\n" not in planner.error
    html = planner._verdict.value
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    assert len(repr(planner).splitlines()) == 1 and repr(planner).isprintable()
    assert "<script" not in str(planner.still()) and "\x1b" not in str(planner.still())
    assert all("<" not in b.description for b in planner._buttons)


def test_a_model_is_looked_for_once_until_it_is_named_again(monkeypatch):
    asked = []

    def look(name):
        asked.append(name)
        raise ValueError("no such model")

    monkeypatch.setattr(planner_module, "load", look)
    planner = made(stage="sft", model="owner/model")
    for size in (1, 2, 4):
        move(planner, "per_device_train_batch_size", size)
    assert asked == ["owner/model"]
    move(planner, "path", "owner/other")
    move(planner, "path", "owner/model")
    assert asked == ["owner/model", "owner/other", "owner/model"]


def test_anything_else_that_goes_wrong_is_one_line_too():
    def plan(**said):
        raise KeyError("no\nsuch thing")

    planner = Planner(plan)
    assert planner.error == "KeyError: 'no\\nsuch thing'"


# ------------------------------------------------------------------------------------ its frugality


def test_an_answer_is_worked_out_once():
    asked = []

    def plan(**said):
        asked.append(said)
        return lab.plan(**said)

    planner = Planner(plan)
    for size in (16, 8, 16, 8):
        move(planner, "per_device_train_batch_size", size)
    repr(planner), str(planner), planner.plan, planner.code
    assert len(asked) == 2


def test_a_redraw_is_small():
    planner = made()
    move(planner, "rows", 50_000)
    assert len(planner.chart.svg) < 4_000
    assert len(planner._table.value) + len(planner._verdict.value) < 4_000


def test_the_pictures_are_a_static_bundle_too():
    planner = made()
    frozen = planner.freeze()
    ET.fromstring(frozen["image/svg+xml"])
    assert repr(planner) in frozen["text/plain"] and planner.code in frozen["text/plain"]
    assert "ppo, Qwen/Qwen2.5-1.5B, h100: does not fit" in frozen["image/svg+xml"]
    move(planner, "num_mini_batches", 64)
    wrong = planner.freeze()["image/svg+xml"]  # above the last picture that there was
    assert "a rollout batch of 8 does not split" in wrong and blocks(wrong) == blocks(
        frozen["image/svg+xml"]
    )
    assert "no data yet" in made(model="a/b/c").freeze()["image/svg+xml"]


def test_opening_and_moving_it_loads_no_torch():
    code = (
        "import sys, rlhf_lab as lab\n"
        "from rlhf_lab.widgets.planner import Planner\n"
        "p = Planner(lab.plan, model='Qwen/Qwen2.5-7B', gpus=8)\n"
        "p.apply(stage='sft', model='tiny', lora_r=8); p._buttons[0].click(); str(p); p.freeze()\n"
        "assert not p.error, p.error\n"
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "transformers", "pandas", "trl", "peft", "accelerate", "datasets", "plotly"}
    assert not set(done.stdout.split()) & heavy


def test_the_catalogue_is_offered_and_marked_by_memory():
    labels = dict(made().controls.widgets["hardware"].options)
    assert set(labels.values()) == {"here", *CATALOGUE}
    assert labels["H100 SXM 80GB · 79.1 GiB"] == "h100"
