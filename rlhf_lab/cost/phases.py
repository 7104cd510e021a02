"""Memory of each phase of each stage: which models stand there, and what the phase adds.

A `Role` is a model with a part to play: how it is run, with which head, trained or frozen. The
order of passes is that of the code that trains: TRL's SFT, reward and DPO trainers, our PPO.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..cost import heads
from .architecture import Architecture
from .layers import Passes
from .memory import Segment, backward_peak, ending, forward_peak, trunk, works
from .setup import Setup
from .states import State, adapter_state, states
from .tape import Work

Key = tuple[str, str]
AROUND_DPO = 150.0
"""Operations' worth of Python in TRL's DPO loss: a dozen metrics, each gathered, and accelerate
looks up in every step whether peft is installed."""
AROUND_STEP = 40.0
"""The same around an optimizer step: schedule, callbacks, gradients set free."""
GAE = 5.0
"""Operations' worth of a position of generalised advantage estimation (`stages/maths.py`); about
fifty more make rewards, whiten and average."""


@dataclass
class Phase:
    """Bytes by (role, component) at the phase's peak, and the work of the phase by role."""

    name: str
    role: str
    bytes: dict[Key, float]
    work: Work = field(default_factory=Work)
    times: float = 1.0
    """how often the phase happens in one optimizer step (SFT, reward, DPO) or iteration (PPO)"""
    tokens: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def phases(s: Setup) -> list[Phase]:
    """The phases of one optimizer step, or of one PPO iteration, in their order."""
    from .online import online

    return {
        "sft": _sft,
        "reward": _reward,
        "dpo": _dpo,
        "ppo": _ppo,
        "rloo": online,
        "grpo": online,
        "inference": _inference,
    }[s.stage](s)


@dataclass
class _Stage:
    """What stands through a whole stage, and the phases as they are found."""

    s: Setup
    standing: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    found: list[Phase] = field(default_factory=list)

    def stand(self, role: str, state: State) -> None:
        for component in ("parameters", "optimizer", "communication"):
            self.standing[role, component] += getattr(state, component)

    def phase(self, name: str, role: str, **extra) -> Phase:
        """A phase with what stands and `extra` (component → bytes of this role)."""
        here = dict(self.standing)
        for component, size in extra.pop("more", {}).items():
            here[component] = here.get(component, 0) + size
        for component in ("gradients", "activations", "logits", "kv_cache", "workspace"):
            if extra.get(component):
                here[role, component] = here.get((role, component), 0) + extra[component]
        phase = Phase(
            name,
            role,
            {k: v for k, v in here.items() if v},
            extra.get("work") or Work(),
            extra.get("times", 1.0),
            extra.get("tokens", 0.0),
        )
        self.found.append(phase)
        return phase


def _passes(
    s: Setup, model: Architecture, b: int, length: int, *, trained: bool, adapters: bool = False
) -> Passes:
    return Passes(
        b,
        length,
        s.item,
        s.autocast,
        trained and not adapters,
        s.lora_r if adapters else 0,
        model.lora_targets(s.lora_targets) if adapters else (),
        s.adapter_item,
        "eager" if s.eager else "sdpa",
        s.padded and s.attn_implementation[:5] != "flash",
        s.gpu,
    )


def _training(
    stage: _Stage,
    role: str,
    forward: Sequence[Segment],
    state: State,
    before: int = 0,
    tokens: float = 0.0,
    called: float = 0.0,
) -> None:
    """Forward, backward and optimizer of a micro-batch. `before`: bytes that stand through both;
    `called`: operations around the loss."""
    s = stage.s
    grown = s.gradient_accumulation_steps > 1
    held = state.gradients if grown else 0
    peak, live = forward_peak(forward, before)
    n = s.gradient_accumulation_steps
    work = works(forward, "forward")
    work.called += called
    stage.phase(
        "forward",
        role,
        activations=peak[0],
        logits=peak[2],
        gradients=held,
        times=n,
        tokens=tokens,
        work=work,
    )
    worst = backward_peak(forward, live, stay=not grown)
    stage.phase(
        "backward",
        role,
        activations=worst[0],
        logits=worst[2],
        times=n,
        tokens=tokens,
        gradients=held + worst[1] * state.share,
        work=works(forward, "backward"),
    )
    stage.phase(
        "optimizer", role, gradients=state.gradients, workspace=state.workspace, work=_step(state)
    )


