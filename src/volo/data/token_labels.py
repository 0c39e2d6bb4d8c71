"""Label maps that follow their images: where each pixel of a training image comes from, and what the map says there.

A transform does not touch the map. It changes a `PictureFrame`, six numbers that say which place of the original image
lies at each place of the image as it is now; crops, flips, shears and rotations are products of such frames. Only at
the end, on the training's device and for the whole batch, `resample_label_maps` reads the map once at the places that
the frames point to. Nothing is interpolated twice, and a worker moves no logits about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as F


class LabelMapReader(Protocol):
    """Label maps by the name of the image (`ImageSource.names`); `volo.data.label_maps.LabelMaps` is one."""

    @property
    def num_classes(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    def read_batch(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """The annotator's best classes at each position: logits, float [B, top, h, w], and int64 [B, top, h, w].

        Raises ValueError that names an image without a map.
        """

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) of what a map shows of an image of that size, in 0..1 of the image."""


class PictureFrame(tv_tensors.TVTensor):
    """Which part of the original an image shows: moves along with it through torchvision's v2 transforms.

    A float64 tensor [S, 2, 3] of affine maps. The first takes a place (x, y, 1) of the image as it is now to its place
    in the original, both from 0 to 1 with (0, 0) at the top left corner. Every further one takes it to the image as
    it was before an operation that filled in from outside: a place that falls outside 0..1 there shows filling.

    With `crop_order` "original" the frame says what the original tool of token labeling believed: rows and columns of a
    crop exchanged.
    """

    canvas_size: tuple[int, int]
    crop_order: str

    @classmethod
    def whole(cls, height: int, width: int, crop_order: str = "corrected") -> PictureFrame:
        """The frame of an image of height x width pixels that shows all of itself."""
        return cls._wrap(torch.eye(3, dtype=torch.float64)[None, :2], (height, width), crop_order)

    @classmethod
    def _wrap(cls, maps: Tensor, canvas_size: tuple[int, int], crop_order: str) -> PictureFrame:
        frame = maps.as_subclass(cls)
        frame.canvas_size, frame.crop_order = canvas_size, crop_order
        return frame

    def moved(self, step: Tensor, canvas_size: tuple[int, int], *, fills: bool = False) -> PictureFrame:
        """The frame after an operation whose result shows at (x, y, 1) what was at step @ (x, y, 1), step float64 [2, 3].

        fills: what comes from outside 0..1 is filling, not a part of the image.
        """
        maps = compose(self.as_subclass(Tensor), step)
        if fills:
            maps = torch.cat([maps, step[None]])
        return self._wrap(maps, canvas_size, self.crop_order)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Affine maps [..., 2, 3], the inner one first."""
    linear = outer[..., :2] @ inner[..., :2]
    offset = outer[..., :2] @ inner[..., 2:] + outer[..., 2:]
    return torch.cat([linear, offset], dim=-1)


# What v2 transforms do to a frame. One that is not here raises TypeError in functionals, but transforms let unknown
# tensors pass unchanged: `tests/data/test_token_labels.py` holds every transform of ours against moving images.


@F.register_kernel(functional=F.get_size, tv_tensor_cls=PictureFrame)
def _get_size(frame: PictureFrame) -> list[int]:
    return list(frame.canvas_size)


@F.register_kernel(functional=F.crop, tv_tensor_cls=PictureFrame)
def _crop(frame: PictureFrame, top: int, left: int, height: int, width: int, fills: bool = False) -> PictureFrame:
    H, W = frame.canvas_size
    down, right = top / H, left / W
    rows, columns = height / H, width / W
    if frame.crop_order == "original":
        down, right, rows, columns = right, down, columns, rows
    step = torch.tensor([[columns, 0.0, right], [0.0, rows, down]], dtype=torch.float64)
    return frame.moved(step, (height, width), fills=fills)


@F.register_kernel(functional=F.resize, tv_tensor_cls=PictureFrame)
def _resize(frame: PictureFrame, size: Sequence[int], *args: Any, **kwargs: Any) -> PictureFrame:
    if len(size) != 2:
        raise ValueError(f"a frame is resized to (height, width); given: {size}")
    return frame.moved(torch.eye(3, dtype=torch.float64)[:2], (size[0], size[1]))


@F.register_kernel(functional=F.resized_crop, tv_tensor_cls=PictureFrame)
def _resized_crop(
    frame: PictureFrame, top: int, left: int, height: int, width: int, size: Sequence[int], *args: Any, **kwargs: Any
) -> PictureFrame:
    return _resize(_crop(frame, top, left, height, width), size)


@F.register_kernel(functional=F.center_crop, tv_tensor_cls=PictureFrame)
def _center_crop(frame: PictureFrame, output_size: Sequence[int]) -> PictureFrame:
    (H, W), (height, width) = frame.canvas_size, output_size
    # torchvision pads with black first, rounding down at the top and left, then crops and rounds to even.
    pad_top, pad_left = max(0, height - H) // 2, max(0, width - W) // 2
    top = -pad_top if height > H else round((H - height) / 2)
    left = -pad_left if width > W else round((W - width) / 2)
    return _crop(frame, top, left, height, width, fills=height > H or width > W)


@F.register_kernel(functional=F.pad, tv_tensor_cls=PictureFrame)
def _pad(
    frame: PictureFrame, padding: Sequence[int] | int, fill: Any = None, padding_mode: str = "constant"
) -> PictureFrame:
    padding = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = (padding * 4)[:4]  # one number for all, (x, y), or one a side
    H, W = frame.canvas_size
    # A mirrored border shows the image again: places outside 0..1 are read mirrored.
    return _crop(frame, -top, -left, H + top + bottom, W + left + right, fills=padding_mode == "constant")


@F.register_kernel(functional=F.horizontal_flip, tv_tensor_cls=PictureFrame)
def _horizontal_flip(frame: PictureFrame) -> PictureFrame:
    return frame.moved(MIRRORED, frame.canvas_size)


@F.register_kernel(functional=F.affine, tv_tensor_cls=PictureFrame)
def _affine(
    frame: PictureFrame,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: Sequence[float],
    interpolation: Any = None,
    fill: Any = None,
    center: Sequence[float] | None = None,
) -> PictureFrame:
    H, W = frame.canvas_size
    rotation, shear_x, shear_y = (math.radians(a) for a in (angle, *shear))
    # torchvision's order: shear, rotate and scale about `center`, then translate; pixels, y downwards.
    forward = np.eye(3)
    forward[:2, :2] = scale * np.array(
        [
            [math.cos(rotation - shear_y) / math.cos(shear_y), 0.0],
            [math.sin(rotation - shear_y) / math.cos(shear_y), 0.0],
        ]
    )
    forward[:2, 1] = scale * np.array([-math.sin(rotation), math.cos(rotation)]) - forward[:2, 0] * math.tan(shear_x)
    about = np.array([W / 2, H / 2] if center is None else center)
    forward[:2, 2] = about + np.array(translate) - forward[:2, :2] @ about
    scaled = np.diag([1 / W, 1 / H, 1.0]) @ np.linalg.inv(forward) @ np.diag([W, H, 1.0])
    return frame.moved(torch.from_numpy(scaled[:2]), frame.canvas_size, fills=True)


MIRRORED = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
"""The step of a left-right flip."""


def stack_frames(frames: Sequence[Tensor]) -> Tensor:
    """Frames [S_i, 2, 3] of a batch as float32 [B, max S_i, 2, 3]; the identity, which excludes nothing, fills up."""
    batch = torch.eye(3)[:2].repeat(len(frames), max(len(frame) for frame in frames), 1, 1)
    for row, frame in zip(batch, frames):
        row[: len(frame)] = frame.as_subclass(Tensor)
    return batch


def resample_label_maps(
    scores: Tensor,
    classes: Tensor,
    frames: Tensor,
    size: tuple[int, int],
    num_classes: int,
    boxes: Tensor | None = None,
) -> Tensor:
    """Label maps read where the images of a batch now show them: logits float32 [B, rows * columns, num_classes].

    Equal to ROI-align of the maps spread out over all classes (classes outside the top ones have logit 0), which is
    what token labeling was trained with, but it goes through the top entries alone. Each cell of the new grid is the mean
    over samples about as far apart as the places of the map, each sample bilinear. Filling (see `PictureFrame`) has
    logit 0 everywhere. A crop smaller than one place of the map is read as it is; torchvision's ROI-align would widen it.

    Args:
        scores, classes: [B, top, h, w], classes int64.
        frames: [B, S, 2, 3].
        size: rows and columns of the new grid; (1, 1) gives the label of all that the images show.
        boxes: what the maps cover of their images, (top, left, bottom, right) in 0..1, [B, 4]; None: all. Where a map
            ends before its image does, its border goes on.
    """
    B, T, h, w = scores.shape
    rows, columns = size
    frames = frames.to(torch.float32)
    to_map = frames[:, 0]  # [B, 2, 3]
    cells = torch.tensor([w, h], dtype=torch.float32, device=scores.device).expand(B, 2)
    start: Tensor | float = 0.0
    if boxes is not None:
        start = boxes[:, None, [1, 0]]  # (left, top): [B, 1, 2]
        cells = cells / (boxes[:, [3, 2]] - boxes[:, [1, 0]])  # places of the map in the length of a whole image

    def samples(axis: int, count: int) -> tuple[Tensor, Tensor]:
        """Places in 0..1 along an axis of the image and their weights, [B, count * most]."""
        most = max(1, -(-max(h, w) // count))
        length = (to_map[:, :, axis] * cells).norm(dim=1) / count  # of a new cell, in places of the map
        number = (length - 1e-4).ceil().clamp(1, most)[:, None]  # [B, 1]
        index = torch.arange(most, device=scores.device)
        place = torch.arange(count, device=scores.device)[None, :, None] + ((index + 0.5) / number)[:, None]
        weight = ((index < number) / number)[:, None].expand_as(place)
        return place.flatten(1) / count, weight.flatten(1)

    (x, weight_x), (y, weight_y) = samples(0, columns), samples(1, rows)
    X, Y = x.shape[1], y.shape[1]
    points = torch.stack(  # [B, Y * X, 3]
        [x[:, None].expand(B, Y, X), y[:, :, None].expand(B, Y, X), torch.ones(B, Y, X, device=scores.device)], dim=-1
    ).flatten(1, 2)
    weight = (weight_y[:, :, None] * weight_x[:, None]).flatten(1)  # [B, Y * X]
    if frames.shape[1] > 1:
        before = torch.einsum("bsij,bpj->bspi", frames[:, 1:], points)
        weight = weight * ((before >= 0) & (before <= 1)).all(dim=-1).all(dim=1)
    at = torch.einsum("bij,bpj->bpi", to_map, points)
    at = 1.0 - (1.0 - at.abs()).abs()  # mirrored at the border
    last = torch.tensor([w - 1, h - 1], device=scores.device)
    at = ((at - start) * cells[:, None] - 0.5).clamp(min=0).minimum(last)
    low = at.floor()
    part = at - low
    low = low.long()
    high = (low + 1).minimum(last)

    corners, shares = [], []
    for row, share_y in ((low[..., 1], 1 - part[..., 1]), (high[..., 1], part[..., 1])):
        for column, share_x in ((low[..., 0], 1 - part[..., 0]), (high[..., 0], part[..., 0])):
            corners.append(row * w + column)
            shares.append(weight * share_x * share_y)
    place, share = torch.stack(corners, dim=-1), torch.stack(shares, dim=-1)  # [B, Y * X, 4]
    place = place + (h * w) * torch.arange(B, device=scores.device)[:, None, None]

    found = scores.permute(0, 2, 3, 1).reshape(B * h * w, T).float()[place] * share[..., None]  # [B, Y * X, 4, T]
    kind = classes.permute(0, 2, 3, 1).reshape(B * h * w, T).long()[place]
    cell_y = torch.arange(Y, device=scores.device) // (Y // rows)
    cell_x = torch.arange(X, device=scores.device) // (X // columns)
    cell = (cell_y[:, None] * columns + cell_x).flatten()[:, None, None]  # [Y * X, 1, 1]
    logits = torch.zeros(B, rows * columns * num_classes, device=scores.device)
    logits.scatter_add_(1, (cell * num_classes + kind).flatten(1), found.flatten(1))
    return logits.view(B, rows * columns, num_classes)


def resample_position_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """An annotator's logits [B, h, w, K] for all of an image -> [B, rows * columns, K], by the rule of
    `resample_label_maps`."""
    B, h, w, _ = logits.shape
    if (h, w) == size:
        return logits.float().flatten(1, 2)
    whole = torch.tensor([0.0, 0.0, w, h], device=logits.device).expand(B, 4)
    boxes = torch.cat([torch.arange(B, device=logits.device)[:, None], whole], dim=1)
    grid = roi_align(logits.permute(0, 3, 1, 2).float(), boxes, size, aligned=True)  # [B, K, rows, columns]
    return grid.flatten(2).transpose(1, 2)
