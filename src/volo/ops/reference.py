"""Outlook attention in plain PyTorch: the oracle of every kernel, the fallback, and the graph that is exported."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def outlook_attention_reference(
    value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Unfold, softmax, batched matrix product, fold (paper, eq. 3 to 5), as the original code computes it.

    Shapes as in `volo.ops.outlook_attention`. `dropout_p` drops entries of the softmax, as `attn_drop` does in the
    original. Materialises two tensors kernel_size**2 times as large as `value`, which is what the fused kernels avoid.
    """
    B, H, W, heads, head_dim = value.shape
    _, h, w, _, K2, _ = logits.shape

    windows = F.unfold(value.flatten(3).permute(0, 3, 1, 2), kernel_size, padding=padding, stride=stride)
    # [B, heads, h*w, key offset, head_dim]
    windows = windows.view(B, heads, head_dim, K2, h * w).permute(0, 1, 4, 3, 2)
    attn = (logits * scale).softmax(dim=-1).flatten(1, 2).permute(0, 2, 1, 3, 4)  # [B, heads, h*w, query, key offset]
    if dropout_p > 0.0:
        attn = F.dropout(attn, dropout_p)
    # On CUDA autocast runs softmax in float32; the product and the sum stay in the operator's own dtype.
    outlooked = attn.to(value.dtype) @ windows  # [B, heads, h*w, query offset, head_dim]
    columns = outlooked.permute(0, 1, 4, 3, 2).reshape(B, heads * head_dim * K2, h * w)
    out = F.fold(columns, (H, W), kernel_size, padding=padding, stride=stride)  # overlap-add, [B, C, H, W]
    return out.permute(0, 2, 3, 1).reshape(B, H, W, heads, head_dim)
