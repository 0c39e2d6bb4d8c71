"""What a training changes in the process that it runs in, and puts back at its end: switches of torch, generators,
signals. What cannot be put back, `keep_freed_memory`, is for programs that do nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from volo.config import TrainConfig
from volo.data.keyed import own_random_state


@contextlib.contextmanager
def torch_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """torch's global switches as the recipe wants them, and back, its generators of random numbers included."""
    threads = torch.get_num_threads()
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    cublas = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic and device.type == "cuda" and cublas is None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    # A debugging aid that would write every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        with own_random_state(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if cublas is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


class Interrupted(Exception):
    """A signal to stop came while something was waited for, which is given up."""


class StopSignals:
    """While active, the first SIGINT or SIGTERM is noted in `received`; the next one acts as it would without us.

    What is done inside `waiting()` gets `patience` seconds after the first signal, then `Interrupted` is raised there: a
    batch may never come. A signal that the process was started to ignore (as a shell does with SIGINT for what it runs in
    the background) stays ignored.
    """

    def __init__(self, patience: float) -> None:
        self.patience, self.received = patience, 0
        self._previous: dict[int, Any] = {}
        self._is_waiting = self._is_nudge = False
        self._is_over = threading.Event()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def waiting(self, may_be_left: bool = True) -> Iterator[None]:
        self._is_waiting = may_be_left
        try:
            yield
        finally:
            self._is_waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_nudge:
            self._is_nudge = False
            if self._is_waiting:
                raise Interrupted
        elif self.received:
            self.__exit__()
            signal.raise_signal(number)
        else:
            self.received = number
            threading.Thread(target=self._nudge, args=(number,), daemon=True).start()

    def _nudge(self, number: int) -> None:
        """Come back to `_note` in the main thread, whatever call it is blocked in, until it is over."""
        while not self._is_over.wait(self.patience):
            self._is_nudge = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)


def keep_freed_memory() -> None:
    """Let glibc keep freed activations for the next step instead of returning them to the system, from now on.

    By default every large tensor is mapped and zeroed anew, page by page, which costs small models up to a third of a
    training step on a CPU, and a network of many depthwise convolutions half of its inference. It cannot be undone, so
    the command line calls this and `train` does not. Elsewhere than on glibc there is no mallopt, and nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 64 * 2**20)
