"""Phases of PPO, as our trainer runs them: one iteration with its epochs over minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import heads
from .architecture import Architecture
from .generation import add_engine, add_rollout, sampled
from .layers import PassConfig
from .memory import Segment, ending, trunk, works
from .phases import Phase, PhaseList, pass_config, real_tokens, step_work
from .setup import Setup
from .sharding import Moment, Row, between, gathering, moments, training
from .states import State, states
from .work import Work

BESIDE = {"rollout": "value", "old_logprobs": "value", "value": "policy"}
"""Phases of one trained model under FSDP2, and the other one."""
GAE = 5.0
"""Operations' worth of a position of generalised advantage estimation (`ppo/losses.py`); about
fifty more make rewards, whiten and average."""


@dataclass(frozen=True)
class Role:
    """One of PPO's models: trained or frozen, with adapters of its own or not, and whether its base
    is its own or the policy's."""

    name: str
    model: Architecture
    trained: bool = False
    adapters: bool = False
    own_base: bool = True


def ppo(s: Setup) -> list[Phase]:
    """Rollout, scoring by every model, advantages, and the update."""
    if s.sharding == "fsdp2":  # as our trainer shards (`ppo/sharding.py`)
        s = replace(s, fsdp_units="root")
    stage, roles = PhaseList(s), _roles(s)
    state = {name: role_state(s, role) for name, role in roles.items()}
    if s.sharding == "fsdp2" and s.layout == "adapters":
        # Every pass gathers the one base, and all adapters with it.
        one = [name for name in state if name == "policy" or not roles[name].own_base]
        whole = sum(state[name].whole for name in one)
        state |= {name: state[name]._replace(whole=whole) for name in one}
    if s.joint_update:  # policy and value go through one bucket
        value = state["value"]
        alone = 0.0 if s.sharding == "zero3" else value.communication
        state["value"] = value._replace(communication=alone)
    for name in roles:
        stage.hold(name, state[name])
    if s.ema:  # an average of the policy's weights, as DeepSpeed-Chat keeps one
        average = states(s, s.model, "lm", trained=False)
        stage.resident["policy", "parameters"] += average.parameters
        stage.host += average.host
    copies = _autocast_copies(s, roles)
    cached = copies["policy"]
    tokens = s.rollout_batch * sampled(s)
    if s.use_vllm:
        add_engine(stage, 1.0, tokens)
    else:
        add_rollout(stage, s, workspace=cached, tokens=tokens)
    for name, phase in (
        ("policy", "old_logprobs"),
        ("reference", "reference"),
        ("value", "value"),
        ("reward", "score"),
    ):
        if name not in roles or (phase, s.layout) == ("value", "shared"):
            continue  # values come from the pass of the policy
        cached += copies[name] if name != "policy" else 0
        _add_scoring(stage, s, roles[name], phase, cached)
    advantage = Work(launched=GAE * s.response + 50.0)
    stage.add("advantage", "", work=advantage, workspace=cached)
    _add_update(stage, s, roles, state)
    if s.sharding == "fsdp2":
        stage.phases = [_with_roots(s, made, roles, state) for made in stage.phases]
    return stage.phases


def _root(role: Role, state: State) -> float:
    """Bytes of a model's embedding and head, whole."""
    if role.name == "value" and state.whole < role.model.embedding:  # a head on the policy's trunk
        return state.whole
    kind = "lm" if role.name in ("policy", "reference") else "score"
    outside = role.model.embedding + role.model.by_part(kind)["head"]
    return state.whole * outside / role.model.parameters(kind)


def _with_roots(
    s: Setup, made: Phase, roles: Mapping[str, Role], state: Mapping[str, State]
) -> Phase:
    """A phase of passes without gradients as FSDP2 gathers for it: layers in each pass, embedding
    and head once, before the first (`FullyShard.passes`). Those of policy and value model are one
    unit, so that they are gathered together."""
    if made.name not in ("reference", "score", *BESIDE):
        return made
    name = made.role if roles[made.role].own_base else "policy"
    root, passes = _root(roles[name], state[name]), made.times
    if made.name == "rollout" and not (s.use_vllm or s.ds3_gather_for_generation):
        passes *= max(1, s.response)
    layers = (state[name].whole - root) * passes
    if s.layout == "four" and (other := BESIDE.get(made.name)):
        beside = made.bytes[other, "communication"] = _root(roles[other], state[other])
        root += beside
    sent = gathering(s, layers + root)
    return replace(made, sent=sent._replace(fetched=made.sent.fetched, hides=made.sent.hides))


