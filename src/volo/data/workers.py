"""Processes that make batches: one runner for all loaders, whose waits all have an end.

Answers come in the order of the requests, as tensors in shared memory; where there is too little of that (containers have
64 MB unless told otherwise) they come through a pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

AHEAD = 2
"""Requests that each worker has at hand."""


def run(
    function: Callable[[Any], Any],
    requests: Iterable[Any],
    *,
    num_workers: int,
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> Generator[Any, None, None]:
    """`function(request)` for every request, in order, from `num_workers` processes (0: this one).

    What the function raises is raised here. Raises ChildProcessError where workers cannot be started or end by themselves,
    and TimeoutError where an answer takes more than `timeout` seconds (0: no end). Signals end the wait for an answer as
    soon as their handlers raise.
    """
    if not num_workers:
        for request in requests:
            yield _pinned(function(request), pin_memory)
        return
    workers: list[_Worker] = []
    try:
        with _signals_held_back():
            for _ in range(num_workers):
                workers.append(_Worker(function))
        waiting, sent = iter(requests), 0
        for number in itertools.count():
            while sent < number + AHEAD * num_workers and (request := next(waiting, _END)) is not _END:
                workers[sent % num_workers].ask(request)
                sent += 1
            if number == sent:
                break
            yield _pinned(workers[number % num_workers].answer(timeout, num_workers), pin_memory)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


_END = object()


def _pinned(answer: Any, pin_memory: bool) -> Any:
    return _each(answer, Tensor, Tensor.pin_memory) if pin_memory else answer


class _Worker:
    """A process that answers requests one after the other."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        # Forked workers share the images in memory; elsewhere torch moves tensors into shared memory.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.connection, its = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, its, _WorkerStart(os.getpid())), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise ChildProcessError(f"no worker for the data can be started ({error}); {_LESS}") from error
        # With our copy closed, and none in the workers that follow, the end of this one ends a wait for it.
        its.close()

    def ask(self, request: Any) -> None:
        # An error here shows when the answer is waited for.
        with contextlib.suppress(OSError):
            self.connection.send(request)

    def answer(self, timeout: float, num_workers: int) -> Any:
        end = time.monotonic() + timeout if timeout else None
        try:
            while not self.connection.poll(1.0):
                if end is not None and time.monotonic() > end:
                    raise TimeoutError(
                        f"no batch has come for {timeout:g} seconds: the disk or network that the images are on does not answer, or "
                        "is very slow. Wait longer with --data.timeout SECONDS, or move the images to faster storage (volo pack)"
                    )
            answer = self.connection.recv()
        except (EOFError, ConnectionError, FileNotFoundError):
            raise ChildProcessError(self._how_it_ended(num_workers)) from None
        if isinstance(answer, _Failure):
            raise answer.error
        if isinstance(answer, _Piped):
            warnings.warn(
                f"shared memory (/dev/shm) is too small for the batches of {num_workers} workers, so they take a slower way; "
                "give it more (docker run --shm-size 8g), or set --data.num_workers 0",
                stacklevel=2,
            )
            return _each(answer.content, np.ndarray, torch.from_numpy)
        return answer

    def _how_it_ended(self, num_workers: int) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            how = "was killed, most likely because memory ran out"
        elif code == -signal.SIGBUS:
            how = "has found no room in shared memory (docker run --shm-size 8g gives it more)"
        else:
            how = f"ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return f"one of {num_workers} workers for the data {how}; {_LESS}"

    def end(self) -> None:
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():  # in a read that does not come back
            self.process.kill()
            self.process.join(1)


_LESS = "use fewer of them (--data.num_workers N; 0: batches are made in the training process) or smaller batches"


@dataclass(frozen=True)
class _Failure:
    error: Exception


@dataclass(frozen=True)
class _Piped:
    """An answer whose tensors are arrays, which travel without shared memory."""

    content: Any


def _serve(function: Callable[[Any], Any], connection: Connection, start: _WorkerStart) -> None:
    start()
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = function(request)
        except Exception as error:  # noqa: BLE001  # it is raised where the answer is waited for
            if not isinstance(error, ValueError):
                error.add_note(traceback.format_exc())
            answer = _Failure(error)
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception:  # noqa: BLE001
            if isinstance(answer, _Failure):  # that cannot be sent
                connection.send(_Failure(RuntimeError(f"{type(answer.error).__name__}: {answer.error}")))
            else:  # no room in shared memory
                connection.send(_Piped(_each(answer, Tensor, Tensor.numpy)))


def _each(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """An answer with every part of that kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(part, kind, change) for name, part in value.items()}
    return tuple(_each(part, kind, change) for part in value) if type(value) is tuple else value


# SIGTERM can be told apart by its sender where this call exists (not on macOS).
_HELD_BACK = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else {signal.SIGINT}


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started inside begin with Ctrl-C and SIGTERM blocked; to this process they come when the block ends.

    Both mean "save and stop", often to the whole process group. That is for the training process to do, which ends its
    workers afterwards: one that died before would make it fail in the middle of the last step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _WorkerStart:
    """A worker uses one thread, ends when the training process says so, and with it even when that is killed."""

    parent: int

    def __call__(self) -> None:
        torch.set_num_threads(1)
        if signal.SIGTERM in _HELD_BACK:
            threading.Thread(target=self._end_when_told, daemon=True).start()
        if sys.platform == "linux":
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.parent:
                os._exit(1)

    def _end_when_told(self) -> None:
        # An exiting Python terminates its child processes and waits for them.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != self.parent:
            pass
        os._exit(0)
