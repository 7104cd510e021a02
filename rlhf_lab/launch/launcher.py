"""Processes: how one is prepared to train, how several are started and stopped.

A command of ours starts in several processes through accelerate. On GPUs that is `accelerate
launch`. On CPUs accelerate's launcher starts plain copies, so there it is torchrun with
`ACCELERATE_USE_CPU`: the processes find each other through gloo.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .processes import STOP_FILE, load_whole

ERROR_PREFIX = "rlhf-lab: "
"""How an error message of ours begins; what a launcher prints after it explains nothing."""
INTERRUPTED = 130
"""The exit code of processes that were asked to stop."""
CONFIG_FILE = "accelerate.yaml"

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Hosts:
    """Where the processes are: how many in all, on how many hosts, of which this is number `rank`;
    `address`: HOST[:PORT] of the first."""

    processes: int
    nodes: int = 1
    rank: str = "0"
    address: str = ""
    sharding: str = ""
    """how PPO's models are shared out, where accelerate does not say so: on CPUs"""


def command(
    config: str, arguments: Sequence[str], hosts: Hosts
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts `rlhf-lab ARGUMENTS` in several processes, and what it adds to
    the environment. `config`: the file of accelerate's configuration; "": on CPUs."""
    program = ["-m", "rlhf_lab.cli", *arguments]
    host, _, port = hosts.address.partition(":")
    port = port or "29500"
    if config:
        line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        line += ["--num_processes", str(hosts.processes)]
        where = ["--machine_rank", hosts.rank, "--main_process_ip", host]
        line += [*where, "--main_process_port", port] if hosts.nodes > 1 else []
        return [*line, *program], {}
    each = hosts.processes // hosts.nodes
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={each}"]
    nodes = [f"--nnodes={hosts.nodes}", f"--node-rank={hosts.rank}"]
    nodes += [f"--master-addr={host}", f"--master-port={port}"]
    line += nodes if hosts.nodes > 1 else ["--standalone"]
    env = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if hosts.sharding.startswith("zero"):
        env |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = hosts.sharding[-1]
    elif hosts.sharding:
        env["ACCELERATE_USE_FSDP"] = "true"
    if "OMP_NUM_THREADS" not in os.environ:  # else all processes would use all cores
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // each))
    return [*line, *program], env


def launch(config: str, arguments: Sequence[str], hosts: Hosts, quiet: bool = False) -> int:
    """Run `rlhf-lab ARGUMENTS` in several processes. `config`: accelerate's configuration as YAML;
    "": on CPUs. `quiet`: without torch's warnings (DDP has one of transformers' choice to look for
    unused parameters). → exit code.

    What they write to stderr is passed on up to an error message of ours.
    """
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        stop, file = Path(folder, "stop"), Path(folder, CONFIG_FILE)
        file.write_text(config, encoding="utf-8")
        program, environment = command(str(file) if config else "", arguments, hosts)
        env = {**os.environ, **environment, STOP_FILE: str(stop)}
        env |= {"TORCH_CPP_LOG_LEVEL": "ERROR"} if quiet else {}
        # In a session of their own: an interrupt ends their step, not the processes.
        with subprocess.Popen(
            program, env=env, stderr=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        ) as process:
            with _signals(process, stop):
                for line in process.stderr or ():
                    if not failed:
                        sys.stderr.write(line)
                    failed = failed or line.startswith(ERROR_PREFIX)
                code = process.wait()
        if stop.exists():
            return INTERRUPTED
    return 2 if failed and code else min(code, 1)


@contextmanager
def _signals(process: subprocess.Popen[str], stop: Path) -> Iterator[None]:
    """The first interrupt asks the processes to stop, the second ends them; they end too where this
    process is told to, or fails."""

    def interrupt(*_: object) -> None:
        if stop.exists():
            process.terminate()
        stop.touch()

    def end(*_: object) -> None:
        sys.exit(1)

    main = threading.current_thread() is threading.main_thread()
    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: end} if main else {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.terminate()


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
    load_whole()
    # One progress bar is ours: transformers' are switched off, as are those of datasets in stages
    # that need it (`trainers/trl.py`).
    from transformers.utils import logging

    logging.disable_progress_bar()
