"""Best-of-n against enumeration, fits against known constants, ensembles by hand.

pytest tests/test_overoptimisation.py
"""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

import rlhf_lab as lab
from rlhf_lab.overoptimisation import (
    Curve,
    Fit,
    OverOptimisation,
    band,
    ensemble,
    fit_form,
)
from rlhf_lab.ppo.losses import kl_bound
from rlhf_lab.trainers.best_of_n import expected_best

OTHER = {"PPO": "best of n", "best of n": "PPO"}


def curve(method, kl, gold, *, name="a", seed=0, proxy=None, start=(0.0, 0.0)):
    at = list(range(1, len(kl) + 1))
    proxy = list(at) if proxy is None else proxy
    return Curve(name, method, seed, 0.7, start, 1.0, at, list(kl), proxy, list(gold))


# ------------------------------------------------------------------------------------ best of n


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """Enumerated: of every subset of n samples the gold reward of the one that scores highest."""
    generator = torch.Generator().manual_seed(n)
    scores, gold = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    by_hand = [
        statistics.mean(
            float(gold[p, max(subset, key=lambda i: float(scores[p, i]))])
            for subset in itertools.combinations(range(7), n)
        )
        for p in range(3)
    ]
    assert expected_best(scores, gold, n).tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("n", [2, 3])
def test_kl_of_best_of_n_is_that_of_its_distribution(n):
    """Over many equally likely answers of different scores: the i-th best of m is the best of n
    with probability (i/m)^n − ((i−1)/m)^n; enumerated, its KL is log n − (n−1)/n as m grows."""
    m = 20_000
    i = np.arange(1, m + 1) / m
    p = i**n - (i - 1 / m) ** n
    assert float((p * np.log(p * m)).sum()) == pytest.approx(kl_bound(n), abs=1e-3)


# ------------------------------------------------------------------------------------------ fits


@pytest.mark.parametrize("method", ["best of n", "PPO"])
def test_a_fit_finds_what_a_curve_was_made_with(method):
    d = np.linspace(0.2, 5, 60)
    gain = d * (1.3 - 0.4 * (np.log(d) if method == "PPO" else d))
    fit = fit_form(d**2, gain, method)
    assert fit == pytest.approx((1.3, 0.4, 1.0))
    # The forms are not each other's: another method's constants are others.
    assert fit_form(d**2, gain, OTHER[method])[:2] != pytest.approx((1.3, 0.4), abs=0.2)


def test_r2_is_the_share_of_the_variance_that_the_form_explains():
    rng = np.random.default_rng(0)
    d = np.linspace(0.1, 2, 300)
    gain = 2 * d - d**2 + rng.normal(0, 0.1, 300)
    assert fit_form(d**2, gain, "best of n").r2 == pytest.approx(1 - 0.1**2 / gain.var(), abs=0.01)
    # A point that has not moved says nothing of a form that is 0 there.
    kl, more = np.append(d**2, 0.0), np.append(gain, 5.0)
    assert fit_form(kl, more, "PPO") == fit_form(d**2, gain, "PPO")


def test_the_band_is_students_over_the_seeds_fits():
    d = np.linspace(0.1, 2, 20)
    alphas = (1.0, 1.2, 1.7)
    curves = [curve("best of n", d**2, d * (a - 0.5 * d), seed=i) for i, a in enumerate(alphas)]
    found = band(curves)
    assert found.mean == pytest.approx(found.d * (1.3 - 0.5 * found.d))
    # t of 2 degrees of freedom at 97.5 % is 4.303 (any table of it).
    half = 4.303 * statistics.stdev(alphas) / math.sqrt(3)
    assert found.half == pytest.approx(found.d * half, rel=1e-6)
    assert np.isnan(band(curves[:1]).half).all()
    assert band([curve("PPO", [0.0] * 9, [8.0] * 9)]) is None  # nothing has moved


# ----------------------------------------------------------------------------------- peak and fall


