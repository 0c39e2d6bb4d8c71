"""Outlook attention for exported graphs: operations that every runtime has, on tensors of rank 4 at most.

`fold` becomes Col2Im in ONNX, which TensorRT, Core ML, LiteRT and others refuse; five dimensions are too many for some of
them. Here windows are gathered and added up again with pad, slice of step 1, concatenation, reshape and addition alone.
Batch, height and width may be symbols of `torch.export`: nothing here compares them.

The trick is that of polyphase filters. Along one axis, tokens s*u + r are the entries u of *phase* r, and a reshape tells the
phases apart. Tap a of window i is token s*i + a - p = s*(i + o) + r: phase r, shifted by o, whatever i. So unfolding
slices phases and shifts them, and folding shifts them back, adds, and lays phases side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def outlook_attention(
    value: Tensor, logits: Tensor, num_heads: int, kernel_size: int, stride: int, padding: int, scale: float
) -> Tensor:
    """Outlook attention (arXiv 2106.13112, eq. 3 to 5), as `volo.outlook_attention` computes it, up to rounding.

    Args:
        value: [B, H, W, C], all heads side by side, as a Linear writes them.
        logits: [B, h, w, num_heads * K**4], one Linear's output too. Where height or width is a symbol, h and w must be
            ceil(H / stride) and ceil(W / stride), as outlook attention in a layer has it.
        kernel_size, stride, padding, scale: as in `volo.outlook_attention`.

    Returns:
        [B, H, W, C]. Differentiable.
    """
    (H, W, C), (h, w), K = value.shape[1:], logits.shape[1:3], kernel_size
    taps = [divmod(a - padding, stride) for a in range(K)]  # (shift o, phase r) of each tap

    columns = _phases(value, 2, w, stride)
    windows = []
    rows_of_column = [
        _phases(_shifted(columns[r], 2, o, _difference(w, W, stride)), 1, h, stride) for o, r in taps
    ]  # one entry for each b
    for o, r in taps:
        for rows in rows_of_column:
            window = _shifted(rows[r], 1, o, _difference(h, H, stride))  # [B, h, w, C]: value of key offset (a, b)
            windows.append(window.reshape(-1, num_heads, 1, C // num_heads))
    if scale != 1.0:
        logits = logits * scale
    attn = logits.reshape(-1, num_heads, K * K, K * K).softmax(dim=-1)  # [B * h * w, heads, query, key offset]
    mixed = attn.to(value.dtype) @ torch.cat(windows, dim=2)  # [B * h * w, heads, query offset, head_dim]

    parts = [part.reshape(-1, h, w, C) for part in mixed.split(1, dim=2)]
    rows = [_folded(parts[a * K : a * K + K], taps, 2, w, W, stride) for a in range(K)]  # [B, h, W, C] each
    return _folded(rows, taps, 1, h, H, stride)


def _phases(x: Tensor, dim: int, windows: Any, stride: int) -> list[Tensor]:
    """[B, H, W, C] -> for each r the tokens s*u + r along `dim` (1 or 2), zeros where the grid has ended."""
    if stride == 1:
        return [x]
    size = x.shape[dim]
    count = _num_strides(size, windows, stride)
    if not _is_known(size % stride == 0):
        x = _padded(x, dim, 0, count * stride - size)
    B, H, W, C = x.shape
    if dim == 2:  # phases lie side by side in the channels
        x = x.reshape(B, H, count, stride * C)
        return [x[..., r * C : r * C + C] for r in range(stride)]
    x = x.reshape(B, count, stride * W, C)  # ... and in the row
    return [x.narrow(2, r * W, W) for r in range(stride)]


def _shifted(x: Tensor, dim: int, shift: int, more: int) -> Tensor:
    """Entries shift, shift + 1, ... of `x` along `dim`, as many as it has and `more`; zeros where it has none."""
    if shift == more == 0:
        return x
    length = x.shape[dim] + more
    return _padded(x, dim, max(-shift, 0), max(shift + more, 0)).narrow(dim, max(shift, 0), length)


def _folded(parts: list[Tensor], taps: list[tuple[int, int]], dim: int, windows: Any, size: Any, stride: int) -> Tensor:
    """What each tap of the windows along `dim` adds to its token: K times [B, h, w, C] -> `size` tokens along `dim`."""
    more = -_difference(windows, size, stride)
    phases = []
    for phase in range(stride):
        terms = [_shifted(part, dim, -o, more) for part, (o, r) in zip(parts, taps) if r == phase]
        total = sum(terms[1:], terms[0]) if terms else torch.zeros_like(_shifted(parts[0], dim, 0, more))
        phases.append(total)
    if stride == 1:
        return phases[0]
    B, h, w, C = phases[0].shape
    x = torch.cat(phases, dim + 1)
    x = x.reshape(B, h * stride, w, C) if dim == 1 else x.reshape(B, h, w * stride, C)
    return x if _is_known(size % stride == 0) else x.narrow(dim, 0, size)


def _num_strides(size: Any, windows: Any, stride: int) -> Any:
    """ceil(size / stride). In a graph with symbols that is the number of windows, in the words of another symbol."""
    return -(-size // stride) if isinstance(size, int) and isinstance(windows, int) else windows


def _difference(windows: Any, size: Any, stride: int) -> int:
    """Windows there are beyond ceil(size / stride): 0 for symbols, which are not compared."""
    is_static = isinstance(size, int) and isinstance(windows, int)
    return windows - -(-size // stride) if is_static else 0


def _padded(x: Tensor, dim: int, before: Any, after: Any) -> Tensor:
    """Zeros around [B, H, W, C] along `dim`, 1 or 2."""
    return F.pad(x, (0, 0) * (3 - dim) + (before, after))


def _is_known(condition: Any) -> bool:
    """Whether a comparison holds for every value of the symbols in it; asking leaves no condition in the graph."""
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def average_pool(x: Tensor, stride: int) -> Tensor:
    """Means of stride x stride tokens, of fewer at the far edges: [B, H, W, C] -> [B, ceil(H / s), ceil(W / s), C].

    What `avg_pool2d(ceil_mode=True)` computes, about which runtimes disagree where a window is not full.
    """
    if stride == 1:
        return x
    x = x.permute(0, 3, 1, 2)
    H, W = x.shape[2:]
    if not (_is_known(H % stride == 0) and _is_known(W % stride == 0)):
        x = F.pad(x, (0, -W % stride, 0, -H % stride))
        real = F.pad(x.new_ones(1, 1, H, W), (0, -W % stride, 0, -H % stride))
        x = F.avg_pool2d(x, stride, stride) / F.avg_pool2d(real, stride, stride)
    else:
        x = F.avg_pool2d(x, stride, stride)
    return x.permute(0, 2, 3, 1)


def resample_pos_embed(pos_embed: Tensor, height: Any, width: Any) -> Tensor:
    """[1, H, W, C] -> [1, height, width, C]: bicubic interpolation, antialiased where it shrinks, as two matrix products.

    What `torch.nn.functional.interpolate(mode="bicubic", antialias=shrinks)` computes, up to rounding, for sizes that may
    be symbols: whether it shrinks is decided inside the graph. Computed in float32.
    """
    _, H, W, C = pos_embed.shape
    rows, columns = (_length(n, pos_embed.device) for n in (height, width))
    shrinks = (rows < H) | (columns < W)
    x = _cubic_weights(rows, height, H, shrinks) @ pos_embed[0].float().reshape(H, W * C)  # [height, W * C]
    x = _cubic_weights(columns, width, W, shrinks) @ x.reshape(-1, W, C)  # [height, width, C]
    return x[None].to(pos_embed.dtype)


def _length(n: Any, device: torch.device) -> Tensor:
    """A size as a number that the graph computes with."""
    return torch.ones(n, device=device).sum()


def _cubic_weights(length: Tensor, n_out: Any, n_in: int, shrinks: Tensor) -> Tensor:
    """[n_out, n_in]: PyTorch's bicubic (a = -0.75, edges repeated), or its antialiased one (a = -0.5, wider, normalised)."""
    scale = n_in / length
    centre = (torch.arange(n_out, dtype=torch.float32, device=length.device) + 0.5) * scale  # input j covers j .. j + 1
    wide = torch.where(shrinks, scale.clamp(min=1.0), torch.ones_like(scale))
    reach = 2  # entries that the plain kernel reads beyond an edge
    j = torch.arange(-reach, n_in + reach, dtype=torch.float32, device=length.device)
    d = ((j[None] + 0.5 - centre[:, None]) / wide).abs()
    a = torch.where(shrinks, -0.5, -0.75)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    weights = torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    inside = weights[:, reach:-reach]
    before, after = weights[:, :reach].sum(1, keepdim=True), weights[:, -reach:].sum(1, keepdim=True)
    if n_in == 1:
        repeated = inside + before + after
    else:
        repeated = torch.cat([inside[:, :1] + before, inside[:, 1:-1], inside[:, -1:] + after], dim=1)
    return torch.where(shrinks, inside / inside.sum(1, keepdim=True), repeated)
