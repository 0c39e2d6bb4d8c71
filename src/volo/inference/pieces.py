"""A batch divided among threads. Threads that share every operation wait for one another after each of them; with images of their
own they do not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from volo.inference.runtimes import Run

MOST = 4
"""Images in a piece: more gain nothing, and their activations leave the cache."""


class InPieces:
    """Runs a batch in pieces, one on each thread, and fewer images than there are threads by all threads together.

    Each of the two ways wants a session of its own, which is opened when it is first needed; weights lie in memory twice only
    where both are in use. Several threads may call this at once.
    """

    def __init__(self, together: Run, open_session: Callable[[bool], Run | None], threads: int) -> None:
        """
        Args:
            together: computes with all threads.
            open_session: given True, what several threads may call at once, each computing alone; given False, one like
                `together`. None: cannot be opened any more, and the one at hand does all.
            threads: how many.
        """
        self._together: Run | None = together
        self._alone: Run | None = None
        self._open = open_session
        self._threads = threads
        self._is_used = False
        self._few_in_turn = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="volo-pieces")

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        run, is_alone = self._choose(len(x))
        if not is_alone:
            return run(x)
        size = min(MOST, -(-len(x) // self._threads))
        pieces = [x[first : first + size] for first in range(0, len(x), size)]
        return [np.concatenate(of_all) for of_all in zip(*self._pool.map(run, pieces))]

    def _choose(self, count: int) -> tuple[Run, bool]:
        """The session for so many images, and whether it is one for pieces."""
        with self._lock:
            if count >= self._threads > 1:
                self._few_in_turn = 0
                if self._alone is None and (opened := self._open(True)) is not None:
                    self._alone = opened
                    if not self._is_used:
                        self._together = None
            else:
                self._few_in_turn += 1
                # What is left over of many images is not worth a session.
                if self._together is None and self._few_in_turn > 1:
                    self._together = self._open(False)
            if self._alone is not None and (count >= self._threads or self._together is None):
                return self._alone, True
            assert self._together is not None
            self._is_used = True
            return self._together, False
