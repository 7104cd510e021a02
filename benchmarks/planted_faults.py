"""Does the test suite notice a wrong line? `python benchmarks/planted_faults.py [--only NAME …]`

Thirty faults of one line, over all folders, of the kind that a reviewer could overlook. They were
chosen from the source, before any of them was measured. Each is planted alone in a copy of the
checkout; then the tests that are likeliest to fail run, up to the first failure, and where they
pass, a wider set. At the end the tests that failed run once without a fault: one that fails then
has caught nothing.

    python benchmarks/planted_faults.py                     # this checkout: "after"
    python benchmarks/planted_faults.py --checkout FOLDER   # an older one, flat modules: "before"
    python benchmarks/planted_faults.py --list              # can every line still be found?

`results/planted_faults.json` holds what was measured, fault by fault. Browser tests and notebooks
are left out. A fault whose text is not found is named, counts as not caught, and wants a row in
`REWORDED`. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "planted_faults.json"
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", ".*_cache", "runs", "build", "*.egg-info"
)
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",  # an edit within a second must not meet older bytecode
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
UNSTEADY = "tests/stages/test_checkpoints.py::test_too_high_a_learning_rate_by_itself"
"""Fails on some CPUs, whatever was planted."""
LONGEST = 900
"""Seconds after which tests that do not end are given up."""


@dataclass(frozen=True)
class Fault:
    """One planted line. `before`, `after`: its file in the older and in this layout, below
    `rlhf_lab/`; `text` (once in that file) becomes `planted`; `likely`, `wider`: names in `TESTS`.
    """

    name: str
    kind: str
    before: str
    after: str
    text: str
    planted: str
    likely: str
    wider: str = ""

    def texts(self, layout: str) -> tuple[str, str]:
        """What stands there, and what is planted."""
        own = self.text, self.planted
        return REWORDED.get(self.name, own) if layout == "after" else own

    @property
    def folder(self) -> str:
        return self.after.split("/")[0].removesuffix(".py")


TESTS: dict[str, tuple[str, str]] = {
    "background": ("test_background", "test_background"),
    "best_of_n": ("stages/test_best_of_n", "trainers/test_best_of_n"),
    "budget": ("test_budget", "test_studies"),
    "callback": ("cost/test_callback", "metering/test_callback"),
    "chart": ("widgets/test_chart", "charts/test_chart"),
    "checkpoint": ("stages/test_checkpoints", "ppo/test_checkpoint"),
    "dashboard": ("widgets/test_dashboard", "widgets/test_dashboard"),
    "describe": ("test_describe", "test_pipeline"),
    "distributed": ("stages/test_processes", "ppo/test_distributed"),
    "errors": ("test_errors", "cli/test_errors"),
    "families": ("test_families", "models/test_families"),
    "figures": ("widgets/test_figures", "charts/test_cost_bars"),
    "inspector": ("widgets/test_inspector", "widgets/test_inspector"),
    "labeller": ("widgets/test_labeller", "widgets/test_labeller"),
    "launch": ("test_scale", "launch/test_launch"),
    "layout_runs": ("test_layout_runs", "test_layout_runs"),
    "ledger": ("test_ledger", "runs/test_ledger"),
    "load": ("test_data", "data/test_load"),
    "logprobs": ("stages/test_logprobs", "ppo/test_logprobs"),
    "losses": ("stages/test_maths", "ppo/test_losses"),
    "memory": ("cost/test_memory", "cost/test_memory"),
    "meter": ("cost/test_meter", "metering/test_meter"),
    "models": ("test_models", "models/test_load"),
    "notebook": ("test_studio", "test_notebook"),
    "online": ("stages/test_online", "trainers/test_online"),
    "online_plan": ("stages/test_online_plan", "trainers/test_online_plan"),
    "plan": ("cost/test_plan", "cost/test_plan"),
    "planner": ("widgets/test_planner", "widgets/test_planner"),
    "ppo_trainer": ("stages/test_ppo_trainer", "ppo/test_ppo_trainer"),
    "preferences": ("test_judgements", "data/test_preferences"),
    "report": ("widgets/test_report", "charts/test_report"),
    "resume": ("test_resume", "cli/test_resume"),
    "rules_01_08": ("stages/test_ppo_rules_01_08", "ppo/test_ppo_rules_01_08"),
    "rules_09_13": ("stages/test_ppo_rules_09_13", "ppo/test_ppo_rules_09_13"),
    "rules_14_24": ("stages/test_ppo_rules_14_24", "ppo/test_ppo_rules_14_21"),
    "runs": ("test_runs", "runs/test_run"),
    "sampling": ("stages/test_sampling", "ppo/test_sampling"),
    "schema": ("test_shapes", "data/test_schema"),
    "small_models": ("test_small_models", "test_small_models"),
    "sources": ("test_sources", "data/test_reward_sources"),
    "train_all": (
        "test_lab::test_all_four_stages_from_one_command",
        "test_planning::test_all_four_stages_from_one_command",
    ),
    "world": ("test_world", "world/test_world"),
    "xray": ("cost/test_xray", "simulate/test_xray"),
}
"""Files below `tests/` (or one test of a file), in the older layout and in this one."""

# One fault a row: name, what is wrong, file before, file after, text, planted, tests, wider tests.
# fmt: off
FAULTS = [Fault(*row) for row in (
    ("splits overlap", "off by one: what is trained on is held out too",
     "corpus.py", "world/corpus.py", '"train": range(0, 8)', '"train": range(0, 9)', "world",
     "load small_models"),
    ("pairs by the chosen length", "a row too long is kept where only the rejected answer is long",
     "tokens.py", "data/tokenize.py", "len(prompt) + max(len(chosen), len(rejected)) >",
     "len(prompt) + len(chosen) >", "load rules_14_24", "families describe"),
    ("dropped rows uncounted", "a dropped row is not counted",
     "data.py", "data/load.py", "report.drop(str(reason))", "pass", "load schema",
     "describe errors"),
    ("one person for all", "a person's answer replaces another person's",
     "judgements.py", "data/preferences.py", 'key = line["who"], line["pair"]',
     'key = "", line["pair"]', "preferences", "labeller"),
    ("missing head unnoticed",
     "a swallowed error: a score head drawn at random passes for a reward model",
     "models.py", "models/load.py", 'set(found["missing_keys"]) - may_lack',
     'set(found["missing_keys"]) - may_lack - {"score.weight"}', "models", "errors"),
    ("rewind one too far", "a resumed run lacks the metrics of the step it goes on from",
     "runs.py", "runs/run.py", 'for r in self.metrics if r["step"] <= step]',
     'for r in self.metrics if r["step"] < step]', "runs", "resume"),
    ("ranks added up", "the peak is summed over processes",
     "ledger.py", "runs/ledger.py", "setdefault((row.stage, row.rank, row.phase)",
     "setdefault((row.stage, 0, row.phase)", "ledger", "dashboard figures"),
    ("gae without gamma", "a missing factor, 1 by default",
     "stages/maths.py", "ppo/losses.py", "delta + gamma * lam * running", "delta + lam * running",
     "losses", "rules_09_13"),
    ("beta not restored", "a resume begins with the first KL coefficient again",
     "stages/checkpoints.py", "ppo/checkpoint.py",
     'trainer.beta, trainer.seconds = rest["beta"], rest["seconds"]',
     'trainer.seconds = rest["seconds"]', "checkpoint", "resume"),
    ("gradients averaged twice", "a missing factor on several processes",
     "stages/ppo.py", "ppo/trainer.py", "backward(loss * self.accelerator.num_processes)",
     "backward(loss)", "distributed", "launch"),
    ("every epoch in one order", "a seed that lacks the epoch",
     "stages/sampling.py", "ppo/sampling.py", "manual_seed(seed * 1_000_003 + epoch)",
     "manual_seed(seed * 1_000_003)", "sampling", "ppo_trainer rules_01_08"),
    ("gradient without temperature", "a missing factor, 1 by default",
     "stages/logprobs.py", "ppo/logprobs.py", "grad = grad / ctx.temperature",
     "grad = grad.contiguous()", "logprobs", "rules_01_08 ppo_trainer"),
    ("cut counts as stopped", "off by one: a response that was cut is not penalised",
     "stages/online.py", "trainers/online.py", "len(ids) < limit or", "len(ids) <= limit or",
     "online", "online_plan"),
    ("evaluated on training prompts", "held-out figures are of prompts that were trained on",
     "prepare.py", "trainers/prepare.py", "(data.prompts.test or data.prompts.train)[:HELD_OUT]",
     "data.prompts.train[:HELD_OUT]", "notebook", "sources"),
    ("bucket in numbers", "a wrong unit: numbers for bytes",
     "cost/states.py", "cost/states.py", "min(BUCKET, count) * 2.0", "float(min(BUCKET, count))",
     "plan", "planner"),
    ("hours of copies", "money for the copies of a model, not for its devices",
     "cost/plan.py", "cost/estimate.py", "self.hours * self.setup.gpus",
     "self.hours * self.setup.replicas", "plan", "budget planner"),
    ("all heads are cached", "grouped keys and values are forgotten",
     "cost/phases.py", "cost/generation.py", "2.0 * model.depth * model.kv_heads *",
     "2.0 * model.depth * model.heads *", "plan", "memory xray"),
    ("seconds counted twice", "a block within a block counts for both",
     "cost/meter.py", "metering/meter.py", "own = seconds - self.inner", "own = seconds", "meter",
     "callback"),
    ("one token too many", "off by one in a series of decoding passes",
     "stand_ins.py", "simulate/shortcuts.py", "(two - one - 1) // 2", "(two - one) // 2", "xray",
     "budget"),
    ("band upside down", "a label at the wrong series: the band's ends are exchanged",
     "widgets/bars.py", "charts/stacked_bars.py", "x, y, high, low, label",
     "x, y, low, high, label", "figures", "chart"),
    ("share of the measured", "the wrong series is scaled: what was measured, for what was planned",
     "widgets/views.py", "charts/views.py", '("predicted", share), ("measured", 1.0)',
     '("predicted", 1.0), ("measured", share)', "dashboard", "report"),
    ("taste of the left", "a wrong sign where the right answer was chosen",
     "widgets/labeller.py", "widgets/labeller.py", "gold=gap if left or gap is None else -gap",
     "gold=gap", "labeller", "notebook"),
    ("samples of the step before", "off by one: the step that was asked for is passed over",
     "widgets/sample_book.py", "widgets/samples.py", "for s in mine if s.step <= step",
     "for s in mine if s.step < step", "inspector", "notebook"),
    ("a failed launch is fine", "a swallowed error: exit code 0 for processes that crashed",
     "scale/launch.py", "launch/launcher.py", "if complained and code else min(code, 1)",
     "if complained and code else 0", "launch"),
    ("seed not passed on", "an argument that changes the data and not the training",
     "cli.py", "cli/main.py", '{"seed": args.seed}', "{}", "resume", "errors"),
    ("alpha as large as r", "a wrong default",
     "lab.py", "planning.py", '"lora_alpha": 2 * ', '"lora_alpha": ', "budget", "layout_runs"),
    ("a stopped run is done", "a resume that does nothing",
     "lab.py", "training.py", 'old.status == "finished"', 'old.status != "running"', "resume",
     "background"),
    ("PPO scores with the old reward model", "the new reward model is not handed on",
     "course.py", "pipeline.py", 'if stage in ("sft", "reward"):', 'if stage == "sft":',
     "train_all", "report"),
    ("error over n", "a root too few: the standard error is too small",
     "baseline.py", "studies.py", "math.sqrt(spread / count)", "math.sqrt(spread) / count",
     "best_of_n", "budget"),
    ("SFT scored before it was", "answers after SFT are scored by the model before it",
     "studio.py", "notebook.py", ' and row["when"] != run.stage', "", "notebook", "inspector"),
)]
# fmt: on
REWORDED = {
    "missing head unnoticed": (
        'set(info["missing_keys"]) - set(may_lack)',
        'set(info["missing_keys"]) - set(may_lack) - {"score.weight"}',
    ),
    "rewind one too far": ('if line["step"] <= step\n', 'if line["step"] < step\n'),
    "a failed launch is fine": (
        "if failed and code else min(code, 1)",
        "if failed and code else 0",
    ),
}
"""Text and planted text of faults whose line reads otherwise in this layout."""


class NotFound(ValueError):
    """The text of a fault is not (or more than once) where it was."""


def place(fault: Fault, package: Path, layout: str) -> Path:
    """The file that holds the text of a fault: the one named, else the only one in the package."""
    named, text = package / getattr(fault, layout), fault.texts(layout)[0]
    if named.is_file() and named.read_text(encoding="utf-8").count(text) == 1:
        return named
    files = [p for p in sorted(package.rglob("*.py")) for _ in range(p.read_text().count(text))]
    if len(files) == 1:
        return files[0]
    raise NotFound(
        f"{fault.name!r}: {text!r} stands {len(files)} times in {package.name}/, and was "
        f"looked for in {getattr(fault, layout)}: bring FAULTS or REWORDED up to date"
    )


def run_tests(copy: Path, tests: list[str], *options: str) -> tuple[list[str], str]:
    """Run tests. → the names of those that fail, and the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", *options]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            [*command, "--tb=line", "--deselect", UNSTEADY, *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return [], f"no end within {LONGEST} s"
    if done.returncode == 0:
        return [], done.stdout
    failed = re.findall(
        r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.+?)?)(?: - .*)?$", done.stdout, re.M
    )
    if not failed:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return failed, done.stdout


