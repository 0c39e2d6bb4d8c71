"""Classification with one label an image: mixing, loss, and the logits that metrics are made of."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from volo.config import AugmentConfig, LossConfig
from volo.models.volo import VOLO
from volo.tasks.mixing import mix_pixels, mix_targets, mix_token, smooth_one_hot, soft_cross_entropy
from volo.tasks.token_label import TokenLabelTargets, token_label_loss


class ClassifyTask(nn.Module):
    """A classifier and what it is trained for: `forward(batch) -> {"loss", "output"}`.

    model: a VOLO, or any module with `num_classes` that makes logits [B, K] of images, for what needs no tokens.

    batch: "image" float [B, in_chans, H, W], normalised; "target" int64 [B] or soft targets [B, K].
    Returned: "loss", a scalar (without "target" in the batch there is none); "output", the logits [B, K] of
    `model.forward`, of the mixed images where the batch was mixed.

    In training mode images are mixed by mixup and CutMix (on pixels) or by MixToken (on fine tokens), as `augment`
    says. With `loss.token_weight` the aux head learns the image's own label at every token, and the class head is
    trained by itself, as in token labeling (`TokenLabelTask`, whose loss it is); without it the cross-entropy is that of
    the joined logits.
    """

    def __init__(self, model: nn.Module, loss: LossConfig | None = None, augment: AugmentConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss or LossConfig()
        self.augment = augment or AugmentConfig()
        if self.augment.mix_token and (self.augment.mixup or self.augment.cutmix):
            raise ValueError(
                f"mix_token mixes tokens and mixup / cutmix mix pixels: choose one. Given: mix_token={self.augment.mix_token}, "
                f"mixup={self.augment.mixup}, cutmix={self.augment.cutmix}"
            )
        self.trains_tokens = self.augment.mix_token > 0 or self.loss.token_weight > 0
        if self.trains_tokens and not isinstance(model, VOLO):
            raise ValueError(
                f"loss.token_weight and augment.mix_token are about the tokens of a VOLO, and the model is a "
                f"{type(model).__name__}: set both to 0. Given: token_weight={self.loss.token_weight}, "
                f"mix_token={self.augment.mix_token}"
            )
        self.num_classes = cast(int, model.num_classes)
        if self.num_classes == 0:
            raise ValueError(
                "classification needs a model with a head; num_classes is 0. Call model.reset_classifier(n)"
            )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, images = self.model, batch["image"]
        if "target" not in batch:
            return {"output": model(images)}
        smoothing = self.loss.label_smoothing if self.training else 0.0
        target = smooth_one_hot(batch["target"], self.num_classes, smoothing)
        augment = self.augment
        if self.training and (augment.mixup > 0 or augment.cutmix > 0):
            images, target = mix_pixels(images, target, augment.mixup, augment.cutmix, augment.mix_prob)
        if not (self.training and self.trains_tokens):
            output = model(images)
            return {"loss": soft_cross_entropy(output, target), "output": output}

        mixed = mix_token(cast(VOLO, model), images, augment.mix_token)
        if self.loss.token_weight > 0:
            targets = TokenLabelTargets.from_label(target, mixed.token_logits.shape[1])
            loss = token_label_loss(
                mixed.class_logits, mixed.token_logits, targets, lam=mixed.lam, dense_weight=self.loss.token_weight
            )
        else:
            loss = soft_cross_entropy(mixed.output, mix_targets(target, mixed.lam))
        return {"loss": loss, "output": mixed.output}
