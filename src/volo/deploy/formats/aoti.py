"""AOTInductor: a program compiled to native code for this kind of processor, which PyTorch loads without compiling again."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from volo.inference.runtimes import KEY, processor


def require_compiler() -> None:
    """Raises FileNotFoundError where the C++ compiler that PyTorch will call is missing."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(
            f"AOTInductor compiles C++ with {compiler}, which is not installed: install it (on Debian, apt install g++), or "
            "name another compiler in the environment variable CXX"
        )


def write(
    program: ExportedProgram, path: Path, names: tuple[str, ...], description: dict[str, Any], **how: Any
) -> dict[str, Any]:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    # Where PyTorch keeps files of users in such archives; read without loading the code.
    with zipfile.ZipFile(path, "a") as package:
        root = package.namelist()[0].partition("/")[0]
        about = json.dumps(description | {"processor": processor()}, ensure_ascii=False)
        package.writestr(f"{root}/extra/{KEY}.json", about)
    return {"processor": processor()}
