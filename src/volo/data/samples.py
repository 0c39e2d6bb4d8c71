"""From the numbers of images to a batch: loaded, augmented by their keys, and put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from volo.config import AugmentConfig, DataConfig, Size
from volo.data import decode, keyed
from volo.data.decode import BadImage, BadImageError
from volo.data.token_labels import MIRRORED, LabelMapReader, PictureFrame, compose, stack_frames
from volo.data.transforms import fit_transform, height_width

Batch = dict[str, Any]
"""image uint8 [b, 3, H, W], index int64 [b] (the number of the image in its source), and what else belongs to it; "bad", a
list of BadImage, where images could not be read."""

Samples = Callable[[int, np.ndarray], Batch]
"""(epoch, indices int64 [b]) -> a batch."""

MAX_REPLACED = 8
"""So many images in a row that cannot be read are the end: the source has gone."""


class OneByOne:
    """Images loaded and prepared one by one, each with its own seed.

    An image that cannot be read is tried again. Then it is an error, unless `instead` says "next", the next image that can
    be read takes its place, or "none", the batch goes without.

    Args:
        load: number -> whatever `prepare` takes. Raises BadImageError.
        prepare: -> the tensors of a sample by their names, "image" among them.
        stream, seed: of the random numbers that `prepare` draws (`keyed`); seed None: it draws none.
    """

    def __init__(
        self,
        load: Callable[[int], Any],
        names: Sequence[str],
        prepare: Callable[[Any], dict[str, Tensor]],
        *,
        stream: int = keyed.SAMPLE,
        seed: int | None = None,
        instead: str = "",
    ) -> None:
        self.load, self.names, self.prepare, self.stream, self.seed = load, names, prepare, stream, seed
        self.instead = instead
        self.bad: dict[int, BadImageError] = {}

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        samples: list[dict[str, Tensor]] = []
        used: list[int] = []
        bad: list[BadImage] = []
        with keyed.own_random_state():
            for index in indices.tolist():
                for _ in range(MAX_REPLACED):
                    try:
                        loaded = self._load(index)
                    except BadImageError as error:
                        if not self.instead:
                            raise
                        bad.append(BadImage(error.name, error.reason))
                        if self.instead == "none":
                            break
                        index = (index + 1) % len(self.names)
                        continue
                    samples.append(self._prepare(epoch, index, loaded))
                    used.append(index)
                    break
                else:
                    raise BadImageError(
                        bad[-1].name, f"{bad[-1].reason}; nor can the {MAX_REPLACED - 1} before it be read"
                    )
        if not samples:
            raise BadImageError(bad[0].name, f"{bad[0].reason}; none of its batch can be read")
        batch: Batch = {name: _together(name, [sample[name] for sample in samples]) for name in samples[0]}
        return {**batch, "index": torch.tensor(used), **({"bad": bad} if bad else {})}

    def _load(self, index: int) -> Any:
        if index in self.bad:
            raise self.bad[index]
        for pause in (*decode.PAUSES, None):
            try:
                return self.load(index)
            except BadImageError as error:
                # A disk may have a moment of weakness.
                if pause is None:
                    self.bad[index] = error
                    raise
                time.sleep(pause)
            except Exception as error:
                error.add_note(f"while loading image {self.names[index]}")
                raise

    def _prepare(self, epoch: int, index: int, loaded: Any) -> dict[str, Tensor]:
        if self.seed is not None:
            keyed.seed_random_state(int(keyed.key(self.stream, self.seed, epoch, index)[0]))
        try:
            return self.prepare(loaded)
        except Exception as error:
            error.add_note(f"while preparing image {self.names[index]}")
            raise


def _together(name: str, values: list[Tensor]) -> Tensor:
    return stack_frames(values) if name == "frame" else torch.stack(values)


class Whole:
    """Images of one size, transformed as a batch."""

    def __init__(self, images: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        index = torch.from_numpy(indices)
        return {"image": self.transform(self.images[index]).contiguous(), "index": index.clone()}


class ShiftAndFlip:
    """Images of one size, shifted by up to `augment.pad` pixels with a reflected border and flipped, as a batch.

    Does what `train_transform` does for "pad" and "none" crops, some hundred times faster for small images.
    """

    def __init__(self, images: Tensor, data: DataConfig, augment: AugmentConfig, seed: int, frames: str = "") -> None:
        self.images, self.seed, self.hflip, self.frames = images, seed, augment.hflip, frames
        self.pad = augment.pad if augment.crop == "pad" else 0
        self.fit = fit_transform(data)

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        images = self.fit(self.images[torch.from_numpy(indices)]).numpy()
        flipped = np.flatnonzero(keyed.uniform(keyed.key(keyed.CROP, self.seed, epoch, indices, 0)) < self.hflip)
        if self.frames == "original":
            images[flipped] = images[flipped, :, :, ::-1]
        down = right = np.full(len(indices), self.pad)
        if self.pad:
            down, right = (
                keyed.below(keyed.key(keyed.CROP, self.seed, epoch, indices, i), 2 * self.pad + 1) for i in (1, 2)
            )
            images = shift(images, self.pad, down, right)
        if self.frames != "original":
            images[flipped] = images[flipped, :, :, ::-1]
        batch = {"image": torch.from_numpy(images), "index": torch.from_numpy(indices.copy())}
        if self.frames:
            batch["frame"] = self._frames(down - self.pad, right - self.pad, flipped)
            batch["size"] = torch.tensor(self.images.shape[2:]).expand(len(indices), 2)
        return batch

    def _frames(self, down: np.ndarray, right: np.ndarray, flipped: np.ndarray) -> Tensor:
        """The frames of images that were shifted by so many pixels (int [B]), some of them flipped."""
        fitted = self.fit(PictureFrame.whole(self.images.shape[2], self.images.shape[3], self.frames))  # type: ignore[arg-type]
        H, W = fitted.canvas_size  # type: ignore[attr-defined]
        x, y = right / W, down / H
        if self.frames == "original":  # rows and columns exchanged; flipped before the shift
            x, y = y, x
        steps = torch.eye(3, dtype=torch.float64)[:2].repeat(len(down), 1, 1)
        steps[:, 0, 2], steps[:, 1, 2] = torch.from_numpy(x), torch.from_numpy(y)
        flip_first = self.frames == "original"
        steps[flipped] = compose(MIRRORED, steps[flipped]) if flip_first else compose(steps[flipped], MIRRORED)
        return compose(fitted.as_subclass(Tensor)[None], steps[:, None]).float()


class SmallAtFirst:
    """`images`, in the first epochs shrunk to `size`: progressive resizing (Tan and Le, arXiv 2104.00298, without the
    augmentation that grows along). Frames and label maps stay right, for they are shares of the image's sides."""

    def __init__(self, pictures: Samples, data: DataConfig, size: Size, epochs: int) -> None:
        self.pictures, self.size, self.epochs = pictures, list(height_width(size)), epochs
        full = height_width(data.img_size)
        if epochs < 1 or not all(1 <= small <= side for small, side in zip(self.size, full)):
            raise ValueError(
                f"schedule.small_size is from 1 to data.img_size ({data.img_size}) and schedule.small_epochs at least 1, or both "
                f"are 0; given: small_size={size}, small_epochs={epochs}"
            )

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        batch = self.pictures(epoch, indices)
        if epoch < self.epochs:
            batch["image"] = F.resize(batch["image"], self.size, antialias=True).contiguous()
        return batch


