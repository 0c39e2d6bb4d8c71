"""Files of `volo export` as modules of PyTorch, each run by its own runtime: ONNX Runtime, OpenVINO, torch.export, and those
in `runtimes`.

What a file says of itself (classes, preprocessing, origin, licence) is one JSON object inside it, under the name "volo".
"""

from __future__ import annotations

import importlib.util
import io
import json
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from volo.inference.pieces import InPieces
from volo.inference.runtimes import (
    KEY,
    Run,
    holds_native_code,
    named_outputs,
    open_aoti,
    open_executorch,
    open_litert,
)

if TYPE_CHECKING:
    import openvino

FORMAT = 1
SPIN_MICROSECONDS = "30"
BOUNDED_SPINNING = (1, 32)
"""The ONNX Runtime from which on that is known to be heeded."""
NEEDS = {
    "onnx": ("onnxruntime", "deploy"),
    "openvino": ("openvino", "deploy"),
    "executorch": ("executorch", "executorch"),
    "litert": ("ai_edge_litert", "litert"),
}
"""What runs a format, beyond torch, and the extra that installs it."""
FORMATS = {
    ".onnx": "onnx",
    ".xml": "openvino",
    ".pt2": "torch",
    ".pte": "executorch",
    ".tflite": "litert",
    ".mlpackage": "coreml",
}
"""By the ending of the file; a .pt2 may be a package of AOTInductor, too."""


class ExportedModel(nn.Module):
    """`forward(images float32 [B, 3, H, W], normalised) -> logits`; of a file with its preprocessing inside,
    `forward(pixels uint8 [B, H, W, 3]) -> probabilities`. On the CPU, without gradients.

    A file with several outputs gives all of them, by name. Batches of any size: a file made for a fixed one is given so
    many images at a time.
    """

    def __init__(self, run: Run, description: dict[str, Any]) -> None:
        super().__init__()
        self._run = run
        self.description = description
        self.outputs: tuple[str, ...] = tuple(description.get("outputs") or [description["gives"]])
        self.takes_pixels: bool = description["takes"] == "pixels"
        self.batch: int | None = description["batch"]
        self.size: tuple[int, int] | None = tuple(description["size"]) if description["size"] else None  # type: ignore[assignment]
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Raises ValueError for images of another size than the file was made for."""
        if self.size is not None and not self.takes_pixels and tuple(images.shape[2:]) != self.size:
            given, made_for = (" x ".join(map(str, size)) for size in (images.shape[2:], self.size))
            raise ValueError(
                f"this file was exported for images of {made_for} pixels; given: {given}. Leave --img-size out"
            )
        x = images.cpu().numpy() if self.takes_pixels else images.float().cpu().numpy()
        if self.batch is None:
            return self._named(self._run(x))
        parts = []
        for first in range(0, len(x), self.batch):
            part = x[first : first + self.batch]
            missing = self.batch - len(part)
            if missing:
                part = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])
            parts.append([output[: self.batch - missing] for output in self._run(part)])
        return self._named([np.concatenate(of_all) for of_all in zip(*parts)])

    def _named(self, outputs: list[np.ndarray]) -> Tensor | dict[str, Tensor]:
        tensors = [torch.from_numpy(output).float() for output in outputs]
        return tensors[0] if len(self.outputs) == 1 else dict(zip(self.outputs, tensors))


def require(package: str, extra: str = "deploy") -> None:
    """Raises ModuleNotFoundError that says what to install where `package` is missing."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"this format needs {package}, which is not installed: pip install 'volo[{extra}]'")


def is_exported(path: Path) -> bool:
    """Whether `path` is there and ends like a file of `volo export`."""
    kind = FORMATS.get(path.suffix.lower())
    return path.is_dir() if kind == "coreml" else kind is not None and path.is_file()


