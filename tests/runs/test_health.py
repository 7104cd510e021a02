"""Checks of a run's health: figures by hand, limits with an origin, sick and healthy runs apart.

pytest tests/runs/test_health.py
"""

import math

import pytest

import rlhf_lab as lab
from rlhf_lab.exercises.specimens import SPECIMENS
from rlhf_lab.runs import health as h
from rlhf_lab.runs.run import Run

HEALTHY = {
    "first_ratio_error": 1e-6,
    "objective_error": 1e-8,
    "ratio": 1.0,
    "kl": 1.0,
    "kl_k3": 1.0,
    "kl_per_token": 0.02,
    "kl_coef": 0.15,
    "clipfrac": 0.01,
    "vf_clipfrac": 0.15,
    "approxkl": 0.001,
    "entropy": 0.4,
    "sampled_entropy": 0.4 * 47.0,
    "response_length": 47.0,
    "stopped": 0.98,
    "reward_gold_corr": 0.8,
    "reward_length_corr": -0.05,
    "grad_norm": 0.15,
}


def lines_of(**sick):
    """Twelve logged steps: the reward rises, the gold reward with it, and the critic learns;
    `sick`: f(step)."""
    return [
        {
            **HEALTHY,
            "step": step,
            "explained_variance": 0.1 - 1 / step,
            "vf_loss": 0.2 + 0.1 / step,
            "reward": 0.1 * step,
            "gold_reward": 8 + 0.05 * step,
            **{name: value(step) for name, value in sick.items()},
        }
        for step in range(1, 13)
    ]


def failed(lines):
    return {f.check.name for f in h.examine(lines)}


def test_figures_by_hand():
    values = [4.0, 1.0, 2.0, 6.0, 3.0, 5.0, 8.0, 8.0]
    assert h.recent(values) == 8.0 and h.change(values) == 4.0
    assert h.growth(values) == pytest.approx(math.log(2)) and math.isnan(h.growth([0.0, 1.0]))
    # Pairs in order less pairs out of order: 4 precedes 1, 2, 3 and 6 precedes 3, 5; 8 ties with 8.
    assert h.trend(values) == pytest.approx((27 - 5 - 5) / 28)
    assert h.trend([float(x) for x in range(1000)]) == 1.0
    assert h.repeated_ngrams(["a b c a b c", "a b c"]) == pytest.approx(1 / 5)
    assert math.isnan(h.repeated_ngrams(["a b"]))
    ratio = h.Check(name="", metric="a / b / c", figure="average", side="low", sees="", tries="")
    lines = [{"a": 6.0, "b": 1.0, "c": 3.0}, {"a": 12.0, "b": 2.0, "c": 1.0}] * 3
    assert ratio.value(lines) == 9 / 1.5 / 2 and math.isnan(ratio.value(lines[:5]))
    assert math.isnan(ratio.value([{"a": 1.0, "b": 0.0, "c": 1.0}] * 6))


def test_every_limit_has_its_origin_and_can_be_passed_and_failed():
    limits = h.limits()["limits"]
    assert len(limits) >= 15 and limits.keys() <= h.CHECKS.keys()
    for name, limit in limits.items():
        assert "healthy PPO runs" in limit["origin"] or "stored runs" in limit["origin"], name
        low, high = map(float, limit["origin"].rsplit(": ", 1)[1].split(" to "))
        sign = 1 if h.CHECKS[name].side == "high" else -1
        worst = high if sign == 1 else low
        worst -= sign * 0.005 * abs(worst)  # of which three digits are told
        assert sign * worst <= sign * limit["warn"] < sign * limit["critical"], name
    assert h.limits()["specimens"].keys() <= SPECIMENS.keys()
    assert not failed(lines_of())


@pytest.mark.parametrize(
    ("check", "metric", "sick"),
    [
        ("ratio_at_step_0", "first_ratio_error", lambda step: 0.2),
        ("reward_not_paid", "objective_error", lambda step: 0.3),
        ("ratio_low", "ratio", lambda step: 0.9),
        ("ratio_high", "ratio", lambda step: 1.3),
        ("samples_too_likely", "sampled_entropy", lambda step: 0.2 * 47),
        ("samples_too_unlikely", "sampled_entropy", lambda step: 1.2 * 47),
        ("kl_high", "kl_per_token", lambda step: 0.5 * step),
        ("kl_negative", "kl_per_token", lambda step: -0.1),
        ("kl_estimates_differ", "kl", lambda step: -1.0),
        ("no_kl_penalty", "kl_coef", lambda step: 0.0),
        ("kl_missing", "kl_k3", lambda step: 0.0),
        ("explained_variance", "explained_variance", lambda step: -3.0),
        ("critic_far_off", "explained_variance", lambda step: -10.0 / step),
        ("critic_learns_nothing", "explained_variance", lambda step: -0.1 * step),
        ("policy_loss_high", "pg_loss", lambda step: 0.3),
        ("policy_loss_low", "pg_loss", lambda step: -0.3),
        ("value_loss", "vf_loss", lambda step: 0.3 * 2**step),
        ("value_loss_rises", "vf_loss", lambda step: 0.3 + 0.001 * step),
        ("clip_share", "clipfrac", lambda step: 0.3),
        ("approximate_kl", "approxkl", lambda step: 5.0),
        ("entropy_collapse", "entropy", lambda step: 0.4 * 0.7**step),
        ("entropy_rise", "entropy", lambda step: 0.4 * 1.3**step),
        ("length_up", "response_length", lambda step: 30.0 + 5 * step),
        ("length_down", "response_length", lambda step: 64.0 - 5 * step),
        ("unstopped", "stopped", lambda step: 1 - step / 12),
        ("reward_falls", "reward", lambda step: -0.1 * step),
        ("gold_falls", "gold_reward", lambda step: 8 - 0.1 * step),
        ("reward_is_not_gold", "reward_gold_corr", lambda step: 0.1),
        ("reward_is_length", "reward_length_corr", lambda step: 0.6),
        ("reward_gold_gap", "gold_reward", lambda step: 8 - 0.1 * step),
        ("repeated_ngrams", "repeated_ngrams", lambda step: 0.7),
        ("gradient_norm", "grad_norm", lambda step: 500.0),
        ("gradient_growth", "grad_norm", lambda step: 0.1 * 10**step),
    ],
)
def test_each_check_sees_its_own_sickness_and_says_so(check, metric, sick):
    verdict = h.Health(lines_of(**{metric: sick}))
    (found,) = [f for f in verdict.findings if f.check.name == check]
    assert not verdict and check in verdict.headline and found.check.tries in str(verdict)
    assert str(found.check.sees) in str(found)


