"""Token labeling (arXiv 2104.10858): every token has a soft label of its own, besides the class token's.

The losses live here; drawing label maps and cropping them along with the pictures belongs to `volo.data`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from volo.tasks.mixing import mix_targets, soft_cross_entropy


@dataclass(frozen=True)
class TokenLabelTargets:
    """What a batch is to learn, as distributions over K classes."""

    truth: Tensor
    """Ground truth, smoothed: [B, K]."""
    class_label: Tensor
    """The annotator's label of the whole crop: [B, K]."""
    token_labels: Tensor
    """The annotator's label of each token, row by row: [B, N, K]."""

    @classmethod
    def from_packed(cls, packed: Tensor) -> TokenLabelTargets:
        """From the original's layout [B, K, 2 + N]: column 0 truth, 1 class label, 2 and on token labels."""
        return cls(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2:].transpose(1, 2))


def token_label_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    targets: TokenLabelTargets,
    *,
    lam: Tensor | float = 1.0,
    cls_weight: float = 1.0,
    dense_weight: float = 0.5,
    ground_truth: bool = False,
) -> Tensor:
    """cls_weight * class loss + dense_weight * mean token loss (VOLO, section 4.1).

    Args:
        class_logits: [B, K].
        token_logits: [B, N, K], put back to their own pictures (`restore_tokens`).
        targets: class and token targets.
        lam: share of each picture's own fine tokens; the rest came from the mirrored place in the batch (MixToken).
        ground_truth: mix the truth into the class label, as fine-tuning does: r * label + (1 - r) * truth with r = 0.5
            where both have the same top class, else 0.9.
    """
    class_target = targets.class_label
    if ground_truth:
        agrees = targets.truth.argmax(-1, keepdim=True) == class_target.argmax(-1, keepdim=True)
        share = torch.where(agrees, 0.5, 0.9).to(class_target.dtype)
        class_target = share * class_target + (1.0 - share) * targets.truth
    class_target = mix_targets(class_target, lam)
    return cls_weight * soft_cross_entropy(class_logits, class_target) + dense_weight * soft_cross_entropy(
        token_logits, targets.token_labels
    )
