"""All four stages in a row, and what to show of them: the table and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .charts.chart import bar_chart
from .charts.frame import Picture
from .cost.hardware import Hardware
from .data.lengths import story_rows
from .data.load import Data, Split, load_data
from .display import (
    Display,
    counted,
    format_bytes,
    format_number,
    format_seconds,
    html_table,
    is_number,
    numbered,
    table,
)
from .models.load import BUNDLED, Model, load
from .planning import Plan, plan, predict
from .runs.json_files import JsonObject
from .runs.ledger import SOURCES
from .runs.lock import acquire, check_free, release
from .runs.run import Run
from .settings import check_names, own_settings
from .stages import Settings
from .training import check, check_first, train

IN_A_ROW = ("sft", "reward", "ppo", "dpo")
"""Stages of `train_all`."""
STORIES = 4
"""Held-out prompts whose responses the report shows before and after."""


def train_all(
    model: str | Model = "tiny",
    data: Data | str | Path = "stories",
    *,
    out: str | Path = "runs/all",
    settings: Settings | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    hardware: Hardware | str = "here",
) -> dict[str, Run]:
    """SFT, reward model, PPO and DPO, each from what the one before it made. → runs by stage.

    PPO and DPO both start from the SFT model; PPO scores with the new reward model. Writes
    `report.html` into `out`. `settings` go to every stage that has them. Interrupted, it ends with
    the stage that it is in. Raises, before anything is trained, what any of the stages would.
    """
    model, data, out = load(model), load_data(data), Path(out)
    plans = check_all(model, settings or {}, out, overwrite=overwrite, hardware=hardware)
    for planned in plans.values():  # before the first stage has run for a minute
        check(planned, data, planned.config())
    runs: dict[str, Run] = {}
    lock = acquire(out)
    try:
        for stage, planned in plans.items():
            planned = replace(planned, model=model)
            run = train(planned, data, out=out / stage, overwrite=overwrite, quiet=quiet)
            runs[stage] = run
            if run.status == "stopped":  # by its user: what comes after it is not wanted now
                break
            if stage in ("sft", "reward"):
                model = model.with_stage(stage, run.model_path)
            _simulate(planned, data, run, quiet)
        report(runs, out / "report.html")
    finally:
        release(out, lock)
    return runs


def check_all(
    model: Model,
    settings: Settings,
    out: Path,
    *,
    overwrite: bool = False,
    hardware: Hardware | str = "here",
) -> dict[str, Plan]:
    """What can be refused at once of all four stages (`check_first`). → their plans, each with the
    settings that it has."""
    check_free(out)
    check_names(settings, *IN_A_ROW)
    model = model.with_stage("reward", model.paths.get("reward", ""))  # there will be one
    plans = {}
    for stage in IN_A_ROW:
        plans[stage] = plan(stage, model, hardware=hardware, **own_settings(stage, settings))
        check_first(plans[stage], out=out / stage, overwrite=overwrite)
    return plans


def _simulate(planned: Plan, data: Data, run: Run, quiet: bool) -> None:
    """Put the x-ray of a run's step beside what was predicted and measured."""
    from .studies import xray

    try:
        estimate = predict(planned, data)
    except ValueError:
        return  # not modelled: `train` has printed a line
    if not quiet:
        print(f"{run.stage}: x-ray", flush=True)
    run.save_ledger(run.ledger + xray(estimate).ledger)


def cost_table(runs: dict[str, Run]) -> list[dict[str, str]]:
    """One row per stage: memory, FLOPs and time, predicted before, simulated, and measured.

    Memory is that of tensors at the worst moment; time is that of training, without evaluation.
    """
    rows = []
    for stage, run in runs.items():
        row = {"stage": stage}
        for what, quantity, unit in (
            ("memory", "bytes", "B"),
            ("compute", "flops", "FLOP"),
            ("time", "seconds", "s"),
            ("sent", "sent", "B"),
        ):
            for source in SOURCES:
                rows_of = run.ledger.training(quantity=quantity, source=source)
                if value := rows_of.peak() if quantity == "bytes" else rows_of.total():
                    row[f"{what} {source}"] = format_number(value, unit)
        rows.append(row)
    columns = list(dict.fromkeys(c for row in rows for c in row))
    return [{c: row.get(c, "") for c in columns} for row in rows]


