"""Rollouts against naive loops: no padding, no cache, no batch, one token at a time.

pytest tests/ppo/test_rollout.py
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppo_kit import ARCHITECTURES, PROMPT_IDS, respond, response_logits
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lab.ppo import layouts, logprobs, rollout
from rlhf_lab.ppo.executor import Executor
from rlhf_lab.ppo.sampling import generate, pad_prompts, positions_of, row_keys
from rlhf_lab.ppo.texts import decode, sample_ids, score_texts


@pytest.fixture(params=ARCHITECTURES)
def rolled_out(request, tiny):
    """A policy, a reward model, and responses joined to their prompts."""
    kind = request.param
    policy, reward = tiny.lm(0, kind), tiny.rm(1, kind)
    prompt_ids, prompt_mask, responses, mask = respond(tiny, policy)
    ids, attention = rollout.concat_prompt_response(
        prompt_ids, prompt_mask, responses, mask, tiny.pad
    )
    tokens = [r[m].tolist() for r, m in zip(responses, mask, strict=True)]
    assert not attention.all(0).all(), "padding on both sides"
    return SimpleNamespace(
        policy=policy,
        reward=reward,
        ids=ids,
        attention=attention,
        responses=responses,
        mask=mask,
        tokens=tokens,
        length=responses.shape[1],
    )


# ------------------------------------------------------------------------------------ the padding


def test_prompts_are_padded_on_the_left():
    ids, mask = pad_prompts([[7, 8], [9]], pad_token_id=15)
    assert ids.tolist() == [[7, 8], [15, 9]]
    assert mask.tolist() == [[True, True], [False, True]]


@torch.no_grad()
def test_an_empty_prompt_is_one_padding_token(tiny):
    """Sampling and scoring then see the same: the response has a token to follow."""
    ids, mask = pad_prompts([[7, 8, 9], []], tiny.pad)
    assert ids[1].tolist() == [tiny.pad] * 3 and mask[1].tolist() == [False, False, True]
    model, responses = tiny.lm(0, "gpt2"), torch.tensor([[5, 6], [3, 4]])
    real = torch.ones_like(responses).bool()
    whole = rollout.concat_prompt_response(ids, mask, responses, real, tiny.pad)
    logits = model(torch.tensor([[tiny.pad, 3]])).logits[0]
    expected = torch.log_softmax(logits, -1)[[0, 1], [3, 4]]
    got = rollout.response_logprobs(model, *whole, responses)[1]
    assert_close(got, expected, atol=2e-5, rtol=0)
    keys = row_keys(0, 0, torch.arange(2), torch.zeros(2, dtype=torch.long))
    how = {"max_new_tokens": 4, "stop_token_ids": None, "pad_token_id": tiny.pad, "temperature": 0}
    alone = generate(model, *pad_prompts([[tiny.pad]], tiny.pad), keys[1:], **how)
    assert torch.equal(generate(model, ids, mask, keys, **how)[1:], alone)


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2]]


def test_concatenation_puts_padding_after_the_stop_token(tiny):
    ids, attention = rollout.concat_prompt_response(
        torch.tensor([[tiny.pad, 1]]),
        torch.tensor([[False, True]]),
        torch.tensor([[2, tiny.eos, 3]]),
        torch.tensor([[True, True, False]]),
        tiny.pad,
    )
    assert ids.tolist() == [[tiny.pad, 1, 2, tiny.eos, tiny.pad]]
    assert attention.tolist() == [[False, True, True, True, False]]


# --------------------------------------------------------------------- batched passes = naive loops


@torch.no_grad()
def test_logprobs_are_those_of_each_token_given_all_before_it(rolled_out):
    """Naive: for each token, run the prefix alone; its last logits predict the token (rule 10)."""
    got = rollout.response_logprobs(
        rolled_out.policy,
        rolled_out.ids,
        rolled_out.attention,
        rolled_out.responses,
        temperature=0.7,
    )
    for row, (prompt, response) in enumerate(zip(PROMPT_IDS, rolled_out.tokens, strict=True)):
        for t, token in enumerate(response):
            logits = rolled_out.policy(torch.tensor([prompt + response[:t]])).logits[0, -1]
            expected = torch.log_softmax(logits / 0.7, 0)[token]
            assert_close(got[row, t], expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_values_are_the_head_before_each_token(rolled_out):
    """V_t is read where token t is not yet known: at the last token of the prefix."""
    got = rollout.token_values(
        rolled_out.reward, rolled_out.ids, rolled_out.attention, rolled_out.mask
    )
    for row, (prompt, response) in enumerate(zip(PROMPT_IDS, rolled_out.tokens, strict=True)):
        for t in range(len(response)):
            expected = rolled_out.reward(torch.tensor([prompt + response[:t]])).logits[0, 0]
            assert_close(got[row, t], expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_scores_are_read_at_the_last_real_token(rolled_out):
    """Each sequence alone, without padding, through transformers' own classification head."""
    got = rollout.sequence_scores(rolled_out.reward, rolled_out.ids, rolled_out.attention)
    for row, (prompt, response) in enumerate(zip(PROMPT_IDS, rolled_out.tokens, strict=True)):
        expected = rolled_out.reward(torch.tensor([prompt + response])).logits[0, 0]
        assert_close(got[row], expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_what_stands_under_the_padding_does_not_matter(rolled_out, tiny):
    """Any token id in a masked place, even one outside the vocabulary, changes nothing."""
    dirty = rolled_out.ids.masked_fill(~rolled_out.attention, tiny.words + 100)
    for function in (
        lambda ids: rollout.sequence_scores(rolled_out.reward, ids, rolled_out.attention),
        lambda ids: rollout.token_values(
            rolled_out.reward, ids, rolled_out.attention, rolled_out.mask
        ),
        lambda ids: rollout.response_hidden_states(
            rolled_out.policy, ids, rolled_out.attention, rolled_out.mask
        ),
    ):
        assert torch.equal(function(dirty), function(rolled_out.ids))


def test_an_eos_inside_the_prompt_does_not_end_the_sequence(tiny):
    """Chat templates put eos between turns: the score still belongs to the last real token."""
    reward = tiny.rm(1)
    row = [1, tiny.eos, 2, tiny.eos]
    ids, mask = pad_prompts([row, [1] * 6], tiny.pad)
    with torch.no_grad():
        expected = reward(torch.tensor([row])).logits[0, 0]
        assert_close(rollout.sequence_scores(reward, ids, mask)[0], expected, atol=2e-5, rtol=0)


def test_actor_critic_agrees_with_the_scoring_passes(rolled_out):
    """The update's pass and the rollout's are the same numbers: ratio 1 at the first step."""
    both = layouts.ActorCritic(rolled_out.policy, rolled_out.reward)
    logprobs, entropy, values = both(
        rolled_out.ids, rolled_out.attention, rolled_out.responses, rolled_out.mask, 0.7
    )
    args = (rolled_out.ids, rolled_out.attention)
    expected = rollout.response_logprobs(rolled_out.policy, *args, rolled_out.responses, 0.7)
    assert_close(logprobs, expected, atol=1e-6, rtol=0)
    assert_close(values, rollout.token_values(rolled_out.reward, *args, rolled_out.mask))
    p = torch.distributions.Categorical(
        logits=response_logits(rolled_out.policy, *args, rolled_out.length) / 0.7
    )
    assert_close(entropy, p.entropy() * rolled_out.mask, atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad and logprobs.requires_grad and values.requires_grad


# ------------------------------------------------------------------------------------------- text


def test_decode_stops_at_eos_and_leaves_special_tokens_out(tiny):
    tokens = torch.tensor([[1, 2, tiny.eos, 3], [4, tiny.eos, tiny.pad, tiny.pad]])
    assert decode(tiny.tokenizer(), tokens) == ["w1 w2", "w4"]


def test_sampled_responses_do_not_depend_on_the_batch_size(tiny):
    model, tokenizer = tiny.lm(0, "gpt2").double(), tiny.tokenizer()
    prompts = ["w1 w2 w3", "w4", "w5 w6"]
    settings = {"samples": 2, "max_new_tokens": 6, "seed": 3}
    whole = sample_ids(model, tokenizer, prompts, **settings)
    assert whole == sample_ids(model, tokenizer, prompts, batch=1, **settings)
    assert [len(ids) for ids in whole] == [2, 2, 2]


def test_scored_texts_end_with_eos_as_in_training(tiny):
    reward, tokenizer = tiny.rm(1), tiny.tokenizer()
    got = score_texts(reward, tokenizer, ["w1", "w2 w3 w4"], ["w5 w6", "w7"], batch=2)
    rows = [[1, 5, 6, tiny.eos], [2, 3, 4, 7, tiny.eos]]
    with torch.no_grad():
        expected = torch.stack([reward(torch.tensor([row])).logits[0, 0] for row in rows])
    assert_close(got, expected, atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------- chunks and memory


class LiveLogits(TorchDispatchMode):
    """Follows every storage that holds a tensor of shape (…, vocabulary), the head's weights not.

    `peak`: the most bytes that were alive at once; `alive()`: the bytes that still are.
    """

    def __init__(self, head: torch.Tensor):
        super().__init__()
        self.vocabulary, self.peak, self.storages = len(head), 0, {}
        self.head = head.untyped_storage().data_ptr()

    def alive(self) -> int:
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == self.vocabulary:
                storage = x.untyped_storage()
                if storage.data_ptr() == self.head:
                    continue
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return out


@pytest.fixture
def scoring(tiny):
    """A function: score 8 responses `rows` at a time → (log-probs, the logits' book-keeper)."""
    model = tiny.lm(0, vocab_size=509, tie_word_embeddings=False)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (8, 12), generator=g)
    attention, responses = torch.ones_like(ids, dtype=torch.bool), ids[:, -6:]

    def score(rows):
        with torch.no_grad(), LiveLogits(model.lm_head.weight) as live:
            buckets = Executor().length_buckets(attention, rows)
            out = rollout.response_logprobs(model, ids, attention, responses, 0.7, buckets)
        return out, live

    return score


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_scoring_in_chunks_equals_scoring_at_once(scoring, rows):
    assert_close(scoring(rows)[0], scoring(8)[0], atol=1e-5, rtol=0)


def test_the_logits_of_one_chunk_are_all_that_is_ever_alive(scoring):
    """Eight chunks of one row hold an eighth of the logits of one chunk of eight rows (rule 24)."""
    logits = 4 * 8 * 6 * 509  # fp32, 8 rows, 6 positions
    (_, one), (_, all_rows) = scoring(1), scoring(8)
    assert all_rows.peak >= logits, "the book-keeper must see the logits"
    assert one.peak <= all_rows.peak / 8 + 1
    assert one.peak < logits / 2


def test_a_large_chunk_makes_its_logits_a_piece_at_a_time(scoring, monkeypatch):
    """What bounds memory where the vocabulary is large: five positions at a time, of 48."""
    whole, all_rows = scoring(8)
    monkeypatch.setattr(logprobs, "PIECE", 5 * 509)
    pieces, small = scoring(8)
    assert_close(pieces, whole, atol=1e-5, rtol=0)
    assert small.peak <= all_rows.peak * 5 / 48 + 1


def test_no_logits_survive_the_scoring_pass(scoring):
    for rows in (1, 8):
        assert scoring(rows)[1].alive() == 0


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_values_and_scores_in_passes_equal_the_whole(rolled_out, rows):
    """Log-probabilities, values and scores, whichever rows a pass has."""
    p = rolled_out
    what, least = (p.ids, p.attention, p.responses), 0
    passes = Executor().length_buckets(p.attention, rows, least)
    how = passes, Executor()
    with torch.no_grad():
        both = rollout.logprobs_and_values(p.policy, p.reward, *what, p.mask, 0.7, *how)
        found = {
            "scores": Executor().map_chunks(
                lambda i, a: rollout.sequence_scores(p.reward, i, a), passes, p.ids, p.attention
            ),
            "values": Executor().map_chunks(
                partial(rollout.token_values, p.reward), passes, p.ids, p.attention, p.mask
            ),
            "logprobs": rollout.response_logprobs(p.policy, *what, 0.7, *how),
            "of both": both[0],
        }
        hidden = rollout.response_hidden_states(p.policy, p.ids, p.attention, p.mask)
        logp = rollout.scored_logprobs(p.policy, hidden, p.responses[p.mask], 0.7)
        whole = {
            "scores": rollout.sequence_scores(p.reward, p.ids, p.attention),
            "values": rollout.token_values(p.reward, p.ids, p.attention, p.mask),
            "logprobs": rollout.scatter_masked(logp, p.mask),
        }
    whole["of both"] = whole["logprobs"]
    for name, x in found.items():
        assert_close(x, whole[name], atol=1e-5, rtol=0)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=24),
    st.integers(1, 24),
)
def test_every_row_is_moved_whole(lengths, rows):
    """Prompts padded on the left, responses on the right: a pass is given every token of its rows
    at the place where it counts, then zeros, and is as wide as the longest of them."""
    p, t = max(1, *(a for a, _ in lengths)), max(b for _, b in lengths)
    mask = torch.zeros(len(lengths), p + t, dtype=torch.bool)
    for i, (a, b) in enumerate(lengths):
        mask[i, p - a : p + b] = True
    ids = torch.arange(1, mask.numel() + 1).view(mask.shape)
    passes = Executor().length_buckets(mask, rows, least=16)
    assert sorted(i for part in passes for i in part.tolist()) == list(range(len(mask)))
    sizes = []
    for part in passes:
        assert len(part) <= rows
        moved = rollout.forward_model(lambda input_ids, **_: input_ids, ids[part], mask[part])
        sizes.append(moved.shape)
        for row, i in zip(moved, part, strict=True):
            real = ids[i][mask[i]].tolist()
            assert row.tolist() == real + [0] * (len(row) - len(real))
        assert max(sum(lengths[i]) for i in part) == moved.shape[1]
    tokens, pairs = (sum(n * s**k for n, s in sizes) for k in (1, 2))
    response_mask = mask[:, p:]
    expected = (tokens, pairs, int(response_mask.sum()), len(mask))
    assert rollout.shape_of(passes, mask, response_mask) == expected
    assert rollout.shape_of(passes, mask) == (tokens, pairs, len(mask))


def test_rows_of_a_rollout_belong_together():
    names = rollout.Rollout.__dataclass_fields__
    whole = rollout.Rollout(**{n: torch.arange(4) * 10 for n in names})
    part = whole.rows(torch.tensor([2, 0]))
    assert all(getattr(part, n).tolist() == [20, 0] for n in names)
