"""What the sections of `ppo_vs_trl.py` share: workers to talk to, targets, tables, results."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_parity_setup import COMMON, HERE, ROOT

RESULTS = HERE / "results" / "ppo_vs_trl.json"
SCRIPTS = {"ours": HERE / "ppo_vs_trl_ours.py", "TRL": HERE / "ppo_vs_trl_trl.py"}
QUIET = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
MALLOC = {  # what `rlhf_lab.launch.launcher.prepare_process` sets, for a process without rlhf_lab
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(32 << 20),
}
EQUAL = COMMON | {"optim": "adamw_torch_fused"}
"""Settings of equal work: 64 x 1 responses, 16 optimizer steps an iteration, the same optimizer."""
GIB = 2**30


@dataclass
class Options:
    """What the command line says."""

    python: Path
    model: Path
    repeats: int
    iterations: int
    threads: int
    budget: float
    quick: bool
    kills: int = 20
    seeds: int = 5
    scratch: Path = field(default=Path("."))

    @property
    def warm_up(self) -> int:
        return 1 if self.quick else 2


class Worker:
    """One side's process, asleep until it is asked."""

    def __init__(self, side: str, options: Options, malloc: bool = False) -> None:
        self.side = side
        python = options.python if side == "TRL" else sys.executable
        env = os.environ | QUIET | {"OMP_NUM_THREADS": str(options.threads)}
        env |= MALLOC if malloc else {}
        env["TORCHINDUCTOR_CACHE_DIR"] = str(options.scratch / "inductor" / side)  # empty at first
        self.errors = open(options.scratch / f"{side}.err", "a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(python), str(SCRIPTS[side])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=env,
        )

    def ask(self, task: str, **job: Any) -> dict:
        """Have one job done. Raises RuntimeError with what the worker said when it failed."""
        print(json.dumps({"task": task, **job}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise RuntimeError(f"{self.side}'s worker failed at {task}:\n{answer['error']}")
        return answer

    def _last_words(self) -> str:
        self.errors.seek(0)
        return "".join(self.errors.readlines()[-15:]) or "it ended without a word"

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.process.kill()
        self.close()


def job_of(folder: Path, settings: dict, iterations: int, seed: int, **more: Any) -> dict:
    """A job of whole iterations, the same for both sides."""
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    settings = settings | {"seed": seed, "total_episodes": batch * iterations}
    return {
        "folder": str(folder),
        "dtype": "float32",
        "inject": False,
        "settings": settings,
        **more,
    }


# ------------------------------------------------------------------------------ figures and targets


def target(what: str, figure: float, limit: float, *, at_least: bool) -> dict:
    """One row of the table of targets; an infinite figure is written as None: never reached."""
    met = figure >= limit if at_least else figure <= limit
    sign = "≥" if at_least else "≤"
    figure = figure if math.isfinite(figure) else None
    return {"what": what, "figure": figure, "target": f"{sign} {limit:g}", "met": bool(met)}


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """A median with its range, to read."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def show(title: str, rows: Sequence[dict], columns: Sequence[str] | None = None) -> None:
    from rlhf_lab.display import table

    shown = [{c: row.get(c, "") for c in columns} for row in rows] if columns else rows
    print(f"\n{title}\n{table(shown)}", flush=True)


def show_targets(section: dict) -> None:
    """Every target with the figure that was reached, missed ones included."""
    rows = [
        {
            **t,
            "figure": "never" if t["figure"] is None else f"{t['figure']:.3g}",
            "met": "yes" if t["met"] else "MISSED",
        }
        for t in section.get("targets", [])
    ]
    if rows:
        show("targets", rows)


def machine() -> dict:
    """The machine and how busy it is."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "processor": (names or [platform.processor()])[0],
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def keep(out: Path, name: str, section: dict, options: Options) -> None:
    """Put one section into the results; the others stay."""
    results = json.loads(out.read_text()) if out.is_file() else {}
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "threads": options.threads,
        "quick": options.quick,
    }
    results[name] = about | section
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".tmp")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(out)


def repository() -> None:
    """Make `rlhf_lab` of this repository the one that is imported, here and in the workers."""
    sys.path.insert(0, str(ROOT))
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
