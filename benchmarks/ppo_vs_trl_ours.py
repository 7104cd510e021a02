"""Our half of `ppo_vs_trl.py`: rlhf_lab's PPOTrainer, in a process of its own.

Not started by hand: `ppo_vs_trl.py` starts it and talks to it (`ppo_worker.py`). Beyond what both
sides do, it times the phases of an iteration, the machine's matrix products, and the operations of
an update.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from ppo_parity_setup import ROOT, our_trainer
from ppo_worker import Make, Watch, serve

sys.path.insert(0, str(ROOT))

from rlhf_lab.metering.meter import Meter, NoMeter  # noqa: E402

UPDATE = ("forward", "backward", "optimizer")
SIZES = (512, 1024, 2048)
"""Square matrix products, fp32, that the machine's rate is the best of."""
GROUPS = {  # of operations, by what their name holds; the first that fits
    "optimizer": ("_fused_adam", "Optimizer.", "_foreach", "lerp", "addcdiv"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "::mv", "::addmv"),
    "softmax and pointwise": (
        *("softmax", "logsumexp", "::mul", "::add", "::sub", "::div", "::neg", "::exp", "::log"),
        *("::silu", "::gelu", "::tanh", "::pow", "::rsqrt", "::mean", "::sum", "::max", "::min"),
        *("::where", "::clamp", "::sin", "::cos", "::sigmoid", "norm", "::square", "::maximum"),
    ),
    "copies and indexing": (
        *("::copy_", "::cat", "::index", "::gather", "::scatter", "::fill", "::zero", "::select"),
        *("::slice", "::embedding", "::masked", "::clone", "::contiguous", "::new_", "::empty"),
        *("::narrow", "::arange", "::ones", "::cumsum", "::to", "::_to", "::view", "::reshape"),
        *("::transpose", "::t", "::expand", "::unsqueeze", "::squeeze", "::nonzero", "::detach"),
    ),
    "other operations": ("aten::",),
}


def versions() -> dict:
    from ppo_parity_setup import our_versions

    return our_versions()


def make(folder: Path, job: dict, watch: Watch, **extra):
    """Our trainer, without a meter where the job brings none."""
    extra = {"meter": NoMeter("ppo")} | extra
    return our_trainer(folder, job, callbacks=[watch], **extra)


# --------------------------------------------------------------------------------------- the phases


class Phases(Watch):
    """The meter's seconds and FLOPs by phase, iteration by iteration."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.before: dict[str, dict] = {"phases": {}, "flops": {}}
        self.found: dict[str, list[dict]] = {"phases": [], "flops": []}

    def on_step_end(self, *args, **kwargs):
        super().on_step_end(*args, **kwargs)
        for name, table in (("phases", self.meter.clock), ("flops", self.meter.flops)):
            now: dict[str, float] = defaultdict(float)
            for (phase, _), value in table.items():
                now[phase] += value
            before, self.before[name] = self.before[name], now
            self.found[name].append({p: v - before.get(p, 0) for p, v in now.items()})


def phases(make: Make, job: dict) -> dict:
    """→ of every iteration after the warm-up: seconds by phase, and each row's real tokens; FLOPs
    by phase where the job asks for them (then its seconds are not to be trusted)."""
    meter, rows = Meter("ppo", flops=job.get("flops", False), memory=False), []

    def lengths(prompts, completion_ids, **_):
        rows.append([(len(p), len(c)) for p, c in zip(prompts, completion_ids, strict=True)])
        return [float(len(c)) for c in completion_ids]

    watch = Phases(meter)
    make(Path(job["folder"]), job, watch, meter=meter, metric_funcs={"tokens": lengths}).train()
    skip = job["warm_up"]
    wall = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    found = {name: table[skip:] for name, table in watch.found.items()}
    return {"rows": rows[skip:], "wall": wall[skip:], **found}


def products(make: Make, job: dict) -> dict:
    """→ FLOP/s of square matrix products on all threads: the median of each size."""
    rates = {}
    for n in SIZES:
        a, b, out, times = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n), []
        end = time.perf_counter() + job["seconds"] / len(SIZES)
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            times.append(time.perf_counter() - start)
        rates[str(n)] = 2 * n**3 / statistics.median(times[1:])
    return {"rates": rates, "best": max(rates.values())}


# -------------------------------------------------------------------------- operations of an update


class UpdateProfile(NoMeter):
    """Runs torch's profiler over the update of one iteration: from its first forward pass to the
    iteration's end."""

    def __init__(self, watch: Watch, iteration: int) -> None:
        super().__init__("ppo")
        self.clock_of, self.iteration, self.profiler = watch, iteration, None

    def phase(self, phase: str, role: str = "", shape=None, tokens: int = 0, *, calls=None):
        reached = len(self.clock_of.times) == self.iteration + 1  # the first time is the beginning
        if phase == "forward" and reached and self.profiler is None:
            from torch.profiler import ProfilerActivity, profile

            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()
            self.began = time.perf_counter()
        return nullcontext()

    def stop(self) -> None:
        if self.profiler is not None:
            self.wall = time.perf_counter() - self.began
            self.profiler.__exit__(None, None, None)


class Stopping(Watch):
    """Ends the profile with its iteration."""

    meter: UpdateProfile

    def on_step_end(self, *args, **kwargs):
        if len(self.times) == self.meter.iteration + 1:
            self.meter.stop()
        super().on_step_end(*args, **kwargs)


def group_of(name: str) -> str:
    """The group that an operation's time is put down to."""
    for group, parts in GROUPS.items():
        if any(part in name for part in parts):
            return group
    return "autograd and dispatch"


def profile_update(make: Make, job: dict) -> dict:
    """→ seconds of one update by group of operations; what no operation took is Python's."""
    watch = Stopping()
    watch.meter = UpdateProfile(watch, job["warm_up"])
    settings = job["settings"]
    episodes = settings["per_device_train_batch_size"] * (job["warm_up"] + 1)
    job = job | {"settings": settings | {"total_episodes": episodes}}
    make(Path(job["folder"]), job, watch, meter=watch.meter).train()
    groups: dict[str, float] = defaultdict(float)
    operations = []
    for event in watch.meter.profiler.key_averages():
        seconds = event.self_cpu_time_total / 1e6
        groups[group_of(event.key)] += seconds
        operations.append(
            {
                "operation": event.key,
                "seconds": seconds,
                "calls": event.count,
                "group": group_of(event.key),
            }
        )
    groups["Python between operations"] = watch.meter.wall - sum(groups.values())
    operations.sort(key=lambda row: -row["seconds"])
    return {"wall": watch.meter.wall, "groups": groups, "operations": operations[:25]}


if __name__ == "__main__":
    serve(make, versions(), phases=phases, products=products, profile=profile_update)
