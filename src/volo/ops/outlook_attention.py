"""The public operator: its mathematics, its checks, and the choice of the backend that computes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from volo.ops.reference import outlook_attention_reference

logger = logging.getLogger(__name__)

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One backend. `why_not` answers None where the backend supports the call, otherwise the reason why it does not."""

    name: str
    why_not: Callable[[Tensor, Tensor, int, int, int], str | None]
    run: Callable[[Tensor, Tensor, int, int, int, float], Tensor]


def _always(*_: object) -> None:
    return None


REFERENCE = Backend("reference", _always, outlook_attention_reference)

# In order of preference. Backends put themselves in front with `register_backend`; the reference supports everything.
_backends: list[Backend] = [REFERENCE]
_reported_fallbacks: set[tuple[str, ...]] = set()


def register_backend(backend: Backend) -> None:
    """Put `backend` in front of those already there (a name that is taken is replaced)."""
    _backends[:] = [backend] + [b for b in _backends if b.name != backend.name]


def list_backends() -> list[Backend]:
    """All backends, most preferred first."""
    return list(_backends)


def window_grid(height: int, width: int, kernel_size: int, stride: int, padding: int) -> tuple[int, int]:
    """Rows and columns of windows over a token grid: floor((size + 2 padding - kernel_size) / stride) + 1."""
    return (height + 2 * padding - kernel_size) // stride + 1, (width + 2 * padding - kernel_size) // stride + 1


def outlook_attention(
    value: Tensor,
    logits: Tensor,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Outlook attention (Yuan et al., arXiv 2106.13112, eq. 3 to 5).

    Each window :math:`(i, j)` holds the :math:`K^2` values

    .. math:: V_{ij}[a, b] = value[s i + a - p,\; s j + b - p], \qquad 0 \le a, b < K \quad\text{(zero outside the grid)},

    mixes them with the softmax of its own :math:`K^2 \times K^2` logits, and adds the result to the same places:

    .. math:: Y[y, x] = \sum_{i, j, a, b \,:\, (s i + a - p,\, s j + b - p) = (y, x)} \big(\mathrm{softmax}(scale \cdot A_{ij})\, V_{ij}\big)[a, b].

    Values outside the grid are zero but take part in the softmax, as in the original code.

    Args:
        value: [B, H, W, heads, head_dim], float64, float32, bfloat16 or float16; any strides.
        logits: [B, h, w, heads, K*K, K*K] before the softmax, which runs over the last dimension (key offset); the one
            before it is the query offset, both row by row. h = floor((H + 2 padding - K) / stride) + 1, w likewise.
            Same dtype and device as `value`. Both are usually views of Linear outputs.
        kernel_size: K, the side of a window, in tokens.
        stride: tokens from one window to the next.
        padding: tokens by which the first window reaches over the edge; less than `kernel_size`.
        scale: factor on the logits; head_dim ** -0.5 if None.
        backend: "auto" takes the fastest backend that supports the call; a name takes that one or fails.

    Returns:
        [B, H, W, heads, head_dim] in the dtype of `value`. Differentiable with respect to both inputs.

    Under autocast both inputs are cast to the autocast dtype (float64 is not); sums run in float32 inside the fused backends.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown backend, or a named backend that
            does not support these inputs (the message says why).
    """
    if value.dim() != 5 or logits.dim() != 6:
        raise ValueError(
            f"value is [B, H, W, heads, head_dim] and logits [B, h, w, heads, K*K, K*K]; given: value {tuple(value.shape)}, logits {tuple(logits.shape)}"
        )
    if kernel_size < 1 or stride < 1 or not 0 <= padding < kernel_size:
        raise ValueError(
            f"kernel_size and stride are at least 1 and padding is in 0..kernel_size-1; given: kernel_size={kernel_size}, stride={stride}, padding={padding}"
        )
    B, H, W, heads, head_dim = value.shape
    h, w = window_grid(H, W, kernel_size, stride, padding)
    expected = (B, h, w, heads, kernel_size**2, kernel_size**2)
    if h < 1 or w < 1:
        raise ValueError(
            f"a {H} x {W} token grid with padding {padding} is smaller than one {kernel_size} x {kernel_size} window; use a larger input or a smaller kernel"
        )
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"logits must be {expected} (B, h, w, heads, K*K, K*K) for value {tuple(value.shape)}, kernel_size={kernel_size}, "
            f"stride={stride}, padding={padding}; given: {tuple(logits.shape)}"
        )
    if value.device != logits.device:
        raise ValueError(f"value and logits must be on one device; given: {value.device} and {logits.device}")
    # The meta device has no autocast to ask, and autocast leaves float64 alone.
    autocasts = value.device.type != "meta" and value.dtype != torch.float64
    if autocasts and torch.is_autocast_enabled(value.device.type):
        dtype = torch.get_autocast_dtype(value.device.type)
        value, logits = value.to(dtype), logits.to(dtype)
    if value.dtype != logits.dtype or value.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"value and logits must share one of {', '.join(str(d).removeprefix('torch.') for d in SUPPORTED_DTYPES)}; given: {str(value.dtype).removeprefix('torch.')} and {str(logits.dtype).removeprefix('torch.')}"
        )
    chosen = choose_backend(value, logits, kernel_size, stride, padding, backend)
    return chosen.run(value, logits, kernel_size, stride, padding, head_dim**-0.5 if scale is None else scale)


def choose_backend(
    value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, backend: str = "auto"
) -> Backend:
    """The backend that `outlook_attention` would use for these inputs; raises ValueError like it."""
    if backend != "auto":
        for candidate in _backends:
            if candidate.name == backend:
                reason = candidate.why_not(value, logits, kernel_size, stride, padding)
                if reason is not None:
                    raise ValueError(f"backend {backend!r} does not support this call: {reason}")
                return candidate
        raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(b.name for b in _backends)}")
    reasons: list[str] = []
    for candidate in _backends:
        reason = candidate.why_not(value, logits, kernel_size, stride, padding)
        if reason is None:
            if candidate is REFERENCE and reasons and not torch.compiler.is_compiling():
                _report_fallback(tuple(reasons))
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise AssertionError("the reference backend supports every input")


def _report_fallback(reasons: tuple[str, ...]) -> None:
    if reasons not in _reported_fallbacks:
        _reported_fallbacks.add(reasons)
        logger.info("outlook attention runs on the reference backend (%s)", "; ".join(reasons))
