"""How OpenMP's threads should wait: images/s of training alone and beside another process, for each setting.

    python benchmarks/busy_machine.py --out benchmarks/results/busy_machine.json

Each figure is the median step of a process of its own, whose environment has the setting (OpenMP reads it once); settings take
turns, alone and beside a process that keeps one core busy. The steps are those of the recipe `photos` (volo_nano, 64 images of
96 px; AdamW in place of Muon, averaged weights left out), without the reading of images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from beside import in_turns, keep, summarise

SETTINGS: dict[str, dict[str, str]] = {
    "GOMP_SPINCOUNT=1500 (volo's command line)": {"GOMP_SPINCOUNT": "1500"},
    "as OpenMP has it": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def steps(seconds: float, size: int, batch_size: int) -> None:
    """Train for so long and print images/s of the median step."""
    import torch

    import volo
    from volo.models.fuse import use_training_kernels
    from volo.training.settings import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    model = volo.create_model("volo_nano", num_classes=10, img_size=size, pool="concat").train()
    use_training_kernels(model)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % 10
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 8:
        begun = time.perf_counter()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    print(batch_size / statistics.median(times[3:]))


def measure(setting: dict[str, str], options: argparse.Namespace) -> float:
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in waiting} | setting
    command = [
        sys.executable,
        __file__,
        "--child",
        "--seconds",
        str(options.seconds),
        "--img-size",
        str(options.img_size),
    ]
    command += ["--batch-size", str(options.batch_size)]
    return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        steps(options.seconds, options.img_size, options.batch_size)
        return
    results = summarise(in_turns(SETTINGS, lambda name: measure(SETTINGS[name], options), options.rounds))
    if options.out is not None:
        what = "images/s of a training step of the recipe photos, by how OpenMP's threads wait"
        about = {"img_size": options.img_size, "rounds": options.rounds}
        keep(options.out, what, "busy_machine.py", {**about, "settings": results})


if __name__ == "__main__":
    main()
