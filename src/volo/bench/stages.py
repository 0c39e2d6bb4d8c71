"""Stages of a long measurement, each in a process of its own with a deadline and a file of its own.

What a stage does to itself (an exception, a crash that leaves the GPU unusable for its process, a hang) costs the others
nothing but the time it took. A stage is a function `module:function` that is called as `function(report, **arguments)`; what
it adds to its report is on the disk at once, so that what was found before it ended, however it ended, is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from volo.data.files import FolderLock, write_json

GRACE = 6.0
"""Seconds from the request to end (SIGTERM) to the end (SIGKILL)."""
LOGS = "logs"
"""Where, beside the files of the stages, lies what they print."""


@dataclass(frozen=True)
class Stage:
    """One part of a measurement."""

    name: str
    """Of its file, NAME.json."""
    what: str
    """For people."""
    run: str
    """module:function"""
    seconds: float
    """Its box: it may take as long, and is then ended."""
    least: float = 0.0
    """Earlier stages leave it so many seconds of the whole time, even if they would need them."""
    is_timed: bool = True
    """Alone on the machine. Neighbours that time nothing run at the same time."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the function: what JSON can say."""
    environment: Mapping[str, str] = field(default_factory=dict)


class Report:
    """The file of a stage: a dict with a list of `rows`, on the disk after each change."""

    def __init__(self, file: Path, content: Mapping[str, Any], deadline: float) -> None:
        """deadline: of time.time(), when the stage is ended."""
        self.file, self.deadline = file, deadline
        self.content: dict[str, Any] = {**content, "rows": []}

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def add(self, **values: Any) -> None:
        self.content |= values
        self.save()

    def add_row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    def say(self, text: str) -> None:
        """What is being done: the last line of the log is what people see."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def save(self) -> None:
        write_json(self.file, self.content)


@dataclass
class Progress:
    """How a stage is doing, for people."""

    stage: Stage
    seconds: float
    box: float
    line: str
    """The last that it said."""
    result: dict[str, Any] | None = None
    """Set once, when it has ended."""


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    *,
    seconds: float,
    head: Mapping[str, Any] | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, dict[str, Any]]:
    """Run `stages` one after the other, those that time nothing together with their neighbours of that kind, all of them
    within `seconds`. Returns the contents of their files, which lie in `folder`, by name: `status` is "completed", or says
    what happened; `seconds` is how long it took.

    A stage for which no time is left is not begun, and its status says so. `head` stands first in each file. When this
    process is interrupted (KeyboardInterrupt, SIGTERM) or fails, all processes of the stages end before it goes on; when
    it is killed, they die with it.

    Raises OSError where `folder` cannot be written to, and ValueError where another process measures into it.
    """
    end = time.monotonic() + seconds - GRACE  # by then the last one is asked to end
    results: dict[str, dict[str, Any]] = {}
    groups = [list(group) for _, group in itertools.groupby(enumerate(stages), lambda item: item[1].is_timed and item)]
    with FolderLock(folder, "measuring"), _sigterm_interrupts():
        (folder / LOGS).mkdir(exist_ok=True)
        for i, group in enumerate(groups):
            kept = sum(stage.least for later in groups[i + 1 :] for _, stage in later)
            running: list[_Running] = []
            try:
                for _, stage in group:
                    content = {"what": f"GPU: {stage.what}", "stage": stage.name, **(head or {})}
                    box = min(stage.seconds, end - kept - time.monotonic())
                    if box < 1:
                        results[stage.name] = content | {"status": "not begun: no time was left", "rows": []}
                        write_json(folder / f"{stage.name}.json", results[stage.name])
                        tell(Progress(stage, 0.0, 0.0, "", results[stage.name]))
                    else:
                        running.append(_Running(stage, folder, content, box))
                while running:
                    time.sleep(0.1)
                    for its in running[:]:
                        if its.has_ended():
                            results[its.stage.name] = its.result()
                            running.remove(its)
                        tell(its.progress(results.get(its.stage.name)))
            finally:
                for its in running:
                    its.ask_to_end()
                for its in running:
                    its.end()
                    its.result()
    return results


class _Running:
    """A stage that has begun: a process that leads a session, with all that it starts."""

    def __init__(self, stage: Stage, folder: Path, content: dict[str, Any], box: float) -> None:
        self.stage, self.box = stage, box
        self.file, self.log = folder / f"{stage.name}.json", folder / LOGS / f"{stage.name}.log"
        write_json(self.file, content | {"status": "begun", "rows": []})
        self.started, self.ended = time.monotonic(), 0.0
        self.was_asked = self.was_over = False
        told = {
            "run": stage.run,
            "file": str(self.file),
            "content": content,
            "deadline": time.time() + box,
            "arguments": dict(stage.arguments),
            "parent": os.getpid(),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "volo.bench.stages", json.dumps(told)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
                start_new_session=True,  # Ctrl-C is for us, and all its processes can be ended together
            )

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    def has_ended(self) -> bool:
        if self.process.poll() is None:
            if self.seconds > self.box + GRACE:
                self.end()
            elif self.seconds > self.box and not self.was_asked:
                self.was_over = True
                self.ask_to_end()
            if self.process.poll() is None:
                return False
        self.end()
        return True

    def ask_to_end(self) -> None:
        self.was_asked = True
        self._signal(signal.SIGTERM)

    def end(self) -> None:
        """Wait a moment for a process that was asked to end, then end it and all that it has started."""
        if self.was_asked and not self.was_over:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver: there is nothing more to be done
            self.process.wait(5)
        self.ended = self.ended or time.monotonic()

    def result(self) -> dict[str, Any]:
        """The content of the file, completed by how the stage has ended."""
        content = json.loads(self.file.read_text(encoding="utf-8"))
        code = self.process.returncode
        if content["status"] == "begun":  # it had no time to say how it went
            if self.was_over:
                content["status"] = f"ended after its {self.box:.0f} seconds"
            elif self.was_asked:
                content["status"] = "interrupted"
            elif code is None:
                content["status"] = "does not end"
            elif code < 0:
                content["status"] = f"ended by {signal.Signals(-code).name}"
            else:
                content["status"] = f"ended with exit code {code}"
        content["seconds"] = round(self.seconds, 1)
        if content["status"] != "completed":
            content["log"] = _tail(self.log, 4000)
        write_json(self.file, content)
        return content

    def progress(self, result: dict[str, Any] | None) -> Progress:
        lines = _tail(self.log, 300).strip().splitlines()
        return Progress(self.stage, self.seconds, self.box, lines[-1] if lines else "", result)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, by which machines end programs, becomes SystemExit: what was begun is ended first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tail(path: Path, most: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most))
        return file.read().decode(errors="replace")


# ---- in the process of a stage ----


def die_with(parent: int) -> None:
    """End this process when `parent`, which has started it, ends, however that happens (on Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _main(told: dict[str, Any], log: IO[str]) -> int:
    die_with(told["parent"])
    report = Report(Path(told["file"]), told["content"] | {"status": "begun"}, told["deadline"])
    module, _, function = told["run"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(report, **told["arguments"])
    except Exception as error:  # noqa: BLE001
        traceback.print_exc(file=log)
        report.add(status=f"failed: {type(error).__name__}: {error}"[:1000])
        return 1
    report.add(status=report.content["status"] if report.content["status"] != "begun" else "completed")
    return 0


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1]), sys.stderr))
