"""The operator and its gradient as torch.library ops, and the fused backends on top of them.

`volo::outlook_attention` and `volo::outlook_attention_backward` are what torch.compile, vmap and the autograd of a
compiled graph see. Schema, behaviour on fake tensors and derivatives are registered here from torch alone. A kernel
module offers `why_not`, `forward` and `backward` as `volo.ops.cpu_kernel` does; that of the GPU is imported when the
first CUDA tensor comes. Plain eager calls skip the dispatcher, which would cost more than the kernel on small inputs.
The dispatcher knows one kernel for each device: of two backends for one device only that one gets what goes through it.

`volo::outlook_attention_packed` and its gradient are the same operator on packed logits (`volo.ops.packed`), for which a
layer asks where GPU kernels serve; `packed_why_not` and `outlook_attention_packed` are what it calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from volo.ops import cpu_kernel
from volo.ops.dispatch import batched, is_plain, no_kernel
from volo.ops.outlook_attention import Backend, register_backend
from volo.ops.packed import unpack
from volo.ops.reference import outlook_attention_reference

_library = torch.library.Library("volo", "DEF")
for _name in ("outlook_attention", "outlook_attention_packed"):
    _geometry = "int kernel_size, int stride, int padding, float scale"
    _library.define(f"{_name}(Tensor value, Tensor logits, {_geometry}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    _library.define(
        f"{_name}_backward(Tensor grad_out, Tensor value, Tensor logits, {_geometry}) -> (Tensor, Tensor)",
        tags=torch.Tag.pt2_compliant_tag,
    )


# ---- kernels of the devices ----


def _cuda_kernels() -> ModuleType:
    from volo.ops import triton_kernels  # needs triton, which `import volo` must not

    return triton_kernels


def _packed_kernels() -> ModuleType:
    from volo.ops import triton_packed

    return triton_packed


def _interprets() -> bool:
    """Whether Triton's kernels compute on CPU tensors, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _packed_forward_on_cpu(
    value: Tensor, packed: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> Tensor:
    if _interprets():
        return _packed_kernels().forward(value, packed, kernel_size, stride, padding, scale)
    return _packed_reference(value, packed, kernel_size, stride, padding, scale).contiguous()


def _packed_backward_on_cpu(grad_out: Tensor, value: Tensor, packed: Tensor, *geometry: Any) -> tuple[Tensor, ...]:
    if _interprets():
        return _packed_kernels().backward(grad_out, value, packed, *geometry)
    pull_back = torch.func.vjp(lambda v, p: _packed_reference(v, p, *geometry), value, packed)[1]
    return tuple(grad.contiguous() for grad in pull_back(grad_out))


