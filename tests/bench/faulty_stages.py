"""Stages that go wrong in every way that a process can; `test_stages.py` runs them in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from volo.bench.stages import Report


def works(report: Report, figure: float = 1.0) -> None:
    report.say("working")
    report.add_row({"figure": figure, "left": report.seconds_left})


def raises(report: Report) -> None:
    report.add_row({"figure": 1.0})
    raise ArithmeticError("what went wrong")


def dies(report: Report) -> None:
    report.add_row({"figure": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(report: Report) -> None:
    os._exit(3)


def hangs(report: Report, pids: str) -> None:
    """Never ends, nor does a process that it has started; neither listens to a polite request."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    report.add_row({"figure": 1.0})
    partial = Path(f"{pids}.tmp")
    partial.write_text(f"{os.getpid()} {child.pid}")
    partial.rename(pids)
    time.sleep(600)


def saves_when_asked(report: Report) -> None:
    def save(number: int, frame: object) -> None:
        report.add(saved=True, status="completed")
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    report.say("ready")
    time.sleep(600)


def sleeps(report: Report, seconds: float) -> None:
    report.add(began=time.time())
    time.sleep(seconds)
    report.add(ended=time.time())
