"""The notebooks of JupyterLite: what they keep, and that every cell runs without torch.

Run: pytest tests/docs/test_lite.py         # benchmarks/lite.py runs them in a browser
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from web_kit import ROOT, build_lite

REPOSITORY = "https://github.com/somebody/lab"

# What a browser has not; psutil asks the machine, which a browser is none of.
WITHOUT = """
import sys
gone = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "pandas",
        "safetensors", "huggingface_hub", "pyarrow", "numpy", "psutil", "jinja2", "jmespath"}
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
import json
from IPython.core.interactiveshell import InteractiveShell
from rlhf_lab.cost import hardware
hardware.IN_A_BROWSER = True
shell = InteractiveShell.instance()
for source in json.loads(sys.argv[1]):
    shell.run_cell(source).raise_error()
print(hardware.__file__)
"""


@pytest.fixture(scope="module", params=build_lite.NOTEBOOKS)
def notebook(request):
    """(name, the notebook as it runs in a browser)."""
    return request.param, build_lite.lite_notebook(request.param, REPOSITORY)


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_first_cell_says_what_cannot_run_there(notebook):
    name, whole = notebook
    ours = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    gone = [c for c in ours["cells"] if "needs-torch" in c["metadata"].get("tags", [])]
    first = text_of(whole["cells"][0])
    assert gone and "no browser has torch" in first and f"({len(gone)} cell" in first
    assert "[![" not in first  # badges lead elsewhere
    there = {c["id"]: c for c in whole["cells"]}
    for cell in gone:
        assert there[cell["id"]]["cell_type"] == "markdown"
        assert text_of(cell) in text_of(there[cell["id"]])
    assert [c["id"] for c in whole["cells"]] == [c["id"] for c in ours["cells"]]


def test_links_and_pictures_lead_somewhere(notebook):
    text = "\n".join(text_of(c) for c in notebook[1]["cells"] if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert target.removesuffix(".ipynb") in build_lite.NOTEBOOKS or (
                (ROOT / "notebooks" / target).is_file()
            )
    assert REPOSITORY in text  # the other notebooks stay there


def test_every_cell_runs_without_torch_from_the_wheel(notebook, tmp_path):
    wheel = build_lite.write_wheel(tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        listed = archive.read(f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info/RECORD")
        assert listed.decode().count("\n") == len(archive.namelist()) - 1
    first, *rest = [c for c in notebook[1]["cells"] if c["cell_type"] == "code"]
    assert "%pip install --quiet rlhf-lab" in text_of(first) and len(rest) > 15
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps([text_of(c) for c in rest])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "IPYTHONDIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip().endswith(str(site / "rlhf_lab" / "cost" / "hardware.py"))


def test_the_lock_file_names_the_wheels_as_they_are(tmp_path):
    """Pyodide refuses a wheel whose sha256 is not the lock file's."""
    lock = {"packages": {"one": {"file_name": "one-1-py3-none-any.whl", "sha256": "0" * 64}}}
    lock["packages"]["two"] = {"file_name": "two-1-py3-none-any.whl", "sha256": "0" * 64}
    archive = tmp_path / "pyodide.tgz"
    with tarfile.open(archive, "w:gz") as package:
        for name, text in {
            "pyodide-lock.json": json.dumps(lock),
            "README.md": "not served",
        }.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text)
            package.addfile(entry, io.BytesIO(text.encode()))
    wheels = [tmp_path / "one-1-py3-none-any.whl", tmp_path / "three-1-py3-none-any.whl"]
    for wheel in wheels:
        wheel.write_bytes(wheel.name.encode())
    (tmp_path / "out").mkdir()
    assert build_lite.write_pyodide(archive, wheels, tmp_path / "out") == wheels[1:]
    written = json.loads((tmp_path / "out" / "pyodide-lock.json").read_text())["packages"]
    assert written["one"]["sha256"] == hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    assert written["two"]["sha256"] == "0" * 64
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"pyodide-lock.json", wheels[0].name}


def test_what_cannot_be_fetched_is_said_in_one_line(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], 1, "", "Retrying\nERROR: no such wheel\n")

    monkeypatch.setattr(build_lite.subprocess, "run", refuse)
    with pytest.raises(RuntimeError, match=r"^pip cannot fetch what web/lite.txt lists: ERROR: no"):
        build_lite.fetch_wheels(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing half-fetched is taken for the wheels later
    monkeypatch.setattr(build_lite.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="JupyterLite is not installed"):
        build_lite.jupyter_lite(tmp_path, tmp_path)


def test_the_site_says_what_of_it_is_built():
    sys.path.append(str(ROOT / "docs"))
    import generate

    built = generate.web_pages({"make lite"})
    for name in build_lite.NOTEBOOKS:
        assert f'href="lite/lab/index.html?path={name}.ipynb"' in built
    assert "planner/index.html" not in built and "(make web, then make docs)" in built
    assert Path(build_lite.HERE / "lite.txt").read_text().count("--hash=sha256:") == 24