def stage_shares(runs: dict[str, Run], source: str = "measured") -> Picture:
    """Seconds of each stage as a bar, by phase: SFT : RM : PPO : DPO."""
    stacks: dict[str, dict[str, float]] = {}
    for stage, run in runs.items():
        rows = run.ledger.training(quantity="seconds", source=source)
        for phase, roles in rows.pivot("phase", "role").items():
            stacks.setdefault(stage, {})[phase or "other"] = sum(roles.values())
    title = f"Where the time goes ({source})"
    return bar_chart(stacks, title=title, y_label="seconds", unit="s", kind="phase")


def stage_table(runs: dict[str, Run]) -> list[dict[str, str]]:
    """One row per stage: what it cost (measured) and what it changed on held-out data.

    A column that no stage fills (the gold reward of a user's own data) is left out.
    """
    rows = [{"stage": stage, **_outcome(run.summary)} for stage, run in runs.items()]
    return [{k: v for k, v in row.items() if any(r[k] for r in rows)} for row in rows]


def _outcome(summary: JsonObject) -> dict[str, str]:
    def shown(name: str, form: Callable[[float], str]) -> str:
        return form(summary[name]) if name in summary else ""

    def change(name: str, digits: int = 2) -> str:
        if summary.get(name) is None:
            return ""
        both = (summary.get(f"before/{name}"), summary[name])
        return " → ".join(f"{x:.{digits}f}" for x in both if x is not None)

    accuracy = shown("accuracy", "{:.1%}".format)
    if "accuracy_ceiling" in summary:
        accuracy += f" of at most {summary['accuracy_ceiling']:.1%}"
    return {
        "time": shown("seconds", format_seconds),
        "tokens/s": shown("tokens_per_second", "{:,.0f}".format),
        "peak memory": shown("tensor_peak_bytes", format_bytes),
        "held-out loss": shown("eval_loss", "{:.3f}".format),
        "RM accuracy": accuracy,
        "gold reward": change("gold_reward"),
        "RM score": change("reward"),
        "wins by RM": shown("win_rate", "{:.0%}".format),
        "KL (nats)": change("kl", 1),
    }


COUNTED = 2000
"""Rows of a set whose tokens are counted when data are described."""
DROPPED = "dropped: "
"""What begins the keys of counts by reason."""


def describe_data(
    data: Data | str | Path = "stories", model: str | Model = "tiny", max_length: int = 512
) -> list[dict[str, object]]:
    """What the stages will make of the data: one row for each of its sets.

    Lengths are in tokens of the model, eos counted; `truncated` and the drops are those of
    `max_length` (of a prompt, what leaves room for a response of 64). Of a larger set the first
    COUNTED rows, which are random ones, are looked at, and the row says so. The lengths of
    "stories" in a bundled model are known, and the stories are not written for it.
    """
    from .data.tokenize import id_rows, labelled_rows, pair_rows, prompt_rows, sft_rows

    model = load(model)
    by_length = data == "stories" and model.name in BUNDLED
    given = None if by_length else load_data(data)
    tokenizer: Any = None if by_length else model.encoder  # token ids need none
    described = []
    for name, kind, make, limit in (
        ("demonstrations", "sft", sft_rows, max_length),
        ("preferences", "preferences", pair_rows, max_length),
        ("labelled answers", "answers", labelled_rows, max_length),
        ("prompts", "prompts", prompt_rows, max_length - 64),
    ):
        if given is None:
            rows, train, held_out = story_rows(kind)
        else:
            split: Split = getattr(given, kind)
            rows, train, held_out = split.train + split.test, len(split.train), len(split.test)
        rows = rows[:COUNTED]
        if not rows:
            continue
        texts = [f for f in rows[0] if f not in ("tools", "label")]
        sizes: dict[str, list[int]] = {field: [] for field in texts}
        refused: dict[str, int] = {}
        _, counts = make(tokenizer, id_rows(tokenizer, rows, sizes, refused), limit)
        lengths = {
            f"{field} tokens": f"{sorted(s)[len(s) // 2]} (at most {max(s)})"
            for field, s in sizes.items()
            if s
        }
        looked = {"looked at": counted(len(rows), "row")} if len(rows) < train + held_out else {}
        described.append(
            {
                "set": name,
                "train": train,
                "held out": held_out,
                **looked,
                **lengths,
                **{k if k == "truncated" else DROPPED + k: n for k, n in counts.items()},
                **{DROPPED + why: n for why, n in refused.items()},
            }
        )
    return described


