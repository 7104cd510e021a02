"""Rules 22 to 24 of PPO: pairs, who moves, memory. Table: test_ppo_rules_01_08.py."""

import copy

import pytest
import torch
from ppo_kit import must_fail, response_logits, scored, swap
from transformers import TrainerCallback

from rlhf_lab.data import tokenize
from rlhf_lab.ppo import losses, trainer

# ----------------------------------------------------------------------------------------- rule 22

PAIRS = [
    {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5"},  # 2 + 3 tokens with eos: just fits
    {"prompt": "w1 w2", "chosen": "w3 w4 w5", "rejected": "w6"},  # 2 + 4: one too many
    {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5 w6 w7"},
    {"prompt": "w1", "chosen": "w3", "rejected": "w3"},
    {"prompt": "w1 w2 w3", "chosen": "w4", "rejected": "w5"},
]


def check_pairs(tokenizer):
    """Over-long pairs are dropped whole, never cut; every drop is counted; each row ends in eos."""
    made, dropped = tokenize.pair_rows(tokenizer, PAIRS, max_length=5)
    assert dropped == {"too long": 2, "identical": 1}
    assert len(made) == len(PAIRS) - sum(dropped.values())
    assert made[0] == {"prompt_ids": [1, 2], "chosen_ids": [3, 14], "rejected_ids": [4, 5, 14]}
    for row in made:
        for answer in ("chosen_ids", "rejected_ids"):
            assert len(row["prompt_ids"]) + len(row[answer]) <= 5
            assert row[answer][-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
            assert tokenizer.pad_token_id not in row["prompt_ids"] + row[answer]


def silently_cut(right):
    """What a truncating trainer does: cuts to the length, keeps pairs that have become equal."""

    def broken(tokenizer, rows, max_length):
        made, dropped = right(tokenizer, rows, 10**6)
        for row in made:
            room = max_length - len(row["prompt_ids"])
            row |= {k: row[k][:room] for k in ("chosen_ids", "rejected_ids")}
        return made, dropped

    return broken


def silently_filtered(right):
    return lambda *a, **k: (right(*a, **k)[0], {"too long": 0, "identical": 0})


def pad_is_eos(right):
    def broken(tokenizer, *args, **kwargs):
        tokenizer.pad_token = tokenizer.eos_token
        return right(tokenizer, *args, **kwargs)

    return broken


@pytest.mark.parametrize("broken", [silently_cut, silently_filtered, pad_is_eos])
def test_rule_22_over_long_and_identical_pairs_are_counted(tiny, monkeypatch, broken):
    check_pairs(tiny.tokenizer())
    swap(monkeypatch, tokenize, "pair_rows", broken)
    with must_fail:
        check_pairs(tiny.tokenizer())


def test_rule_22_sft_rows_learn_the_response_only_and_count_what_is_too_long(tiny):
    rows = [
        {"prompt": "w1 w2", "completion": "w3"},
        {"prompt": "w1", "completion": "w3 w4 w5 w6"},
        {"prompt": "w1 w2 w3", "completion": "w4 w5"},
    ]
    made, counts = tokenize.sft_rows(tiny.tokenizer(), rows, max_length=4)
    assert made == [
        {"input_ids": [1, 2, 3, tiny.eos], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [1, 3, 4, 5], "completion_mask": [0, 1, 1, 1]},  # cut: no eos to learn
    ]
    assert counts == {"truncated": 1, "too long": 1}


# ------------------------------------------------------------------------------------ rules 23, 24


class Meddle(TrainerCallback):
    """Breaks rule 23: nudges a model that should stand still, or undoes one that should move."""

    def __init__(self, model, still: bool):
        self.model, self.still = model, still
        self.start = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for p, start in zip(self.model.parameters(), self.start, strict=True):
            p.copy_(start if self.still else p + 1e-3)


def check_who_moves(make, tiny, meddle_with=None):
    models = {
        "model": tiny.lm(0),
        "ref_model": tiny.lm(0),
        "reward_model": tiny.rm(1),
        "value_model": tiny.rm(1),
    }
    start = {k: copy.deepcopy(m.state_dict()) for k, m in models.items()}
    callbacks = []
    if meddle_with:
        should_move = meddle_with in ("model", "value_model")
        callbacks = [Meddle(models[meddle_with], still=should_move)]
    make(models=models, extra={"callbacks": callbacks}, total_episodes=8).train()
    for role, model in models.items():
        moved = [k for k, w in model.state_dict().items() if not torch.equal(w, start[role][k])]
        expected = len(start[role]) if role in ("model", "value_model") else 0
        assert len(moved) == expected, f"{role}: {len(moved)} of {len(start[role])} tensors moved"


def test_rule_23_policy_and_value_move_reference_and_reward_do_not(make, tiny):
    check_who_moves(make, tiny)
    for role in ("model", "value_model", "ref_model", "reward_model"):
        with must_fail:
            check_who_moves(make, tiny, meddle_with=role)


def check_largest_logits(make, tiny):
    """With chunks of one row, the logits alive while scoring never exceed what one row makes."""
    alive, peak = {}, [0]

    def watch(module, args, output):
        storage = output.untyped_storage()
        alive[storage.data_ptr()] = (
            torch.multiprocessing.reductions.StorageWeakRef(storage),
            storage.nbytes(),
        )
        peak[0] = max(peak[0], sum(n for ref, n in alive.values() if not ref.expired()))

    trainer = make(local_rollout_forward_batch_size=1)
    responses = torch.arange(24).reshape(8, 3) % 12  # nobody stops
    handles = [m.lm_head.register_forward_hook(watch) for m in (trainer.policy, trainer.reference)]
    scored(trainer, responses.tolist())
    for handle in handles:
        handle.remove()
    one_row = 4 * 3 * tiny.words  # fp32
    assert 0 < peak[0] <= one_row, f"{peak[0] // one_row} rows of logits at once"
    assert not any(not ref.expired() for ref, _ in alive.values())


def keeps_everything(_):
    """What TRL's rollout did: every response's logits stay until the end."""
    logits = []

    def broken(model, ids, attention, responses, temperature, *_):
        pieces = zip(ids.split(1), attention.split(1), strict=True)
        logits.extend(response_logits(model, i, a, responses.shape[1]) for i, a in pieces)
        return losses.token_logprobs(torch.cat(logits[-len(ids) :]), responses, temperature)

    return broken


def all_at_once(right):
    return lambda *args: right(*args[:-2], [torch.arange(len(args[1]))], args[-1])


@pytest.mark.parametrize("broken", [keeps_everything, all_at_once])
def test_rule_24_no_logits_outlive_a_chunk(make, tiny, monkeypatch, broken):
    check_largest_logits(make, tiny)
    swap(monkeypatch, trainer, "response_logprobs", broken)
    with must_fail:
        check_largest_logits(make, tiny)
