"""Packed logits: the order in which a layer hands its logits to kernels that load rows at once (`triton_packed`).

A row of logits, one query offset of one window and head, has K*K numbers, 9 for example: 18 bytes that begin anywhere. In
packed logits the first 8 of each row stand together, 16 or 32 aligned bytes, and the ninth of all rows behind them:

    [B, h, w, heads * K*K * 8 + heads * K*K + gap],

where the gap, up to 15 numbers that nobody reads, makes windows begin at multiples of 16 numbers, which Triton knows of
strides. K is odd, so that K*K is
one more than a multiple of 8 (of which each is a chunk: 24 + 1 for K = 5). It is a permutation: laid out once in the rows
of the weight that makes the logits (`pack`), it costs nothing later.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(num_heads: int, kernel_size: int) -> int:
    """Numbers of a window: num_heads * kernel_size**4, rounded up to a multiple of 16."""
    return -(-num_heads * kernel_size**4 // 16) * 16


def pack(x: Tensor, num_heads: int, kernel_size: int) -> Tensor:
    """[num_heads * K**4, ...] in the order of logits [heads, K*K, K*K] -> [packed_width, ...]; the gap is zeros.

    Of the weight and bias of a Linear it makes those of the Linear that gives packed logits. Differentiable.
    """
    taps, wide = kernel_size**2, kernel_size**2 // 8 * 8
    rows = x.unflatten(0, (num_heads * taps, taps))
    gap = packed_width(num_heads, kernel_size) - len(x)
    return torch.cat([rows[:, :wide].flatten(0, 1), rows[:, wide:].flatten(0, 1), x.new_zeros(gap, *x.shape[1:])])


def unpack(packed: Tensor, num_heads: int, kernel_size: int) -> Tensor:
    """[..., packed_width] -> logits [..., heads, K*K, K*K]. Differentiable."""
    taps, wide = kernel_size**2, kernel_size**2 // 8 * 8
    first, rest, _ = packed.tensor_split([num_heads * taps * wide, num_heads * taps * taps], dim=-1)
    rows = (num_heads, taps)
    return torch.cat([first.unflatten(-1, (*rows, wide)), rest.unflatten(-1, (*rows, taps - wide))], dim=-1)
