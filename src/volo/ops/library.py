"""The operator and its gradient as torch.library ops, and the fused backends on top of them.

`volo::outlook_attention` and `volo::outlook_attention_backward` are what torch.compile, vmap and the autograd of a
compiled graph see. Schema, behaviour on fake tensors and derivatives are registered here from torch alone. A kernel
module offers `why_not`, `forward` and `backward` as `volo.ops.cpu_kernel` does; that of the GPU is imported when the
first CUDA tensor comes. Plain eager calls skip the dispatcher, which would cost more than the kernel on small inputs.
The dispatcher knows one kernel for each device: of two backends for one device only that one gets what goes through it.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from volo.ops import cpu_kernel
from volo.ops.dispatch import batched, is_plain, no_kernel
from volo.ops.outlook_attention import Backend, register_backend
from volo.ops.reference import outlook_attention_reference

_library = torch.library.Library("volo", "DEF")
_library.define(
    "outlook_attention(Tensor value, Tensor logits, int kernel_size, int stride, int padding, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "outlook_attention_backward(Tensor grad_out, Tensor value, Tensor logits, int kernel_size, int stride, int padding, "
    "float scale) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


# ---- kernels of the devices ----


def _cuda_kernels() -> ModuleType:
    from volo.ops import triton_kernels  # needs triton, which `import volo` must not

    return triton_kernels


_library.impl("outlook_attention", cpu_kernel.forward, "CPU")
_library.impl("outlook_attention_backward", cpu_kernel.backward, "CPU")
_library.impl("outlook_attention", lambda *args: _cuda_kernels().forward(*args), "CUDA")
_library.impl("outlook_attention_backward", lambda *args: _cuda_kernels().backward(*args), "CUDA")


# ---- fake tensors ----


@torch.library.register_fake("volo::outlook_attention", lib=_library)
def _fake_forward(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.register_fake("volo::outlook_attention_backward", lib=_library)
def _fake_backward(
    grad_out: Tensor, value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), logits.new_empty(logits.shape)


# ---- derivatives ----


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-4])
    ctx.kernel_size, ctx.stride, ctx.padding, ctx.scale = inputs[-4:]


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.volo.outlook_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.kernel_size, ctx.stride, ctx.padding, ctx.scale
    )
    return *grads, None, None, None, None


def _differentiate_twice(ctx: Any, grad_grad_value: Tensor, grad_grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    # Rare (gradient penalties, Hessians): the reference differentiates itself, to any order.
    def first_derivative(grad_out: Tensor, value: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        def operator(value: Tensor, logits: Tensor) -> Tensor:
            return outlook_attention_reference(value, logits, ctx.kernel_size, ctx.stride, ctx.padding, ctx.scale)

        return torch.func.vjp(operator, value, logits)[1](grad_out)

    pull_back = torch.func.vjp(first_derivative, *ctx.saved_tensors)[1]
    return *pull_back((grad_grad_value, grad_grad_logits)), None, None, None, None


torch.library.register_autograd("volo::outlook_attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "volo::outlook_attention_backward", _differentiate_twice, setup_context=_save, lib=_library
)


# ---- vmap: one more batch dimension ----


torch.library.register_vmap("volo::outlook_attention", batched(torch.ops.volo.outlook_attention, 2), lib=_library)
torch.library.register_vmap(
    "volo::outlook_attention_backward", batched(torch.ops.volo.outlook_attention_backward, 3), lib=_library
)


# ---- eager ----


class _Fused(torch.autograd.Function):
    """What the op's own autograd does, at a fraction of its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, logits: Tensor, kernel: ModuleType, kernel_size: int, stride: int, padding: int,
        scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(value, logits)
        ctx.kernel = kernel
        ctx.geometry = kernel_size, stride, padding, scale
        return kernel.forward(value, logits, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, logits = ctx.saved_tensors
        # With create_graph the gradient must itself be differentiable: the op is, the bare kernel is not.
        is_bare = not torch.is_grad_enabled() and is_plain(grad_out)
        differentiate = ctx.kernel.backward if is_bare else torch.ops.volo.outlook_attention_backward
        return *differentiate(grad_out, value, logits, *ctx.geometry), None, None, None, None, None


def _run(
    kernel: ModuleType, value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> Tensor:
    if torch.compiler.is_compiling() or not is_plain(value, logits):
        return torch.ops.volo.outlook_attention(value, logits, kernel_size, stride, padding, scale)
    if torch.is_grad_enabled() and (value.requires_grad or logits.requires_grad):
        return _Fused.apply(value, logits, kernel, kernel_size, stride, padding, scale)
    return kernel.forward(value, logits, kernel_size, stride, padding, scale)


# ---- backends ----


def _cpu_why_not(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> str | None:
    return no_kernel() or cpu_kernel.why_not(value, logits, kernel_size, stride, padding)


def _cpu_run(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    return _run(cpu_kernel, value, logits, kernel_size, stride, padding, scale)


def _triton_why_not(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> str | None:
    if value.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it computes on CUDA devices, the tensors are on {value.device.type}"
    try:
        kernels = _cuda_kernels()
    except ImportError as error:
        return f"triton does not import: {error}"
    return no_kernel() or kernels.why_not(value, logits, kernel_size, stride, padding)


def _triton_run(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    return _run(_cuda_kernels(), value, logits, kernel_size, stride, padding, scale)


register_backend(Backend("cpu", _cpu_why_not, _cpu_run))
register_backend(Backend("triton", _triton_why_not, _triton_run))
