"""ExecuTorch: a program for phones, whose larger operations XNNPACK computes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from volo.inference.runtimes import KEY


def write(
    program: ExportedProgram, path: Path, names: tuple[str, ...], description: dict[str, Any], **how: Any
) -> dict[str, Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # Such files have no place for notes; but a method that returns a constant can be called on a phone, too.
    about = {KEY: json.dumps(description, ensure_ascii=False)}
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=about)
    calls = (node for node in lowered.exported_program().graph.nodes if node.op == "call_function")
    operators = Counter(getattr(node.target, "__name__", str(node.target)) for node in calls)
    path.write_bytes(lowered.to_executorch().buffer)
    return {
        "xnnpack_parts": operators.pop("executorch_call_delegate", 0),
        "operators": {name: operators[name] for name in sorted(operators) if name != "getitem"},
    }
