"""The bundled world: its stories, their gold reward, the annotator and the text to learn from.

pytest tests/world/test_world.py
"""

import importlib.util
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lab.models.load import small_models_folder
from rlhf_lab.world import corpus, generator
from rlhf_lab.world import gold_reward as gold_module
from rlhf_lab.world.gold_reward import (
    GOLD_PARTS,
    WEIGHTS,
    Annotator,
    accuracy_ceiling,
    gold_parts,
    gold_reward,
)

_spec = importlib.util.spec_from_file_location(
    "pretraining_text", small_models_folder() / "pretraining_text.py"
)
pretraining_text = importlib.util.module_from_spec(_spec)  # it lies beside build.py, its only user
_spec.loader.exec_module(pretraining_text)

REQUEST = generator.Request("happy", "fox", "kite", "forest")
STORY = (
    "Once a fox named Mira lived in the forest. One day she found a red kite. "
    "She hugged the kite and smiled. The sun shone over the forest. "
    "Mira went home with a happy heart. The end."
)


def parts_of(story: str, request: generator.Request = REQUEST) -> dict[str, float]:
    return gold_parts(request.prompt, story)


# ------------------------------------------------------------------------------ requests, stories


@given(st.integers(0, 10**9))
def test_a_request_survives_its_wording(seed):
    request = generator.draw_request(random.Random(seed))
    assert generator.read_request(request.prompt) == request


def test_other_text_is_no_request():
    assert generator.read_request("What is the capital of France?") is None
    with pytest.raises(ValueError, match="not of this world"):
        gold_reward("What is the capital of France?", STORY)


@given(st.integers(0, 10**9))
def test_a_careful_writer_scores_the_full_ten(seed):
    rng = random.Random(seed)
    request = generator.draw_request(rng)
    assert gold_reward(request.prompt, generator.write_story(request, rng)) == pytest.approx(10)


def test_the_same_seed_writes_the_same_text():
    assert corpus.demonstrations("train", 20, 3) == corpus.demonstrations("train", 20, 3)
    assert corpus.demonstrations("train", 20, 3) != corpus.demonstrations("train", 20, 4)
    assert pretraining_text.web_text("train", 5, 1) == pretraining_text.web_text("train", 5, 1)


def count_stories() -> int:
    """Number of distinct stories without slips, counted from the templates (a lower bound)."""
    heroes = (
        len(generator.ANIMALS)
        * len(generator.SHE + generator.HE)
        * len(generator.PLACES)
        * len(generator.OBJECTS)
        * len(generator.ADJECTIVES)
    )
    # An event and a scene come in either order; every mood has its own of each, and of closes.
    plots = sum(
        2 * len(generator.EVENTS[m]) * len(generator.SCENES[m]) * len(generator.CLOSES[m])
        for m in generator.MOODS
    )
    return heroes * len(generator.TIMES) * len(generator.OPENINGS) * len(generator.FINDS) * plots


def test_there_are_more_than_a_million_stories():
    """Counted from the templates; and ten thousand drawn stories of one request all but differ."""
    assert count_stories() >= 10**6
    rng = random.Random(0)
    drawn = {generator.write_story(generator.draw_request(rng), rng) for _ in range(10_000)}
    assert len(drawn) > 9_900


# ------------------------------------------------------------------------------- the gold reward


def test_weights_add_up_to_ten_and_name_every_part():
    assert set(WEIGHTS) == set(GOLD_PARTS) and sum(WEIGHTS.values()) == 10


def test_the_example_story_has_every_part_whole():
    assert parts_of(STORY) == dict.fromkeys(GOLD_PARTS, 1.0)


@pytest.mark.parametrize(
    ("part", "wrong", "right", "value"),
    [
        ("follows", "a fox named", "an owl named", 2 / 3),
        ("follows", "a red kite", "a red drum", 2 / 3),
        # One of three moods is wrong: (2 right − 1 wrong) / 3.
        ("mood", "Mira went home with a happy heart", "Mira never smiled again", 1 / 3),
        # Mentions after their introduction: she, kite, she, forest, Mira. One of five is wrong.
        ("coherence", "The sun shone over the forest", "The sun shone over the cave", 4 / 5),
        ("coherence", "She hugged", "He hugged", 4 / 5),
        ("grammar", "She hugged the kite and smiled", "Kite the smiled hugged", 5 / 6),
        ("ends", " The end.", "", 0.0),
        ("ends", "The end.", "The sun shone over the forest. The end.", 0.5),
        ("ends", "The end.", "The end. The end.", 0.0),
        ("fresh", "The end.", "Mira went home with a happy heart. The end.", 0.5),
    ],
)
def test_each_part_by_hand(part, wrong, right, value):
    assert parts_of(STORY.replace(wrong, right))[part] == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["", " ", ".", "...", "The end.", "the the the", "\n\n", "a. b. c."]
)
def test_nothing_scores_well_without_a_story(text):
    assert 0 <= gold_reward(REQUEST.prompt, text) <= 4


