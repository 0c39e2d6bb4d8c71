"""Exported files in their own runtimes: against our own fused model and timm eager, against what becomes of timm's VOLO in the
same runtimes, and against the models that people would pick instead. All in turns, in one process."""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from volo.bench.timing import Timing, alternate, setting, speedup
from volo.config import DataConfig, nearest
from volo.deploy.check import made_images
from volo.deploy.export import KINDS, export
from volo.deploy.quantize import Run
from volo.inference.exported import onnx_session, open_exported, openvino_session, require
from volo.inference.model_source import LoadedModel
from volo.models.factory import create_model

if TYPE_CHECKING:
    import onnx

FILES = (
    "onnx fp32", "onnx int8 dynamic", "onnx int8 static", "openvino fp32", "openvino bf16", "openvino int8",
)  # fmt: skip
OF_OTHERS = ("onnx fp32", "openvino fp32", "openvino bf16", "openvino int8")
"""What timm's models are exported to."""
CALIBRATED = 16
"""Images for int8 where none are given: with random weights only the speed says something."""


@dataclass(frozen=True)
class Published:
    """A model at 224 x 224, trained on ImageNet-1k alone."""

    top1: float
    paper: str
    timm: str
    """Its name there."""
    takes_size: bool = False
    """It is built for one size of images."""
    is_transformer: bool = True
    """NNCF treats attention and LayerNorm in ways of their own."""


PUBLISHED = {
    "volo_d1": Published(84.2, "VOLO, arXiv 2106.13112", "volo_d1_224", takes_size=True),
    "caformer_s18": Published(83.6, "MetaFormer Baselines for Vision, arXiv 2210.13452", "caformer_s18"),
    "convnext_tiny": Published(82.1, "A ConvNet for the 2020s, arXiv 2201.03545", "convnext_tiny", is_transformer=False),
    "deit3_small": Published(81.4, "DeiT III, arXiv 2204.07118", "deit3_small_patch16_224", takes_size=True),
    "swin_tiny": Published(81.3, "Swin Transformer, arXiv 2103.14030", "swin_tiny_patch4_window7_224", takes_size=True),
}  # fmt: skip
PEERS = tuple(name for name in PUBLISHED if name != "volo_d1")


