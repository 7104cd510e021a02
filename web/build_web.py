"""The planner as a web page: `make web` writes build/web, one folder for any static file server.

    index.html, page.js, worker.js, *.css      the page, with the default plan's answer in it
    planner.zip                                planner_page.py, and what it imports of rlhf_lab
    README.md                                  what a Hugging Face Space reads (static SDK)
    pyodide/                                   Python for browsers, from npm, at a pinned version

Pyodide's package is fetched once, into build/cache, by `npm pack`; nothing of it is committed. The
planner's tables travel as JSON, since parsing YAML without libyaml is slow; PyYAML's own files
travel too, to write the config files that the page offers.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from html import escape
from importlib.metadata import distribution
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import yaml  # noqa: E402
from planner_page import Page  # noqa: E402

from rlhf_lab import __version__  # noqa: E402
from rlhf_lab.planning import plan  # noqa: E402
from rlhf_lab.stages import read_table  # noqa: E402

PACKAGE = ROOT / "rlhf_lab"
PYODIDE = "314.0.7"
SHA256 = "66b7949e5a0cba2250b586d7e368bf12fb482800748d182c4618254b685ffaa0"
NARROW = 376
"""px of the pictures on a phone (page.js)"""
CORE = (
    *("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip"),
    "pyodide-lock.json",
)
"""What of its package a page needs."""
FOLDERS = ("charts", "cost", "data", "launch", "models", "runs", "widgets", "world")
"""What of rlhf_lab the planner imports, beside the files at its top."""
PAGE = ("page.js", "page.css", "worker.js")
SHARED = ("chart.js", "chart.css", "copy.js", "planner.css")
"""The notebook's own scripts and styles, which the page uses as they are."""


def fetch_npm(name: str, version: str, sha256: str, cache: Path) -> Path:
    """A package's archive from npm, fetched where the cache has it not. Raises RuntimeError, one
    line, where it cannot be had or is another file than the pinned one."""
    archive = cache / f"{name}-{version}.tgz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{name}@{version}", "--silent", "--pack-destination", cache]
        command += ["--fetch-retries=1"]  # without a connection it is said in seconds, not minutes
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=cache)
        except FileNotFoundError:
            raise RuntimeError(f"npm fetches {name}: install Node.js") from None
        except (subprocess.SubprocessError, OSError) as error:
            raise RuntimeError(f"npm cannot fetch {name} {version}: {error}") from None
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{archive} is not {name} {version}: sha256 {found}; delete it")
    return archive


def fetch_pyodide(cache: Path) -> Path:
    """Pyodide's archive (`fetch_npm`)."""
    return fetch_npm("pyodide", PYODIDE, SHA256, cache)


def planner_files() -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of what the page's Python imports."""
    for path in sorted(PACKAGE.rglob("*")):
        name = path.relative_to(PACKAGE)
        if len(name.parts) > 1 and name.parts[0] not in FOLDERS:
            continue
        at = f"rlhf_lab/{name.as_posix()}"
        if path.suffix == ".yaml":
            table = json.dumps(read_table(str(path)), separators=(",", ":"))
            yield at.removesuffix(".yaml") + ".table.json", table.encode()
        elif path.suffix in (".py", ".json", ".css"):
            yield at, path.read_bytes()
    for path in sorted((ROOT / "small_models").rglob("*.json")):  # tokenizers: which are alike
        yield f"rlhf_lab/{path.relative_to(ROOT).as_posix()}", path.read_bytes()
    yield "planner_page.py", (HERE / "planner_page.py").read_bytes()
    for path in sorted(Path(yaml.__file__).parent.glob("*.py")):
        yield f"yaml/{path.name}", path.read_bytes()


def write_zip(path: Path) -> None:
    """The same bytes from the same files."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in planner_files():
            entry = zipfile.ZipInfo(name)  # of 1980, on every day
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)


def first_page() -> str:
    """index.html with the answer to the default plan in it."""
    page = Page(plan)
    first = {
        "narrow": json.loads(page.open("", NARROW))["svg"],
        "state": json.loads(page.open("")),
        "advice": json.loads(page.advice()),
    }
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (repository,) = re.findall(r'^Repository = "([^"]+)"', project, re.M)
    values = {
        "first": json.dumps(first).replace("<", "\\u003c"),
        "version": escape(__version__),
        "repository": escape(repository),
    }
    text = (HERE / "index.html").read_text("utf-8")
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], text)


def licences() -> str:
    """Whose work is in the folder."""
    theirs = distribution("PyYAML")
    texts = [f.read_text() for f in theirs.files or () if "licen" in f.name.lower()]
    return "\n\n".join(
        [
            "rlhf_lab: Apache-2.0.",
            f"pyodide/: Pyodide {PYODIDE} (npm package pyodide), Mozilla Public License 2.0, with "
            "CPython, Python Software Foundation License.",
            f"yaml/ in planner.zip: PyYAML {theirs.version}:",
            *texts,
        ]
    )


def build(out: Path, cache: Path) -> None:
    """Write the folder anew. Raises RuntimeError, one line, where Pyodide cannot be had."""
    archive = fetch_pyodide(cache)
    shutil.rmtree(out, ignore_errors=True)
    (out / "pyodide").mkdir(parents=True)
    with tarfile.open(archive) as package:
        for name in CORE:
            content = package.extractfile(f"package/{name}").read()
            (out / "pyodide" / name).write_bytes(content)
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)
    for name in SHARED:
        shutil.copyfile(PACKAGE / "widgets" / name, out / name)
    write_zip(out / "planner.zip")
    (out / "index.html").write_text(first_page(), encoding="utf-8")
    shutil.copyfile(HERE / "space" / "README.md", out / "README.md")
    (out / "licences.txt").write_text(licences(), encoding="utf-8")


def built(name: str, build: Callable[[Path, Path], None]) -> dict[Path, int]:
    """Sizes of the files of build/NAME, made anew. Ends with a line where that cannot be."""
    out = ROOT / "build" / name
    try:
        build(out, ROOT / "build" / "cache")
    except RuntimeError as error:
        sys.exit(str(error))
    return {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}


def main() -> None:
    sizes = built("web", build)
    core = sum(size for path, size in sizes.items() if path.parent.name == "pyodide")
    ours = (sum(sizes.values()) - core) / 1e6
    print(f"build/web: {ours:.2f} MB of ours, {core / 1e6:.1f} MB of Pyodide's core")
    print(
        "python -m http.server --bind 127.0.0.1 -d build/web    and open the address that it says"
    )


if __name__ == "__main__":
    main()
