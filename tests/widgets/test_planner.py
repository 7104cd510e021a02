"""The planner without a browser: what it shows of a plan, what its buttons do, what it refuses.

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
from planner_kit import GIB, blocks, move, open_planner, open_quick_planner
from stored_pictures import svg_of

import rlhf_lab as lab
from rlhf_lab.display import format_bytes
from rlhf_lab.widgets import planner_answers
from rlhf_lab.widgets.planner import Planner
from rlhf_lab.widgets.planner_controls import ANOTHER
from rlhf_lab.widgets.planner_view import figures, memory_picture, time_picture, verdict

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert(1)</script>//\"'><img src=x onerror=alert(2)>\x07\x1b[31m\nnext"

# ---------------------------------------------------------------------------------- what it shows


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
    e = open_planner().plan.estimate
    sizes = blocks(memory_picture(e))
    together = {k.split(", ")[1]: v for k, v in sizes.items() if k.startswith("together")}
    assert sum(together.values()) == pytest.approx(e.peak / GIB, rel=3e-3)
    for part, size in together.items():  # each colour is the roles' together
        roles = [v for k, v in sizes.items() if k.endswith(f", {part}") and k[:8] != "together"]
        assert sum(roles) == pytest.approx(size, rel=2e-3)
    assert {k.split(", ")[0] for k in sizes} == {
        "together",
        "policy",
        "reference",
        "value",
        "reward",
    }


def test_a_single_model_is_drawn_phase_by_phase():
    e = open_planner(stage="sft").plan.estimate
    sizes = blocks(memory_picture(e))
    for f in e.phases:
        bar = [v for k, v in sizes.items() if k.startswith(f"{f.name}, ")]
        assert sum(bar) == pytest.approx(f.total / GIB, rel=3e-3)


def test_a_device_far_larger_than_the_peak_does_not_press_the_bars_flat():
    small = open_planner(
        stage="sft", model="EleutherAI/pythia-70m", prompt_length=16, response_length=16
    )
    assert "H100 SXM 80GB: 79.1 GiB" not in memory_picture(small.plan.estimate)
    assert "H100 SXM 80GB: 79.1 GiB" in memory_picture(open_planner().plan.estimate)


def test_the_time_picture_adds_up():
    e = open_planner().plan.estimate
    seconds = blocks(time_picture(e))
    assert sum(seconds.values()) == pytest.approx(e.step_seconds, rel=2e-3)
    assert {k.split(", ")[0] for k in seconds} == {phase for phase, _ in e.seconds_of}


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
    planner = open_planner(model="Qwen/Qwen2.5-7B", gpus=8, sharding="zero3")
    peak = planner.plan.peak / GIB
    assert repr(planner) == (
        f"Planner(ppo, Qwen/Qwen2.5-7B, 8 x h100: {peak:.3g} GiB of 79.1 GiB, does not fit)"
    )
    assert repr(open_planner(**planner.state)) == repr(planner)


def test_outside_a_notebook_it_is_text_with_everything(capsys):
    planner = open_planner()
    planner._ipython_display_()
    printed = capsys.readouterr().out
    for part in (
        repr(planner),
        planner.code,
        "memory of one device",
        "money",
        "What to change",
        planner.cheaper()[0].does,
    ):
        assert part in printed


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
    changes = lab.plan(**open_quick_planner(**state).state).cheaper()
    for change in changes:
        planner = open_quick_planner(**state)
        planner.apply(**change.settings)
        assert planner.error == ""
        assert planner.plan.peak == change.estimate.peak, change
        assert planner.plan.estimate.money == change.estimate.money, change
        assert open_quick_planner(**planner.state).state == planner.state


def test_a_click_on_a_change_makes_it():
    planner = open_planner()
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
    computed = []
    planner = open_planner()

    async def drag():
        cheaper = Planner.cheaper
        monkeypatch.setattr(Planner, "cheaper", lambda self: computed.append(1) or cheaper(self))
        before = [b.description for b in planner._buttons]
        for size in (16, 32, 64):
            move(planner, "per_device_train_batch_size", size)
            await asyncio.sleep(0)
        peak = planner.plan.peak / GIB
        assert f"{peak:.3g} GiB" in planner._verdict.value  # at once
        assert [b.description for b in planner._buttons] == before and not computed
        planner._buttons[0].click()  # does what it says, though the rest has moved on
        assert planner.state["layout"] == "shared"
        await asyncio.sleep(0.2)
        assert computed == [1] and [b.description for b in planner._buttons] != before

    asyncio.run(drag())


# ------------------------------------------------------------------------- what cannot be planned


def test_what_cannot_be_planned_is_one_line_and_the_last_picture_stays():
    planner = open_planner()
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
    planner = open_planner(stage="sft")
    move(planner, "model", ANOTHER)
    assert planner.error.startswith("name a model")
    folder = ROOT / "small_models" / "tiny" / "base"
    for name in (str(folder), f" {folder}/config.json "):
        move(planner, "path", name)
        assert planner.error == "" and planner.plan.model.name == str(folder)
    move(planner, "path", str(tmp_path))
    assert planner.error == f"no config.json in the model folder {tmp_path}"
    assert open_planner(**planner.state).error == planner.error


@pytest.mark.parametrize("name", [HOSTILE, "a/b/c", "../../etc", "~", "\x00", "owner/" + "x" * 500])
def test_hostile_names_are_text(name):
    planner = open_planner(stage="sft", model=name)
    assert planner.error and "\n" not in planner.error
    html = planner._verdict.value
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    assert len(repr(planner).splitlines()) == 1 and repr(planner).isprintable()
    assert "<script" not in str(planner.still()) and "\x1b" not in str(planner.still())
    assert all("<" not in b.description for b in planner._buttons)


def test_a_model_is_looked_for_once_until_it_is_named_again(monkeypatch):
    names = []

    def look(name):
        names.append(name)
        raise ValueError("no such model")

    monkeypatch.setattr(planner_answers, "load", look)
    planner = open_planner(stage="sft", model="owner/model")
    for size in (1, 2, 4):
        move(planner, "per_device_train_batch_size", size)
    assert names == ["owner/model"]
    move(planner, "path", "owner/other")
    move(planner, "path", "owner/model")
    assert names == ["owner/model", "owner/other", "owner/model"]


def test_anything_else_that_goes_wrong_is_one_line_too():
    def plan(**settings):
        raise KeyError("no\nsuch thing")

    planner = Planner(plan)
    assert planner.error == "KeyError: 'no\\nsuch thing'"


# ------------------------------------------------------------------------------------ its frugality


def test_an_answer_is_worked_out_once():
    planned = []

    def plan(**settings):
        planned.append(settings)
        return lab.plan(**settings)

    planner = Planner(plan)
    for size in (16, 8, 16, 8):
        move(planner, "per_device_train_batch_size", size)
    repr(planner), str(planner), planner.plan, planner.code
    assert len(planned) == 2


def test_a_redraw_is_small():
    planner = open_planner()
    move(planner, "rows", 50_000)
    assert len(planner.chart.svg) < 4_000
    assert len(planner._table.value) + len(planner._verdict.value) < 4_000


def test_the_pictures_are_a_static_bundle_too():
    planner = open_planner()
    frozen = planner.freeze()
    shown = svg_of(frozen)
    ET.fromstring(shown)
    assert repr(planner) in frozen["text/plain"] and planner.code in frozen["text/plain"]
    assert "ppo, Qwen/Qwen2.5-1.5B, h100: does not fit" in shown
    move(planner, "num_mini_batches", 64)
    wrong = svg_of(planner.freeze())  # above the last picture that there was
    assert "a rollout batch of 8 does not split" in wrong and blocks(wrong) == blocks(shown)
    assert "no data yet" in svg_of(open_planner(model="a/b/c").freeze())


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


@pytest.mark.parametrize(
    ("stage", "model", "settings"),
    [
        ("ppo", "tiny", {"kl_coef": 0.3}),
        ("dpo", "tiny", {"lora_r": 8}),
        ("ppo", "Qwen/Qwen2.5-7B", {"hardware": "h100", "gpus": 8, "sharding": "zero3"}),
        ("inference", "Qwen/Qwen2.5-7B", {"hardware": "h100"}),
    ],
)
def test_it_opens_with_a_plan_to_the_same_figures(stage, model, settings):
    plan = lab.plan(stage, model, **settings)
    planner = lab.planner(plan)
    assert planner.plan.ledger == plan.ledger
    assert dict(planner.plan.settings).items() >= dict(plan.settings).items()
    texts = [button.description for button in planner.controls.extras.children]
    beside = {name for name in plan.settings if name not in planner.controls.widgets}
    assert {text.split("=")[0] for text in texts} >= beside - {"dtype", "bf16", "fp16"}


def test_lengths_of_the_data_are_shown_and_give_way_together_when_one_moves():
    plan = lab.plan("sft", "tiny")
    planner = lab.planner(plan)
    widgets, s = planner.controls.widgets, plan.estimate.setup
    shown = (widgets["prompt_length"].value, widgets["response_length"].value)
    assert shown == (s.prompt, s.response) and "prompt_length" not in planner.state
    move(planner, "prompt_length", 64)
    state = planner.state
    assert (state["prompt_length"], state["response_length"]) == (64, s.response)
    assert state["rows"] == s.rows


def test_a_change_by_a_button_can_be_taken_back():
    planner = open_planner(model="Qwen/Qwen2.5-7B", stage="sft", hardware="h100")
    before = planner.state
    assert planner._undo.layout.display == "none"
    planner._buttons[0].click()
    assert planner.state != before and planner._undo.layout.display is None
    planner._undo.click()
    assert planner.state == before and planner._undo.layout.display == "none"
    planner._buttons[0].click()
    move(planner, "prompt_length", 64)  # by hand: what came before is no longer one step away
    assert planner._undo.layout.display == "none"


def test_what_is_to_spare_agrees_with_the_memory_beside_it():
    plan = lab.plan("sft", "Qwen/Qwen2.5-0.5B", hardware="h100", prompt_length=64)
    e, (state, sentence) = plan.estimate, verdict(plan.estimate)
    room = e.hardware.memory
    assert state == "yes" and f"{format_bytes(room - e.peak)} to spare" in sentence
    assert f"({format_bytes(room - e.needed)} at the upper end of the band)" in sentence


def test_the_answer_stands_above_the_controls_where_they_do_not_fit_beside_each_other():
    flow = open_quick_planner().widget.layout
    assert (flow.flex_flow, flow.align_items) == ("row wrap-reverse", "flex-end")
