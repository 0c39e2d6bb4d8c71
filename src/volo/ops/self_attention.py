"""Self-attention, from the packed projection to what the next projection takes.

PyTorch's `scaled_dot_product_attention` works everywhere. On a CPU, where it takes more than its share of a model's
time, above all in bfloat16 and in the backward pass, a kernel in `csrc/` does the same on the packed tensor, without
permuting it. It is the torch.library op `volo::self_attention` (and `..._backward`), as outlook attention is one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volo.ops import cpu_kernel
from volo.ops.dispatch import batched, is_plain, no_kernel

MAX_TOKENS = 4096
"""The kernel reads keys and values of a head from the cache. Measured to be faster than PyTorch's up to this many."""
MAX_TOKENS_AMX = 64
"""In bfloat16 on a processor with a matrix unit (AMX), which PyTorch's uses and the kernel does not: without a gradient."""
MAX_TOKENS_AMX_TRAINING = 784
"""The same where a gradient follows: PyTorch's backward pass over few tokens is the slower one, up to tenfold."""


def _has_amx() -> bool:
    # Private to PyTorch: where a version lacks it, the kernel is used for bfloat16 too, which can only be slower.
    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return is_supported is not None and is_supported()


_HAS_AMX = _has_amx()


def self_attention(qkv: Tensor, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for all heads.

    Args:
        qkv: [B, N, 3 * C], of each token the queries, the keys and the values of all heads, as one Linear writes them.
        num_heads: heads; head_dim = C / num_heads.
        dropout_p: dropout on the softmax.

    Returns:
        [B, N, C] in the dtype of `qkv`, heads side by side.

    Raises ValueError when the last dimension is no multiple of 3 * num_heads.
    """
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv is [B, N, 3 * num_heads * head_dim]; given: {tuple(qkv.shape)} with num_heads={num_heads}"
        )
    if why_not(qkv, dropout_p) is not None:
        return self_attention_reference(qkv, num_heads, dropout_p)
    if qkv.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        qkv = qkv.to(torch.get_autocast_dtype("cpu"))
    if torch.compiler.is_compiling() or not is_plain(qkv):
        return torch.ops.volo.self_attention(qkv, num_heads)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _Fused.apply(qkv, num_heads)
    return cpu_kernel.attention_forward(qkv, num_heads)


def self_attention_reference(qkv: Tensor, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """The same by PyTorch's scaled_dot_product_attention."""
    # Views of rank 4 at most: this is the graph that is exported, and some runtimes know no more.
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)  # [B, heads, N, head_dim]
    return out.transpose(1, 2).flatten(2)


def why_not(qkv: Tensor, dropout_p: float = 0.0) -> str | None:
    """None where the kernel can be used, otherwise why PyTorch's is."""
    if dropout_p > 0.0:
        return "the kernel has no dropout"
    reason = cpu_kernel.attention_why_not(qkv) or no_kernel()
    if reason is not None:
        return reason
    if cpu_kernel.instruction_set() == "portable":
        return "without AVX2 it is not known to be faster"
    most = MAX_TOKENS
    if qkv.dtype == torch.bfloat16 and _HAS_AMX:
        most = MAX_TOKENS_AMX_TRAINING if torch.is_grad_enabled() and qkv.requires_grad else MAX_TOKENS_AMX
    if qkv.shape[1] > most:
        return f"it is made for up to {most} tokens here"
    return None


# ---- as an operator of PyTorch ----

_library = torch.library.Library("volo", "FRAGMENT")
_library.define("self_attention(Tensor qkv, int num_heads) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    "self_attention_backward(Tensor grad_out, Tensor qkv, int num_heads) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.impl("self_attention", cpu_kernel.attention_forward, "CPU")
_library.impl("self_attention_backward", cpu_kernel.attention_backward, "CPU")


@torch.library.register_fake("volo::self_attention", lib=_library)
def _fake_forward(qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@torch.library.register_fake("volo::self_attention_backward", lib=_library)
def _fake_backward(grad_out: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.num_heads = inputs[-1]


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.volo.self_attention_backward(grad_out, *ctx.saved_tensors, ctx.num_heads), None


def _differentiate_twice(ctx: Any, grad_grad_qkv: Tensor) -> tuple[Tensor | None, ...]:
    # Rare (gradient penalties, Hessians): PyTorch's own operations, which differentiate to any order.
    def first_derivative(grad_out: Tensor, qkv: Tensor) -> Tensor:
        return torch.func.vjp(lambda x: _plain_operations(x, ctx.num_heads), qkv)[1](grad_out)[0]

    return *torch.func.vjp(first_derivative, *ctx.saved_tensors)[1](grad_grad_qkv), None


def _plain_operations(qkv: Tensor, num_heads: int) -> Tensor:
    B, N, width = qkv.shape
    head_dim = width // (3 * num_heads)
    q, k, v = qkv.view(B, N, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    attn = (q @ k.transpose(-2, -1) * head_dim**-0.5).softmax(dim=-1)
    return (attn @ v).transpose(1, 2).reshape(B, N, width // 3)


torch.library.register_autograd("volo::self_attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "volo::self_attention_backward", _differentiate_twice, setup_context=_save, lib=_library
)
torch.library.register_vmap("volo::self_attention", batched(torch.ops.volo.self_attention, 1), lib=_library)
torch.library.register_vmap(
    "volo::self_attention_backward", batched(torch.ops.volo.self_attention_backward, 2), lib=_library
)


class _Fused(torch.autograd.Function):
    """What the op's own autograd does, at a fraction of its cost per call."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.num_heads = num_heads
        return cpu_kernel.attention_forward(qkv, num_heads)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (qkv,) = ctx.saved_tensors
        # With create_graph the gradient must itself be differentiable: the op is, the bare kernel is not.
        is_bare = not torch.is_grad_enabled() and is_plain(grad_out)
        differentiate = cpu_kernel.attention_backward if is_bare else torch.ops.volo.self_attention_backward
        return differentiate(grad_out, qkv, ctx.num_heads), None
