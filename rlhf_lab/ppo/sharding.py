"""Where PPO's models lie: whole in every process, or shared out over all of them.

The trainer goes through one code path; what differs is here. `Replicated` is one process, or
several under DDP. `FullyShard` is torch's FSDP2: of every model each process keeps its part of each
weight, with gradient and optimizer state if it is trained, and layers are gathered as they run.
accelerate shards on GPUs only, so `fully_shard` is called here, on any device. DeepSpeed's ZeRO is
in `zero.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from .config import PPOConfig
from .layouts import ActorCritic, RoleView
from .logprobs import AnyModel
from .sampling import LanguageModel

MakeOptimizer = Callable[[nn.Module], Optimizer]
Prepared = tuple[nn.Module, AcceleratedOptimizer]
Check = Callable[[float], None]
"""What is told the norm of a step's gradients, and raises where training has broken."""


class Replicated:
    """Every process has every model whole."""

    even = False
    """whether all processes must make the same passes, since they gather weights for each"""
    accumulating = False
    """whether gradients of a pass before are kept where no parameter leads to them"""

    def __init__(self, accelerator: Accelerator, args: PPOConfig):
        self.accelerator, self.once = accelerator, args.ds3_gather_for_generation

    def freeze(self, model: AnyModel) -> None:
        """Put a model that is not trained where it belongs."""
        model.to(self.accelerator.device)

    def prepare(self, trained: ActorCritic, make: MakeOptimizer) -> Prepared:
        """The module of the update and its optimizer, as accelerate wraps them."""
        both: Prepared = self.accelerator.prepare(trained, make(trained))
        return both

    def passes(self, *models: AnyModel | None) -> AbstractContextManager[object]:
        """While it lasts, trunks and heads of these models may be called on their own."""
        return nullcontext()

    def gathered(self, model: AnyModel) -> AbstractContextManager[object]:
        """While it lasts a model is whole, where `ds3_gather_for_generation` says so."""
        return nullcontext()

    @contextmanager
    def sampling(self, model: AnyModel) -> Iterator[LanguageModel]:
        """While it lasts responses are sampled, from the model that it gives: without
        `ds3_gather_for_generation` layers are gathered for each token, on all processes at once
        until the last one has sampled its last."""
        with self.gathered(model):
            if self.once or not self.even:
                yield model
            else:
                with in_step(model, self.accelerator.device) as call:
                    yield call

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """One pass of a minibatch: gradients are summed over processes in the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Gradients are averaged over processes; our sums are divided by global counts."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(
        self, model: nn.Module, optimizer: AcceleratedOptimizer, limit: float, check: Check
    ) -> float:
        """One optimizer step; rule 17: gradients are clipped, by their global norm. → that norm,
        NaN where there is no limit."""
        norm = float("nan")
        if limit:
            found = self.accelerator.clip_grad_norm_(model.parameters(), limit)
            norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
            if self.accelerator.scaler is None:  # which skips such a step by itself
                check(norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def kept(self) -> Mapping[tuple[str, str], Sequence[Tensor]]:
        """What is kept of trained roles and no parameter leads to: (role, component) → tensors."""
        return {}

    def state(self, model: nn.Module) -> dict[str, Any]:
        """A model's state, whole on the first process."""
        return self.whole(model.state_dict())

    def weights(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Trained weights by name, whole on the first process."""
        return self.whole(trained)

    @torch.no_grad()
    def load_weights(
        self, trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]
    ) -> None:
        """Whole weights, which every process has, to where they lie."""
        for name, parameter in trained.items():
            parameter.copy_(like(weights[name], parameter))

    def optimizer_state(self, optimizer: AcceleratedOptimizer) -> dict[str, Any]:
        """An optimizer's state as one process has it, whole on the first one."""
        return self.whole(optimizer.state_dict())

    def load_optimizer(self, optimizer: AcceleratedOptimizer, state: dict[str, Any]) -> None:
        """The same back, on any number of processes."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = {
            i: {n: like(x, parameters[i]) if torch.is_tensor(x) else x for n, x in of.items()}
            for i, of in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": states})

    def whole(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors of a state, gathered on the first process; None on the others. Tied ones stay
        one."""
        first, seen = self.accelerator.is_main_process, dict[tuple[object, ...], Tensor]()

        def of(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            key: tuple[object, ...] = (id(x),)
            if isinstance(x, DTensor):
                key = x.to_local().data_ptr(), x.shape
                x = x.full_tensor()
            return seen.setdefault(key, x.detach().cpu().contiguous()) if first else None

        made: dict[str, Any] = tree_map(of, dict(tree))
        return made


def check_same_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Raises ValueError where processes hold other weights: each would keep parts of its own
    model."""
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum()
    sums = sums.to(accelerator.device)
    least, *_, most = sorted([*accelerator.gather(sums.reshape(1)).tolist(), float(sums)])
    if most - least > 1e-9 * abs(most):
        raise ValueError(
            "processes begin with different weights: load the same ones in each "
            "(fsdp_cpu_ram_efficient_loading: false)"
        )


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as the other one lies: of a sharded one, this process' part."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    here = tensor.to(other.device, other.dtype)
    return distribute_tensor(here, other.device_mesh, other.placements, src_data_rank=None)


# ----------------------------------------------------------------------------------------- FSDP2


class _Root(nn.Module):
    """What FSDP2 takes for the whole of a model: embeddings, norms and heads are its own unit, each
    layer is one below it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def begin(self) -> None:
        """A pass of nothing: from now on FSDP2 knows what is inside."""

    def forward(self, *args: object) -> object:
        return self.model(*args)


class FullyShard(Replicated):
    """FSDP2: trained and frozen models alike, the latter without gradients and optimizer."""

    even = True

    def __init__(self, accelerator: Accelerator, args: PPOConfig):
        from torch.distributed.device_mesh import init_device_mesh

        super().__init__(accelerator, args)
        if accelerator.mixed_precision == "fp16":  # a scaler of each process would skip steps alone
            raise ValueError("PPO under FSDP2 takes bf16 or fp32, not fp16")
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.roots: list[AnyModel] = []

    def freeze(self, model: AnyModel) -> None:
        if not isinstance(model, RoleView):  # which is a part of what is trained
            self._shard(model)

    def prepare(self, trained: ActorCritic, make: MakeOptimizer) -> Prepared:
        root = self._shard(trained)
        return root, self.accelerator.prepare_optimizer(make(trained))

    def _shard(self, model: nn.Module) -> AnyModel:
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        model.to(self.accelerator.device)
        root: AnyModel = _Root(model)
        names = set[str]()
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                names.update(part._no_split_modules or ())
        check_same_weights(self.accelerator, model)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}
        half = kind.get(self.accelerator.mixed_precision)
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
        layers = [part for part in model.modules() if type(part).__name__ in names]
        for part in (*layers, root):
            fully_shard(part, mesh=self.mesh, mp_policy=policy)
        for unit in root.modules():
            if isinstance(unit, FSDPModule) and self.mesh.device_type == "cpu":
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        register_fsdp_forward_method(root, "begin")
        with torch.no_grad():
            root.begin()
            root.reshard()
        self.roots.append(root)
        return root

    def _root(self, model: AnyModel) -> AnyModel:
        """What holds a model, or the model that a role lives in; None where nothing does."""
        inside: AnyModel = getattr(model, "whole", model)
        return next((root for root in self.roots if inside in root.modules()), None)

    @contextmanager
    def passes(self, *models: AnyModel | None) -> Iterator[None]:
        """Embeddings, norms and heads are whole; layers are gathered as they run."""
        found = (self._root(model) for model in models if model is not None)
        roots = {id(root): root for root in found if root is not None}
        for root in roots.values():
            root.unshard()
        try:
            yield
        finally:
            for root in roots.values():
                root.reshard()

    @contextmanager
    def gathered(self, model: AnyModel) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        inside: AnyModel = getattr(model, "whole", model)
        layers = [part for part in inside.modules() if isinstance(part, FSDPModule)] * self.once
        with self.passes(model):
            for layer in layers:
                layer.unshard()
                layer.set_reshard_after_forward(False, recurse=False)
            try:
                yield
            finally:
                for layer in layers:
                    layer.set_reshard_after_forward(True, recurse=False)
                    layer.reshard()

    @contextmanager
    def accumulate(self, model: AnyModel, last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        yield


@contextmanager
def in_step(model: AnyModel, device: torch.device) -> Iterator[LanguageModel]:
    """A model whose every pass is one of all processes: whoever has none left makes empty ones,
    until nobody has one."""
    import torch.distributed as dist

    def someone_runs(mine: int) -> bool:
        running = torch.tensor(mine, device=device)
        dist.all_reduce(running)
        return bool(running)

    def call(*args: object, **kwargs: object) -> object:
        someone_runs(1)
        return model(*args, **kwargs)

    yield call
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    while someone_runs(0):
        model(input_ids=token, use_cache=False, logits_to_keep=1)
