"""Token labeling (arXiv 2104.10858): every token has a soft label of its own, besides the class token's.

Targets, losses and the task live here; generating label maps and moving them along with the images belongs to
`volo.data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from volo.config import AugmentConfig, LossConfig, TokenLabelConfig
from volo.models.volo import VOLO
from volo.tasks.mixing import mix_targets, mix_token, smooth_one_hot, soft_cross_entropy


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

    @classmethod
    def from_annotation(
        cls, truth: Tensor, class_logits: Tensor, token_logits: Tensor, smoothing: float
    ) -> TokenLabelTargets:
        """From smoothed truth [B, K] and an annotator's logits for the crop [B, K] and each token [B, N, K].

        The original's smoothing, s: softmax * (1 - s + s / K) + s / K. That is its rule for one-hot labels, applied to
        soft ones, whose mass becomes 1 + s / K.
        """
        off = smoothing / truth.shape[-1]

        def smoothed(logits: Tensor) -> Tensor:
            return logits.float().softmax(dim=-1) * (1.0 - smoothing + off) + off

        return cls(truth, smoothed(class_logits), smoothed(token_logits))

    @classmethod
    def from_label(cls, label: Tensor, num_tokens: int) -> TokenLabelTargets:
        """An image's own label [B, K] for the class token and every other: the original's fallback without maps."""
        return cls(label, label, label[:, None].expand(-1, num_tokens, -1))


def token_label_loss(
    class_logits: Tensor,
    token_logits: Tensor,
    targets: TokenLabelTargets,
    *,
    lam: Tensor | float = 1.0,
    cls_weight: float = 1.0,
    dense_weight: float = 0.5,
    ground_truth: bool | Literal["only"] = False,
) -> Tensor:
    """cls_weight * class loss + dense_weight * mean token loss (VOLO, section 4.1).

    Args:
        class_logits: [B, K].
        token_logits: [B, N, K], put back to their own images (`restore_tokens`).
        targets: class and token targets.
        lam: share of each image's own fine tokens; the rest came from the mirrored place in the batch (MixToken).
        ground_truth: True: mix the truth into the class label, as fine-tuning does: r * label + (1 - r) * truth with
            r = 0.5 where both have the same top class, else 0.9. "only": r = 0 (ours, for annotators that are often wrong).
    """
    class_target = targets.truth if ground_truth == "only" else targets.class_label
    if ground_truth is True:
        agrees = targets.truth.argmax(-1, keepdim=True) == class_target.argmax(-1, keepdim=True)
        share = torch.where(agrees, 0.5, 0.9).to(class_target.dtype)
        class_target = share * class_target + (1.0 - share) * targets.truth
    class_target = mix_targets(class_target, lam)
    return cls_weight * soft_cross_entropy(class_logits, class_target) + dense_weight * soft_cross_entropy(
        token_logits, targets.token_labels
    )


class TokenLabelTask(nn.Module):
    """A VOLO and token labeling: `forward(batch) -> {"loss", "output", "class_logits", "token_logits"}`.

    batch: "image" float [B, in_chans, H, W], normalised; "target" int64 [B] or soft targets [B, K]; and what an annotator
    says of the images, "class_annotation" [B, K] and "token_annotation" [B, N, K] (logits; N = H * W / 256 for D1-D5).
    Without an annotation every token's target is the image's own label.
    Returned: "loss", a scalar; "output", the logits [B, K] of `model.forward`, of the mixed images in training;
    "class_logits" [B, K]; "token_logits" [B, N, K], put back to their own images. Without "target" in the batch there
    is "output" alone.

    In training mode tokens are mixed as `augment.mix_token` says. In eval mode the loss is the cross-entropy of the
    output, as for `ClassifyTask`.
    """

    def __init__(
        self,
        model: VOLO,
        loss: LossConfig | None = None,
        augment: AugmentConfig | None = None,
        token_label: TokenLabelConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss or LossConfig()
        self.augment = augment or AugmentConfig()
        self.token_label = token_label or TokenLabelConfig()
        if self.augment.mixup or self.augment.cutmix:
            raise ValueError(
                "token labels belong to tokens, which mixup and cutmix would blend: use augment.mix_token, or train with plain "
                f"labels (task 'classify'). Given: mixup={self.augment.mixup}, cutmix={self.augment.cutmix}"
            )
        if model.num_classes == 0:
            raise ValueError(
                "token labeling needs a model with heads; num_classes is 0. Call model.reset_classifier(n)"
            )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, images, config = self.model, batch["image"], self.token_label
        if "target" not in batch:
            return {"output": model(images)}
        smoothing = self.loss.label_smoothing if self.training else 0.0
        truth = smooth_one_hot(batch["target"], model.num_classes, smoothing)
        mixed = mix_token(model, images, self.augment.mix_token if self.training else 0.0)
        if not self.training:
            loss = soft_cross_entropy(mixed.output, truth)
        else:
            if "token_annotation" in batch:
                targets = TokenLabelTargets.from_annotation(
                    truth, batch["class_annotation"], batch["token_annotation"], smoothing
                )
            else:
                targets = TokenLabelTargets.from_label(truth, mixed.token_logits.shape[1])
            loss = token_label_loss(
                mixed.class_logits,
                mixed.token_logits,
                targets,
                lam=mixed.lam,
                cls_weight=config.cls_weight,
                dense_weight=config.dense_weight,
                ground_truth=config.ground_truth,
            )
        return {
            "loss": loss,
            "output": mixed.output,
            "class_logits": mixed.class_logits,
            "token_logits": mixed.token_logits,
        }
