"""Every block of code in the README and the docs does what the page promises.

Python is run, page by page, in one namespace and an empty folder; trainings make one small step.
Shell lines are read by the program that they call: `rlhf-lab` runs them (trainings small again),
other commands are checked for the targets, files and extras that they name. A block under
`<!-- not run: why -->` is parsed, and its names are looked up.

Run: pytest tests/docs/test_code_blocks.py
"""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Block, blocks
from small_trainings import make_small

import rlhf_lab as lab
from rlhf_lab.cli import main as cli
from rlhf_lab.cli.main import main

BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"python", "sh", "json", "text"}
CODE = {"python", "sh"}


SHELL = [pytest.param(b, id=b.place) for b in BLOCKS if b.language == "sh"]


def more_rows(block: Block) -> str:
    """The file that a block shows: where it is rows, with enough of them to train on."""
    if block.language == "json":
        shown = json.loads(block.code)
        return json.dumps(8 * shown if isinstance(shown, list) else shown)
    head, *rows = block.code.splitlines()
    return "\n".join([head, *rows * 8, ""])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where blocks run: the files that pages show, the names that they use, four small runs."""
    folder = tmp_path_factory.mktemp("reader")
    for block in BLOCKS:
        if block.file:
            (folder / block.file).write_text(more_rows(block), encoding="utf-8")
    for name, checkpoint in (("model", "base"), ("reward_model", "reward")):
        shutil.copytree(ROOT / "small_models/tiny" / checkpoint, folder / "path/to" / name)
    for name in ("small_models", "recipes"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_small(patch)
        lab.train_all("tiny", out="runs/first")
    return folder


@pytest.fixture
def reader(folder, monkeypatch) -> Path:
    """A reader sits in that folder, and has little time."""
    monkeypatch.chdir(folder)
    make_small(monkeypatch)
    return folder


def test_every_block_is_of_a_language_that_is_checked():
    assert not [b.place for b in BLOCKS if b.language not in LANGUAGES]
    assert not [b.place for b in BLOCKS if b.language == "json" and not b.file]
    marked = [b for b in BLOCKS if b.not_run]
    assert 0 < len(marked) < sum(b.language in CODE for b in BLOCKS) / 3


# --- Python ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_runs(page, reader, monkeypatch):
    code = [b for b in blocks(page) if b.language == "python" and not b.not_run]
    if not code:
        return
    namespace: dict = {"__name__": "page"}
    for block in code:
        before = "\n" * block.line  # so that a traceback names the page's line
        exec(compile(before + block.code, str(page), "exec"), namespace)


def test_python_that_is_not_run_is_right():
    for block in (b for b in BLOCKS if b.language == "python"):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lab":
                assert hasattr(lab, node.attr), f"{block.place}: no lab.{node.attr}"


# --- shell -------------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block, without comments and settings of the environment."""
    found = []
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        while "&&" in words:
            at = words.index("&&")
            found.append(words[:at])
            words = words[at + 1 :]
        found.append(words)
    return [words for words in found if words]


@pytest.mark.parametrize("block", SHELL)
def test_shell_lines_are_right(block, reader, capsys):
    for words in commands(block):
        name = Path(words[0]).name or words[0]
        if name != "rlhf-lab":
            CHECKS[name](words[1:])
        elif block.not_run:
            cli._parser().parse_args(words[1:])
        else:  # the doctor's 1 says that this machine lacks something
            fine = {0, 1} if words[1] == "doctor" else {0}
            assert main(words[1:]) in fine, capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "best-of-n", "data", "plan", "xray", "measure"])
def test_the_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and command in capsys.readouterr().out


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    settings = re.findall(r"^([A-Z_]+) +\?=", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for word in words:
        name, equals, _ = word.partition("=")
        assert name in (settings if equals else targets), word


def check_paths(words: list[str]) -> None:
    """Words that look like files of the repository are such."""
    for word in words:
        if "/" in word and not word.startswith(("-", "build/", "http")):
            assert (ROOT / word).exists(), word


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert words[1] in {"venv", "pytest", "sphinx", "http.server"}, words
        words = words[2:]
    else:
        assert (ROOT / words[0]).is_file(), words
    check_paths(words)


def check_pip(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert words[0] == "install"
    for word in words:
        for extra in re.findall(r"\[(\w+)\]", word):
            assert re.search(rf"^{extra} = ", extras, re.M), word
    assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()


def check_papermill(words: list[str]) -> None:
    """The notebook is there, and what it is given are names in its cell of parameters."""
    given, (notebook, _) = words[1:-2:3], words[-2:]
    cells = json.loads((ROOT / "notebooks" / notebook).read_text("utf-8"))["cells"]
    (cell,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = re.findall(r"^(\w+) = ", "".join(cell["source"]), re.M)
    assert words[:-2:3] == ["-p"] * len(given) and set(given) <= set(names), words


def check_nbgrader(words: list[str]) -> None:
    """A command of nbgrader's on a notebook of the course."""
    assert words[0] in {"generate_assignment", "autograde", "generate_feedback", "export"}, words
    assert all((ROOT / "notebooks" / f"{word}.ipynb").is_file() for word in words[1:]), words


CHECKS = {
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "pytest": check_paths,
    "ruff": check_paths,
    "jupyter": check_paths,
    "nbgrader": check_nbgrader,
    "papermill": check_papermill,
    "cd": lambda words: None,
    ".": lambda words: None,  # the activation of an environment
}
