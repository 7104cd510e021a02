"""Notebooks that run in the reader's browser: `make lite` writes build/lite, a JupyterLite site.

    lab/index.html?path=11_plan_your_project.ipynb      JupyterLab, its Python in the page
    files/                                              the notebooks, made from ours
    static/pyodide/                                     Pyodide from npm, and the kernel's wheels
    pypi/                                               the planner as a wheel, and its packages

A notebook keeps its cells; one tagged `needs-torch` stands there as text, with the output that is
stored in it, and the first cell says so. The wheels of `lite.txt` are pure Python, fetched once
into build/cache. Pyodide's lock file names a part of them as Pyodide's own builds, whose bytes
differ from the registry's: their sha256 are written anew, else Pyodide refuses them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from build_web import PACKAGE, built, fetch_pyodide, planner_files  # noqa: E402

from rlhf_lab import __version__  # noqa: E402

Notebook = dict[str, list[dict[str, object]]]
NOTEBOOKS = ("07_what_scales", "11_plan_your_project")
LAB_APP = "lab"
NEEDS = ("anywidget", "ipywidgets", "plotly")
EXTENSIONS = ("anywidget", "jupyterlab_widgets", "plotly")
"""Packages whose wheels hold an extension of JupyterLab."""
NEEDS_TORCH, INSTALLS = "needs-torch", "colab"
INSTALL = """\
# Installs the planner's part of the lab in this page.
%pip install --quiet rlhf-lab"""
SAYS = """
**In your browser.** Python runs in this page, and nothing is sent anywhere. The first start can \
take a minute; your changes stay in this browser. Plans are those of any machine. **Not here:** \
training, the x-ray and the checks of exercises, since no browser has torch. What needs it \
({count}) stands here as text, with what it printed elsewhere. Name a device: there is no \
`hardware="here"`.
"""
SETTINGS = {
    "jupyter-lite-schema-version": 0,
    "jupyter-config-data": {
        "appName": "rlhf_lab",
        "exposeAppInBrowser": True,
        "litePluginSettings": {
            "@jupyterlite/pyodide-kernel-extension:kernel": {"disablePyPIFallback": True}
        },
    },
}


# --- notebooks ----------------------------------------------------------------------------------


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def as_text(cell: dict) -> dict:
    """A code cell as Markdown: its source, and the words of its stored outputs."""
    found = [
        "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
        for output in cell["outputs"]
    ]
    parts = ["*Not in a browser (it needs torch):*", f"```python\n{''.join(cell['source'])}\n```"]
    if words := "\n".join(text.rstrip() for text in found if text.strip()):
        parts.append(f"```text\n{words}\n```")
    source = "\n\n".join(parts).splitlines(keepends=True)
    return {"cell_type": "markdown", "id": cell["id"], "metadata": {}, "source": source}


def links_to(text: str, repository: str) -> str:
    """Links to the course's other notebooks as links to the repository; badges are taken out."""
    text = re.sub(r"^\[!\[Open in .*? · ", "", text, flags=re.M)

    def there(found: re.Match[str]) -> str:
        at = "" if found[1] in NOTEBOOKS else f"{repository}/blob/main/notebooks/"
        return f"]({at}{found[1]}.ipynb)"

    return re.sub(r"\]\(([\w]+)\.ipynb\)", there, text)


def lite_notebook(name: str, repository: str) -> Notebook:
    """A notebook of the course as it runs in a browser, without outputs."""
    whole = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    gone = sum(NEEDS_TORCH in tags(cell) for cell in whole["cells"])
    count = f"{gone} cell{'s' * (gone > 1)}"
    cells = []
    for place, cell in enumerate(whole["cells"]):
        if NEEDS_TORCH in tags(cell):
            cell = as_text(cell)
        if INSTALLS in tags(cell):
            cell["source"] = INSTALL.splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        else:
            text = links_to("".join(cell["source"]), repository)
            if place == 0:
                text += "\n" + SAYS.format(count=count)
            cell["source"] = text.splitlines(keepends=True)
        cells.append(cell)
    whole["cells"] = cells
    whole["metadata"]["kernelspec"] = {
        "display_name": "Python (Pyodide)",
        "language": "python",
        "name": "python",
    }
    return whole


# --- wheels -------------------------------------------------------------------------------------


def write_wheel(folder: Path) -> Path:
    """The planner's part of the lab, its widgets and the course's stored runs as a wheel."""
    info = f"rlhf_lab-{__version__}.dist-info"
    needs = "".join(f"Requires-Dist: {name}\n" for name in NEEDS)
    files = {name: content for name, content in planner_files() if name != "planner_page.py"}
    for path in sorted((PACKAGE / "widgets").glob("*.js")):
        files[f"rlhf_lab/widgets/{path.name}"] = path.read_bytes()
    for path in sorted((ROOT / "notebooks" / "course_runs").rglob("*.json*")):
        files[f"rlhf_lab/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: rlhf-lab\nVersion: {__version__}\n{needs}".encode()
    )
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files).encode()
    wheel = folder / f"rlhf_lab-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 9)
    return wheel


