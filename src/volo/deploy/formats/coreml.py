"""Core ML: a package for Apple's devices. Its runtime is part of their systems, so here the program inside the package is
read back and computed step by step with PyTorch (`mil`)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from volo.inference.exported import ExportedModel
from volo.inference.runtimes import KEY

NOT_RUN = (
    "not run in Core ML, which only Apple's systems have: the program in the package was read back and computed step by step "
    "with PyTorch"
)

OTHER_NAMES: dict[Any, Any] = {
    torch.ops.aten.alias.default: torch.ops.aten.clone.default,
    torch.ops.aten.__and__.Tensor: torch.ops.aten.logical_and.default,
}
"""Operations that coremltools knows by another name only (`&` is that of masks: our models have no bits of integers)."""


def write(
    program: ExportedProgram, path: Path, names: tuple[str, ...], description: dict[str, Any], **how: Any
) -> dict[str, Any]:
    coremltools = _coremltools()
    program = program.run_decompositions({})
    for node in program.graph.nodes:
        node.target = OTHER_NAMES.get(node.target, node.target)
    with contextlib.redirect_stderr(io.StringIO()):  # its bars
        model = coremltools.convert(
            program,
            outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in names[1:]],
            minimum_deployment_target=coremltools.target.iOS16,
            compute_precision=getattr(coremltools.precision, {"fp32": "FLOAT32", "fp16": "FLOAT16"}[how["dtype"]]),
            skip_model_load=True,
        )
    model.user_defined_metadata[KEY] = json.dumps(description, ensure_ascii=False)
    model.short_description = (
        f"{description['task']}, {len(description['classes'])} classes; from {description['origin']}"
    )
    model.license, model.version = description["licence"], description["volo"]
    model.save(str(path))
    # Numbers of coremltools' debugger, which are no part of a package.
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    return {"not_run": NOT_RUN}


def replay(path: Path) -> ExportedModel:
    """What the program in the package at `path` computes. Raises ValueError for operations that `mil` lacks."""
    from volo.deploy.formats import mil

    coremltools = _coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    function = load(spec, spec.specificationVersion, model.weights_dir).functions["main"]
    mil.check(function)
    return ExportedModel(lambda x: mil.run(function, x), json.loads(model.user_defined_metadata[KEY]))


def _coremltools() -> Any:
    # It warns of every version of other libraries that it was not tested with, and of Core ML, which is not here.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools

    return coremltools