def test_what_was_not_logged_is_not_judged():
    assert "nothing was logged" in h.Health([{"step": 1, "accuracy": 0.5}]).headline
    offline = [{"step": s, "loss": 0.5 * 2**s} for s in range(12)]
    assert failed(offline) == {"loss_rises"}
    online = [{**line, "kl": 1.0} for line in offline]
    assert not failed(online)  # PPO's loss says nothing of that
    broken = lines_of(explained_variance=lambda step: math.nan)
    assert "explained_variance" not in h.Health(broken).known


def test_a_run_that_passes_is_told_how_far_it_was_looked_at():
    short, whole = h.Health(lines_of()[:2]), h.Health(lines_of())
    assert short and "checks passed over 2 logged steps" in short.headline
    # What needs more values than two: figures of six, and the one that asks for four.
    waiting = [n for n in h.limits()["limits"] if h.CHECKS[n].needs > 2 and n in whole.known]
    assert short.early == waiting and f"{len(waiting)} more need further steps" in short.headline
    assert set(short.known) | set(short.early) == set(whole.known) and not whole.early
    shown = {name: one["shown"] for name, one in h.limits()["specimens"].items()}
    assert {n for n, at in shown.items() if at is None or at > 2} <= set(short.hidden)
    assert {n for n, at in shown.items() if at is None} <= set(whole.hidden) < set(short.hidden)
    assert all(name in str(whole) for name in whole.hidden)
    assert "<br>not to be ruled out" in whole._repr_html_()  # as in text, a line of its own
    assert h.Health([{"loss": 1.0}] * 9).hidden == []  # no PPO


def test_what_was_not_logged_is_not_ruled_out():
    few = [{k: line[k] for k in ("kl", "kl_k3", "entropy")} for line in lines_of()]
    whole, part = h.Health(lines_of(), ppo=True), h.Health(few, ppo=True)
    assert "late_score" in set(part.hidden) - set(whole.hidden)
    assert f"{part.blind} look at what was not logged" in part.headline
    assert part.blind == len(h.limits()["limits"]) - len(part.known) > whole.blind
    nothing = h.Health([{"accuracy": 0.5}])
    assert not nothing and "nothing was logged" in nothing.headline


@pytest.mark.parametrize("name", ["kl", "grad_norm"])
def test_a_figure_that_is_no_number_any_more_is_critical(name):
    lines = lines_of()
    lines[3] = {**lines[3], name: math.nan}
    broken = h.Health(lines)
    assert not broken and broken.headline == f"critical: {name}=nan in logged step 4: no number"


def test_a_kl_coefficient_that_falls_to_0_or_is_not_logged_is_seen(tmp_path):
    lines = [{**line, "kl_coef": 0.15 * (i < 1)} for i, line in enumerate(lines_of())]
    assert "no_kl_penalty" in h.Health(lines).headline
    assert "no_kl_penalty" in lab.health(lab.Run.stored("ppo_without_kl")).headline


def test_look_alikes_are_ranked_by_what_both_fail(monkeypatch):
    specimens = {"a": {"x": 1.0, "y": 1.0}, "b": {"x": 1.0}, "c": {"z": 1.0}, "d": {"x": 0.5}}
    made = {name: {"fails": fails} for name, fails in specimens.items()}
    monkeypatch.setattr(h, "limits", lambda: {"limits": {}, "specimens": made})
    assert h.look_alikes(["x"]) == ["b", "a", "d"]
    assert h.look_alikes(["x", "y"]) == ["a", "b", "d"]
    assert h.look_alikes(["w"]) == []


def test_a_run_on_disk_up_to_a_step(tmp_path):
    run = Run.create(tmp_path / "run", stage="ppo", model="tiny", settings={})
    for line in lines_of(first_ratio_error=lambda step: 0.2 * (step > 6)):
        run.log(**{name: x for name, x in line.items()})
        run.sample(line["step"], [{"response": "the end the end the end the end"}])
    assert lab.health(run, 6).known and "ratio_at_step_0" not in lab.health(run, 6).headline
    verdict = lab.health(run)
    assert {"ratio_at_step_0", "repeated_ngrams"} <= {f.check.name for f in verdict.findings}
    assert verdict.findings[0].critical  # first what is worst
    for name in ("ppo", "ppo_adapters", "ppo_lora", "ppo_shared", "grpo", "rloo", "dpo"):
        stored = lab.health(Run.stored(name))
        assert stored and stored.known, name


def test_a_folder_is_a_run_too():
    run = Run.stored("ppo")
    assert repr(lab.health(run.folder)) == repr(lab.health(run))
