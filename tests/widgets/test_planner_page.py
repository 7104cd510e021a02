"""The planner as a link, and what its web page draws, without a browser.

Run: pytest tests/widgets/test_planner_page.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from urllib.parse import parse_qsl, quote

import pytest
from web_kit import ROOT, Page

import rlhf_lab as lab
from rlhf_lab.widgets.planner_link import fragment_of, settings_of

SETTINGS = [
    {"stage": "sft", "model": "tiny", "hardware": "laptop"},
    {"stage": "ppo", "model": "Qwen/Qwen2.5-7B", "hardware": "h100", "gpus": 8, "lora_r": 16},
    {"stage": "dpo", "model": "tiny", "hardware": "a100-80", "beta": 0.25, "run_name": "1e3"},
    {"stage": "grpo", "model": "tiny", "hardware": "l4", "rewards": ["gold"], "bf16": False},
    {"stage": "sft", "model": "tiny", "hardware": lab.hardware("h100", price=2.5, memory=9e9)},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_link_brings_the_planner_back(settings):
    planner = lab.planner(**settings)
    address, _, fragment = planner.link.partition("#")
    assert address.endswith(".github.io/rlhf-lab/planner/")
    for link in (planner.link, fragment, f"#{fragment}"):
        again = lab.planner(link)
        assert again.state == planner.state and again.link == planner.link
    assert again.plan.ledger.to_jsonl() == planner.plan.ledger.to_jsonl()
    assert lab.planner(planner.link, gpus=2).state["gpus"] == 2  # what is said beside it counts


def test_a_link_says_what_this_machine_is_and_which_models_play():
    planner = lab.planner(stage="sft", model="tiny", hardware="here")
    assert settings_of(planner.link)["hardware"] == lab.hardware("here")
    model = lab.load("Qwen/Qwen2.5-7B").with_stage("reward", "Qwen/Qwen2.5-0.5B")
    fragment = fragment_of({"stage": "ppo", "model": model, "hardware": "h100"})
    assert dict(parse_qsl(fragment))["reward_model"] == "Qwen/Qwen2.5-0.5B"
    theirs, mine = lab.plan(**settings_of(fragment)), lab.plan("ppo", model, hardware="h100")
    assert theirs.peak == mine.peak


@pytest.mark.parametrize(
    ("link", "line"),
    [
        ("https://x.example/#data=a.json", "cannot give data"),
        ("data=a.json", "cannot give data"),
        ("nonsense", "no link of the planner: 'nonsense'"),
        ("hardware=%2Fetc%2Fpasswd.json", "choose from laptop"),
        ("hardware=mine.yaml", "choose from laptop"),
        ("gpus=1e999", "cannot give gpus"),
        ("gpus=NaN", "cannot give gpus"),
        ("rows=%7B%7D", "cannot give rows"),
        ("lora_target_modules=%5B%5B1%5D%5D", "cannot give lora_target_modules"),
    ],
)
def test_a_link_opens_no_file_and_holds_plain_values(link, line):
    with pytest.raises(ValueError, match=line):
        settings_of(link)


@pytest.fixture(scope="module")
def page():
    return Page(lab.plan)


def test_the_page_draws_what_the_notebook_draws(page):
    shown = json.loads(page.open("stage=sft&model=tiny&hardware=laptop"))
    planner = lab.planner(shown["fragment"])
    assert shown["code"] == planner.code and planner._answer().sentence in shown["verdict"]
    described = [k for group in shown["controls"].values() for k in group]
    names = {k["name"] for k in described if k["shown"]}
    assert names == {n for n, w in planner.controls.widgets.items() if w.layout.display != "none"}
    for k in described:
        value = planner.controls.widgets[k["name"]].value
        label = k["choices"][k["value"]] if k["choices"] else k["value"]
        known = dict(planner.controls.options[k["name"]])
        assert known[label] == value if k["choices"] else label == value
    assert json.loads(page.advice())["files"]["trl.yaml"] == planner.plan.trl_config()


def test_a_move_a_change_and_back(page):
    page.open("")
    assert "each H100" in json.loads(page.move("gpus", 1))["verdict"]
    offered = json.loads(page.advice())["remedies"]
    taken = json.loads(page.press(0))
    assert offered and taken["undo"] and taken["state"] == "yes"
    back = json.loads(page.press(-1))
    assert not back["undo"] and settings_of(back["fragment"])["gpus"] == 2
    extra = json.loads(page.open("seed=3"))["extras"]
    assert extra == {"seed": "seed=3  ✕"} and not json.loads(page.remove("seed"))["extras"]


@pytest.mark.parametrize("fragment", ["hardware=here", "hardware=here&gpus=2", "stage=zz", "zz"])
def test_an_address_that_is_no_plan_says_so_until_a_control_moves(page, fragment):
    shown = json.loads(page.open(fragment))
    assert shown["state"] == "error" and "this address is no plan" in shown["verdict"]
    assert json.loads(page.move("stage", 0))["state"] == "yes"


def test_no_other_model_is_looked_for(page):
    verdict = json.loads(page.open(f"model={quote('someone/else')}"))["verdict"]
    assert "lab.planner takes any other" in verdict


def test_the_page_needs_no_widget_and_nothing_that_a_browser_lacks():
    code = (
        "import sys\n"
        "from rlhf_lab.planning import plan\n"
        "from planner_page import Page\n"
        "page = Page(plan); page.open(''); page.ledger()\n"
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "web"
    )
    lacking = {"ipywidgets", "anywidget", "traitlets", "jinja2", "filelock", "psutil", "numpy"}
    assert not set(done.stdout.split()) & lacking
