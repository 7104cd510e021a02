"""What ships: three sizes of base, SFT and reward model, one of them with a reward adapter.

pytest tests/test_small_models.py
"""

from __future__ import annotations

import json

import pytest

import rlhf_lab as lab
from rlhf_lab.models.load import BUNDLED, small_models_folder

MILLIONS = {"mini": (0.1, 0.2), "tiny": (0.4, 0.6), "small": (1.5, 2.0)}
STAGES = dict.fromkeys(MILLIONS, {"base", "sft", "reward"})
STAGES["tiny"] = STAGES["tiny"] | {"reward_adapter"}


def test_all_of_it_is_small():
    files = [p for p in small_models_folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 25e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl")], "safetensors only"


@pytest.mark.parametrize("name", BUNDLED)
def test_a_size_is_what_it_says(name):
    model = lab.load(name)
    assert model.paths.keys() == STAGES[name]
    low, high = MILLIONS[name]
    assert low <= model.base.num_parameters() / 1e6 <= high
    assert model.config.max_position_embeddings >= 512


@pytest.mark.parametrize("name", BUNDLED)
def test_every_checkpoint_has_a_card_with_recipe_seed_and_figures(name):
    for stage, folder in lab.load(name).paths.items():
        card = (small_models_folder() / name / stage / "README.md").read_text()
        assert folder.endswith(f"{name}/{stage}")
        assert "(seed 0)" in card and "Measured when it was built" in card
        assert "Pretrained on" in card or "Recipe: `rlhf-lab train" in card
        assert sum(line.startswith("- ") for line in card.splitlines()) >= 3


def test_the_reward_adapter_judges_as_its_card_says():
    """Plain peft on the SFT model: right about as many pairs, and demonstrations score about 0."""
    from peft import PeftModel

    from rlhf_lab.ppo.texts import score_texts
    from rlhf_lab.trainers.evaluate import pair_accuracy

    model, data = lab.load("tiny"), lab.load_data("stories")
    folder = small_models_folder() / "tiny" / "reward_adapter"
    reward_model = PeftModel.from_pretrained(model.new_reward(), folder).merge_and_unload()
    on_card = float((folder / "README.md").read_text().split("- accuracy: ")[1].split()[0])
    accuracy, _ = pair_accuracy(reward_model, model.tokenizer, data.preferences.test[:384])
    assert accuracy == pytest.approx(on_card, abs=0.05)
    offset = json.loads((folder / "score.json").read_text())["score_offset"]
    rows = data.sft.train[:256]
    prompts, responses = ([r[name] for r in rows] for name in ("prompt", "completion"))
    scores = score_texts(reward_model, model.tokenizer, prompts, responses)
    assert float(scores.mean()) + offset == pytest.approx(0, abs=1e-3)


def test_every_size_speaks_the_same_tokens():
    """So that rows, pairs and reward models of one size serve another."""
    texts = [
        json.loads((small_models_folder() / n / "base" / "tokenizer.json").read_text())
        for n in BUNDLED
    ]
    assert all(t["model"] == texts[0]["model"] for t in texts)
    assert all(t["added_tokens"] == texts[0]["added_tokens"] for t in texts)
