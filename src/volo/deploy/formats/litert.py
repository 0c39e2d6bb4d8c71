"""LiteRT, which was TensorFlow Lite: a flat file for phones and small boards."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from volo.inference.runtimes import KEY


def write(
    program: ExportedProgram, path: Path, names: tuple[str, ...], description: dict[str, Any], **how: Any
) -> dict[str, Any]:
    import litert_torch

    litert_torch.config.show_progress = False
    module = program.module()
    module.training = False  # the program is that of eval mode, which its module does not say
    assert program.example_inputs is not None
    converted = litert_torch.convert(module, program.example_inputs[0])
    converted.export(str(path))
    # TensorFlow Lite's place for files of users: a zip archive behind the model, which `unzip` and Android's readers know.
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{KEY}.json", json.dumps(description, ensure_ascii=False))
    return {}
