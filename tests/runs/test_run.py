"""A run on disk: what was logged can be read, by anyone, even after a crash."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_lab.runs import run as run_module
from rlhf_lab.runs.figures import GLOSSES, gloss
from rlhf_lab.runs.ledger import Ledger
from rlhf_lab.runs.run import Run, name_today


def new(folder, **more) -> Run:
    return Run.create(folder, **{"stage": "ppo", "model": "tiny", "settings": {}, **more})


def test_a_run_says_what_was_trained(tmp_path):
    @dataclass
    class Settings:
        learning_rate: float = 1e-3
        folder: object = tmp_path
        reward_funcs: tuple = (len,)

    run = new(tmp_path / "run", settings=Settings(), data="stories", seed=3, hardware={"cpu": 2})
    read = Run.load(tmp_path / "run")
    assert read.stage == "ppo" and read.status == "running" and read.summary == {}
    assert read.config["settings"]["learning_rate"] == 1e-3
    assert read.config["settings"]["reward_funcs"] == ["len"]  # no memory address
    assert read.config["data"] == "stories" and read.config["seed"] == 3
    assert read.config["started"].endswith("+00:00")
    assert read.config["versions"]["python"].count(".") == 2
    assert read.model_path == tmp_path / "run" / "model"
    assert read.config == run.config


def test_a_status_set_in_one_process_is_seen_by_another(tmp_path):
    writer, reader = new(tmp_path / "a"), Run.load(tmp_path / "a")
    writer.log(1, loss=2.0)
    assert reader.series("loss") == ([1], [2.0])
    writer.log(2, loss=1.0)
    writer.finish("stopped", final_loss=1.0, bad=math.nan)
    assert reader.series("loss") == ([1, 2], [2.0, 1.0])
    assert reader.status == "stopped" and reader.summary == {"final_loss": 1.0, "bad": None}
    writer.finish(accuracy_ceiling=0.8)
    assert reader.status == "finished" and set(reader.summary) == {
        "final_loss",
        "bad",
        "accuracy_ceiling",
    }


def test_metrics_keep_their_gaps_and_their_steps(tmp_path):
    run = new(tmp_path / "a")
    run.log(0, loss=1.5, kl=float("nan"))
    run.log(10, loss=1.0, kl=float("inf"))
    run.log(10, **{"eval_loss": 1.1, "gold/mood": None})
    assert run.metric_names == ["loss", "kl", "eval_loss", "gold/mood"]
    assert run.series("loss") == ([0, 10], [1.5, 1.0])
    assert run.series("eval_loss") == ([10], [1.1])
    assert all(math.isnan(v) for v in run.series("kl")[1])
    first = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"step": 0, "loss": 1.5, "kl": None}
    with pytest.raises(ValueError, match="no metric 'los' in run a; it has: loss, kl"):
        run.series("los")
    with pytest.raises(ValueError, match="'note' must be a number, not str 'hello'"):
        run.log(11, note="hello")


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path):
    run = new(tmp_path / "a")
    run.log(1, loss=2.0)
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')  # killed while writing
    assert Run.load(tmp_path / "a").series("loss") == ([1], [2.0])
    run.log(2, loss=1.0)  # the next line does not grow onto the torn one
    assert run.series("loss") == ([1, 2], [2.0, 1.0])
    path.write_bytes(b"x" * 10_000)  # longer than one block, and nothing but torn
    run.log(3, loss=0.5)
    assert run.series("loss") == ([3], [0.5])


def test_damage_in_the_middle_is_not_hidden(tmp_path):
    run = new(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        _ = run.metrics


def test_samples_and_ledger_come_back(tmp_path):
    run = new(tmp_path / "a")
    assert run.samples == [] and len(run.ledger) == 0 and run.metrics == []
    run.sample(5, [{"prompt": "a\nfox", "reward": float("nan")}, {"prompt": "été 🦊"}])
    run.sample(6, [])
    assert run.samples == [
        {"step": 5, "prompt": "a\nfox", "reward": None},
        {"step": 5, "prompt": "été 🦊"},
    ]
    costs = Ledger()
    costs.add(stage="ppo", phase="rollout", quantity="seconds", value=1.5, source="measured")
    run.save_ledger(costs)
    assert Run.load(tmp_path / "a").ledger == costs
    run.ledger.add(stage="ppo", quantity="tokens", value=1, source="measured")
    assert run.ledger == costs  # a reader cannot change what was measured


def test_numbers_of_numpy_and_torch_are_written_as_numbers(tmp_path):
    import numpy

    run = new(tmp_path / "a", settings={"betas": numpy.array([0.9, 0.99])})
    run.log(1, loss=numpy.float32(0.5))
    run.sample(1, [{"tokens": numpy.arange(3)}])
    assert run.series("loss") == ([1], [0.5]) and run.samples[0]["tokens"] == [0, 1, 2]
    assert run.config["settings"] == {"betas": [0.9, 0.99]}


def test_no_run_is_written_over_by_accident(tmp_path):
    old = new(tmp_path / "a", seed=1)
    old.log(1, loss=2.0)
    (tmp_path / "a" / "model").mkdir()
    (tmp_path / "a" / "checkpoint-5").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    old.finish()
    with pytest.raises(FileExistsError, match="already holds a run.*overwrite=True"):
        new(tmp_path / "a")
    fresh = new(tmp_path / "a", seed=2, overwrite=True)
    assert fresh.metrics == [] and fresh.config["seed"] == 2
    fresh.finish()
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["notes.txt", "run.json"]  # what is not the run's stays


def test_a_folder_of_something_else_is_never_deleted(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="is not empty"):
        new(tmp_path)
    with pytest.raises(FileExistsError, match="holds model but no run.json"):
        new(tmp_path, overwrite=True)
    assert (tmp_path / "model").is_dir()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        new(file)


def test_errors_say_what_was_looked_for_and_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: .*nowhere"):
        Run.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"no run in {tmp_path}: looked for run.json"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text('{"stage": "ppo"}')
    with pytest.raises(ValueError, match="lacks model, seed, status"):
        Run.load(tmp_path)
    with pytest.raises(ValueError, match="stage='pppo': did you mean 'ppo'. choose from sft"):
        new(tmp_path / "a", stage="pppo")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="status='done': choose from finished"):
        new(tmp_path / "b").finish("done")


def test_a_run_looks_the_same_wherever_and_whenever_it_is(tmp_path):
    shown = []
    for place in ("one", "two"):
        run = new(tmp_path / place / "ppo-tiny")
        run.log(1, reward=-1.0)
        run.log(120, reward=2.5)
        run.finish(note="<b>bold</b>")
        shown.append((repr(run), repr(run.show()), run._repr_html_()))
    assert shown[0] == shown[1]
    assert shown[0][0] == "Run('ppo-tiny', stage='ppo', model='tiny', status='finished', steps=120)"
    assert "reward" in shown[0][1] and "2.5" in shown[0][1]
    assert "<b>" not in shown[0][2] and "&lt;b&gt;" in shown[0][2]


def test_a_run_shows_what_it_changed_what_it_cost_and_folds_the_rest_away(tmp_path):
    run = new(tmp_path / "run")
    run.log(1, kl=0.5)
    run.finish(
        **{"gold": 9.0, "before/gold": 8.0, "seconds": 90.0, "tensor_peak_bytes": 2**30, "kl": 1.5},
        dropped={"too long": 3},
    )
    text, page = repr(run.show()), run._repr_html_()
    words = [line.split() for line in text.splitlines()]
    assert ["held-out", "before", "after"] in words and ["gold", "8", "9"] in words
    assert ["seconds", "1", "min", "30", "s"] in words and [
        "tensor_peak_bytes",
        "1",
        "GiB",
    ] in words
    assert "before/gold" not in text and "too long: 3" in text
    shown, folded = page.split("<details>")
    assert "<td" in shown and "lowest" not in shown and "lowest" in folded


def test_every_metric_and_figure_of_a_run_says_what_it_means(tmp_path):
    """All that the lab's stages log, as `benchmarks/same_numbers.py` has recorded it."""
    recorded = Path(__file__).parents[2] / "benchmarks/results/same_numbers.json"
    runs = json.loads(recorded.read_text())["runs"].values()
    names = {n for run in runs for row in (*run["metrics"], run["summary"]) for n in row}
    silent = sorted(n for n in map(name_today, names - {"step"}) if not gloss(n))
    assert not silent
    run = new(tmp_path / "run")
    run.log(1, kl_k3=0.5)
    run.finish(win_rate=0.7, **{"before/reward": 1.0, "reward": 2.0})
    page = run._repr_html_()
    assert page.count("what it means") == 3 and "what it means" in repr(run.show())
    for name in ("kl_k3", "win_rate", "reward"):
        assert GLOSSES[name] in page
    assert gloss("eval_accuracy").startswith("on held-out data: share of pairs")
    assert gloss("mine") == ""


