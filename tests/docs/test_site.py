"""The site is built without a warning and without a network, and asks no other host for anything.

Run: pytest tests/docs/test_site.py          # needs the extra `docs`
"""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import ROOT

import rlhf_lab as lab

pytest.importorskip("myst_nb")
pytest.importorskip("furo")

# Sphinx, in a process that cannot reach a network.
OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("the site is built without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


class Asked(HTMLParser):
    """What a browser would fetch to show a page, and pictures without words."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.wordless = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.fetched.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.fetched.append(given.get("href") or "")
        if tag == "img" and not given.get("alt"):
            self.wordless.append(given.get("src", "")[:60])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "-W", "--keep-going", "-q", "-E"]
    command += ["-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr[-4000:]
    return folder / "html"


def test_a_page_for_each_public_name_and_each_notebook(site):
    pages = {p.stem for p in (site / "reference").glob("*.html")}
    assert set(lab.__all__) | {"stages", "command_line", "rules", "contributing"} <= pages
    notebooks = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert {p.stem for p in (site / "notebooks").glob("*.html")} == notebooks


def test_no_page_asks_another_host(site):
    for page in site.rglob("*.html"):
        asked = Asked(page.read_text(encoding="utf-8")).fetched
        assert not [url for url in asked if re.match(r"(https?:)?//", url)], page


def test_a_stored_widget_shows_its_picture(site):
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert "jupyter.widget-view" not in page
        stored = notebook.read_text("utf-8").count('src=\\"data:image/svg+xml;base64,')
        assert page.count('src="data:image/svg+xml;base64,') == stored >= 1


def test_every_picture_of_a_written_page_has_words(site):
    for page in [*site.glob("*.html"), *(site / "reference").glob("*.html")]:
        assert not Asked(page.read_text(encoding="utf-8")).wordless, page


def test_a_stored_run_and_the_planner_are_on_the_site(site):
    page = (site / "web.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'href="((?:replay|planner)/[^"]+)"', page))
    assert linked <= {"replay/ppo.html", "planner/index.html"} and "replay/ppo.html" in linked
    assert all((site / link).is_file() for link in linked)
    made = (ROOT / "build" / "web" / "index.html").is_file()
    assert ("planner/index.html" in linked) == made
