"""Exported files beside a busy process: images/s alone, and while another process keeps one core busy.

    python benchmarks/busy_export.py --out benchmarks/results/busy_export.json

Each figure is the median call of a process of its own, at batch 1; candidates take turns, alone and beside the other process.
Files run as `volo predict` runs them. To compare: ONNX Runtime as it comes, whose threads spin while they wait, and the
model itself as `volo predict` runs it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from beside import in_turns, keep, summarise

CANDIDATES = {
    "ONNX file": "model.onnx",
    "OpenVINO file": "model.xml",
    "ONNX file, ONNX Runtime's defaults": "model.onnx",
    "the model (fused)": "",
}


def run_of(candidate: str, folder: str, name: str) -> Callable[[], object]:
    """One call, at batch 1."""
    import torch

    from volo.data.transforms import height_width
    from volo.inference.exported import open_exported
    from volo.inference.model_source import load
    from volo.training.settings import keep_freed_memory

    file = Path(folder, CANDIDATES[candidate])
    if candidate.endswith("defaults"):
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (its,) = session.get_inputs()
        images = torch.randn(1, *its.shape[1:]).numpy()
        return lambda: session.run(None, {its.name: images})
    if candidate == "the model (fused)":
        keep_freed_memory()
        loaded = load(name)
        model = loaded.model.fuse_for_inference()
        size = height_width(loaded.preprocessing.img_size)
    else:
        model = open_exported(file)
        size = model.size
    x = torch.randn(1, 3, *size)

    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def calls(candidate: str, folder: str, name: str, seconds: float) -> None:
    """Call for so long and print images/s of the median call."""
    call = run_of(candidate, folder, name)
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 20:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    print(1 / statistics.median(times[5:]))


def measure(candidate: str, folder: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--child", candidate, "--folder", folder]
    command += ["--model", options.model, "--seconds", str(options.seconds)]
    env = os.environ | {"GOMP_SPINCOUNT": "1500"}  # as volo's command line sets it
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="volo_nano", help="as `volo export` takes it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        calls(options.child, options.folder, options.model, options.seconds)
        return
    from volo.deploy.export import export

    with tempfile.TemporaryDirectory() as folder:
        export(options.model, Path(folder, "model.onnx"))
        export(options.model, Path(folder, "model.xml"), format="openvino")
        results = summarise(in_turns(CANDIDATES, lambda name: measure(name, folder, options), options.rounds))
    if options.out is not None:
        what = "images/s of exported files at batch 1, alone and beside one busy process"
        about = {"model": options.model, "rounds": options.rounds}
        keep(options.out, what, "busy_export.py", {**about, "candidates": results})


if __name__ == "__main__":
    main()
