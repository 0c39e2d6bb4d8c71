"""`volo.export`: write a model for another runtime, load it back there, compare, and only then let the file appear."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import io
import itertools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from volo import __version__
from volo.config import DataConfig, Size, nearest
from volo.data.transforms import height_width
from volo.deploy import check
from volo.deploy.accuracy import Feed, Int8, Judge, as_arrays, find_images, images_at
from volo.deploy.formats import aoti, coreml, executorch, litert
from volo.deploy.program import DTYPES, InDtype, Shape, WithPreprocessing, WithTokens, at_size, make_program, prepare
from volo.deploy.quantize import WAYS, Dynamic, Nncf, Static, Way
from volo.inference.exported import (
    FORMAT,
    FORMATS,
    KEY,
    ExportedModel,
    named_outputs,
    onnx_session,
    open_exported,
    openvino_session,
    require,
)
from volo.inference.model_source import LoadedModel, load
from volo.models.volo import VOLO

Format = Literal["onnx", "openvino", "torch", "html", "aoti", "executorch", "coreml", "litert"]
Dtype = Literal["fp32", "fp16", "bf16", "int8"]
_PACKAGE = "Manifest.json"
"""What lies in a folder that is a file of Core ML."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Kind:
    """A format: how its files end, what writes and runs them, and in which types."""

    ending: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    extra: str = "deploy"
    """What installs the packages."""
    is_fixed: bool = False
    """A file has one batch size and one image size."""


