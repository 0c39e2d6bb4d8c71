"""VOLO for semantic segmentation: the backbone of classification, a neck, a decoder, and a class for every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from volo.config import nearest
from volo.models.upernet import FCNHead, FPNHead, PyramidNeck, UPerHead
from volo.models.volo import VOLO, VOLOConfig

AUX_LEVEL = 2
"""Level of the pyramid (stride 16) that the auxiliary head reads."""


@dataclass(frozen=True)
class SegmenterConfig:
    """Everything that shapes a `Segmenter`; `segmenter_from_dict(dataclasses.asdict(model.config))` rebuilds one."""

    backbone: VOLOConfig = field(default_factory=lambda: VOLOConfig(num_classes=0, pad_input=True))
    num_classes: int = 150
    head: str = "upernet"
    """"upernet", or "fpn" for small machines."""
    channels: int = 256
    """Width of the decoder. mmsegmentation's default is 512; the nearest published recipe (LV-ViT's) takes 256."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """Bins a side of UPerNet's pyramid pooling."""
    aux_channels: int = 256
    """Width of the auxiliary head, which takes part in training only; 0: none."""
    dropout: float = 0.1
    """Of whole channels before the classifiers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool_scales", tuple(self.pool_scales))
        if self.head not in HEAD_DEFAULTS:
            raise ValueError(
                f"unknown head {self.head!r}{nearest(self.head, HEAD_DEFAULTS)} (known: {', '.join(HEAD_DEFAULTS)})"
            )
        if self.num_classes < 1 or self.channels < 1 or self.aux_channels < 0:
            raise ValueError(
                f"num_classes and channels are at least 1 and aux_channels at least 0; given: {self.num_classes}, "
                f"{self.channels} and {self.aux_channels}"
            )
        if not self.pool_scales or min(self.pool_scales) < 1:
            raise ValueError(f"pool_scales are numbers of bins, at least 1; given: {self.pool_scales}")
        if self.backbone.num_classes:
            raise ValueError(f"a backbone has no heads: num_classes is 0, not {self.backbone.num_classes}")


HEAD_DEFAULTS: dict[str, dict[str, Any]] = {
    "upernet": {"channels": 256, "aux_channels": 256},
    "fpn": {"channels": 128, "aux_channels": 0},
}


def segmenter_from_dict(values: Mapping[str, Any]) -> Segmenter:
    """The model of a configuration that went through JSON or a checkpoint, with random weights."""
    return Segmenter(SegmenterConfig(**{**values, "backbone": VOLOConfig(**values["backbone"])}))


class Segmenter(nn.Module):
    """`forward(images [B, in_chans, H, W]) -> logits [B, num_classes, H, W]`, the same in train and eval.

    Attributes:
        backbone: a `VOLO` without class attention.
        neck: its maps to strides 4, 8, 16, 32.
        decode_head: `UPerHead` or `FPNHead`.
        auxiliary_head: `FCNHead` on the level of stride 16, or None; used by `forward_logits` in training.
    """

    def __init__(self, config: SegmenterConfig = SegmenterConfig(), backbone: VOLO | None = None) -> None:
        """`backbone`: a VOLO of `config.backbone` whose weights are kept; None: a new one."""
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.backbone = backbone or VOLO(config.backbone)
        self.backbone.remove_class_attention()
        info = self.backbone.feature_info
        # The finest map, and three spread over the others: 0, 1, 2, 3 of D1 to D5, 0, 1, 1, 1 of models with two.
        self.levels = (0, *(-(-i * (len(info) - 1) // 3) for i in (1, 2, 3)))
        channels = [info[i]["num_chs"] for i in self.levels]
        self.neck = PyramidNeck(channels, [info[i]["reduction"] for i in self.levels], config.backbone.norm_eps)
        self.decode_head: nn.Module
        if config.head == "upernet":
            self.decode_head = UPerHead(
                channels, config.num_classes, config.channels, config.pool_scales, config.dropout
            )
        else:
            self.decode_head = FPNHead(channels, config.num_classes, config.channels, config.dropout)
        self.auxiliary_head: FCNHead | None = None
        if config.aux_channels:
            self.auxiliary_head = FCNHead(channels[AUX_LEVEL], config.num_classes, config.aux_channels, config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.forward_maps(images)
        return self.upsample(self.decode_head(maps), images.shape[-2:])

    def forward_with_aux(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(`forward(images)`, logits of the auxiliary head at the same size, or None where there is none)."""
        maps, size = self.forward_maps(images), images.shape[-2:]
        aux = None if self.auxiliary_head is None else self.upsample(self.auxiliary_head(maps[AUX_LEVEL]), size)
        return self.upsample(self.decode_head(maps), size), aux

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """images [B, in_chans, H, W] -> what the decoder reads: [B, C_i, H / stride, W / stride], rounded up."""
        return self.neck(self.backbone.forward_intermediates(images, self.levels, intermediates_only=True))

    def upsample(self, logits: Tensor, size: tuple[int, ...]) -> Tensor:
        """Coarse logits [B, K, h, w] to those of every pixel, [B, K, *size]; what was padded is cut off."""
        H, W = size
        m = self.config.backbone.size_multiple
        padded = (H + -H % m, W + -W % m)
        return F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., :H, :W]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block of the backbone in the backward pass instead of keeping its activations."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone (besides biases and norms)."""
        return {"backbone.pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer decay: those of the backbone; neck and heads, matching nothing, are the last one."""
        return {
            "stem": r"^backbone\.patch_embed",
            "blocks": [
                (r"^backbone\.network\.(\d+)" if coarse else r"^backbone\.network\.(\d+)\.(\d+)", None),
                (r"^backbone\.network\.1\.proj|^backbone\.pos_embed", (1,)),
            ],
        }