@given(st.text(max_size=200))
def test_any_text_has_a_reward_between_0_and_10(text):
    parts = parts_of(text)
    assert all(0 <= value <= 1 for value in parts.values())


# ---------------------------------------------------------------------------------- the annotator


def test_the_annotator_is_bradley_terry():
    """P = sigmoid(gap / temperature), by hand: a story without its end loses one point."""
    worse = STORY.replace(" The end.", "")
    gap = gold_reward(REQUEST.prompt, STORY) - gold_reward(REQUEST.prompt, worse)
    p = Annotator(temperature=0.5).prefers_first(REQUEST.prompt, STORY, worse)
    assert p == pytest.approx(1 / (1 + math.exp(-gap / 0.5)))


def test_a_long_winded_annotator_can_prefer_the_worse():
    worse = STORY.replace("The end.", "Cold rain fell over the forest. " * 3)
    plain, biased = Annotator(), Annotator(length_bias=1.0)
    assert plain.prefers_first(REQUEST.prompt, STORY, worse) > 0.5
    assert biased.prefers_first(REQUEST.prompt, STORY, worse) < 0.5


def test_labels_do_not_depend_on_their_order():
    annotator, worse = Annotator(seed=3), STORY.replace(" The end.", "")
    alone = annotator.label(7, REQUEST.prompt, STORY, worse)
    annotator.label(6, REQUEST.prompt, worse, STORY)
    assert annotator.label(7, REQUEST.prompt, STORY, worse) == alone


def labelled(annotator: Annotator, count: int) -> list[dict]:
    """Pairs of stories by paid writers, as the annotator prefers them."""
    rng, rows = random.Random(0), []
    for i in range(count):
        request = generator.draw_request(rng)
        a, b = (generator.write_story(request, rng, corpus.PAID) for _ in range(2))
        rows.append(annotator.label(i, request.prompt, a, b))
    return rows


def test_the_ceiling_is_what_a_model_that_knows_the_gold_reaches():
    """Labels of many pairs, compared by the gold reward itself: its accuracy is the ceiling."""
    annotator = Annotator(seed=1)
    rows = labelled(annotator, 4000)
    ceiling = accuracy_ceiling(rows, annotator)
    gaps = [
        gold_reward(r["prompt"], r["chosen"]) - gold_reward(r["prompt"], r["rejected"])
        for r in rows
    ]
    reached = sum((g > 0) + 0.5 * (g == 0) for g in gaps) / len(gaps)
    assert reached == pytest.approx(ceiling, abs=3 * 0.5 / math.sqrt(len(rows)))


def test_the_ceiling_of_the_default_annotator_lies_between_75_and_85_percent():
    annotator = Annotator()
    rows = labelled(annotator, 2000)
    assert 0.75 <= accuracy_ceiling(rows, annotator) <= 0.85


# ---------------------------------------------------------------------------------------- splits


def test_splits_share_no_story_and_no_request():
    seen = {}
    for split in corpus.SPLITS:
        rows = corpus.demonstrations(split, 1500, seed=5)
        seen[split] = (
            {r["completion"] for r in rows},
            {str(generator.read_request(r["prompt"])).split(", wording")[0] for r in rows},
        )
    for a in seen:
        for b in seen:
            if a != b:
                assert not seen[a][0] & seen[b][0] and not seen[a][1] & seen[b][1]


def test_memorised_share_counts_word_for_word_copies():
    known = {pretraining_text.digest(text) for text in (STORY + " ", "another", "")}
    assert pretraining_text.memorised_share([STORY, "new story.", "", STORY], known) == 0.5


def test_readers_name_the_faults_a_story_has():
    """By hand: another animal (a goat, at the start and in the close) and a repeated sentence."""
    wrong = STORY.replace("fox", "goat").replace(
        "The sun shone over the forest.", "She hugged the kite and smiled."
    )
    faults = pretraining_text.faults_of(REQUEST, wrong)
    assert {a for a, fault in faults.items() if fault} == {"animal", "length"}
    assert faults["animal"] == 1 and faults["length"] == pytest.approx(2 * 0.25)
    assert not any(pretraining_text.faults_of(REQUEST, STORY).values())


