"""Settings of the process that a training borrows, and signals that end it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from volo.training.loop import train
from volo.training.settings import Interrupted, StopSignals

SHORT = {"schedule.epochs": 0.5, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}


def test_what_was_set_is_put_back(tiny, tmp_path) -> None:
    def state() -> list:
        return [
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            {k: v for k, v in os.environ.items() if not k.startswith("KMP_")},  # OpenMP's own
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
            threading.active_count(),
        ]

    before = state()
    train(tiny(SHORT | {"train.threads": 2}), tmp_path / "run")
    assert state() == before


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_the_allocator_of_the_process_is_left_alone(tiny, tmp_path) -> None:
    """A large block is mapped from the system before and after; the command line alone keeps what is freed."""
    script = """
import ctypes, json, sys
from volo.config import recipe_from_dict
from volo.training.loop import train
from volo.training.settings import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]

def is_mapped():
    before = libc.mallinfo2().hblks
    block = libc.malloc(ctypes.c_size_t(1 << 28))
    mapped = libc.mallinfo2().hblks > before
    libc.free(block)
    return mapped

found = [is_mapped()]
train(recipe_from_dict(json.loads(sys.argv[1])), sys.argv[2])
found.append(is_mapped())
keep_freed_memory()
print(found, is_mapped())
"""
    words = [sys.executable, "-c", script, json.dumps(tiny(SHORT).to_dict()), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "[True, True] False\n"


@pytest.mark.timeout(20)
def test_a_wait_ends_soon_after_a_signal() -> None:
    with StopSignals(patience=0.2) as signals:
        with signals.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
        start = time.monotonic()
        while time.monotonic() < start + 0.5:  # a step, which is finished whatever it takes
            pass
        with pytest.raises(Interrupted), signals.waiting():
            time.sleep(15)
        assert time.monotonic() < start + 2


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A shell has the programs that it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(patience=1.0) as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received == 0
            signal.raise_signal(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
