"""Fixtures of the browser tests: one JupyterLab and one browser with its cache for the session; a
page, a notebook and a kernel for each test.

Skipped where there is no Chromium or no playwright; RLHF_LAB_BROWSER=required makes
that a failure. Screenshots go to RLHF_LAB_SHOTS, or to a temporary folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser_kit import FLAGS, NotebookPage, Server, Spare, chromium, missing, write_notebook


def pytest_collection_modifyitems(items) -> None:
    """Skipped by a mark, which pytest sums up in one line for each file."""
    reason = missing()
    if reason and os.environ.get("RLHF_LAB_BROWSER") != "required":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    if reason := missing():
        pytest.fail(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("lab"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    named = os.environ.get("RLHF_LAB_SHOTS")
    return Path(named) if named else tmp_path_factory.mktemp("shots")


@pytest.fixture(scope="session")
def contexts(browser):
    """{touch screen or not: a context}. Its pages share the cache, so that JupyterLab's scripts are
    fetched and compiled once."""
    contexts = {
        touch: browser.new_context(has_touch=touch, reduced_motion="reduce")
        for touch in (False, True)
    }
    yield contexts
    for context in contexts.values():
        context.close()


@pytest.fixture(scope="session")
def spares(contexts, lab):
    """At most one page and kernel that the test before has left whole."""
    kept: list[Spare] = []
    yield kept
    for spare in kept:
        spare.close(lab)


@pytest.fixture
def notebook(contexts, lab, shots, request, spares):
    """`notebook(cells)` opens a notebook of those code cells; `touch=True` on a touch screen,
    `fresh=True` on a page and with a kernel of its own: what reloads needs them.

    Afterwards: no error on any page but those a test has taken out of `book.errors`, and no host
    but this machine.
    """
    opened: list[NotebookPage] = []

    def start(
        cells: list[str],
        touch: bool = False,
        width: int = 1280,
        height: int = 900,
        fresh: bool = False,
    ) -> NotebookPage:
        path = write_notebook(lab.root / f"{request.node.name[:60]}_{len(opened)}.ipynb", cells)
        opened.append(NotebookPage(contexts[touch], lab, path, shots, (width, height)))
        spare = spares.pop() if spares else None
        if spare is not None and (fresh or spare.touch != touch):
            spare.close(lab)
            spare = None
        return opened[-1].open(spare)

    yield start
    for book in opened:
        spare = book.close(book.context is contexts[True])
        book.context.clear_permissions()
        spares += [spare] if spare is not None else []
    assert not [error for book in opened for error in book.errors]
    assert {host for book in opened for host in book.hosts} <= {"127.0.0.1"}
