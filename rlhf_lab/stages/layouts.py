"""Who plays which role in PPO.

Whatever the layout, `Roles` has four things to pass tokens through (policy, reference, value,
reward) and one module, `trained`, that accelerate wraps: the pass of the update phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .rollout import before_responses, token_values, trained_logprobs


@dataclass
class Roles:
    """The four roles of PPO, and the module whose parameters are trained."""

    policy: Any
    reference: Any
    value: Any
    reward: Any
    """None where only functions give rewards"""
    trained: nn.Module


def four_models(policy, reference, value, reward, device) -> Roles:
    """Four separate models. Raises ValueError where two of them are one."""
    if reference is policy or value is reward or value is policy:
        raise ValueError("policy, reference, reward and value model must be separate copies")
    for frozen in (reference, reward):
        if frozen is not None:
            frozen.eval().requires_grad_(False).to(device)
    trained = ActorCritic(policy, value).eval()  # eval: dropout is off in all four models (4)
    return Roles(policy, reference, value, reward, trained)


class ActorCritic(nn.Module):
    """Policy and value model as one module: the one thing that accelerate wraps."""

    def __init__(self, policy: nn.Module, value: nn.Module):
        super().__init__()
        self.policy, self.value = policy, value

    def forward(self, ids: Tensor, attention: Tensor, responses: Tensor, temperature: float):
        """→ log π (b, t), entropy (b, t), V (b, t): the pass of the update phase."""
        length = responses.shape[1]
        hidden = before_responses(self.policy, ids, attention, length)
        logprobs, spread = trained_logprobs(self.policy, hidden, responses, temperature)
        return logprobs, spread, token_values(self.value, ids, attention, length)
