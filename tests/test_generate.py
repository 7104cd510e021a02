"""A prompt of one's own, and the tensors that a trainer sees."""

import pytest
import torch

import rlhf_lab as lab

PROMPT = "Write a happy story about a fox and a lantern in the cave."


def test_a_prompt_is_answered_as_transformers_would():
    """Greedily, the text is that of transformers' own `generate`."""
    tiny = lab.load("tiny")
    model = tiny.sft.eval()
    ids = tiny.tokenizer(PROMPT + "\n", return_tensors="pt", add_special_tokens=False)
    theirs = model.generate(
        input_ids=ids.input_ids,
        attention_mask=ids.attention_mask,
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tiny.tokenizer.eos_token_id,
        pad_token_id=tiny.tokenizer.pad_token_id,
    )[0, ids.input_ids.shape[1] :]
    (ours,) = lab.generate("tiny", PROMPT, temperature=0)
    assert ours == tiny.tokenizer.decode(theirs, skip_special_tokens=True)


def test_a_seed_gives_the_same_answers_and_another_gives_others():
    first, second = lab.generate("tiny", PROMPT, n=2), lab.generate("tiny", PROMPT, n=2)
    assert list(first) == list(second) and first[0] != first[1]
    assert first != lab.generate("tiny", PROMPT, n=2, seed=1)
    assert all(text in repr(first) for text in first)


def test_a_run_answers_with_what_it_made(tmp_path, few_stories):
    run = lab.train(lab.plan("sft", "tiny", max_steps=1), few_stories, out=tmp_path / "r")
    (from_run,) = lab.generate(run, PROMPT)
    assert lab.generate(tmp_path / "r", PROMPT) == [from_run] != lab.generate("tiny", PROMPT)
    with pytest.raises(ValueError, match="stage 'reward' writes nothing; choose base or sft"):
        lab.generate("tiny", PROMPT, stage="reward")
    with pytest.raises(ValueError, match="temperature at least 0"):
        lab.generate("tiny", PROMPT, temperature=-1)


def test_a_batch_is_what_the_trainer_sees():
    """Written out by hand: prompt, answer, eos; and a plain pass learns from the answer alone."""
    data = lab.load_data("stories").first(2)
    tiny = lab.load("tiny")
    rows = lab.batch("sft", tiny, data)["completion"]
    for i, row in enumerate(data.sft.train):
        prompt, answer = (
            tiny.tokenizer(row[k], add_special_tokens=False).input_ids
            for k in ("prompt", "completion")
        )
        whole = [*prompt, *answer, tiny.tokenizer.eos_token_id]
        assert rows.ids[i, : len(whole)].tolist() == whole
        assert rows.real[i].sum() == len(whole) and rows.response[i].sum() == len(answer) + 1
    with torch.no_grad():
        logits = tiny.base(input_ids=rows.ids).logits.double()
    logp = logits[:, :-1].log_softmax(-1).gather(-1, rows.ids[:, 1:, None]).squeeze(-1)
    assert -logp[rows.response[:, 1:]].mean() > 0


def test_pairs_have_two_answers_and_sampled_stages_have_none():
    data = lab.load_data("stories").first(3)
    assert (len(data.sft.train), len(data.prompts.train)) == (3, 3) and data.has_gold
    pairs = lab.batch("dpo", "tiny", data, rows=3)
    assert set(pairs) == {"chosen", "rejected"} and len(pairs["chosen"].ids) == 3
    with pytest.raises(ValueError, match="ppo samples its answers"):
        lab.batch("ppo", "tiny", data)
