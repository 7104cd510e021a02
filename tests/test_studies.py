"""Predicted, simulated and measured side by side; series and projects; the commands about cost.

pytest tests/test_studies.py
"""

from __future__ import annotations

import json
from unittest import mock

import pytest

import rlhf_lab as lab
from rlhf_lab.cli.main import main
from rlhf_lab.studies import predict


def _outputs(shown):
    """The kind of each output that a cell would have."""
    with mock.patch("IPython.display.display") as display:
        shown._ipython_display_()
    outputs = [call.args[0] for call in display.call_args_list]
    return [next(iter(x if isinstance(x, dict) else x._repr_mimebundle_())) for x in outputs]


@pytest.fixture(autouse=True, scope="module")
def data(few_stories):
    return few_stories


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    plan = lab.plan("sft", "tiny", max_steps=2, per_device_train_batch_size=4)
    return lab.train(plan, out=tmp_path_factory.mktemp("runs") / "sft", quiet=True)


def test_every_run_keeps_what_was_predicted_and_what_was_measured(run):
    for source in ("predicted", "measured"):
        rows = run.ledger.filter(source=source)
        assert {r.quantity for r in rows} >= {"bytes", "flops", "seconds", "tokens"}
    compared = lab.compare(run)
    forward = next(r for r in compared.rows if (r["phase"], r["quantity"]) == ("forward", "flops"))
    assert forward["predicted"] and forward["measured"] and forward["simulated"] == "–"


def test_predicted_simulated_and_measured_agree_on_the_bundled_model(run):
    """Two steps of SFT: memory within 6 %, and the x-ray's FLOPs are the plan's."""
    plan = lab.plan("sft", "tiny", max_steps=2, per_device_train_batch_size=4)
    seen = lab.xray(plan)
    assert plan.peak == pytest.approx(seen.peak, rel=0.06)
    predicted = plan.ledger.total(quantity="flops")
    assert predicted == pytest.approx(seen.ledger.total(quantity="flops"), rel=0.005)
    table = str(lab.compare(plan, seen, run))
    assert "predicted" in table and "measured" in table
    assert "<svg" in lab.compare(plan, seen, run)._repr_html_()
    assert f"{predicted / 2 / 1e12:.3g} TFLOP a step" in repr(seen)
    assert _outputs(lab.compare(plan, seen, run)) == ["text/html", "text/html"]
    assert _outputs(plan.show()) == ["text/html"] * 3


def test_an_xray_of_a_sharded_plan_says_what_it_is_of():
    asked = {"hardware": "h100", "gpus": 2, "max_steps": 1, "per_device_train_batch_size": 1}
    whole, shared = (lab.plan("sft", "mini", sharding=way, **asked) for way in ("ddp", "fsdp2"))
    assert not lab.xray(whole).notes
    assert "one device alone, without sharding='fsdp2'" in lab.xray(shared).notes[-1]


def test_a_plan_knows_the_lengths_of_its_data():
    """Responses of one or two words: the longest sets memory, the average the work."""
    rows = [{"prompt": "a a a", "completion": "a"}, {"prompt": "a a a", "completion": "a a"}] * 50
    data = lab.load_data(rows)
    found = lab.plan("sft", "tiny", data=data, per_device_train_batch_size=1)
    settings = found.settings
    assert settings["rows"] == len(data.sft.train)
    total = settings["prompt_length"] + settings["response_length"]
    padded = settings["padded_prompt"] + settings["padded_response"]
    assert padded == pytest.approx(settings["mean_tokens"])  # rows of one need no padding
    assert padded < total
    assert predict(lab.plan("sft", "tiny", per_device_train_batch_size=1), data).peak == found.peak


# ------------------------------------------------------------------------------------------ series

PYTHIAS = [f"EleutherAI/pythia-{n}" for n in ("410m", "1.4b", "2.8b", "6.9b", "12b")]
SAME = {
    "hardware": "h100",
    "prompt_length": 64,
    "response_length": 64,
    "rows": 1000,
    "per_device_train_batch_size": 1,
}


