"""How everything here is timed: candidates in turns, in one process, medians and quartiles, ratios turn by turn."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from volo import __version__
from volo.ops.linear import PackedWeight
from volo.training.clock import Mark


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these lies the middle half of the rounds."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return first, third


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Run every candidate once a round, in turns, so that a busy moment of the machine hits all of them alike.

    Time is that of the device: of a GPU by its events, from an idle device on, so that launches count where they are what is
    waited for; else of the wall. `clock` gives other seconds, for example of the processor (`time.process_time`).
    """
    device = device or torch.device("cpu")

    def seconds_of(run: Callable[[], object]) -> float:
        if clock is not None:
            began = clock()
            run()
            return clock() - began
        start = Mark(device)
        run()
        end = Mark(device)
        end.wait()
        return end.seconds_since(start)

    for _ in range(warmup):
        for run in candidates.values():
            run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(seconds_of(run))
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def captured(run: Callable[[], object], device: torch.device, warmup: int = 3) -> Callable[[], object]:
    """`run` as a CUDA graph, which the host launches by one call; on another device `run` itself.

    Its inputs are those tensors for ever, and what it computes stays in the graph's memory.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # chooses algorithms, and makes what is made once
        for _ in range(warmup):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def speedup(ours: Timing, peer: Timing) -> float:
    """How many times as fast as `peer` we are: the median over rounds of the ratio within a round."""
    return statistics.median(p / o for o, p in zip(ours.seconds, peer.seconds))


def copy_bandwidth(device: torch.device, rounds: int = 7) -> float:
    """Bytes per second, read plus written, of a copy that is larger than any cache."""
    source = torch.rand(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    timing = alternate({"copy": lambda: target.copy_(source)}, rounds=rounds, device=device)["copy"]
    return 2 * source.nbytes / timing.median


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating point operations per second (a multiply-add is two) of a large square matrix product at its best.

    On a CPU PyTorch multiplies float32 by MKL, and the Linear layers here by oneDNN where that is faster. A fraction of
    the slower of the two could exceed one, so the faster counts, in its fastest round.
    """
    side = 8192 if device.type == "cuda" else 2048
    small = torch.ones(256, 256, device=device, dtype=dtype)
    seconds = min(timeit.repeat(lambda: small @ small, number=1, repeat=3))
    # What a processor has to emulate (bfloat16 on AVX2) is a hundred times slower, and a smaller product tells as much.
    while device.type == "cpu" and side > 256 and seconds * (side / 256) ** 3 > 2:
        side //= 2
    # A GPU multiplies ones or zeros faster, since less switches in it.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    candidates: dict[str, Callable[[], object]] = {"PyTorch": lambda: a @ b}
    packed = PackedWeight()
    with torch.no_grad():
        if packed.serves(a, b):
            candidates["oneDNN"] = lambda: packed.multiply(a, b, None, gelu=False)
        timings = alternate(candidates, rounds=rounds, warmup=1, device=device)
    return 2 * side**3 / min(min(timing.seconds) for timing in timings.values())


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch holds at the peak of `run` beyond what it held before, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def setting(device: torch.device) -> dict[str, Any]:
    """Where a measurement was made: goes into every result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "volo": __version__,
        "timm": _version_of_timm(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _version_of_timm() -> str:
    try:
        return importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
