"""A headless Chromium for tests, driven over its DevTools protocol: no package beyond `websockets` is needed."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_START_S = 60.0
_POLL_S = 0.05


def find_browser() -> str | None:
    """The path of a Chromium or Chrome on this machine."""
    return next((path for name in BINARIES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.requested: list[str] = []
        """Addresses of everything the tab asked for."""
        self.complaints: list[str] = []
        """Errors on the console, and exceptions."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"])[:500])
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> Any:
        """The value of an expression once it is true."""
        deadline = time.monotonic() + seconds
        # What is asked about may not be there yet.
        tried = f"(() => {{ try {{ return {expression}; }} catch {{ return false; }} }})()"
        while not (value := self.run(tried)):
            assert time.monotonic() < deadline, (f"never true: {expression}", self.complaints)
            time.sleep(_POLL_S)
        return value

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def click(self, selector: str) -> None:
        """A real click in the middle of the element."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{found}")
        x, y = self.run(
            f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str, *, enter: bool = False) -> None:
        """Types into a field that is empty."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        if enter:
            key: dict[str, Any] = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type="keyDown", **key)
            self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser_page(binary: str, *, width: int = 1200, height: int = 780) -> Iterator[Page]:
    """A tab in a browser of its own, with an empty profile, which ends with the block."""
    from websockets.sync.client import connect

    # A sandbox needs privileges that containers lack; the pages are our own.
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", f"--window-size={width},{height}"]
    with tempfile.TemporaryDirectory(prefix="rlb", ignore_cleanup_errors=True) as profile:
        command = [binary, *options, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            target = _target(Path(profile) / "DevToolsActivePort")
            with connect(target, max_size=None, open_timeout=30, proxy=None) as socket:
                page = Page(socket)
                size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
                page.call("Emulation.setDeviceMetricsOverride", **size)
                yield page
        finally:
            process.terminate()
            process.wait(timeout=30)


def _target(port_file: Path) -> str:
    """The address of the first tab's DevTools."""
    import httpx

    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if port_file.exists() and (lines := port_file.read_text().splitlines()):
            listed = httpx.get(f"http://127.0.0.1:{lines[0]}/json/list", timeout=10, trust_env=False).json()
            tabs = [entry["webSocketDebuggerUrl"] for entry in listed if entry["type"] == "page"]
            if tabs:
                return str(tabs[0])
        time.sleep(_POLL_S)
    raise AssertionError("the browser did not start")
