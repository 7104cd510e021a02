"""Phases of the stages that learn from a data set as it is: SFT, reward model, DPO, KTO.

As TRL's trainers run them.
"""

from __future__ import annotations

from collections import defaultdict

from . import heads
from .memory import ending, trunk, works
from .phases import Phase, PhaseList, RoleBytes, pass_config, policy_segments, real_tokens
from .setup import Setup
from .sharding import Row, between, forward, passing
from .states import states
from .work import Work

AROUND_REFERENCE = 150.0
"""Operations' worth of Python in TRL's loss of DPO and KTO: a dozen metrics, each gathered, and
accelerate looks up in every step whether peft is installed."""


def sft(s: Setup) -> list[Phase]:
    """Cross-entropy of the completions."""
    model, stage = s.model, PhaseList(s)
    p = stage.hold_trained("policy", model, s.batch)
    stage.add_training("policy", policy_segments(s, model, p, s.batch * s.response), model, p)
    return stage.phases


def reward(s: Setup) -> list[Phase]:
    """Both answers of a pair, in one pass or one after the other."""
    model, stage = s.model, PhaseList(s)
    passes = 1 if s.pairs_together else 2
    p = stage.hold_trained("reward", model, 2 * s.batch // passes, "score")
    one = (*trunk(model, p, checkpoint=s.checkpoint), ending(model, p, heads.scores, p.tokens))
    stage.add_training("reward", one, model, p, passes=passes)
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
    reference have one more pass without gradients. With `precompute_ref_log_probs` the reference
    passes over the data once, before training, and under FSDP alone its weights stay."""
    model, stage, adapters = s.model, PhaseList(s), bool(s.lora_r)
    p = stage.hold_trained("policy", model, b)
    state = stage.state("policy")
    kept = not adapters and (not s.precompute_ref_log_probs or s.sharding == "fsdp2")
    role = "reference" if kept else "policy"
    if kept:
        stage.hold(role, states(s, model, "lm", trained=False))
    scored = b * s.response
    row = policy_segments(s, model, p, scored)
    q = pass_config(s, model, b, s.length, trained=False)
    reference = policy_segments(s, model, q, scored, grad=False)
    tokens, others = real_tokens(s, p.b, p.s), 0
    once, first = works(reference, "forward"), s.precompute_ref_log_probs
    ahead = Work()  # of the reference, before training begins
    beside = Work()  # without gradients, inside of the step
    (ahead if first else beside).add(once, 2 if kl else 1)
    if kl:
        others = 3 * 8 * p.tokens  # ids and masks of the other answers
        other = pass_config(s, model, b, s.length, trained=False, adapters=adapters)
        beside.add(works(policy_segments(s, model, other, scored, grad=False), "forward"))
    own, times = [Row(row, state)], s.gradient_accumulation_steps
    here, _ = forward(s, [Row(reference, stage.state(role))], heads.resident_bytes(model, q))
    _, live = forward(s, own, heads.resident_bytes(model, p) + others)
    held: RoleBytes = defaultdict(float)
    held[role, "activations"] += here.kinds[0]
    held[role, "logits"] += here.kinds[2]

    def add(work: Work, passes: int, times: float) -> None:
        sent = passing(s, stage.state(role), passes * times)
        stage.add(
            "reference",
            role,
            others=held,
            communication=here.whole,
            work=work,
            times=times,
            tokens=passes * tokens,
            sent=sent,
        )

    passes = 3 if kl else 1
    if first:
        of_reference = 2 if kl else 1
        add(ahead, of_reference, times / max(1.0, s.epochs))
        passes -= of_reference
    if passes:
        held["policy", "activations"] += live
        held["policy", "communication"] += between(s, own)
        if times > 1:
            held["policy", "gradients"] += state.held
        add(beside, passes, times)
    stage.add_training("policy", row, model, p, others, called=AROUND_REFERENCE)
    return stage.phases
