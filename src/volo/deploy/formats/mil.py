"""The operations of Core ML's programs (MIL, as coremltools' `ops.defs` describes them), computed with PyTorch.

What models of this library become, and no more: an operation that is not here cannot be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def check(function: Any) -> None:
    """Raises ValueError where `function`, a function of a MIL program, has operations that are not here."""
    unknown = {op.op_type for op in function.operations} - {"const", *OPERATIONS}
    _only(not unknown, ", ".join(sorted(unknown)))


def _only(is_known: bool, what: str) -> None:
    if not is_known:
        raise ValueError(
            f"the model was converted, but cannot be checked outside Apple's systems: {what} is not among what "
            "volo.deploy.formats.mil computes. No file was written"
        )


def run(function: Any, x: np.ndarray) -> list[np.ndarray]:
    """All outputs of `function` for its only input. Values of float16 are rounded to it after each operation."""
    (name,) = function.inputs
    known: dict[str, Any] = {name: torch.from_numpy(x)}
    outputs = [output.name for output in function.outputs]
    last_user = {name: op for op in function.operations for name in _names(op)}

    def value(argument: Any) -> Any:
        if isinstance(argument, (tuple, list)):
            return [value(part) for part in argument]
        if argument.name in known:
            return known[argument.name]
        constant = argument.val
        if isinstance(constant, np.ndarray):
            return torch.from_numpy(constant.astype(np.float32)) if constant.dtype.kind == "f" else constant.tolist()
        return constant.item() if isinstance(constant, np.generic) else constant

    for op in function.operations:
        if op.op_type == "const":
            continue
        arguments = {key: value(argument) for key, argument in op.inputs.items() if argument is not None}
        results = OPERATIONS[op.op_type](**arguments)
        for out, result in zip(op.outputs, [results] if isinstance(results, Tensor) else results, strict=True):
            assert tuple(result.shape) == tuple(out.shape), (op.op_type, result.shape, out.shape)
            known[out.name] = result.half().float() if out.dtype.__name__ == "fp16" else result
        for name in _names(op) & known.keys() - set(outputs):
            if last_user[name] is op:  # all values of a large model are gigabytes
                del known[name]
    return [known[output].numpy() for output in outputs]


def _names(op: Any) -> set[str]:
    """Of the values that `op` reads."""
    arguments = (a if isinstance(a, (tuple, list)) else [a] for a in op.inputs.values())
    return {argument.name for group in arguments for argument in group if argument is not None}


def _padding(pad_type: str, pad: Sequence[int]) -> list[int]:
    """[top, bottom, left, right] as F.pad wants it."""
    _only(pad_type in ("valid", "custom"), f"padding {pad_type}")
    top, bottom, left, right = pad if pad_type == "custom" else (0, 0, 0, 0)
    return [left, right, top, bottom]


def _cast(x: Tensor, dtype: str) -> Tensor:
    _only(dtype in ("fp16", "fp32"), f"cast to {dtype}")
    return x  # `run` rounds


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    return F.conv2d(F.pad(x, _padding(pad_type, pad)), weight, bias, strides, 0, dilations, groups)


def _avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: Sequence[int],
    exclude_padding_from_average: bool,
    ceil_mode: bool,
) -> Tensor:
    left, right, top, bottom = _padding(pad_type, pad)
    _only((left, top) == (right, bottom), "pooling with uneven padding")
    return F.avg_pool2d(x, kernel_sizes, strides, (top, left), ceil_mode, not exclude_padding_from_average)


def _max_pool(
    x: Tensor, kernel_sizes: list[int], strides: list[int], pad_type: str, pad: Sequence[int], ceil_mode: bool
) -> Tensor:
    left, right, top, bottom = _padding(pad_type, pad)
    _only((left, top) == (right, bottom), "pooling with uneven padding")
    return F.max_pool2d(x, kernel_sizes, strides, (top, left), ceil_mode=ceil_mode)


def _layer_norm(x: Tensor, axes: Sequence[int], epsilon: float, gamma: Tensor, beta: Tensor) -> Tensor:
    is_last = [axis % x.dim() for axis in axes] == list(range(x.dim() - len(axes), x.dim()))
    _only(is_last, f"layer_norm over axes {axes}")
    return F.layer_norm(x, gamma.shape, gamma, beta, epsilon)


def _batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, epsilon: float, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _slice(
    x: Tensor,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:
    none = [False] * x.dim()
    index: list[int | slice] = []
    for axis in range(x.dim()):
        if (squeeze_mask or none)[axis]:
            index.append(begin[axis])
            continue
        first = None if (begin_mask or none)[axis] else begin[axis]
        last = None if (end_mask or none)[axis] else end[axis]
        index.append(slice(first, last, stride[axis] if stride else 1))
    return x[tuple(index)]


def _pad(x: Tensor, pad: Sequence[int], mode: str, constant_val: float) -> Tensor:
    _only(mode == "constant", f"padding {mode}")
    pairs = list(zip(pad[::2], pad[1::2]))
    return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=constant_val)


def _split(
    x: Tensor, axis: int, split_sizes: list[int] | None = None, num_splits: int | None = None
) -> tuple[Tensor, ...]:
    return x.split(split_sizes or x.shape[axis] // (num_splits or 1), axis)


def _concat(values: list[Tensor], axis: int, interleave: bool) -> Tensor:
    _only(not interleave, "interleaved concat")
    return torch.cat(values, axis)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool, transpose_y: bool) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _upsample(
    x: Tensor,
    scale_factor_height: float,
    scale_factor_width: float,
    align_corners: bool,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    _only(half_pixel_centers in (None, not align_corners), "upsampling between corners and centres")
    size = [int(side * scale) for side, scale in zip(x.shape[2:], (scale_factor_height, scale_factor_width))]
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def _gelu(x: Tensor, mode: str) -> Tensor:
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "concat": _concat,
    "conv": _conv,
    "expand_dims": lambda x, axes: x[tuple(None if i in axes else slice(None) for i in range(x.dim() + len(axes)))],
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": _matmul,
    "max_pool": _max_pool,
    "mul": lambda x, y: x * y,
    "pad": _pad,
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.amax(axes, keep_dims),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keep_dims),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(axis),
    "split": _split,
    "squeeze": lambda x, axes: x.squeeze(axes),
    "sub": lambda x, y: x - y,
    "transpose": lambda x, perm: x.permute(perm),
    "upsample_bilinear": _upsample,
}
