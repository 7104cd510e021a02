"""How the bundled models are built: killed and resumed, broken sentences, 16 bits, when it stops.

pytest tests/test_small_models_build.py
"""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lab.models.load import small_models_folder
from rlhf_lab.models.weights import load_causal_lm
from rlhf_lab.world import corpus
from rlhf_lab.world.generator import draw_request, write_story
from rlhf_lab.world.gold_reward import gold_parts, read_story

sys.path.insert(0, str(small_models_folder()))
import build  # noqa: E402
import growing  # noqa: E402
import pairs  # noqa: E402
import pretraining  # noqa: E402


@pytest.fixture
def quick(monkeypatch):
    """Chunks of three steps of four documents, one or two chunks a phase."""
    monkeypatch.setattr(pretraining, "CHUNK", 3)
    monkeypatch.setattr(pretraining, "BATCH", 4)


@pytest.fixture(scope="module")
def tokenizer():
    return pretraining.build_tokenizer()


def weights_of(made: pretraining.Pretraining) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in made.model.state_dict().items()}


class Killed(BaseException):
    """Nothing in the build may catch it."""


@pytest.mark.parametrize("at", [1, 3, 5, 9, 13])
def test_killed_at_any_step_and_resumed_gives_the_same_weights(
    quick, monkeypatch, tokenizer, tmp_path, at
):
    """Steps in the first chunk, on the border of two, and in the middle of later phases."""
    unbroken = pretraining.Pretraining("mini", tokenizer, 0, tmp_path / "unbroken")
    unbroken.run(most_chunks=2)
    step, done = torch.optim.AdamW.step, [0]

    def step_then_die(self, *args):
        step(self, *args)
        done[0] += 1
        if done[0] == at:
            raise Killed

    monkeypatch.setattr(torch.optim.AdamW, "step", step_then_die)
    with pytest.raises(Killed):
        pretraining.Pretraining("mini", tokenizer, 0, tmp_path / "killed").run(most_chunks=2)
    (tmp_path / "killed" / "mini-0.new").write_bytes(b"half of a state")
    resumed = pretraining.Pretraining("mini", tokenizer, 0, tmp_path / "killed")
    assert resumed.place.chunks == (at - 1) // 3, "whole chunks only"
    resumed.run(most_chunks=2)
    assert resumed.place.chunks == unbroken.place.chunks
    assert resumed.place.tokens == unbroken.place.tokens
    ours, theirs = weights_of(resumed), weights_of(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    read = [pretraining.read_stories(tmp_path / f, "mini", 0) for f in ("killed", "unbroken")]
    assert read[0] == read[1]


def test_what_another_recipe_made_is_not_gone_on_from(
    quick, monkeypatch, tokenizer, tmp_path, capsys
):
    first = pretraining.Pretraining("mini", tokenizer, 0, tmp_path)
    first.run(most_chunks=1)
    monkeypatch.setattr(pretraining, "WARMUP", 20)
    anew = pretraining.Pretraining("mini", tokenizer, 0, tmp_path)
    assert "another recipe: mini starts anew" in capsys.readouterr().out
    assert anew.place.chunks == 0
    assert not (tmp_path / "mini-0.stories").exists(), "what the first read, this one has not"
    untrained = pretraining.new_model("mini", tokenizer, 0).state_dict()
    assert all(torch.equal(weight, untrained[name]) for name, weight in weights_of(anew).items())


def test_another_seed_gives_other_weights(quick, tokenizer, tmp_path):
    ours, theirs = (pretraining.Pretraining("mini", tokenizer, seed, tmp_path) for seed in (0, 1))
    assert not torch.equal(
        ours.model.model.embed_tokens.weight, theirs.model.model.embed_tokens.weight
    )


def test_the_loss_is_that_of_transformers(tokenizer):
    """Without padding and masks of our own: the labels of what is only read are -100."""
    model = pretraining.new_model("mini", tokenizer, 0)
    documents = {"games": 0.3, "sketches": 0.3}
    batch = next(pretraining.Reader(tokenizer).batches("validation", 1, 0, documents))
    ids, learned = batch
    assert (ids == tokenizer.pad_token_id).any(), "some rows are padded"
    loss, count = pretraining.summed_loss(model, batch)
    theirs = model(
        input_ids=ids,
        attention_mask=(ids != tokenizer.pad_token_id).long(),
        labels=ids.masked_fill(~learned, -100),
    ).loss
    torch.testing.assert_close(loss / count, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ((1.0, 0.9, 0.8), False),  # too few to say
        ((1.0, 0.9, 0.8, 0.7, 0.6), False),
        ((1.0, 0.999, 0.998, 0.997, 0.996), True),  # lower by .4 %: less than .5 %
        ((1.0, 0.999, 0.998, 0.997, 0.994), False),  # lower by .6 %
        ((1.0, 0.5, 0.6, 0.6, 0.6, 0.6), True),  # the best is four chunks old
    ],
)
def test_when_the_loss_stops_falling(losses, stops):
    assert pretraining.stopped_falling(losses) is stops


