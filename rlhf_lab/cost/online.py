"""Phases of RLOO and GRPO, as TRL's trainers run them: no critic, responses in groups.

One *generation* samples `rollout_batch` responses, scores them, and is good for `updates`
optimizer steps. A phase is counted for one optimizer step, so those of a generation happen a
fraction of a time. Every log-probability comes from TRL's fused head, a pass has
`per_device_train_batch_size` rows, and transformers' sampler keeps the rows that have ended
until the last one does.
"""

from __future__ import annotations

from dataclasses import replace

from ..cost import heads
from .architecture import Architecture
from .layers import Passes
from .memory import Segment, ending, forward_peak, trunk, works
from .phases import Phase, Role, _generation, _passes, _scoring, _Stage, _tokens, sampled
from .phases import _training as training
from .setup import Setup
from .states import states

AROUND_ONLINE = 150.0
"""Operations' worth of Python in TRL's loss of RLOO and GRPO: ratios, clipping, a dozen metrics."""


def online(s: Setup) -> list[Phase]:
    """The phases of one optimizer step."""
    stage, adapters, model = _Stage(s), bool(s.lora_r), s.model
    state = states(s, model, "lm", trained=True)
    stage.stand("policy", state)
    if s.beta and not adapters:  # with adapters it is the policy without them
        stage.stand("reference", states(s, model, "lm", trained=False))
    judge = None if s.rule_reward else Role("reward", s.reward or model, False, False)
    if judge:
        stage.stand("reward", states(s, judge.model, "score", trained=False))
    _rollout(stage, s)
    if s.old_logprobs:
        _score(stage, s, "old_logprobs", "policy", _head(s, _rows(s, adapters)))
    if s.beta:
        _score(stage, s, "reference", "reference", _head(s, _rows(s, False)))
    if judge:
        bare = replace(s, padded=False)  # rows are moved to the left: no mask
        p = _rows(bare, False, judge.model)
        _score(stage, bare, "score", "reward", _scoring(s, judge, p), judge.model)
    p = _passes(s, model, s.batch, s.length, trained=True, adapters=adapters)
    training(
        stage,
        "policy",
        _head(s, p, grad=True),
        state,
        heads.standing(model, p),
        tokens=_tokens(s, p),
        called=AROUND_ONLINE,
    )
    return stage.found


def _rows(s: Setup, adapters: bool, model: Architecture | None = None) -> Passes:
    """A scoring pass."""
    return _passes(s, model or s.model, s.batch, s.length, trained=False, adapters=adapters)


def _head(s: Setup, p: Passes, grad: bool = False) -> tuple[Segment, ...]:
    """Trunk and fused head of the policy or the reference."""
    scored = s.batch * s.response
    return (
        *trunk(
            s.model,
            p,
            checkpoint=grad and s.gradient_checkpointing,
            grad=grad,
            tied=grad and s.model.tied and p.trained,
        ),
        ending(s.model, p, heads.fused, scored, grad=grad),
    )


def _score(
    stage: _Stage,
    s: Setup,
    phase: str,
    role: str,
    row: tuple[Segment, ...],
    model: Architecture | None = None,
) -> None:
    """A pass without gradients over all rows of a generation, `batch` at a time."""
    p = _rows(s, False, model)
    peak, _ = forward_peak(row, heads.standing(model or s.model, p))
    stage.phase(
        phase,
        role,
        activations=peak[0],
        logits=peak[2],
        work=works(row, "forward"),
        times=s.rollout_batch / s.batch / s.updates,
        tokens=_tokens(s, p),
    )


def _rollout(stage: _Stage, s: Setup) -> None:
    """Sampling by transformers' `generate`: no row leaves before the last one has ended."""
    (first, work), (last, decoding) = _generation(replace(s, mean_response=None))
    work.add(decoding)
    cache, activations, logits = max(first, last, key=sum)
    stage.phase(
        "rollout",
        "policy",
        kv_cache=cache,
        activations=activations,
        logits=logits,
        work=work,
        times=1 / s.updates,
        tokens=s.rollout_batch * sampled(s),
    )
