"""SFT learns the answers: the first loss that a run logs is the one written out by hand."""

import pytest
import torch

import rlhf_lab as lab


def by_hand(model, ids, learned) -> float:
    """Mean of −log π over the learned tokens, each read one position before it."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return float(-logprobs[learned[:, 1:]].mean())


@pytest.mark.parametrize("answers_only", [True, False])
def test_the_first_loss_is_that_of_the_answers_tokens(tmp_path, answers_only):
    data, tiny = lab.load_data("stories").first(2, test=4), lab.load("tiny")
    rows = lab.batch("sft", tiny, data)["completion"]
    own = {} if answers_only else {"completion_only_loss": False}
    plan = lab.plan("sft", tiny, max_steps=1, per_device_train_batch_size=2, **own)
    run = lab.train(plan, data, out=tmp_path / "run", quiet=True)
    learned = rows.response if answers_only else rows.real
    expected = by_hand(tiny.base.eval(), rows.ids, learned)
    assert run.series("loss")[1][0] == pytest.approx(expected, abs=1e-6)
    other = by_hand(tiny.base.eval(), rows.ids, rows.real if answers_only else rows.response)
    assert abs(expected - other) > 0.1  # the two are not confused