class WithLabelMaps:
    """`images` (with frames) and the label maps that belong to them: map_scores, map_classes and map_box."""

    def __init__(self, pictures: Samples, names: Sequence[str], maps: LabelMapReader) -> None:
        self.pictures, self.names, self.maps = pictures, names, maps

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        batch = self.pictures(epoch, indices)
        boxes = [self.maps.box(height, width) for height, width in batch.pop("size").tolist()]
        scores, classes = self.maps.read_batch([self.names[i] for i in batch["index"].tolist()])
        return {**batch, "map_scores": scores, "map_classes": classes, "map_box": torch.tensor(boxes)}


class WithTargets:
    """`images` and their classes."""

    def __init__(self, pictures: Samples, targets: Tensor) -> None:
        self.pictures, self.targets = pictures, targets

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        batch = self.pictures(epoch, indices)
        return {**batch, "target": self.targets[batch["index"]]}


def shift(images: np.ndarray, pad: int, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Crop [B, C, H, W] at row `down`, column `right` (int [B], 0..2 pad) of images with `pad` mirrored pixels."""
    B, C, H, W = images.shape
    padded = np.empty((B, C, H + 2 * pad, W + 2 * pad), images.dtype)
    padded[:, :, pad:-pad, pad:-pad] = images
    padded[:, :, pad:-pad, :pad] = images[:, :, :, pad:0:-1]
    padded[:, :, pad:-pad, -pad:] = images[:, :, :, -2 : -2 - pad : -1]
    padded[:, :, :pad] = padded[:, :, 2 * pad : pad : -1]
    padded[:, :, -pad:] = padded[:, :, -2 - pad : -2 - 2 * pad : -1]
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (H, W), axis=(2, 3)
    )  # [B, C, 2 pad + 1, 2 pad + 1, H, W]
    return windows[np.arange(B), :, down, right]
