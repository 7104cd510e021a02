"""Sharded SFT steps on a CPU: what is live on each rank, what it sends. Started by `sharded.py`.

    python benchmarks/sharded_worker.py '[{"sharding": "zero2", "ranks": 2, …}, …]'

A plain script with accelerate, no trainer of ours: Llama of random weights, AdamW, rows of random
tokens. A step or two make states and traces; the next is looked at by torch's profiler (the
allocator's peak) and a dispatch mode (every collective with its payload). What is live after
backward is told apart by the names that DeepSpeed and FSDP2 give their tensors. Rank 0 prints a
line of JSON for each case, with the figures of all ranks.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (as above: before the fork)
from transformers.models.mixtral import modeling_mixtral  # noqa: F401

from rlhf_lab.metering.collectives import listen


def llama(case: dict) -> nn.Module:
    """The model of a case, with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**case["config"])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def groups(model: nn.Module) -> list[dict]:
    """Parameters with and without weight decay, as transformers' Trainer parts them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


class Training:
    """Model and optimizer of a case, prepared by accelerate, and one optimizer step at a time."""

    def __init__(self, case: dict):
        from accelerate import Accelerator

        self.case, self.times = case, case.get("accumulation", 1)
        self.deepspeed = case["sharding"].startswith("zero")
        precision = "bf16" if case["precision"] == "bf16" else "no"
        plugin = deepspeed_plugin(case) if self.deepspeed else {}
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(self.deepspeed).lower()
        # DeepSpeed finds the CPU itself; accelerate would not start it where it is asked for one.
        cpu = not self.deepspeed
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision, **plugin)
        model = llama(case)
        adam = torch.optim.AdamW(groups(model), lr=1e-4, fused=True)
        if self.deepspeed:
            self.model, self.optimizer = self.accelerator.prepare(model, adam)
        else:
            wrap = plain_fsdp if case["units"] == "root" else accelerate_fsdp
            self.model = wrap(model, case)
            self.optimizer = torch.optim.AdamW(groups(self.model), lr=1e-4, fused=True)
        for unit in self.model.modules():
            if hasattr(unit, "set_force_sum_reduction_for_comms"):
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        torch.manual_seed(1 + dist.get_rank())
        shape = case["batch"], case["length"]
        self.rows = torch.randint(case["config"]["vocab_size"], shape)
        self.bucket = 0
        layers = [m for m in self.model.modules() if type(m).__name__.endswith(LAYERS)]
        layers[0].register_full_backward_pre_hook(lambda *_: self._sample())

    def _sample(self) -> None:
        """Bytes of DeepSpeed's buckets while backward runs: they are gone when it ends."""
        if self.deepspeed:
            buckets = zero_parts(self)["buckets"]
            self.bucket = max(self.bucket, storage_bytes(buckets, set()))

    def forward(self) -> Tensor:
        return self.model(input_ids=self.rows, labels=self.rows).loss

    def backward(self, loss: Tensor, last: bool) -> None:
        if self.deepspeed:
            self.model.set_gradient_accumulation_boundary(last)
            self.model.backward(loss)
        elif last:
            (loss / self.times).backward()
        else:  # as accelerate's no_sync
            self.model.set_requires_gradient_sync(False)
            (loss / self.times).backward()
            self.model.set_requires_gradient_sync(True)

    def step(self) -> None:
        if self.deepspeed:
            self.model.step()
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def whole(self) -> None:
        """All micro-batches and the step."""
        for number in range(self.times):
            self.backward(self.forward(), number == self.times - 1)
        self.step()


def deepspeed_plugin(case: dict) -> dict:
    from accelerate import DeepSpeedPlugin

    zero = {"stage": int(case["sharding"][-1]), **case.get("zero", {})}
    config = {
        "zero_optimization": zero,
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "train_micro_batch_size_per_gpu": case["batch"],
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case["precision"] == "bf16"},
    }
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}


SETTLE = 0.05
"""Seconds that gloo's thread has to let go of tensors."""
LAYERS = "LlamaDecoderLayer", "MixtralDecoderLayer"


