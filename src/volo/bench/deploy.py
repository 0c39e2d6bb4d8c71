"""Exported files in their own runtimes, against our own fused model and timm eager, in turns."""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from volo.bench.timing import alternate, setting, speedup
from volo.config import DataConfig
from volo.deploy.export import KINDS, export
from volo.inference.exported import open_exported
from volo.inference.model_source import LoadedModel
from volo.models.factory import create_model

FILES = ("onnx fp32", "onnx fp16", "openvino fp32", "openvino bf16", "torch fp32")


def bench_deploy(
    name: str = "volo_d1",
    *,
    batch_size: int = 1,
    img_size: int = 224,
    files: Sequence[str] = FILES,
    data: str | None = None,
    rounds: int = 15,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write `name` (random weights) in each of `files` ("FORMAT DTYPE"), and run them beside the model.

    Returns a dict with a row for every candidate: milliseconds a batch (median, quartiles) by the wall clock and of the
    processor, images per second, times as fast as our fused model in float32 and as timm eager, and for files their size
    and error relative to the largest logit. int8 needs `data`, a folder of images; with random weights its error says
    nothing.
    """
    if device != "cpu":
        raise ValueError(f"exported files run on the CPU here; given: {device}")
    torch.manual_seed(0)
    loaded = LoadedModel(
        create_model(name, img_size=img_size).eval(), "classify", (), DataConfig(img_size=img_size), name
    )
    images = torch.randn(batch_size, 3, img_size, img_size)
    fused = copy.deepcopy(loaded.model).fuse_for_inference()
    candidates: dict[str, Callable[[], object]] = {"volo fused fp32": _run(fused, images)}
    if (theirs := _timm_twin(name, loaded.model, img_size)) is not None:
        candidates["timm eager fp32"] = _run(theirs, images)
    told: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in files:
            kind, dtype = what.split()
            out = Path(folder, f"{kind}_{dtype}{KINDS[kind].ending}")
            report = export(loaded, out, format=kind, dtype=dtype, data=data, max_drop=100.0)  # type: ignore[arg-type]
            error = max(row["relative_error"] for row in report.values["compared"])
            told[what] = {"megabytes": report.values["bytes"] / 1e6, "relative_error": error}
            candidates[what] = _run(open_exported(out), images)
        wall = alternate(candidates, rounds=rounds)
        spent = alternate(candidates, rounds=rounds, clock=time.process_time)
    rows = []
    for candidate, timing in wall.items():
        row: dict[str, Any] = {
            "candidate": candidate,
            "milliseconds": 1000 * timing.median,
            "quartiles": [1000 * t for t in timing.quartiles],
            "cpu_milliseconds": 1000 * spent[candidate].median,
            "images_per_second": batch_size / timing.median,
            "times_volo_fused": speedup(timing, wall["volo fused fp32"]),
        }
        if "timm eager fp32" in wall:
            row["times_timm_eager"] = speedup(timing, wall["timm eager fp32"])
        rows.append(row | told.get(candidate, {}))
    packages = sorted({package for what in files for package in KINDS[what.split()[0]].packages})
    return {
        "what": "exported files",
        "model": name,
        "batch_size": batch_size,
        "img_size": img_size,
        **setting(torch.device("cpu")),
        "packages": {package: importlib.metadata.version(package) for package in packages},
        "rounds": rounds,
        "rows": rows,
    }


def _run(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def _timm_twin(name: str, ours: nn.Module, img_size: int) -> nn.Module | None:
    """timm's model with the same weights, if timm is installed and has it."""
    try:
        import timm
    except ModuleNotFoundError:
        return None
    if not timm.is_model(f"{name}_224"):
        return None
    theirs = timm.create_model(f"{name}_224", img_size=img_size).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs
