"""GELU whose gradient on a CPU is a kernel of `csrc/`.

Forward it is PyTorch's, and where the kernel cannot be used so is everything: other devices and dtypes, small tensors,
compiled, traced and exported graphs (in which compilers merge GELU with its neighbours), transforms of torch.func, the
second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volo.ops import cpu_kernel
from volo.ops.dispatch import is_plain, no_kernel

MIN_ELEMENTS = 1 << 14
"""For fewer elements the way to the kernel takes longer than it saves."""


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact (by erf), element by element; any shape, in the dtype of `x`."""
    if torch.is_grad_enabled() and x.requires_grad and why_not(x) is None:
        return _Gelu.apply(x)
    return F.gelu(x)


def why_not(x: Tensor) -> str | None:
    """None where the gradient comes from the kernel, otherwise the reason why it comes from PyTorch."""
    if torch.compiler.is_compiling():
        return "compilers merge it with its neighbours"
    reason = cpu_kernel.gelu_why_not(x) or no_kernel()
    if reason is not None:
        return reason
    if cpu_kernel.instruction_set() == "portable":
        return "without AVX2 it is not known to be faster"
    if not is_plain(x):
        return "it computes on plain tensors alone"
    if x.numel() < MIN_ELEMENTS:
        return f"it is made for {MIN_ELEMENTS} elements or more"
    return None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # With create_graph the gradient must itself be differentiable: PyTorch's is, the bare kernel is not.
        is_bare = not torch.is_grad_enabled() and is_plain(grad_out, x)
        return cpu_kernel.gelu_backward(grad_out, x) if is_bare else torch.ops.aten.gelu_backward(grad_out, x)
