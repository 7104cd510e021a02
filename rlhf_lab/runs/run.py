"""A run on disk: what was trained, how, what it cost and what it wrote.

One folder per run, plain files, readable without any training code:

    run.json        stage, model, data, seed, hardware, settings, versions, status, summary
    metrics.jsonl   one line per `log`: {"step": 10, "loss": 2.31}; null stands for NaN
    ledger.jsonl    the measured costs (`rlhf_lab.runs.ledger`)
    samples.jsonl   what the model wrote, one line per sample
    model/          the trained model as transformers saves it

`run.json` is replaced atomically; the `.jsonl` files only grow, so a killed run loses at most
its last line. Everything is read from disk when asked for: a `Run` loaded in one process
follows a training in another.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from .ledger import STAGES, Ledger

STATUSES = ("running", "finished", "stopped", "failed")
_FILES = ("metrics.jsonl", "ledger.jsonl", "samples.jsonl", "model", "adapter", "trainer")
_PACKAGES = (
    *("rlhf-lab", "torch", "transformers", "trl", "accelerate", "peft", "datasets"),
    *("tokenizers", "safetensors", "numpy"),
)


class Run:
    """A run folder. Make one with `Run.create` (to train) or `Run.load` (to look)."""

    writes = True
    """whether this process writes it (`scale/follower.py`)"""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._read: dict[str, tuple[Any, Any]] = {}  # file -> (its size and time, its content)

    # -- making one ---------------------------------------------------------------------------
    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        stage: str,
        model: str,
        settings: Any,
        data: Any = None,
        seed: int = 0,
        hardware: Any = None,
        overwrite: bool = False,
    ) -> Run:
        """Start a run in an empty or new folder (or, with `overwrite`, in place of an old run).

        `settings` is a mapping, a dataclass or anything with `to_dict` (TRL's configs).
        """
        if stage not in STAGES:
            raise ValueError(f"stage={stage!r}: choose from {', '.join(STAGES)}")
        run = cls(folder)
        run._make_room(overwrite)
        config = {
            "stage": stage,
            "model": model,
            "data": data,
            "seed": seed,
            "hardware": hardware,
            "settings": settings,
            "versions": _versions(),
            "started": _now(),
            "status": "running",
            "summary": {},
        }
        run._write_config(_plain(config))
        return run

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Run:
        """Open a run that is on disk, finished or still going."""
        run = cls(folder)
        if not (run.folder / "run.json").is_file():
            missing = "" if run.folder.is_dir() else "; there is no such folder"
            raise FileNotFoundError(f"no run in {run.folder}: looked for run.json there{missing}")
        run._config()  # a broken run.json is said here, not at some later attribute
        return run

    def _make_room(self, overwrite: bool) -> None:
        """See that the folder is free. Only a run's own files are ever deleted."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: a run needs a folder of its own")
        is_run = (folder / "run.json").is_file()
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            what = "already holds a run" if is_run else "is not empty"
            raise FileExistsError(f"{folder} {what}: choose another folder or say overwrite=True")
        ours = [folder / name for name in _FILES if (folder / name).exists()]
        if ours and not is_run:
            raise FileExistsError(
                f"{folder} holds {ours[0].name} but no run.json, so it is not a run to overwrite"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if is_run:
            # run.json goes last: a deletion cut short still leaves a run that can be overwritten.
            for path in (*ours, *folder.glob("checkpoint*"), folder / "run.json"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @classmethod
    def reopen(cls, folder: str | os.PathLike[str], **said: Any) -> Run | None:
        """The run in a folder, to go on with it; None where there is none yet.

        Raises ValueError where it was started with something else than `said` (stage, model, data,
        seed, settings): the first difference.
        """
        run = cls(folder)
        if not (run.folder / "run.json").is_file():
            return None
        config = run.config
        there = {**config, **{f"settings.{k}": v for k, v in config["settings"].items()}}
        here = {k: _plain(v) for k, v in said.items()}
        here |= {f"settings.{k}": v for k, v in here.pop("settings").items()}
        for name in here.keys() | {n for n in there if n.startswith("settings.")}:
            old, new = there.get(name), here.get(name)
            if old != new:
                raise ValueError(
                    f"cannot resume {folder}: {name.removeprefix('settings.')} was {old!r} there "
                    f"and is {new!r} now; say the same as then, or start anew (overwrite)"
                )
        return run

    # -- writing ------------------------------------------------------------------------------
    def log(self, step: int, **metrics: float | None) -> None:
        """Append the metrics of one step. Several calls may speak of the same step."""
        line: dict[str, Any] = {"step": int(step)}
        for name, value in metrics.items():
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError):
                shown = f"{type(value).__name__} {str(value)[:40]!r}"
                raise ValueError(f"metric {name!r} must be a number, not {shown}") from None
            line[name] = number if math.isfinite(number) else None
        self._append("metrics.jsonl", [line])

    def sample(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append what the model wrote at one step: one mapping per sample."""
        lines = [{"step": int(step), **{str(k): _plain(v) for k, v in row.items()}} for row in rows]
        self._append("samples.jsonl", lines)

    def rewind(self, step: int) -> None:
        """Go back to where a checkpoint of `step` was written: metrics and samples of later steps
        are dropped, and samples that were taken when training had ended."""
        stage = self.stage
        for name, kept in (
            ("metrics.jsonl", [r for r in self.metrics if r["step"] <= step]),
            (
                "samples.jsonl",
                [r for r in self.samples if r["step"] <= step and r.get("when") != stage],
            ),
        ):
            draft = self.folder / f".{name}.{os.getpid()}.tmp"
            lines = [{k: None if v != v else v for k, v in row.items()} for row in kept]
            draft.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            draft.replace(self.folder / name)
        self._write_config({**self._config(), "status": "running", "summary": {}})

    def save_ledger(self, ledger: Ledger) -> None:
        """Put the run's costs on disk, in place of what was there."""
        ledger.save(self.folder / "ledger.jsonl")

    def finish(self, status: str = "finished", **summary: Any) -> None:
        """Say how the run ended; `summary` is added to what the summary already holds."""
        if status not in STATUSES[1:]:
            raise ValueError(f"status={status!r}: choose from {', '.join(STATUSES[1:])}")
        config = dict(self._config())
        config["summary"] = {**config.get("summary", {}), **_plain(summary)}
        self._write_config({**config, "status": status, "ended": _now()})

    def _write_config(self, config: Mapping[str, Any]) -> None:
        draft = self.folder / f".run.json.{os.getpid()}.tmp"
        draft.write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(self.folder / "run.json")
        self._read.pop("run.json", None)

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with open(self.folder / name, "ab+") as file:
            _drop_torn_line(file)
            file.write(text.encode())  # closing flushes: a reader sees whole lines at once

    # -- reading ------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def config(self) -> dict[str, Any]:
        """run.json without its summary."""
        return {key: value for key, value in self._config().items() if key != "summary"}

    @property
    def stage(self) -> str:
        return self._config()["stage"]

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` or `failed`."""
        return self._config()["status"]

    @property
    def summary(self) -> dict[str, Any]:
        """What `finish` was told: final figures, by name."""
        return dict(self._config().get("summary", {}))

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Every logged line: `{"step": 10, "loss": 2.31}`, NaN where it was not a number."""
        return self._cached("metrics.jsonl", lambda path: _read_lines(path, math.nan))

    @property
    def last_step(self) -> int:
        """The highest step that was logged; 0 before any."""
        return int(max((line["step"] for line in self.metrics), default=0))

    @property
    def metric_names(self) -> list[str]:
        """What was logged, in the order of first appearance."""
        names = dict.fromkeys(name for line in self.metrics for name in line)
        return [name for name in names if name != "step"]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """One metric as (steps, values): only the steps at which it was logged."""
        found = [(line["step"], line[name]) for line in self.metrics if name in line]
        if not found:
            known = ", ".join(self.metric_names) or "no metrics yet"
            raise ValueError(f"no metric {name!r} in run {self.name}; it has: {known}")
        steps, values = zip(*found)
        return list(steps), list(values)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote, oldest first, each with its `step`."""
        return self._cached("samples.jsonl", lambda path: _read_lines(path, None))

    @property
    def ledger(self) -> Ledger:
        """The run's costs; empty until they are saved."""
        return Ledger(self._cached("ledger.jsonl", Ledger.load))

    @property
    def model_path(self) -> Path:
        """Where the trained model is, or will be once the run saves it."""
        return self.folder / "model"

    def _config(self) -> dict[str, Any]:
        return self._cached("run.json", _read_config)

    def _cached(self, name: str, read: Callable[[Path], Any]) -> Any:
        """A file's content, parsed again only when the file has changed."""
        path = self.folder / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            if name == "run.json":
                raise FileNotFoundError(f"no run in {self.folder}: run.json is gone") from None
            return []
        key = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if self._read.get(name, (None,))[0] != key:
            self._read[name] = (key, read(path))
        return self._read[name][1]

    # -- how it looks -------------------------------------------------------------------------
    def __repr__(self) -> str:
        config = self._config()
        return (
            f"Run({self.name!r}, stage={config['stage']!r}, model={config['model']!r}, "
            f"status={config['status']!r}, steps={self.last_step})"
        )

    def show(self) -> Any:
        """The run at a glance: what it changed, what it cost; folded away, every metric's span."""
        # Imported when shown: a run stands on the ground floor, its looks in the widgets' wing.
        from ..display import Display, escape, html_table, table

        config = self._config()
        head = (
            f"{self.name}: {config['stage']} of {config['model']}, seed {config['seed']}, "
            f"{config['status']} at step {self.last_step}"
        )
        spans = [_span(name, self.series(name)[1]) for name in self.metric_names]
        parts = [rows for rows in (_changes(self.summary), _facts(self.summary)) if rows]
        text = "\n\n".join([head, *map(table, parts + [spans] * bool(spans))])
        page = f"<p>{escape(head)}</p>" + "".join(map(html_table, parts))
        if spans:
            page += f"<details><summary>every metric</summary>{html_table(spans)}</details>"
        return Display(text, page)

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


def _span(name: str, values: list[float]) -> dict[str, Any]:
    real = [v for v in values if math.isfinite(v)]
    ends = (real[0], real[-1], min(real), max(real)) if real else (math.nan,) * 4
    return {"metric": name, **dict(zip(("first", "last", "lowest", "highest"), ends))}


def _changes(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a summary knows from before training and from after it."""
    rows = [(name, summary.get(f"before/{name}"), after) for name, after in summary.items()]
    return [
        {"held-out": name, "before": before, "after": after}
        for name, before, after in rows
        if before is not None
    ]


def _facts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rest of a summary, seconds and bytes in words."""
    from ..display import format_bytes, format_seconds

    words = {"seconds": format_seconds, "peak_bytes": format_bytes}
    rest = [n for n in summary if not n.startswith("before/") and f"before/{n}" not in summary]
    return [{"summary": n, "value": words.get(n, _fact)(summary[n])} for n in rest]


def _fact(value: Any) -> Any:
    if isinstance(value, Mapping):  # rows dropped, by reason
        return ", ".join(f"{name}: {_fact(part)}" for name, part in value.items())
    return value if isinstance(value, (int, float, str)) or value is None else json.dumps(value)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    missing = [key for key in ("stage", "model", "seed", "status") if key not in config]
    if missing:
        raise ValueError(f"{path} does not describe a run: it lacks {', '.join(missing)}")
    return config


def _read_lines(path: Path, null: Any) -> list[dict[str, Any]]:
    """JSON lines; a last line that a killed process left half-written is left out."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: the file was damaged") from None
        if row is not None:
            rows.append({k: null if v is None else v for k, v in row.items()})
    return rows


def _drop_torn_line(file: Any) -> None:
    """Cut off a half-written last line, so that the next one does not grow onto it."""
    end = size = file.seek(0, os.SEEK_END)
    block = 4096
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def _plain(value: Any) -> Any:
    """Anything as strict JSON with no memory addresses in it, so that two runs can be compared."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("to_dict", "tolist"):  # TRL's configs; numpy's and torch's numbers
        if not isinstance(value, type) and callable(getattr(value, method, None)):
            return _plain(getattr(value, method)())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    return str(getattr(value, "__qualname__", None) or getattr(value, "name", type(value).__name__))


def _versions() -> dict[str, str]:
    """Versions as installed, read without importing (torch alone takes two seconds)."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