KINDS = {
    "onnx": Kind(".onnx", ("onnx", "onnxscript", "onnxruntime"), ("fp32", "fp16", "int8")),
    "openvino": Kind(".xml", ("onnx", "onnxscript", "openvino"), ("fp32", "fp16", "bf16", "int8")),
    "torch": Kind(".pt2", (), ("fp32", "fp16", "bf16")),
    "html": Kind(".html", ("onnx", "onnxscript", "onnxruntime"), ("fp32", "int8")),
    "aoti": Kind(".aoti.pt2", (), ("fp32", "bf16")),
    "executorch": Kind(".pte", ("executorch",), ("fp32",), "executorch", is_fixed=True),
    "coreml": Kind(".mlpackage", ("coremltools",), ("fp32", "fp16"), "coreml", is_fixed=True),
    "litert": Kind(".tflite", ("litert_torch", "ai_edge_litert"), ("fp32",), "litert", is_fixed=True),
}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the model."""

    path: Path
    """The file; the report lies beside it, under the same name and ".json"."""
    values: dict[str, Any] = field(repr=False)


def export(
    model: str | Path | LoadedModel[Any] | nn.Module,
    out: str | Path | None = None,
    *,
    format: Format = "onnx",
    dtype: Dtype = "fp32",
    dynamic: str | Sequence[str] | None = None,
    opset: int | None = None,
    img_size: Size | None = None,
    in_chans: int = 3,
    batch_size: int = 1,
    with_preprocessing: bool = False,
    data: str | Path | None = None,
    int8: Way | None = None,
    max_drop: float = 1.0,
    max_changed: float | None = None,
    licence: str = "",
    overwrite: bool = False,
    web_runtime: str | Path | None = None,
    on_note: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write `model` as a file that another runtime runs, after it has given the model's answers there.

    Args:
        model: a run folder, checkpoint, published weights or weight file, as `volo predict` takes it; what `volo.load` gave; or
            a module that maps images [B, in_chans, H, W] to logits, or to a tuple or dict of tensors, with `img_size`. Timm's
            VOLO and what is built on it becomes portable by itself (`volo.fuse`).
        out: the file; by default the model's name with the ending of the format, in this folder.
        format: "onnx" (.onnx), "openvino" (.xml with .bin), "torch" (.pt2, an ExportedProgram), "html", a page that
            classifies images in the browser, "aoti" (.aoti.pt2, native code for this processor), "executorch" (.pte),
            "coreml" (.mlpackage) or "litert" (.tflite).
        dtype: what it computes in; inputs and outputs stay float32. "int8" needs real images: `data`, or those of the run.
        dynamic: what one file leaves open: "batch", "size" (height and width, multiples of the model's), both, or nothing; as a
            sequence, or as the command line has it ("batch,size", "none"). If None the batch, and nothing in formats whose
            shapes are fixed: ExecuTorch, Core ML, LiteRT.
        opset: of ONNX, 17 to 23; 20 if None.
        img_size: another size than the model was made for.
        in_chans: channels of the images that a module takes.
        batch_size: of a file whose batch is fixed.
        with_preprocessing: uint8 pixels [B, H, W, 3] of any size in, probabilities out; classifiers only.
        data: images to compare on, a folder, file or glob; for int8 some calibrate and the others judge, by their classes
            where they lie in folders named like these. None: for int8 the training and held-out images of a run, otherwise
            made ones.
        int8: how a file becomes int8: "dynamic", "static" or "symmetric" (`volo.deploy.quantize`); None: the first that
            the format has.
        max_drop: of int8: percent of the accuracy, or without labels of the answers, that may be lost; layers are left in
            floating point until that holds (`volo.deploy.accuracy`).
        max_changed: of int8: percent of the answers, right or wrong, that may differ from the model's; held as `max_drop` is.
            None: any, as long as the accuracy holds.
        licence: of the weights, kept inside the file.
        overwrite: replace a file that is there.
        web_runtime: of a page, the folder of ONNX Runtime Web; by default that of an installed npm package.
        on_note: hears what is being found out about int8.

    Returns:
        The report, which lies beside the file as JSON.

    Raises:
        ValueError: options that do not fit, a model that cannot be exported so, and MismatchError where the file gives
            other answers than the model. Then there is no file.
        ModuleNotFoundError: the format's packages are missing; the message says what to install.
        OSError: the folder cannot be written to, or is full. Then there is no file.
    """
    if isinstance(dynamic, str):  # as on the command line
        dynamic = () if dynamic == "none" else tuple(dynamic.split(","))
    kind = _check(format, dtype, dynamic or (), opset, batch_size, with_preprocessing, int8, max_drop, max_changed)
    if dynamic is None:
        dynamic = () if kind.is_fixed else ("batch",)
    free = frozenset(dynamic)
    if format == "html":
        from volo.deploy.html import find_web_runtime

        web_runtime, with_preprocessing = find_web_runtime(web_runtime), True
    loaded, outputs = _load(model, img_size, in_chans)
    if dtype == "int8" and (in_chans != 3 or (outputs != ("logits",) and not loaded.classes)):
        raise ValueError(
            f"int8 is calibrated on RGB images and judged by the classes in the first output; this module takes {in_chans} "
            f"channels and gives {', '.join(outputs)}"
        )
    target = _target(model, out, kind, overwrite)
    if with_preprocessing:
        if outputs != ("logits",) or in_chans != 3:
            raise ValueError(
                f"preprocessing goes into the files of classifiers of RGB images; this module takes {in_chans} channels and "
                f"gives {', '.join(outputs)}"
            )
        if loaded.task != "classify":
            raise ValueError(
                "preprocessing goes into the files of classifiers; a segmentation model sees windows of images, and one of task "
                "'table' gives no probabilities"
            )
        free -= {"size"}
    with _scratch(target.parent):  # what cannot be written is said before the work
        pass
    multiple = _multiple(loaded.model)
    height, width = height_width(loaded.preprocessing.img_size)
    real = None
    if data is not None and dtype != "int8":
        images = images_at(loaded, data).few(check.MAX_IMAGES)
        real = Feed(images, loaded.preprocessing, batch_size, "batch" not in free, with_preprocessing)

    source: nn.Module = loaded.model
    if format == "html" and isinstance(source, VOLO) and isinstance(source.aux_head, nn.Linear):
        source, outputs = WithTokens(source), ("probabilities", "tokens")
    elif with_preprocessing:
        outputs = ("probabilities",)
    # Inductor has fast code for unfold and fold; other runtimes lack fold.
    module: nn.Module = prepare(source, portable=format != "aoti")
    if kind.is_fixed:
        module = at_size(module, height, width)
    # OpenVINO and Core ML change the type while they write the file.
    computes = DTYPES.get(dtype, torch.float32) if format not in ("openvino", "coreml") else torch.float32
    if computes != torch.float32:
        module = InDtype(module, computes)
    if with_preprocessing:
        module = WithPreprocessing(module, loaded.preprocessing)
    guarded = None
    if dtype == "int8":
        fixed = None if "batch" in free else batch_size
        guarded = _int8(loaded, module, data, fixed, int8 or WAYS[format][0], max_drop, max_changed, on_note)
    shape = Shape(height, width, batch_size, free, multiple, in_chans)
    program = make_program(module, shape, pixels=with_preprocessing)
    names = ("pixels" if with_preprocessing else "images", *outputs)
    description = {
        "format": FORMAT,
        "volo": __version__,
        "task": loaded.task,
        "classes": list(loaded.classes),
        "wnids": list(loaded.wnids),
        "colours": loaded.colours if loaded.task == "segment" else [],
        **({"object_value": loaded.object_value} if loaded.task == "segment" else {}),
        "targets": loaded.extras.get("targets", []),
        **({"number_loss": loaded.number_loss} if loaded.task == "table" else {}),
        "preprocessing": {
            name: getattr(loaded.preprocessing, name)
            for name in ("img_size", "crop_pct", "interpolation", "mean", "std")
        },
        "origin": loaded.origin,
        "licence": licence or ("Apache-2.0" if loaded.tag else "not stated"),
        "dtype": dtype,
        "takes": names[0],
        "gives": names[1],
        "outputs": list(outputs),
        "in_chans": in_chans,
        "batch": None if "batch" in free else batch_size,
        "size": None if "size" in free or with_preprocessing else [height, width],
    }

    values: dict[str, Any] = {"file": target.name, "export": format, "description": description}
    # A folder of its own beside the target: what a failure leaves is one thing to remove, and renaming stays in one disk.
    with _scratch(target.parent) as folder:
        written = folder / target.name
        writers: dict[str, Callable[..., dict[str, Any]]] = {
            "onnx": _write_onnx,
            "openvino": _write_openvino,
            "torch": _write_program,
            "html": partial(_write_html, runtime=web_runtime),
            "aoti": aoti.write,
            "executorch": executorch.write,
            "coreml": coreml.write,
            "litert": litert.write,
        }
        values |= writers[format](
            program,
            written,
            names,
            description,
            dtype=dtype,
            opset=opset,
            int8=guarded,
        )
        if format == "coreml":
            exported = coreml.replay(written)
        else:  # a page is checked by the model inside it
            exported = open_exported(written.with_suffix(".onnx") if format == "html" else written, trust=True)
        if guarded is not None:
            values["int8"] |= guarded.confirm(exported)
        values |= _compare(dataclasses.replace(loaded, model=source), exported, dtype, shape, real, guarded)
        if "not_run" in values:
            del values["milliseconds"]  # not those of the runtime
        values["bytes"] = sum(_bytes(folder / path.name) for path in _files(target) if path.suffix != ".json")
        values["versions"] = {name: importlib.metadata.version(name) for name in ("torch", *kind.packages)}
        report = folder / f"{target.name}.json"
        report.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _publish(folder, target)
    return ExportReport(target, values)


