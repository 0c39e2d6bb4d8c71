"""`volo export`: a model as a file for another runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from volo.cli.console import megabytes, note, results
from volo.cli.options import read_size, run, set_threads


@dataclass(frozen=True)
class ExportOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt), a checkpoint, published weights such as volo_d1.224, or a weight file of timm's or the
    original's."""
    format: Annotated[str, tyro.conf.arg(metavar="onnx|openvino|torch|html|aoti|executorch|coreml|litert")] = "onnx"
    """ONNX (.onnx), OpenVINO (.xml and .bin), a program of torch.export (.pt2), a page that classifies in the browser (.html),
    native code by AOTInductor (.aoti.pt2), or for phones ExecuTorch (.pte), Core ML (.mlpackage), LiteRT (.tflite)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The file; by default the model's name in this folder. A report lies beside it: FILE.json."""
    dtype: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """What it computes in."""
    dynamic: Annotated[str | None, tyro.conf.arg(metavar="batch|size|batch,size|none")] = None
    """Dynamic axes: the batch (if left out), or height and width. Files of executorch, coreml and litert have none."""
    opset: int | None = None
    """Of ONNX, 17 (widest support) to 23; 20 if left out."""
    img_size: tuple[int, ...] | None = None
    """Another size in pixels, or height and width."""
    batch_size: int = 1
    """Batch size if the batch axis is not dynamic."""
    with_preprocessing: bool = False
    """uint8 pixels of any size in, probabilities out: resize, crop, normalisation and softmax are in the file."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Images to compare on. For int8 some of them calibrate and the others judge, in class folders by accuracy; if left out,
    the training and held-out images of the run."""
    int8: Literal["dynamic", "static", "symmetric"] | None = None
    """How a file becomes int8. dynamic: ranges are measured as it runs (ONNX, its default); static: on images (OpenVINO's);
    symmetric: the same with zero points of 0, for TensorRT."""
    max_drop: float = 1.0
    """Accuracy in percentage points (without labels: percent of the predictions) that int8 may lose. Layers are left in
    floating point, as few as suffice, until it holds."""
    max_changed: float | None = None
    """Percent of the predictions, right or wrong, that int8 may change; held in the same way. If left out, any, as long as
    the accuracy holds."""
    licence: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """Of the weights; kept inside the file."""
    overwrite: bool = False
    """Replace a file that is there."""
    web_runtime: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """For a page: the folder with ONNX Runtime Web, if not in an installed npm package."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    json: bool = False
    """Print the report instead of a summary."""


def export(options: ExportOptions) -> int:
    """Write a model as a file for another runtime. It is loaded back there and compared with the model on images; a
    file that gives other answers is not kept.

    Class names, preprocessing, origin and licence travel inside; `volo predict` and `volo evaluate` take the file as a MODEL.

    Examples:
      volo export runs/photos                                             photos.onnx, photos.onnx.json
      volo export volo_d1.224 --opset 17 --dynamic none                   for TensorRT
      volo export runs/photos --with-preprocessing --data photos/val      pixels in, probabilities out
      volo export runs/photos --format html                               photos.html: opens in any browser, no server
      volo export runs/photos --format openvino --dtype int8              calibrated and judged on the run's own images
      volo export volo_d1.224 --dtype int8 --int8 symmetric --opset 17 --data imagenet/val
      volo export runs/photos --format executorch --batch-size 1          photos.pte: for phones
    """
    from volo.deploy.export import export as run_export

    set_threads(options.threads)
    report = run_export(
        options.model,
        options.out,
        format=options.format,  # type: ignore[arg-type]
        dtype=options.dtype,
        dynamic=options.dynamic,
        opset=options.opset,
        img_size=read_size("--img-size", options.img_size),
        batch_size=options.batch_size,
        with_preprocessing=options.with_preprocessing,
        data=options.data,
        int8=options.int8,
        max_drop=options.max_drop,
        max_changed=options.max_changed,
        licence=options.licence,
        overwrite=options.overwrite,
        web_runtime=options.web_runtime,
        on_note=partial(note, style="dim"),
    )
    if options.json:
        print(json.dumps(report.values, indent=1, ensure_ascii=False))
    else:
        results().print(summary(report.path, report.values), highlight=False, markup=False, soft_wrap=True)
    for runtime, table in report.values.get("not_supported", {}).items():
        if table["missing"] and not options.json:
            note(f"{runtime} does not list {', '.join(table['missing'])} among what it supports")
    return 0


def summary(path: Path, values: dict[str, Any]) -> str:
    """A few lines for people: the file, how it compares, how fast it was."""
    rows = values["compared"]
    opset = f", opset {values['opset']}" if "opset" in values else ""
    lines = [
        f"{path}: {values['export']}, {values['description']['dtype']}{opset}, {megabytes(values['bytes'])}",
        f"compared on {values['compared_on']}: largest error {max(row['max_error'] for row in rows):.2g}, "
        f"same answer {100 * min(row['top1_agreement'] for row in rows):.1f} %",
    ]
    if "not_run" in values:
        lines.append(values["not_run"])
    if values["description"]["batch"] is not None:
        size = " x ".join(map(str, values["description"]["size"] or ["any size"]))
        lines.append(f"fixed shapes: batches of {values['description']['batch']}, images of {size}")
    if "int8" in values:
        lines += _int8(values["int8"])
    if "milliseconds" in values:
        times = values["milliseconds"]
        lines.append(
            f"a batch of {times['batch']}: {times['exported']:.1f} ms; the model itself {times['model']:.1f} ms"
        )
    return "\n".join(lines)


def _int8(told: dict[str, Any]) -> list[str]:
    after = f"{told['agreement']:.2f} % of the model's answers"
    if "top1" in told:
        after = f"top-1 {told['top1_before']:.2f} % before, {told['top1']:.2f} % after; {after}"
    kept = told["left_in_floating_point"]
    which = f", in floating point: {', '.join(kept)}" if kept else ""
    return [
        f"int8 ({told['way']}), calibrated on {told['calibrated_on']}",
        f"judged on {told['judged_on']}: {after}",
        f"{told['layers'] - len(kept)} of {told['layers']} layers in int8{which}",
    ]


main = partial(run, export)
