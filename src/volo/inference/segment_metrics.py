"""How good a segmentation is: sums over pixels that grow with the number of classes, not with the data."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from volo.data.mask_values import IGNORE

BOUNDARY_SHARE = 0.02
"""Width of the boundary band as a share of the image's diagonal (Boundary IoU, arXiv 2103.16562)."""


class SegmentationMetrics:
    """Add up batches with `update`, processes with `merge`, and read the figures with `compute`.

    Args:
        num_classes: K.
        device: where the sums are kept, that of the predictions.
        boundary: score the bands along boundaries as well.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", boundary: bool = True) -> None:
        self.num_classes, self.boundary = num_classes, boundary
        K = num_classes
        self._confusion = torch.zeros(K, K, dtype=torch.int64, device=device)
        self._bands = torch.zeros(3, K, dtype=torch.int64, device=device)  # of truth, of prediction, of both
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)
        self._has_loss = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, predicted: Tensor, target: Tensor, loss: Tensor | None = None) -> None:
        """Add a batch: classes [B, H, W] of any integer type, `target` with 255 for void; `loss`: summed over its pixels.

        Raises ValueError for shapes that differ, and for values that are no class (looked at on the CPU only, where that
        does not stall a GPU).
        """
        K = self.num_classes
        if predicted.shape != target.shape or predicted.dim() != 3:
            raise ValueError(
                f"predictions and targets are [B, H, W]; given: {tuple(predicted.shape)} and {tuple(target.shape)}"
            )
        if not target.numel():
            return
        predicted, target = predicted.to(self._confusion.device).long(), target.to(self._confusion.device).long()
        counts = target != IGNORE
        if target.device.type == "cpu":
            strange = counts & ((target < 0) | (target >= K))
            if strange.any() or int(predicted.min()) < 0 or int(predicted.max()) >= K:
                raise ValueError(
                    f"classes are 0 to {K - 1}, void {IGNORE}; given: targets up to {int(target[counts].max())}, predictions from "
                    f"{int(predicted.min())} to {int(predicted.max())}"
                )
        # One bin more takes the void; masks would make the number of pixels, and so the speed on a GPU, depend on values.
        pairs = torch.where(counts, target * K + predicted, K * K)
        self._confusion += torch.bincount(pairs.flatten(), minlength=K * K + 1)[: K * K].view(K, K)
        self._count += len(target)
        if loss is not None:
            self._loss += loss.to(self._loss)
            self._has_loss += 1
        if self.boundary:
            seen = torch.where(counts, predicted, IGNORE)
            band_truth, band_seen = boundary_band(target) & counts, boundary_band(seen) & counts
            for row, (band, labels) in enumerate(
                ((band_truth, target), (band_seen, seen), (band_truth & band_seen & (target == seen), target))
            ):
                bins = torch.where(band, labels, K)
                self._bands[row] += torch.bincount(bins.flatten(), minlength=K + 1)[:K]

    def merge(self) -> None:
        """Add up the sums of all processes (every rank calls this once); nothing happens outside torch.distributed."""
        if dist.is_available() and dist.is_initialized():
            for total in (self._confusion, self._bands, self._count, self._loss, self._has_loss):
                dist.all_reduce(total)

    def compute(self) -> dict[str, Any]:
        """Figures as plain numbers and lists, shares in 0..1.

        Keys: count (images); miou (mean over the classes that occur in truth or prediction); pixel_accuracy;
        mean_class_accuracy (over the classes that occur in the truth); boundary_iou (mean over classes that have a
        boundary; absent if not asked for); loss (mean negative log-likelihood of a pixel; absent if never given);
        per_class_iou, per_class_accuracy, per_class_boundary_iou ([K], None where a class does not occur); confusion
        ([K][K] pixels, rows: truth). Raises ValueError if no pixel with a class was seen.
        """
        confusion = self._confusion.cpu()
        pixels = int(confusion.sum())
        if not pixels:
            raise ValueError("no pixel with a class was evaluated: the data is empty, or all of it is void")
        hits = confusion.diagonal().double()
        truth, predicted = confusion.sum(1).double(), confusion.sum(0).double()
        iou, accuracy = hits / (truth + predicted - hits), hits / truth  # 0 / 0 is NaN: the class does not occur
        figures: dict[str, Any] = {
            "count": int(self._count),
            "miou": float(iou.nanmean()),
            "pixel_accuracy": float(hits.sum() / pixels),
            "mean_class_accuracy": float(accuracy.nanmean()),
        }
        if self.boundary:
            bands = self._bands.cpu().double()
            boundary_iou = bands[2] / (bands[0] + bands[1] - bands[2])
            mean = float(boundary_iou.nanmean())
            figures["boundary_iou"] = 0.0 if math.isnan(mean) else mean
        if int(self._has_loss):
            figures["loss"] = float(self._loss) / pixels
        figures |= {"per_class_iou": _known(iou), "per_class_accuracy": _known(accuracy)}
        if self.boundary:
            figures["per_class_boundary_iou"] = _known(boundary_iou)
        return {**figures, "confusion": confusion.tolist()}


def boundary_band(labels: Tensor) -> Tensor:
    """Pixels near where a class ends: bool [B, H, W] from labels [B, H, W].

    A pixel belongs to the band if a square window around it, reaching 2 % of the diagonal to each side, holds another
    label or leaves the image: what erosion with that window takes away from the mask of its class (arXiv 2103.16562).
    """
    H, W = labels.shape[-2:]
    reach = max(1, round(BOUNDARY_SHARE * math.hypot(H, W)))
    side = 2 * reach + 1
    padded = F.pad(labels.float()[:, None], (reach,) * 4, value=-1.0)

    def highest(x: Tensor) -> Tensor:
        return F.max_pool2d(F.max_pool2d(x, (side, 1), stride=1), (1, side), stride=1)

    return (highest(padded) != -highest(-padded))[:, 0]


def _known(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
