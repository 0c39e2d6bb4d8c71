"""What int8 costs trained models, by every way to it: `python benchmarks/quantisation.py digits=runs/digits photos=runs/photos`.

Each run folder is exported by one command's worth of options (`volo export RUN --dtype int8`), calibrated on its training
images and judged on its held-out ones. Results go to benchmarks/results/quantisation.json; those of other models there stay.
OpenVINO needs `volo[deploy,quantize]`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import volo
from volo.bench.deploy import processor
from volo.bench.timing import setting
from volo.deploy.check import MismatchError
from volo.deploy.export import KINDS
from volo.inference.model_source import load

RESULTS = Path(__file__).resolve().parent / "results" / "quantisation.json"
WAYS = {
    "ONNX Runtime, dynamic": {"format": "onnx", "int8": "dynamic"},
    "ONNX Runtime, static": {"format": "onnx", "int8": "static"},
    "ONNX Runtime, symmetric": {"format": "onnx", "int8": "symmetric", "opset": 17},
    "OpenVINO": {"format": "openvino", "int8": "static"},
}


def measure(name: str, run: str, way: str, max_drop: float, max_changed: float | None) -> dict[str, Any]:
    loaded = load(run)
    row: dict[str, Any] = {"model": name, "architecture": loaded.recipe.model.name, "task": loaded.task, "way": way}  # type: ignore[union-attr]
    if max_changed is not None:
        row["max_changed"] = max_changed
    options: dict[str, Any] = WAYS[way]
    what = Path(loaded.preprocessing.path).name or loaded.preprocessing.kind
    path = loaded.preprocessing.path or loaded.preprocessing.kind
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "model" + KINDS[options["format"]].ending)
        try:
            limits = {"max_drop": max_drop, "max_changed": max_changed}
            report = volo.export(loaded, out, dtype="int8", on_note=print, **limits, **options).values
        except MismatchError as error:
            return row | {"failed": str(error).replace(path, what)}
        plain = volo.export(loaded, Path(folder, "plain.onnx")).values
    told = report["int8"]
    figures = {key: text.replace(path, what) if isinstance(text, str) else text for key, text in told.items()}
    sizes = {"megabytes": report["bytes"] / 1e6, "megabytes_fp32": plain["bytes"] / 1e6}
    return figures | row | sizes


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["way"], row.get("max_changed"), row["machine"]["capability"]


def machine() -> dict[str, Any]:
    """Where a row was measured: what int8 costs depends on the instructions that multiply it."""
    packages = ("onnx", "onnxruntime", "openvino", "nncf")
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {**setting(torch.device("cpu")), "processor": processor(), "packages": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--max-changed", type=float, help="percent of the answers that may differ; rows of their own")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    for given in options.runs:
        name, _, run = given.partition("=")
        for way in options.ways:
            row = measure(name, run, way, options.max_drop, options.max_changed) | {"machine": machine()}
            print(json.dumps({key: value for key, value in row.items() if key not in ("tried", "machine")}), flush=True)
            rows = [r for r in rows if key_of(r) != key_of(row)] + [row]
            report = {"what": "int8 of trained models", "max_drop": options.max_drop, "rows": rows}
            RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
