"""KTO: labelled answers, each beside an answer to another prompt, and the loss by hand.

pytest tests/trainers/test_kto.py
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import trl

import rlhf_lab as lab
from rlhf_lab.data.load import Split, unpaired
from rlhf_lab.data.tokenize import encode_prompt, encode_response, labelled_rows
from rlhf_lab.trainers.kto import mismatched
from rlhf_lab.trainers.trl import Watch, make_trainer

KTO = {"loss_type": "kto", "per_device_train_batch_size": 4, "seed": 0}


def rows(tiny, count=8):
    """Two answers to each prompt, the even ones good."""
    tokenizer = tiny.tokenizer()
    pairs = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f"w{i} w2 w3", "rejected": f"w{i}"}
        for i in range(count // 2)
    ]
    made, counts = labelled_rows(tokenizer, unpaired(pairs), 64)
    assert not any(counts.values())
    return made


def test_pairs_become_labelled_answers():
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad", "more": 1}
    assert unpaired([pair]) == [
        {"prompt": "p", "completion": "good", "label": True},
        {"prompt": "p", "completion": "bad", "label": False},
    ]


def test_tokens_of_a_labelled_answer_are_those_of_other_stages(tiny):
    tokenizer = tiny.tokenizer()
    row = {"prompt": "w1 w2", "completion": "w3", "label": 1}
    (made,), counts = labelled_rows(tokenizer, [row, {**row, "completion": "w3 w4 w5"}], 4)
    assert counts == {"too long": 1}
    assert made == {
        "prompt_ids": encode_prompt(tokenizer, "w1 w2"),
        "completion_ids": encode_response(tokenizer, "w3"),
        "label": True,
    }


def test_the_other_answer_is_one_of_the_same_batch_and_every_answer_is_used_once(tiny):
    made = mismatched(rows(tiny, 10), SimpleNamespace(**KTO))
    assert len(made) == 10
    for start in range(0, 10, 4):
        batch = made[start : start + 4]
        own = [r["completion_ids"] for r in batch]
        assert [r["KL_completion_ids"] for r in batch] == [own[-1], *own[:-1]]


def test_pairs_do_not_stand_side_by_side(tiny):
    """In the data's own order half of the rows would meet the other answer to their own prompt."""
    asked = [tuple(r["prompt_ids"]) for r in mismatched(rows(tiny, 24), SimpleNamespace(**KTO))]
    assert sum(a == b for a, b in zip(asked, asked[1:])) < len(asked) / 4


def test_a_file_that_is_sorted_is_shuffled(tiny):
    """models.md 25: TRL's KTOTrainer shuffles nothing, whatever the loss: each batch of a file that
    is sorted by label would be of one label."""
    made = sorted(rows(tiny, 40), key=lambda r: r["label"])
    for loss in ("kto", "apo_zero_unpaired"):
        labels = [
            r["label"] for r in mismatched(made, SimpleNamespace(**{**KTO, "loss_type": loss}))
        ]
        batches = [set(labels[i : i + 4]) for i in range(0, 40, 4)]
        assert sum(batch == {True, False} for batch in batches) > 5
        assert sorted(labels) == [False] * 20 + [True] * 20


