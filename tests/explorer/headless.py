"""A notebook in a real JupyterLab in a headless Chromium: what the browser check drives.

Needs the extra `browser` (playwright) and a Chromium or Chrome of the system; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setlib.workbook.serve import lab_command, this_python

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = {"width": 1280, "height": 1000}  # of the window, pixels
ALONE = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"}  # a kernel that asks elsewhere fails
ALONE |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
PATIENCE = 240  # seconds that a notebook may take to run
WATCH = """(picture) => {
  window.drawn = []; window.moved = 0;
  const stamp = () => { window.moved = performance.now(); };
  document.addEventListener("keydown", stamp, true);
  document.addEventListener("pointermove", stamp, true);
  picture.addEventListener("load", () => window.drawn.push(performance.now() - window.moved));
}"""


def program() -> str | None:
    """The browser of this system, if there is one and playwright to drive it."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    return found if importlib.util.find_spec("playwright") else None


class Lab:
    """An open notebook. page: playwright's; trouble: what must not happen, as it is noticed."""

    def __init__(self, page: Any, log: Path, address: str, token: str) -> None:
        self.page, self.log, self.address, self.token, self.trouble = page, log, address, token, []
        page.on("request", self._watch)
        page.on("pageerror", lambda error: self.trouble.append(f"error in the page: {error}"))
        page.on("websocket", lambda socket: socket.on("framereceived", self._read))

    def _watch(self, request: Any) -> None:
        if not request.url.startswith((self.address, self.address.replace("http", "ws", 1), "data:", "blob:")):
            self.trouble.append(f"request to {request.url}")

    def _read(self, frame: str | bytes) -> None:
        """What the kernel sends; an error of a callback is in no cell's output."""
        found = re.search(r"Traceback \(most.{0,1500}", str(frame))
        self.trouble += [f"from the kernel: {found[0]}"] if found else []

    def run_all(self, notebook: str) -> None:
        """Runs every cell and waits for the end."""
        self.page.goto(f"{self.address}/doc/tree/{notebook}?token={self.token}")
        self._until_idle()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_timeout(500)
        self.page.wait_for_function(
            "() => ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('*'))",
            timeout=1000 * PATIENCE,
        )
        self._until_idle()

    def _until_idle(self) -> None:
        """Until the kernel is there and has nothing to do: the page says so before it has one."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            sessions = _get(f"{self.address}/api/sessions?token={self.token}")
            if any(s["kernel"]["execution_state"] == "idle" and s["kernel"]["connections"] for s in sessions):
                return
            time.sleep(0.2)
        raise TimeoutError(f"The kernel was not ready within {PATIENCE} s.")

    def view(self, name: str) -> Any:
        """The box of one view of the explorer, by its class."""
        return self.page.locator(f".setlib-{name}").first

    def control(self, view: str, label: str) -> Any:
        """What the keyboard reaches in the control of a view with this label: handles, choices, text; last its "?"."""
        row = self.view(view).locator(".setlib-control", has=self.page.get_by_text(label, exact=True)).first
        return row.locator(".noUi-handle, select, input, button")

    def picture(self, view: str) -> bytes:
        """The picture that a view shows now."""
        source = (
            self.view(view)
            .locator("img")
            .first.evaluate(
                "async (i) => { const b = await (await fetch(i.src)).arrayBuffer(); return [...new Uint8Array(b)]; }"
            )
        )
        return bytes(source)

    def words(self, view: str) -> str:
        """Everything that a view says outside its picture."""
        return self.view(view).inner_text()

    def wait_for_words(self, view: str, pattern: str, seconds: float = 60) -> str:
        """Until the view says something that matches; returns the match."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.words(view))):
            if time.monotonic() > end:
                raise TimeoutError(f"The view {view} never said '{pattern}', but: {self.words(view)}")
            self.page.wait_for_timeout(50)
        return found.group(0)

    def wait_for_another_picture(self, view: str, last: bytes, seconds: float = 60) -> None:
        """Until the view shows another picture than the last one."""
        end = time.monotonic() + seconds
        while self.picture(view) == last:
            if time.monotonic() > end:
                raise TimeoutError(f"The picture of {view} did not change. The view says: {self.words(view)}")
            self.page.wait_for_timeout(50)

    def watch(self, view: str) -> None:
        """From now on the page notes when the view's picture changes; see `drawn`."""
        self.view(view).locator("img").first.evaluate(WATCH)

    def drawn(self) -> list[float]:
        """Milliseconds from the last key or movement of the mouse to each change of the picture since `watch`."""
        return self.page.evaluate("window.drawn")

    def press(self, key: str) -> float:
        """Presses a key in the focused control; milliseconds until the picture has changed."""
        before = len(self.drawn())
        self.page.keyboard.press(key)
        self.page.wait_for_function(f"window.drawn.length > {before}", polling=5)
        return self.drawn()[before]

    def settle(self) -> None:
        """Until no picture has changed for a while."""
        count = -1
        while count != (count := len(self.drawn())):
            self.page.wait_for_timeout(700)

    def check(self) -> None:
        """Raises AssertionError for errors in outputs, in views, in the kernel's log, and for requests elsewhere."""
        trouble = list(self.trouble)
        for kind in ("error", "stderr"):
            for output in self.page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").all_inner_texts():
                trouble += (
                    [f"{kind} in the notebook: {output[-500:]}"] if "Traceback" in output or kind == "error" else []
                )
        trouble += [
            f"a view says: {text}" for text in self.page.locator("[role=status]", has_text="⚠").all_inner_texts()
        ]
        log = self.log.read_text(encoding="utf-8", errors="replace")
        trouble += [f"in the log: {log[log.index('Traceback') :][:1500]}"] if "Traceback" in log else []
        assert not trouble, "\n".join(trouble)


@contextlib.contextmanager
def open_lab(folder: Path, log: Path) -> Iterator[Lab]:
    """JupyterLab on a folder, this machine alone, and a browser that can reach nothing else."""
    from playwright.sync_api import sync_playwright

    with this_python() as environment, open(log, "wb") as output:
        command, address, token = lab_command(folder, open_browser=False)
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment | ALONE
        )
        try:
            _wait_for(f"{address}/api/status?token={token}", server)
            with sync_playwright() as playwright:
                options = {
                    "executable_path": program(),
                    "args": ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
                }
                browser = playwright.chromium.launch(**options)
                try:
                    yield Lab(browser.new_page(viewport=SIZE), log, address, token)
                finally:
                    browser.close()
        finally:
            with contextlib.suppress(OSError):
                _get(f"{address}/api/shutdown?token={token}", "POST")
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _get(address: str, method: str = "GET") -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=10) as answer:
        return json.loads(answer.read() or b"null")


def _wait_for(address: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            return _get(address)
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise TimeoutError("JupyterLab did not start.") from None
            time.sleep(0.2)
