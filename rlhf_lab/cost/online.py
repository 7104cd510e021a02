"""Phases of RLOO, GRPO and distillation, as TRL's trainers run them: no critic.

One *generation* samples `rollout_batch` responses, scores them, and is good for `updates`
optimizer steps. A phase is counted for one optimizer step, so those of a generation happen a
fraction of a time. Every log-probability comes from TRL's fused head, a pass has
`per_device_train_batch_size` rows, and transformers' sampler keeps the rows that have ended
until the last one does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import heads
from .architecture import Architecture
from .generation import add_engine, add_rollout, sampled
from .layers import PassConfig
from .memory import ending, trunk, works
from .phases import Phase, PhaseList, RoleBytes, pass_config, policy_segments, real_tokens
from .setup import Setup
from .sharding import Row, between, forward, passing
from .states import states

AROUND_ONLINE = 150.0
"""Operations' worth of Python in TRL's loss of RLOO and GRPO: ratios, clipping, a dozen metrics."""


def rloo_grpo(s: Setup) -> list[Phase]:
    """Rollout, scoring, and passes that learn from a generation."""
    s = replace(s, loss="fused")  # TRL's trainers have no other
    stage, adapters, model = PhaseList(s), bool(s.lora_r), s.model
    scored = s.batch * s.response
    learner = stage.hold_trained("policy", model, s.batch)
    if s.beta and not adapters:  # with adapters it is the policy without them
        stage.hold("reference", states(s, model, "lm", trained=False))
    reward = None if s.rule_reward else s.reward or model
    if reward:
        stage.hold("reward", states(s.whole, reward, "score", trained=False))
    # transformers' `generate`: no row leaves before the last one has ended.
    tokens = s.rollout_batch * sampled(s)
    if s.use_vllm:
        add_engine(stage, 1 / s.updates, tokens)
    else:
        add_rollout(stage, replace(s, mean_response=None), times=1 / s.updates, tokens=tokens)
    times = s.rollout_batch / s.batch / s.updates
    passes: dict[str, Any] = {"times": times, "tokens": real_tokens(s, s.batch, s.length)}
    if s.old_logprobs:
        p = _rows(s, model, adapters)
        row = policy_segments(s, model, p, scored, grad=False)
        stage.add_scoring("old_logprobs", "policy", row, model, p, **passes)
    if s.beta:
        p = _rows(s, model)
        row = policy_segments(s, model, p, scored, grad=False)
        stage.add_scoring("reference", "reference", row, model, p, **passes)
    if reward:
        p = _rows(s.whole, reward, mask=False)
        row = (*trunk(reward, p, grad=False), ending(reward, p, heads.scores, p.b, grad=False))
        stage.add_scoring("score", "reward", row, reward, p, **passes)
    row = policy_segments(s, model, learner, scored)
    stage.add_training("policy", row, model, learner, called=AROUND_ONLINE)
    return stage.phases


def distill(s: Setup) -> list[Phase]:
    """A rollout for each optimizer step; then in every pass the student, the teacher, and the
    divergence of the two, whose logits are made a tile at a time."""
    if s.distill_from != "student":
        return _from_answers(s)
    stage, student, teacher = PhaseList(s), s.model, s.teacher or s.model
    scored = s.batch * s.response
    p = stage.hold_trained("student", student, s.batch)
    stage.hold("teacher", states(s.whole, teacher, "lm", trained=False))
    tokens = s.rollout_batch * sampled(s)
    add_rollout(stage, replace(s, mean_response=None), tokens=tokens, role="student")
    q = pass_config(s.whole, teacher, s.batch, s.length, trained=False)
    tied = student.tied and p.trained
    row = (
        *trunk(student, p, checkpoint=s.checkpoint, tied=tied),
        ending(student, p, heads.divergence, teacher, scored, 0 < s.beta < 1),
    )
    taught = (*trunk(teacher, q, grad=False), ending(teacher, q, heads.hidden, scored, grad=False))
    before, tokens = heads.resident_bytes(student, p), real_tokens(s, p.b, p.s)
    own, times = [Row(row, state := stage.state("student"))], s.gradient_accumulation_steps
    here, _ = forward(s, [Row(taught, stage.state("teacher"))], heads.resident_bytes(teacher, q))
    _, live = forward(s, own, before)
    held: RoleBytes = {("student", "activations"): live}
    held["student", "communication"] = between(s, own)
    if times > 1:
        held["student", "gradients"] = state.held
    stage.add(
        "teacher",
        "teacher",
        here.kinds,
        others=held,
        communication=here.whole,
        work=works(taught, "forward"),
        times=times,
        tokens=tokens,
        sent=passing(s, stage.state("teacher"), times),
    )
    stage.add_training("student", row, student, p, called=AROUND_ONLINE)
    return stage.phases


def _from_answers(s: Setup) -> list[Phase]:
    """Before training the teacher answers every prompt, once, beside the student's weights; then
    the student learns alone, from logits as our PPO's. Of the answers an optimizer step has the
    share that is new in it."""
    asked, stage, student = PhaseList(s), PhaseList(s), s.model
    teacher = replace(s.whole, model=s.teacher or student, lora_r=0)
    asked.hold("student", states(s, student, "lm", trained=False))
    asked.hold("teacher", states(teacher, teacher.model, "lm", trained=False))
    used = s.steps * s.rollout_batch * s.replicas if s.steps else (s.rows or 0) * s.epochs
    once = min(1.0, s.rows / used) if s.rows and used else 1.0
    tokens = s.rollout_batch * sampled(s)
    add_rollout(asked, teacher, times=once, tokens=tokens, role="teacher")
    if s.distill_from == "logits":
        p = _rows(teacher, teacher.model, mask=False)._replace(b=s.rollout_batch)
        end = ending(teacher.model, p, heads.log_probabilities, s.response, False, grad=False)
        row, tokens = (*trunk(teacher.model, p, grad=False), end), real_tokens(s, p.b, p.s)
        asked.add_scoring("teacher", "teacher", row, teacher.model, p, times=once, tokens=tokens)
    p = stage.hold_trained("student", student, s.batch)
    row = (
        *trunk(student, p, checkpoint=s.checkpoint, tied=student.tied and p.trained),
        ending(student, p, heads.log_probabilities, s.response, True),
    )
    stage.add_training("student", row, student, p, called=AROUND_ONLINE)
    return [*asked.phases, *stage.phases]


def _rows(s: Setup, model: Architecture, adapters: bool = False, mask: bool = True) -> PassConfig:
    """A scoring pass over rows of a generation, `batch` at a time."""
    how = {"trained": False, "adapters": adapters, "mask": mask}
    return pass_config(s, model, s.batch, s.length, **how)


def of_teacher(student: Architecture, teacher: Architecture | None) -> list[str]:
    """What must be known of the teacher before figures are read."""
    if teacher is None:
        return ["no teacher is named: planned with one of the student's size"]
    if teacher.family == student.family:
        return []
    return [
        f"a teacher of another family ({teacher.family}) reads other tokens, as a rule: training "
        "refuses it then"
    ]
