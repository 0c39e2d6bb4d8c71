"""Logits of images that are too large for one pass, or should not be seen in one: overlapping windows, scales, flips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_ROWS = 32
"""Rows of logits that are handed out at once: with many classes even these are large."""

Pixels = Callable[[Tensor], Tensor]
"""uint8 [B, 3, h, w] -> float, normalised: a `PixelPipeline` in eval mode."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First positions of windows that cover `length`, the last one moved back to end with it (mmsegmentation's rule)."""
    if not 0 < stride <= window:
        raise ValueError(f"the stride is from 1 to the window; given: window {window}, stride {stride}")
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


def window_logits(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    *,
    pixels: Pixels | None = None,
    smooth: bool = False,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Logits of whole images from overlapping windows, as strips from top to bottom: (first row, [B, K, rows, W]).

    Where windows overlap their logits are averaged: evenly, or with `smooth` by weights that rise from the edge of a
    window to its inside, so that no seams show. A strip is handed out, as float32 on `device`, as soon as no window to
    come touches it: memory grows with one row of windows, not with the height of the image. An image no larger than
    the window is passed whole.

    Args:
        model: images -> logits [b, K, h, w], in eval mode.
        images: [B, 3, H, W]; uint8 with `pixels`, which normalises each window, else floats as the model takes them.
        window, stride: (height, width) in pixels.
        batch_size: windows that pass the model at once (at least B).
        device: of the model; None: that of the images.
        on_window: called with (windows done, windows in all).
    """
    B, _, H, W = images.shape
    device = torch.device(device) if device is not None else images.device
    size = (min(window[0], H), min(window[1], W))
    tops, lefts = (window_starts(length, part, min(step, part)) for length, part, step in zip((H, W), size, stride))
    rise = [_ramp(part, part - min(step, part), smooth) for part, step in zip(size, stride)]
    weight = (rise[0][:, None] * rise[1]).to(device)
    total = len(tops) * len(lefts)
    at_once = max(1, batch_size // B)
    sums: Tensor | None = None  # [B, K, rows, W] of the rows from `first` on
    weights = torch.zeros(size[0], W, device=device)
    first, done = 0, 0
    for row, top in enumerate(tops):
        for start in range(0, len(lefts), at_once):
            chunk = lefts[start : start + at_once]
            crops = torch.cat([images[:, :, top : top + size[0], left : left + size[1]] for left in chunk])
            crops = crops.to(device, non_blocking=True)
            logits = model(crops if pixels is None else pixels(crops)).float()
            if total == 1:
                if on_window:
                    on_window(1, 1)
                yield 0, logits
                return
            if sums is None:
                sums = torch.zeros(B, logits.shape[1], size[0], W, device=device)
            for left, part in zip(chunk, logits.split(B)):
                sums[..., left : left + size[1]].addcmul_(part, weight)
                weights[:, left : left + size[1]] += weight
                done += 1
                if on_window:
                    on_window(done, total)
            del logits, part
        assert sums is not None
        below = tops[row + 1] if row + 1 < len(tops) else first + size[0]
        ready = below - first
        for start in range(0, ready, STRIP_ROWS):
            rows = slice(start, min(start + STRIP_ROWS, ready))
            yield first + start, sums[:, :, rows] / weights[rows]
        # The rows that windows to come touch as well move up, in place: there is never more than one row of windows.
        kept = size[0] - ready
        for total_of in (sums, weights[None, None]):
            below_them = total_of[:, :, ready:]
            total_of[:, :, :kept].copy_(below_them if ready >= kept else below_them.clone())
            total_of[:, :, kept:].zero_()
        first = below


def _ramp(length: int, overlap: int, smooth: bool) -> Tensor:
    """Weights along one side of a window: even, or rising over the overlap at both ends; never 0."""
    weight = torch.ones(length)
    if smooth and overlap:
        position = torch.arange(length, dtype=torch.float32)
        edge = torch.minimum(position, length - 1 - position) + 0.5
        weight = torch.sin((edge / min(overlap, length / 2)).clamp(max=1.0) * (math.pi / 2)).square().clamp(min=1e-3)
    return weight


def whole_logits(model: Callable[[Tensor], Tensor], images: Tensor, **options: object) -> Tensor:
    """`window_logits` put together: [B, K, H, W]."""
    return torch.cat([strip for _, strip in window_logits(model, images, **options)], dim=2)  # type: ignore[arg-type]


def resized_strips(
    strips: Iterable[tuple[int, Tensor]], height: int, size: tuple[int, int], rows: int = STRIP_ROWS
) -> Iterator[tuple[int, Tensor]]:
    """Logits bilinearly at `size`, as `F.interpolate` does, in strips of so many rows: (first row, [B, K, rows, W]).

    strips: of `height` rows together, from top to bottom, as `window_logits` hands them out. No more of them are held at
    once than a strip of the result is made of.
    """
    H, W = size
    coming = iter(strips)
    first, held = next(coming)
    for top in range(0, H, rows):
        y = torch.arange(top, min(top + rows, H), device=held.device, dtype=torch.float32)
        source = ((y + 0.5) * (height / H) - 0.5).clamp(0, height - 1)
        above = source.floor().long()
        below = (above + 1).clamp(max=height - 1)
        while first + held.shape[2] <= int(below[-1]):
            done = min(max(0, int(above[0]) - first), held.shape[2])
            held = torch.cat([held[:, :, done:], next(coming)[1]], dim=2)
            first += done
        part = torch.lerp(held[:, :, above - first], held[:, :, below - first], (source - above)[:, None])
        yield top, F.interpolate(part, size=(len(y), W), mode="bilinear", align_corners=False)


def multi_scale_log_probs(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, size: tuple[int, int], scales: Sequence[float], flip: bool
) -> Tensor:
    """Log of the probabilities, averaged over scaled and mirrored images: [B, K, *size] from float images [B, 3, h, w].

    A single scale without flip gives `logits_of(images)` at `size`, in log-probabilities.
    """
    total: Tensor | None = None
    views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
    for scale, mirrored in views:
        scaled = images
        if scale != 1.0:
            shape = [max(1, round(side * scale)) for side in images.shape[-2:]]
            scaled = F.interpolate(images, size=shape, mode="bilinear", antialias=scale < 1, align_corners=False)
        logits = logits_of(scaled.flip(-1) if mirrored else scaled)
        logits = logits.flip(-1) if mirrored else logits
        if tuple(logits.shape[-2:]) != tuple(size):
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        if len(views) == 1:
            return logits.float().log_softmax(1)
        share = logits.float().softmax(1) / len(views)
        total = share if total is None else total + share
    assert total is not None
    # Rounded to 0, a probability would have an infinite logarithm.
    return total.clamp_min_(torch.finfo(total.dtype).tiny).log_()
