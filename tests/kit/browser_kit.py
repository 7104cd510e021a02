"""A real JupyterLab in a real browser: starts both, and drives one notebook.

Everything stays on this machine: a server on loopback with its own configuration folders, and a
page that notes every host it asks for. Times are in seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What JupyterLab itself complains about in a fresh configuration.
NOISE = ("favicon", "status of 404", "Failed to load resource")
_NOTEBOOK = "window.jupyterapp.shell.currentWidget"
_IDLE = f"""() => {{
  const kernel = window.jupyterapp && {_NOTEBOOK}?.sessionContext?.session?.kernel;
  return kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle';
}}"""
# Ends of promises are polled for: one that a script returns may be collected before it is awaited,
# and goes with its page where JupyterLab loads itself once more.
_RESTORED = """() => {
  const app = window.jupyterapp;
  if (app && window.labApp !== app) {
    window.labApp = app;
    window.labRestored = false;
    app.restored.then(() => { window.labRestored = true; });
  }
  return window.labRestored && app.commands.hasCommand('docmanager:open');
}"""
_COMMAND = "([name, args]) => window.jupyterapp.commands.execute(name, args)"
_EXECUTE = f"""code => {_NOTEBOOK}.sessionContext.session.kernel
  .requestExecute({{code, store_history: false}}).done"""


def chromium() -> str | None:
    """The browser's program: RLHF_LAB_CHROMIUM, or the first one there is."""
    named = os.environ.get("RLHF_LAB_CHROMIUM")
    return named or next(filter(None, map(shutil.which, CHROMIUM)), None)