def _check(
    format: str,
    dtype: str,
    dynamic: Sequence[str],
    opset: int | None,
    batch_size: int,
    pixels: bool,
    int8: str | None,
    max_drop: float,
    max_changed: float | None,
) -> Kind:
    """Everything that can be wrong before a model is loaded."""
    if format not in KINDS:
        raise ValueError(f"no format {format!r}{nearest(format, KINDS)} (formats: {', '.join(KINDS)})")
    kind = KINDS[format]
    if dtype not in kind.dtypes:
        raise ValueError(f"{format} files are written in {', '.join(kind.dtypes)}; given: {dtype!r}")
    unknown = [name for name in dynamic if name not in ("batch", "size")]
    if unknown:
        raise ValueError(f"dynamic is batch, size, both or nothing; given: {unknown[0]!r}")
    if kind.is_fixed and (dynamic or pixels):
        given = "preprocessing, which takes images of any size" if pixels else f"dynamic {', '.join(dynamic)}"
        raise ValueError(
            f"files of {format} have one batch size and one image size; given: {given}. Leave that out, and choose with "
            "--batch-size (batch_size) and --img-size (img_size)"
        )
    for package in kind.packages:
        require(package, kind.extra)
    if format == "aoti":
        aoti.require_compiler()
    if opset is not None:
        from volo.deploy.onnx_file import OPSETS

        if format != "onnx" or opset not in OPSETS:
            raise ValueError(f"opset is for ONNX files, from {OPSETS[0]} to {OPSETS[-1]}; given: {opset} for {format}")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; given: {batch_size}")
    if int8 is not None and dtype != "int8":
        raise ValueError(f"int8={int8!r} says how a file becomes int8, and dtype is {dtype!r}: add --dtype int8")
    if int8 is not None and int8 not in WAYS[format]:
        raise ValueError(f"{format} files become int8 by {', '.join(WAYS[format])}; given: {int8!r}")
    if not 0 <= max_drop <= 100:
        raise ValueError(f"max_drop is a percentage, from 0 to 100; given: {max_drop}")
    if max_changed is not None and dtype != "int8":
        raise ValueError(f"max_changed is about int8, and dtype is {dtype!r}: add --dtype int8, or leave it out")
    if max_changed is not None and not 0 <= max_changed <= 100:
        raise ValueError(f"max_changed is a percentage, from 0 to 100; given: {max_changed}")
    if dtype == "int8":
        require("onnxruntime")
        if format == "openvino":
            require("nncf", "quantize")
        if pixels and "batch" not in dynamic and batch_size > 1:
            raise ValueError(
                "int8 with preprocessing is for images of any size, one at a time: leave the batch dynamic, or its size at 1"
            )
    return kind


