"""Files about the project: they parse, and agree with pyproject.toml.

Run: pytest tests/docs/test_project_files.py
"""

import pytest
import yaml
from pages import ROOT

import rlhf_lab as lab

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_names_this_version_and_this_repository():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lab.__version__
    assert f'Repository = "{citation["repository-code"]}"' in PYPROJECT
    assert citation["authors"] == [{"name": "The rlhf_lab authors"}]


def test_pre_commit_calls_what_the_environment_has():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    for hook in hooks:
        tool = hook["entry"].split()[0]
        assert hook["language"] == "system" and tool.startswith(".venv/bin/"), hook["id"]
        assert tool.endswith("/python") or f'"{tool.split("/")[-1]}>=' in PYPROJECT, tool


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_an_issue_template_asks_something(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem != "config":
        assert form["name"] and form["description"]
        assert all(part["attributes"]["label"] for part in form["body"])


def test_the_readme_is_read_in_a_few_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
