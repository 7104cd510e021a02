"""A run on disk: what was trained, how, what it cost and what it wrote.

One folder per run, plain files, readable without any training code:

    run.json        stage, model, data, seed, hardware, settings, versions, status, summary
    metrics.jsonl   one line per `log`: {"step": 10, "loss": 2.31}; null stands for NaN
    ledger.jsonl    the measured costs (`rlhf_lab.runs.ledger`)
    samples.jsonl   what the model wrote, one line per sample
    evaluation.jsonl  every held-out response before and after training: ids of prompt and response,
                    and the figures whose means the summary has
    model/          the trained model as transformers saves it

`run.json` is replaced atomically; the `.jsonl` files only grow, so a killed run loses at most
its last line. Everything is read from disk when asked for: a `Run` loaded in one process
follows a training in another.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..display import Display, by_surface, check_choice, escape, html_table, table
from ..stages import STAGES, read_table
from .figures import Unfinished, changes, facts, spans, with_meanings
from .json_files import (
    CachedFile,
    JsonObject,
    append_lines,
    json_lines,
    no_folder,
    packaged_folder,
    read_lines,
    replace_file,
    to_json_object,
    versions,
)
from .ledger import Ledger
from .lock import LOCK, acquire, check_free, is_locked, release

if TYPE_CHECKING:
    from filelock import FileLock

WHOLE = "rest.pt"
"""The file that is written last of a checkpoint: one without it was cut short."""
BATCH = "per_device_train_batch_size", "gradient_accumulation_steps", "processes"
"""What makes the number of rows in a step."""
STATUSES = ("running", "finished", "stopped", "failed")
_FILES = (
    *("metrics.jsonl", "ledger.jsonl", "samples.jsonl", "evaluation.jsonl"),
    *("model", "adapter", "trainer", "teacher"),
)


def notebooks_folder() -> Path:
    """The course's notebooks."""
    return packaged_folder("notebooks")


