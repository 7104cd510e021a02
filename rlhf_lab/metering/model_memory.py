"""Memory of a live run by role: a `MemoryTracker` that is switched on for a few steps.

When it is switched on, it labels what is there (parameters and buffers, gradients, optimizer
state, held tensors) and sees every tensor made from then on. What a watched model makes in its
forward pass is its role's; gradients are labelled as they arrive in `.grad`; what a cache holds is
`kv_cache`; what an output head returns, and what TRL's fused head makes, is `logits`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar
from unittest.mock import patch

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .memory_tracker import MemoryKey, MemoryTracker, PhaseKey, rounded_bytes

T = TypeVar("T")
ModelInputs: TypeAlias = Mapping[str, Any]
"""Arguments of a transformers model by name."""


def call_shape(model: nn.Module, args: Sequence[Tensor], kwargs: ModelInputs) -> tuple[int, ...]:
    """The features that the FLOPs of one call of a transformers model are linear in.

    For b sequences of q tokens, k positions to look at: (tokens b·q, pairs b·q·k, pairs in
    sliding-window layers, rows of logits, positions q, sequences b).
    """
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = args[0] if args else kwargs["inputs_embeds"]
    rows, new = ids.shape[:2]
    cache = kwargs.get("past_key_values")
    cached = cache.get_seq_length() if cache is not None else 0
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    near = min(cached, window - 1) if window else cached
    logits = kwargs.get("logits_to_keep", 0)
    logits = logits if isinstance(logits, int) and 0 < logits < new else new
    tokens = rows * new
    return tokens, tokens * (cached + new), tokens * (near + new), rows * logits, new, rows


States: TypeAlias = Mapping[Tensor, Mapping[str, object]]
"""An optimizer's state: parameter → name → tensor or number."""
_Watched: TypeAlias = tuple["weakref.ref[nn.Module]", "weakref.ref[Optimizer] | None"]
"""A model, and the optimizer of a trained one."""


class Shards(Protocol):
    """How models are kept whose gradients and states no parameter leads to."""

    accumulating: bool
    """whether gradients of a pass before are there"""

    def kept(self) -> Mapping[MemoryKey, Sequence[Tensor]]:
        """What there is of roles, by role and component."""