def _step(*trained: State) -> Work:
    """An optimizer step of these models together."""
    step = Work(called=AROUND_STEP)
    for state in trained:
        step.add(state.step)
    return step


def _tokens(s: Setup, p: Passes) -> float:
    """Tokens of a pass, without padding where the setup knows how much there is."""
    return p.rows if s.mean_tokens is None else p.b * min(s.mean_tokens, p.s)


def _kept(segments: Sequence[Segment]) -> float:
    return sum(x.times * x.kept for x in segments)


def _sum(*parts: tuple[str, str, float]) -> dict[Key, float]:
    """Bytes by (role, component); what is named twice is added."""
    out: dict[Key, float] = defaultdict(float)
    for role, component, size in parts:
        out[role, component] += size
    return out


# --------------------------------------------------------------------------------------- stages


def _lm_row(s: Setup, model: Architecture, p: Passes, scored: int, grad: bool = True):
    """Trunk, head and loss of SFT and DPO: TRL's fused head, or logits and cross-entropy."""
    row = trunk(
        model,
        p,
        checkpoint=s.gradient_checkpointing,
        grad=grad,
        tied=grad and model.tied and p.trained,
    )
    if s.loss == "plain":
        return *row, ending(model, p, heads.plain, grad=grad)
    return *row, ending(model, p, heads.fused, scored, grad=grad)


def _sft(s: Setup) -> list[Phase]:
    model, stage, adapters = s.model, _Stage(s), bool(s.lora_r)
    p = _passes(s, model, s.batch, s.length, trained=True, adapters=adapters)
    state = states(s, model, "lm", trained=True)
    stage.stand("policy", state)
    row = _lm_row(s, model, p, s.batch * s.response)
    _training(stage, "policy", row, state, heads.standing(model, p), tokens=_tokens(s, p))
    return stage.found


def _reward(s: Setup) -> list[Phase]:
    model, stage, adapters = s.model, _Stage(s), bool(s.lora_r)
    passes = 1 if s.pairs_together else 2
    b = 2 * s.batch // passes
    p = _passes(s, model, b, s.length, trained=True, adapters=adapters)
    state = states(s, model, "score", trained=True)
    stage.stand("reward", state)
    one = (
        *trunk(model, p, checkpoint=s.gradient_checkpointing),
        ending(model, p, heads.scores, p.rows),
    )
    _training(
        stage,
        "reward",
        one * passes,
        state,
        passes * heads.standing(model, p),
        tokens=passes * _tokens(s, p),
    )
    return stage.found


def _dpo(s: Setup) -> list[Phase]:
    model, stage, adapters = s.model, _Stage(s), bool(s.lora_r)
    p = _passes(s, model, 2 * s.batch, s.length, trained=True, adapters=adapters)
    state = states(s, model, "lm", trained=True)
    stage.stand("policy", state)
    if not adapters:
        stage.stand("reference", states(s, model, "lm", trained=False))
    scored = 2 * s.batch * s.response
    row = _lm_row(s, model, p, scored)
    q = _passes(s, model, 2 * s.batch, s.length, trained=False)
    reference = _lm_row(s, model, q, scored, grad=False)
    before = heads.standing(model, p)
    behind, _ = forward_peak(reference, heads.standing(model, q))
    _, live = forward_peak(row, before)
    held = state.gradients if s.gradient_accumulation_steps > 1 else 0
    role = "reference" if not adapters else "policy"
    stage.phase(
        "reference",
        role,
        work=works(reference, "forward"),
        times=s.gradient_accumulation_steps,
        tokens=_tokens(s, p),
        more=_sum(
            ("policy", "activations", live),
            (role, "activations", behind[0]),
            (role, "logits", behind[2]),
            ("policy", "gradients", held),
        ),
    )
    _training(stage, "policy", row, state, before, tokens=_tokens(s, p), called=AROUND_DPO)
    return stage.found


