"""SFT learns the answers: the first loss that a run logs is the one written out by hand."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rlhf_lab as lab
from rlhf_lab.trainers import trl
from rlhf_lab.trainers.trl import check_rows_apart


def by_hand(model, ids, learned) -> float:
    """Mean of −log π over the learned tokens, each read one position before it."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return float(-logprobs[learned[:, 1:]].mean())


@pytest.mark.parametrize("own", [{}, {"completion_only_loss": False}, {"padding_free": True}])
def test_the_first_loss_is_that_of_the_answers_tokens(tmp_path, own):
    """Without padding too, where TRL 1.16 refuses a `max_length`: rows are cut before."""
    answers_only = "completion_only_loss" not in own
    data, tiny = lab.load_data("stories").first(2, test=4), lab.load("tiny")
    rows = lab.batch("sft", tiny, data)["completion"]
    plan = lab.plan("sft", tiny, max_steps=1, per_device_train_batch_size=2, **own)
    run = lab.train(plan, data, out=tmp_path / "run", quiet=True)
    learned = rows.response if answers_only else rows.real
    expected = by_hand(tiny.base.eval(), rows.ids, learned)
    assert run.series("loss")[1][0] == pytest.approx(expected, abs=1e-6)
    other = by_hand(tiny.base.eval(), rows.ids, rows.real if answers_only else rows.response)
    assert abs(expected - other) > 0.1  # the two are not confused


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_packing_is_refused_where_a_model_reads_rows_laid_end_to_end_as_one(kind, more):
    """Those that make their mask of `position_ids` keep them apart: their loss is that of padded
    rows. OPT and BLOOM take none."""
    size = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, num_attention_heads=4, pad_token_id=0, **size, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    rows, positions = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.arange(4).repeat(2)[None]
    with torch.no_grad():
        alone = model.eval()(input_ids=rows).logits[1]
        whole = model(input_ids=rows.view(1, -1), position_ids=positions, use_cache=False)
    model.train()
    apart = bool((alone - whole.logits[0, 4:]).abs().max() < 1e-5)
    assert apart == (kind in ("llama", "gpt2"))
    if apart:
        check_rows_apart(model)
    else:
        with pytest.raises(ValueError, match=f"^packing and padding_free .* {kind} reads them as"):
            check_rows_apart(model)
    assert model.training


def test_packed_rows_are_tried_before_they_are_learned(tmp_path, monkeypatch):
    def refused(model):
        raise ValueError("reads them as one")

    monkeypatch.setattr(trl, "check_rows_apart", refused)
    data = lab.load_data("stories").first(2, test=4)
    how = {"max_steps": 1, "per_device_train_batch_size": 2}
    lab.train(lab.plan("sft", "tiny", **how), data, out=tmp_path / "padded", quiet=True)
    with pytest.raises(ValueError, match="reads them as one"):
        lab.train(
            lab.plan("sft", "tiny", packing=True, **how), data, out=tmp_path / "run", quiet=True
        )