def _load(
    model: str | Path | LoadedModel[Any] | nn.Module, img_size: Size | None, in_chans: int
) -> tuple[LoadedModel[Any], tuple[str, ...]]:
    """The model, and the names of its outputs."""
    if isinstance(model, nn.Module):
        return _from_module(model, img_size, in_chans)
    if in_chans != 3:
        raise ValueError(f"in_chans is for modules; {getattr(model, 'origin', model)} takes images with 3 channels")
    if not isinstance(model, LoadedModel):
        if Path(model).suffix.lower() in FORMATS:
            raise ValueError(f"{model} is an exported file; export the model that it was made from")
        model = load(model, img_size=img_size)
    elif img_size is not None:
        model = dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, img_size=img_size))
    return model, ("logits",)


def _from_module(model: nn.Module, img_size: Size | None, in_chans: int) -> tuple[LoadedModel[Any], tuple[str, ...]]:
    if img_size is None:
        raise ValueError("a module does not say which images it takes: give img_size")
    name = type(model).__name__
    mode, images = model.training, torch.zeros(1, in_chans, *height_width(img_size))
    try:
        with torch.inference_mode():
            outputs = named_outputs(model.eval()(images))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} does not map images {' x '.join(map(str, images.shape))} to logits: {str(error).splitlines()[0]}. Give its "
            "img_size and in_chans; a module that takes or gives something else needs one around it that does not"
        ) from error
    finally:
        model.train(mode)
    first = next(iter(outputs.values()))
    if list(outputs) == ["logits"] and first.dim() != 2:
        raise ValueError(f"{name} does not map images [B, {in_chans}, H, W] to logits [B, classes]")
    classes = tuple(map(str, range(first.shape[1]))) if first.dim() == 2 else ()
    return LoadedModel(model, "classify", classes, DataConfig(img_size=img_size), name), tuple(outputs)


def _target(
    model: str | Path | LoadedModel[Any] | nn.Module, out: str | Path | None, kind: Kind, overwrite: bool
) -> Path:
    """Where the file goes. Raises ValueError where one is there already, or a folder, or the name has another ending."""
    if out is None:
        if isinstance(model, (nn.Module, LoadedModel)):
            raise ValueError(f"say where the file goes: out='model{kind.ending}'")
        name = Path(model).absolute().name
        out = f"{name.removesuffix('.pt').removesuffix('.safetensors')}{kind.ending}"
    target = Path(out)
    if not target.name.lower().endswith(kind.ending):
        raise ValueError(f"files of this format end in {kind.ending}; given: {target.name}")
    taken = [path for path in _files(target) if path.exists()]
    if folders := [path for path in taken if path.is_dir() and not (path / _PACKAGE).is_file()]:
        raise ValueError(f"{folders[0]} is a folder, which is never replaced; choose another name with --out")
    if taken and not overwrite:
        raise ValueError(f"{taken[0]} exists; choose another name with --out, or replace it with --overwrite")
    return target


