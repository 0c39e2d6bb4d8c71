"""Everything that is claimed, or still to be shown, of a GPU, in one run: `volo bench gpu`."""

from __future__ import annotations

from typing import Any

import torch

from volo.bench.kernels import bench_kernels, check_correctness
from volo.bench.model import bench_model, bench_train
from volo.bench.timing import setting

# What an H200 should reach in bfloat16 at batch 128: (what, at least or at most, how much).
GOALS = (
    ("operator forward, of the copy bandwidth", ">=", 0.60),
    ("operator backward, of the copy bandwidth", ">=", 0.45),
    ("inference, times timm compiled", ">=", 1.6),
    ("training step, times timm compiled", ">=", 1.35),
    ("peak memory of training, times timm eager", "<=", 0.8),
)


def bench_gpu(
    name: str = "volo_d1", *, batch_size: int = 128, img_size: int = 224, rounds: int = 15, device: str = "cuda"
) -> dict[str, Any]:
    """The operator's errors in every dtype, its speed, and the model's inference and training step against timm's.

    Returns a dict with a row for every goal (`asked`, `measured`, `met`), whose figures are our best, eager or compiled;
    under `errors`, `operator`, `inference` and `training` the whole results. Without a CUDA device nothing is measured,
    and the rows say so.
    """
    where = torch.device(device)
    if where.type != "cuda":
        nothing = {"measured": "not measured", "met": "not measured"}
        goals = [{"goal": goal, "asked": f"{sign} {bound}"} | nothing for goal, sign, bound in GOALS]
        return {"what": "GPU", "status": "not measured: no CUDA device", **setting(where), "rows": goals}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    with torch.cuda.device(where):
        errors = {str(dtype).removeprefix("torch."): check_correctness(4, 28, 28, 6, 32, dtype) for dtype in dtypes}
        operator = bench_kernels(batch_size, compiled=True, rounds=rounds)
    sizes: dict[str, Any] = {"batch_size": batch_size, "img_size": img_size, "rounds": rounds, "device": device}
    inference = bench_model(name, dtypes=("bfloat16",), compiled=True, **sizes)
    training = bench_train(name, amp="bf16", compiled=True, **sizes)

    def best(result: dict[str, Any], key: str, choose: Any = max) -> float:
        return choose(row[key] for row in result["rows"] if row["candidate"].startswith("volo"))

    fractions = {row["candidate"]: row["copy_fraction"] for row in operator["rows"]}
    measured = (
        fractions["fused forward"],
        fractions["fused backward"],
        best(inference, "times_timm_compiled"),
        best(training, "times_timm_compiled"),
        best(training, "memory_times_timm_eager", min),
    )
    rows: list[dict[str, Any]] = [
        {
            "goal": goal,
            "asked": f"{sign} {bound}",
            "measured": figure,
            "met": "yes" if (figure >= bound if sign == ">=" else figure <= bound) else "no",
        }
        for (goal, sign, bound), figure in zip(GOALS, measured)
    ]
    rows += [
        {
            "goal": f"error of {what}, {dtype}",
            "asked": f"<= {error['allowed']:.3g}",
            "measured": error["error"],
            "met": "yes" if error["error"] <= error["allowed"] else "no",
        }
        for dtype, per_tensor in errors.items()
        for what, error in per_tensor.items()
    ]
    return {
        "what": "GPU",
        "status": "measured",
        "model": name,
        "batch_size": batch_size,
        "img_size": img_size,
        "rounds": rounds,
        **setting(where),
        "rows": rows,
        "errors": errors,
        "operator": operator,
        "inference": inference,
        "training": training,
    }
