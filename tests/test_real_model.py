"""The stages on a real model: SmolLM2-135M-Instruct, with a vocabulary of 49,152.

pytest tests/test_real_model.py

What a tiny model cannot show: a byte-level tokenizer with a template of its own, whose pad token is
its end of turn; logits of a real width; a rate that does not break what was learned in weeks.
"""

from __future__ import annotations

import shutil
from functools import cache

import pytest

import rlhf_lab as lab
from rlhf_lab.stages import ONLINE

TURN = [{"role": "user", "content": "What is the capital of France?"}]
SHORT = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "seed": 0,
}
SAMPLED = {"response_length": 4}
OF_STAGE = {
    "ppo": {**SAMPLED, "num_mini_batches": 1},
    "grpo": {**SAMPLED, "steps_per_generation": 1, "num_iterations": 1, "num_generations": 2},
}
OFTEN_USED = ("sft", "reward", "ppo", "dpo", "grpo")
"""KTO's rows go the way of DPO's, RLOO's the way of GRPO's: on tiny models in tests/trainers."""
LOG_RATIO = 1e-4
"""The largest step-0 log-ratio in fp32: a real vocabulary sums 49,152 exponentials in two passes
of different shapes. A tiny one is held to 1e-5."""


def rows():
    """Twenty questions with a right and a wrong answer."""
    for i in range(20):
        asked = [{"role": "user", "content": f"{i} + {i}?"}]
        pair = {"chosen": f"{2 * i}", "rejected": f"{2 * i + 1}, go away"}
        yield {"prompt": asked, "completion": pair["chosen"], **pair}


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """`trained(stage)`: a step of it, from what SFT and reward made before, made once."""
    from rlhf_lab.trainers import prepare

    folder = tmp_path_factory.mktemp("real")

    @cache
    def train(stage: str) -> lab.Run:
        model = smollm2
        if stage in ONLINE:
            model = model.with_stage("reward", train("reward").model_path)
        data = lab.load_data(list(rows()))
        plan = lab.plan(stage, model, **{**SHORT, **OF_STAGE.get(stage, SAMPLED)})
        run = lab.train(plan, data, out=folder / stage, quiet=True)
        if stage not in ("sft", "reward"):  # half a gigabyte each
            shutil.rmtree(run.model_path)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "HELD_OUT", 2)
        yield train
    shutil.rmtree(folder)  # pytest would keep that of three runs


def test_it_answers_in_its_own_turn_and_ends_it(smollm2):
    """The model is whole: it knows its template, its facts and when to stop."""
    tokenizer, model = smollm2.tokenizer, smollm2.base
    assert (len(tokenizer), tokenizer.eos_token) == (49_152, "<|im_end|>")
    assert tokenizer.pad_token == "<|endoftext|>", "pad is not eos (rule 6), and no row was added"
    ids = tokenizer.apply_chat_template(TURN, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    answer = out[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and int(answer[-1]) == tokenizer.eos_token_id


@pytest.mark.parametrize("stage", OFTEN_USED)
def test_a_stage_trains_on_it(stage, trained):
    """models.md row 23 in each: it trains at the defaults of its size, and keeps its language."""
    run = trained(stage)
    assert run.status == "finished"
    assert run.config["sources"]["learning_rate"]
    losses = [m["loss"] for m in run.metrics if "loss" in m]
    assert all(loss == loss and loss < 20 for loss in losses)
    error = run.ledger.filter(quantity="bytes")
    assert error.filter(source="predicted").peak() and error.filter(source="measured").peak()


def test_the_first_ratio_of_an_iteration_is_1(trained):
    """Rule 3 with a real vocabulary; before any update the policy is the reference."""
    run = trained("ppo")
    assert max(run.series("first_ratio_error")[1]) <= LOG_RATIO
    assert abs(run.series("kl")[1][0]) <= LOG_RATIO * 4
    assert run.summary["kl"] < 1, "nats after one update; at the lab's own rate it was 57"


def test_what_was_trained_is_a_folder_for_plain_transformers(trained):
    from transformers import AutoConfig, AutoTokenizer

    path = trained("sft").model_path
    assert AutoConfig.from_pretrained(path).vocab_size == 49_152
    assert AutoTokenizer.from_pretrained(path).chat_template
    assert (path / "model.safetensors").stat().st_size > 5e8
