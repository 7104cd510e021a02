"""The pages of the site that are not written by hand, written anew at each build.

    docs/notebooks/    the notebooks, copied
    docs/reference/    a page for each public name, one for the stages, one for the command line,
                       and one that says how right the plans are (`accuracy.py`)

The source is parsed, not imported: a build takes seconds and needs neither torch nor TRL. Only
`rlhf_lab` itself, its list of stages and its argument parser are imported, which are light.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
from pathlib import Path

from accuracy import accuracy_page

import rlhf_lab

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_lab"
Definition = ast.FunctionDef | ast.ClassDef

GROUPS = {
    "Plan and train": ("load", "load_data", "plan", "train", "train_all", "clone", "Plan", "Run"),
    "Model and data": ("Model", "Data", "describe_data"),
    "What it costs": (
        *("xray", "compare", "sweep", "project", "hardware", "calibrate", "best_of_n"),
        *("equal_budget", "EqualBudget"),
        *("Ledger", "cost_table", "stage_shares", "stage_costs", "peaks", "MeterCallback"),
        "bench",
    ),
    "Look and play": (
        *("planner", "dashboard", "inspect", "label", "guess", "generate", "chat", "batch"),
        "continuous_batching",
        *("curves", "frontier"),
    ),
    "After training": ("quantize", "serve", "export", "frontier_serving"),
    "Tables and report": ("stage_table", "report", "stories", "show_stories"),
    "PPO": ("PPOTrainer", "PPOConfig"),
    "Exercises": ("exercises", "check", "solution"),
    "What goes wrong": (
        *("health", "HealthCallback", "specimens", "overoptimise", "OverOptimisation"),
    ),
}
ALSO = {
    "Model": "models.load",
    "Data": "data.load",
    "PPOTrainer": "ppo.trainer",
    "PPOConfig": "ppo.config",
}
"""Classes to document although a notebook gets them from functions only."""

PAGES = {
    "README.md": "index",
    "CONTRIBUTING.md": "reference/contributing",
    "CHANGELOG.md": "reference/changelog",
    "benchmarks/README.md": "reference/benchmarks",
    "rlhf_lab/ppo/RULES.md": "reference/rules",
}
"""Files of the repository that are pages of the site."""
WEB_PAGES = {
    "planner": ("planner/index.html", "The planner", "make web"),
    "11": (
        "lite/lab/index.html?path=11_plan_your_project.ipynb",
        "Notebook 11, Plan your project, in your browser",
        "make lite",
    ),
    "07": (
        "lite/lab/index.html?path=07_what_scales.ipynb",
        "Notebook 7, What scales how, in your browser: its planning cells",
        "make lite",
    ),
    "replay": ("replay/ppo.html", "A stored PPO run: curves, costs, what it wrote", ""),
}
"""What the site alone has: addresses, words, and what builds them, where `make docs` does not."""
LINK = re.compile(r"(\]\()([^)\s]+)")


def version() -> str:
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', text, re.M)[1]


def address() -> str:
    """The repository's address: `project.urls.Repository` of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "([^"]+?)/?"$', text, re.M)[1]


def homes() -> dict[str, str]:
    """Name → the module of the package that a user gets it from."""
    return {**ALSO, **rlhf_lab._HOMES}