def _files(target: Path) -> list[Path]:
    """All that an export writes, the file that names the others last."""
    weights = [target.with_suffix(".bin")] if target.suffix == ".xml" else []
    return [*weights, target.with_name(f"{target.name}.json"), target]


def _multiple(model: nn.Module) -> int:
    backbone = getattr(model, "backbone", model)
    return getattr(getattr(backbone, "config", None), "size_multiple", 1)


class _scratch:
    """A folder that goes again, whatever happens.

    Raises OSError where none can be made, and where what went wrong inside went wrong because the disk is full: other
    libraries report that in their own words, or not before the file is read back.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent

    def __enter__(self) -> Path:
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=".volo-export-", dir=self.parent))
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot be written to ({error.strerror}); choose another place with --out",
                str(self.parent),
            ) from error
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        reason = _no_room(self.folder, error) if isinstance(error, Exception) else None
        shutil.rmtree(self.folder, ignore_errors=True)
        if reason is not None:
            raise reason from error


def _no_room(folder: Path, error: BaseException | None) -> OSError | None:
    """Why nothing more can be written to `folder`, if that is so."""
    full: OSError | None = None
    while error is not None and full is None:
        full = error if isinstance(error, OSError) and error.errno in _FULL else None
        error = error.__cause__ or error.__context__
    if full is None:
        try:
            with (folder / "room").open("wb") as file:
                file.write(bytes(2**16))
                os.fsync(file.fileno())
        except OSError as refused:
            full = refused if refused.errno in _FULL else None
    if full is None:
        return None
    free = shutil.disk_usage(folder).free / 1e6
    return OSError(
        full.errno,
        f"{full.strerror} ({free:.1f} MB free there). No file was written. Make room, or choose another place with --out",
        str(folder.parent),
    )


def _publish(folder: Path, target: Path) -> None:
    for path in _files(target):
        made = folder / path.name
        for part in _parts(made):
            with part.open("rb") as file:
                os.fsync(file.fileno())
        if path.is_dir():  # a folder does not replace another
            path.rename(folder / "earlier")
        made.replace(path)


def _parts(path: Path) -> list[Path]:
    """The files of one that may be a folder, as those of Core ML are."""
    return [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in _parts(path))


# ---- formats ----


def _write_onnx(
    program: Any, path: Path, names: tuple[str, ...], description: dict[str, Any], **how: Any
) -> dict[str, Any]:
    import onnx

    from volo.deploy import onnx_file

    model = onnx_file.to_onnx(program, how["opset"] or onnx_file.DEFAULT_OPSET, names)
    result: dict[str, Any] = {}
    if (int8 := how["int8"]) is not None:
        feed = as_arrays(int8.calibration)
        quantizer = Dynamic(model) if int8.way == "dynamic" else Static(model, feed, symmetric=int8.way == "symmetric")
        model, result["int8"] = int8.guard(quantizer, lambda made: onnx_session(made.SerializeToString())[0])
    del model.metadata_props[:]
    for key, value in {KEY: json.dumps(description, ensure_ascii=False), "licence": description["licence"]}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    model.producer_name, model.producer_version = "volo", __version__
    onnx.save(model, path)
    operators = onnx_file.operators_of(model)
    return result | {
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "largest_rank": onnx_file.largest_rank(model),
        "operators": operators,
        "not_supported": onnx_file.support(operators),
    }


def _write_html(
    program: Any,
    path: Path,
    names: tuple[str, ...],
    description: dict[str, Any],
    *,
    runtime: str | Path | None,
    **how: Any,
) -> dict[str, Any]:
    from volo.deploy.html import write_page

    model = path.with_suffix(".onnx")
    result = _write_onnx(program, model, names, description, **how)
    write_page(path, model.read_bytes(), description, Path(runtime or ""))
    return result


def _write_openvino(
    program: Any, path: Path, names: tuple[str, ...], description: dict[str, Any], **how: Any
) -> dict[str, Any]:
    import openvino

    from volo.deploy import onnx_file

    proto = onnx_file.to_onnx(program, onnx_file.DEFAULT_OPSET, names)
    model = openvino.Core().read_model(proto.SerializeToString())
    result: dict[str, Any] = {}
    if (int8 := how["int8"]) is not None:
        quantizer = Nncf(proto, model, as_arrays(int8.calibration))
        model, result["int8"] = int8.guard(quantizer, lambda made: openvino_session(made, "int8"))
    model.set_rt_info(json.dumps(description, ensure_ascii=False), KEY)
    openvino.save_model(model, path, compress_to_fp16=how["dtype"] == "fp16")
    return result


def _write_program(
    program: Any, path: Path, names: tuple[str, ...], description: dict[str, Any], **how: Any
) -> dict[str, Any]:
    content = io.BytesIO()  # where PyTorch's own writer meets a full disk, it ends the process
    with warnings.catch_warnings():
        # Said of weights that are views of others; they are on the CPU, and the file is compared with the model.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, content, extra_files={f"{KEY}.json": json.dumps(description, ensure_ascii=False)})
    path.write_bytes(content.getbuffer())
    return {"operators": sorted({str(node.target) for node in program.graph.nodes if node.op == "call_function"})}


# ---- the check ----


def _int8(
    loaded: LoadedModel[Any],
    module: nn.Module,
    data: str | Path | None,
    batch_size: int | None,
    way: Way,
    max_drop: float,
    max_changed: float | None,
    on_note: Callable[[str], None] | None,
) -> Int8:
    """Images, and what `module` says of those that judge. `batch_size`: of a file whose batch is fixed."""
    calibration, judged = (
        Feed(
            images, loaded.preprocessing, batch_size or 8, batch_size is not None, isinstance(module, WithPreprocessing)
        )
        for images in find_images(loaded, data)
    )
    targets = loaded.targets if loaded.task == "table" else None
    judge = Judge.of(module, judged, max_drop, max_changed, targets)
    return Int8(way, calibration, judge, on_note or (lambda text: None))


def _compare(
    loaded: LoadedModel[Any],
    exported: ExportedModel,
    dtype: str,
    shape: Shape,
    real: Feed | None,
    int8: Int8 | None,
) -> dict[str, Any]:
    """How close the file comes. For int8 this only describes: `Int8` has decided."""
    model = loaded.model.cpu().eval()
    feed = real if int8 is None else int8.judge.feed
    what = (
        int8.judge.feed.images.what
        if int8 is not None
        else f"{len(real.images.numbers)} images"
        if real
        else "made images"
    )
    shown = (
        None if feed is None else list(itertools.islice(feed, check.MAX_IMAGES // min(feed.batch, check.MAX_IMAGES)))
    )
    if exported.takes_pixels:
        height, width = height_width(loaded.preprocessing.img_size)
        sizes = [(height, width), (2 * height + 1, 3 * width), (height // 2 + 3, width)]
        pictures: Iterable[torch.Tensor] = (check.made_pixels(*size, seed=i) for i, size in enumerate(sizes))
        if shown is not None:
            pictures = shown
        tolerance = {"fp32": check.PROBABILITY_TOLERANCE, "int8": 1.0}.get(dtype, 0.1)
        return {
            "compared_on": what,
            "compared": [check.compare_pixels(model, exported, loaded.preprocessing, pictures, tolerance)],
        }
    images = torch.cat(shown) if shown else None
    batches = check.example_images(
        loaded.preprocessing, shape.free, shape.multiple, shape.batch, images, shape.channels
    )
    targets = loaded.targets if loaded.task == "table" else None
    rows = check.compare(model, exported, dtype, batches, 1.0 if dtype == "fp32" else 0.0, targets)
    first = batches[0]
    return {
        "compared_on": what,
        "compared": rows,
        "milliseconds": check.milliseconds({"model": model, "exported": exported}, first) | {"batch": len(first)},
    }
