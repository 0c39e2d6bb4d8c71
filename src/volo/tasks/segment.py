"""Semantic segmentation: cross-entropy of every pixel that is not void, and of the auxiliary head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.config import SegmentConfig
from volo.data.mask_values import IGNORE


class SegmentTask(nn.Module):
    """A segmentation model and what it is trained for: `forward(batch) -> {"loss", "output"}`.

    batch: "image" float [B, in_chans, H, W], normalised; "target" int64 [B, H, W], classes and 255 for void.
    Returned: "output", the logits [B, K, H, W] of `model.forward`; and with "target" in the batch "loss", a scalar, and
    "weight", the share of the pixels that it is the mean of: 0 to 1. Means over parts of a batch, weighted by it, add up
    to the mean over the whole.

    Left out are void pixels, and in training with `segment.ohem` those that are not hard for `model.forward`.

    `model` is a `volo.Segmenter`, or any module with `forward(images)` that gives such logits; where it has
    `forward_with_aux` the auxiliary logits are trained too. `class_weights`: K factors of the pixels' losses.
    """

    class_weights: Tensor | None

    def __init__(
        self, model: nn.Module, segment: SegmentConfig | None = None, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.segment = segment or SegmentConfig()
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "target" not in batch:
            return {"output": self.model(batch["image"])}
        with_aux = getattr(self.model, "forward_with_aux", None) if self.training else None
        output, aux = with_aux(batch["image"]) if with_aux else (self.model(batch["image"]), None)
        truth = batch["target"].flatten(1)
        losses = _pixel_losses(output, truth)
        counts = (truth != IGNORE).float()
        if self.training and self.segment.ohem:
            counts = counts * hard_pixels(losses.detach(), counts, self.segment.ohem, self.segment.ohem_min_kept)
        if aux is not None:
            losses = losses + self.segment.aux_weight * _pixel_losses(aux, truth)
        if self.class_weights is not None:
            losses = losses * F.pad(self.class_weights, (0, IGNORE + 1 - len(self.class_weights)))[truth]
        loss = (losses * counts).sum() / counts.sum().clamp(min=1.0)
        return {"loss": loss, "weight": counts.mean(), "output": output}


def _pixel_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of each pixel in float32, [B, H * W], 0 where it is void; from [B, K, H, W] and [B, H * W]."""
    # Pixels by the row: the loss over [B, K, H, W] has no deterministic kernel on GPUs.
    flat = logits.permute(0, 2, 3, 1).flatten(0, 2).float()
    return F.cross_entropy(flat, truth.flatten(), reduction="none", ignore_index=IGNORE).view_as(truth)


def hard_pixels(losses: Tensor, counts: Tensor, threshold: float, min_kept: int) -> Tensor:
    """1.0 for the pixels of online hard example mining, else 0.0; all [B, N].

    Kept are pixels whose true class has a probability below `threshold`, but at least the `min_kept` hardest of each
    image (Shrivastava et al., arXiv 1604.03540; for pixels as in mmsegmentation, which counts them over a batch: here no
    image's pixels depend on which others it shares a micro batch with). `counts`: 0.0 for void.
    """
    probability = torch.where(counts > 0, torch.exp(-losses), torch.inf)
    # Infinite where fewer pixels are not void.
    kth = probability.kthvalue(min(min_kept, losses.shape[-1]), dim=-1, keepdim=True).values
    return (probability <= kth.clamp(min=threshold)).float()


def class_weights(pixel_counts: Sequence[int], kind: str) -> list[float] | None:
    """Weights of K classes with so many training pixels, their mean 1; None for `kind` "none".

    "median": median share / share (arXiv 1411.4734); "log": 1 / ln(1.02 + share) (arXiv 1606.02147). A class without
    pixels weighs 1: it does not occur.
    """
    if kind == "none":
        return None
    counts = torch.tensor(list(pixel_counts), dtype=torch.float64)
    share = counts / counts.sum().clamp(min=1)
    seen = share > 0
    if not seen.any():
        return [1.0] * len(counts)
    weights = torch.ones_like(share)
    weights[seen] = share[seen].median() / share[seen] if kind == "median" else 1 / torch.log(1.02 + share[seen])
    weights[seen] /= weights[seen].mean()
    return weights.tolist()