class Run:
    """A run folder. Make one with `Run.create` (to train) or `Run.load` (to look)."""

    writes = True
    """whether this process writes it (`launch/processes.py`)"""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock: FileLock | None = None
        self._config_file = CachedFile(self.folder / "run.json", _read_config, self._no_config)
        self._metrics_file = CachedFile(self.folder / "metrics.jsonl", _read_metrics, lambda: [])
        self._samples_file = CachedFile(self.folder / "samples.jsonl", read_lines, lambda: [])
        self._ledger_file = CachedFile(self.folder / "ledger.jsonl", Ledger.load, Ledger)

    # -- making one ---------------------------------------------------------------------------
    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        stage: str,
        model: str,
        settings: object,
        data: object = None,
        seed: int = 0,
        hardware: object = None,
        processes: int = 1,
        overwrite: bool = False,
        keep: Sequence[str] = (),
        **more: object,
    ) -> Run:
        """Start a run in an empty or new folder (or, with `overwrite`, in place of an old run, of
        which it may `keep` files).

        `settings` is a mapping, a dataclass or anything with `to_dict` (TRL's configs). Of `more`
        what is not empty: `sources` of settings that nobody gave; `models` that are not the model's
        own; `reward_funcs` and `losses` by name; `specimen`, what is wrong on purpose; `clone`.
        """
        check_choice("stage", stage, STAGES)
        run = cls(folder)
        run.check_room(overwrite)
        run.claim()
        for path in (p for p in run._check_content(overwrite) if p.name not in keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        what = {"stage": stage, "model": model, "data": data, "seed": seed, "hardware": hardware}
        what |= {name: value for name, value in more.items() if value}
        what |= {"processes": processes} if processes > 1 else {}
        state = {"versions": versions(), "started": _now(), "status": "running", "summary": {}}
        run._write_config({**what, "settings": settings, **state})
        return run

    @classmethod
    def load(cls, folder: Run | str | os.PathLike[str]) -> Run:
        """Open a run that is on disk, finished or still going; an open one is given back."""
        if isinstance(folder, Run):
            return folder
        run = cls(folder)
        if not (run.folder / "run.json").is_file():
            if not run.folder.is_dir():
                raise FileNotFoundError(no_folder(run.folder))
            raise FileNotFoundError(f"no run in {run.folder}: looked for run.json there")
        _ = run.config  # a broken run.json is reported here, not at some later attribute
        return run

    @classmethod
    def stored(cls, name: str) -> Run:
        """A run that the notebooks show beside their own (`make course_runs`); `ppo_small` alone
        has a model. Raises ValueError for another name."""
        folder = notebooks_folder() / "course_runs"
        check_choice("name", name, sorted(p.parent.name for p in folder.glob("*/run.json")))
        return cls.load(folder / name)

    def check_room(self, overwrite: bool = False) -> None:
        """Raises OSError, one line, where no run can be made in this folder. Writes nothing."""
        check_free(self.folder)
        self._check_content(overwrite)
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        try:
            tempfile.TemporaryDirectory(dir=there).cleanup()
        except OSError as error:
            raise OSError(
                f"no run can be written in {self.folder} ({error.strerror}): choose another folder"
            ) from None

    def _check_content(self, overwrite: bool) -> list[Path]:
        """What would be deleted for a new run: a run's own files, its run.json last."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: a run needs a folder of its own")
        inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        is_run = "run.json" in inside
        if inside - {LOCK} and not overwrite:
            what = f"already holds a run{self._how_it_ended()}" if is_run else "is not empty"
            instead = by_surface("say overwrite=True", "give --overwrite")
            raise FileExistsError(f"{folder} {what}: choose another folder or {instead}")
        ours = [folder / name for name in _FILES if name in inside]
        if ours and not is_run:
            raise FileExistsError(
                f"{folder} holds {ours[0].name} but no run.json, so it is not a run to overwrite"
            )
        # A deletion cut short still leaves a run that can be overwritten.
        return [*ours, *folder.glob("checkpoint*"), folder / "run.json"] if is_run else []

    def _how_it_ended(self) -> str:
        """` (interrupted at step 3: …)`, where that can be read."""
        try:
            return f" ({self.what_is_left() or self.status})"
        except ValueError:
            return ""

    def claim(self) -> None:
        """Keep the folder to this process until `finish`, or until its end. Raises FileExistsError
        where another one writes in it."""
        self._lock = self._lock or acquire(self.folder)

    @classmethod
    def reopen(cls, folder: str | os.PathLike[str], **given: object) -> Run | None:
        """The run in a folder, to go on with it; None where there is none yet.

        Raises ValueError where it was started with something else than is `given` (stage, model,
        data, its rows, seed, settings): the first difference.
        """
        run = cls(folder)
        check_free(run.folder)
        if not (run.folder / "run.json").is_file():
            return None
        config = run.config
        there = {"processes": 1, "rows": given.get("rows"), **config}
        here = {"processes": 1, **to_json_object(given)}
        same_place = there["processes"] == here["processes"]
        for known in (there, here):
            known |= {f"settings.{k}": v for k, v in known.pop("settings").items()}
            known |= {f"{k}_model": v for k, v in (known.pop("models", None) or {}).items()}
            if not same_place:  # the same rows in a step, whoever passes which of them
                known[f"settings.{' × '.join(BATCH)}"] = math.prod(
                    known.pop(f"settings.{name}", None) or 1 for name in BATCH[:2]
                ) * known.pop("processes")
        of_there = {n for n in there if n.startswith("settings.") or n.endswith("_model")}
        for name in here.keys() | of_there:
            old, new = there.get(name), here.get(name)
            if old != new:
                raise ValueError(
                    f"cannot resume {folder}: {name.removeprefix('settings.')} was {old!r} there "
                    f"and is {new!r} now; say the same as then, or start anew "
                    f"({by_surface('overwrite', '--overwrite')})"
                )
        return run

    # -- writing ------------------------------------------------------------------------------
    def log(self, step: int, **metrics: float | None) -> None:
        """Append the metrics of one step. Several calls may be of the same step."""
        line: dict[str, float | None] = {"step": int(step)}
        for name, value in metrics.items():
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError):
                shown = f"{type(value).__name__} {str(value)[:40]!r}"
                raise ValueError(f"metric {name!r} must be a number, not {shown}") from None
            line[name] = number if math.isfinite(number) else None
        append_lines(self.folder / "metrics.jsonl", [line])

    def sample(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Append what the model wrote at one step: one mapping per sample."""
        lines = [{"step": int(step), **to_json_object(row)} for row in rows]
        append_lines(self.folder / "samples.jsonl", lines)

    def evaluated(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append the responses to held-out prompts: `when` they were sampled, `prompt_ids`, `ids`,
        whether they `ended`, figures of each."""
        append_lines(self.folder / "evaluation.jsonl", [to_json_object(row) for row in rows])

    def rewind(self, step: int) -> None:
        """Go back to where a checkpoint of `step` was written: metrics and samples of later steps
        are dropped, and samples that were taken when training had ended."""
        metrics = [to_json_object(line) for line in self.metrics if line["step"] <= step]
        samples = [r for r in self.samples if r["step"] <= step and r.get("when") != self.stage]
        before = [row for row in self.evaluation if row["when"] != self.stage]
        kept = {"metrics": metrics, "samples": samples, "evaluation": before}
        for name, lines in kept.items():
            if (path := self.folder / f"{name}.jsonl").exists():
                replace_file(path, json_lines(lines))
        self._write_config({**self._config_file.read(), "status": "running", "summary": {}})

    def save_ledger(self, ledger: Ledger) -> None:
        """Put the run's costs on disk, in place of what was there."""
        ledger.save(self.folder / "ledger.jsonl")

    def finish(self, status: str = "finished", **summary: object) -> None:
        """Write down how the run ended; `summary` is added to what the summary already holds."""
        check_choice("status", status, STATUSES[1:])
        config = self._config_file.read()
        whole = {**config.get("summary", {}), **summary}
        self._write_config({**config, "summary": whole, "status": status, "ended": _now()})
        release(self.folder, self._lock)
        self._lock = None

    def _write_config(self, config: Mapping[str, object]) -> None:
        text = json.dumps(to_json_object(config), indent=2, allow_nan=False) + "\n"
        replace_file(self.folder / "run.json", text)
        self._config_file.parsed = None

    # -- reading ------------------------------------------------------------------------------
    def _no_config(self) -> JsonObject:
        raise FileNotFoundError(f"no run in {self.folder}: run.json is gone")

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def config(self) -> JsonObject:
        """run.json without its summary."""
        return {k: value for k, value in self._config_file.read().items() if k != "summary"}

    @property
    def stage(self) -> str:
        return str(self._config_file.read()["stage"])

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped`, `failed`, or `interrupted`: its process was killed."""
        status = str(self._config_file.read()["status"])
        return status if status != "running" or is_locked(self.folder) else "interrupted"

    def what_is_left(self) -> str:
        """Of a run that did not come to its end: where it stopped, what there is of it, and how to
        go on, in a line; "" for one that is finished, or going on."""
        status, folder = self.status, self.folder
        if status in ("running", "finished"):
            return ""
        has_model = (folder / "model").is_dir()
        there = f"its model so far is in {folder / 'model'}" if has_model else "no model was saved"
        how = by_surface("start again with overwrite=True", "start again with --overwrite")
        if self.checkpoints:
            same = by_surface(f"out={str(folder)!r}, resume=True", f"--out {folder} --resume")
            how = f"go on with the same settings and {same}"
        return f"{status} at step {self.last_step}: {there}; {how}"

    @property
    def checkpoints(self) -> list[Path]:
        """The whole checkpoints to go on from, the newest first."""
        whole = [file.parent for file in self.folder.glob(f"trainer/checkpoint-*/{WHOLE}")]
        return sorted(whole, key=lambda p: int(p.name.split("-")[1]), reverse=True)

    @property
    def summary(self) -> JsonObject:
        """What `finish` was given: final figures, by name. Raises KeyError for one that is not
        there, and says so of held-out figures, which only a run that went to its end has."""
        summary: JsonObject = self._config_file.read().get("summary", {})
        figures = {name_today(name): value for name, value in summary.items()}
        return figures if self.status == "finished" else Unfinished(figures, self.status)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Every logged line: `{"step": 10, "loss": 2.31}`, NaN where it was not a number."""
        return self._metrics_file.read()

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
        found = [(line["step"], _measured(name, line)) for line in self.metrics if name in line]
        if not found:
            known = ", ".join(self.metric_names) or "no metrics yet"
            raise ValueError(f"no metric {name!r} in run {self.name}; it has: {known}")
        steps, values = zip(*found)
        return list(steps), list(values)

    @property
    def samples(self) -> list[JsonObject]:
        """What the model wrote, oldest first, each with its `step`."""
        return self._samples_file.read()

    @property
    def evaluation(self) -> list[JsonObject]:
        """Every held-out response, as `evaluated` was given it; none in runs of version 0.1."""
        file = self.folder / "evaluation.jsonl"
        return read_lines(file) if file.is_file() else []

    @property
    def ledger(self) -> Ledger:
        """The run's costs; empty until they are saved."""
        return Ledger(self._ledger_file.read())

    @property
    def peak(self) -> float:
        """Measured bytes of tensors at the worst moment, what `plan.peak` predicts; the process
        holds more (`summary["process_peak_bytes"]`: Python and the libraries)."""
        return self.ledger.filter(source="measured").peak()

    @property
    def model_path(self) -> Path:
        """Where the trained model is, or will be. Raises FileNotFoundError if it ended without."""
        path = self.folder / "model"
        if not path.is_dir() and self.status != "running":
            left = self.what_is_left() or f"no {path}"
            raise FileNotFoundError(f"{self.name} has no model: {left}")
        return path

    # -- how it looks -------------------------------------------------------------------------
    def __repr__(self) -> str:
        config = self.config
        return (
            f"Run({self.name!r}, stage={config['stage']!r}, model={config['model']!r}, "
            f"status={self.status!r}, steps={self.last_step})"
        )

    def show(self) -> Display:
        """The run at a glance: what it changed, what it cost; folded away, every metric's span."""
        config = self.config
        # Its dashboard may be far up the page. The same words on every machine.
        look = by_surface("; curves: lab.dashboard(run), what it wrote: lab.inspect(run)", "")
        sick = f"sick on purpose ({config['specimen']}), " if "specimen" in config else ""
        if of := config.get("clone"):
            sick += f"cloned from {of['run']} at step {of['step']}, "
        head = (
            f"{self.name}: {config['stage']} of {config['model']}, seed {config['seed']}, {sick}"
            + (self.what_is_left() or f"{self.status} at step {self.last_step}{look}")
        )
        parts = [rows for rows in (changes(self.summary), facts(self.summary)) if rows]
        every = spans(self)
        text = "\n\n".join([head, *map(table, parts + [every] * bool(every))])
        page = f"<p>{escape(head)}</p>" + "".join(map(html_table, map(with_meanings, parts)))
        if every:
            page += f"<details><summary>every metric</summary>{html_table(every)}</details>"
        return Display(text, page)

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


# ---------------------------------------------------------------------------------- names and files


RENAMED: dict[str, str] = read_table(__file__, "renamed.json")
"""Metrics that had another name in an earlier version → what they are called today."""


def name_today(metric: str) -> str:
    """What a metric or figure of a run of any version is called today."""
    head, before, name = metric.rpartition("before/")
    return head + before + RENAMED.get(name, name)


def _measured(name: str, line: Mapping[str, float]) -> float:
    """A metric of a logged line. Where policy and reference are the same model still, the margin is
    0 and no pair is ranked either way: accuracy is not 0 there but not known."""
    unknown = name.endswith("accuracy") and line.get(name.replace("accuracy", "margin")) == 0
    return math.nan if unknown and line[name] == 0 else line[name]


def _read_config(path: Path) -> JsonObject:
    try:
        config: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    missing = [key for key in ("stage", "model", "seed", "status") if key not in config]
    if missing:
        raise ValueError(f"{path} does not describe a run: it lacks {', '.join(missing)}")
    return config


def _read_metrics(path: Path) -> list[dict[str, float]]:
    return [
        {name_today(name): math.nan if v is None else v for name, v in line.items()}
        for line in read_lines(path)
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
