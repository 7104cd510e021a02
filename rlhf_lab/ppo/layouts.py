"""Who plays which role in PPO: four models, a trunk for policy and value, or one base for all.

    four      four separate models
    shared    the value model is a head on the policy's trunk: one pass gives both, in scoring
              and in the update, and the value loss trains the trunk too; reference and reward
              model are separate
    adapters  one frozen base; policy, value and reward are LoRA adapters on it (the latter two with
              a score head), the reference is the base with its adapters off

Whatever the layout, `Roles` has four things to pass tokens through and one module, `trained`, that
accelerate wraps: the pass of the update phase. A role without a model of its own is a `RoleView`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .adapters import POLICY, REWARD, VALUE, Switch, add_adapter, add_reward_adapter, copy_adapter
from .logprobs import AnyModel
from .recompute import Layers, recomputed
from .rollout import (
    response_hidden_states,
    scatter_masked,
    score_head,
    token_values,
    trained_logprobs,
    trunk_of,
)

if TYPE_CHECKING:
    from peft import PeftConfig

Updated = tuple[Tensor, Tensor, Tensor]
"""Of a pass of the update: log π, entropy, V, (b, t) each, 0 where masked."""


@dataclass
class Roles:
    """The four roles of PPO, and the module whose parameters are trained."""

    policy: AnyModel
    reference: AnyModel
    value: AnyModel
    reward: AnyModel | None
    """None where only functions give rewards"""
    trained: ActorCritic


def make_roles(
    layout: str,
    policy: AnyModel,
    reference: AnyModel | None,
    value: AnyModel | None,
    reward: AnyModel | None,
    peft_config: PeftConfig | None = None,
) -> Roles:
    """The roles of a layout from the models that it needs; rule 4: no dropout in any of them, so
    all are in eval mode.

    `reward`: a reward model, with adapters also the folder of a LoRA adapter, or a LoraConfig for a
    new one; `peft_config`: LoRA for the policy. Raises ValueError for models that the layout has no
    place for.
    """
    if reference is policy or (value is not None and value in (reward, policy)):
        raise ValueError("policy, reference, reward and value model must be separate copies")
    if layout != "four" and value is not None:
        raise ValueError(f"layout={layout!r} makes its own value head: leave value_model out")
    if layout == "adapters":
        if reference is not None:
            raise ValueError("layout='adapters' takes the base as reference: leave ref_model out")
        return one_base(policy, peft_config, reward)
    if layout == "four" and value is None:
        raise ValueError("layout='four' needs a value_model")
    reference = reference if reference is not None else copy.deepcopy(policy)
    for frozen in (reference, reward):
        if frozen is not None:
            frozen.eval().requires_grad_(False)
    if peft_config is not None:
        from peft import get_peft_model

        policy = get_peft_model(policy, peft_config)
    if layout == "four":
        return Roles(policy, reference, value, reward, ActorCritic(policy, value).eval())
    trained = SharedTrunk(policy).eval()
    return Roles(policy, reference, trained.value, reward, trained)


# ------------------------------------------------------------------------------------ four models


class ActorCritic(nn.Module):
    """Policy and value model as one module."""

    recomputed: Layers = ()
    """layers that run again in backward (`recompute.py`)"""
    switch: Switch | None = None
    """turns the adapters of one base on"""

    def __init__(self, policy: AnyModel, value: AnyModel):
        super().__init__()
        self.policy, self.value = policy, value

    def forward(
        self, ids: Tensor, attention: Tensor, responses: Tensor, mask: Tensor, temperature: float
    ) -> Updated:
        """The pass of the update phase. ids, attention: (b, s); responses, mask: (b, t)."""
        with recomputed(self.recomputed, self.switch):
            hidden = response_hidden_states(self.policy, ids, attention, mask)
            logprobs, entropy = trained_logprobs(self.policy, hidden, responses, mask, temperature)
            return logprobs, entropy, self.values(hidden, ids, attention, mask)

    def values(self, hidden: Tensor, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        """V before each response token, by a pass of its own. hidden: (n, h), the policy's →
        (b, t)."""
        return token_values(self.value, ids, attention, mask)


# --------------------------------------------------------------------------------- shared weights


class RoleView(nn.Module):
    """A role whose weights lie in a model that other roles use too; called as a model of its own.

    `turn` prepares the shared model for this role before each pass; `mine` tells by its name
    whether a parameter is this role's; `score` is the role's own head.
    """

    base_model_prefix = "trunk"
    whole: AnyModel
    """the model that the role lives in"""
    score: nn.Module | None

    def __init__(
        self,
        whole: AnyModel,
        turn: Callable[[], None],
        mine: Callable[[str], bool],
        score: nn.Module | None = None,
        offset: float = 0.0,
    ):
        super().__init__()
        self.__dict__.update(whole=whole, score=score)  # neither is a submodule
        self._turn, self._mine = turn, mine
        self.trunk = _Trunk(self.switched)
        self.config: AnyModel = copy.copy(whole.config)
        self.config.score_offset = offset
        if score is not None:
            self.config.num_labels = 1

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.whole.parameters()).device
        return device

    def switched(self) -> AnyModel:
        """The model that the role lives in, as this role."""
        self._turn()
        return self.whole

    def forward(self, *args: AnyModel, **kwargs: AnyModel) -> AnyModel:
        return self.switched()(*args, **kwargs)

    def get_output_embeddings(self) -> AnyModel:
        return self.whole.get_output_embeddings()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the shared model those that are this role's, and its head's; none is registered here,
        which is what `recurse=False` asks for."""
        if not recurse:
            return
        dot = f"{prefix}." if prefix else ""
        for name, parameter in self.whole.named_parameters():
            if self._mine(name):
                yield dot + name, parameter
        if self.score is not None:
            yield from self.score.named_parameters(f"{dot}score")

    def named_buffers(self, *args: AnyModel, **kwargs: AnyModel) -> Iterator[tuple[str, Tensor]]:
        """Those of the shared model, where the rest of it is this role's too."""
        return self.whole.named_buffers(*args, **kwargs) if self._mine("") else iter(())

    def save_pretrained(self, folder: str | Path, **settings: AnyModel) -> None:
        """The policy's adapter alone, as peft saves one."""
        self.whole.save_pretrained(folder, selected_adapters=[POLICY], **settings)