def test_cost_is_linear_in_parameters_at_fixed_data():
    series = lab.sweep("model", PYTHIAS, stage="sft", **SAME)
    assert series.exponent("flops") == pytest.approx(1.0, abs=0.05)
    assert "linear in parameters" in series.answer() and "Quadratic only" in series.answer()


def test_exponents_of_the_other_axes():
    rows = lab.sweep(
        "rows",
        [1000, 2000, 4000],
        model=PYTHIAS[0],
        **{k: v for k, v in SAME.items() if k != "rows"},
    )
    assert rows.exponent("flops") == pytest.approx(1.0, abs=0.01)
    assert rows.exponent("bytes") == pytest.approx(0.0, abs=1e-9)
    figure = rows.figure()
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    with pytest.raises(ValueError, match="needs two values at least"):
        lab.sweep("rows", [1000])


def test_a_series_that_runs_measures_what_it_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    series = lab.sweep("per_device_train_batch_size", [2, 8], run=True, max_steps=2)
    for point in series.points:
        assert point["flops measured"] == pytest.approx(point["flops predicted"], rel=0.35)
    assert series.exponent("flops", "measured") == pytest.approx(1.0, abs=0.35)


def test_a_series_over_words_is_a_table():
    """Ways of sharding are no numbers: no exponent, no line, and what is least in words."""
    asked = {"model": "Qwen/Qwen2.5-7B", **SAME, "gpus": 8}
    series = lab.sweep("sharding", ["ddp", "zero3"], **asked)
    assert [row["sharding"] for row in series.rows] == ["ddp", "zero3"]
    assert series.points[1]["bytes predicted"] < series.points[0]["bytes predicted"]
    assert series.answer().startswith("least bytes of zero3")
    for line in (series.exponent, series.figure):
        with pytest.raises(ValueError, match="no line over sharding: ddp, zero3 are no numbers"):
            line()
    devices = lab.sweep(
        "hardware", ["a100", "h100"], **{k: v for k, v in SAME.items() if k != "hardware"}
    )
    assert [row["hardware"] for row in devices.rows] == ["a100", "h100"]
    assert lab.sweep("stage", ["sft", "dpo"], **SAME).labels == ["sft", "dpo"]


def test_zero_has_no_place_on_log_log_paper():
    """It stands in the table; line and exponent are those of the others."""
    prompts = [0, 64, 128]
    series, others = (lab.sweep("prompt_length", p, **SAME) for p in (prompts, prompts[1:]))
    assert [row["prompt_length"] for row in series.rows] == ["0", "64", "128"]
    assert series.exponent() == others.exponent() and "(0 left out)" in repr(series)
    assert [len(trace.x) for trace in series.figure().data] == [2]
    assert "no power law over prompt_length" in repr(lab.sweep("prompt_length", [0, 64], **SAME))


def test_several_plans_stand_side_by_side():
    """A column each, by what sets them apart or by the names of a mapping."""
    full, lora = (lab.plan("sft", PYTHIAS[0], **SAME, **m) for m in ({}, {"lora_r": 8}))
    rows = lab.compare({"full": full, "lora": lora}).rows
    step = next(r for r in rows if (r["phase"], r["quantity"]) == ("optimizer", "bytes"))
    assert step["full"] != step["lora"] and float(step["second / first"]) < 0.9
    assert {r["quantity"] for r in rows} == {"bytes", "flops", "seconds", "tokens", "money"}
    columns = list(lab.compare(full, lora).rows[0])
    assert columns[3].endswith("lora_r=8") and "lora_r" not in columns[2]
    dpo = lab.compare(full, lab.plan("dpo", PYTHIAS[0], **SAME))
    assert [c.partition(",")[0] for c in list(dpo.rows[0])[2:4]] == ["stage=sft", "stage=dpo"]
    assert len(lab.compare(full, lora).figure("money").data)
    assert lab.compare({"a": full, "b": lora})._repr_html_().count("<svg") == 2
    with pytest.raises(ValueError, match="int has no ledger"):
        lab.compare(3)


