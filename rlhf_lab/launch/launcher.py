"""Processes: how one is prepared to train, how several are started, which of them writes.

A command of ours starts in several processes through accelerate. On GPUs that is `accelerate
launch`. On CPUs accelerate's launcher starts plain copies, so there it is torchrun with
`ACCELERATE_USE_CPU`: the processes find each other through gloo.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..runs.ledger import Ledger
from ..runs.run import Run

STRATEGIES = ("ddp",)
ERROR_PREFIX = "rlhf-lab: "
"""How an error message of ours begins; what a launcher prints after it explains nothing."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process' rank and the number of processes, as torchrun and accelerate set them."""
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def command(
    how: str, arguments: Sequence[str], processes: int | None = None, gpus: int = 0
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `rlhf-lab ARGUMENTS` in several processes, and what it adds to
    the environment.

    how: "ddp", or a file that `accelerate config` wrote; processes: as many as there are GPUs, two
    on a CPU, or what the file says. Raises ValueError for something else, in one line.
    """
    program = ["-m", "rlhf_lab.cli", *arguments]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    if how not in STRATEGIES:
        if not Path(how).is_file():
            raise ValueError(
                f"--accelerate {how}: neither {', '.join(STRATEGIES)} nor a file that "
                "`accelerate config` wrote"
            )
        count = ["--num_processes", str(processes)] if processes else []
        return [*accelerate, "--config_file", how, *count, *program], {}
    if gpus:
        if processes and processes > gpus:
            raise ValueError(
                f"--processes {processes}: there are {gpus} GPUs here, and each process needs one"
            )
        count = ["--num_processes", str(processes or gpus)]
        return [*accelerate, "--multi_gpu", *count, *program], {}
    workers = processes or 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    threads = max(1, (os.cpu_count() or 1) // workers)
    env = {"ACCELERATE_USE_CPU": "true"}
    if "OMP_NUM_THREADS" not in os.environ:  # else all processes would use all cores
        env["OMP_NUM_THREADS"] = str(threads)
    return [*torchrun, f"--nproc-per-node={workers}", *program], env


def launch(how: str, arguments: Sequence[str], processes: int | None = None) -> int:
    """Run `rlhf-lab ARGUMENTS` in several processes. → exit code.

    What they write to stderr is passed on up to an error message of ours.
    """
    import torch

    program, environment = command(how, arguments, processes, torch.cuda.device_count())
    failed = False
    with subprocess.Popen(
        program, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            for line in process.stderr or ():
                if not failed:
                    sys.stderr.write(line)
                failed = failed or line.startswith(ERROR_PREFIX)
        except KeyboardInterrupt:  # the processes were interrupted too: they end by themselves
            pass
        code = process.wait()
    return 2 if failed and code else min(code, 1)


def prepare_process() -> None:
    """Call once, when training starts. Safe to call again, and on any system.

    glibc gives every large block back to the kernel when it is freed, and the kernel clears it
    page by page when it is wanted again. Training frees and wants the same blocks thousands of
    times, so we let the process keep up to half a gigabyte of them.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none, and does not need it
            libc.mallopt(M_MMAP_THRESHOLD, 256 << 20)
            libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)
            libc.mallopt(M_TOP_PAD, 32 << 20)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers renamed gradient_checkpointing; TRL still passes the old name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
    # One progress bar is ours: those of datasets and transformers are switched off.
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


class Follower(Run):
    """A `Run` that writes nothing."""

    writes = False

    def log(self, step: int, **metrics: float | None) -> None: ...

    def sample(self, step: int, rows: Iterable[Mapping[str, object]]) -> None: ...

    def evaluated(self, rows: Iterable[Mapping[str, object]]) -> None: ...

    def save_ledger(self, ledger: Ledger) -> None: ...

    def rewind(self, step: int) -> None: ...

    def finish(self, status: str = "finished", **summary: object) -> None: ...