def missing() -> str | None:
    """Why there is no browser to test in, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "no playwright (pip install playwright): browser tests left out"
    if chromium() is None:
        return "no Chromium (apt install chromium): browser tests left out"
    return None


class Server:
    """`jupyter lab` on a free port, in folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.token = folder / "notebooks", secrets.token_hex(16)
        self.root.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
            env[f"JUPYTER_{name}"] = str(folder / name.lower())
        for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
            env[f"JUPYTERLAB_{name}"] = str(folder / name.lower())
        quiet = folder / "settings_dir" / "@jupyterlab" / "apputils-extension"
        quiet.mkdir(parents=True)
        (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser"),
            *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"),
            *("--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}"),
            *(f"--ServerApp.root_dir={self.root}", "--LabApp.expose_app_in_browser=True"),
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ]
        if hasattr(os, "getuid") and os.getuid() == 0:
            command.append("--allow-root")
        self.log = folder / "jupyter.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.root, env=env, stdout=log, stderr=subprocess.STDOUT
            )
        self._wait()

    def _wait(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self.request("/api/status")
                return
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}")

    def request(self, path: str, method: str = "GET", body: object = None) -> bytes:
        headers = {"Authorization": f"token {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read()

    def start_kernel(self, notebook: str) -> str:
        """Start a notebook's kernel before its page: both need seconds, now the same ones. → the
        session."""
        session = {"path": notebook, "name": notebook, "type": "notebook"}
        body = {**session, "kernel": {"name": "python3"}}
        return str(json.loads(self.request("/api/sessions", "POST", body))["id"])

    def hand_over(self, session: str, notebook: str) -> None:
        """Give a session, and with it its kernel, to another notebook."""
        self.request(f"/api/sessions/{session}", "PATCH", {"path": notebook, "name": notebook})

    def kill_kernels(self) -> None:
        for kernel in json.loads(self.request("/api/kernels")):
            self.request(f"/api/kernels/{kernel['id']}", "DELETE")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Spare:
    """A page of JupyterLab without a notebook, and a kernel that has imported the lab: left by a
    test for the next one, which need not wait for either."""

    page: Any
    session: str
    touch: bool

    def close(self, server: Server) -> None:
        self.page.close()
        server.kill_kernels()


# What a test left in the kernel, the lab's modules aside.
_RESET = "from ipywidgets import Widget\nWidget.close_all()\n%reset -f"


class NotebookPage:
    """One notebook in a browser. `page` is playwright's; the rest are the moves a test makes.

    `errors`: what the page threw or logged as an error. `hosts`: where it sent requests.
    `received`: bytes of each message that came over a websocket, with its time.
    """

    def __init__(
        self,
        context: Any,
        server: Server,
        path: Path,
        shots: Path,
        size: tuple[int, int] = (1280, 900),
    ) -> None:
        self.context, self.server, self.path, self.shots = context, server, path, shots
        self.size = size
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.received: list[tuple[float, int]] = []
        self.page: Any = None
        self._session, self.fresh = "", True
        self._dark = self._no_kernel = self._reloaded = False
        self._listeners = {
            "pageerror": self._thrown,
            "console": self._console,
            "request": lambda request: self._host(request.url),
            "websocket": self._socket,
        }

    # -- opening ------------------------------------------------------------------------------
    def open(self, spare: Spare | None = None) -> NotebookPage:
        """Open the notebook with a kernel that is connected and idle: page and kernel are its own,
        or those of a test before."""
        if spare is not None:
            return self._open_in(spare)
        self._session = self.server.start_kernel(self.path.name)
        self._new_page()
        self.page.goto(
            f"{self.server.url}/lab/tree/{self.path.name}?reset&token={self.server.token}"
        )
        self.page.wait_for_function(_IDLE, timeout=60_000)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        return self

    def _open_in(self, spare: Spare) -> NotebookPage:
        self.page, self._session, self.fresh = spare.page, spare.session, False
        self._watch()
        self.server.hand_over(spare.session, self.path.name)
        self.command("docmanager:open", {"path": self.path.name, "factory": "Notebook"})
        self.page.wait_for_function(_IDLE, timeout=60_000)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        return self

    def reload(self) -> NotebookPage:
        """Save and press F5. The kernel lives on. On a page of its own: the address of one that was
        handed over names the notebook before."""
        assert self.fresh, "notebook(..., fresh=True)"
        self.save()
        self._reloaded = True
        self.page.reload()
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        return self

    def reopen_without_kernel(self) -> NotebookPage:
        """Save, shut every kernel down, and open the file with no kernel at all."""
        self.save()
        self.page.close()
        self.server.kill_kernels()
        self._no_kernel = True
        self._new_page()
        self.page.goto(f"{self.server.url}/lab?reset&token={self.server.token}")
        self.page.wait_for_function(_RESTORED, timeout=60_000)
        preference = {"shouldStart": False, "canStart": False, "autoStartDefault": False}
        self.command(
            "docmanager:open",
            {"path": self.path.name, "factory": "Notebook", "kernelPreference": preference},
        )
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        return self

    def _new_page(self) -> None:
        self.page = self.context.new_page()
        self._watch()

    def _watch(self) -> None:
        self.page.set_viewport_size({"width": self.size[0], "height": self.size[1]})
        for event, listener in self._listeners.items():
            self.page.on(event, listener)

    def _thrown(self, error: Any) -> None:
        # JupyterLab's own, in any notebook that is opened without a kernel.
        if not (self._no_kernel and "null (reading 'kernel')" in str(error)):
            self.errors.append(str(error))

    def _console(self, message: Any) -> None:
        if message.type == "error" and not any(noise in message.text for noise in NOISE):
            self.errors.append(message.text)

    def _host(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.hostname or url)

    def _socket(self, socket: Any) -> None:
        self._host(socket.url)
        socket.on(
            "framereceived", lambda frame: self.received.append((time.monotonic(), len(frame)))
        )

    # -- doing --------------------------------------------------------------------------------
    def command(self, name: str, args: dict | None = None, wait: bool = True) -> None:
        """A command of JupyterLab's; without `wait` its end is not awaited."""
        self._start(_COMMAND, [name, args or {}])
        if wait:
            self._end(f"JupyterLab's {name}")

    def _start(self, script: str, argument: Any) -> None:
        """Call a function of JavaScript that returns a promise."""
        self.page.evaluate(
            f"""argument => {{
              window.labEnded = null;
              window.labPromise = ({script})(argument).then(
                () => {{ window.labEnded = 'done'; }},
                error => {{ window.labEnded = `${{error}}`; }},
              );
            }}""",
            argument,
        )

    def _end(self, what: str) -> None:
        """Wait for the promise started last."""
        ended = self.page.wait_for_function("() => window.labEnded", timeout=300_000).json_value()
        assert ended == "done", f"{what}: {ended}"

    def run_all(self, wait: bool = True) -> NotebookPage:
        """Run every cell; with `wait` until the kernel is idle again."""
        self.command("notebook:run-all-cells", wait=wait)
        if wait:
            self.wait_idle()
        return self

    def run_until(self, cell: int, selector: str) -> float:
        """Run one code cell; → seconds until the selector finds something."""
        return self.page.evaluate(
            """async ([cell, selector]) => {
              const app = window.jupyterapp;
              app.shell.currentWidget.content.activeCellIndex = cell;
              const start = performance.now();
              app.commands.execute('notebook:run-cell');
              while (!document.querySelector(selector)) await new Promise(requestAnimationFrame);
              return (performance.now() - start) / 1000;
            }""",
            [cell, selector],
        )

    def wait_idle(self, seconds: float = 120) -> None:
        self.page.wait_for_function(_IDLE, timeout=seconds * 1000)

    def save(self) -> None:
        self.command("docmanager:save")

    def theme(self, name: str) -> None:
        """`light` or `dark`."""
        self.command("apputils:change-theme", {"theme": f"JupyterLab {name.title()}"})
        self._dark = name != "light"
        light = "true" if name == "light" else "false"
        self.page.wait_for_selector(f'body[data-jp-theme-light="{light}"]', state="attached")

    def shot(self, name: str, selector: str = "") -> Path:
        """A screenshot of the window, or of what the selector finds first."""
        self.shots.mkdir(parents=True, exist_ok=True)
        path = self.shots / f"{name}.png"
        shown = self.page.locator(selector).first if selector else self.page
        shown.screenshot(path=path)
        return path

    # -- looking ------------------------------------------------------------------------------
    def wait_svg(self, selector: str = ".lab-chart svg", seconds: float = 30) -> Any:
        """The first chart, once it is drawn."""
        self.page.wait_for_selector(selector, timeout=seconds * 1000)
        return self.page.locator(selector).first

    def text(self, cell: int) -> str:
        """What stands in the output of a code cell, hidden parts left out."""
        return (
            self.page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea").first.inner_text()
        )

    def wait_for(self, what: Callable[[], Any], seconds: float = 10) -> Any:
        """Call it until its value is true, and return that."""
        end = time.monotonic() + seconds
        while not (value := what()):
            if time.monotonic() > end:
                raise AssertionError(f"still {value!r} after {seconds} s")
            self.page.wait_for_timeout(50)
        return value

    def saved(self) -> Any:
        """The notebook as it is on disk after saving."""
        self.save()
        return nbformat.read(self.path, as_version=4)

    def close(self, touch: bool = False) -> Spare | None:
        """→ page and kernel for the next test, if this one has left them whole."""
        # JupyterLab may open a reloaded address' notebook once more, after it was closed here.
        whole = not (self.page.is_closed() or self._no_kernel or self._reloaded or self.errors)
        if not self.page.is_closed():
            if self._dark:  # the server remembers it
                self.theme("light")
            whole = whole and self.page.evaluate(_IDLE)
            if not whole:
                self.page.close()
        if not whole:
            self.server.kill_kernels()
            return None
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)
        # Before the next notebook connects, which would ask for the widgets that are there.
        self._start(_EXECUTE, _RESET)
        self._end("clearing the kernel")
        self.page.evaluate(
            """() => { for (const open of [...window.jupyterapp.shell.widgets('main')]) {
              if (open.context) open.context.model.dirty = false;
              open.dispose();
            } }"""
        )
        return Spare(self.page, self._session, touch)


def write_notebook(path: Path, cells: Sequence[str]) -> Path:
    """A notebook of code cells, never run."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    nbformat.write(notebook, path)
    return path