def fetch_wheels(cache: Path) -> list[Path]:
    """The wheels of lite.txt, fetched where the cache has them not. Raises RuntimeError, one line,
    where pip cannot have them, or has others."""
    listed = (HERE / "lite.txt").read_bytes()
    folder = cache / f"lite-{hashlib.sha256(listed).hexdigest()[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=cache) as fetched:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
            command += [fetched, "--require-hashes", "-r", str(HERE / "lite.txt")]
            command += ["--only-binary", ":all:", "--python-version", "3.14"]
            command += ["--implementation", "py", "--abi", "none", "--platform", "any"]
            command += ["--disable-pip-version-check", "--retries", "1"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
                raise RuntimeError(f"pip cannot fetch what web/lite.txt lists: {why}")
            shutil.copytree(fetched, folder)
    return sorted(folder.glob("*.whl"))


def write_pyodide(archive: Path, wheels: list[Path], folder: Path) -> list[Path]:
    """Pyodide as JupyterLite takes it, with the wheels that its lock file names. → the others."""
    with tarfile.open(archive) as package:
        for member in package:
            path = folder / Path(member.name).name
            if member.isfile() and path.suffix not in (".md", ".ts", ".map", ".html"):
                path.write_bytes(package.extractfile(member).read())
    lock = folder / "pyodide-lock.json"
    text = json.loads(lock.read_text("utf-8"))
    named = {entry["file_name"]: entry for entry in text["packages"].values()}
    for wheel in wheels:
        if entry := named.get(wheel.name):
            content = wheel.read_bytes()
            (folder / wheel.name).write_bytes(content)
            entry["sha256"] = hashlib.sha256(content).hexdigest()
    lock.write_text(json.dumps(text), encoding="utf-8")
    return [wheel for wheel in wheels if wheel.name not in named]


# --- the site -----------------------------------------------------------------------------------


def prepare(work: Path, cache: Path, repository: str) -> None:
    """Everything that JupyterLite builds from, as files. Raises RuntimeError, one line."""
    pyodide, wheels = work / "static" / "pyodide", work / "pypi"
    pyodide.mkdir(parents=True)
    wheels.mkdir()
    others = write_pyodide(fetch_pyodide(cache), fetch_wheels(cache), pyodide)
    for wheel in others:
        shutil.copyfile(wheel, wheels / wheel.name)
    write_wheel(wheels)
    for name in NOTEBOOKS:
        text = json.dumps(lite_notebook(name, repository), indent=1, ensure_ascii=False)
        path = work / "files" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    shutil.copytree(ROOT / "notebooks" / "images", work / "files" / "images")
    (work / "jupyter-lite.json").write_text(json.dumps(SETTINGS, indent=1), encoding="utf-8")


def jupyter_lite(work: Path, out: Path) -> None:
    """Build the site. Raises RuntimeError where JupyterLite is not installed, or refuses."""
    program = Path(sys.executable).with_name("jupyter-lite")
    if not program.is_file():
        raise RuntimeError("JupyterLite is not installed: pip install 'rlhf-lab[lite]'")
    kernel = Path(sys.prefix) / "share/jupyter/labextensions/@jupyterlite/pyodide-kernel-extension"
    held = [next((work / "pypi").glob(f"{name}-*.whl")) for name in EXTENSIONS]
    config = {
        "lite_dir": str(work),
        "output_dir": str(out),
        "cache_dir": str(work / "cache"),
        "contents": [str(work / "files")],
        "apps": [LAB_APP],
        "ignore_sys_prefix": True,
        "federated_extensions": [str(kernel), *map(str, held)],
        "no_sourcemaps": True,
        "no_unused_shared_packages": True,
    }
    path = work / "jupyter_lite_config.json"
    path.write_text(json.dumps({"LiteBuildConfig": config}), encoding="utf-8")
    command = [str(program), "build", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=work)
    if done.returncode or not (out / LAB_APP / "index.html").is_file():
        raise RuntimeError(f"JupyterLite refuses:\n{(done.stdout + done.stderr)[-3000:]}")


def build(out: Path, cache: Path) -> None:
    """Write the folder anew. Raises RuntimeError where something of it cannot be had."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (repository,) = re.findall(r'^Repository = "([^"]+)"', project, re.M)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work), cache, repository)
        shutil.rmtree(out, ignore_errors=True)
        jupyter_lite(Path(work), out)


def main() -> None:
    size = sum(built("lite", build).values())
    print(f"build/lite: {size / 1e6:.0f} MB")
    print("python -m http.server --bind 127.0.0.1 -d build/lite    and open, at that address,")
    for name in NOTEBOOKS:
        print(f"    {LAB_APP}/index.html?path={name}.ipynb")


if __name__ == "__main__":
    main()