def _roles(s: Setup) -> dict[str, Role]:
    """Roles by layout: four models, a trunk shared by policy and value, or one base."""
    one_base, lora = s.layout == "adapters", bool(s.lora_r)
    roles = [
        Role("policy", s.model, True, lora or one_base),
        Role("reference", s.model, own_base=not one_base),
    ]
    reward = s.reward or s.model
    if s.layout == "four":
        value = s.value or (s.model if s.rule_reward else reward)
        roles.append(Role("value", value, True))
    else:
        roles.append(Role("value", s.model, True, one_base, False))
    if not s.rule_reward:  # a reward model that is named has a base of its own
        adapter = one_base and s.reward is None
        roles.append(Role("reward", reward, False, adapter, not adapter))
    return {role.name: role for role in roles}


def role_state(s: Setup, role: Role) -> State:
    """Weights and states of one role; a role without a base of its own adds adapters and head."""
    head = "lm" if role.name in ("policy", "reference") else "score"
    if role.name == "value" and s.layout == "shared":
        size = role.model.head_width * s.bytes_per_weight
        return State(size, size, 2 * size, held=size, trained=size, whole=size)
    if not (role.own_base or role.adapters):
        return State(0.0)
    own = {"trained": role.trained, "adapters": role.adapters, "own_base": role.own_base}
    return states(_setup_of(s, role), role.model, head, **own)


def _setup_of(s: Setup, role: Role) -> Setup:
    """As a role is loaded: a reward model with a base of its own is whole."""
    if not role.own_base:
        return _critic_setup(s)
    return s.whole if role.name == "reward" else s


def _critic_setup(s: Setup) -> Setup:
    """With the rank of the value and reward adapters, where they are not made like the policy's."""
    if not s.critic_lora_r:
        return s
    return replace(s, lora_r=s.critic_lora_r, lora_targets=s.critic_lora_targets)


def _autocast_copies(s: Setup, roles: Mapping[str, Role]) -> dict[str, float]:
    """Autocast keeps a 16-bit copy of every trained matrix until its context ends; ours spans the
    whole rollout."""
    copies = dict.fromkeys(roles, 0.0)
    for name, role in roles.items():
        if s.torch_compile is True and name != "policy":  # which decodes, and that is not compiled
            continue
        if s.autocast and s.bytes_per_weight == 4 and role.trained and not role.adapters:
            parts = role.model.by_part("none")
            copies[name] = 2.0 * (parts["attention"] + parts["mlp"])
            if name == "policy":
                copies[name] += 2.0 * role.model.head_width * role.model.vocabulary
    return copies


def _add_scoring(stage: PhaseList, s: Setup, role: Role, phase: str, workspace: float) -> None:
    """A pass of one role over all rows of the rollout, a chunk at a time."""
    # The last token predicts nothing: only the reward model is given it.
    like = _setup_of(s, role)
    rows = min(s.local_rollout_forward_batch_size, s.rollout_batch)
    length = max(1, s.length - (role.name != "reward"))
    how = {"trained": False, "adapters": role.adapters, "mask": False}
    p = pass_config(like, role.model, rows, length, **how)
    row, times = scoring_segments(s, role, p), s.rollout_batch / p.b
    tokens, base = real_tokens(s, p.b, s.length), "" if role.own_base else "policy"
    more = {"times": times, "tokens": tokens, "workspace": workspace}
    stage.add_scoring(phase, role.name, row, role.model, p, **more, base=base)


def scoring_segments(s: Setup, role: Role, p: PassConfig) -> tuple[Segment, ...]:
    """A pass without gradients: log-probabilities, values, or scores of a chunk of rows."""
    layers, positions = trunk(role.model, p, grad=False), p.b * s.response
    if role.name in ("policy", "reference"):
        layers += (ending(role.model, p, heads.log_probabilities, s.response, False, grad=False),)
        if role.name == "reference" or s.layout != "shared":
            return layers
    elif role.name == "reward":
        positions = p.b
    return *layers, ending(role.model, p, heads.scores, positions, grad=False)


def _update_segments(
    s: Setup, roles: Mapping[str, Role]
) -> tuple[PassConfig, tuple[Segment, ...], tuple[Segment, ...]]:
    """→ how the policy is run in the update, its segments, and those of the value model."""
    policy, value = roles["policy"], roles["value"]
    length = max(1, s.length - 1)  # without the last token, which predicts nothing
    checkpoint = s.checkpoint
    p, q = (
        pass_config(
            like, role.model, s.pass_rows, length, trained=True, adapters=role.adapters, mask=False
        )
        for like, role in ((s, policy), (_critic_setup(s), value))
    )
    tied = policy.model.tied and p.trained
    first = (
        *trunk(policy.model, p, checkpoint=checkpoint, tied=tied),
        ending(policy.model, p, heads.log_probabilities, s.response, True),
    )
    second = ending(value.model, q, heads.scores, q.b * s.response)
    if s.layout == "shared":
        return p, first, (second,)
    return p, first, (*trunk(value.model, q, checkpoint=checkpoint), second)


