"""What the phases of all stages share: passes, their memory at the peak, and their work.

A stage's function (`offline.py`, `online.py`, `ppo.py`, `generation.py`) returns the phases of one
optimizer step, or of one PPO iteration, in their order; `rlhf_lab/stages.py` names it. The order of
passes is that of the code that trains: TRL's trainers, our PPO.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from . import heads
from .architecture import Architecture
from .layers import PassConfig
from .memory import KindBytes, Segment, ending, trunk, works
from .seconds import Sent
from .setup import Setup
from .sharding import Row, forward, moments, passing, training
from .states import State, states
from .work import Work

RoleBytes: TypeAlias = dict[tuple[str, str], float]
"""Bytes by (role, component)."""
AROUND_STEP = 40.0
"""Operations' worth of Python around an optimizer step: schedule, callbacks, gradients set free."""


@dataclass
class Phase:
    """Bytes at the phase's peak, and the work of the phase, which its `role` does."""

    name: str
    role: str
    bytes: RoleBytes
    work: Work = field(default_factory=Work)
    times: float = 1.0
    """how often the phase happens in one optimizer step (SFT, reward, DPO) or iteration (PPO)"""
    tokens: float = 0.0
    sent: Sent = Sent()
    """in all its times together"""
    devices: int = 1
    """that do this work each, as their share of a model"""
    sums: tuple[float, float] = (0.0, 0.0)
    """bytes that those devices add up, and how often, in one occurrence"""
    host: float = 0.0
    """bytes of main memory beside one device: what is offloaded"""

    @property
    def total(self) -> float:
        return math.fsum(self.bytes.values())