# ------------------------------------------------------------------------------------------ PPO


@dataclass(frozen=True)
class Role:
    """A model with a part to play in PPO: whose base it runs on, with adapters of its own or not,
    trained or frozen."""

    name: str
    model: Architecture | None
    trained: bool = False
    adapters: bool = False
    own_base: bool = True


def _roles(s: Setup) -> dict[str, Role]:
    """Who is there, by layout: four models, a trunk shared by policy and value, one base."""
    reward = None if s.rule_reward else (s.reward or s.model)
    if s.layout == "four":
        roles = [
            Role("policy", s.model, True, bool(s.lora_r)),
            Role("reference", s.model),
            Role("value", s.value or reward or s.model, True),
            Role("reward", reward),
        ]
    elif s.layout == "shared":
        roles = [
            Role("policy", s.model, True, bool(s.lora_r)),
            Role("reference", s.model),
            Role("value", s.model, True, False, False),
            Role("reward", reward),
        ]
    else:  # a reward model that is named is one of its own
        adapter = s.reward is None
        roles = [
            Role("policy", s.model, True, True),
            Role("reference", s.model, False, False, False),
            Role("value", s.model, True, True, False),
            Role("reward", reward, False, adapter, not adapter),
        ]
    return {r.name: r for r in roles if r.model is not None}


def _ppo(s: Setup) -> list[Phase]:
    stage, roles = _Stage(s), _roles(s)
    state = {n: ppo_state(s, r) for n, r in roles.items()}
    for name in roles:
        stage.stand(name, state[name])
    if s.ema:  # an average of the policy's weights, as DeepSpeed-Chat keeps one
        stage.standing["policy", "parameters"] += states(s, s.model, "lm", trained=False).parameters
    cache = _autocast_copies(s, roles)
    _rollout(stage, s, cache["policy"])
    cached = cache["policy"]
    bare = replace(s, padded=False)  # rows are moved to the left, and no pass needs a mask
    for name, phase in (
        ("policy", "old_logprobs"),
        ("reference", "reference"),
        ("value", "value"),
        ("reward", "score"),
    ):
        if name not in roles or (phase, s.layout) == ("value", "shared"):
            continue  # values come from the pass of the policy
        # The last token predicts nothing: only the reward model is given it.
        like = _of_judges(bare) if name in ("value", "reward") else bare
        rows = min(s.local_rollout_forward_batch_size, s.rollout_batch)
        p = _passes(
            like,
            roles[name].model,
            rows,
            max(1, s.length - (name != "reward")),
            trained=False,
            adapters=roles[name].adapters,
        )
        row = _scoring(s, roles[name], p)
        peak, _ = forward_peak(row, heads.standing(roles[name].model, p))
        cached += cache[name] if name != "policy" else 0
        stage.phase(
            phase,
            name,
            activations=peak[0],
            logits=peak[2],
            workspace=cached,
            work=works(row, "forward"),
            times=s.rollout_batch / p.b,
            tokens=_tokens(s, replace(p, s=s.length)),
        )
    advantage = Work(launched=GAE * s.response + 50.0)
    stage.phase("advantage", "", work=advantage, workspace=cached)
    _update(stage, bare, roles, state)
    return stage.found