def _kept(segments: Sequence[Segment]) -> float:
    return sum(x.times * x.kept for x in segments)


def _of_value(rows: Sequence[Row], value: Sequence[Segment], at: Moment, before: float) -> float:
    """Activations of the value model at the highest moment of a pass: what its own graph holds. It
    runs after the policy, and is undone before it; while it runs, all that the policy's graph keeps
    is there too, beside the `before` bytes. A head alone stands on the policy's graph."""
    if rows[at.row].segments is not value or len(value) == 1:
        return 0.0
    return at.kinds[0] - before - sum(_kept(row.segments) for row in rows[: at.row])


def _add_update(
    stage: PhaseList, s: Setup, roles: Mapping[str, Role], state: Mapping[str, State]
) -> None:
    """Minibatches: policy and value forward, one backward pass through both, one step."""
    p, policy, value = _update_segments(s, roles)
    tokens = real_tokens(s, p.b, s.length)
    passes = s.rollout_batch / s.pass_rows * s.num_ppo_epochs
    steps = s.num_mini_batches * s.num_ppo_epochs
    accumulates = passes > steps
    held = {name: state[name].held if accumulates else 0.0 for name in ("policy", "value")}
    rows = [Row(policy, state["policy"]), Row(value, state["value"])]
    if not s.joint_update:
        rows = [max(rows, key=lambda row: _kept(row.segments))]
    before = heads.resident_bytes(roles["policy"].model, p)
    first, _, second = moments(s, rows, before, accumulates)
    sent = training(s, rows, passes, steps)
    if s.sharding == "zero3":  # an iteration's first pass is new to DeepSpeed: nothing stays whole
        stays, anew = between(s, rows), 0.0
        if s.layout == "adapters":  # the value model gathers the policy's base again
            base = state["policy"].whole - state["value"].whole
            anew = base + (passes - 1) * max(0.0, base - stays)
        forward, backward, step = sent
        forward = forward._replace(all_gather=forward.all_gather + anew)
        sent = forward, backward._replace(all_gather=backward.all_gather + stays), step
    elif s.sharding == "fsdp2" and s.layout == "adapters" and len(rows) > 1:
        # Embeddings and head of the one base are whole once, not for each of both.
        root, held_twice = _root(roles["policy"], state["policy"]), between(s, rows[1:])
        sent = sent[0]._replace(all_gather=sent[0].all_gather - root * passes), *sent[1:]
        first, second = (replace(x, whole=x.whole - held_twice) for x in (first, second))
    bucket = state["policy"].bucket if s.sharding == "zero1" and accumulates else 0.0
    cached = sum(x.times * x.cached for x in policy)  # until the forward pass ends
    of_value = _of_value(rows, value, first, before + cached)
    stage.add(
        "forward",
        "policy",
        (first.kinds[0] - of_value, 0, first.kinds[2]),
        others={("value", "gradients"): held["value"], ("value", "activations"): of_value},
        gradients=held["policy"],
        communication=first.whole + bucket,
        work=works(policy + value, "forward"),
        times=passes,
        tokens=tokens,
        sent=sent[0],
    )
    gradients = _gradients(s, state, second.kinds[1], held, accumulates)
    of_value = _of_value(rows, value, second, before)
    stage.add(
        "backward",
        "policy",
        (second.kinds[0] - of_value, 0, second.kinds[2]),
        gradients=gradients["policy"],
        communication=second.whole,
        work=works(policy + value, "backward"),
        others={("value", "gradients"): gradients["value"], ("value", "activations"): of_value},
        times=passes,
        tokens=tokens,
        sent=sent[1],
    )
    stage.add(
        "optimizer",
        "policy",
        gradients=state["policy"].gradients,
        workspace=state["policy"].workspace + state["value"].workspace,
        times=steps,
        others={("value", "gradients"): state["value"].gradients},
        work=step_work(state["policy"], state["value"]),
        sent=sent[2],
    )


def _gradients(
    s: Setup, state: Mapping[str, State], peak: float, held: Mapping[str, float], accumulates: bool
) -> dict[str, float]:
    """Of `peak` bytes of gradients in backward, those of policy and value."""
    value = 0.0 if accumulates else min(peak, state["value"].gradients)
    if accumulates and not s.shards:
        value = held["value"]
    if s.shards:
        both = state["policy"].trained + state["value"].trained
        value = peak * state["value"].trained / both
    return {"policy": peak - value, "value": value}