@dataclass
class PhaseList:
    """What is resident through a whole stage, and its phases so far."""

    s: Setup
    resident: RoleBytes = field(default_factory=lambda: defaultdict(float))
    phases: list[Phase] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    host: float = 0.0

    def state(self, role: str) -> State:
        """Of a role, or of the policy, which is its own reference where it has adapters."""
        return self.states[role if role in self.states else "policy"]

    def hold(self, role: str, state: State) -> None:
        """This role's weights and states are resident from here on."""
        self.states[role] = state
        self.host += state.host
        self.resident[role, "parameters"] += state.parameters
        self.resident[role, "optimizer"] += state.optimizer
        self.resident[role, "communication"] += state.communication
        self.resident[role, "gradients"] += state.fixed

    def hold_trained(
        self, role: str, model: Architecture, rows: int, head: str = "lm"
    ) -> PassConfig:
        """The same of what learns, with adapters where the setup has a rank; → how it is run on so
        many sequences."""
        self.hold(role, states(self.s, model, head, trained=True))
        lora = bool(self.s.lora_r)
        return pass_config(self.s, model, rows, self.s.length, trained=True, adapters=lora)

    def add(
        self,
        name: str,
        role: str,
        peak: KindBytes = (0, 0, 0),
        *,
        gradients: float = 0.0,
        kv_cache: float = 0.0,
        workspace: float = 0.0,
        communication: float = 0.0,
        others: Mapping[tuple[str, str], float] | None = None,
        work: Work | None = None,
        times: float = 1.0,
        tokens: float = 0.0,
        sent: Sent = Phase.sent,
        devices: int = 1,
        sums: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """A phase: what is resident, bytes of `role`, of its pass those at the `peak` (but for
        gradients, which are given), and bytes of `others`."""
        here = dict(self.resident)
        for key, size in (others or {}).items():
            here[key] = here.get(key, 0) + size
        components = {
            "gradients": gradients,
            "activations": peak[0],
            "logits": peak[2],
            "kv_cache": kv_cache,
            "workspace": workspace,
            "communication": communication,
        }
        for component, size in components.items():
            if size:
                here[role, component] = here.get((role, component), 0) + size
        here = {key: size for key, size in here.items() if size}
        host, work = self.host + sent.stashed / (times or 1), work or Work()
        self.phases.append(Phase(name, role, here, work, times, tokens, sent, devices, sums, host))

    def add_scoring(
        self,
        name: str,
        role: str,
        segments: Sequence[Segment],
        model: Architecture,
        p: PassConfig,
        *,
        times: float,
        tokens: float,
        workspace: float = 0.0,
        base: str = "",
    ) -> None:
        """A pass without gradients over some of the rows, as often as it takes for all. `base`: the
        role whose weights it gathers, where they are not its own."""
        state = self.state(role)
        here, _ = forward(self.s, [Row(segments, state)], heads.resident_bytes(model, p))
        self.add(
            name,
            role,
            here.kinds,
            communication=here.whole,
            workspace=workspace,
            work=works(segments, "forward"),
            times=times,
            tokens=tokens,
            sent=passing(self.s, self.state(base or role), times),
        )

    def add_training(
        self,
        role: str,
        segments: Sequence[Segment],
        model: Architecture,
        p: PassConfig,
        beside: int = 0,
        called: float = 0.0,
        passes: int = 1,
    ) -> None:
        """Forward, backward and optimizer of a micro-batch. `beside`: further bytes that are
        resident through both passes; `called`: operations around the loss; `passes`: through the
        same model, one after the other, before a backward pass through all of them."""
        n, state = self.s.gradient_accumulation_steps, self.states[role]
        rows, tokens = [Row(segments, state)] * passes, passes * real_tokens(self.s, p.b, p.s)
        before = passes * heads.resident_bytes(model, p) + beside
        first, _, second = moments(self.s, rows, before, n > 1)
        stashed = n * passes * sum(x.times * x.away for x in segments)
        sent = training(self.s, rows, n, 1)
        bucket = state.bucket if self.s.sharding == "zero1" and n > 1 else 0.0
        work = works([*segments] * passes, "forward")
        work.called += called
        self.add(
            "forward",
            role,
            first.kinds,
            gradients=state.held if n > 1 else 0.0,
            communication=first.whole + bucket,
            times=n,
            tokens=tokens,
            work=work,
            sent=sent[0]._replace(stashed=stashed),
        )
        self.add(
            "backward",
            role,
            second.kinds,
            gradients=second.kinds[1],
            communication=second.whole,
            times=n,
            tokens=tokens,
            work=works([*segments] * passes, "backward"),
            sent=sent[1]._replace(stashed=stashed),
        )
        self.add(
            "optimizer",
            role,
            gradients=state.gradients,
            workspace=state.workspace,
            work=step_work(state),
            sent=sent[2],
        )


def step_work(*trained: State) -> Work:
    """An optimizer step of all these models."""
    step = Work(called=AROUND_STEP)
    for state in trained:
        step.add(state.step)
    return step


def pass_config(
    s: Setup,
    model: Architecture,
    b: int,
    length: int,
    *,
    trained: bool,
    adapters: bool = False,
    mask: bool = True,
) -> PassConfig:
    """How the setup runs a model on `b` sequences of `length` tokens. `mask`: as the setup says;
    rows that are moved to the left need none."""
    return PassConfig(
        b,
        length,
        s.pass_bytes_per_weight,
        s.autocast and s.pass_bytes_per_weight == s.bytes_per_weight,
        trained and not adapters,
        s.lora_r if adapters else 0,
        model.lora_targets(s.lora_targets) if adapters else (),
        s.adapter_bytes_per_weight,
        "eager" if s.eager else "sdpa",
        mask and s.padded and s.attn_implementation[:5] != "flash",
        s.gpu,
        fused=s.use_liger_kernel,
        away=s.away,
        selective=s.selective_checkpointing,
        dropout=trained and adapters and s.lora_dropout > 0,
        use_dora=adapters and s.use_dora,
        quantized=s.weights_format if s.small_base and (adapters or not trained) else "none",
        compiled=s.torch_compile is True and min(b, length) > 1,
    )


def real_tokens(s: Setup, rows: int, length: int) -> float:
    """Tokens of a pass, without padding where the setup knows how much there is."""
    return rows * (length if s.mean_tokens is None else min(s.mean_tokens, length))


def policy_segments(
    s: Setup, model: Architecture, p: PassConfig, scored: int, grad: bool = True
) -> tuple[Segment, ...]:
    """Trunk, head and loss of a language model: TRL's fused head, or logits and cross-entropy."""
    tied = grad and model.tied and p.trained
    row = trunk(model, p, checkpoint=s.checkpoint, grad=grad, tied=tied)
    if s.loss == "plain":
        return *row, ending(model, p, heads.plain, grad=grad)
    if s.loss == "chunked":  # beside what is sent to main memory
        return *row, ending(model, p._replace(away=""), heads.chunked, grad=grad)
    return *row, ending(model, p, heads.fused, scored, grad=grad)