def files_of(names: str, copy: Path, layout: str) -> list[str]:
    """Tests by their names in `TESTS`; a file that is gone is named and left out."""
    found = []
    for name in names.split():
        path, _, test = TESTS[name][layout == "after"].partition("::")
        file = copy / "tests" / f"{path}.py"
        if not file.is_file():
            print(f"  there is no tests/{path}.py: bring TESTS up to date", flush=True)
        elif test and f"def {test}(" in file.read_text(encoding="utf-8"):
            found.append(f"tests/{path}.py::{test}")
        else:
            found.append(f"tests/{path}.py")
    return found


def measure(fault: Fault, copy: Path, layout: str) -> dict[str, object]:
    """Plant one fault in the copy, test, take it out again. → what is recorded of it."""
    record: dict[str, object] = {"folder": fault.folder, "kind": fault.kind, "caught": False}
    try:
        file = place(fault, copy / "rlhf_lab", layout)
    except NotFound as problem:
        print(f"  {problem}", flush=True)
        return record | {"problem": str(problem)}
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    clean = file.read_text(encoding="utf-8")
    record["file"] = str(file.relative_to(copy))
    for names in filter(None, (fault.likely, fault.wider)):
        tests = files_of(names, copy, layout)
        if not tests:
            continue
        file.write_text(clean.replace(*fault.texts(layout)), encoding="utf-8")
        try:
            failed, output = run_tests(copy, tests, "-x")
        finally:
            file.write_text(clean, encoding="utf-8")
        if "no end within" in output:
            record["problem"] = f"{names}: {output}"
        if failed:
            record |= {"caught": True, "by": failed[0], "wider": names == fault.wider}
            break
    record["seconds"] = round(time.perf_counter() - start)
    record["cpu_seconds"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used)
    return record


