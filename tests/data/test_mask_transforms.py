"""Images and masks stay together under every transform; masks hold classes and nothing in between."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from volo.config import DataConfig, SegmentConfig
from volo.data.mask_transforms import (
    PhotometricDistort,
    RandomScaleCrop,
    check_segment,
    scaled_size,
    train_transform,
)
from volo.data.masks import IGNORE

GREY = DataConfig(mean=(0.2, 0.2, 0.2))


def blocks(height: int, width: int, side: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image of flat squares whose red is 20 times the class, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 12, (-(-height // side), -(-width // side)), generator=generator)
    mask = coarse.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width].to(torch.uint8)[None]
    image = torch.cat([mask * 20, torch.zeros_like(mask), torch.zeros_like(mask)])
    return image, mask


@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    scale=st.tuples(st.floats(0.3, 1.0), st.floats(1.0, 2.5)),
    short_side=st.sampled_from([0, 40]),
    cat_max_ratio=st.sampled_from([0.75, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_any_picture_becomes_a_crop_of_the_same_classes(
    seed, height, width, crop, scale, short_side, cat_max_ratio
) -> None:
    torch.manual_seed(seed)
    image, mask = blocks(height, width, seed=seed)
    segment = SegmentConfig(scale=scale, short_side=short_side, cat_max_ratio=cat_max_ratio, photometric=0.0)
    transform = train_transform(DataConfig(img_size=crop, mean=(1.0, 1.0, 1.0)), segment, hflip=0.5)
    out, labels = transform(image, mask)
    assert type(out) is type(labels) is Tensor
    assert (out.shape, labels.shape) == ((3, *crop), (1, *crop))
    assert (out.dtype, labels.dtype) == (torch.uint8, torch.uint8)
    assert set(labels.unique().tolist()) <= set(mask.unique().tolist()) | {IGNORE}
    # Padding is white (the mean here) in the image, void in the mask, and nowhere else: blue tells.
    assert torch.equal(out[2] == 255, labels[0] == IGNORE)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.0, 1.37, 2.0])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_mask_lies_on_its_picture_to_half_a_pixel(scale: float, flip: float) -> None:
    image, mask = blocks(96, 120, side=16)
    segment = SegmentConfig(scale=(scale, scale), photometric=0.0)
    for seed in range(5):
        torch.manual_seed(seed)
        out, labels = train_transform(DataConfig(img_size=(40, 44)), segment, hflip=flip)(image, mask)
        # Where the image is flat (inside a square) its red says what the mask must say.
        red = out[0].float()
        flat = (
            torch.nn.functional.max_pool2d(red[None], 3, 1, 1) == -torch.nn.functional.max_pool2d(-red[None], 3, 1, 1)
        )[0]
        flat &= labels[0] != IGNORE
        assert flat.float().mean() > 0.1
        assert torch.equal((red / 20).round()[flat], labels[0].float()[flat])
        # And edges coincide: a pixel has the class that the larger part of it shows.
        around = torch.nn.functional.max_pool2d(red[None], 3, 1, 1) + torch.nn.functional.max_pool2d(
            -red[None], 3, 1, 1
        )
        off = (red / 20 - labels[0].float()).abs() > 0.5 * around[0] / 20 + 0.5
        assert off[labels[0] != IGNORE].float().mean() < 0.04


def test_no_class_fills_a_crop_if_that_can_be_helped() -> None:
    mask = torch.zeros(1, 100, 100, dtype=torch.uint8)
    mask[:, :, 50:] = 1
    mask[:, :, :2] = IGNORE
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)

    def largest_share(ratio: float) -> float:
        crop = RandomScaleCrop((30, 30), (1.0, 1.0), cat_max_ratio=ratio)
        shares = []
        for seed in range(100):
            torch.manual_seed(seed)
            _, labels = crop(tv_tensors.Image(image), tv_tensors.Mask(mask))
            counts = torch.bincount(labels.flatten().long(), minlength=256)[:IGNORE]
            shares.append(float(counts.max() / counts.sum()) > 0.75)
        return sum(shares) / len(shares)

    assert largest_share(0.75) < 0.3 < 0.6 < largest_share(1.0)


def test_scales_are_spread_over_their_range() -> None:
    image, mask = blocks(64, 64, side=64)
    mask[:, :, 32:] = 1
    mask[:, :, :32] = 0
    rows = []
    for seed in range(60):
        torch.manual_seed(seed)
        _, labels = RandomScaleCrop((200, 200), (0.5, 2.0))(tv_tensors.Image(image), tv_tensors.Mask(mask))
        rows.append(int((labels[0, :, 0] != IGNORE).sum()))
    assert min(rows) >= 32 and max(rows) <= 128
    assert min(rows) < 45 and max(rows) > 110


def test_colours_change_and_masks_do_not() -> None:
    image, mask = blocks(40, 40)
    image = image + 30
    distort, changed = PhotometricDistort(), 0
    for seed in range(20):
        torch.manual_seed(seed)
        out, labels = distort(tv_tensors.Image(image), tv_tensors.Mask(mask))
        assert torch.equal(labels, mask)
        changed += not torch.equal(out, image)
    assert changed >= 15
    torch.manual_seed(0)
    assert torch.equal(PhotometricDistort(0.0)(tv_tensors.Image(image), tv_tensors.Mask(mask))[0], image)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"segment\.scale"),
        ({"scale": (2.0, 1.0)}, r"segment\.scale"),
        ({"cat_max_ratio": 0.0}, "cat_max_ratio"),
        ({"ohem": 1.5}, "ohem"),
        ({"aux_weight": -0.1}, "aux_weight"),
    ],
)
def test_settings_that_make_no_sense(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_segment(GREY, SegmentConfig(**changed))


def test_scaled_size_keeps_the_aspect() -> None:
    assert scaled_size(300, 600, 0) == (300, 600)
    assert scaled_size(300, 600, 512) == (512, 1024)
    assert scaled_size(601, 300, 150) == (300, 150)


def test_narrow_images_are_not_enlarged_without_bound() -> None:
    height, width = scaled_size(2, 4000, 512)
    assert (height, width) == (23, 45795)
    assert scaled_size(500, 3000, 512) == (500, 3000)
    assert scaled_size(4000, 60000, 512) == (512, 7680)