def ppo_state(s: Setup, role: Role) -> State:
    """Weights and states of one role; a role without a base of its own adds adapters and head."""
    head = "lm" if role.name in ("policy", "reference") else "score"
    if role.own_base:
        return states(s, role.model, head, trained=role.trained, adapters=role.adapters)
    if role.name == "value" and s.layout == "shared":
        tiny = role.model.head_width * s.item
        return State(tiny, tiny, 2 * tiny)
    if not role.adapters:
        return State(0.0)
    return adapter_state(_of_judges(s), role.model, head, trained=role.trained)


def _of_judges(s: Setup) -> Setup:
    """With the rank of the value and reward adapters, where they are not made like the policy's."""
    if not s.critic_lora_r:
        return s
    return replace(s, lora_r=s.critic_lora_r, lora_targets=s.critic_lora_targets)


def _autocast_copies(s: Setup, roles: dict[str, Role]) -> dict[str, float]:
    """Autocast keeps a 16-bit copy of every trained matrix until its context ends; ours spans the
    whole rollout."""
    copies = dict.fromkeys(roles, 0.0)
    for name, role in roles.items():
        if s.autocast and s.item == 4 and role.trained and not role.adapters:
            parts = role.model.by_part("none")
            copies[name] = 2.0 * (parts["attention"] + parts["mlp"])
            if name == "policy":
                copies[name] += 2.0 * role.model.head_width * role.model.vocabulary
    return copies


def _scoring(s: Setup, role: Role, p: Passes) -> tuple[Segment, ...]:
    """A pass without gradients: log-probabilities, values, or scores of a chunk of rows."""
    if role.name in ("policy", "reference"):
        end = ending(role.model, p, heads.log_probabilities, s.response, False, grad=False)
        if role.name == "policy" and s.layout == "shared":
            value = ending(role.model, p, heads.scores, p.b * s.response, grad=False)
            return *trunk(role.model, p, grad=False), end, value
    else:
        positions = p.b * s.response if role.name == "value" else p.b
        end = ending(role.model, p, heads.scores, positions, grad=False)
    return *trunk(role.model, p, grad=False), end


Moment = tuple[float, float, float]
"""Bytes of keys and values, of activations and of logits."""


def _generation(s: Setup) -> tuple[tuple[Moment, Work], tuple[Moment, Work]]:
    """Prefill, then one token at a time with a cache that grows to the whole length: what is there
    at the peak of each, and its work."""
    model, n = s.model, s.rollout_batch
    adapters = bool(s.lora_r)
    first = _passes(s, model, n, s.prompt, trained=False, adapters=adapters)
    row = _next_token(model, first)
    per_token = kv_bytes(s, model) * n
    (activations, _, logits), _ = forward_peak(row, heads.standing(model, first))
    prefill = (per_token * s.prompt, activations, logits), works(row, "forward")
    # The work of a step is linear in the context and in the rows that still go on: a step at the
    # middle with the average number of rows stands for all.
    going = max(1, round(n * (sampled(s) - 1) / max(1, s.response - 1)))
    middle = replace(
        _passes(s, model, going, 1, trained=False, adapters=adapters),
        context=s.prompt + (s.response + 1) // 2,
    )
    step = _next_token(model, middle)
    (activations, _, logits), _ = forward_peak(step, heads.standing(model, middle))
    decoding = Work()
    decoding.add(works(step, "forward"), s.response - 1)
    length = s.length - 1
    growing = per_token / model.depth / 2 * length  # a layer's keys, old and new, while they grow
    return prefill, ((per_token * length, activations + growing, logits), decoding)


def sampled(s: Setup) -> float:
    """Tokens of a response that are sampled, on average."""
    return s.response if s.mean_response is None else min(s.mean_response, s.response)


def _rollout(stage: _Stage, s: Setup, cached: float) -> None:
    """Sampling as one phase, at the higher peak of its two halves."""
    (first, work), (last, decoding) = _generation(s)
    work.add(decoding)
    cache, activations, logits = max(first, last, key=sum)
    stage.phase(
        "rollout",
        "policy",
        kv_cache=cache,
        activations=activations,
        logits=logits,
        workspace=cached,
        work=work,
        tokens=s.rollout_batch * sampled(s),
    )