def test_where_no_pair_is_ranked_accuracy_is_not_known(tmp_path):
    """DPO's first step: policy and reference are one model, every margin is 0."""
    run = new(tmp_path / "run")
    run.log(1, accuracy=0.0, margin=0.0)
    run.log(2, accuracy=0.0, margin=-0.5)
    run.log(3, accuracy=0.75, margin=0.4)
    assert math.isnan(run.series("accuracy")[1][0]) and run.series("accuracy")[1][1:] == [0, 0.75]
    assert run.metrics[0]["accuracy"] == 0.0  # what was logged stays


def test_a_run_of_an_earlier_version_has_todays_names(tmp_path, monkeypatch):
    """As it was written then, read under the names of `renamed.json`."""
    old = {"stage": "ppo", "model": "tiny", "seed": 0, "status": "finished", "settings": {}}
    old["summary"] = {"raw": 1.0, "before/raw": 0.5, "seconds": 2.0}
    (tmp_path / "run.json").write_text(json.dumps(old))
    lines = [{"step": 1, "raw": 0.5, "loss": 2.0}, {"step": 2, "raw": None, "held/raw": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {"raw": "score", "held/raw": "held/score", "absent": "x"}
    monkeypatch.setattr(run_module, "RENAMED", names)
    run = Run.load(tmp_path)
    assert run.metric_names == ["score", "loss", "held/score"]
    assert run.series("held/score") == ([2], [1.5]) and math.isnan(run.series("score")[1][1])
    summary = {"score": 1.0, "before/score": 0.5, "seconds": 2.0}
    assert run.summary == summary and "held-out" in repr(run.show())
    run.finish(kl=0.1)  # added in today's names, the old ones stay as they are
    assert run.summary == {**summary, "kl": 0.1}
    assert json.loads((tmp_path / "run.json").read_text())["summary"]["raw"] == 1.0


def test_finish_leaves_no_draft(tmp_path):
    new(tmp_path / "a").finish()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.json"]


def test_a_stored_run_opens_by_its_name():
    assert Run.stored("ppo").stage == "ppo"
    with pytest.raises(ValueError, match="name='pppo': did you mean 'ppo.*choose from dpo"):
        Run.stored("pppo")


def test_a_stopped_run_says_why_it_has_no_held_out_figure(tmp_path):
    run = Run.create(tmp_path / "run", stage="ppo", model="tiny", settings={}, data="d", seed=0)
    run.finish("stopped", seconds=3.0)
    assert run.summary == {"seconds": 3.0} and run.summary.get("gold_reward") is None
    with pytest.raises(KeyError, match="no gold_reward of a run that is stopped.*to its end"):
        run.summary["gold_reward"]
