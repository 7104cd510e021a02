"""`rlhf_lab.stages.ppo`, as it was called up to version 0.1."""

import warnings

from rlhf_lab.ppo.trainer import PPOTrainer

__all__ = ["PPOTrainer"]
line = "rlhf_lab.stages.ppo has moved: from rlhf_lab import PPOTrainer"
warnings.warn(line, DeprecationWarning, stacklevel=2)