def _next_token(model: Architecture, p: Passes) -> tuple[Segment, ...]:
    return *trunk(model, p, grad=False), ending(model, p, heads.next_token, grad=False)


def kv_bytes(s: Setup, model: Architecture) -> float:
    """Bytes of keys and values of one token of one sequence."""
    item = 2 if s.autocast else s.item
    return 2.0 * model.depth * model.kv_heads * model.head_dim * item


def _update(stage: _Stage, s: Setup, roles: dict[str, Role], state: dict[str, State]) -> None:
    """Minibatches: policy and value forward, one backward pass through both, one step."""
    policy, value = roles["policy"], roles["value"]
    length = max(1, s.length - 1)  # without the last token, which predicts nothing
    p = _passes(s, policy.model, s.pass_rows, length, trained=True, adapters=policy.adapters)
    tokens = _tokens(s, replace(p, s=s.length))
    row = (
        *trunk(
            policy.model,
            p,
            checkpoint=s.gradient_checkpointing,
            tied=policy.model.tied and p.trained,
        ),
        ending(policy.model, p, heads.log_probabilities, s.response, True),
    )
    q = _passes(
        _of_judges(s), value.model, s.pass_rows, length, trained=True, adapters=value.adapters
    )
    second = (
        () if s.layout == "shared" else trunk(value.model, q, checkpoint=s.gradient_checkpointing)
    )
    second = (*second, ending(value.model, q, heads.scores, q.b * s.response))
    passes = s.rollout_batch / s.pass_rows * s.num_ppo_epochs
    steps = s.num_mini_batches * s.num_ppo_epochs
    grown = passes > steps
    held = {n: state[n].gradients if grown else 0.0 for n in ("policy", "value")}
    standing = heads.standing(policy.model, p)
    together = (*row, *second) if s.joint_update else max(row, second, key=_kept)
    peak, live = forward_peak(together, standing)
    of_second = _kept(second) if together != row else 0.0
    both = {("value", "gradients"): held["value"], ("value", "activations"): of_second}
    work = works(row + second, "forward")
    stage.phase(
        "forward",
        "policy",
        activations=peak[0] - of_second,
        logits=peak[2],
        more=both,
        gradients=held["policy"],
        work=work,
        times=passes,
        tokens=tokens,
    )
    worst = backward_peak(together, live, stay=not grown)
    of_value = 0.0 if grown else min(worst[1], state["value"].gradients)
    of_policy = worst[1] - of_value
    stage.phase(
        "backward",
        "policy",
        activations=worst[0],
        logits=worst[2],
        gradients=held["policy"] + of_policy,
        work=works(row + second, "backward"),
        more={("value", "gradients"): held["value"] + of_value},
        times=passes,
        tokens=tokens,
    )
    step = _step(state["policy"], state["value"])
    stage.phase(
        "optimizer",
        "policy",
        gradients=state["policy"].gradients,
        workspace=state["policy"].workspace + state["value"].workspace,
        times=steps,
        more={("value", "gradients"): state["value"].gradients},
        work=step,
    )


def _inference(s: Setup) -> list[Phase]:
    """Generation alone, its two halves apart: one is bound by arithmetic, one by memory."""
    stage, n = _Stage(s), s.rollout_batch
    stage.stand("policy", states(s, s.model, "lm", trained=False))
    tokens = n * s.prompt, n * sampled(s)
    for name, ((cache, activations, logits), work), count in zip(
        ("prefill", "decode"), _generation(s), tokens, strict=True
    ):
        stage.phase(
            name,
            "policy",
            kv_cache=cache,
            activations=activations,
            logits=logits,
            work=work,
            tokens=count,
        )
    return stage.found