def source_of(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def definition(name: str, module: str) -> tuple[Definition, Path]:
    """Where a name is defined; imports between the package's modules are followed.

    Raises LookupError where there is no definition.
    """
    path = source_of(module)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node, path
        if isinstance(node, ast.ImportFrom) and node.level:
            here = path.relative_to(PACKAGE).with_suffix("").parts[: -node.level]
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(alias.name, ".".join([*here, node.module or ""]).strip("."))
    raise LookupError(f"no definition of {name} in {path}")


# --- files of the repository as pages -----------------------------------------------------------


def site_page(file: Path) -> str | None:
    """The page of the site that a file of the repository is, without its ending; None for none."""
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/") and file.suffix == ".md":
        return name.removeprefix("docs/").removesuffix(".md")
    if name.startswith("notebooks/") and file.suffix == ".ipynb":
        return name.removesuffix(".ipynb")
    return None


def for_the_site(text: str, file: Path, page: str) -> str:
    """A file's text with its links, which work in the repository, as links of the site's `page`:
    to another page, or else to the file in the repository."""

    def link(found: re.Match) -> str:
        target, _, anchor = found[2].partition("#")
        there = (file.parent / target).resolve()
        if not target or not there.exists() or not there.is_relative_to(ROOT):
            return found[0]
        name = there.relative_to(ROOT).as_posix()
        if at := site_page(there):
            target = os.path.relpath(at, Path(page).parent) + there.suffix
        elif name.startswith("notebooks/") and there.is_file():
            target = os.path.relpath(name, Path(page).parent)
        else:
            target = f"{address()}/{'tree' if there.is_dir() else 'blob'}/main/{name}"
        return found[1] + target + (f"#{anchor}" if anchor else "")

    return LINK.sub(link, text)


def web_pages(built: set[str]) -> str:
    """The list of pages that the site alone has; `built`: what `make` has left for it."""
    lines = []
    for at, words, made_by in WEB_PAGES.values():
        if not made_by or made_by in built:
            lines.append(f'<li><a href="{at}">{words}</a></li>')
        else:
            lines.append(
                f"<li>{words}: not in this copy of the site ({made_by}, then make docs)</li>"
            )
    return "\n<ul>\n" + "\n".join(lines) + "\n</ul>\n"


# --- one page for each public name -------------------------------------------------------------


def signature(node: ast.FunctionDef, method: bool = False) -> str:
    arguments = ast.parse(ast.unparse(node)).body[0].args  # a copy, to take `self` out of
    if method:
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def document(node: ast.AST) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def decorators(node: ast.AST) -> set[str]:
    return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def text_of(node: ast.expr, path: Path) -> str:
    """A text, or what the file assigns to a name."""
    if isinstance(node, ast.Name):
        source = ast.parse(path.read_text(encoding="utf-8")).body
        assigned = (x for x in source if isinstance(x, ast.Assign))
        node = next(x.value for x in assigned if ast.unparse(x.targets[0]) == node.id)
    return ast.literal_eval(node)


def fields(node: ast.ClassDef, path: Path) -> list[tuple[str, str, str]]:
    """(name, default, what it is) of a class's annotated fields. What it is stands in the field's
    metadata (`help`), or in a string after it."""
    found = []
    for item, after in zip(node.body, [*node.body[1:], None]):
        if not isinstance(item, ast.AnnAssign) or item.target.id.startswith("_"):
            continue
        default, text = ast.unparse(item.value) if item.value else "", ""
        if default.startswith("setting("):  # PPOConfig's: the default, and what it is
            default, text = ast.unparse(item.value.args[0]), text_of(item.value.args[1], path)
        if default.startswith("field("):
            given = {k.arg: k.value for k in item.value.keywords}
            default = ast.unparse(given["default"]) if "default" in given else ""
            if "metadata" in given:
                text = ast.literal_eval(given["metadata"])["help"]
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = inspect.cleandoc(str(after.value.value)).replace("\n", " ")
        found.append((item.target.id, default, text))
    return found


def directive(kind: str, name: str, body: str, depth: int, *options: str) -> str:
    fence = "`" * depth
    return "\n".join([f"{fence}{{py:{kind}}} {name}", *options, "", body, fence, ""])


def members(node: ast.ClassDef) -> str:
    """The public methods and properties of a class that have a docstring."""
    parts = []
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or item.name.startswith("_"):
            continue
        if not (text := document(item)):
            continue
        kinds = decorators(item)
        if kinds & {"property", "cached_property"}:
            of = [f":type: {ast.unparse(item.returns)}"] if item.returns else []
            parts.append(directive("property", item.name, text, 4, *of))
        elif "overload" not in kinds:
            static = "staticmethod" in kinds
            options = [":classmethod:"] if "classmethod" in kinds else []
            title = item.name + signature(item, method=not static)
            parts.append(directive("method", title, text, 4, *options))
    return "\n".join(parts)


def class_signature(node: ast.ClassDef, listed: list[tuple[str, str, str]]) -> str:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return signature(item, method=True).split(" -> ")[0]
    if "dataclass" in decorators(node) and len(listed) <= 8:
        return "(" + ", ".join(f"{n}={d}" if d else n for n, d, _ in listed) + ")"
    return "(**settings)" if listed else "()"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def field_table(listed: list[tuple[str, str, str]]) -> str:
    rows = [f"| `{n}` | {f'`{cell(d)}`' if d else ''} | {cell(t)} |" for n, d, t in listed if t]
    return "\n".join(["| setting | default | what it is |", "| --- | --- | --- |", *rows, ""])


def page(name: str, module: str) -> str:
    node, path = definition(name, module)
    title = f"lab.{name}" if name in rlhf_lab.__all__ else name
    if isinstance(node, ast.ClassDef):
        listed = fields(node, path)
        table = field_table(listed) if any(text for *_, text in listed) else ""
        body = "\n".join([document(node), "", members(node)])
        text = directive("class", name + class_signature(node, listed), body, 5) + "\n" + table
    else:
        text = directive("function", name + signature(node), document(node), 5)
    file = path.relative_to(ROOT).as_posix()
    link = f"Source: [{file}]({address()}/blob/main/{file}#L{node.lineno})"
    return f"# {title}\n\n{text}\n{link}\n"


# --- the stages and the command line -----------------------------------------------------------


def stages_page() -> str:
    from rlhf_lab.stages import STAGES

    lines = ["# The stages", "", "From the one list of stages, `rlhf_lab/stages.yaml`.", ""]
    lines += ["| stage | learns from | models in memory | phases of a step | x-ray |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for s in STAGES.values():
        rows = ", ".join(["prompt", *s.columns])
        models, phases = ", ".join(s.roles), ", ".join(s.phases)
        lines.append(f"| `{s.name}` | {rows} | {models} | {phases} | {'yes' if s.xrayed else ''} |")
    lines += ["", "## The lab's settings of each", ""]
    lines += ["Chosen for the bundled models, and used up to 20 million parameters; every other "]
    lines += ["setting is the trainer's own.", ""]
    for s in STAGES.values():
        settings = ", ".join(f"`{k}={v!r}`" for k, v in sorted(s.defaults.items()))
        lines += [f"`{s.name}`\n: {settings}", ""]
    return "\n".join([*lines, *_rates()])


def _rates() -> list[str]:
    """Learning rates of larger models, by stage and size, with their sources."""
    from rlhf_lab.defaults import LITERATURE

    lines = ["## Learning rates of larger models", ""]
    lines += [
        "| stage | trained | parameters | rate | source |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for stage, told in LITERATURE.items():
        for what, name in (("all weights", "whole"), ("LoRA adapters", "lora")):
            for most, rate, source in told[name]:
                size = f"up to {most / 1e9:g}B" if most else "any larger"
                lines.append(f"| `{stage}` | {what} | {size} | {rate:g} | {source} |")
    return lines


def specimens_page() -> str:
    """The bug zoo: what is wrong, where it was met, the cure, and what showed it first."""
    from rlhf_lab.stages import read_table

    measured = json.loads((ROOT / "benchmarks/results/bug_zoo.json").read_text(encoding="utf-8"))
    first = {row["specimen"]: row for row in measured["first"]}
    healthy = sum(key.startswith("healthy/") and key.count("/") == 1 for key in measured["runs"])
    lines = ["# The bug zoo", "", "From `rlhf_lab/exercises/specimens.yaml`; the last two columns "]
    lines += [f"are measured (`benchmarks/bug_zoo.py`), against {healthy} healthy runs.", ""]
    lines += ["| specimen | what is wrong | cure | met in | seen first in | in iteration |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for name, x in read_table(str(PACKAGE / "exercises/specimens.py")).items():
        repository, kind, number = x["wild"].split()
        link = f"[{repository} {number}](https://github.com/{repository}/{kind}/{number})"
        row = first.get(name, {"first metric": "", "iteration": "", "seeds": ""})
        what = f"`{row['first metric']}`" if row["iteration"] else "nothing; a metric at most in"
        seen = f"{what} {row['seeds']} seeds"
        cells = [f"`{name}`", cell(x["mechanism"]), cell(x["fix"]), link, seen, row["iteration"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def command_page() -> str:
    os.environ["COLUMNS"] = "88"  # argparse fills lines to the width of the terminal
    from rlhf_lab.cli import main

    parser = main._parser()
    (commands,) = (a for a in parser._actions if hasattr(a, "choices") and a.dest == "command")
    lines = ["# The command line", "", "```text", parser.format_help().rstrip(), "```", ""]
    for name, command in commands.choices.items():
        text = command.format_help().rstrip()
        lines += [f"## rlhf-lab {name}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def index_page() -> str:
    lines = ["# Reference", "", "`import rlhf_lab as lab`; names load when they are used.", ""]
    for title, names in GROUPS.items():
        lines += [f"## {title}", "", "```{toctree}", ":maxdepth: 1", ""]
        lines += [*names, "```", ""]
    return "\n".join(lines) + "\n"


def write_all(folder: Path) -> None:
    """Write both folders anew. Raises LookupError for a public name that no group lists."""
    found = homes()
    listed = {name for names in GROUPS.values() for name in names}
    if listed != set(found):
        raise LookupError(f"docs/generate.py, GROUPS: {sorted(listed ^ set(found))}")
    pages = {name: page(name, module) for name, module in found.items()}
    pages |= {
        "index": index_page(),
        "stages": stages_page(),
        "specimens": specimens_page(),
        "command_line": command_page(),
    }
    for name, at in PAGES.items() - {("README.md", "index")}:
        text = (ROOT / name).read_text(encoding="utf-8")
        pages[Path(at).name] = for_the_site(text, ROOT / name, at)
    pages["accuracy"], picture = accuracy_page()
    reference, notebooks = folder / "reference", folder / "notebooks"
    shutil.rmtree(reference, ignore_errors=True)
    reference.mkdir()
    (reference / "accuracy.svg").write_text(picture, encoding="utf-8")
    for name, text in pages.items():
        (reference / f"{name}.md").write_text(text, encoding="utf-8")
    shutil.rmtree(notebooks, ignore_errors=True)
    ignored = shutil.ignore_patterns("runs", ".ipynb_checkpoints", "*.jsonl")
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=ignored)