def take_back(copy: Path, layout: str, records: Mapping[str, dict[str, object]]) -> None:
    """Run what has caught a fault without any fault: what fails then has caught nothing."""
    by = {name: str(found["by"]) for name, found in records.items() if found["caught"]}
    failed = run_tests(copy, list(dict.fromkeys(by.values())))[0] if by else []
    for name, test in by.items():
        if test in failed:
            problem = {"caught": False, "problem": f"{test} fails without the fault as well"}
            print(f"{name}: {problem['problem']}", flush=True)
            save(layout, name, records[name] | problem)
        else:
            save(layout, name, records[name] | {"passes_without": True})


def summary(faults: Mapping[str, Mapping[str, object]]) -> str:
    caught = sum(bool(found["caught"]) for found in faults.values())
    missed = ", ".join(name for name, found in faults.items() if not found["caught"])
    return f"{caught} of {len(faults)} caught" + (f"; not: {missed}" if missed else "")


def save(layout: str, name: str, found: dict[str, object]) -> None:
    """Write one fault's record at once, among the others of its layout."""
    every = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    records = {**every.get(layout, {}).get("faults", {}), name: found}
    records = {f.name: records[f.name] for f in FAULTS if f.name in records}
    every[layout] = {"summary": summary(records), "faults": records}
    RESULTS.write_text(json.dumps(every, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults one by one; do the tests see them?")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[f.name for f in FAULTS])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose tests [this one's]")
    parser.add_argument("--list", action="store_true", help="look for every line, and run nothing")
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    layout = "before" if (checkout / "rlhf_lab" / "stages").is_dir() else "after"
    wanted = [f for f in FAULTS if not args.only or f.name in args.only]
    if args.list:
        lost = 0
        for fault in wanted:
            try:
                file = place(fault, checkout / "rlhf_lab", layout)
                print(f"{fault.name}: {file.relative_to(checkout)}")
            except NotFound as problem:
                print(problem)
                lost += 1
        return int(lost > 0)
    made: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(checkout, copy, ignore=NOT_COPIED)
        for fault in wanted:
            print(f"{fault.name}: {fault.kind}", flush=True)
            found = measure(fault, copy, layout)
            outcome = f"caught by {found['by']}" if found["caught"] else "NOT CAUGHT"
            print(f"  {outcome} ({found.get('seconds', 0)} s)", flush=True)
            made[fault.name] = found
            save(layout, fault.name, found)
        take_back(copy, layout, made)
    print(f"{layout}: {json.loads(RESULTS.read_text())[layout]['summary']}")
    return int(any("problem" in found for found in made.values()))


if __name__ == "__main__":
    sys.exit(main())
