"""Images/s alone, and beside a process that keeps one core busy: what `busy_machine.py` and `busy_export.py` share."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Rates = dict[str, list[float]]
"""Images/s of each round, under "alone" and "beside"."""


@contextlib.contextmanager
def a_busy_process() -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def in_turns(names: Iterable[str], measure: Callable[[str], float], rounds: int) -> dict[str, Rates]:
    """`measure(name)` for each name in turn, alone and then beside, `rounds` times."""
    found: dict[str, Rates] = {name: {"alone": [], "beside": []} for name in names}
    for _ in range(rounds):
        for name, rates in found.items():
            rates["alone"].append(measure(name))
        for name, rates in found.items():
            with a_busy_process():
                rates["beside"].append(measure(name))
    return found


def summarise(found: dict[str, Rates]) -> dict[str, dict[str, Any]]:
    """Medians of the rounds, and what they are of another: of the same alone, and of the fastest alone."""
    medians = {name: {key: statistics.median(values) for key, values in rates.items()} for name, rates in found.items()}
    best = max(median["alone"] for median in medians.values())
    results = {}
    for name, rates in found.items():
        alone, beside = medians[name]["alone"], medians[name]["beside"]
        results[name] = {
            "alone": round(alone, 1),
            "beside_one_busy_process": round(beside, 1),
            "beside_over_alone": round(beside / alone, 3),
            "alone_over_best": round(alone / best, 3),
            "all": {key: [round(value, 1) for value in values] for key, values in rates.items()},
        }
        shares = f"({alone / best:.2f} of the best)   beside {beside:7.1f} ({beside / alone:.2f})"
        print(f"{name:42} alone {alone:7.1f} {shares}")
    return results


def keep(out: Path, what: str, script: str, report: dict[str, Any]) -> None:
    """Write the results with the command and the machine that made them."""
    import torch

    from volo.bench.timing import setting
    from volo.data.files import write_atomically

    command = " ".join([f"python benchmarks/{script}", *sys.argv[1:]])
    whole = {"what": what, "command": command, **report, "setting": setting(torch.device("cpu"))}
    content = (json.dumps(whole, indent=1) + "\n").encode()
    write_atomically(out, lambda file: file.write(content))
