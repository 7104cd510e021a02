"""Every family we claim, through all four stages, with and without a pad token of its own.

pytest tests/models/test_families.py
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, make_folder, rows

import rlhf_lab as lab
from rlhf_lab.data.tokenize import encode_prompt, encode_response, pair_rows, sft_rows
from rlhf_lab.ppo import rollout
from rlhf_lab.ppo.sampling import generate, pad_prompts

VARIANTS = [(family, pad) for family in FAMILIES for pad in (True, False)]
SHORT = {"max_steps": 2, "seed": 0}
SETTINGS = {"sft": {}, "reward": {}, "dpo": {}, "ppo": {"response_length": 6}}


@pytest.mark.parametrize(("family", "pad"), VARIANTS)
def test_all_four_stages(family, pad, tmp_path):
    """Each stage starts from what the one before it made; every model that is left behind loads."""
    model = lab.load(make_folder(tmp_path / "model", family, pad))
    data = lab.load_data(rows())
    for stage in ("sft", "reward", "ppo", "dpo"):
        plan = lab.plan(stage, model, **SHORT, **SETTINGS[stage])
        run = lab.train(plan, data, out=tmp_path / stage, quiet=True)
        assert run.status == "finished" and run.metrics[-1]["step"] == 2
        if stage in ("sft", "reward"):
            model = model.with_stage(stage, run.model_path)
        if stage == "ppo":
            assert max(run.series("first_ratio_error")[1]) < 1e-5
            assert abs(run.series("kl")[1][0]) < 1e-4
    assert len(model.tokenizer) <= model.sft.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_critic(family, tmp_path):
    """TRL's trainer too has no dropout (OPT's is no module) and no KL before the first step."""
    model = lab.load(make_folder(tmp_path / "model", family))
    reward_model = tmp_path / "reward"
    model.new_reward().save_pretrained(reward_model)
    model.tokenizer.save_pretrained(reward_model)
    plan = lab.plan(
        "grpo",
        model.with_stage("reward", reward_model),
        seed=0,
        max_steps=8,
        num_generations=2,
        per_device_train_batch_size=4,
        response_length=6,
    )
    run = lab.train(plan, lab.load_data(rows()), out=tmp_path / "grpo", quiet=True)
    before, after = run.series("kl")[1]
    assert abs(before) < 1e-4 and abs(after) > 1e-3


@pytest.mark.parametrize(("family", "pad"), VARIANTS)
def test_the_same_ids_in_every_stage(family, pad, tmp_path):
    """SFT, reward model, DPO and PPO see a (prompt, response) as the same tokens."""
    model = lab.load(make_folder(tmp_path / "model", family, pad))
    tokenizer, row = model.tokenizer, rows(1)[0]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    prompt = encode_prompt(tokenizer, row["prompt"])
    whole = prompt + encode_response(tokenizer, row["completion"])
    assert whole[-1] == tokenizer.eos_token_id and tokenizer.pad_token_id not in whole
    (sft,), _ = sft_rows(tokenizer, [row], 99)
    (pair,), _ = pair_rows(tokenizer, [row], 99)
    assert sft["input_ids"] == pair["prompt_ids"] + pair["chosen_ids"] == whole
    # PPO: the prompt padded on the left, the sampled response put after it.
    ids, mask = pad_prompts([prompt, prompt[:1]], tokenizer.pad_token_id)
    answer = torch.tensor([whole[len(prompt) :]] * 2)
    joined, attention = rollout.concat_prompt_response(
        ids, mask, answer, answer >= 0, tokenizer.pad_token_id
    )
    assert joined[0][attention[0]].tolist() == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, tmp_path):
    """A row scores alike alone and beside a longer one; sampling with a cache is the whole pass."""
    model = lab.load(make_folder(tmp_path / "model", family))
    tokenizer, policy, reward_model = model.tokenizer, model.base, model.reward
    prompts = [encode_prompt(tokenizer, r["prompt"]) for r in rows(3)]
    prompts[1] = (prompts[1] * 12)[:30]  # longer than the sliding windows
    pad = tokenizer.pad_token_id
    ids, mask = pad_prompts(prompts, pad)
    with torch.no_grad():
        scores = rollout.sequence_scores(reward_model, ids, mask)
        responses = generate(
            policy,
            ids,
            mask,
            torch.zeros(3, dtype=torch.long),
            max_new_tokens=8,
            stop_token_ids=None,
            pad_token_id=pad,
            temperature=0,
        )
        for row, prompt in enumerate(prompts):
            alone = reward_model(torch.tensor([prompt])).logits[0, 0]
            assert torch.allclose(scores[row], alone, atol=1e-4)
            tokens = list(prompt)
            for token in responses[row].tolist():
                logits = policy(torch.tensor([tokens])).logits[0, -1]
                assert logits[token] > logits.max() - 1e-4
                tokens.append(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_has_a_template_even_where_the_model_has_none(family, tmp_path):
    tokenizer = lab.load(make_folder(tmp_path / "model", family)).tokenizer
    talk = [{"role": "user", "content": "w1 w2"}]
    more = [*talk, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4"}]
    short, long = (encode_prompt(tokenizer, t) for t in (talk, more))
    assert short and len(long) > len(short)


def test_a_template_that_refuses_is_one_line(tmp_path):
    """Some templates know no system role, and say so by raising an exception of their own."""
    tokenizer = lab.load(make_folder(tmp_path / "model", "gemma")).tokenizer
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    with pytest.raises(ValueError, match="refuses a conversation of 1 messages .system.: no sys"):
        encode_prompt(tokenizer, [{"role": "system", "content": "w1"}])
