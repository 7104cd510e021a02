"""Whose tensors a live run holds: the account of the meter, switched on for a few steps.

When it is switched on, it takes over what is there (parameters and buffers, gradients, optimizer
state, held tensors) and sees every tensor made from then on. Labels: what a watched model makes
in its forward pass is its role's; gradients as they arrive in `.grad`; what a cache holds is
`kv_cache`; what an output head returns, and what TRL's fused head makes, is `logits`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .account import Account, Key
from .patch import fused_head_within, patched


def call_shape(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The features that the FLOPs of one call of a transformers model are linear in.

    For b sequences of q tokens, k positions to look at: (tokens b·q, pairs b·q·k, pairs in
    sliding-window layers, rows of logits, positions q, sequences b).
    """
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = args[0] if args else kwargs["inputs_embeds"]
    rows, new = ids.shape[:2]
    cache = kwargs.get("past_key_values")
    seen = cache.get_seq_length() if cache is not None else 0
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    near = min(seen, window - 1) if window else seen
    kept = kwargs.get("logits_to_keep", 0)
    kept = kept if isinstance(kept, int) and 0 < kept < new else new
    tokens = rows * new
    return tokens, tokens * (seen + new), tokens * (near + new), rows * kept, new, rows


class TensorWatch:
    """An `Account` that can be switched on in the middle of a run."""

    def __init__(self, block: int = 1, enabled: bool = True):
        self.account = Account(block)
        self.on = False
        self._enabled = enabled
        self._models: list[tuple[str, weakref.ref, weakref.ref | None]] = []
        self._held: list[weakref.ref] = []
        self._undo = ExitStack()  # hooks, while it is on
        self._states: dict[str, int] = {}  # role → bytes of optimizer state

    # ------------------------------------------------------------------------------ what is there

    def add(self, role: str, model: nn.Module, optimizer: Any = None) -> None:
        """A model of a role; the latest one where a role is named twice."""
        self._models = [m for m in self._models if m[0] != role]
        made = weakref.ref(optimizer) if optimizer is not None else None
        self._models.append((role, weakref.ref(model), made))

    def hold(self, tensors: Iterable[Any]) -> None:
        """Own these too, whenever it is switched on while they live."""
        new = [t for t in tree_leaves(list(tensors)) if isinstance(t, Tensor)]
        if self.on:
            self.account.own("", "activations", new)
        self._held = [r for r in self._held if r() is not None] + [weakref.ref(t) for t in new]

    def _alive(self) -> Iterator[tuple[str, nn.Module, Mapping]]:
        """(role, model, its optimizer's state by parameter)"""
        for role, model, optimizer in self._models:
            if (module := model()) is not None:
                made = optimizer() if optimizer is not None else None
                yield role, module, made.state if made is not None else {}

    def ready(self, phase: str) -> bool:
        """Can this phase be accounted? The optimizer's only once its state exists."""
        if not self._enabled or not self._models:
            return False
        trained = [o() for _, _, o in self._models if o is not None]
        return phase != "optimizer" or not trained or any(o.state for o in trained if o is not None)

    @property
    def accumulating(self) -> bool:
        """Does a trained model hold gradients already?"""
        for _, model, optimizer in self._models:
            if optimizer is not None and (module := model()) is not None:
                trained = (p for p in module.parameters() if p.requires_grad)
                if getattr(next(trained, None), "grad", None) is not None:
                    return True
        return False

    def measure_states(self) -> None:
        """Note how large the optimizer's state is, while there is one."""
        for role, model, state in self._alive():
            size, block = 0, self.account.block
            for parameter in model.parameters():
                for tensor in _tensors(state.get(parameter)):
                    size += -(-tensor.untyped_storage().nbytes() // block) * block
            if size:
                self._states[role] = size

    # ------------------------------------------------------------------------------ on and off

    def start(self) -> None:
        """Switch on, and take over what is there."""
        if self.on:
            return
        self.on = True
        self.account.__enter__()
        own = self.account.own
        for role, model, state in self._alive():
            parameters = list(model.parameters())
            own(role, "parameters", [*parameters, *model.buffers()])
            own(role, "gradients", [p.grad for p in parameters if p.grad is not None])
            own(role, "optimizer", [t for p in parameters for t in _tensors(state.get(p))])
            self._hook(role, model)
        own("", "activations", [t for t in (r() for r in self._held) if t is not None])
        self._undo.enter_context(_labelled_caches(self.account))
        self._undo.enter_context(fused_head_within(lambda: self.account.labelled("logits")))

    def stop(self) -> None:
        """Switch off: what lives on stays in the account, new tensors go unseen."""
        if not self.on:
            return
        self.measure_states()
        self.on = False
        self._undo.close()
        self.account.__exit__(None, None, None)

    def phase(self, phase: str, role: str):
        """A block of the account; see `Account.phase`."""
        component = "workspace" if phase == "optimizer" else "activations"
        return self.account.phase(phase, role, component)

    def peaks(self) -> dict[Key, dict[Key, int]]:
        """(phase, role) → bytes by (role, component) at the phase's peak.

        A phase that was accounted before the optimizer's state existed gets it added: it lives
        through every later one.
        """
        self.measure_states()
        found = {at: dict(parts) for at, parts in self.account.peaks.items()}
        for parts in found.values():
            if not any(component == "optimizer" for _, component in parts):
                parts.update({(role, "optimizer"): size for role, size in self._states.items()})
        return found

    # ----------------------------------------------------------------------------------- labels

    def follow(self, switch: Callable[[str], None]) -> list[Any]:
        """Hooks that say whose turn it is, where a step trains several models: `switch(role)` when
        a model begins to run, and in the backward pass when gradients reach what it returned."""
        trained = [(r, m()) for r, m, optimizer in self._models if optimizer is not None and m()]
        if len(trained) < 2:
            return []
        hooks = []
        for role, model in trained:

            def begin(*_, role=role):
                self._turn(role, switch)

            def end(module, args, output, begin=begin):
                made = list(output.values()) if isinstance(output, dict) else output
                for tensor in tree_leaves(made):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(begin)

            for module in (model, *model.children()):  # the trunk or the head may be called alone
                hooks.append(module.register_forward_pre_hook(begin))
                hooks.append(module.register_forward_hook(end))
        return hooks

    def _turn(self, role: str, switch: Callable[[str], None]) -> None:
        switch(role)
        if self.on:
            self.account.label = (role, "activations")

    def _hook(self, role: str, model: nn.Module) -> None:
        """Label what this model makes, while the account is on."""
        account, own = self.account, self.account.own

        def arrived(parameter):
            if parameter.grad is not None:
                own(role, "gradients", [parameter.grad])

        head = getattr(model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            self._undo.callback(
                head.register_forward_hook(
                    lambda module, args, out: own(account.label[0], "logits", [out])
                ).remove
            )
        for parameter in model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(arrived)
                self._undo.callback(hook.remove)


def _tensors(state: Any) -> list[Tensor]:
    """The tensors of one parameter's optimizer state."""
    return [t for t in (state or {}).values() if isinstance(t, Tensor)]


@contextmanager
def _labelled_caches(account: Account) -> Iterator[None]:
    """While it lasts, keys and values that a transformers cache takes in are `kv_cache`."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:  # nobody has a cache
        yield
        return
    update = module.Cache.update

    def labelled(cache, *args, **kwargs):
        out = update(cache, *args, **kwargs)
        account.own(account.label[0], "kv_cache", out)
        return out

    with patched(module.Cache, "update", labelled):
        yield
