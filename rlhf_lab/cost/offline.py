"""Phases of the stages that learn from a data set as it is: SFT, reward model, DPO, KTO.

As TRL's trainers run them.
"""

from __future__ import annotations

from collections import defaultdict

from . import heads
from .memory import ending, forward_peak, trunk, works
from .phases import Phase, PhaseList, RoleBytes, pass_config, policy_segments, real_tokens
from .setup import Setup
from .states import states

AROUND_REFERENCE = 150.0
"""Operations' worth of Python in TRL's loss of DPO and KTO: a dozen metrics, each gathered, and
accelerate looks up in every step whether peft is installed."""


def sft(s: Setup) -> list[Phase]:
    """Cross-entropy of the completions."""
    model, stage = s.model, PhaseList(s)
    p = pass_config(s, model, s.batch, s.length, trained=True, adapters=bool(s.lora_r))
    state = states(s, model, "lm", trained=True)
    stage.hold("policy", state)
    row = policy_segments(s, model, p, s.batch * s.response)
    before = heads.resident_bytes(model, p)
    stage.add_training("policy", row, state, before, tokens=real_tokens(s, p))
    return stage.phases


def reward(s: Setup) -> list[Phase]:
    """Both answers of a pair, in one pass or one after the other."""
    model, stage = s.model, PhaseList(s)
    passes = 1 if s.pairs_together else 2
    b = 2 * s.batch // passes
    p = pass_config(s, model, b, s.length, trained=True, adapters=bool(s.lora_r))
    state = states(s, model, "score", trained=True)
    stage.hold("reward", state)
    one = (
        *trunk(model, p, checkpoint=s.gradient_checkpointing),
        ending(model, p, heads.scores, p.tokens),
    )
    before, tokens = passes * heads.resident_bytes(model, p), passes * real_tokens(s, p)
    stage.add_training("reward", one * passes, state, before, tokens=tokens)
    return stage.phases


def dpo(s: Setup) -> list[Phase]:
    """Both answers of a pair in one pass."""
    return _against_reference(s, 2 * s.batch)


def kto(s: Setup) -> list[Phase]:
    """Single answers, and for the KL, which one loss does without, an answer to another prompt
    each, without gradients."""
    return _against_reference(s, s.batch, kl=s.loss_type != "apo_zero_unpaired")


def _against_reference(s: Setup, b: int, kl: bool = False) -> list[Phase]:
    """`b` sequences; what needs no gradient is the phase "reference", between the policy's forward
    and backward pass. With adapters the reference is the policy without them. `kl`: policy and
    reference have one more pass without gradients."""
    model, stage, adapters = s.model, PhaseList(s), bool(s.lora_r)
    p = pass_config(s, model, b, s.length, trained=True, adapters=adapters)
    state = states(s, model, "lm", trained=True)
    stage.hold("policy", state)
    role = "policy" if adapters else "reference"
    if not adapters:
        stage.hold(role, states(s, model, "lm", trained=False))
    scored = b * s.response
    row = policy_segments(s, model, p, scored)
    q = pass_config(s, model, b, s.length, trained=False)
    reference = policy_segments(s, model, q, scored, grad=False)
    before, tokens = heads.resident_bytes(model, p), real_tokens(s, p)
    work, passes = works(reference, "forward"), 1
    if kl:
        before += 3 * 8 * p.tokens  # ids and masks of the other answers
        other = pass_config(s, model, b, s.length, trained=False, adapters=adapters)
        for segments in (reference, policy_segments(s, model, other, scored, grad=False)):
            work.add(works(segments, "forward"))
        passes = 3
    peak, _ = forward_peak(reference, heads.resident_bytes(model, q))
    _, live = forward_peak(row, before)
    held: RoleBytes = defaultdict(float)
    held["policy", "activations"] += live
    held[role, "activations"] += peak[0]
    held[role, "logits"] += peak[2]
    if s.gradient_accumulation_steps > 1:
        held["policy", "gradients"] += state.gradients
    times = s.gradient_accumulation_steps
    stage.add("reference", role, others=held, work=work, times=times, tokens=passes * tokens)
    stage.add_training("policy", row, state, before, tokens=tokens, called=AROUND_REFERENCE)
    return stage.phases
