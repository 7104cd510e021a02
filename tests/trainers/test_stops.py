"""Every stage stops at every token at which the model's turns end.

pytest tests/trainers/test_stops.py

Row 2 of the list of models: the template ends turns with `<end_of_turn>`, the tokenizer's eos is
`</s>`, and the generation config lists a third token.
"""

from __future__ import annotations

import json

import pytest
import torch
from families import make_folder, rows

import rlhf_lab as lab
from rlhf_lab.data.tokenize import encode_prompt, prompt_rows, sft_rows, stop_ids
from rlhf_lab.ppo.texts import sample_ids

TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}<start> {{ m.content }} <end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}<start> {% endif %}"
)
ENDS = ["</s>", "<end_of_turn>", "<return>"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A random Llama with such a template, tokenizer and generation config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_folder(tmp_path_factory.mktemp("chatty"), "llama")
    tokenizer, model = (x.from_pretrained(folder) for x in (AutoTokenizer, AutoModelForCausalLM))
    tokenizer.add_tokens([*ENDS[1:], "<start>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    listed = tokenizer.convert_tokens_to_ids(["</s>", "<return>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    return lab.load(folder)


def talks(count: int = 24, system_every: int = 0) -> list[dict]:
    """The families' rows as conversations; some with a system turn."""
    found = [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in rows(count)]
    for row in found[:: system_every or count + 1] if system_every else []:
        row["prompt"] = [{"role": "system", "content": "w1"}, *row["prompt"]]
    return found


def test_row_2_one_stop_set_and_the_end_of_turn_is_learned(chatty):
    tokenizer = chatty.tokenizer
    ends = tokenizer.convert_tokens_to_ids(ENDS)
    assert sorted(stop_ids(tokenizer)) == sorted(ends)
    (row,), _ = sft_rows(tokenizer, talks(1), 99)
    assert row["input_ids"][-1] == ends[1] and row["completion_mask"][-1] == 1
    sampled = sample_ids(chatty.base, tokenizer, [talks(1)[0]["prompt"]], samples=200, seed=1)[0]
    _end_at(sampled, ends, 64)


def _end_at(responses, ends, limit):
    """No response goes on after one of the ends, and every one of them ends some."""
    for ids in responses:
        assert not set(ids[:-1]) & set(ends) and (ids[-1] in ends or len(ids) == limit)
    assert {ids[-1] for ids in responses} >= set(ends)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_row_2_sampling_stops_at_each_end_in_every_online_stage(stage, chatty, tmp_path):
    """The ids that a reward function is given; `stopped` counts them all."""
    ends, seen = chatty.tokenizer.convert_tokens_to_ids(ENDS), []

    def keep(completion_ids, **_):
        seen.extend(completion_ids)
        return [0.0] * len(completion_ids)

    more = {} if stage == "ppo" else {"num_generations": 2, "steps_per_generation": 4}
    plan = lab.plan(
        stage,
        chatty,
        max_steps=1,
        seed=0,
        per_device_train_batch_size=16,
        response_length=40,
        temperature=1.0,
        learning_rate=1e-4,
        gradient_accumulation_steps=4,
        **more,
    )
    run = lab.train(
        plan, lab.load_data(talks(80)), out=tmp_path / "r", reward_funcs=keep, quiet=True
    )
    _end_at(seen, ends, 40)
    assert run.metrics[0]["stopped"] == pytest.approx(
        sum(ids[-1] in ends for ids in seen) / len(seen)
    )
    _saved_with(run, ends)


def _saved_with(run, ends):
    """Whoever loads what is saved with transformers alone stops where training stopped."""
    saved = json.loads((run.model_path / "generation_config.json").read_text())
    assert sorted(saved["eos_token_id"]) == sorted(ends) and saved["pad_token_id"] not in ends


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto"])
def test_row_15_a_refused_row_costs_a_row_and_not_the_run(stage, chatty, tmp_path, capsys):
    """Every third prompt has a system turn, which the template refuses: left out, counted, and
    the remedy stands in the run's first lines."""
    data = lab.load_data(talks(48, system_every=3))
    plan = lab.plan(stage, chatty, max_steps=1, seed=0)
    run = lab.train(plan, data, out=tmp_path / "run")
    refused = "the chat template refuses it: no system turns"
    assert run.status == "finished" and run.summary["dropped"][refused] > 5
    (line,) = (x for x in capsys.readouterr().out.splitlines() if refused in x)
    assert line.startswith(f"{stage}: left out") and "chat_template.jinja" in line
    if stage != "reward":
        _saved_with(run, chatty.tokenizer.convert_tokens_to_ids(ENDS))


def test_nothing_left_is_one_line_with_the_reason(chatty, tmp_path):
    data = lab.load_data(talks(48, system_every=1))
    with pytest.raises(ValueError, match="no row is left .* no system turns") as error:
        lab.train(lab.plan("sft", chatty, max_steps=1), data, out=tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_data_command_counts_them_too(chatty):
    from rlhf_lab.pipeline import describe_data

    (row, *_) = describe_data(lab.load_data(talks(48, system_every=3)), chatty)
    assert row["dropped: the chat template refuses it: no system turns"] == 16


def test_a_template_with_todays_date_is_named(chatty, tmp_path, capsys):
    from rlhf_lab.trainers.prepare import say_of_template

    tokenizer = chatty.tokenizer
    for template, dated in ((TEMPLATE, False), ("{{ strftime_now('%Y') }}" + TEMPLATE, True)):
        tokenizer.chat_template = template
        for prompts, expected in ((talks(3), dated), ([{"prompt": "w1"}], False)):
            say_of_template("sft", tokenizer, prompts, {})
            assert ("today's date" in capsys.readouterr().out) == expected
    tokenizer.chat_template = TEMPLATE
    assert prompt_rows(tokenizer, talks(1), 99)[0][0]["prompt_ids"] == encode_prompt(
        tokenizer, talks(1)[0]["prompt"]
    )
