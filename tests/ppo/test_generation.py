"""Generation with a cache against whole passes: no cache, no batch, one token at a time."""

import pytest
import torch
from ppo_kit import ARCHITECTURES, PROMPT_IDS, keys_of, respond
from transformers import MistralConfig, MistralForCausalLM

from rlhf_lab.ppo.sampling import generate, pad_prompts, uniforms


@torch.no_grad()
def naive_response(model, prompt, key, length, stop, temperature):
    """One response without cache, batch or padding: a whole forward pass for every token."""
    response = []
    for position in range(length):
        logits = model(torch.tensor([prompt + response])).logits[0, -1].double()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            u = float(uniforms(key[None], position))
            p = (logits / temperature).softmax(0).tolist()
            token = next(i for i in range(len(p)) if sum(p[: i + 1]) >= u)
        response.append(token)
        if token == stop:
            break
    return response


@pytest.mark.parametrize("temperature", [0, 0.7, 1.3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_generation_with_a_cache_equals_recomputing_everything(tiny, kind, temperature):
    model = tiny.lm(0, kind).double()
    prompts = PROMPT_IDS * 2
    ids, mask = pad_prompts(prompts, tiny.pad)
    keys = keys_of(len(prompts))
    out = generate(
        model,
        ids,
        mask,
        keys,
        max_new_tokens=10,
        stop_token_ids=tiny.eos,
        pad_token_id=tiny.pad,
        temperature=temperature,
    )
    for row, prompt in enumerate(prompts):
        response = naive_response(model, prompt, keys[row], 10, tiny.eos, temperature)
        assert out[row].tolist() == response + [tiny.pad] * (out.shape[1] - len(response))


class Counting(torch.nn.Module):
    """Passes everything on and writes down how many rows each call had."""

    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, []

    def forward(self, **kwargs):
        self.rows.append(len(kwargs["input_ids"]))
        return self.model(**kwargs)


def test_a_row_leaves_the_batch_when_it_has_stopped(tiny):
    """As many row passes as there are real tokens: nothing is computed for finished rows."""
    counting = Counting(tiny.lm(0))
    *_, responses, mask = respond(tiny, counting, length=10, prompts=PROMPT_IDS * 3)
    assert len(set(mask.sum(1).tolist())) > 2, "the test needs responses of different lengths"
    assert counting.rows == mask.sum(0).tolist()


def test_a_prompt_of_several_responses_passes_once(tiny):
    """Its keys and values are copied, not computed again; the responses stay what they were."""
    counting = Counting(tiny.lm(0).double())
    ids, mask = pad_prompts(PROMPT_IDS, tiny.pad)
    of = torch.arange(len(PROMPT_IDS)).repeat_interleave(3)
    of = of[torch.randperm(len(of), generator=torch.Generator().manual_seed(0))][:-1]
    how = {"max_new_tokens": 8, "stop_token_ids": tiny.eos, "pad_token_id": tiny.pad}
    apart = generate(counting, ids[of], mask[of], keys_of(len(of)), **how)
    first = len(counting.rows)
    once = generate(counting, ids, mask, keys_of(len(of)), prompt_of=of, **how)
    assert once.tolist() == apart.tolist()
    assert counting.rows[first:] == [len(PROMPT_IDS), *counting.rows[1:first]]


@pytest.mark.parametrize(
    ("kind", "settings", "ready"),
    [
        ("llama", {}, True),
        ("llama", {"attn_implementation": "eager"}, False),
        ("gpt2", {}, False),  # counts positions, where none are given, from the mask
        ("sliding", {}, False),  # a layer with a window has a mask of its own
    ],
)
def test_the_mask_is_made_once_where_only_attention_reads_it(tiny, kind, settings, ready):
    """As transformers makes it from (b, s) in every step: the same responses."""
    if kind == "sliding":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)).eval()
    else:
        model = tiny.lm(0, kind)
    if settings:
        model.set_attn_implementation(**settings)
    ids, mask = pad_prompts(PROMPT_IDS, tiny.pad)
    keys, masks = keys_of(len(PROMPT_IDS)), list[int]()

    def note(module, args, kwargs):
        masks.append(kwargs["attention_mask"].dim())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    how = {"max_new_tokens": 6, "stop_token_ids": None, "pad_token_id": tiny.pad}
    made = generate(model, ids, mask, keys, **how)
    hook.remove()
    assert masks == [2] + 5 * [4 if ready else 2]
    assert made.tolist() == generate(Counting(model), ids, mask, keys, **how).tolist()


def test_generation_ends_with_the_last_row(tiny):
    """A stop token that always comes first: one step, a width of one."""
    model = tiny.lm(0)
    ids, mask = pad_prompts([[1, 2, 3]], tiny.pad)
    with torch.no_grad():
        likeliest = int(model(ids).logits[0, -1].argmax())
    out = generate(
        model,
        ids,
        mask,
        keys_of(1),
        max_new_tokens=10,
        stop_token_ids=likeliest,
        pad_token_id=tiny.pad,
        temperature=0,
    )
    assert out.tolist() == [[likeliest]]


def test_without_a_stop_token_every_response_has_full_length(tiny):
    ids, mask = pad_prompts(PROMPT_IDS, tiny.pad)
    out = generate(
        tiny.lm(0),
        ids,
        mask,
        keys_of(4),
        max_new_tokens=9,
        stop_token_ids=None,
        pad_token_id=tiny.pad,
    )
    assert out.shape == (4, 9)


def test_generation_keeps_no_gradient_and_no_mode(tiny):
    model = tiny.lm(0)
    *_, responses, _ = respond(tiny, model)
    assert not responses.requires_grad and not model.training
