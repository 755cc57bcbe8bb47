"""A headless Chromium that a test drives over the DevTools protocol on two pipes: pointer events, screenshots, no library."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 120  # seconds for one answer: a machine may be busy


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page. Raises AssertionError for what the page throws, TimeoutError where no answer comes."""

    def __init__(self, to_browser: int, from_browser: int):
        self._in, self._out, self._waiting = to_browser, from_browser, b""
        self._ids = itertools.count(1)
        self._session: str | None = None
        self.complaints: list[str] = []
        """What the page wrote to its console as an error, threw, or asked for over a network."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {TIMEOUT} s")
            self._waiting += os.read(self._out, 1 << 20)
        text, self._waiting = self._waiting.split(b"\0", 1)
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, content: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(content["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.complaints.append(content["entry"]["text"])
        elif method == "Network.requestWillBeSent" and content["request"]["url"].split(":", 1)[0] not in (
            "data",
            "file",
            "about",
        ):
            self.complaints.append(content["request"]["url"])

    def open(self, path: Path, width: int = 1360, height: int = 960) -> float:
        """Load a file and wait for `document.readyState`; returns the seconds from the request to the load event."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")
        return self.run("performance.timing.loadEventStart - performance.timing.navigationStart") / 1000

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, json.dumps(result["exceptionDetails"])[:800]
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Poll until an expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"never true in the page: {condition}")
            time.sleep(0.05)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """One event: mouseMoved, mousePressed, mouseReleased or mouseWheel, at a place of the window."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        """Press and release the left button."""
        self.mouse("mouseMoved", x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def screenshot(self, path: Path, **clip: float) -> None:
        """Write a PNG of the window, or of x, y, width, height."""
        more = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"]))


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with `profile`, an empty folder, and end it again."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-background-networking", "--mute-audio"]
    # The protocol wants its pipes at descriptors 3 and 4; bash puts them there (dash knows descriptors below 10 alone).
    command = ["bash", "-c", f'exec "$@" 3<&{in_read} 4>&{out_write}', "bash", find_chromium(), *options]
    process = subprocess.Popen(
        command, pass_fds=(in_read, out_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(in_read)
    os.close(out_write)
    try:
        yield Browser(in_write, out_read)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(in_write)
        os.close(out_read)
