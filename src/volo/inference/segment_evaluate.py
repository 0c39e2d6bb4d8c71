"""Score a segmentation model on images with masks: in one piece, by windows, at several scales, mirrored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from volo.config import SegmentConfig, Size
from volo.data.mask_values import IGNORE
from volo.data.transforms import height_width
from volo.inference.evaluate import NONE, refuse_not_finite, run_over
from volo.inference.segment_metrics import SegmentationMetrics
from volo.inference.windows import multi_scale_log_probs, whole_logits

NOT_FINITE = "try --amp off or bf16 if it was fp16, else its weights are damaged or its training has diverged"
"""What to do about such answers."""


@dataclass(frozen=True)
class HowToTest:
    """What a model sees of an image."""

    window: tuple[int, int] | None = None
    """Height and width of overlapping windows; None: the whole image at once."""
    stride: tuple[int, int] | None = None
    """From window to window; None: two thirds of it."""
    scales: tuple[float, ...] = (1.0,)
    """Answers at these scales are averaged."""
    flip: bool = False
    """So are those of the mirror images."""

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales are factors above 0; given: {self.scales}")

    @classmethod
    def from_config(cls, segment: SegmentConfig, img_size: Size) -> HowToTest:
        """As a recipe says for tests during the training."""
        if segment.test == "whole":
            return cls()
        return cls.by_windows(segment.window or img_size, segment.stride)

    @classmethod
    def of_file(cls, model: object) -> HowToTest | None:
        """Windows of the only size that an exported file takes; None for what takes images of any size."""
        size = getattr(model, "size", None)
        return None if size is None else cls.by_windows(size)

    @classmethod
    def by_windows(cls, window: Size, stride: Size = 0, **options: Any) -> HowToTest:
        """Raises ValueError for a stride that leaves gaps."""
        sides = height_width(window)
        steps = height_width(stride) if stride else tuple(max(1, -(-2 * side // 3)) for side in sides)
        if min(sides) < 1 or any(not 0 < step <= side for step, side in zip(steps, sides)):
            raise ValueError(f"the stride is from 1 to the window; given: window {window}, stride {stride}")
        return cls(sides, (steps[0], steps[1]), **options)

    def __str__(self) -> str:
        how = "whole images" if self.window is None else f"windows of {_by(self.window)} every {_by(self.steps)}"
        return how + self.views

    @property
    def views(self) -> str:
        """For people: scales and mirror images, as the end of a sentence; empty for a single look."""
        scales = f", scales {', '.join(f'{scale:g}' for scale in self.scales)}" if self.scales != (1.0,) else ""
        return scales + (", mirrored too" if self.flip else "")

    @property
    def steps(self) -> tuple[int, int]:
        assert self.window is not None
        return self.stride or (max(1, self.window[0] * 2 // 3), max(1, self.window[1] * 2 // 3))


def log_probabilities(
    model: Callable[[Tensor], Tensor], images: Tensor, size: tuple[int, int], how: HowToTest, batch_size: int = 1
) -> Tensor:
    """Log-probabilities [B, K, *size] of normalised images [B, 3, h, w], as `how` says; model in eval mode."""

    def logits_of(scaled: Tensor) -> Tensor:
        if how.window is None:
            return model(scaled)
        return whole_logits(model, scaled, window=how.window, stride=how.steps, batch_size=batch_size)

    return multi_scale_log_probs(logits_of, images, size, how.scales, how.flip)


def evaluate_segmentation(
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    pixels: nn.Module,
    *,
    num_classes: int,
    device: torch.device | str,
    how: HowToTest = HowToTest(),
    amp: str = "off",
    batch_size: int = 1,
    boundary: bool = True,
    class_map: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Run `model` over `loader` once and score it at the size of the masks; it is put in eval mode and back.

    Args:
        model: images [B, 3, H, W] float -> logits [B, num_classes, H, W], already on `device`.
        loader: batches {"image": uint8 [B, 3, h, w], "mask": uint8 [B, H, W]}, a `MaskEvalLoader`.
        pixels: the data module's `PixelPipeline`, uint8 -> normalised float.
        batch_size: windows that pass the model at once.
        class_map: class of the model for each class of the data; None: they are the same.
        on_batch: called with the number of images done so far on this rank.
        strict: False lets answers that are not finite pass; then the figures mean little.

    Returns `SegmentationMetrics.compute()`, over the images of all ranks when torch.distributed is set up: then every
    rank must call this, each with its own share of the images. Raises ValueError, with the image's name, for answers that
    are not finite.
    """
    device = torch.device(device)
    metrics = SegmentationMetrics(num_classes, device, boundary)
    to_model_class = torch.arange(256)
    if class_map is not None:
        to_model_class[: len(class_map)] = torch.tensor(class_map)
    bad = torch.full((), NONE, device=device)

    def look(images: Tensor, batch: dict[str, Tensor]) -> Tensor:
        height, width = batch["mask"].shape[-2:]
        return log_probabilities(model, images, (height, width), how, batch_size)

    def add(log_probs: Tensor, batch: dict[str, Tensor]) -> None:
        target = to_model_class[batch["mask"].long()].to(device, non_blocking=True)
        # torch's loss over [B, K, H, W] has no deterministic kernel on GPUs.
        of_truth = log_probs.gather(1, target.clamp(max=num_classes - 1)[:, None])[:, 0]
        loss = -torch.where(target == IGNORE, 0.0, of_truth).sum(dtype=torch.float64)
        metrics.update(log_probs.argmax(1), target, loss)
        is_bad = log_probs.isnan().flatten(1).any(1)  # infinite ones are of probabilities that are 0
        torch.minimum(bad, batch["index"].to(device).where(is_bad, NONE).amin(), out=bad)

    run_over(loader, model, pixels, look, add, device=device, amp=amp, on_batch=on_batch)
    metrics.merge()
    result = metrics.compute()
    if strict:
        refuse_not_finite(int(bad), 0.0 if result["loss"] == result["loss"] else math.nan, loader, amp)
    return result


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
