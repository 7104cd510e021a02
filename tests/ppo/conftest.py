"""What the tests of PPO share: a trainer on four tiny random models."""

import pytest
from ppo_kit import PROMPTS, T

from rlhf_lab.ppo.config import PPOConfig
from rlhf_lab.ppo.trainer import PPOTrainer


@pytest.fixture
def make(tiny, tmp_path):
    """`make(**settings)` → a PPOTrainer on four tiny random models and eight prompts.

    The value model is a copy of the reward model. `models` and `extra` replace arguments.
    """

    def make(kind="llama", models=None, extra=None, **settings):
        settings = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "response_length": 8,
            "total_episodes": 24,
            "learning_rate": 1e-2,
            "num_ppo_epochs": 2,
            "temperature": T,
            "report_to": "none",
            **settings,
        }
        models = {
            "model": tiny.lm(0, kind),
            "ref_model": None,
            "reward_model": tiny.rm(1, kind),
            "value_model": tiny.rm(1, kind),
            **(models or {}),
        }
        rows = [{"prompt": p, "number": i} for i, p in enumerate(PROMPTS)]
        arguments = {"train_dataset": rows, "processing_class": tiny.tokenizer(), **(extra or {})}
        return PPOTrainer(PPOConfig(**settings), **models, **arguments)

    return make