def test_ppo_turns_where_its_mean_over_five_iterations_does():
    gold = [8.0, 8.0, 8.5, 9.0, 9.0, 9.0, 9.0, 9.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    c = curve("PPO", range(13), gold, start=(1.0, 8.0))
    # Iterations 4 to 8: mean KL 5, proxy 6; the last five: gold 8, proxy 11.
    assert c.turn == pytest.approx((1.0, 5.0, 1.0, 5.0)) and c.overoptimised
    assert not curve("PPO", range(13), gold, start=(1.0, 8.8)).overoptimised  # rises by .2
    assert not curve("PPO", range(13), sorted(gold), start=(1.0, 8.0)).overoptimised  # never falls
    falling = [-p for p in c.proxy]
    assert not curve("PPO", range(13), gold, proxy=falling, start=(0.0, 8.0)).overoptimised
    assert not curve("PPO", range(0, 130, 10), gold, start=(1.0, 8.0)).overoptimised  # 50 nats


# ----------------------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def stories():
    return lab.load_data("stories")


@pytest.fixture(scope="module")
def found(stories, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "found.json"
    own = lab.load("mini").paths["reward"]
    proxies = {"as it is": ["mini", own], "the worst of two": ("worst", "mini", "tiny")}
    how = {"data": stories, "prompts": 3, "samples": 4, "response_length": 24, "iterations": 5}
    how |= {"per_device_train_batch_size": 4, "quiet": True}
    return lab.overoptimise(proxies, "mini", out=out, **how), proxies, how, out


def test_best_of_n_of_a_study_is_that_of_its_own_table(found, stories):
    """`lab.best_of_n` draws and scores the same answers on its own way."""
    best = found[0].curves[0]
    table = lab.best_of_n("mini", stories, n=(1, 2, 4), prompts=3, response_length=24, quiet=True)
    assert best.at == [1, 2, 4] and best.kl == [kl_bound(n) for n in (1, 2, 4)]
    assert best.gold == pytest.approx([p.gold_reward for p in table.points])
    assert best.proxy == pytest.approx([p.reward for p in table.points], rel=1e-5)
    assert best.start == (best.proxy[0], best.gold[0])


def test_a_run_of_ppo_is_a_curve_from_the_sft_model_on(found):
    for name, seeds in (("as it is", 2), ("the worst of two", 1)):
        ppo, *others = found[0].groups(name, method="PPO")[name, "PPO"]
        assert len(others) == seeds - 1 and all(c.gold != ppo.gold for c in others)
        assert ppo.at == [1, 2, 3, 4, 5] and ppo.kl[0] == pytest.approx(0, abs=1e-4)
        assert all(0 <= gold <= 10 for gold in ppo.gold) and len(set(ppo.proxy)) == 5


def test_a_study_goes_on_where_its_file_ends(found, monkeypatch):
    study, proxies, how, out = found
    assert OverOptimisation.load(out) == study
    monkeypatch.setattr("rlhf_lab.overoptimisation.train", None)  # nothing is trained again
    assert lab.overoptimise(proxies, "mini", out=out, **how) == study
    with pytest.raises(ValueError, match="has 'as it is', made otherwise: give another name"):
        lab.overoptimise(proxies, "mini", out=out, kl_coef=0.1, **how)
    others = {"as it is": ["mini", "tiny"]}, {"the worst of two": ("mean", "mini", "tiny")}
    for other, line in zip(
        others, ("'as it is', seed 1", "'the worst of two', seed 0"), strict=True
    ):
        with pytest.raises(ValueError, match=f"{line}, of other reward models"):
            lab.overoptimise(other, "mini", out=out, **how)


def test_table_and_figure_say_what_was_found(found):
    rows, figure = found[0].rows, found[0].figure()
    assert [(r["proxy"], r["by"]) for r in rows[:2]] == [
        ("as it is", "best of n"),
        ("as it is", "PPO"),
    ]
    assert [r["over-optimised"][-4:] for r in rows] == ["of 2", "of 2", "of 1", "of 1"]
    assert "as it is, PPO, seed 0: gold" in figure.words
    assert len(figure.data) >= 12  # gold and proxy of each curve
    assert len(found[0].figure("the worst of two", method="best of n").data) == 2
    assert found[0].groups(method="ppo") == found[0].groups(method="PPO")
    with pytest.raises(ValueError, match="no curve by 'dpo': .*, by best of n or PPO$"):
        found[0].figure(method="dpo")
    with pytest.raises(ValueError, match="no curve of b: there are as it is; the worst"):
        found[0].figure("as it is", "b")


def test_a_figure_draws_the_fit_in_its_band():
    d = np.linspace(0.1, 2, 9)
    curves = [curve("best of n", d**2, d * (a - d), seed=i) for i, a in enumerate((1, 2))]
    area, line, *seeds = OverOptimisation(curves).figure().data
    found = band(curves)
    assert line.y == pytest.approx(found.mean, abs=1e-3) and len(seeds) == 4
    assert area.y == pytest.approx(
        [*(found.mean + found.half), *(found.mean - found.half)[::-1]], abs=1e-3
    )
    assert [t.name for t in (area, line, *seeds) if t.showlegend is not False] == ["a, best of n"]


@pytest.mark.parametrize(
    ("r2", "says"), [(0.95, "0.95 ± 0.00"), (0.5, "0.50 ± 0.00, does not hold")]
)
def test_a_form_that_does_not_hold_is_said_not_to(monkeypatch, r2, says):
    monkeypatch.setattr(Curve, "fit", property(lambda self: Fit(1.0, 0.5, r2)))
    study = OverOptimisation([curve("best of n", [0.0, 1.0], [0.0, 1.0], seed=i) for i in (0, 1)])
    assert study.rows[0]["R²"] == says and study.rows[0]["α"] == "1.00 ± 0.00"


def test_an_ensemble_is_the_mean_or_the_worst_of_its_members(stories):
    """By hand, of two reward models that see the same tokens one by one."""
    tiny, mini = lab.load("tiny"), lab.load("mini")
    folders = [tiny.paths["reward"], mini.paths["reward"]]
    prompts = [row["prompt"] for row in stories.prompts.test[:3]]
    ids = [tiny.tokenizer(text)["input_ids"] for text in ("A fox.", "The end.", "He ran home.")]
    by_hand = []
    for model in (tiny.reward, mini.reward):
        for prompt, answer in zip(prompts, ids, strict=True):
            sequence = torch.tensor([tiny.tokenizer(prompt)["input_ids"] + answer])
            with torch.no_grad():
                logit = model(input_ids=sequence).logits
            by_hand.append(float(logit) + model.config.score_offset)
    first, second = by_hand[:3], by_hand[3:]
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert ensemble(folders, tiny)(prompts, ids) == pytest.approx(means, rel=1e-5)
    worst = list(map(min, first, second))
    assert ensemble(folders, tiny, worst=True)(prompts, ids) == pytest.approx(worst, rel=1e-5)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"proxies": {}}, "no proxies: give reward models by name"),
        ({"proxies": {"a": ()}}, "a has no reward model"),
        ({"proxies": {"a": []}}, "a has no reward model"),
        ({"proxies": {"a": [("worst",)]}}, "a has no reward model"),
        ({"samples": 1}, "samples must be at least 2, not 1"),
        ({"prompts": -1}, "prompts must be at least 1, not -1"),
        ({"iterations": 3}, r"iterations must be 0 \(best of n alone\) or at least 5, not 3"),
        ({"iterations": -1}, "iterations must be 0 .* not -1"),
        ({"proxies": {"a": ("best", "mini", "tiny")}}, r"\('mean', a, b, …\) or \('worst'"),
        ({"proxies": {"a": lab.load("mini").paths["sft"]}}, "sft is no reward model: give one"),
        ({"max_steps": 9}, "max_steps: seeds are places in a list, max_steps is iterations="),
        ({"bet": 0.1}, "bet"),
    ],
)
def test_what_is_no_study_is_refused_before_data_is_loaded(monkeypatch, given, line):
    monkeypatch.setattr("rlhf_lab.overoptimisation.load_data", None)
    with pytest.raises(ValueError, match=line):
        lab.overoptimise(**{"proxies": {"a": "mini"}, "policy": "mini"} | given)


def test_what_has_no_truth_is_refused(tmp_path):
    rows = [{"prompt": "a", "chosen": f"b {i}", "rejected": "c"} for i in range(12)]
    with pytest.raises(ValueError, match="has no gold reward, so nothing tells when it falls"):
        lab.overoptimise({"a": "mini"}, "mini", data=lab.load_data(rows))
    (other := tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json was not written by OverOptimisation.save"):
        OverOptimisation.load(other)
    with pytest.raises(ValueError, match="no such file: .*none.json"):
        OverOptimisation.load(tmp_path / "none.json")