class _Trunk(nn.Module):
    """The trunk of a shared model, prepared for a role before every pass."""

    def __init__(self, switched: Callable[[], AnyModel]):
        super().__init__()
        self._switched = switched

    def forward(self, *args: AnyModel, **kwargs: AnyModel) -> AnyModel:
        return trunk_of(self._switched())(*args, **kwargs)


def zero_head(model: AnyModel) -> nn.Linear:
    """Rule 15: the value model starts as the reward model, or with a head of zeros: that head, in
    the type of the model's own. (…, h) → (…, 1)."""
    like = model.get_output_embeddings().weight  # as wide as what heads read: OPT may project it
    head = nn.Linear(like.shape[1], 1, bias=False, dtype=like.dtype, device=like.device)
    nn.init.zeros_(head.weight)
    return head


class SharedTrunk(ActorCritic):
    """A policy with a value head on its trunk: one pass gives log-probabilities and values."""

    def __init__(self, policy: AnyModel):
        score = zero_head(policy)
        super().__init__(policy, RoleView(policy, lambda: None, lambda name: False, score))
        self.score = score

    def values(self, hidden: Tensor, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        """V from the policy's own hidden states. (n, h) → (b, t)."""
        return scatter_masked(score_head(self.value, hidden), mask)


class OneBase(ActorCritic):
    """A base with the adapters of policy, value and reward, and the heads of the latter two: two
    passes through the base in an update, each with its adapter."""

    def __init__(self, base: AnyModel, score: nn.Linear, offset: float, reward_adapter: bool):
        switch, theirs = Switch(base), (f".{VALUE}.", f".{REWARD}.")

        def view(
            adapter: str | None, mine: Callable[[str], bool], head: nn.Module | None = None
        ) -> RoleView:
            return RoleView(base, lambda: switch.to(adapter), mine, head, offset if head else 0.0)

        super().__init__(
            view(POLICY, lambda name: not any(x in name for x in theirs)),
            view(VALUE, lambda name: theirs[0] in name, score),
        )
        self.base, self.score, self.switch = base, score, switch
        self.reference = view(None, lambda name: False)
        self.reward = None
        if reward_adapter:
            self.reward_score = copy.deepcopy(score).requires_grad_(False)
            self.reward = view(REWARD, lambda name: theirs[1] in name, self.reward_score)
        switch.to(POLICY)


def one_base(policy: AnyModel, peft_config: PeftConfig | None, reward: AnyModel | None) -> Roles:
    """Adapters on one base. The value adapter and its head start as the reward's where that is an
    adapter too (rule 15); else as nothing on the base and a head of zeros."""
    base = add_adapter(policy, peft_config)
    score, offset = zero_head(base), 0.0
    adapter = reward is not None and not isinstance(reward, nn.Module)
    if adapter:
        weights, offset = add_reward_adapter(base, reward)
        copy_adapter(base, REWARD, VALUE)
        with torch.no_grad():
            score.weight.copy_(weights)
    else:
        add_adapter(base, base.peft_config[POLICY], VALUE)
        if reward is not None:
            reward.eval().requires_grad_(False)
    trained = OneBase(base, score, offset, adapter).eval()
    return Roles(
        trained.policy, trained.reference, trained.value, trained.reward or reward, trained
    )
