"""The site is built without a warning and without a network, and asks no other host for anything.

Run: pytest tests/docs/test_site.py          # needs the extra `docs`
"""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser_kit import FLAGS, chromium, missing
from pages import ROOT
from web_kit import SUB_PATH, served

import rlhf_lab as lab

pytest.importorskip("myst_nb")
pytest.importorskip("furo")
LOCAL = ("http://127.0.0.1:", "data:", "blob:")

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
    """What a browser would fetch to show a page, its links and their places, and pictures without
    words."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.wordless, self.links, self.places = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.fetched.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.fetched.append(given.get("href") or "")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
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


def test_what_make_has_built_is_on_the_site(site):
    page = (site / "web.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'href="((?:replay|planner|lite)/[^"?]+)', page))
    assert all((site / link).is_file() for link in linked)
    built = {"replay/ppo.html": True}
    built["planner/index.html"] = (ROOT / "build" / "web" / "index.html").is_file()
    built["lite/lab/index.html"] = (ROOT / "build" / "lite" / "index.html").is_file()
    assert linked == {link for link, there in built.items() if there}


def test_every_link_of_the_site_leads_somewhere(site):
    """Also to its place on the page. JupyterLite's own pages are its own matter."""
    pages = {p: Asked(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    ours = {p: asked for p, asked in pages.items() if p.relative_to(site).parts[0] != "lite"}
    checked = 0
    for page, asked in ours.items():
        for link in asked.links:
            if re.match(r"(https?:|mailto:|data:)", link):
                continue
            path, _, anchor = link.partition("#")
            there = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            assert there.is_file(), f"{page.name}: {link}"
            if anchor and there in ours:
                assert unquote(anchor) in ours[there].places, f"{page.name}: {link}"
            checked += 1
    assert checked > 1000


@pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
def test_a_browser_shows_it_from_a_plain_file_server(site, tmp_path):
    """From a sub-path; nothing is missing, nothing fails, and no other host is asked."""
    from playwright.sync_api import sync_playwright

    folder = tmp_path / SUB_PATH.strip("/")
    folder.parent.mkdir(parents=True)
    folder.symlink_to(site)
    bad, titles = [], {}
    with served(tmp_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("pageerror", lambda error: bad.append(str(error)))
        page.on("response", lambda r: bad.append(r.url) if r.status >= 400 else None)
        page.on("request", lambda r: bad.append(r.url) if not r.url.startswith(LOCAL) else None)
        for name in ("index", "notebooks/11_plan_your_project", "reference/plan", "web"):
            page.goto(f"{address}{name}.html")
            titles[name] = page.locator("h1").first.inner_text()
        page.goto(f"{address}reference/accuracy.html")
        assert page.locator("img[alt]").first.evaluate("image => image.naturalWidth") > 100
        page.goto(f"{address}web.html")
        page.get_by_role("link", name="A stored PPO run").click()
        assert page.locator("figure svg[role=img]").count() >= 5
        browser.close()
    assert not bad
    assert titles["index"] == "rlhf_lab" and titles["reference/plan"].startswith("lab.plan")
