"""Linear layers on a CPU through oneDNN, where PyTorch itself would take a slower way.

PyTorch hands float32 matrix products to MKL. On an AMD EPYC with AVX-512 (Zen 4) its kernels were a tenth slower than
oneDNN's, and are taken to be on every processor with AVX-512 not made by Intel; on one without AVX-512 they were faster by
a tenth to a third. And PyTorch lets oneDNN rearrange a weight at every call although a model that only infers never changes it.
Everything here computes what `torch.nn.functional.linear` computes, up to rounding, and calls that wherever oneDNN
does not support: other devices and dtypes, autocast, compiled, traced and exported graphs, transforms of torch.func.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volo.ops.dispatch import is_plain, no_kernel

MIN_ROWS = 64
"""Below this many rows a product is over before a rearranged weight pays."""


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "intel" in platform.processor().lower()


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


# These operators are private to PyTorch, so another version may lack them or want other arguments.
_ARGUMENTS: dict[str, list[str]] = {
    "_linear_pointwise": ["Tensor", "Tensor", "Optional[Tensor]", "str", "List[Optional[number]]", "Optional[str]"],
    "_reorder_linear_weight": ["Tensor", "Optional[int]"],
    "_is_mkldnn_bf16_supported": [],
}


def _takes(name: str, types: list[str]) -> bool:
    operator = getattr(torch.ops.mkldnn, name, None)
    return operator is not None and any(
        [str(argument.type) for argument in getattr(operator, overload)._schema.arguments] == types
        for overload in operator.overloads()
    )


def _supported_dtypes() -> tuple[torch.dtype, ...]:
    if not (_is_x86() and torch.backends.mkldnn.is_available() and all(_takes(*call) for call in _ARGUMENTS.items())):
        return ()
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,)


_dtypes = _supported_dtypes()
_mkl_is_slow = _is_x86() and not _is_intel() and _has_avx512()
_packing_pays = {torch.float32: _has_avx512(), torch.bfloat16: True}


def is_faster_than_pytorch() -> bool:
    """Whether `linear` has anything to offer on this processor."""
    return _mkl_is_slow and bool(_dtypes)


def _may_serve(x: Tensor, weight: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _dtypes
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]
        and x.numel() > 0
        and weight.numel() > 0
        and is_plain(x, weight)
        and no_kernel() is None
    )


# ---- weights as they are: training too ----


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] -> x weight^T + bias [..., out]; weight [out, in], bias [out]."""
    # Sizes are asked for last: in a graph that is being made they may be free, and a comparison would fix them.
    if (
        _mkl_is_slow
        and x.dtype == torch.float32
        and _may_serve(x, weight)
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and (bias is None or (bias.dtype == x.dtype and is_plain(bias)))
    ):
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _Linear.apply(x, weight, bias)
        return _multiply(x, weight, bias)
    return F.linear(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            # With create_graph the gradient must itself be differentiable.
            is_bare = not torch.is_grad_enabled() and _may_serve(grad_out, weight.t())
            grad_x = _multiply(grad_out, weight.t(), None) if is_bare else grad_out @ weight
        rows = grad_out.reshape(-1, grad_out.shape[-1])
        if needs_weight:  # MKL is as fast here
            grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


# ---- weights that stay as they are: inference ----


class PackedWeight:
    """A weight [out, in] in the layout of oneDNN's kernels, made when it is first needed and whenever the weight changed.

    A change is seen by the tensor's version, its place in memory, and `SAMPLES` of its values: writing through `.data`
    (averages of weights, `vector_to_parameters`) does not raise the version. Only what changes a few single values in that
    way goes unseen; call `forget` after it.
    """

    SAMPLES = 256

    def __init__(self) -> None:
        self._made: tuple[tuple[Any, ...], Tensor, Tensor] | None = None  # identity, samples, packed

    def serves(self, x: Tensor, weight: Tensor) -> bool:
        """Whether `multiply` can compute x weight^T, faster than PyTorch, without anybody asking for gradients."""
        return not torch.is_grad_enabled() and _packing_pays.get(x.dtype, False) and _may_serve(x, weight)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        """x [..., in] -> x weight^T + bias [..., out], through GELU (erf) if asked for."""
        identity = weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version
        flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach().reshape(-1)
        # An odd step is coprime to the usual widths, so the samples come from all columns.
        samples = flat[:: max(1, flat.numel() // self.SAMPLES) | 1]
        if self._made is None or self._made[0] != identity or not torch.equal(self._made[1], samples):
            rows = x.numel() // x.shape[-1]
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self._made = identity, samples.clone(), packed
        activation, variant = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self._made[2], bias, activation, [], variant)

    def forget(self) -> None:
        """Drop the rearranged copy; the next call makes a new one."""
        self._made = None

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()  # copies and pickles make their own