def test_other_answers_are_to_other_prompts(tiny):
    """models.md 25: a file with eight answers to each prompt: in its order, and by chance in any,
    neighbours answer the same one."""
    made = [{"prompt_ids": [i // 8], "completion_ids": [i], "label": i % 2 == 0} for i in range(32)]
    found = mismatched(made, SimpleNamespace(**{**KTO, "per_device_train_batch_size": 8}))
    met = [(r["prompt_ids"][0], r["KL_completion_ids"][0] // 8) for r in found]
    by_one = [found[i]["completion_ids"][0] // 8 for i in range(-1, 31)]
    assert sum(a == b for a, b in met) < sum(r["prompt_ids"][0] == b for r, b in zip(found, by_one))


def test_a_last_row_alone_is_left_out(tiny):
    assert len(mismatched(rows(tiny, 10)[:9], SimpleNamespace(**KTO))) == 8
    free = SimpleNamespace(**{**KTO, "loss_type": "apo_zero_unpaired"})
    assert len(mismatched(rows(tiny, 10)[:9], free)) == 9


def trainer(tiny, tmp_path, train, **settings):
    args = trl.KTOConfig(
        output_dir=str(tmp_path),
        **{
            **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": 1},
            **{"report_to": "none", "save_strategy": "no", "learning_rate": 0.1, "beta": 0.5},
            **{"per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True},
            **settings,
        },
    )
    model = tiny.lm(0)
    model.save_pretrained(tmp_path / "model")  # TRL loads the reference from there
    model = type(model).from_pretrained(tmp_path / "model")
    return make_trainer("kto", model, tiny.tokenizer(), train, [], args, [])


def logprob(model, prompt, answer):
    """Log-probability of an answer: one row, no padding."""
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(sum(logits[i, t] for i, t in zip(at, answer, strict=True)))


def test_the_loss_by_hand(tiny, tmp_path):
    """1 - sigmoid(beta (log-ratio - KL)) of good answers, mirrored of bad ones (eq. 7)."""
    train = rows(tiny)
    made = trainer(tiny, tmp_path, train, max_steps=3)
    made.train()
    policy, reference = made.model.eval(), tiny.lm(0)
    batch = mismatched(train, made.args)[:4]
    with torch.no_grad():
        ratio, other = (
            [
                logprob(policy, r["prompt_ids"], r[name])
                - logprob(reference, r["prompt_ids"], r[name])
                for r in batch
            ]
            for name in ("completion_ids", "KL_completion_ids")
        )
        kl = max(0.0, sum(other) / 4)
        signs = [1 if r["label"] else -1 for r in batch]
        by_hand = [
            1 - 1 / (1 + math.exp(-0.5 * s * (x - kl))) for s, x in zip(signs, ratio, strict=True)
        ]
        inputs = made.data_collator(batch)
        loss = made.compute_loss(made.model, inputs)
    assert float(loss) == pytest.approx(sum(by_hand) / 4, abs=1e-5)


def test_policy_moves_and_reference_does_not(tiny, tmp_path):
    made = trainer(tiny, tmp_path, rows(tiny), max_steps=2)
    before = {n: p.clone() for n, p in made.ref_model.named_parameters()}
    start = {n: p.clone() for n, p in made.model.named_parameters()}
    made.train()
    assert all(torch.equal(p, before[n]) for n, p in made.ref_model.named_parameters())
    assert any(not torch.equal(p, start[n]) for n, p in made.model.named_parameters())


def test_a_batch_of_one_is_refused_in_one_line(tiny, tmp_path):
    with pytest.raises(ValueError, match="batch size must be > 1"):
        trainer(tiny, tmp_path, rows(tiny), per_device_train_batch_size=1)


def test_one_held_out_row_is_left_out(tmp_path):
    """It has no answer to another prompt: up to version 0.1 the run failed with "one row alone"."""
    from families import data, make_folder

    made = data()
    made = replace(made, answers=Split(made.labelled.train, made.labelled.train[:1]))
    plan = lab.plan("kto", make_folder(tmp_path / "model", "llama"), max_steps=1, seed=0)
    run = lab.train(plan, made, out=tmp_path / "run", quiet=True)
    assert run.status == "finished" and "eval_loss" not in run.summary


def test_a_whole_run(few_stories, tmp_path):
    plan = lab.plan("kto", "tiny", max_steps=3, logging_steps=1, seed=0)
    run = lab.train(plan, out=tmp_path / "run", quiet=True)
    assert run.stage == "kto" and run.status == "finished"
    assert {"loss", "kl", "margin"} <= set(run.metric_names)
    assert {"gold_reward", "win_rate", "kl", "eval_loss"} <= run.summary.keys()
    assert run.summary["rows"] == 2 * len(few_stories.preferences.train)
    measured = run.ledger.filter(source="measured", quantity="flops")
    assert {r.role for r in measured} == {"policy", "reference"}
    assert {s["when"] for s in run.samples} == {"sft", "kto"}
    assert Watch.plain("rewards/margins") == "margin"
