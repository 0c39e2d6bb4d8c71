"""Workers that are killed, that wait for what never comes, and that have no shared memory: every wait has an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from volo.data.workers import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes, reads /proc")


def square(request: int) -> dict[str, torch.Tensor]:
    return {"image": torch.full((100_000,), request**2), "index": torch.tensor([request])}


def children() -> list[int]:
    return [int(child) for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_answers_come_in_order(workers: int) -> None:
    before = children()
    answers = [int(answer["image"][-1]) for answer in run(square, iter(range(20)), num_workers=workers)]
    assert answers == [i**2 for i in range(20)]
    assert set(children()) <= set(before)
    assert list(run(square, [], num_workers=workers)) == []


def fails(request: int) -> int:
    if request == 3:
        raise ArithmeticError("three")
    return request


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_raises_is_raised_at_its_place(workers: int) -> None:
    answers = run(fails, range(10), num_workers=workers)
    assert [next(answers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ArithmeticError, match="three"):
        next(answers)


def slow(request: int) -> int:
    time.sleep(0.05 if request < 2 else 60)
    return request


@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGKILL, "was killed, most likely because memory"), (signal.SIGSEGV, "ended by SIGSEGV")],
)
def test_a_killed_worker_is_an_error_that_says_what_to_do(number: signal.Signals, how: str) -> None:
    before = set(children())
    answers = run(slow, range(10), num_workers=2)
    assert next(answers) == 0 and next(answers) == 1
    (victim, _) = sorted(set(children()) - before)
    threading.Timer(0.3, os.kill, (victim, number)).start()
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match=f"one of 2 workers for the data {how}.*--data.num_workers"):
        next(answers)
    assert time.monotonic() - start < 5
    assert set(children()) <= before


def test_a_source_that_stalls_ends_with_a_message() -> None:
    answers = run(slow, range(10), num_workers=2, timeout=1.0)
    assert next(answers) == 0 and next(answers) == 1
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no batch has come for 1 seconds.*--data.timeout"):
        next(answers)
    assert time.monotonic() - start < 5


class Told(Exception):
    pass


def test_a_signal_ends_the_wait() -> None:
    def tell(*_: object) -> None:
        raise Told

    before = signal.signal(signal.SIGUSR1, tell)
    try:
        answers = run(slow, range(10), num_workers=2)
        assert next(answers) == 0 and next(answers) == 1
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        start = time.monotonic()
        with pytest.raises(Told):
            next(answers)
        assert time.monotonic() - start < 5
    finally:
        signal.signal(signal.SIGUSR1, before)


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from test_workers import square
from volo.data.workers import run
print([int(a["image"][-1]) + int(a["index"]) for a in run(square, range(8), num_workers=2)])
"""


def test_little_shared_memory_is_enough() -> None:
    """As in a container: /dev/shm has room for one of the batches at most."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout.strip() == str([i**2 + i for i in range(8)]), done.stderr
    assert "docker run --shm-size" in done.stderr
