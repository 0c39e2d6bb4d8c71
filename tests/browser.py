"""A real browser without a window, told what to do over a pipe (Chrome's DevTools protocol), for tests of the page.

It is taken from the PATH, or from the folder that `make browser` fills: `web` in the environment of Python, or where
VOLO_TEST_WEB says.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

WEB = Path(os.environ.get("VOLO_TEST_WEB") or Path(sys.prefix) / "web")
HINT = "run `make browser`, which needs npm, or install Chromium"
OPTIONS = [
    "--headless",
    "--no-sandbox",  # refused to root otherwise
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name leads anywhere
    "--remote-debugging-pipe",
]
# The browser reads from descriptor 3 and writes to 4.
AS_3_AND_4 = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> Path | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return Path(found)
    own = WEB / "browser" / "chromium"
    return own if own.is_file() else None


class Browser:
    """One tab. Use as a context manager; every wait ends with a TimeoutError."""

    def __init__(self, profile: Path, *options: str, timeout: float = 120.0) -> None:
        path = find_browser()
        if path is None:
            raise FileNotFoundError(f"no Chromium here: {HINT}")
        self.timeout = timeout
        self.errors: list[str] = []
        """Exceptions of the page, and what it wrote to the console as an error."""
        self.requests: list[str] = []
        """What the page asked of other addresses, those within itself left out."""
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        self._number = 0
        told, tells = os.pipe(), os.pipe()
        env = dict(os.environ)
        if path.is_relative_to(WEB):  # what it is linked to lies beside it
            env["LD_LIBRARY_PATH"] = str(path.parent / "lib")
            env["FONTCONFIG_FILE"] = str(path.parent / "fonts.conf")
        command = [str(path), *OPTIONS, f"--user-data-dir={profile}", *options, "about:blank"]
        line = [sys.executable, "-c", AS_3_AND_4, str(told[0]), str(tells[1]), *command]
        self._log = profile.with_suffix(".log").open("wb")
        self._process = subprocess.Popen(
            line, pass_fds=(told[0], tells[1]), env=env, stdout=self._log, stderr=self._log
        )
        os.close(told[0])
        os.close(tells[1])
        self._to, self._from = os.fdopen(told[1], "wb"), tells[0]
        os.set_blocking(self._from, False)
        self._unread = b""

    def __enter__(self) -> Browser:
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._to.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
        self._log.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Raises RuntimeError where the browser refuses."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        end = time.monotonic() + self.timeout
        while True:
            answer = self._read(end, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _read(self, end: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._unread:
            try:
                more = os.read(self._from, 1 << 20)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"the browser did not answer {what} within {self.timeout:g} s") from None
                time.sleep(0.005)
                continue
            if not more:
                raise RuntimeError(f"the browser has gone; it said: {Path(self._log.name).read_text(errors='replace')}")
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        if event.get("method") == "Runtime.consoleAPICalled" and values["type"] == "error":
            self.errors.append(" ".join(str(argument.get("value")) for argument in values["args"]))
        if event.get("method") == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(values["entry"]["text"])
        if event.get("method") == "Network.requestWillBeSent":
            url = values["request"]["url"]
            if not url.startswith(("data:", "blob:", "file:", "about:")):
                self.requests.append(url)

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression gives, awaited."""
        given = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in given:
            raise RuntimeError(given["exceptionDetails"]["exception"].get("description", "an exception"))
        return given["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The first value of `expression` that is true."""
        end = time.monotonic() + self.timeout
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                seen = self.evaluate("document.body.innerText")
                raise TimeoutError(f"{expression} is not true after {self.timeout:g} s; the page says: {seen}")
            time.sleep(0.02)
        return value

    def open(self, page: Path, width: int = 1280, height: int = 800, *, dark: bool = False) -> None:
        is_phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Page.navigate", url=page.as_uri())
        self.wait_for("document.readyState === 'complete'")

    def offline(self) -> None:
        self.send("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def place_of(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into sight."""
        code = f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: "center"}});
        const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()"""
        x, y = self.evaluate(code)
        return x, y

    def drop(self, files: list[Path], selector: str = "#drop") -> None:
        """Files dragged from outside and let go over an element."""
        x, y = self.place_of(selector)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, files: list[Path], selector: str = "#file") -> None:
        """What a person does in the dialogue for files."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node)

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            its = {"key": key, "code": key, "windowsVirtualKeyCode": code} | (
                {"text": text} if kind == "keyDown" else {}
            )
            self.send("Input.dispatchKeyEvent", type=kind, **its)

    def move(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.place_of(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """The whole page, as high as it is."""
        given = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(given["data"]))
