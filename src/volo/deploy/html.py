"""A page that classifies images on the visitor's own machine: model, runtime and page in one HTML file, no server."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

RUNTIME, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"


def find_web_runtime(folder: str | Path | None) -> Path:
    """The folder of ONNX Runtime Web's files: `folder`, or that of an installed npm package, here or global.

    Raises FileNotFoundError, which says how to get it.
    """
    if folder is not None:
        given = Path(folder)
        places = [given, given / "dist", given / "node_modules" / "onnxruntime-web" / "dist"]
    else:
        places = [parent / "node_modules" / "onnxruntime-web" / "dist" for parent in (Path.cwd(), *Path.cwd().parents)]
        if npm := shutil.which("npm"):
            found = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False)
            places.append(Path(found.stdout.strip()) / "onnxruntime-web" / "dist")
    for place in places:
        if all((place / name).is_file() for name in (RUNTIME, WASM)):
            return place
    where = f"not in {folder}" if folder is not None else "not installed here"
    raise FileNotFoundError(
        f"a page needs ONNX Runtime Web, which is {where} ({RUNTIME} and {WASM}): npm install onnxruntime-web in this "
        "folder, or name the folder that has it with --web-runtime"
    )


def write_page(path: Path, model: bytes, description: dict[str, Any], runtime: Path) -> None:
    """The page at `path`, with `model`, an ONNX file that takes pixels, and the files of `runtime` inside."""
    page = resources.files("volo.deploy").joinpath("page.html").read_text(encoding="utf-8")
    about = json.dumps(description, ensure_ascii=False).replace(
        "<", "\\u003c"
    )  # "</script>" in a class name ends nothing
    parts = {
        "@ABOUT@": about,
        "@RUNTIME@": base64.b64encode((runtime / RUNTIME).read_bytes()).decode(),
        "@WASM@": base64.b64encode((runtime / WASM).read_bytes()).decode(),
        "@MODEL@": base64.b64encode(model).decode(),
    }
    for mark in reversed(parts):  # the class names come last: they may hold a mark
        page = page.replace(mark, parts[mark])
    path.write_text(page, encoding="utf-8")
