"""What the two workers of `ppo_vs_trl.py` share: clock, curve, memory, conversation.

A worker is one long-lived process: it reads a job (a line of JSON) from its input, does it, answers
with one line, and sleeps until the next. Both sides run this file, so that both are measured by the
same lines; it imports torch and transformers and nothing of ours, since TRL's environment has none.

`make(folder, job, watch)` of each side makes a fresh trainer with `watch` among its callbacks.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

Make = Callable[[Path, dict, "Watch"], object]
NAMES = {"objective/scores": "score", "objective/kl": "kl", "response_length": "length"}
"""Metric → one name for both sides. KL in nats per response, length in tokens with the stop."""


class Enough(Exception):
    """The time is up: TRL's trainer knows no other way to end early."""


class Watch(TrainerCallback):
    """Reads the clock after every iteration and keeps what was logged."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []
        """seconds of this process, of all its threads"""
        self.lines: list[dict] = []
        self.optimizer = None

    def more(self) -> dict:
        """What a side knows of an iteration and its trainer does not log."""
        return {}

    def on_train_begin(self, args, state, control, *, optimizer=None, **kwargs):
        self.optimizer = optimizer
        self.read_clock()

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = {NAMES.get(k, k): v for k, v in (logs | self.more()).items()}
        self.lines.append({k: line[k] for k in NAMES.values()})

    def on_step_end(self, args, state, control, **kwargs):
        self.read_clock()

    def read_clock(self) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())


class Race(Watch):
    """Trains for a number of seconds: the learning rate falls to 0 along the clock, and at every
    mark the policy is saved while the clock stands still."""

    def __init__(self, seconds: float, marks: list[float], folder: Path) -> None:
        super().__init__()
        self.seconds, self.marks, self.folder = seconds, list(marks), folder
        self.clock, self.since, self.saved = 0.0, 0.0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.perf_counter()

    def on_step_end(self, args, state, control, *, model=None, optimizer=None, **kwargs):
        self.clock += time.perf_counter() - self.since
        left = max(0.0, 1 - self.clock / self.seconds)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * left
        over = self.clock >= self.seconds
        if over or (self.marks and self.clock >= self.marks[0]):
            self.marks = [m for m in self.marks if m > self.clock]
            path = self.folder / f"{len(self.saved):03d}"
            getattr(model, "policy", model).save_pretrained(path)
            self.saved.append(
                {
                    "seconds": self.clock,
                    "iterations": state.global_step,
                    "path": str(path),
                    **self.lines[-1],
                }
            )
        if over:
            raise Enough
        self.since = time.perf_counter()


# ------------------------------------------------------------------------------------------- memory


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def resident_peak(work: Callable[[], object]) -> tuple[int, int]:
    """→ (resident bytes before `work`, highest resident bytes during it)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    before = status_bytes("VmRSS")
    work()
    return before, status_bytes("VmHWM")


def allocated_peak(work: Callable[[], object]) -> int:
    """Highest "Total Allocated" of torch's CPU allocator above what it was at first, in bytes."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found, todo = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            extra = event.extra_fields
            found.append((event.start_time_ns, extra.total_allocated, extra.alloc_size))
    _, total, size = min(found)
    return max(total for _, total, _ in found) - (total - size)


def state_bytes(optimizer) -> int:
    """Bytes of an optimizer's state."""
    states = optimizer.state.values()
    return sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))


# ---------------------------------------------------------------------------------------- the tasks


def train(make: Make, job: dict) -> dict:
    """`warm_up` and then `iterations` iterations; → seconds of the latter, and every log line."""
    watch = Watch()
    trainer = make(Path(job["folder"]), job, watch)
    trainer.train()
    seconds = watch.times[-1] - watch.times[job["warm_up"]]
    return {
        "seconds": seconds,
        "cpu_seconds": watch.cpu[-1] - watch.cpu[job["warm_up"]],
        "first": watch.times[1] - watch.times[0],
        "iterations": len(watch.times) - 1 - job["warm_up"],
        "log": watch.lines,
    }


def race(make: Make, job: dict) -> dict:
    """Train for `seconds`; → policies saved at the `marks`, each with its training seconds."""
    watch = Race(job["seconds"], job["marks"], Path(job["out"]))
    trainer = make(Path(job["folder"]), job, watch)
    try:
        trainer.train()
    except Enough:
        return {"saved": watch.saved, "log": watch.lines}
    raise RuntimeError(f"total_episodes ended the run after {watch.clock:.0f} s of training")


def memory(make: Make, job: dict) -> dict:
    """Peak of whole iterations by the kernel, or (`profiler`) by torch's own allocator."""
    trainer = make(Path(job["folder"]), job, watch := Watch())
    if job["profiler"]:
        found = {"growth": allocated_peak(trainer.train)}
    else:
        before, peak = resident_peak(trainer.train)
        found = {"growth": peak - before, "resident_before": before, "resident_peak": peak}
    return found | {"state": state_bytes(watch.optimizer)}


def resident(make: Make, job: dict) -> dict:
    """What the process holds now."""
    gc.collect()
    return {"bytes": status_bytes("VmRSS")}


# --------------------------------------------------------------------------------- the conversation


def serve(make: Make, versions: dict, **tasks: Callable[[Make, dict], dict]) -> None:
    """Answer jobs until the input ends. What libraries print goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known = {"train": train, "race": race, "memory": memory, "resident": resident, **tasks}
    known["versions"] = lambda make, job: versions | {"torch": torch.__version__}
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = known[job["task"]](make, job)
        except Exception:
            answer = {"error": traceback.format_exc()}
        gc.collect()  # trainers hold themselves in circles: the next job starts without this one
        print(json.dumps(answer), file=answers, flush=True)