def open_exported(path: str | Path, *, trust: bool = False) -> ExportedModel:
    """The model in an exported file.

    Args:
        trust: open packages of AOTInductor too: they hold native code, which runs when they are loaded.

    Raises FileNotFoundError; ModuleNotFoundError where its runtime is missing; ValueError for what `volo export` did not
    write, is damaged, runs on Apple's systems only, or would run code when it is loaded.
    """
    path = Path(path)
    kind = FORMATS[path.suffix.lower()]
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if kind == "coreml":
        raise ValueError(f"{path} runs in Core ML, on Apple's systems; here, use the model that it was exported from")
    if kind == "torch" and holds_native_code(path):
        kind = "aoti"
        if not trust:
            raise ValueError(
                f"{path} is a package of AOTInductor: it holds native code, which runs with all your rights when it is loaded. If "
                "you know where it comes from, open it with --trust (trust=True)"
            )
    if kind in NEEDS:
        require(*NEEDS[kind])
    run, text = {
        "onnx": _open_onnx,
        "openvino": _open_openvino,
        "torch": _open_program,
        "aoti": open_aoti,
        "executorch": open_executorch,
        "litert": open_litert,
    }[kind](path)
    try:
        description = json.loads(text)
        return ExportedModel(run, description)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say which classes and preprocessing it has; give a file that `volo export` wrote"
        ) from error


def _open_onnx(path: Path) -> tuple[Run, str]:
    try:
        return onnx_session(str(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be opened by ONNX Runtime: {error}") from error


def onnx_session(model: str | bytes) -> tuple[Run, str]:
    """What runs an ONNX file, or the bytes of one, and what it says of itself."""
    import onnxruntime

    threads, seen = torch.get_num_threads(), _stamp(model)
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2] if part.isdecimal())

    def open_session(threads: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin as long as they wait cost a busy machine many times what they save an idle one; a moment of it is
        # a gain on both (volo_nano, one image, 2 cores: 1.3 times as fast alone, 1.1 times beside a busy process).
        if version >= BOUNDED_SPINNING:
            options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
        else:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def running(session: onnxruntime.InferenceSession) -> Run:
        return lambda x: session.run(None, {session.get_inputs()[0].name: x})

    def open_again(alone: bool) -> Run | None:
        return running(open_session(1 if alone else threads)) if _stamp(model) == seen else None

    session = open_session(threads)
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    takes_any_batch = not isinstance(session.get_inputs()[0].shape[0], int)
    run = running(session)
    return InPieces(run, open_again, threads) if threads > 1 and takes_any_batch else run, text


def _stamp(model: str | bytes) -> tuple[int, ...] | None:
    """Of a file: changes where another one takes its place."""
    try:
        stat = Path(model).stat() if isinstance(model, str) else None
    except OSError:
        return None
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else (0,)


def _open_openvino(path: Path) -> tuple[Run, str]:
    import openvino

    try:
        model = openvino.Core().read_model(path)
        text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else ""
        dtype = json.loads(text)["dtype"] if text else "fp32"
        return openvino_session(model, dtype), text
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened by OpenVINO: {error}") from error


def openvino_session(model: openvino.Model, dtype: str) -> Run:
    """What runs an OpenVINO model in the type that it was exported with."""
    import openvino

    # OpenVINO takes bfloat16 by itself where the processor has it: precision is what the file was exported with.
    precision = "bf16" if dtype == "bf16" else "f32"
    threads = torch.get_num_threads()

    def open_session(alone: bool) -> Run:
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(model, "CPU", settings | ({"NUM_STREAMS": threads} if alone else {}))
        own = threading.local()  # requests keep their memory, and serve one caller at a time

        def run(x: np.ndarray) -> list[np.ndarray]:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            return list(own.request.infer(x, share_inputs=True).values())

        return run

    run = open_session(False)
    takes_any_batch = model.inputs[0].get_partial_shape()[0].is_dynamic
    return InPieces(run, open_session, threads) if threads > 1 and takes_any_batch else run


def _open_program(path: Path) -> tuple[Run, str]:
    _refuse_code(path)
    described = {f"{KEY}.json": ""}
    try:
        module = torch.export.load(path, extra_files=described).module()
    except Exception as error:
        raise ValueError(f"{path} cannot be opened by torch.export: {error}") from error

    def run(x: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.numpy() for output in named_outputs(module(torch.from_numpy(x))).values()]

    return run, described[f"{KEY}.json"]


def _refuse_code(path: Path) -> None:
    """torch.export.load falls back to unpickling anything: every pickle in the archive must be one of plain tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith("_config.json") and b'"use_pickle": true' in content.replace(b'":true', b'": true'):
                    raise ValueError(
                        f"{path} holds pickled weights ({name}), which could run code when they are loaded"
                    )
                if name.endswith(".pt"):
                    torch.load(io.BytesIO(content), weights_only=True)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no exported program of plain tensors: {error}") from error
