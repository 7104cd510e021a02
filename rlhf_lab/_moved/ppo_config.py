"""`rlhf_lab.stages.ppo_config`, as it was called up to version 0.1."""

import warnings

from rlhf_lab.ppo.config import PPOConfig

__all__ = ["PPOConfig"]
line = "rlhf_lab.stages.ppo_config has moved: from rlhf_lab import PPOConfig"
warnings.warn(line, DeprecationWarning, stacklevel=2)