def accelerate_fsdp(model: nn.Module, case: dict) -> nn.Module:
    """What accelerate makes of a model under FSDP2. Its Accelerator does so on GPUs alone, so its
    function is called with what it reads of one."""
    from types import SimpleNamespace

    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    precision = "bf16" if case["precision"] == "bf16" else "no"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[
            name for name in LAYERS if any(type(m).__name__ == name for m in model.modules())
        ],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    if precision != "no":
        plugin.set_mixed_precision(precision)
    plugin.set_auto_wrap_policy(model)
    asked = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=precision,
        torch_device_mesh=None,
        parallelism_config=None,
        device=torch.device("cpu"),
        is_main_process=False,
    )
    return fsdp2_prepare_model(asked, model)


def plain_fsdp(model: nn.Module, case: dict) -> nn.Module:
    """Every layer a unit, and the rest one: what `fully_shard` does by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if case["precision"] == "bf16" else None
    how = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half),
    }
    for module in model.modules():
        if type(module).__name__ in LAYERS:
            fully_shard(module, **how)
    fully_shard(model, **how)
    return model


# ------------------------------------------------------------------------------------ what is live


def storage_bytes(tensors: Iterable[object], seen: set[int]) -> int:
    """Bytes of the storages of these tensors, of each once and none that was `seen`."""
    total = 0
    for tensor in tree_leaves(list(tensors)):
        tensor = getattr(tensor, "_local_tensor", tensor)
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total


def components(training: Training) -> dict[str, int]:
    """Bytes of this rank by component, named by the library that made the tensors."""
    parts = zero_parts(training) if training.deepspeed else fsdp_parts(training)
    seen: set[int] = set()
    found = {name: storage_bytes(tensors, seen) for name, tensors in parts.items()}
    others = (x for x in gc.get_objects() if isinstance(x, Tensor))
    return found | {"other": storage_bytes(others, seen)}


def zero_parts(training: Training) -> dict[str, list]:
    zero, model = training.model.optimizer, training.model.module
    state = [x for s in zero.optimizer.state.values() for x in s.values()]
    weights = list(model.parameters())
    buckets = [getattr(b, "buffer", None) for b in zero.ipg_buckets.values()]
    gradients = [p.grad for p in weights] + [getattr(p, "grad_accum", None) for p in weights]
    gradients += [list(x or ()) for x in zero.averaged_gradients.values()]
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return {
            "parameters": [p.ds_tensor for p in weights],
            "whole": [p.data for p in weights],
            "optimizer": zero.fp32_partitioned_groups_flat + state,
            "buckets": buckets,
            "gradients": [*gradients, zero.grad_partitions_flat_buffer],
        }
    gradients += [list(x or ()) for x in zero.all_grad_tensors.values()]
    return {
        "parameters": weights + zero.bit16_groups_flat,
        "whole": [],
        "optimizer": zero.single_partition_of_fp32_groups + state,
        "buckets": buckets,
        "gradients": gradients,
    }


def fsdp_parts(training: Training) -> dict[str, list]:
    from torch.distributed.fsdp import FSDPModule

    held = []
    for unit in training.model.modules():
        if isinstance(unit, FSDPModule):
            state = unit._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                held += group.fsdp_params if group else []
    sharded = [p.sharded_param for p in held]
    unsharded = [getattr(p, "_unsharded_param", None) for p in held]
    accumulated = [p.unsharded_accumulated_grad for p in held]
    accumulated += [p.grad for p in unsharded if p is not None]
    state = [x for s in training.optimizer.state.values() for x in s.values()]
    return {
        "parameters": sharded,
        "whole": [*unsharded, [p.all_gather_outputs for p in held]],
        "optimizer": state,
        "buckets": [],
        "gradients": [[p.grad for p in sharded], accumulated],
    }


def events(profiler: profile) -> Iterator[tuple[object, bool]]:
    """What torch's profiler has seen, and whether it happened inside a collective."""
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    todo = [(event, False) for event in tree]
    while todo:
        event, inside = todo.pop()
        inside = inside or event.name.startswith("c10d::")
        todo += [(child, inside) for child in event.children]
        yield event, inside


