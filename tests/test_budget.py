"""A whole project's money: every part by hand, and a budget.

Run: pytest tests/test_budget.py
"""

from __future__ import annotations

import json

import pytest

import rlhf_lab as lab
from rlhf_lab.budget import INPUTS, WATTS
from rlhf_lab.cli.main import main
from rlhf_lab.cost.hardware import CATALOGUE

SMALL = {
    "hardware": "a100-80",
    "rows": 1000,
    "prompt_length": 64,
    "response_length": 64,
    "per_device_train_batch_size": 2,
}
MODEL = "meta-llama/Llama-3.2-1B"


def project(**more):
    return lab.project(MODEL, **{**SMALL, **more})


def costs(whole) -> dict[str, float]:
    return {c.name: c.usd for c in whole.costs}


def test_the_bill_by_hand():
    whole = project(labels=500, label_price=0.4, failed_runs=0.25, electricity_price=0.1)
    devices = sum(e.money for e in whole.stages.values())
    hours = sum(e.gpu_hours for e in whole.stages.values())
    assert all(e.fits for e in whole.stages.values()) and whole.money == pytest.approx(devices)
    assert whole.kwh == pytest.approx(hours * 0.4 * 1.25 * 1.54)  # 400 W, PUE 1.54
    stored = 3 * whole.stages["sft"].setup.model.parameters() * 4
    assert costs(whole) == pytest.approx(
        {
            **{name: e.money for name, e in whole.stages.items()},
            "failed runs": devices / 4,
            "labels": 200.0,
            "energy": 0.1 * whole.kwh,
            "storage": stored / 1e9 * 0.023,
        }
    )
    assert whole.total == pytest.approx(sum(costs(whole).values()))


def test_every_input_has_a_source_and_yours_takes_its_place():
    assert all(entry["source"] for entry in INPUTS.values())
    assert set(WATTS) < set(CATALOGUE)
    sources = {c.name: c.source for c in project(label_price=3, labels=1).costs}
    assert sources["labels"] == "yours; yours" and "Llama 3" in sources["failed runs"]
    assert project(watts=200).kwh == pytest.approx(project().kwh / 2)
    assert project(pue=1.0).kwh == pytest.approx(project().kwh / 1.54)


def test_adapters_are_stored_alone():
    plain, adapters = project().stored, project(lora_r=8).stored
    assert 0 < adapters < plain / 100


def test_a_stage_that_does_not_fit_is_in_no_sum():
    whole = lab.project(
        "Qwen/Qwen2.5-7B",
        **{**SMALL, "hardware": "a100-40", "stages": ("sft", "dpo")},
        each={"sft": {"lora_r": 8, "dtype": "bfloat16"}},
        budget=1000,
    )
    assert [e.fits for e in whole.stages.values()] == [True, False]
    assert whole.money == whole.stages["sft"].money and whole.hours == whole.stages["sft"].hours
    assert "dpo" not in costs(whole)
    assert whole.verdict.startswith("dpo does not fit in memory")
    assert str(whole).splitlines()[0] == whole.verdict
    assert "all that fit" in str(whole)
    assert {r.quantity for r in whole.ledger if r.stage == "dpo"} == {"bytes"}
    assert whole.ledger.total(quantity="money") == pytest.approx(whole.money)


def test_where_nothing_fits_or_is_known_there_is_no_total():
    none = lab.project("Qwen/Qwen2.5-7B", **{**SMALL, "hardware": "t4"})
    assert none.total is None and none.verdict.endswith("no total: no stage fits")
    unknown = lab.project(MODEL, **{**SMALL, "rows": None}, stages=("sft",))
    assert unknown.total is None and "rows or a price are missing for sft" in unknown.verdict


def test_a_budget_says_what_fits_and_by_how_much():
    total = project(labels=100).total
    within = project(labels=100, budget=total + 10)
    assert "within the budget" in within.verdict and "$10.00 left" in within.verdict
    over = project(labels=100, budget=total - 1)
    assert "over the budget" in over.verdict and "$1.00 too much" in over.verdict
    fits = {row["cost"]: row["fits"] for row in over.bill}
    assert (fits["sft"], fits["storage"], fits["all"]) == ("yes", "no", "no")
    assert over.bill[-1]["left"] == "−1"
    assert "left" not in project().bill[0]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"budget": -1}, "budget must be a number of at least 0"),
        ({"label_price": "cheap"}, "label_price must be a number"),
        ({"each": {"dpo": {}}}, "planned are sft, reward, ppo"),
    ],
)
def test_bad_inputs_are_one_line(asked, line):
    with pytest.raises(ValueError, match=line):
        project(**asked)


def test_on_the_command_line(capsys):
    common = ["--model", MODEL, "--hardware", "a100-80", "--rows", "100", "--batch", "2"]
    common += ["--prompt-length", "64", "--response-length", "64"]
    assert main(["plan", "project", *common, "--budget", "5", "--set", "labels=10"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "in all; over the budget of $5.00" in first
    assert main(["plan", "project", *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["stage"] for r in found["ledger"]} == set(found["stages"]) == {"sft", "reward", "ppo"}
    assert found["total_usd"] == pytest.approx(sum(c["usd"] for c in found["costs"]))
    assert main(["plan", "project", *common, "--cheaper"]) == 2
    assert "--cheaper is for the plan of one stage" in capsys.readouterr().err
    assert main(["plan", "sft", *common, "--budget", "5"]) == 2
    assert "--budget is planned for a project" in capsys.readouterr().err


def test_each_stage_takes_the_settings_that_it_has():
    """`beta` is DPO's alone; what no stage has is refused with the nearest."""
    stages = {"stages": ("sft", "dpo")}
    whole = project(beta=0.3, **stages)
    assert whole.stages["sft"].peak == project(**stages).stages["sft"].peak
    assert "beta" in whole.stages["dpo"].settings and "beta" not in whole.stages["sft"].settings
    with pytest.raises(ValueError, match="no setting 'lora_rank'; did you mean 'lora_r'"):
        project(lora_rank=8)
    with pytest.raises(ValueError, match="no setting 'budgett'"):
        project(budgett=100)
    first = str(project(neftune_noise_alpha=5.0)).splitlines()[0]
    assert first.startswith("not modelled: neftune_noise_alpha=5.0")


def test_a_project_is_a_page_that_needs_nothing_else(tmp_path):
    whole = project(budget=5, labels=10)
    page = whole.report(tmp_path / "deep" / "project.html").read_text(encoding="utf-8")
    assert whole.verdict in page and "<svg" in page and "<script" not in page
    for cost in whole.costs:
        assert cost.name in page
