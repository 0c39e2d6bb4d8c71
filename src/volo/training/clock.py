"""When a device has got how far, without making the host wait for it."""

from __future__ import annotations

import time

import torch


class Mark:
    """A point in the work of a device: when it was reached, without stopping the host for it."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._time = time.perf_counter()

    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        if self._event is None:
            return self._time - earlier._time
        assert earlier._event is not None
        return earlier._event.elapsed_time(self._event) / 1e3