def test_runs_and_their_folders_stand_side_by_side(run):
    again = lab.compare({"one": run, "two": run.folder})
    forward = next(r for r in again.rows if (r["phase"], r["quantity"]) == ("forward", "flops"))
    assert forward["one"] == forward["two"] != "–" and forward["second / first"] == "1.00"
    assert lab.compare(run.folder).rows == lab.compare(run).rows
    assert lab.stage_costs(run.folder).data and lab.stage_costs({"mine": str(run.folder)}).data
    with pytest.raises(FileNotFoundError, match="no such folder: nowhere"):
        lab.stage_costs("nowhere")
    page = lab.report([run, run.folder], run.folder.parent / "page.html").read_text("utf-8")
    assert "sft of tiny, sft of tiny" in page and "sft (2)" in page


def test_the_folder_of_a_run_is_its_model(run):
    assert lab.load(run.folder).paths == lab.load(run.model_path).paths
    student = lab.plan("distill", "mini", teacher_model=run.folder).model
    assert student.paths["teacher"] == str(run.model_path)


def test_a_project_adds_its_stages_up():
    whole = lab.project(PYTHIAS[0], **{**SAME, "per_device_train_batch_size": 2})
    assert list(whole.stages) == ["sft", "reward", "ppo"]
    assert whole.hours == pytest.approx(sum(e.hours for e in whole.stages.values()))
    assert whole.money == pytest.approx(sum(e.money for e in whole.stages.values()))
    assert "all" in repr(whole)


# ------------------------------------------------------------------------------------ command line


def test_plan_on_the_command_line(capsys, tmp_path):
    config = tmp_path / "accelerate.yaml"
    code = main(
        [
            "plan",
            "sft",
            "--model",
            "Qwen/Qwen2.5-7B",
            "--hardware",
            "h100",
            "--gpus",
            "8",
            "--rows",
            "20000",
            "--prompt-length",
            "256",
            "--response-length",
            "256",
            "--cheaper",
            "--accelerate-config",
            str(config),
        ]
    )
    printed = capsys.readouterr().out
    assert code == 0 and "LoRA, rank 16" in printed and "memory/device" in printed
    assert "num_processes: 8" in config.read_text()
    assert (
        main(
            [
                "plan",
                "project",
                "--model",
                "Llama-3.2-1B",
                "--hardware",
                "a100",
                "--rows",
                "10",
                "--json",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["ledger"]
    assert {r["stage"] for r in rows} == {"sft", "reward", "ppo"}
    assert {r["source"] for r in rows} == {"predicted"}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["plan", "sft", "--hardware", "h10"], "did you mean 'h100'"),
        (["plan", "sft", "--model", "no such"], "no model 'no such'"),
        (["plan", "sft", "--set", "warmup_steps=-3"], "warmup_steps must be 0 or more, got -3"),
        (["plan", "ppo", "--set", "num_mini_batches=7"], "does not split into num_mini_batches=7"),
        (["plan", "sft", "--set", "rubbish"], "write NAME=VALUE"),
        (["plan", "rlhf"], "invalid choice"),
    ],
)
def test_bad_arguments_are_one_line(args, line, capsys):
    try:
        code = main(args)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and line in error and error.strip().count("\n") == 0


def test_what_is_planned_only_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match="gpus=8 is planned only"):
        lab.train(lab.plan("sft", "tiny", gpus=8, sharding="ddp"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_inference_is_planned_and_not_trained():
    """As long as the bundled prompts and stories; there is no trainer of it."""
    plan = lab.plan("inference", "tiny")
    assert [f.name for f in plan.estimate.phases] == ["prefill", "decode"]
    assert plan.estimate.setup.prompt == lab.plan("ppo", "tiny").estimate.setup.prompt
    assert "decode" in str(plan.show())
    with pytest.raises(ValueError, match="inference is planned only; to train, choose from sft"):
        lab.train(plan)
