"""Decoders that turn the feature maps of a backbone into a map of class logits: UPerNet's, a light one, an auxiliary.

UPerNet is Xiao et al., arXiv 1807.10221. Structure and parameter names of `UPerHead` and `FCNHead` are those of
mmsegmentation's classes of these names, so that its weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PYRAMID_STRIDES = (4, 8, 16, 32)
"""Pixels of the image between two positions of each level that decoders are given."""


class ConvModule(nn.Module):
    """Convolution that keeps the size, BatchNorm, ReLU: [B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class AdaptivePool(nn.Module):
    """`nn.AdaptiveAvgPool2d(scale)`: [B, C, H, W] -> [B, C, scale, scale].

    As two products with matrices of zeros and ones, whose gradient is the same in every run; that of torch's module is
    not on a GPU.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._members(size, x) for size in x.shape[-2:])  # [scale, H], [scale, W]
        count = rows.sum(1, dtype=torch.float32)[:, None] * columns.sum(1, dtype=torch.float32)
        return (rows @ x @ columns.T / count).to(x.dtype)

    def _members(self, size: int, like: Tensor) -> Tensor:
        """[scale, size]: 1 where a position belongs to a bin; bins overlap where `scale` does not divide `size`."""
        position, i = torch.arange(size, device=like.device), torch.arange(self.scale, device=like.device)[:, None]
        low, high = i * size // self.scale, ((i + 1) * size + self.scale - 1) // self.scale
        return ((position >= low) & (position < high)).to(like.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class PyramidNeck(nn.Module):
    """Maps of a VOLO, [B, C, H / stride, W / stride] each, to a pyramid of strides 4, 8, 16, 32 of the same channels.

    Each level is one of the maps, normalised over channels, then enlarged by transposed convolutions (2x2, stride 2) or
    shrunk by max pooling, as for plain vision transformers (BEiT, arXiv 2106.08254, appendix).

    Args:
        in_channels: channels of the four maps.
        strides: their strides, powers of two.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=norm_eps) for channels in in_channels)
        self.scalers = nn.ModuleList(
            self._scaler(channels, stride, wanted)
            for channels, stride, wanted in zip(in_channels, strides, PYRAMID_STRIDES, strict=True)
        )

    @staticmethod
    def _scaler(channels: int, stride: int, wanted: int) -> nn.Module:
        if stride <= wanted:
            factor = wanted // stride
            return nn.MaxPool2d(factor, factor, ceil_mode=True) if factor > 1 else nn.Identity()
        layers: list[nn.Module] = []
        while stride > wanted:
            if layers:
                layers += [nn.BatchNorm2d(channels), nn.GELU()]
            layers.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
            stride //= 2
        return nn.Sequential(*layers)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        normed = (norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps))
        return [scaler(x) for scaler, x in zip(self.scalers, normed)]


class UPerHead(nn.Module):
    """UPerNet's decoder: pyramid of four maps [B, C_i, H_i, W_i], finest first -> logits [B, num_classes, H_0, W_0].

    The coarsest map passes pyramid pooling (PPM), its answer goes down the lateral path, and the four maps that come
    out are fused at the size of the finest.

    Raises ValueError in training on a batch of one image, whose 1 x 1 bin has no statistics for BatchNorm.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        *fine, coarse = in_channels
        self.pool_scales = tuple(pool_scales)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(AdaptivePool(scale), ConvModule(coarse, channels, 1)) for scale in self.pool_scales
        )
        self.bottleneck = ConvModule(coarse + len(self.pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in fine)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in fine)
        self.fpn_bottleneck = ConvModule(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        laterals.append(self._pool_pyramid(maps[-1]))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resize_to(laterals[i], laterals[i - 1])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)] + [laterals[-1]]
        fused = self.fpn_bottleneck(torch.cat([resize_to(x, outs[0]) for x in outs], dim=1))
        return self.conv_seg(self.dropout(fused))

    def _pool_pyramid(self, x: Tensor) -> Tensor:
        bn = self.bottleneck.bn
        if bn.training and len(x) == 1 and 1 in self.pool_scales and not isinstance(bn, nn.SyncBatchNorm):
            raise ValueError(
                "UPerNet's pyramid pooling has a bin that holds one value for each image, so BatchNorm needs at least two "
                "images a micro batch. Use larger micro batches (a larger batch or fewer accumulation steps), "
                "train.batch_norm 'sync' with several GPUs, or the fpn head"
            )
        pooled = [resize_to(module(x), x) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class FPNHead(nn.Module):
    """A light decoder after Panoptic FPN (Kirillov et al., arXiv 1901.02446): pyramid -> logits [B, K, H_0, W_0].

    1x1 laterals are added from coarse to fine; one 3x3 convolution a level, resized to the finest and summed.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resize_to(laterals[i], laterals[i - 1])
        outs = [resize_to(conv(x), laterals[0]) for conv, x in zip(self.fpn_convs, laterals)]
        return self.conv_seg(self.dropout(sum(outs[1:], outs[0])))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier on one map: [B, C, H, W] -> logits [B, num_classes, H, W]."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def resize_to(x: Tensor, target: Tensor) -> Tensor:
    """`x` [B, C, h, w] bilinearly at height and width of `target`, pixel centres aligned as images are resized."""
    if x.shape[-2:] == target.shape[-2:]:
        return x
    return F.interpolate(x, size=target.shape[-2:], mode="bilinear", align_corners=False)