@given(st.integers(0, 10**6))
def test_a_verdict_is_never_against_a_certain_truth(seed):
    verdict = pretraining_text.verdict({"animal": 1.0, "place": 0.0}, random.Random(seed))
    assert verdict in {"animal wrong", "place right"}


def test_half_of_the_readers_speak_of_a_fault_they_saw():
    rng = random.Random(0)
    verdicts = [pretraining_text.verdict({"animal": 1.0, "place": 0.0}, rng) for _ in range(4000)]
    # Half speak of the one fault there is, the other half of either aspect at random.
    assert verdicts.count("animal wrong") / 4000 == pytest.approx(0.75, abs=0.03)


def test_grades_grow_better_with_the_story():
    """A perfect story is called great, a hopeless one awful; other comments are verdicts."""
    rng = random.Random(0)
    grades = {*pretraining_text.GRADES.values(), pretraining_text.BEST_GRADE}
    for story, right in ((STORY, {"great", "good"}), ("the the the", {"awful"})):
        texts = [c for _ in range(100) for c in pretraining_text.comments(REQUEST, story, rng)]
        assert {c for c in texts if c in grades} <= right
        assert sum(c in grades for c in texts) / 400 == pytest.approx(0.4, abs=0.08)
        assert all(c.split()[1] in ("right", "wrong") for c in texts if c not in grades)


def story_documents(documents) -> list:
    """(request, story, comments) of every document that has a heading."""
    stories = []
    for (heading, _), (story, _), *pieces in documents:
        comments = [text for text, learned in pieces if learned]
        stories.append(
            (generator.read_request(heading), story.removesuffix(pretraining_text.END), comments)
        )
    return stories


def animals_kept(documents) -> float:
    """Share of stories whose first sentence has the animal of their heading."""
    stories = story_documents(documents)
    return sum(
        gold_module.read_story(s)[0].slots.get("animal") == r.animal for r, s, _ in stories
    ) / len(stories)


def test_web_stories_heed_their_heading_as_their_writers_do():
    """The animal in the first sentence is the one asked for as often as computed by hand."""
    paid, heedless = 1 - corpus.PAID.animal, 1 - pretraining_text.HEEDLESS.animal
    documents = pretraining_text.web_text("train", 1500, 3)
    assert all(len(comments) == 4 for _, _, comments in story_documents(documents))
    assert animals_kept(documents) == pytest.approx((paid + heedless) / 2, abs=0.04)
    # A misfiled story shares the animal of its heading by chance, one time in ten.
    documents = pretraining_text.web_text("train", 1500, 3, misfiled=0.5)
    assert animals_kept(documents) == pytest.approx((paid + 0.1) / 2, abs=0.04)
    assert animals_kept(pretraining_text.web_text("train", 300, 3, faithful=True)) == 1.0


def test_a_sketch_is_two_sentences_and_a_verdict_on_each_noun_faults_first():
    for request, story, comments in story_documents(
        pretraining_text.web_text("train", 50, 3, sketches=1.0)
    ):
        kinds = [s.kind for s in gold_module.read_story(story)]
        assert kinds in (["opening", "find"], ["opening", "opening"])  # the second by a repeat
        faults, nouns = pretraining_text.faults_of(request, story), ("animal", "place", "object")
        assert set(comments) == {f"{noun} {'wrong' if faults[noun] else 'right'}" for noun in nouns}
        assert comments == sorted(comments, key=lambda comment: "right" in comment)


@given(st.integers(0, 10**6))
def test_a_memory_game_calls_again_what_came_before(seed):
    document = pretraining_text.memory_game(random.Random(seed))
    words, calls = document[::2], document[1::2]
    assert not any(learned for _, learned in words) and all(learned for _, learned in calls)
    for at, (word, _) in enumerate(words):
        assert calls[at][0] == (" again" if (word, False) in words[:at] else " new")


def test_the_shares_of_web_text_are_shares_of_all_documents():
    documents = pretraining_text.web_text("train", 2000, 4, games=0.5, sketches=0.25)
    stories = story_documents(d for d in documents if not d[0][0].startswith(" "))
    sketches = sum(len(comments) == 3 for _, _, comments in stories)
    assert len(stories) / 2000 == pytest.approx(0.5, abs=0.04)
    assert sketches / 2000 == pytest.approx(0.25, abs=0.04)


def test_every_sentence_of_every_bank_is_read_back():
    kinds = {s.kind for s in gold_module.read_story(STORY)}
    assert kinds == {"opening", "find", "event", "scene", "close", "end"}
    for bank in (generator.EVENTS, generator.SCENES, generator.CLOSES):
        assert set(bank) == set(generator.MOODS)
