"""Images of one size that lie on a device, whole, and are cropped, flipped and recoloured there, a batch at a time.

For small images and models on a GPU, which a few CPU cores cannot feed: nothing but the numbers of the images and what was
drawn for them goes from the host to the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from volo.config import AugmentConfig, DataConfig
from volo.data import keyed
from volo.data.sources import ArraySource, ImageSource
from volo.data.token_labels import LabelMapReader
from volo.data.transforms import fit_transform, height_width

Batch = dict[str, Any]
TRIES = 10
"""So many crops are drawn, and the first that fits into its image is taken; else it is the whole image (as in torchvision)."""
_GREY = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in what torchvision takes for grey."""


@dataclass(frozen=True, eq=False)
class DeviceSource(ArraySource):
    """An `ArraySource` whose `images` lie on a device. `volo.data.loader` makes its batches there."""


def to_device(source: ImageSource, data: DataConfig, device: torch.device) -> DeviceSource:
    """`source` with its images on `device`, in `data.img_size` if it is another than theirs. Raises ValueError for a source
    whose images are no array."""
    if not isinstance(source, ArraySource):
        raise ValueError(
            f"images that go to the device whole are arrays of one size: npz files, CIFAR or the digits; given: "
            f"{data.path or data.kind}"
        )
    images = source.images
    if tuple(images.shape[2:]) != height_width(data.img_size):
        # In parts, since resizing takes floats of all of them.
        images = torch.cat([fit_transform(data)(part) for part in images.split(4096)])
    return DeviceSource(images.to(device), source.targets, source.names, source.classes)


class CropOnDevice:
    """What `train_transform` does for "resized" crops, flips and colour jitter, for a batch at once and on its device.

    Everything random is drawn on the host, from (seed, epoch, index) alone. What differs from `train_transform`: its
    draws; a crop lies between pixels; a crop that is read at its border sees the image beyond it; and brightness, contrast,
    saturation are changed in this order.
    """

    def __init__(
        self, images: Tensor, data: DataConfig, augment: AugmentConfig, seed: int, with_frames: bool = False
    ) -> None:
        """images: uint8 [N, 3, H, W], of `data.img_size`. Raises ValueError for what it does not do."""
        if augment.crop != "resized" or augment.rand_augment:
            raise ValueError(
                f"images on the device get resized crops, flips and colour jitter; given: augment.crop {augment.crop!r}, "
                f"augment.rand_augment {augment.rand_augment!r}"
            )
        self.images, self.data, self.augment, self.seed = images, data, augment, seed
        self.with_frames = with_frames

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        """image uint8 [b, 3, H, W] on the device; index int64 [b] and, with frames, frame and size on the host."""
        device, index = self.images.device, torch.from_numpy(indices.copy())
        frames, is_bicubic, jitter = self._draw(epoch, indices)
        images = self.images[index.to(device, non_blocking=True)].float()
        images = crop_by(frames.to(device, non_blocking=True), images, is_bicubic.to(device, non_blocking=True))
        if self.augment.color_jitter:
            images = recolour(images, jitter.to(device, non_blocking=True))
        batch: Batch = {"image": images.round_().clamp_(0, 255).to(torch.uint8), "index": index}
        if self.with_frames:
            batch["frame"] = frames[:, None]
            batch["size"] = torch.tensor(self.images.shape[2:]).expand(len(index), 2)
        return batch

    def _draw(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (`crop_by`), which images are read bicubically (bool [b]), factors of `recolour` ([b, 3])."""
        augment, (H, W) = self.augment, self.images.shape[2:]

        def uniform(stream: int, many: int) -> np.ndarray:
            """[b, many] in 0..1; no two streams draw the same."""
            keys = keyed.key(keyed.CROP, self.seed, epoch, indices[:, None], stream, np.arange(many))
            return keyed.uniform(keys)

        def between(low: float, high: float, drawn: np.ndarray) -> np.ndarray:
            return low + (high - low) * drawn

        narrow, wide = augment.ratio
        area = H * W * between(*augment.scale, uniform(0, TRIES))
        aspect = np.exp(between(math.log(narrow), math.log(wide), uniform(1, TRIES)))  # width / height
        heights, widths = np.sqrt(area / aspect), np.sqrt(area * aspect)
        fits = (heights <= H) & (widths <= W)
        first, rows = fits.argmax(axis=1), np.arange(len(indices))
        height = np.where(fits.any(axis=1), heights[rows, first], H) / H
        width = np.where(fits.any(axis=1), widths[rows, first], W) / W
        chance, down, right, bicubic = uniform(2, 4).T
        top, left = down * (1 - height), right * (1 - width)
        is_flipped = chance < augment.hflip
        frames = np.zeros((len(indices), 2, 3))
        frames[:, 0, 0] = np.where(is_flipped, -width, width)
        frames[:, 0, 2] = np.where(is_flipped, left + width, left)
        frames[:, 1, 1], frames[:, 1, 2] = height, top
        share = {"bilinear": 0.0, "bicubic": 1.0, "random": 0.5}[self.data.interpolation]
        strength = augment.color_jitter
        factors = between(max(0.0, 1 - strength), 1 + strength, uniform(3, 3))
        return (
            torch.from_numpy(frames).float(),
            torch.from_numpy(bicubic < share),
            torch.from_numpy(factors).float(),
        )


def crop_by(frames: Tensor, images: Tensor, is_bicubic: Tensor) -> Tensor:
    """What `frames` show of float `images` [b, C, H, W], in the same size.

    frames: [b, 2, 3], affine maps of places (x, y, 1) of the result to places of the image, both from 0 to 1 with (0, 0) at
    the top left corner, as in `PictureFrame`. is_bicubic: bool [b]; the others are read bilinearly.
    """
    # grid_sample counts from -1 to 1.
    theta = frames.clone()
    theta[:, :, 2] = 2 * frames[:, :, 2] + frames[:, :, :2].sum(dim=2) - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    read = {
        mode: F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)
        for mode in ("bilinear", "bicubic")
    }
    return torch.where(is_bicubic[:, None, None, None], read["bicubic"].clamp(0, 255), read["bilinear"])


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation of float RGB images [b, 3, H, W] of 0..255 times `factors` [b, 3]."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(dim=1)
    weights = torch.tensor(_GREY, device=images.device)[:, None, None]
    images = (images * brightness).clamp(0, 255)
    mean = (images * weights).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp(0, 255)
    grey = (images * weights).sum(dim=1, keepdim=True)
    return torch.lerp(grey.expand_as(images), images, saturation.expand_as(images)).clamp(0, 255)


class MapsOnDevice:
    """`pictures` (with frames) and the label maps that belong to them, all of which lie on a device."""

    def __init__(self, pictures: CropOnDevice, names: Sequence[str], maps: LabelMapReader) -> None:
        self.pictures, self.maps = pictures, maps
        device = pictures.images.device
        parts = [maps.read_batch(names[start : start + 4096]) for start in range(0, len(names), 4096)]
        self.scores = torch.cat([scores.half() for scores, _ in parts]).to(device)
        self.classes = torch.cat([classes.to(torch.int32) for _, classes in parts]).to(device)

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        batch = self.pictures(epoch, indices)
        boxes = [self.maps.box(height, width) for height, width in batch.pop("size").tolist()]
        index = batch["index"].to(self.scores.device, non_blocking=True)
        scores, classes = self.scores[index].float(), self.classes[index].long()
        return {**batch, "map_scores": scores, "map_classes": classes, "map_box": torch.tensor(boxes)}
