"""Ways to a preferred model at equal cost: what is read off their runs, by hand; and small runs.

pytest tests/test_equal_cost.py
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rlhf_lab as lab
from rlhf_lab import equal_cost, equal_cost_runs
from rlhf_lab.equal_cost import EqualBudget, Point, Trace
from rlhf_lab.equal_cost_runs import policy_at
from rlhf_lab.overoptimisation import t_quantile
from rlhf_lab.trainers.evaluate import held_out_prompts, policy_report

# Two-sided 95 % and 99 % of Student's t, from the printed tables.
TABLE = {(1, 0.95): 12.706, (2, 0.95): 4.303, (4, 0.95): 2.776, (30, 0.95): 2.042}
TABLE |= {(4, 0.99): 4.604, (9, 0.99): 3.250}


@pytest.mark.parametrize(("degrees", "share"), TABLE)
def test_quantiles_are_those_of_the_tables(degrees, share):
    assert t_quantile(share, degrees) == pytest.approx(TABLE[degrees, share], abs=6e-4)


def traces(way, ends, labels=0.0, seconds=200.0):
    """Gold reward 4 at 100 s, then straight to an end; ten FLOPs a second."""
    start = Point(100, 1000, 0, 4.0, 0.0, 30.0)
    return [
        Trace(way, seed, [start, Point(seconds, 10 * seconds, labels, end, 2.0, 40.0)])
        for seed, end in enumerate(ends)
    ]


@pytest.fixture
def found():
    """An hour at 36 USD: a cent a second. PPO learns from 10 labels, DPO from 20."""
    ppo, dpo = "SFT+RM+PPO", "SFT+DPO"
    all_of = traces(ppo, [5.0, 6.0, 7.0], 10) + traces(dpo, [7.0, 9.0, 11.0], 20, 300.0)
    return EqualBudget(all_of, label_price=2.0, hour_price=36.0, how={"model": "mini"})


def test_budgets_are_shares_of_what_every_way_has_spent(found):
    assert found.budgets("seconds") == [100, 150, 200]
    assert found.budgets("flops") == [1000, 1500, 2000]
    assert found.budgets("dollars") == pytest.approx([11, 16.5, 22])  # 10 labels at 2, 200 s at .01


def test_quality_is_read_off_at_what_had_been_spent(found):
    dpo = found.traces[3]
    half = found.at(dpo, "seconds", 200)  # half of the way from 100 to 300 s
    assert half == Point(200, 2000, 10, 5.5, 1.0, 35.0)
    # From 1 USD to 43: at 22 half of it too.
    assert found.at(dpo, "dollars", 22) == pytest.approx(half)
    assert found.at(dpo, "seconds", 99) is None and found.at(dpo, "seconds", 301) is None


def test_what_costs_nothing_more_is_had_with_it(found):
    """Without a price of time all of PPO comes with the labels of its reward model."""
    start, end = found.traces[0].points
    ppo = replace(found.traces[0], points=[start, start._replace(labels=10), end])
    free = replace(found, traces=[ppo], hour_price=0.0)
    assert free.budgets("dollars") == [10, 15, 20] and free.at(ppo, "dollars", 20) == end
    assert free.at(ppo, "dollars", 15) == start._replace(labels=7.5)


def test_differences_are_paired_by_seed(found):
    # DPO at 200 s: 5.5, 6.5, 7.5, of PPO 5, 6, 7: .5 for each seed.
    assert found.difference("SFT+DPO", "seconds", 200) == pytest.approx((0.5, 0))
    # Each 1 more than the last: mean 0, deviation 1, over three seeds.
    other = replace(found.traces[4], points=[found.traces[4].points[0], found.traces[4].points[1]])
    by_hand = [5.0, 8.0, 11.0]  # halves: 4.5, 6, 7.5; less 5, 6, 7: -.5, 0, .5
    mixed = [*found.traces[:3], *traces("SFT+DPO", by_hand, 20, 300.0)]
    mean, half_width = replace(found, traces=mixed).difference("SFT+DPO", "seconds", 200)
    assert mean == pytest.approx(0) and half_width == pytest.approx(4.303 * 0.5 / 3**0.5, abs=1e-3)
    assert replace(found, traces=[found.traces[0], other]).difference("SFT+DPO", "flops", 9) is None


def test_more_ways_make_each_interval_wider(found):
    spread = traces("SFT+KTO", [5.0, 7.0, 9.0])  # less PPO's: 0, 1, 2
    more = replace(found, traces=[*found.traces, *spread])
    mean, half_width = more.difference("SFT+KTO", "seconds", 200)
    # Two comparisons: 97.5 % each; t of two degrees of freedom is then 6.205.
    assert mean == pytest.approx(1) and half_width == pytest.approx(6.205 / 3**0.5, abs=1e-3)


def test_the_answer_is_plain(found):
    spread = traces("SFT+KTO", [5.0, 7.0, 9.0]) + traces("SFT+RM+GRPO", [4.0, 5.0, 6.1])
    more = replace(found, traces=[*found.traces, *spread])
    first = more.answer.split(". ")[0]
    assert first == (
        "Against SFT+RM+PPO at 3 min 20 s: less gold reward: SFT+RM+GRPO; more gold reward: "
        "SFT+DPO; no difference that so many seeds can show: SFT+KTO"
    )
    text = repr(more)
    assert first in text and "3 seeds of each way" in text and "a label 2 USD" in text
    row = next(r for r in more.rows if r["way"] == "SFT+DPO" and r["budget"] == "3 min 20 s")
    assert row["gold reward"] == "6.50 ± 1.00" and row["− SFT+RM+PPO"] == "+0.50 ± 0.00"
    assert "<table" in more._repr_html_()


def test_it_is_kept_as_json_and_drawn(found, tmp_path):
    found.save(tmp_path / "it.json")
    again = EqualBudget.load(tmp_path / "it.json")
    assert again == found and again.rows == found.rows
    figure = again.figure()
    assert [t.name for t in figure.data] == ["SFT+RM+PPO", "SFT+DPO"] * 3
    assert list(figure.data[0].x) == [100, 200] and list(figure.data[0].y) == [4, 6]
    assert list(figure.data[1].error_y.array) == [0, 2]
    assert found.answer in figure.layout.meta


SETTINGS = {
    **{name: {"max_steps": 2, "per_device_train_batch_size": 8} for name in ("sft", "reward")},
    "ppo": {"max_steps": 2, "per_device_train_batch_size": 8, "response_length": 8},
    "kto": {"max_steps": 2, "per_device_train_batch_size": 8},
    "rejection": {"max_steps": 2, "prompts": 4, "num_generations": 2},
}
WAYS = ["SFT+RM+PPO", "SFT+KTO", "SFT+RM, best of n", "SFT+RM, rejection sampling"]
SMALL = {"each": SETTINGS, "points": 2, "prompts": 4, "answers": 10, "seeds": [3], "quiet": True}


@pytest.fixture(scope="module")
def trained(few_stories, tmp_path_factory):
    file = tmp_path_factory.mktemp("it") / "it.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal_cost, "LENGTH", 8)
        patch.setattr(equal_cost_runs, "LENGTH", 8)
        patch.setattr(equal_cost_runs, "BEST_OF", (2, 4))
        yield lab.equal_budget(WAYS, 5, data=few_stories, file=file, **SMALL), file


def test_each_point_is_what_a_training_alone_gives(trained, few_stories, tmp_path):
    result, _ = trained
    ppo, kto, best, sampled = (result.ways[way][3].points for way in WAYS)
    assert ppo[0] == kto[0] == best[0] == sampled[0]  # the same SFT model
    mini, data = lab.load("mini"), few_stories.with_held_out(1)

    def run(stage, model, **more):
        plan = lab.plan(stage, model, seed=3, **{**SETTINGS[stage], **more})
        return lab.train(plan, data, out=tmp_path / stage, quiet=True, overwrite=True)

    def flops(run):
        return run.ledger.filter(source="measured").training(quantity="flops").total()

    sft = run("sft", mini)
    mini = mini.with_stage("sft", sft.model_path)
    tuned = run("kto", mini)
    assert kto[-1].flops == flops(sft) + flops(tuned) > kto[1].flops > kto[0].flops == flops(sft)
    assert [p.labels for p in kto] == [0, 4, 8]  # 8 answers a step, two of a pair
    rows = held_out_prompts(mini, few_stories, 4, 8)
    how = {"gold_reward": few_stories.gold_reward, "reference": mini.sft, "max_new_tokens": 8}
    policy = mini.with_stage("sft", tuned.model_path).sft
    figures, _ = policy_report(policy, mini.tokenizer, rows, **how)
    assert kto[-1][3:] == tuple(figures[n] for n in ("gold_reward", "kl", "length"))
    # 16 pairs for the reward model before PPO begins; until there the policy is that of SFT.
    assert [p.labels for p in ppo] == [0, 16, 16, 16] and ppo[1][3:] == ppo[0][3:]
    assert [len(p) for p in (ppo, kto, best, sampled)] == [4, 3, 4, 5]
    # Best of 4 takes twice the samples of best of 2.
    two, four = (p.seconds - best[1].seconds for p in best[2:])
    assert four == pytest.approx(2 * two) and best[2].kl == pytest.approx(0.6931 - 0.5, abs=1e-4)
    assert sampled[2][3:] == sampled[0][3:] and sampled[2].flops > sampled[1].flops


def test_a_way_has_as_many_steps_whatever_was_trained_before(few_stories, tmp_path, monkeypatch):
    asked, mini = [], lab.load("mini")

    def train(plan, *_, **__):
        asked.append((plan.stage, plan.settings["max_steps"]))
        return SimpleNamespace(summary={"rows": 8})

    monkeypatch.setattr(equal_cost_runs, "train", train)
    monkeypatch.setattr(equal_cost_runs, "cost_at", lambda *_: (0.0, 0.0, 0.0))
    for before in (["sft"], ["sft", "reward"]):
        of = equal_cost_runs.Seed(mini, few_stories, 0, tmp_path, {}, 600, points=1, answers=0)
        for stage in before:
            of.train(stage, mini, few_stories, last=False)
        of.train("dpo", mini, few_stories)
        ppo = len(before) == 2 and of.train("ppo", mini, few_stories)
    alone, after = (steps for stage, steps in asked if stage == "dpo")
    assert ppo and alone == after > 1
    # PPO needs the reward model, and has what that one left of the budget.
    left = 600 - sum(of.planned.values())
    step = lab.plan("ppo", mini, data=few_stories, seed=0).estimate.step_seconds
    assert of.planned.keys() == {"sft", "reward"} and asked[-1] == ("ppo", int(left / step))


def test_the_policy_of_a_checkpoint_is_that_of_a_run_that_ended_there(few_stories, tmp_path):
    mini, how = lab.load("mini"), {"save_steps": 1, "save_total_limit": None, "seed": 0}
    plan = lab.plan("ppo", mini, **{**SETTINGS["ppo"], **how})
    data = few_stories.with_held_out(1)
    whole = lab.train(plan, data, out=tmp_path / "whole", quiet=True)
    stop = {"should_stop": lambda: True, "quiet": True}
    short = lab.train(plan, data, out=tmp_path / "short", **stop)
    assert (short.last_step, whole.last_step) == (1, 2)
    theirs = mini.with_stage("sft", short.model_path).sft.state_dict()
    for name, weights in policy_at(mini, whole, 1).state_dict().items():
        assert torch.equal(weights, theirs[name]), name
    assert any(
        not torch.equal(w, theirs[n]) for n, w in policy_at(mini, whole, 2).state_dict().items()
    )


def test_what_is_there_is_not_trained_again(trained, few_stories, monkeypatch):
    result, file = trained
    monkeypatch.setattr(equal_cost_runs, "train", None)
    assert lab.equal_budget(WAYS, 5, data=few_stories, file=file, **SMALL) == result
    with pytest.raises(ValueError, match="was made with budget=5"):
        lab.equal_budget(WAYS, 6, data=few_stories, file=file, **SMALL)
    dear = lab.equal_budget(WAYS, 5, data=few_stories, file=file, hour_price=9, **SMALL)
    assert dear == replace(result, hour_price=9)
    with pytest.raises(ValueError, match="budget of 0.001 seconds is too small: .* to take 0"):
        lab.equal_budget(WAYS, 0.001, data=few_stories, **SMALL)
    with pytest.raises(ValueError, match="has no gold reward: only"):
        lab.equal_budget(data=[{"prompt": f"say {i}", "completion": "yes"} for i in range(20)])


REFUSED = [
    ({"ways": ["SFT"]}, "way='SFT': .*choose from SFT.RM.PPO"),
    ({"ways": []}, "at least one way and one seed"),
    ({"seeds": []}, "at least one way and one seed"),
    ({"each": {"dppo": {}}}, "stage='dppo': did you mean 'ppo'. choose from sft, reward, ppo"),
    ({"each": {"ppo": {"kl_coeff": 1}}}, "no setting 'kl_coeff'"),
    ({"each": {"rejection": {"num_generation": 1}}}, "no setting 'num_generation'"),
    *(({name: 0}, f"{name} must be more than 0") for name in ("budget", "points", "prompts")),
    ({"answers": -1}, "answers must be more than 0, not -1"),
    ({"label_price": -1}, "label_price and hour_price: not below 0, nor both 0; got -1 and 0.2"),
    ({"label_price": 0, "hour_price": 0}, "nor both 0"),
]


@pytest.mark.parametrize(("given", "line"), REFUSED)
def test_what_cannot_be_is_refused_before_data_is_loaded(given, line, monkeypatch):
    monkeypatch.setattr(equal_cost, "load_data", None)
    with pytest.raises(ValueError, match=line) as error:
        lab.equal_budget(**given)
    assert "\n" not in str(error.value)


def test_another_file_is_refused_in_one_line(tmp_path):
    for text in ("{}", "[]", "1", '{"traces": []}', "no"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="other.json was not written by EqualBudget.save"):
            EqualBudget.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no such file: .*none.json"):
        EqualBudget.load(tmp_path / "none.json")


def test_without_the_way_to_compare_with_it_says_so(found):
    alone = replace(found, traces=found.traces[3:])
    assert alone.answer == "SFT+RM+PPO was not run: no way is compared to it"
