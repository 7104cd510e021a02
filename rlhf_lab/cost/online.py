"""Phases of RLOO and GRPO, as TRL's trainers run them: no critic, responses in groups.

One *generation* samples `rollout_batch` responses, scores them, and is good for `updates`
optimizer steps. A phase is counted for one optimizer step, so those of a generation happen a
fraction of a time. Every log-probability comes from TRL's fused head, a pass has
`per_device_train_batch_size` rows, and transformers' sampler keeps the rows that have ended
until the last one does.
"""

from __future__ import annotations

from dataclasses import replace

from . import heads
from .architecture import Architecture
from .generation import add_engine, add_rollout, sampled
from .layers import PassConfig
from .memory import ending, trunk
from .phases import Phase, PhaseList, pass_config, policy_segments, real_tokens
from .setup import Setup
from .states import states

AROUND_ONLINE = 150.0
"""Operations' worth of Python in TRL's loss of RLOO and GRPO: ratios, clipping, a dozen metrics."""


def rloo_grpo(s: Setup) -> list[Phase]:
    """Rollout, scoring, and passes that learn from a generation."""
    s = replace(s, loss="fused")  # TRL's trainers have no other
    stage, adapters, model = PhaseList(s), bool(s.lora_r), s.model
    scored = s.batch * s.response
    state = states(s, model, "lm", trained=True)
    stage.hold("policy", state)
    if s.beta and not adapters:  # with adapters it is the policy without them
        stage.hold("reference", states(s, model, "lm", trained=False))
    reward = None if s.rule_reward else s.reward or model
    if reward:
        stage.hold("reward", states(s, reward, "score", trained=False))
    # transformers' `generate`: no row leaves before the last one has ended.
    tokens = s.rollout_batch * sampled(s)
    if s.use_vllm:
        add_engine(stage, 1 / s.updates, tokens)
    else:
        add_rollout(stage, replace(s, mean_response=None), times=1 / s.updates, tokens=tokens)
    times = s.rollout_batch / s.batch / s.updates
    passes = {"times": times, "tokens": real_tokens(s, _rows(s, model))}
    if s.old_logprobs:
        p = _rows(s, model, adapters)
        row = policy_segments(s, model, p, scored, grad=False)
        stage.add_scoring("old_logprobs", "policy", row, model, p, **passes)
    if s.beta:
        p = _rows(s, model)
        row = policy_segments(s, model, p, scored, grad=False)
        stage.add_scoring("reference", "reference", row, model, p, **passes)
    if reward:
        p = _rows(replace(s, padded=False), reward)  # rows are moved to the left: no mask
        row = (*trunk(reward, p, grad=False), ending(reward, p, heads.scores, p.b, grad=False))
        stage.add_scoring("score", "reward", row, reward, p, **passes)
    p = pass_config(s, model, s.batch, s.length, trained=True, adapters=adapters)
    row, before = policy_segments(s, model, p, scored), heads.resident_bytes(model, p)
    tokens = real_tokens(s, p)
    stage.add_training("policy", row, state, before, tokens=tokens, called=AROUND_ONLINE)
    return stage.phases


def _rows(s: Setup, model: Architecture, adapters: bool = False) -> PassConfig:
    """A scoring pass over rows of a generation, `batch` at a time."""
    return pass_config(s, model, s.batch, s.length, trained=False, adapters=adapters)
