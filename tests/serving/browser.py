"""A headless Chromium, driven over its DevTools protocol."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from base64 import b64decode
from contextlib import contextmanager
from pathlib import Path

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Page:
    """One tab. Problems that the page reports to its console are kept in `problems`."""

    def __init__(self, socket):
        self._socket, self._numbers, self.problems = socket, itertools.count(), []
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method, **params):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            told = json.loads(self._socket.recv(timeout=30))
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            if told["method"] == "Runtime.exceptionThrown":
                self.problems.append(told["params"]["exceptionDetails"]["text"])
            if told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.problems.append(told["params"]["entry"]["text"])

    def open(self, url, width=1000, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=url)
        here = json.dumps(url.partition("?")[0])
        self.until(f"document.readyState === 'complete' && location.href.startsWith({here})")

    def run(self, script):
        """The value of an expression."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        result = self._call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script, seconds=30):
        """Wait until an expression holds; its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.run(script)
            if found:
                return found
            time.sleep(0.05)
        text = self.run("document.body.innerText")
        raise AssertionError(f"not within {seconds} s: {script}; the page says: {text}")

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def picture(self, path):
        Path(path).write_bytes(b64decode(self._call("Page.captureScreenshot")["data"]))


@contextmanager
def browser():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            port = _port(Path(folder) / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            with connect(tabs[0]["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Page(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _port(file):
    for _ in range(400):
        if file.exists() and file.read_text().strip():
            return int(file.read_text().split()[0])
        time.sleep(0.05)
    raise AssertionError("Chromium did not start")
