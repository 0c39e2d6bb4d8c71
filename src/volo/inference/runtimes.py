"""What opens exported files beyond ONNX Runtime, OpenVINO and torch.export: a path -> how to run it, and what it says of itself.

The description is a JSON text, "" where there is none. Raises ValueError for files that are damaged or something else.
"""

from __future__ import annotations

import json
import platform
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEY = "volo"
"""Under this name the description is in every format."""
LEVELS = ("DEFAULT", "AVX2", "AVX512")
"""What PyTorch tells apart among processors of one make, each with all that is before it."""
Run = Callable[[np.ndarray], list[np.ndarray]]
"""What a runtime does: from the input to all outputs."""
Opened = tuple[Run, str]


def named_outputs(given: Any) -> dict[str, Tensor]:
    """The outputs of a model by name: a dict as it is, a tuple by the names of its fields or numbered, one tensor as the
    logits. Raises TypeError for anything else."""
    if isinstance(given, Tensor):
        return {"logits": given}
    if isinstance(given, (tuple, list)):
        given = dict(zip(getattr(given, "_fields", [f"output{i}" for i in range(len(given))]), given))
    if not isinstance(given, Mapping) or not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise TypeError(
            f"the model returns {type(given).__name__}; a tensor, or a tuple or dict of tensors, can be kept"
        )
    return {str(name): value for name, value in given.items()}


def holds_native_code(path: Path) -> bool:
    """Whether `path` is a package of AOTInductor, which PyTorch loads as a shared library: also by `torch.export.load`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("aotinductor" in name.lower() for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def open_aoti(path: Path) -> Opened:
    """Runs code of the package."""
    text = _entry(path, f"/extra/{KEY}.json")
    made_for = json.loads(text or "{}").get("processor")
    if made_for is not None:
        _refuse_processor(path, made_for)
    try:
        compiled = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be opened by AOTInductor: {error}") from error

    def run(x: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            given = compiled(torch.from_numpy(np.ascontiguousarray(x)))  # it does not look at strides
        return [output.numpy() for output in named_outputs(given).values()]

    return run, text


def processor() -> str:
    """What native code may be made for here, such as "x86_64 AVX512"."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _refuse_processor(path: Path, made_for: str) -> None:
    """Instructions that a processor lacks end the process without a word."""
    (machine, level), (own_machine, own_level) = (kind.split(" ", 1) for kind in (made_for, processor()))
    is_lacking = {level, own_level} <= set(LEVELS) and LEVELS.index(own_level) < LEVELS.index(level)
    if machine != own_machine or is_lacking:
        raise ValueError(
            f"{path} was compiled for a processor of the kind {made_for}, and this one is {processor()}: export the model again "
            "on this machine"
        )


def open_executorch(path: Path) -> Opened:
    from executorch.runtime import Runtime, Verification

    try:
        program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
        about = program.load_method(KEY) if KEY in program.method_names else None
        text = "" if about is None else str(about.execute([])[0])
        method = program.load_method("forward")
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be opened by ExecuTorch: {error}") from error
    if method is None:
        raise ValueError(f"{path} cannot be opened by ExecuTorch: it has no method 'forward'")

    def run(x: np.ndarray) -> list[np.ndarray]:
        answers = method.execute([torch.from_numpy(np.ascontiguousarray(x))])
        return [answer.clone().numpy() for answer in answers]  # the next call writes where this one did

    return run, text


def open_litert(path: Path) -> Opened:
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened by LiteRT: {error}") from error
    (given,), answers = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return [interpreter.get_tensor(answer["index"]) for answer in answers]

    return run, _entry(path, f"{KEY}.json")


def _entry(path: Path, ending: str) -> str:
    """The first file in the zip archive at `path` whose name ends so."""
    try:
        with zipfile.ZipFile(path) as archive:
            return next((archive.read(n).decode() for n in archive.namelist() if n.endswith(ending)), "")
    except zipfile.BadZipFile:
        return ""