def test_sizes_are_what_kernels_take():
    for size in pretraining.SIZES.values():
        assert size.width == 32 * size.heads and size.heads % size.kv_heads == 0
        assert size.width % 64 == 0 and size.mlp % 128 == 0
    assert pretraining.SIZES["small"].kv_heads < pretraining.SIZES["small"].heads


@given(st.integers(0, 10_000))
def test_a_broken_story_has_one_sentence_that_nobody_knows(seed):
    rng = random.Random(seed)
    request = draw_request(rng)
    story = write_story(request, rng, corpus.PAID)
    changed = pairs.broken(story, rng)
    before, after = ([s for s in map(str.strip, text.split(".")) if s] for text in (story, changed))
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert sum(s.kind == "unknown" for s in read_story(changed)) == 1
    grammar = [gold_parts(request.prompt, text)["grammar"] for text in (story, changed)]
    assert grammar == pytest.approx([1, 1 - 1 / len(read_story(changed))])


@pytest.mark.parametrize("text", ["", "no sentence at all", "The end."])
def test_what_has_no_sentence_to_break_stays(text):
    assert pairs.broken(text, random.Random(0)) == text


def test_16_bits_are_read_as_32(tokenizer, tmp_path):
    model = pretraining.new_model("mini", tokenizer, 0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_size
    build.store_in_16_bits(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 0.55 * before
    loaded = load_causal_lm(tmp_path, tokenizer)
    for name, weight in model.state_dict().items():
        read = loaded.state_dict()[name]
        assert read.dtype == torch.float32
        assert torch.equal(read, weight.half().float())


def test_16_bits_that_do_not_hold_a_weight_are_refused(tokenizer, tmp_path):
    model = pretraining.new_model("mini", tokenizer, 0)
    model.model.norm.weight.data[0] = 1e6
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="float16 cannot"):
        build.store_in_16_bits(tmp_path / "model.safetensors")


def test_a_part_is_made_once_and_again_when_its_sources_change(tmp_path):
    made: list[str] = []
    builder = build.Build(tmp_path / "out", tmp_path / "work", 0, 1)

    def make(name: str) -> None:
        made.append(name)
        (tmp_path / "out" / "mini" / "base").mkdir(parents=True, exist_ok=True)

    builder._part("mini/base", make, "mini", b"recipe")
    builder._part("mini/base", make, "mini", b"recipe")
    assert made == ["mini"]
    builder._part("mini/base", make, "mini", b"another recipe")
    assert made == ["mini", "mini"]
    assert list(json.loads((tmp_path / "work" / "done.json").read_text())) == ["mini/base"]


def test_without_pairs_a_size_says_what_to_build_first(tmp_path, monkeypatch):
    builder = build.Build(tmp_path / "out", tmp_path / "work", 0, 1)
    monkeypatch.setattr(builder, "_part", lambda *_: None)
    monkeypatch.setattr(builder, "_bytes_of", lambda *_: b"")
    with pytest.raises(SystemExit, match="--only tiny"):
        builder.size("mini")


def small_llama(width, layers, heads, kv_heads, mlp, tokenizer):
    size = pretraining.Size(width, layers, heads, kv_heads, mlp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pretraining.SIZES, "here", size)
        return pretraining.new_model("here", tokenizer, 1)


@pytest.mark.parametrize(
    "larger",
    [(128, 3, 4, 4, 128), (128, 2, 4, 2, 192), (96, 2, 3, 3, 64)],
    ids=["wider and deeper", "heads share keys", "by a half"],
)
def test_a_grown_model_computes_the_same_and_learns_with_all_of_it(tokenizer, larger):
    old = small_llama(64, 2, 2, 2, 64, tokenizer)
    for parameter in old.parameters():  # norms of one would hide an error
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator())
    new = small_llama(*larger, tokenizer)
    growing.grow(new, old)
    ids = torch.randint(5, 1000, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, old(ids).logits, atol=1e-3, rtol=1e-3)
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    before = [p.clone() for p in new.parameters()]
    for _ in range(3):  # what writes nothing learns to write first
        optimizer.zero_grad()
        new(ids, labels=ids).loss.backward()
        optimizer.step()
    for (name, now), was in zip(new.named_parameters(), before, strict=True):
        assert (now != was).float().mean() > 0.5, name


def test_heads_that_do_not_fit_are_refused(tokenizer):
    old = small_llama(128, 2, 4, 4, 128, tokenizer)
    with pytest.raises(ValueError, match="4 heads on 4, 32 wide, do not grow into 8 heads on 2"):
        growing.grow(small_llama(256, 2, 8, 2, 256, tokenizer), old)


def test_a_size_that_grows_needs_the_smaller_one(tmp_path):
    made = build.Build(tmp_path / "out", tmp_path / "work", seed=0, most_chunks=1)
    with pytest.raises(SystemExit, match=r"small grows from tiny: build that first \(--only tiny"):
        made.size("small")


def test_a_grown_size_begins_with_the_last_phase(quick, tokenizer, tmp_path):
    smaller = pretraining.new_model("tiny", tokenizer, 0)
    made = pretraining.Pretraining("small", tokenizer, 0, tmp_path, smaller)
    made.run(most_chunks=2)
    assert made.place.phase == list(pretraining.PHASES)[-1] and made.place.chunks == 4
    assert made.description.startswith("Begins as the base model of tiny")
