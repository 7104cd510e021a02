"""What several processes of one training do together, in a process that accelerate has told of the
others; and who writes the run. Alone, a process does it by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TypeVar

from ..runs.ledger import Ledger, Row
from ..runs.run import Run

STOP_FILE = "RLHF_LAB_STOP_FILE"
"""The variable that names the file whose existence asks all processes to end training."""
EVERYWHERE = "an error of every process"
"""The note of an exception that says so."""
T = TypeVar("T")


def place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process' rank and the number of processes, as torchrun and accelerate set them."""
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def sharding(environment: Mapping[str, str] = os.environ) -> str:
    """How models are shared out over the processes, as accelerate sets it."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"zero{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp2" if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "ddp"


def meet(timeout: float) -> None:
    """Meet the other processes on CPUs; what they do together fails after `timeout` seconds without
    an answer. transformers hands its `ddp_timeout` on for GPUs alone."""
    if place()[1] > 1 and os.environ.get("ACCELERATE_USE_CPU") == "true":
        from accelerate import PartialState

        PartialState(cpu=True, timeout=timedelta(seconds=timeout))


def once(make: Callable[[], T]) -> T:
    """What the first process makes, for all of them; where it fails, all do."""
    rank, processes = place()
    if processes == 1:
        return make()
    import torch.distributed as dist

    made: list[T | Exception | None] = [None]
    if rank == 0:
        try:
            made = [make()]
        except Exception as error:
            error.add_note(EVERYWHERE)
            made = [error]
    dist.broadcast_object_list(made)
    result = made[0]
    if isinstance(result, Exception):
        raise result
    return result  # type: ignore[return-value]  # it is what `make` made


def from_all(value: T) -> list[T]:
    """What each process has, by rank, on every process."""
    processes = place()[1]
    if processes == 1:
        return [value]
    import torch.distributed as dist

    values: list[T | None] = [None] * processes
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # each process has put its own there


def any_process(flag: bool) -> bool:
    """Whether one of them says yes, the same answer on every process."""
    return any(from_all(flag))


def load_whole() -> None:
    """Have transformers load whole models from now on. Under ZeRO-3 it would split each of them, as
    it does again once a trainer was made, which splits the one that it trains."""
    if sharding().startswith("zero"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def stop_asked() -> bool:
    """Whether whoever started the processes wants training to end."""
    file = os.environ.get(STOP_FILE, "")
    return file != "" and Path(file).exists()


def merged(ledger: Ledger) -> Ledger:
    """The costs of all processes as a plan counts them: the sum of their FLOPs and tokens, the
    seconds of this one, and under their ranks the memory of the one that holds most, and what that
    one sends that sends most."""
    each = from_all(ledger)
    sums: dict[Row, float] = {}
    for row in Ledger(chain(*each)).filter(quantity=("flops", "tokens")):
        alike = replace(row, value=0.0)
        sums[alike] = sums.get(alike, 0.0) + row.value
    rows = [*ledger.filter(quantity="seconds"), *(replace(r, value=v) for r, v in sums.items())]
    for quantity, size in (("bytes", Ledger.peak), ("sent", Ledger.total)):
        parts = [one.filter(quantity=quantity) for one in each]
        most = max(range(len(parts)), key=lambda rank: size(parts[rank]))
        rows += [replace(row, rank=most) for row in parts[most]]
    return Ledger(rows)


class Follower(Run):
    """A `Run` that writes nothing."""

    writes = False

    def log(self, step: int, **metrics: float | None) -> None: ...

    def sample(self, step: int, rows: Iterable[Mapping[str, object]]) -> None: ...

    def evaluated(self, rows: Iterable[Mapping[str, object]]) -> None: ...

    def save_ledger(self, ledger: Ledger) -> None: ...

    def rewind(self, step: int) -> None: ...

    def finish(self, status: str = "finished", **summary: object) -> None: ...
