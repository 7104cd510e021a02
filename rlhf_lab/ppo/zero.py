"""PPO's models under ZeRO (Rajbhandari et al., 1910.02054), by DeepSpeed's own engine.

Policy and value model are one engine with the optimizer. ZeRO-1 and ZeRO-2 keep all weights whole;
ZeRO-3 shares them out, and reference and reward model are engines of their own, without optimizer.
Layers are gathered by hooks of DeepSpeed's as they run, whichever part of a model is called.
`deepspeed.initialize` is called here and not by accelerate, which under DeepSpeed counts one
process on CPUs and turns every optimizer that is offloaded into Adam.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from .config import PPOConfig
from .layouts import ActorCritic, RoleView
from .logprobs import AnyModel
from .sharding import Check, MakeOptimizer, Prepared, Replicated, check_same_weights

ROLES = ("policy", "value")
"""Whose trained weights lie in the optimizer's groups."""


class Zero(Replicated):
    """ZeRO-1, ZeRO-2 or ZeRO-3, as `accelerate launch` has asked for it."""

    def __init__(self, accelerator: Accelerator, args: PPOConfig):
        """Raises ValueError, one line, for what PPO cannot do under DeepSpeed."""
        import deepspeed

        super().__init__(accelerator, args)
        if args.fp16:  # each process would skip steps by a scale of its own
            raise ValueError("PPO under ZeRO takes bf16 or fp32, not fp16")
        # It calls collectives by names that torch 2.13 warns of at every call.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        if accelerator.device.type == "cpu":  # would be compiled for minutes, and is for speed only
            backend = import_module("deepspeed.comm.torch")  # as an attribute that is torch itself
            with patch.object(backend, "build_shm_op", lambda: None):
                deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        self.deepspeed, plugin = deepspeed, DeepSpeedPlugin()
        self.config: dict[str, Any] = plugin.deepspeed_config
        for name in ("optimizer", "scheduler"):
            if name in self.config:
                raise ValueError(f"PPO has its own {name}: leave that of DeepSpeed's config out")
        zero = self.config["zero_optimization"]
        self.stage, self.even = int(zero["stage"]), int(zero["stage"]) > 1
        self.offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        rows = args.per_device_train_batch_size
        passes = -(-args.gradient_accumulation_steps // args.num_mini_batches)
        self.config |= {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": passes,
            "train_batch_size": rows * passes * accelerator.num_processes,
            "gradient_clipping": args.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": args.bf16},
            "fp16": {"enabled": False},
        }
        plugin.deepspeed_config_process(must_match=False)  # nothing may be left to be guessed
        self.frozen: list[nn.Module] = []

    def freeze(self, model: AnyModel) -> None:
        if isinstance(model, RoleView):  # which is a part of what is trained
            return
        check_same_weights(self.accelerator, model)
        if self.stage == 3:
            engine, *_ = self.deepspeed.initialize(model=model, config=self.config)
            self.frozen.append(engine)
        else:
            dtype = torch.bfloat16 if self.config["bf16"]["enabled"] else None
            model.to(self.accelerator.device, dtype)

    def prepare(self, trained: ActorCritic, make: MakeOptimizer) -> Prepared:
        check_same_weights(self.accelerator, trained)
        self.trained = [p for p in trained.parameters() if p.requires_grad]
        optimizer = make(trained)
        # A flat tensor for each role, so that what a process keeps of them is told apart.
        (group,), of_value = optimizer.param_groups, {id(p) for p in trained.value.parameters()}
        parts = (
            [p for p in self.trained if (id(p) in of_value) == value] for value in (False, True)
        )
        optimizer.param_groups = [{**group, "params": part} for part in parts]
        if self.offloads and isinstance(optimizer, (Adam, AdamW)):
            optimizer = map_pytorch_optim_to_deepspeed(optimizer)
        self.config["zero_force_ds_cpu_optimizer"] = False
        self.engine, self.zero, *_ = self.deepspeed.initialize(
            model=trained, optimizer=optimizer, config=self.config
        )
        return self.engine, AcceleratedOptimizer(optimizer, device_placement=False)

    @contextmanager
    def gathered(self, model: AnyModel) -> Iterator[None]:
        if self.stage < 3 or not self.once:
            yield
            return
        inside: AnyModel = getattr(model, "whole", model)
        hooks = self.zero.parameter_offload
        with self.deepspeed.zero.GatheredParameters(list(inside.parameters())):
            hooks.destroy()  # they would let go of each layer that has run
            hooks.forward_hooks.clear()
            hooks.backward_hooks.clear()
            try:
                yield
            finally:
                hooks.setup_zero_stage3_hooks()

    @contextmanager
    def accumulate(self, model: AnyModel, last: bool) -> Iterator[None]:
        model.set_gradient_accumulation_boundary(last)
        yield
        self.accumulating = not last

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def step(self, model: AnyModel, optimizer: Optimizer, limit: float, check: Check) -> float:
        """DeepSpeed tells the norm when the step is made: one that is none ends training then."""
        model.step()
        norm = float(model.get_global_grad_norm())
        check(norm)
        return norm if limit else float("nan")

    def kept(self) -> dict[tuple[str, str], list[Tensor]]:
        zero, found = self.zero, defaultdict[tuple[str, str], list[Tensor]](list)
        group_of = getattr(zero, "sub_group_to_group_id", (0, 1))
        for number, flat in enumerate(self._flats()):
            state = zero.optimizer.state.get(flat, {}).values()
            tensors = [flat, *(x for x in state if isinstance(x, Tensor))]
            found[ROLES[group_of[number]], "optimizer"] += tensors
        if self.stage == 3:  # of both
            found["policy", "gradients"] = [zero.grad_partitions_flat_buffer]
        for number, role in enumerate(ROLES if self.stage < 3 else ()):
            for of_groups in (zero.averaged_gradients, zero.all_grad_tensors):
                found[role, "gradients"] += [
                    x for x in of_groups.get(number) or () if x is not None
                ]
        for bucket in zero.ipg_buckets.values():
            buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
            found["policy", "communication"] += [x for x in buffers if x is not None]
        return found

    def _flats(self) -> Sequence[Tensor]:
        """In fp32 this process' part of what is trained."""
        zero, three = self.zero, self.stage == 3
        flats: Sequence[Tensor] = (
            zero.fp32_partitioned_groups_flat if three else zero.single_partition_of_fp32_groups
        )
        return flats

    # ------------------------------------------------------------------------------ checkpoints

    def state(self, model: nn.Module) -> dict[str, Any]:
        parts = list(model.parameters()) if self.stage == 3 else []
        with self.deepspeed.zero.GatheredParameters(parts):
            return super().state(model)

    def weights(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """In fp32, whatever the model's precision."""
        whole = {n: self.deepspeed.utils.safe_get_full_fp32_param(p) for n, p in trained.items()}
        return self.whole(whole)

    def load_weights(
        self, trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]
    ) -> None:
        for name, parameter in trained.items():
            new = weights[name].to(self.accelerator.device)
            parts = [parameter] if self.stage == 3 else []
            with self.deepspeed.zero.GatheredParameters(parts, modifier_rank=0), torch.no_grad():
                if self.accelerator.is_main_process or not parts:
                    parameter.copy_(new)
            self.deepspeed.utils.safe_set_full_fp32_param(parameter, new.float())

    def optimizer_state(self, optimizer: AcceleratedOptimizer) -> dict[str, Any]:
        """As torch's optimizer has it in one process: by parameter, in their order."""
        self._link_states()
        first = next(iter(optimizer.state.items()), None)
        states: dict[int, dict[str, Any]] = {i: {} for i in range(len(self.trained))}
        for key, value in (first[1] if first else {}).items():
            for number, parameter in enumerate(self.trained):
                if _by_weight(value):
                    get = self.deepspeed.utils.safe_get_full_optimizer_state
                    states[number][key] = get(parameter, key)
                else:  # its step: a tensor that each of them counts up
                    states[number][key] = deepcopy(value)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        numbers = list(range(len(self.trained)))
        return self.whole(
            {"state": states if first else {}, "param_groups": [{**group, "params": numbers}]}
        )

    def _link_states(self) -> None:
        """From weights to what the optimizer keeps for them: DeepSpeed 0.19.8 does so for the first
        group alone."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def load_optimizer(self, optimizer: AcceleratedOptimizer, state: dict[str, Any]) -> None:
        for group in optimizer.param_groups:
            group |= {k: v for k, v in state["param_groups"][0].items() if k != "params"}
        if not state["state"]:
            return
        for flat in self._flats():
            optimizer.state[flat] = {
                key: torch.zeros_like(flat) if _by_weight(value) else deepcopy(value)
                for key, value in state["state"][0].items()
            }
        self._link_states()
        for number, parameter in enumerate(self.trained):
            for key, value in state["state"][number].items():
                if _by_weight(value):
                    new = value.to(self.accelerator.device, torch.float32)
                    self.deepspeed.utils.safe_set_full_optimizer_state(parameter, new, key)


def _by_weight(value: object) -> bool:
    """Whether part of an optimizer's state has a number for each weight, as its step has not."""
    return isinstance(value, Tensor) and value.dim() > 0