def usable(described: Mapping[str, object]) -> bool:
    """Whether rows of a set that `describe_data` has looked at are left to train on."""
    dropped = sum(n for k, n in described.items() if k.startswith(DROPPED) and is_number(n))
    sizes = (n for n in (described["train"], described["held out"]) if is_number(n))
    return dropped < min(sum(sizes), COUNTED)


def why_unusable(described: Sequence[Mapping[str, object]], max_length: int) -> str:
    """Why no row of the sets that `describe_data` has looked at is left, and what to do."""
    from .data.chat import remedy

    keys = dict.fromkeys(k for of_set in described for k, n in of_set.items() if n)
    lost = [k.removeprefix(DROPPED) for k in keys if k.startswith(DROPPED)]
    room = f"within {max_length} tokens (--max-length)"
    if lost == ["too long"]:
        return f"no row can be used {room}"
    reasons = ", ".join(f"{why} {room}" if why == "too long" else why for why in lost)
    to_do = next(filter(None, map(remedy, lost)), "")
    return f"no row can be used: {reasons}" + f"; {to_do}" * bool(to_do)


def report(
    runs: dict[str, Run] | Sequence[Run | str | Path] | Run | str | Path,
    path: str | Path = "report.html",
) -> Path:
    """Write a self-contained page, without Python or a script: the table, every run's curves, what
    it wrote step by step, stories before and after. `runs`: by name, or some of them or their
    folders, or one.
    """
    from .charts.report import write_report

    title = "Four stages of RLHF"
    if not isinstance(runs, dict):
        some = [runs] if isinstance(runs, (Run, str, Path)) else runs
        found = list(map(Run.load, some))
        runs = dict(zip(numbered(run.name for run in found), found, strict=True))
        title = ", ".join(f"{run.stage} of {run.config['model']}" for run in found)
    return write_report(
        path,
        runs,
        title=title,
        table_rows=stage_table(runs),
        cost_rows=cost_table(runs),
        shares=stage_shares(runs),
        stories=stories(runs.values()),
    )


def stories(runs: Iterable[Run], count: int = STORIES) -> list[dict[str, dict[str, str]]]:
    """Responses to the same held-out prompts after each stage that made a policy.

    → one {prompt: {stage: response}} per prompt.
    """
    responses: dict[str, dict[str, str]] = {}
    for run in runs:
        for sample in run.samples:
            if "when" in sample:
                of_prompt = responses.setdefault(sample["prompt"], {})
                of_prompt.setdefault(sample["when"], sample["response"])
    return [{prompt: texts} for prompt, texts in list(responses.items())[:count]]


def show_stories(*runs: Run, count: int = STORIES) -> Display:
    """The same as a table to read: one row per prompt, one column per stage."""
    rows = [
        {"prompt": prompt, **texts}
        for pair in stories(runs, count)
        for prompt, texts in pair.items()
    ]
    return Display(table(rows), html_table(rows))
