"""X-ray: the memory and work of one training step, seen by running the real code on fake tensors.

A step of a 7B model runs on a laptop in seconds, without weights. An account (`account.py`) follows
every storage; the hooks here tell it whose it is and what for: bytes by role and component at each
phase's peak, FLOPs by role and phase. What is run is given by `step.py`: this file knows models and
optimizers, no trainer.

    with FakeTensorMode(), account, labelled(account, {"policy": model}):
        trainer.train()
    XRay.of(account, "sft", "gpu").ledger
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import optimizer as optim
from torch.utils.hooks import RemovableHandle

from ..metering.memory_tracker import MemoryKey, phase_peaks
from ..metering.model_memory import labelled_caches
from ..ppo.logprobs import AnyModel
from ..ppo.rollout import trunk_of
from ..runs.ledger import Ledger
from .account import StepAccount

aten = torch.ops.aten


def parts_of(model: AnyModel) -> Iterator[nn.Module]:
    """The layers of a model, and what stands before and after them."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    for part in whole.children():
        if isinstance(part, nn.ModuleList):
            yield from part
        elif any(isinstance(m, nn.ModuleList) for m in part.modules()):
            yield from parts_of(part)
        else:
            yield part


# --------------------------------------------------------------------------------------- the labels


@contextmanager
def fused_silu() -> Iterator[None]:
    """Under a dispatch mode autograd takes SiLU's gradient apart into eight operations with five
    temporaries (`math_silu_backward`). While this lasts it is one kernel, as it is without one."""

    def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
        out: Tensor = aten.silu_backward.grad_input(grad, x, grad_input=torch.empty_like(x))
        return out

    library = torch.library.Library("aten", "IMPL")
    library.impl("silu_backward", silu_backward, "Python")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def labelled(
    account: StepAccount, models: Mapping[str, nn.Module], phases: bool = True
) -> Iterator[None]:
    """While it lasts, what these models do is booked to their roles.

    `models`: role → model. `phases`: a pass of a trained model begins the phase "forward", one of a
    frozen model (or without gradients) is the phase "reference" (a teacher's "teacher"); else the
    phases are somebody else's to tell. Backward passes and optimizer steps begin theirs in either
    case.
    """
    hooks: list[RemovableHandle] = []
    account.owners = {id(p): role for role, model in models.items() for p in model.parameters()}
    for role, model in models.items():
        account.own(role, "parameters", [*model.parameters(), *model.buffers()])
        hooks += _role_hooks(account, role, model, phases) + _part_hooks(account, role, model)
        hooks += account.own_gradients(role, model)
    hooks += _optimizer_hooks(account)
    main = next(iter(models))
    backward: Callable[..., None] = Tensor.backward

    def begin(self: Tensor, *args: object, **kwargs: object) -> None:
        account.enter("backward", main)
        backward(self, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(fused_silu())
        stack.enter_context(patch.object(Tensor, "backward", begin))
        stack.enter_context(labelled_caches(account))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _role_hooks(
    account: StepAccount, role: str, model: nn.Module, phases: bool
) -> list[RemovableHandle]:
    """What a model (or its trunk, called alone) makes in a forward pass is its role's."""
    calls: list[tuple[MemoryKey | None, MemoryKey]] = []
    trained = any(p.requires_grad for p in model.parameters())
    frozen = ("teacher",) * 2 if role == "teacher" else ("reference",) * 2

    def enter(module: nn.Module, args: object) -> None:
        calls.append((account.at, account.label))
        if len(calls) > 1:
            return  # the trunk within its model
        if not phases:
            account.call(role)
        elif trained and torch.is_grad_enabled():
            account.enter("forward", role)
        else:
            account.enter(*frozen)

    def leave(module: nn.Module, args: object, out: object) -> None:
        at, label = calls.pop()
        if calls:
            return
        if not phases:
            account.call(*label)
        elif account.at == frozen and at:
            account.enter(*at)

    hooks = []
    for module in dict.fromkeys((model, trunk_of(model))):
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks


def _part_hooks(account: StepAccount, role: str, model: nn.Module) -> list[RemovableHandle]:
    """What the backward pass makes from where a gradient reaches a layer is its model's role's."""

    def undo(grad: Tensor) -> None:
        account.call(role)

    def done(module: nn.Module, args: object, out: object) -> None:
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(undo)

    return [part.register_forward_hook(done) for part in parts_of(model)]


def _optimizer_hooks(account: StepAccount) -> list[RemovableHandle]:
    """The phase of the optimizer, and whose its states are."""

    def begin(optimizer: object, args: object, kwargs: object) -> None:
        account.enter("optimizer", next(iter(account.owners.values())), "workspace")

    def end(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        account.own_states(optimizer)

    return [
        optim.register_optimizer_step_pre_hook(begin),
        optim.register_optimizer_step_post_hook(end),
    ]


def prime(
    account: StepAccount, optimizer: torch.optim.Optimizer, foreach: bool | None = None
) -> None:
    """Give an optimizer the state it has after a first step. `foreach`: see torch.optim.AdamW."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for group in optimizer.param_groups:
        if foreach is not None and "foreach" in group and not group.get("fused"):
            group["foreach"] = foreach
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):  # the same without the step
        for group in optimizer.param_groups:
            optimizer._init_group(group, [], [], [], [], [], [])
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    account.own_states(optimizer)


@dataclass
class XRay:
    """What one training step takes: rows of the ledger, and the peak."""

    stage: str
    ledger: Ledger
    peak: int
    """most bytes at any moment"""
    device: str = "gpu"
    notes: tuple[str, ...] = ()
    """what of the plan it does not show"""
    steps: int = 1
    """for how many the ledger has the FLOPs"""

    @classmethod
    def of(cls, account: StepAccount, stage: str, device: str, source: str = "simulated") -> XRay:
        ledger, common = Ledger(), {"stage": stage, "source": source}
        for phase, parts in phase_peaks(account.peaks).items():
            for (role, component), value in parts.items():
                at = {"phase": phase, "role": role, "component": component}
                ledger.add(**at, quantity="bytes", value=value, **common)
        for (phase, role), flops in account.flops.items():
            ledger.add(phase=phase, role=role, quantity="flops", value=flops, **common)
        return cls(stage, ledger, account.peak, device)

    @property
    def flops(self) -> float:
        return self.ledger.total(quantity="flops")

    def __repr__(self) -> str:
        at = next((row.phase for row in self.ledger.at_peak()), "?")
        return "".join(f"{note}\n" for note in self.notes) + (
            f"XRay({self.stage}, {self.device}: {self.peak / 2**30:.3g} GiB in {at}, "
            f"{self.flops / self.steps / 1e12:.3g} TFLOP a step)"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self!r}; at the peak:</p>{self.ledger.at_peak()._repr_html_()}"
