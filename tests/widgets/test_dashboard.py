"""The dashboard reads a run and a ledger; these tests write both by hand and read what it drew."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from rlhf_lab.charts.memory import role_memory_chart
from rlhf_lab.charts.views import known_series, time_stacks
from rlhf_lab.runs.ledger import Ledger
from rlhf_lab.runs.run import Run
from rlhf_lab.widgets.dashboard import Dashboard, Replay, cost_line

MIB = 2**20
HOSTILE = "<script>alert(1)</script>\"'"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ledger(*sources: str) -> Ledger:
    """Two phases; the policy has 3 MiB in each, the reference 1 and 2."""
    costs = Ledger()
    for i, source in enumerate(sources):
        for phase, size in (("rollout", 1), ("backward", 2)):
            for role, amount in (("policy", 3), ("reference", size)):
                costs.add(
                    stage="ppo",
                    role=role,
                    phase=phase,
                    component="parameters",
                    quantity="bytes",
                    value=(amount + i) * MIB,
                    source=source,
                )
            costs.add(
                stage="ppo",
                role="policy",
                phase=phase,
                quantity="seconds",
                value=10.0 * size,
                source=source,
            )
    if "measured" in sources:
        costs.add(
            stage="ppo", phase="evaluation", quantity="seconds", value=99.0, source="measured"
        )
    return costs


@pytest.fixture
def run(tmp_path):
    run = Run.create(
        tmp_path / "run",
        stage="ppo",
        model=HOSTILE,
        settings={"kl_target": 2.5},
        data="stories",
        seed=0,
    )
    for step in range(1, 11):
        run.log(
            step,
            reward=step / 10,
            gold_reward=8 + step / 10,
            kl=0.2 * step,
            kl_k3=0.1 * step,
            kl_coef=0.15,
        )
    return run


def words(svg: str) -> str:
    return " ".join(t for t in ET.fromstring(svg).itertext())


def test_it_draws_what_the_run_logged_and_says_the_last_values(run):
    view = Dashboard("ppo", "tiny", limit=64 * MIB)
    assert "no data yet" in view.charts["proxy reward"].picture.words
    view.open(run, lambda: ledger("predicted", "measured"))
    assert "reward: last 1" in view.charts["proxy reward"].picture.words
    kl = view.charts["KL to the reference"].picture.words
    assert "kl: last 2" in kl and "target KL: 2.5" in kl  # the setting is drawn beside it
    # P 3+1 and 3+2, M 4+2 and 4+3 MiB; the plan's peak is 5.
    assert "planned peak: 5" in view.memory.picture.words
    assert "rollout M: 6" in view.memory.picture.words
    assert "measured: 30 s" in view.time.picture.words  # evaluation is no training


def test_the_prediction_grows_with_what_is_done():
    text = time_stacks(ledger("predicted"), share=0.5).words
    assert "predicted: 15 s" in text  # half of 10 + 20


def test_a_limit_far_above_is_words_not_a_line():
    near = role_memory_chart(ledger("measured"), limit=8 * MIB).words
    far = role_memory_chart(ledger("measured"), limit=500 * MIB).words
    assert "this machine's memory: 8" in near
    assert "machine's memory" not in far and "1.0%" in far


def test_it_is_redrawn_as_often_as_the_time_allows(run):
    clock, drawn = Clock(), []
    view = Dashboard("ppo", "tiny", clock=clock)
    view.open(run, lambda: drawn.append(1) or Ledger())
    bar = view.follow(1000)
    before = len(drawn)
    for _ in range(1000):  # ten seconds of steps
        clock.now += 0.01
        bar.update(1, "reward 1")
    assert 45 <= len(drawn) - before <= 50  # five a second
    assert "1000/1000" in view.headline and "reward 1" in view.headline


def test_what_it_counts_it_says_with_an_eta(run):
    clock = Clock()
    view = Dashboard("ppo", "tiny", clock=clock)
    view.open(run)
    view.follow(40)
    clock.now = 10.0
    view.update(10)
    assert "10/40" in view.headline and "ETA 0:30" in view.headline
    view.say("evaluating")
    assert "evaluating" in view.status.value


def test_the_button_requests_a_stop_once_for_each_click(run):
    requests = []
    view = Dashboard("ppo", "tiny", stop=lambda: requests.append(1))
    assert view.button.kernel == ""  # a kernel that listens is not interrupted
    view.button.clicks = 1
    assert requests == [1]
    view.close()
    assert view.button.off


def test_the_end_is_one_picture_of_all_that_is_not_folded(run):
    view = Dashboard("ppo", HOSTILE)
    view.open(run, lambda: ledger("measured"))
    view.follow(10)
    view.end()
    still = view.still()
    ET.fromstring(still)  # well-formed, hostile name and all
    assert "<script" not in still and HOSTILE in words(still).replace("\n", " ")
    for title in ("proxy reward", "gold reward", "KL to the reference", "memory by role"):
        assert title in words(still)
    assert "entropy" not in words(still)


def test_hostile_text_is_escaped_in_the_status(run):
    view = Dashboard("ppo", HOSTILE)
    view.say(HOSTILE)
    assert "<script" not in view.status.value and "&lt;script" in view.status.value


def test_outside_a_notebook_it_reads_as_a_table(run):
    view = Dashboard("ppo", "tiny")
    view.open(run, lambda: ledger("predicted", "measured"))
    text = repr(view)
    assert "reward" in text and "0.1" in text and "measured: 7 MiB, 30 s" in text
    assert repr(Dashboard("sft", "tiny")).count("nothing logged yet") == 1


def test_a_replay_shows_a_run_up_to_a_step(run):
    replay = Replay(run)
    assert "reward: last 1" in replay.charts["proxy reward"].picture.words
    replay.slider.value = 4
    assert "reward: last 0.4" in replay.charts["proxy reward"].picture.words
    replay.slider.value = 0
    assert "no data yet" in replay.charts["proxy reward"].picture.words
    run.log(11, reward=5.0)
    replay.again.click()
    assert replay.slider.value == 11
    assert "reward: last 5" in replay.charts["proxy reward"].picture.words


def test_a_replay_says_how_healthy_the_run_was_up_to_the_step(tmp_path):
    sick = Run.create(tmp_path / "sick", stage="ppo", model="tiny", settings={})
    for step in range(1, 6):
        sick.log(step, kl_per_token=0.01 if step < 4 else -0.5)
    replay = Replay(sick)
    assert "kl_negative!" in replay.health.value
    replay.slider.value = 3
    assert "kl_negative" not in replay.health.value and "checks passed" in replay.health.value
    empty = Run.create(tmp_path / "empty", stage="ppo", model="tiny", settings={})
    assert Replay(empty).health.value == ""


def test_a_replay_of_a_run_that_logged_nothing(tmp_path):
    empty = Run.create(tmp_path / "empty", stage="sft", model="tiny", settings={}, data="x", seed=0)
    assert "nothing logged yet" in repr(Replay(empty))


def test_series_end_at_the_step(run):
    assert known_series(run, ["reward", "nothing"], 3) == {"reward": ([1, 2, 3], [0.1, 0.2, 0.3])}


def test_costs_in_a_line():
    assert cost_line(Ledger()) == ""
    assert cost_line(ledger("predicted")) == "predicted: 5 MiB, 30 s"


def test_a_finished_run_has_no_panel_without_data(run):
    view = Dashboard("ppo", "tiny")
    view.open(run)
    assert (
        "critic" not in words(view.still()) and "no data yet" in view.still().words
    )  # it may come
    view.end()
    still = view.still()
    assert "proxy reward" in words(still)
    assert "no data yet" not in still.words and "time by phase" not in words(still)
    assert view.charts["entropy"].layout.display == "none" == view._more.layout.display
    run.finish()
    replay = Replay(run)
    assert "no data yet" not in replay.still().words
    replay.slider.value = 0  # a panel that has data later stays
    assert replay.charts["proxy reward"].layout.display != "none"


def test_the_end_says_where_the_run_is(run):
    view = Dashboard("ppo", "tiny")
    view.open(run)
    run.finish()
    view.end()
    assert f"finished, in {run.folder}" in view.headline


def test_a_metric_says_what_it_means_on_hover(run):
    view = Dashboard("ppo", "tiny")
    view.open(run)
    picture = view.charts["KL to the reference"].picture
    assert "<title>kl_k3: another estimate of it" in picture and "kl_k3: another" in picture.live


def test_own_pairs_show_what_the_held_out_ones_say(tmp_path):
    mine = Run.create(tmp_path / "mine", stage="reward", model="tiny", settings={})
    mine.log(1, accuracy=1.0, loss=0.1)
    mine.finish(accuracy=0.625, held_out_pairs=1024)
    words_of = Replay(mine).charts["accuracy"].picture.words
    assert "held-out pairs, after training: 0.625" in words_of