class ModelMemory:
    """A `MemoryTracker` that can be switched on in the middle of a run."""

    def __init__(self, block: int = 1, enabled: bool = True) -> None:
        self.tracker = MemoryTracker(block)
        self.on = False
        self._enabled = enabled
        self._models: dict[str, _Watched] = {}
        self._held: list[weakref.ref[Tensor]] = []
        self._undo = ExitStack()  # hooks, while it is on
        self._states: dict[str, int] = {}  # role → bytes of optimizer state
        self.shards: Callable[[], Shards | None] = lambda: None
        self._accumulates = False  # whether FSDP2 holds whole gradients of passes before

    # ------------------------------------------------------------------------------ what is there

    def add(self, role: str, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """A model of a role; the latest one where a role is named twice."""
        self._models.pop(role, None)  # to the end of their order
        ref = weakref.ref(optimizer) if optimizer is not None else None
        self._models[role] = weakref.ref(model), ref

    def hold(self, tensors: Iterable[object]) -> None:
        """Count these too, whenever it is switched on while they live."""
        new = [t for t in tree_leaves(list(tensors)) if isinstance(t, Tensor)]
        if self.on:
            self.tracker.own("", "activations", new)
        self._held = [r for r in self._held if r() is not None] + [weakref.ref(t) for t in new]

    def _alive(self) -> Iterator[tuple[str, nn.Module, States]]:
        """(role, model, its optimizer's state by parameter)"""
        for role, (model_ref, optimizer_ref) in self._models.items():
            if (model := model_ref()) is not None:
                optimizer = optimizer_ref() if optimizer_ref is not None else None
                yield role, model, optimizer.state if optimizer is not None else {}

    def ready(self, phase: str) -> bool:
        """Can this phase be tracked? The optimizer's only once its state exists."""
        if not self._enabled or not self._models:
            return False
        optimizers = [ref() for _, ref in self._models.values() if ref is not None]
        return phase != "optimizer" or not optimizers or any(o.state for o in optimizers if o)

    @property
    def accumulating(self) -> bool:
        """Does a trained model hold gradients already?"""
        shards = self.shards()
        if self._accumulates or shards and shards.accumulating:
            return True
        for model, optimizer in self._models.values():
            if optimizer is not None and (module := model()) is not None:
                trained = (p for p in module.parameters() if p.requires_grad)
                if getattr(next(trained, None), "grad", None) is not None:
                    return True
        return False

    def measure_states(self) -> None:
        """Note how large the optimizer's state is, while there is one."""
        for role, model, state in self._alive():
            tensors = (t for p in model.parameters() for t in _tensors(state.get(p)))
            if size := sum(rounded_bytes(tensor, self.tracker.block) for tensor in tensors):
                self._states[role] = size
        for role, component, more in self._kept():
            if component == "optimizer":
                self._states[role] = sum(rounded_bytes(x, self.tracker.block) for x in more)

    def _kept(self) -> Iterator[tuple[str, str, Sequence[Tensor]]]:
        """(role, component, tensors that no parameter leads to)"""
        if shards := self.shards():
            for (role, component), tensors in shards.kept().items():
                yield role, component, tensors

    def _own_kept(self) -> None:
        for role, component, tensors in self._kept():
            self.tracker.own(role, component, tensors)

    # ------------------------------------------------------------------------------ on and off

    def start(self) -> None:
        """Switch on, and label what is there."""
        if self.on:
            return
        self.on = True
        self._undo.enter_context(self.tracker)
        own, roles = self.tracker.own, dict[int, str]()
        for role, model, state in self._alive():
            parameters = list(model.parameters())
            parts = [getattr(p, "ds_tensor", p) for p in parameters]  # of ZeRO-3
            own(role, "parameters", [*parts, *model.buffers()])
            own(role, "gradients", [p.grad for p in parameters if p.grad is not None])
            own(role, "optimizer", [t for p in parameters for t in _tensors(state.get(p))])
            self._hook(role, model)
            roles |= {id(p): role for p in parameters}
        self._own_kept()
        own("", "activations", [t for t in (r() for r in self._held) if t is not None])
        accumulated = partial(setattr, self, "_accumulates")
        self._undo.enter_context(labelled_shards(self.tracker, roles, accumulated))
        self._undo.enter_context(labelled_caches(self.tracker))
        self._undo.enter_context(fused_head_within(lambda: self.tracker.labelled("logits")))

    def stop(self) -> None:
        """Switch off: what lives on stays counted, new tensors go unseen."""
        if not self.on:
            return
        self.measure_states()
        self.on = False
        self._undo.close()

    def phase(self, phase: str, role: str) -> AbstractContextManager[None]:
        """A block of the tracker; see `MemoryTracker.phase`."""
        self._own_kept()
        component = "workspace" if phase == "optimizer" else "activations"
        return self.tracker.phase(phase, role, component)

    def peaks(self) -> dict[PhaseKey, dict[MemoryKey, int]]:
        """(phase, role) → bytes by (role, component) at the phase's peak.

        A phase that was tracked before the optimizer's state existed gets it added: it lives
        through every later one.
        """
        self.measure_states()
        peaks = {at: dict(parts) for at, parts in self.tracker.peaks.items()}
        for parts in peaks.values():
            for role, size in self._states.items():
                parts[role, "optimizer"] = max(size, parts.get((role, "optimizer"), 0))
        return peaks

    # ----------------------------------------------------------------------------------- labels

    def follow(self, set_role: Callable[[str], None]) -> list[RemovableHandle]:
        """Hooks for a step that trains several models: `set_role(role)` is called when a model
        begins to run, and in the backward pass when gradients reach what it returned."""
        models = self._models.items()
        trained = [(role, m) for role, (ref, o) in models if o is not None and (m := ref())]
        if len(trained) < 2:
            return []
        hooks: list[RemovableHandle] = []
        for role, model in trained:

            def begin(*_: object, role: str = role) -> None:
                set_role(role)
                if self.on:
                    self.tracker.label = (role, "activations")

            def end(
                module: nn.Module, args: object, output: object, begin: Callable[..., None] = begin
            ) -> None:
                values = list(output.values()) if isinstance(output, dict) else output
                for tensor in tree_leaves(values):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(begin)

            for module in (model, *model.children()):  # the trunk or the head may be called alone
                hooks.append(module.register_forward_pre_hook(begin))
                hooks.append(module.register_forward_hook(end))
        return hooks

    def _hook(self, role: str, model: nn.Module) -> None:
        """Label what this model makes, while the tracker is on."""
        tracker = self.tracker

        def own_logits(module: nn.Module, args: object, logits: Tensor) -> None:
            tracker.own(tracker.label[0], "logits", [logits])

        head = getattr(model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            self._undo.callback(head.register_forward_hook(own_logits).remove)
        for hook in tracker.own_gradients(role, model):
            self._undo.callback(hook.remove)


def _tensors(state: Mapping[str, object] | None) -> list[Tensor]:
    """The tensors of one parameter's optimizer state."""
    return [t for t in (state or {}).values() if isinstance(t, Tensor)]


CACHES = "update", "update_recurrent_state", "update_conv_state", "update_indexer"
"""What transformers' caches make: keys and values, states of other layers, keys of an indexer."""


@contextmanager
def labelled_caches(tracker: MemoryTracker) -> Iterator[None]:
    """While it lasts, what a transformers cache makes is `kv_cache`."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:  # nobody has a cache
        yield
        return

    def labelled(update: Callable[..., object]) -> Callable[..., object]:
        def of_cache(*args: object, **kwargs: object) -> object:
            with tracker.labelled("kv_cache"):
                made = update(*args, **kwargs)
            if isinstance(made, tuple):  # keys and values
                tracker.own(tracker.label[0], "kv_cache", made)
            return made

        return of_cache

    with ExitStack() as stack:
        for name in CACHES:
            stack.enter_context(
                patch.object(module.Cache, name, labelled(getattr(module.Cache, name)))
            )
        yield


@contextmanager
def labelled_shards(
    tracker: MemoryTracker, roles: Mapping[int, str], accumulated: Callable[[bool], None]
) -> Iterator[None]:
    """While it lasts, weights that FSDP2 has gathered, and its buffers, are `communication`; the
    gradients it makes are those of their parameters' roles, by `id`. `accumulated` is told whether
    gradients stay whole after a backward pass."""
    home = "torch.distributed.fsdp._fully_shard._fsdp_param"
    module, groups = sys.modules.get(home), sys.modules.get(f"{home}_group")
    if module is None or groups is None:  # nothing is sharded
        yield
        return
    group = groups.FSDPParamGroup
    tracker.recount()

    def resizing(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def call(tensor: Tensor) -> None:
            function(tensor)
            tracker.resized(tensor)

        return call

    def sending(function: Callable[..., T]) -> Callable[..., T]:
        def call(self: Any, *args: object, **kwargs: object) -> T:
            with tracker.labelled("communication"):
                return function(self, *args, **kwargs)

        return call

    def reducing(function: Callable[..., None]) -> Callable[..., None]:
        def call(self: Any, *args: object) -> None:
            sending(function)(self, *args)
            stay = False
            for p in self.fsdp_params:
                unsharded = getattr(p, "_unsharded_param", None)
                kept = [p.unsharded_accumulated_grad, getattr(unsharded, "grad", None)]
                stay = stay or any(x is not None for x in kept)
                if role := roles.get(id(p.sharded_param)):
                    made = [x for x in (p.sharded_param.grad, *kept) if x is not None]
                    tracker.own(role, "gradients", made)
            accumulated(stay)

        return call

    with ExitStack() as stack:
        for name in ("alloc_storage", "free_storage"):
            resize = resizing(getattr(module, name))
            stack.enter_context(patch.object(module, name, resize))
            if hasattr(groups, name):
                stack.enter_context(patch.object(groups, name, resize))
        for name in ("unshard", "wait_for_unshard"):
            stack.enter_context(patch.object(group, name, sending(getattr(group, name))))
        stack.enter_context(patch.object(group, "post_backward", reducing(group.post_backward)))
        yield


@contextmanager
def fused_head_within(block: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """TRL's fused head, forward and backward, runs within a block of its own. Nothing happens
    where TRL was not imported: then nobody calls it."""
    module = sys.modules.get("trl.kernels.chunked_logprob")
    if module is None:
        yield
        return
    head = module.ChunkedLogProbFunction

    def within(function: Callable[..., T]) -> staticmethod[..., T]:
        def call(*args: object, **kwargs: object) -> T:
            with block():
                return function(*args, **kwargs)

        return staticmethod(call)

    with (
        patch.object(head, "forward", within(head.forward)),
        patch.object(head, "backward", within(head.backward)),
    ):
        yield
