"""Images and masks that move together: scale, crop, flip; colours of the image alone.

torchvision's `tv_tensors.Mask` says what a mask is. Masks are only ever cut, mirrored and resampled to the nearest pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from volo.config import DataConfig, SegmentConfig
from volo.data.mask_values import IGNORE
from volo.data.transforms import height_width

CROP_TRIES = 10


class RandomScaleCrop(v2.Transform):
    """Scale by a random factor, cut out `size` at a random place, pad at the right and bottom what is missing.

    What is cut out of the scaled image is computed from the pixels under it alone. Of up to ten places the first is
    taken where no class has more than `cat_max_ratio` of the pixels that are not void. Padding is `fill` in the image
    and void in the mask.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float],
        cat_max_ratio: float = 1.0,
        short_side: int = 0,
        fill: tuple[int, ...] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.size, self.scale, self.cat_max_ratio, self.short_side = size, scale, cat_max_ratio, short_side
        self.fill = list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        H, W = mask.shape[-2:]
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        if self.short_side:
            factor *= self.short_side / min(H, W)
        # Of each dimension: the pixels that are cut out, and how many they become.
        box, out = [], []
        for length, wanted in zip((H, W), self.size):
            under = max(1, round(wanted / factor))
            box.append(min(length, under))
            out.append(wanted if under <= length else min(wanted, max(1, round(length * factor))))
        for _ in range(CROP_TRIES if self.cat_max_ratio < 1 else 1):
            top, left = (int(torch.randint(length - part + 1, ())) for length, part in zip((H, W), box))
            if self.cat_max_ratio >= 1 or self._is_mixed(mask[..., top : top + box[0], left : left + box[1]]):
                break
        return {"top": top, "left": left, "height": box[0], "width": box[1], "size": out}

    def _is_mixed(self, mask: Tensor) -> bool:
        counts = torch.bincount(mask.as_subclass(Tensor).flatten(), minlength=IGNORE + 1)[:IGNORE]
        return int(counts.max()) <= self.cat_max_ratio * int(counts.sum()) and int(counts.sum()) > 0

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        inpt = F.crop(inpt, params["top"], params["left"], params["height"], params["width"])
        padding = [0, 0, self.size[1] - params["size"][1], self.size[0] - params["size"][0]]
        if isinstance(inpt, tv_tensors.Mask):
            # NEAREST, which torchvision takes for masks, is off by half a pixel against the image.
            nearest = F.resize_image(inpt.as_subclass(Tensor), params["size"], v2.InterpolationMode.NEAREST_EXACT)
            return tv_tensors.Mask(F.pad(nearest, padding, fill=IGNORE))
        return F.pad(F.resize(inpt, params["size"], antialias=True), padding, fill=self.fill)


class PhotometricDistort(v2.Transform):
    """Random brightness, contrast, saturation and hue, each with probability 1/2: torchvision's RandomPhotometricDistort,
    after SSD, without its exchange of channels.

    At `strength` 1: brightness factors 0.875 to 1.125, contrast and saturation factors 0.5 to 1.5, hue +- 18 degrees.
    Contrast comes before or after colour, as chance has it.
    """

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        chance, amount = torch.rand(2, 5).tolist()
        swing = [self.strength * (2 * a - 1) for a in amount]
        ranges = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}
        changes = {
            name: size * swing[i] if name == "hue" else max(0.0, 1 + size * swing[i])
            for i, (name, size) in enumerate(ranges.items())
            if chance[i] < 0.5
        }
        order = ["brightness", "contrast", "saturation", "hue"]
        if chance[4] < 0.5:
            order = ["brightness", "saturation", "hue", "contrast"]
        return {"changes": [(name, changes[name]) for name in order if name in changes]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        adjust: dict[str, Callable[[Any, float], Any]] = {
            "brightness": F.adjust_brightness,
            "contrast": F.adjust_contrast,
            "saturation": F.adjust_saturation,
            "hue": F.adjust_hue,
        }
        for name, amount in params["changes"]:
            inpt = adjust[name](inpt, max(-0.5, min(0.5, amount)) if name == "hue" else amount)
        return inpt


def train_transform(data: DataConfig, segment: SegmentConfig, hflip: float) -> Callable[..., Any]:
    """(image uint8 [3, h, w], mask uint8 [1, h, w]) -> both of `data.img_size`; draws from torch's CPU generator.

    Raises ValueError for settings that make no sense.
    """
    check_segment(data, segment)
    if not 0 <= hflip <= 1:
        raise ValueError(f"augment.hflip is {hflip}; a probability is from 0 to 1")
    fill = tuple(round(255 * mean) for mean in data.mean)
    size = height_width(data.img_size)
    steps: list[v2.Transform] = [RandomScaleCrop(size, segment.scale, segment.cat_max_ratio, segment.short_side, fill)]
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if segment.photometric:
        steps.append(PhotometricDistort(segment.photometric))
    both = v2.Compose(steps)

    def transform(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        image, mask = both(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    return transform


def check_segment(data: DataConfig, segment: SegmentConfig) -> None:
    """Raise ValueError for values that make no sense."""
    if min(height_width(data.img_size)) < 1:
        raise ValueError(
            f"data.img_size is {data.img_size}; for segmentation it is the crop, in pixels or (height, width)"
        )
    low, high = segment.scale
    if not 0 < low <= high:
        raise ValueError(f"segment.scale is ({low}, {high}); it is a range of factors above 0")
    if not 0 < segment.cat_max_ratio <= 1:
        raise ValueError(f"segment.cat_max_ratio is {segment.cat_max_ratio}; a share is above 0 and at most 1 (off)")
    if not 0 <= segment.ohem < 1 or segment.ohem_min_kept < 1:
        raise ValueError(
            f"segment.ohem is a probability from 0 (off) to 1 and ohem_min_kept at least 1; given: {segment.ohem} "
            f"and {segment.ohem_min_kept}"
        )
    for name in ("photometric", "aux_weight", "short_side", "num_classes"):
        if getattr(segment, name) < 0:
            raise ValueError(f"segment.{name} is {getattr(segment, name)}; it is 0 or more")


MOST_ENLARGED = 1 << 20
"""Pixels that an image is enlarged to at most."""


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes `short_side`; 0: unchanged. Narrow images are not enlarged
    beyond `MOST_ENLARGED` pixels: an image of 2 x 4000 would have half a thousand million."""
    if not short_side:
        return height, width
    factor = short_side / min(height, width)
    if factor > 1:
        factor = min(factor, max(1.0, math.sqrt(MOST_ENLARGED / (height * width))))
    return max(1, round(height * factor)), max(1, round(width * factor))


def scale_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [..., 3, h, w] -> uint8 [..., 3, *size], bilinear and antialiased."""
    return image if tuple(image.shape[-2:]) == size else F.resize(image, list(size), antialias=True)
