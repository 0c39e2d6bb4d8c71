"""ONNX: written at the opset that was asked for, and its operators looked up in the tables of other runtimes."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

if TYPE_CHECKING:
    import onnx

OPSETS = range(17, 24)
DEFAULT_OPSET = 20
"""The first with Gelu as one operator."""
LARGEST = 2**31 - 1
"""Bytes that one ONNX file holds."""


def to_onnx(program: ExportedProgram, opset: int, names: tuple[str, ...]) -> onnx.ModelProto:
    """`program` as an ONNX model of that opset, complete and checked, shapes inferred. `names`: of the input, then of the
    outputs. Raises ValueError."""
    import logging

    import onnx
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        written = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=max(opset, 18),  # below, the exporter writes 18 whatever one asks for
            verbose=False,
            input_names=[names[0]],
            output_names=list(names[1:]),
        )
    assert written is not None
    model = written.model_proto
    if model.ByteSize() > LARGEST:
        raise ValueError("an ONNX file holds up to 2 GB; export with --dtype fp16, or to --format openvino")
    if opset < 18:
        to_opset_17(model)
    found = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if found != opset:
        raise ValueError(
            f"opset {opset} was asked for and the exporter wrote {found}; opsets are {OPSETS[0]} to {OPSETS[-1]}"
        )
    onnx.checker.check_model(model, full_check=True)
    return model


def to_opset_17(model: onnx.ModelProto) -> None:
    """Change a model of opset 18 in place into the same of opset 17, which onnx's own converter refuses to do."""
    import onnx
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ValueError(f"{node.domain}.{node.op_type} is no standard operator")
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":  # axes became an input
            if len(node.input) > 1:
                axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
                del node.input[1:]
                node.attribute.append(helper.make_attribute("axes", axes))
            kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
        elif node.op_type == "Split":  # num_outputs is new; equal parts are what 17 does without it
            kept = [a for a in node.attribute if a.name != "num_outputs"]
        elif node.op_type == "Resize":  # attributes at their defaults are new
            new = {"antialias", "axes", "keep_aspect_ratio_policy"}
            if any(a.name == "antialias" and a.i for a in node.attribute):
                raise ValueError("an antialiased Resize needs opset 18 or above")
            kept = [a for a in node.attribute if a.name not in new]
        elif node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
            raise ValueError("Pad with axes needs opset 18 or above")
        else:
            known = onnx.defs.get_schema(node.op_type, 18).since_version
            if known > 17 and node.op_type != "Pad":
                raise ValueError(f"{node.op_type} needs opset {known} or above")
            continue
        del node.attribute[:]
        node.attribute.extend(kept)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 17))


def operators_of(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs; those of other domains with the domain before them."""
    names = (f"{n.domain}.{n.op_type}" if n.domain not in ("", "ai.onnx") else n.op_type for n in model.graph.node)
    return dict(sorted(Counter(names).items()))


def largest_rank(model: onnx.ModelProto) -> int:
    """Dimensions of the tensor with the most of them, inferred shapes included."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return max(len(value.type.tensor_type.shape.dim) for value in values)


def support(operators: dict[str, int]) -> dict[str, Any]:
    """For each runtime in `operators.json`: the operators among these that its table does not list as supported."""
    tables = json.loads(resources.files("volo.deploy").joinpath("operators.json").read_text(encoding="utf-8"))
    return {
        name: {
            "source": table["source"],
            "date": table["date"],
            "missing": [operator for operator in operators if operator not in table["operators"]],
        }
        for name, table in tables.items()
    }
