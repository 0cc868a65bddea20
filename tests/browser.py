"""A headless Chromium, driven through its own pipe (the DevTools protocol), so that no further package is needed."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}


class Tab:
    """One page, and what its console and its errors have said."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session
        self.said: list[str] = []
        browser.tabs[session] = self
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        return self._browser.call(method, self._session, **parameters)

    def show(self, width: int, height: int, scheme: str = "light", phone: bool = False) -> None:
        """Set the size of the window and the reader's colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        """Open `url` and wait until its script has run."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def get(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.get(expression):
            assert time.monotonic() < until, expression
            time.sleep(0.05)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """(left, top, width, height) of an element in the window, scrolled into it."""
        return tuple(
            self.get(
                f"(async () => {{ const e = document.querySelector({json.dumps(selector)}); "
                "e.scrollIntoView({block: 'center'}); "
                # Two frames, after which the page has been told that it was scrolled.
                "for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame); "
                "const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
            )
        )

    def point_at(self, selector: str, click: bool = False) -> None:
        """Move the pointer to the middle of an element, and click."""
        left, top, width, height = self.box(selector)
        place = {"x": left + width / 2, "y": top + height / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key: str) -> None:
        """Press a key: a letter, or one of KEYS."""
        text = {} if key in KEYS else {"text": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=KEYS.get(key, 0), **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, selector: str) -> Image.Image:
        """What an element looks like."""
        left, top, width, height = self.box(selector)
        time.sleep(0.05)
        shot = Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"]))).convert("RGB")
        scale = shot.width / self.get("innerWidth")
        return shot.crop(tuple(int(scale * edge) for edge in (left, top, left + width, top + height)))


class Browser:
    """The connection to a Chromium."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._rest, self._id = read, write, b"", 0
        self.tabs: dict[str, Tab] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; what a page says meanwhile goes to its tab."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if answer.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.tabs[answer["sessionId"]].said.append(json.dumps(answer["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "Chromium does not answer"
            part = os.read(self._read, 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(message))

    def tab(self) -> Tab:
        """A new page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        return Tab(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A Chromium with an empty profile in `folder`."""
    assert CHROMIUM is not None
    hears, tells = os.pipe(), os.pipe()
    # It reads commands from file descriptor 3 and writes answers to 4.
    script = f'exec "$@" 3<&{hears[0]} 4>&{tells[1]}'
    command = ["bash", "-c", script, "bash", CHROMIUM, *OPTIONS, f"--user-data-dir={folder}"]
    with open(folder.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, pass_fds=(hears[0], tells[1]), stdout=log, stderr=log)
    os.close(hears[0])
    os.close(tells[1])
    try:
        yield Browser(tells[0], hears[1])
    finally:
        process.terminate()
        process.wait(30)
        os.close(tells[0])
        os.close(hears[1])
