"""How good predictions are: top-1, top-5, mean class accuracy, calibration, confusion; ordinary and ReaL labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ECE_BINS = 15
# Confidences are summed as whole multiples of 2**-24: the sum is the same in any order, so for any number of ranks.
_CONFIDENCE_ONE = 2**24


class ClassificationMetrics:
    """Sums over the images seen so far; `compute` turns them into figures.

    The target of an image is one class, or a set of classes that are all right (ReaL, Beyer et al., arXiv 2006.07159);
    images with an empty set are left out, as that paper does. In the confusion matrix an image with several labels
    counts for the one that was predicted if it is among them, otherwise for the lowest.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is at least 1; given: {num_classes}")
        self.num_classes = num_classes
        self._top = torch.zeros(2, dtype=torch.int64, device=device)  # hits at 1 and at min(5, K)
        self._bins = torch.zeros(3, ECE_BINS, dtype=torch.int64, device=device)  # images, hits, sum of confidences
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [truth, prediction]
        # Apple's GPUs have no float64.
        float_type = torch.float32 if self._top.device.type == "mps" else torch.float64
        self._loss = torch.zeros((), dtype=float_type, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor | Sequence[Collection[int]]) -> None:
        """Add a batch: logits [B, K] of any float dtype; target int64 [B], or B collections of right classes.

        Raises ValueError for shapes that do not fit and for classes outside 0..K-1 (checked on the CPU only where
        looking at them does not stall a GPU).
        """
        K = self.num_classes
        if logits.dim() != 2 or logits.shape[1] != K or len(logits) != len(target):
            raise ValueError(
                f"logits are [images, {K} classes] with as many targets; given: logits {tuple(logits.shape)} "
                f"and {len(target)} targets"
            )
        logits = logits.to(self._top.device).float()
        if isinstance(target, Tensor):
            if target.device.type == "cpu" and target.numel() and not 0 <= int(target.min()) <= int(target.max()) < K:
                raise ValueError(f"classes are 0 to {K - 1}; given: {int(target.min())} to {int(target.max())}")
            right = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            right.scatter_(1, target.to(logits.device)[:, None], True)
        else:
            labelled = [i for i, labels in enumerate(target) if len(labels)]
            right = torch.zeros(len(labelled), K, dtype=torch.bool)
            for row, i in enumerate(labelled):
                labels = list(target[i])
                if not all(0 <= label < K for label in labels):
                    raise ValueError(f"classes are 0 to {K - 1}; given: {labels}")
                right[row, labels] = True
            right = right.to(logits.device)
            logits = logits[labelled]
        if not len(logits):
            return

        log_probs = logits.log_softmax(dim=1)
        self._loss -= log_probs.masked_fill(~right, -torch.inf).logsumexp(dim=1).sum()
        top_log_probs, top = log_probs.topk(min(5, K), dim=1)
        hits = right.gather(1, top)
        hit, predicted = hits[:, 0], top[:, 0]
        self._top += torch.stack([hit.sum(), hits.any(dim=1).sum()])

        truth = torch.where(hit, predicted, right.int().argmax(dim=1))
        ones = torch.ones_like(truth)
        self._confusion.view(-1).index_add_(0, truth * K + predicted, ones)

        # A NaN goes to the lowest bin with confidence 0; the loss, which keeps it, tells of it.
        confidence = top_log_probs[:, 0].exp().nan_to_num(0.0)
        bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
        for row, values in enumerate((ones, hit.long(), (confidence * _CONFIDENCE_ONE).round().long())):
            self._bins[row].index_add_(0, bins, values)

    def merge(self) -> None:
        """Add up the sums of all processes (every rank calls this once); nothing happens outside torch.distributed."""
        if dist.is_available() and dist.is_initialized():
            for total in (self._top, self._bins, self._confusion, self._loss):
                dist.all_reduce(total)

    def compute(self) -> dict[str, Any]:
        """Figures as plain numbers and lists, accuracies as shares in 0..1.

        Keys: count (images); top1; top5 (top-K for K < 5); mean_class_accuracy (over the classes that have images);
        ece (expected calibration error, 15 bins of equal width, Guo et al., arXiv 1706.04599); loss (mean negative
        log-likelihood); per_class_accuracy ([K], None for a class without images); confusion ([K][K], rows: truth).
        Raises ValueError if no image was seen.
        """
        count = int(self._bins[0].sum())
        if count == 0:
            raise ValueError("no labelled images were evaluated: the data is empty, or none of it has a label")
        confusion = self._confusion.cpu()
        per_class = confusion.diagonal().double() / confusion.sum(dim=1)  # NaN where a class has no images
        bins = self._bins.cpu().double()
        ece = (bins[1] - bins[2] / _CONFIDENCE_ONE).abs().sum() / count
        return {
            "count": count,
            "top1": int(self._top[0]) / count,
            "top5": int(self._top[1]) / count,
            "mean_class_accuracy": float(per_class.nanmean()),
            "ece": float(ece),
            "loss": float(self._loss) / count,
            "per_class_accuracy": [None if value != value else value for value in per_class.tolist()],
            "confusion": confusion.tolist(),
        }
