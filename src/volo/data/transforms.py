"""From a decoded image to the model: uint8 transforms in the workers, then floats in `PixelPipeline`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from volo.config import AugmentConfig, DataConfig, Size, height_width
from volo.data.rand_augment import parse_rand_augment

_MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, but "random" interpolation draws bilinear or bicubic for each image."""

    def __init__(
        self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], interpolation: str
    ) -> None:
        modes = list(_MODES.values()) if interpolation == "random" else [_MODES[interpolation]]
        super().__init__(size, scale=scale, ratio=ratio, interpolation=modes[0], antialias=True)
        self.modes = modes

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return {**params, "interpolation": self.modes[int(torch.randint(len(self.modes), ()))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resized_crop(inpt, **params, size=list(self.size), antialias=True)


class ResizeAndCenterCrop(v2.Transform):
    """Scale until `size` / `crop_pct` is just covered, then cut `size` out of the centre (above 1: black is padded).

    For a square size this is timm's and the original's evaluation: the shorter side becomes floor(size / crop_pct).
    """

    # Beyond this ratio the long side is cut before scaling: the cut-off part is never seen, but could fill the memory.
    MAX_ASPECT = 32

    def __init__(self, size: Size, crop_pct: float = 1.0, interpolation: str = "bicubic") -> None:
        super().__init__()
        self.size = height_width(size)
        self.cover = tuple(math.floor(side / crop_pct) if crop_pct > 0 else 0 for side in self.size)
        if min(self.cover) < 1:
            raise ValueError(f"crop_pct is {crop_pct}; it is above 0 and usually from 0.8 to 1.15")
        self.mode = _MODES["bilinear" if interpolation == "bilinear" else "bicubic"]

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        if max(height, width) > self.MAX_ASPECT * min(height, width):
            limit = self.MAX_ASPECT * min(height, width)
            height, width = min(height, limit), min(width, limit)
            inpt = F.center_crop(inpt, [height, width])
        cover_h, cover_w = self.cover
        if cover_h * width >= cover_w * height:
            scaled = [cover_h, int(cover_h * width / height)]
        else:
            scaled = [int(cover_w * height / width), cover_w]
        return F.center_crop(F.resize(inpt, scaled, self.mode, antialias=True), list(self.size))


def eval_transform(data: DataConfig) -> Callable[[Tensor], Tensor]:
    """uint8 [..., 3, h, w] -> uint8 [..., 3, H, W] of `data.img_size`, always the same way. Raises ValueError."""
    return ResizeAndCenterCrop(data.img_size, data.crop_pct, data.interpolation)


def squash_transform(data: DataConfig) -> Callable[[Tensor], Tensor]:
    """uint8 [..., 3, h, w] -> uint8 [..., 3, H, W] of `data.img_size`: the whole image, whatever its shape."""
    mode = _MODES["bilinear" if data.interpolation == "bilinear" else "bicubic"]
    return v2.Resize(list(height_width(data.img_size)), mode, antialias=True)


def fit_transform(data: DataConfig) -> Callable[[Tensor], Tensor]:
    """uint8 [..., 3, h, w] -> uint8 [..., 3, H, W]: what a "pad" or "none" crop starts from."""
    return ResizeAndCenterCrop(data.img_size, 1.0, data.interpolation)


def train_transform(data: DataConfig, augment: AugmentConfig, *, crop_last: bool = False) -> Callable[[Tensor], Tensor]:
    """uint8 [3, h, w] -> uint8 [3, H, W] of `data.img_size`; draws from torch's CPU generator. Raises ValueError.

    crop_last: flip and RandAugment work on the whole image, as in the original tool of token labeling; else on the
    crop, as in timm, which is several times faster for photographs.
    """
    check_augment(data, augment)
    size = height_width(data.img_size)
    fit: list[nn.Module] = []
    crop: list[nn.Module] = []
    if augment.crop == "resized":
        crop.append(RandomResizedCrop(size, augment.scale, augment.ratio, data.interpolation))
    else:
        fit.append(ResizeAndCenterCrop(data.img_size, 1.0, data.interpolation))
        if augment.crop == "pad" and augment.pad:
            crop.append(v2.RandomCrop(size, padding=augment.pad, padding_mode="reflect"))
    change: list[nn.Module] = []
    if augment.hflip:
        change.append(v2.RandomHorizontalFlip(augment.hflip))
    if augment.rand_augment:
        change.append(parse_rand_augment(augment.rand_augment, fill=[round(255 * m) for m in data.mean]))
    if augment.color_jitter:
        strength = augment.color_jitter
        change.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
    steps = [*fit, *change, *crop] if crop_last else [*fit, *crop, *change]
    return v2.Compose(steps) if steps else nn.Identity()


def check_augment(data: DataConfig, augment: AugmentConfig) -> None:
    """Raise ValueError for values that contradict each other or make no sense."""
    if min(height_width(data.img_size)) < 1:
        raise ValueError(f"data.img_size is {data.img_size}; it is a side in pixels or (height, width)")
    if augment.rand_augment and augment.color_jitter:
        raise ValueError(
            "augment.rand_augment already changes colours: set augment.color_jitter to 0, or rand_augment to ''"
        )
    if augment.color_jitter < 0:
        raise ValueError(f"augment.color_jitter is {augment.color_jitter}; it is 0 (off) or a strength above")
    for name in ("hflip", "erase_prob"):
        if not 0 <= getattr(augment, name) <= 1:
            raise ValueError(f"augment.{name} is {getattr(augment, name)}; a probability is from 0 to 1")
    for name, top in (("scale", 1.0), ("erase_scale", 1.0), ("ratio", math.inf)):
        low, high = getattr(augment, name)
        if not 0 < low <= high <= top:
            raise ValueError(
                f"augment.{name} is ({low}, {high}); it is a range above 0" + (" up to 1" if top == 1 else "")
            )
    if augment.crop == "pad" and not 0 <= augment.pad < min(height_width(data.img_size)):
        raise ValueError(
            f"augment.pad is {augment.pad}; a reflected border is narrower than the image ({data.img_size} px)"
        )


class PixelPipeline(nn.Module):
    """Batches of pixels to what the model eats, on the model's device: uint8 [B, 3, H, W] -> float32 [B, 3, H, W].

    Normalises; in training mode it also erases one random rectangle in a share `erase_prob` of the images (random
    erasing, Zhong et al., arXiv 1708.04896; aspect 0.3 to 3.3), drawing from the device's global generator.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, data: DataConfig, augment: AugmentConfig | None = None) -> None:
        super().__init__()
        mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
        if not (std > 0).all():
            raise ValueError(f"data.std is {data.std}; a deviation is above 0")
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.augment = augment or AugmentConfig()

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise ValueError(f"pixels are uint8 from 0 to 255, but {images.dtype} was given")
        images = torch.addcmul(self.shift, images.to(torch.float32), self.scale)
        return self._erase(images) if self.training and self.augment.erase_prob > 0 else images

    def _erase(self, images: Tensor) -> Tensor:
        B, _, H, W = images.shape
        low, high = self.augment.erase_scale
        # Ten candidates for each image at once; the first that fits is taken, as a loop with ten tries would do.
        draws = torch.rand(2, B, 10, device=images.device)
        area = (low + (high - low) * draws[0]) * (H * W)
        aspect = torch.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * draws[1])
        heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (heights < H) & (widths < W)
        first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
        height, width = heights.gather(1, first), widths.gather(1, first)  # [B, 1]
        chance, down, right = torch.rand(3, B, 1, device=images.device)
        top, left = (down * (H - height + 1)).floor(), (right * (W - width + 1)).floor()
        rows, columns = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
        in_rows = (rows >= top) & (rows < top + height)  # [B, H]
        in_columns = (columns >= left) & (columns < left + width)  # [B, W]
        erased = (chance < self.augment.erase_prob) & fits.any(dim=1, keepdim=True)  # [B, 1]
        mask = (erased & in_rows)[:, None, :, None] & in_columns[:, None, None, :]
        fill = torch.randn_like(images) if self.augment.erase_mode == "pixel" else images.new_zeros(())
        return torch.where(mask, fill, images)