def _packed_reference(
    value: Tensor, packed: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> Tensor:
    logits = unpack(packed, value.shape[3], kernel_size)
    return outlook_attention_reference(value, logits, kernel_size, stride, padding, scale)


_library.impl("outlook_attention", cpu_kernel.forward, "CPU")
_library.impl("outlook_attention_backward", cpu_kernel.backward, "CPU")
_library.impl("outlook_attention", lambda *args: _cuda_kernels().forward(*args), "CUDA")
_library.impl("outlook_attention_backward", lambda *args: _cuda_kernels().backward(*args), "CUDA")
_library.impl("outlook_attention_packed", _packed_forward_on_cpu, "CPU")
_library.impl("outlook_attention_packed_backward", _packed_backward_on_cpu, "CPU")
_library.impl("outlook_attention_packed", lambda *args: _packed_kernels().forward(*args), "CUDA")
_library.impl("outlook_attention_packed_backward", lambda *args: _packed_kernels().backward(*args), "CUDA")


# ---- fake tensors, derivatives, vmap ----


def _fake_forward(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    return value.new_empty(value.shape)


def _fake_backward(
    grad_out: Tensor, value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-4])
    ctx.kernel_size, ctx.stride, ctx.padding, ctx.scale = inputs[-4:]


def _register(name: str, reference: Callable[..., Tensor]) -> None:
    """What torch.library is told of an operator and its gradient: fake tensors, derivatives, one more batch dimension."""
    forward, backward = (getattr(torch.ops.volo, op) for op in (name, f"{name}_backward"))

    def differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = backward(grad_out, *ctx.saved_tensors, ctx.kernel_size, ctx.stride, ctx.padding, ctx.scale)
        return *grads, None, None, None, None

    def differentiate_twice(ctx: Any, grad_grad_value: Tensor, grad_grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        # Rare (gradient penalties, Hessians): the reference differentiates itself, to any order.
        def first_derivative(grad_out: Tensor, value: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
            def operator(value: Tensor, logits: Tensor) -> Tensor:
                return reference(value, logits, ctx.kernel_size, ctx.stride, ctx.padding, ctx.scale)

            return torch.func.vjp(operator, value, logits)[1](grad_out)

        pull_back = torch.func.vjp(first_derivative, *ctx.saved_tensors)[1]
        return *pull_back((grad_grad_value, grad_grad_logits)), None, None, None, None

    for op, num_tensors, fake, derivative in (
        (forward, 2, _fake_forward, differentiate),
        (backward, 3, _fake_backward, differentiate_twice),
    ):
        qualified = f"volo::{op.__name__}"
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_autograd(qualified, derivative, setup_context=_save, lib=_library)
        torch.library.register_vmap(qualified, batched(op, num_tensors), lib=_library)


_register("outlook_attention", outlook_attention_reference)
_register("outlook_attention_packed", _packed_reference)


# ---- eager ----


class _Fused(torch.autograd.Function):
    """What the op's own autograd does, at a fraction of its cost per call."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, logits: Tensor, kernel: ModuleType, op: str, kernel_size: int, stride: int, padding: int,
        scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(value, logits)
        ctx.kernel, ctx.op = kernel, op
        ctx.geometry = kernel_size, stride, padding, scale
        return kernel.forward(value, logits, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, logits = ctx.saved_tensors
        # With create_graph the gradient must itself be differentiable: the op is, the bare kernel is not.
        is_bare = not torch.is_grad_enabled() and is_plain(grad_out)
        differentiate = ctx.kernel.backward if is_bare else getattr(torch.ops.volo, f"{ctx.op}_backward")
        return *differentiate(grad_out, value, logits, *ctx.geometry), None, None, None, None, None, None


def _run(
    kernel: ModuleType, value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float,
    *, op: str = "outlook_attention",
) -> Tensor:  # fmt: skip
    if torch.compiler.is_compiling() or not is_plain(value, logits):
        return getattr(torch.ops.volo, op)(value, logits, kernel_size, stride, padding, scale)
    if torch.is_grad_enabled() and (value.requires_grad or logits.requires_grad):
        return _Fused.apply(value, logits, kernel, op, kernel_size, stride, padding, scale)
    return kernel.forward(value, logits, kernel_size, stride, padding, scale)


# ---- backends ----


def _cpu_why_not(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> str | None:
    return no_kernel() or cpu_kernel.why_not(value, logits, kernel_size, stride, padding)


def _cpu_run(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float) -> Tensor:
    return _run(cpu_kernel, value, logits, kernel_size, stride, padding, scale)


def _triton_why_not(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> str | None:
    if value.device.type != "cuda" and not _interprets():
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


# ---- packed logits ----


def packed_why_not(value: Tensor, grid: tuple[int, ...], kernel_size: int, stride: int, padding: int) -> str | None:
    """None where `outlook_attention_packed` has kernels for these values and `grid` windows, otherwise the reason why not."""
    if value.device.type != "cuda" and not _interprets():
        return f"its kernels compute on CUDA devices, the tensors are on {value.device.type}"
    try:
        kernels = _packed_kernels()
    except ImportError as error:
        return f"triton does not import: {error}"
    return no_kernel() or kernels.why_not(value, grid, kernel_size, stride, padding)


def outlook_attention_packed(
    value: Tensor, packed: Tensor, kernel_size: int, stride: int, padding: int, scale: float
) -> Tensor:
    """`volo.outlook_attention` of packed logits [B, h, w, packed_width] (`volo.ops.packed`), in the dtype of `value`, for
    inputs for which `packed_why_not` answers None. Differentiable with respect to both.

    Raises ValueError where the two have different dtypes.
    """
    if value.dtype != packed.dtype:
        raise ValueError(f"value and logits must share a dtype; given: {value.dtype} and {packed.dtype}")
    return _run(_packed_kernels(), value, packed, kernel_size, stride, padding, scale, op="outlook_attention_packed")