def live_bytes(found: Iterable[tuple[object, bool]]) -> Iterator[tuple[int, int]]:
    """(time, bytes above the start) after each call of torch's allocator; but for copies that gloo
    makes inside a collective, which NCCL does not."""
    from torch._C._profiler import _EventType

    rows = [
        (e.start_time_ns, e.extra_fields.alloc_size, e.extra_fields.ptr, inside)
        for e, inside in found
        if e.tag == _EventType.Allocation
    ]
    now, live = 0, dict[int, int]()
    for time_ns, size, address, inside in sorted(rows, key=lambda row: row[0]):
        now -= live.pop(address, 0 if size > 0 else -size)
        if size > 0:
            live[address] = 0 if inside else size
            now += live[address]
        yield time_ns, now


def profiled(act) -> tuple[object, int, int]:
    """→ (result, highest bytes above the start, bytes above the start at the end)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = act()
    totals = [0, *(now for _, now in live_bytes(events(profiler)))]
    return result, max(totals), totals[-1]


class Sent(TorchDispatchMode):
    """Every collective as the lab's meter hears of it: name, and bytes of each call. Those that are
    called from Python are waited for, and so is gloo's thread, which lets go of the tensors a
    moment later."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {}

    def __enter__(self):
        self.stop = listen(lambda name, size, _: self.calls.setdefault(name, []).append(size))
        return super().__enter__()

    def __exit__(self, *error):
        self.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name().startswith("c10d::"):
            for work in tree_leaves(result):
                if isinstance(work, torch.ScriptObject):
                    work.wait()
            time.sleep(SETTLE)
        return result


def look(training: Training) -> dict:
    """A step to settle (ZeRO-3, which records a trace first: two), and one that is looked at."""
    for _ in range(2 if training.case["sharding"] == "zero3" else 1):
        training.whole()
    gc.collect()
    live, sent, peaks = {"start": components(training)}, Sent(), {}
    base = sum(live["start"].values())

    def watch(name: str, act) -> object:
        nonlocal base
        with sent:
            result, peak, change = profiled(act)
        peaks[name] = max(peaks.get(name, 0), base + peak)
        base += change
        return result

    for number in range(training.times):
        last = number == training.times - 1
        loss = watch("forward", training.forward)
        live["forward"] = components(training)
        watch("backward", lambda loss=loss, last=last: training.backward(loss, last))
        del loss
        live["backward"] = components(training)
    watch("optimizer", training.step)
    calls = {k: [len(v), sum(v)] for k, v in sent.calls.items()}
    return {"live": live, "bucket": training.bucket, "peaks": peaks, "calls": calls}


def run(case: dict, rank: int, port: int) -> None:
    """One rank of one case."""
    join(case, rank, port)
    report(case, look(Training(case)))


def join(case: dict, rank: int, port: int) -> None:
    """What accelerate reads of a process among others."""
    n = str(case["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": n}
    os.environ |= {"LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def report(case: dict, found: dict) -> None:
    """The first rank prints what all of them found."""
    ranks: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        versions = {"torch": torch.__version__, "accelerate": version("accelerate")}
        if case["sharding"].startswith("zero"):
            versions["deepspeed"] = version("deepspeed")
        print("RESULT " + json.dumps({"ranks": ranks, "versions": versions}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def in_ranks(run: Callable[[dict, int, int], None]) -> int:
    """Each case of the command line in as many processes as it has ranks: `run(case, rank, port)`.
    → exit status."""
    cases = json.loads(sys.argv[1])
    if any(case["sharding"].startswith("zero") for case in cases):
        import deepspeed  # noqa: F401  (imported once, before the ranks are made)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for case in cases:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [fork.Process(target=run, args=(case, r, port)) for r in range(case["ranks"])]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(in_ranks(run))