def bench_deploy(
    name: str = "volo_d1",
    *,
    batch_sizes: Sequence[int] = (1, 8),
    img_size: int = 224,
    files: Sequence[str] = FILES,
    peers: Sequence[str] = PEERS,
    data: str | None = None,
    rounds: int = 9,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write `name` (random weights) in each of `files`, "FORMAT DTYPE" or "FORMAT int8 WAY", and run them beside the model,
    timm's model of that name and `peers`, exported as timm has them to `OF_OTHERS`.

    Returns a dict with a row for every candidate and batch size: milliseconds a batch (median, quartiles) by the wall clock and
    of the processor, images per second, times as fast as our fused model in float32, as timm eager, and as timm's model in the
    same runtime and type; published top-1; for files of ours their size and error relative to the largest logit. With random
    weights the error of int8 says nothing.
    """
    if device != "cpu":
        raise ValueError(f"exported files run on the CPU here; given: {device}")
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"no published figures of {peer!r}{nearest(peer, PEERS)} (peers: {', '.join(PEERS)})")
    if any("openvino int8" in what for what in (*files, *(OF_OTHERS if peers else ()))):
        require("nncf", "quantize")
    torch.manual_seed(0)
    loaded = LoadedModel(
        create_model(name, img_size=img_size).eval(), "classify", (), DataConfig(img_size=img_size), name
    )
    fused = copy.deepcopy(loaded.model).fuse_for_inference()
    models: dict[tuple[str, str], Callable[[Tensor], object]] = {(name, "volo fused fp32"): fused}
    told: dict[tuple[str, str], dict[str, Any]] = {}
    theirs = _timm_twin(name, loaded.model, img_size)
    if theirs is not None:
        models["timm " + name, "timm eager fp32"] = theirs
    with tempfile.TemporaryDirectory() as folder:
        for what in files:
            models[name, what], told[name, what] = _ours(loaded, what, Path(folder), data)
        others = {f"timm {name}": (theirs, True)} if theirs is not None else {}
        others |= {peer: (_timm(PUBLISHED[peer], img_size), PUBLISHED[peer].is_transformer) for peer in peers}
        for other, (module, is_transformer) in others.items():
            written = plain_onnx(module, img_size)
            for what in OF_OTHERS:
                if other in peers or what in files:
                    models[other, what] = open_plain(written, what, img_size, is_transformer)
        rows = [row for batch in batch_sizes for row in _rows(models, told, name, batch, img_size, rounds)]
    packages = sorted(
        {package for what in (*files, *OF_OTHERS) for package in KINDS[what.split()[0]].packages} | {"nncf"}
    )
    return {
        "what": "exported files",
        "model": name,
        "batch_sizes": list(batch_sizes),
        "img_size": img_size,
        **setting(torch.device("cpu")),
        "processor": processor(),
        "packages": dict(_versions(packages)),
        "rounds": rounds,
        "published": {peer: {"top1": its.top1, "paper": its.paper} for peer, its in PUBLISHED.items()},
        "rows": rows,
    }


def _rows(
    models: dict[tuple[str, str], Callable[[Tensor], object]],
    told: dict[tuple[str, str], dict[str, Any]],
    name: str,
    batch: int,
    img_size: int,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """One batch size: all candidates in turns, wall clock and processor time of the same calls."""
    images = torch.randn(batch, 3, img_size, img_size)
    both = alternate(
        {" | ".join(key): _run(model, images) for key, model in models.items()},
        rounds=rounds,
        clock=lambda: np.array([time.perf_counter(), time.process_time()]),  # type: ignore[arg-type, return-value]
    )
    wall, spent = (
        {key: Timing(tuple(float(t[i]) for t in both[" | ".join(key)].seconds)) for key in models}  # type: ignore[index]
        for i in (0, 1)
    )
    for key, timing in wall.items():
        model, what = key
        row: dict[str, Any] = {
            "model": model,
            "file": what,
            "batch_size": batch,
            "milliseconds": 1000 * timing.median,
            "quartiles": [1000 * t for t in timing.quartiles],
            "cpu_milliseconds": 1000 * spent[key].median,
            "images_per_second": batch / timing.median,
            "times_volo_fused": speedup(timing, wall[name, "volo fused fp32"]),
        }
        twin = f"timm {name}"
        for column, peer in (
            ("times_timm_eager", (twin, "timm eager fp32")),
            ("times_timm_same", (twin, " ".join(what.split()[:2]))),  # whatever the way to int8
        ):
            if peer in wall and model == name:
                row[column] = speedup(timing, wall[peer])
        published = PUBLISHED.get(model.removeprefix("timm "))
        if published is not None:
            row["top1"] = published.top1
        yield row | told.get(key, {})


def _ours(
    loaded: LoadedModel[Any], what: str, folder: Path, data: str | None
) -> tuple[Callable[[Tensor], object], Any]:
    """A file of `volo export`, opened, and its size and error."""
    kind, dtype, *way = what.split()
    if dtype == "int8" and data is None:
        data = str(_made_pictures(folder / "pictures", loaded.preprocessing.img_size))
    out = folder / f"{'_'.join(what.split())}{KINDS[kind].ending}"
    options: dict[str, Any] = {"int8": way[0]} if way else {}
    report = export(
        loaded,
        out,
        format=kind,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        data=data if dtype == "int8" else None,
        max_drop=100.0,
        **options,
    )
    error = max(row["relative_error"] for row in report.values["compared"])
    return open_exported(out), {"megabytes": report.values["bytes"] / 1e6, "relative_error": error}


def _made_pictures(folder: Path, img_size: Any) -> Path:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for i, image in enumerate((made_images(CALIBRATED, img_size, img_size) * 60 + 128).clamp(0, 255).byte()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def plain_onnx(model: nn.Module, img_size: int) -> onnx.ModelProto:
    """What torch.onnx.export makes of a model as it is, with a dynamic batch."""
    import logging

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    written = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 3, img_size, img_size),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        verbose=False,
    )
    assert written is not None
    return written.model_proto


def open_plain(model: onnx.ModelProto, what: str, img_size: int, is_transformer: bool) -> Callable[[Tensor], object]:
    """`model` in the runtime and type of `what`, int8 by NNCF with nothing left in floating point."""
    kind, dtype = what.split()
    content = model.SerializeToString()
    if kind == "onnx":
        return _on_arrays(onnx_session(content)[0])
    import openvino

    converted = openvino.Core().read_model(content)
    if dtype == "int8":
        import contextlib
        import io

        import nncf

        images = [image[None].numpy() for image in made_images(CALIBRATED, img_size, img_size)]
        with contextlib.redirect_stdout(io.StringIO()):  # its bars
            converted = nncf.quantize(
                converted,
                nncf.Dataset(images),
                subset_size=len(images),
                model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
            )
    return _on_arrays(openvino_session(converted, dtype))


def _on_arrays(run: Run) -> Callable[[Tensor], object]:
    return lambda images: run(images.numpy())


def _run(model: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def _timm_twin(name: str, ours: nn.Module, img_size: int) -> nn.Module | None:
    """timm's model with the same weights, if timm has it."""
    if name not in PUBLISHED:
        return None
    theirs = _timm(PUBLISHED[name], img_size)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def _timm(published: Published, img_size: int) -> nn.Module:
    import timm

    return timm.create_model(published.timm, **({"img_size": img_size} if published.takes_size else {})).eval()


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def processor() -> dict[str, Any]:
    """Who made it, and which of the instructions it has that int8 and bfloat16 are fast by; empty where nothing tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    of = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in reversed(lines) if ":" in line}
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    flags = of.get("flags", "").split()
    return {"vendor": of.get("vendor_id", ""), "instructions": [flag for flag in wanted if flag in flags]}
