from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as v1

from volo.config import AugmentConfig, DataConfig
from volo.data.transforms import PixelPipeline, RandomResizedCrop, ResizeAndCenterCrop, eval_transform, train_transform

sides = st.integers(1, 90)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def coordinates(height: int, width: int) -> torch.Tensor:
    """An image whose first channel is the row, the second the column, so that geometry can be read off."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows + columns]).to(torch.uint8)


# Evaluation


@settings(max_examples=150, deadline=None)
@given(sides, sides, st.integers(4, 90), st.integers(4, 90), st.sampled_from([0.5, 0.875, 0.96, 1.0, 1.15]))
def test_eval_transform_gives_the_size_asked_for(h: int, w: int, height: int, width: int, crop_pct: float) -> None:
    data = DataConfig(img_size=(height, width), crop_pct=crop_pct)
    result = eval_transform(data)(noise(3, h, w))
    assert result.shape == (3, height, width)
    assert result.dtype == torch.uint8


@pytest.mark.parametrize(("h", "w"), [(100, 150), (151, 99), (80, 80), (30, 47), (333, 500)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.96, 1.0, 1.15])
@pytest.mark.parametrize("interpolation", ["random", "bilinear"])
def test_eval_transform_is_the_usual_one(h: int, w: int, crop_pct: float, interpolation: str) -> None:
    """Resize of the shorter side and centre crop, as timm and the original evaluate with Pillow."""
    smooth = torch.nn.functional.interpolate(noise(1, 3, 12, 12).float(), (h, w), mode="bicubic").clamp(0, 255)
    image = smooth[0].to(torch.uint8)
    mode = v1.InterpolationMode.BILINEAR if interpolation == "bilinear" else v1.InterpolationMode.BICUBIC
    usual = v1.Compose([v1.Resize(math.floor(64 / crop_pct), mode), v1.CenterCrop(64)])
    wanted = np.asarray(usual(Image.fromarray(image.permute(1, 2, 0).numpy()))).astype(int)
    data = DataConfig(img_size=64, crop_pct=crop_pct, interpolation=interpolation)  # type: ignore[arg-type]
    got = eval_transform(data)(image).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - wanted).max() <= 2
    if crop_pct > 1:  # black borders
        assert (got[0] == 0).all() or (got[:, 0] == 0).all()
        assert (got[32] != 0).any()


def test_eval_transform_of_a_batch_is_that_of_each_picture() -> None:
    transform = eval_transform(DataConfig(img_size=(20, 28)))
    batch = noise(5, 3, 33, 37)
    assert torch.equal(transform(batch), torch.stack([transform(image) for image in batch]))


def test_a_picture_of_the_right_size_is_untouched() -> None:
    assert torch.equal(eval_transform(DataConfig(img_size=32, crop_pct=1.0))(noise(3, 32, 32)), noise(3, 32, 32))


def test_pictures_of_decode_order_in_memory_give_the_same() -> None:
    image = noise(3, 50, 70)
    rows_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    transform = eval_transform(DataConfig(img_size=32))
    assert torch.equal(transform(image), transform(rows_last))


def test_a_line_of_pixels_does_not_fill_the_memory() -> None:
    result = ResizeAndCenterCrop(224)(noise(3, 1, 60_000))  # scaled as it is: 224 x 13,440,000
    assert result.shape == (3, 224, 224)


@pytest.mark.parametrize("crop_pct", [0, -1, 1000.0])
def test_impossible_crop_pct_is_refused(crop_pct: float) -> None:
    with pytest.raises(ValueError, match="crop_pct"):
        eval_transform(DataConfig(img_size=32, crop_pct=crop_pct))


# Training


@settings(max_examples=80, deadline=None)
@given(
    sides, sides, st.integers(9, 60), st.integers(9, 60), st.sampled_from(["resized", "pad", "none"]), st.integers(0, 9)
)
def test_train_transform_gives_the_size_asked_for(h: int, w: int, H: int, W: int, crop: str, seed: int) -> None:
    augment = AugmentConfig(crop=crop, rand_augment="rand-m9-mstd0.5-inc1" if seed % 2 else "")  # type: ignore[arg-type]
    torch.manual_seed(seed)
    result = train_transform(DataConfig(img_size=(H, W)), augment)(noise(3, h, w))
    assert result.shape == (3, H, W)
    assert result.dtype == torch.uint8


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(0, 2**31))
def test_resized_crop_keeps_area_and_aspect_in_range(h: int, w: int, seed: int) -> None:
    torch.manual_seed(seed)
    crop = RandomResizedCrop((32, 32), (0.3, 0.6), (0.75, 4 / 3), "random")
    params = crop.make_params([noise(3, h, w)])
    assert 0 <= params["top"] <= h - params["height"]
    assert 0 <= params["left"] <= w - params["width"]
    ratio = params["width"] / params["height"]
    slack = 1 + 2 / min(params["height"], params["width"])  # sides are whole pixels
    assert 0.75 / slack <= ratio <= 4 / 3 * slack
    area = params["height"] * params["width"] / (h * w)
    # Very long images cannot hold the area at that aspect: then the largest centre crop is taken.
    if 0.5 < h / w < 2:
        assert 0.3 / slack**2 <= area <= 0.6 * slack**2


def test_interpolation_is_drawn_or_fixed() -> None:
    torch.manual_seed(0)
    for interpolation, modes in (
        ("random", {"bilinear", "bicubic"}),
        ("bicubic", {"bicubic"}),
        ("bilinear", {"bilinear"}),
    ):
        crop = RandomResizedCrop((8, 8), (0.1, 1.0), (1.0, 1.0), interpolation)
        assert {crop.make_params([noise(3, 9, 9)])["interpolation"].value for _ in range(40)} == modes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5), st.sampled_from([0.0, 1.0]))
def test_pad_crop_shifts_with_a_mirrored_border(seed: int, pad: int, hflip: float) -> None:
    torch.manual_seed(seed)
    image = coordinates(12, 16)
    result = train_transform(DataConfig(img_size=(12, 16)), AugmentConfig(crop="pad", pad=pad, hflip=hflip))(image)
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    windows = [padded[:, y : y + 12, x : x + 16] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    if hflip:
        windows = [window[:, :, ::-1] for window in windows]
    assert any((result.numpy() == window).all() for window in windows)


def test_flip_and_no_crop() -> None:
    data, image = DataConfig(img_size=16), noise(3, 16, 16)
    assert torch.equal(train_transform(data, AugmentConfig(crop="none", hflip=1.0))(image), image.flip(2))
    assert torch.equal(train_transform(data, AugmentConfig(crop="none", hflip=0.0))(image), image)
    torch.manual_seed(0)
    half = train_transform(data, AugmentConfig(crop="none", hflip=0.5))
    flips = sum(torch.equal(half(image), image.flip(2)) for _ in range(400))
    assert 150 < flips < 250


def test_color_jitter_changes_colours_only() -> None:
    data = DataConfig(img_size=16)
    torch.manual_seed(0)
    jittered = train_transform(data, AugmentConfig(crop="none", hflip=0, color_jitter=0.4))(coordinates(16, 16) * 8)
    assert not torch.equal(jittered, coordinates(16, 16) * 8)
    assert (jittered[0, 1:] >= jittered[0, :-1]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rand_augment": "rand-m9", "color_jitter": 0.4}, "color_jitter"),
        ({"hflip": 1.5}, "hflip is 1.5"),
        ({"erase_prob": -0.1}, "erase_prob"),
        ({"scale": (0.5, 0.1)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"erase_scale": (0.1, 1.5)}, "erase_scale"),
        ({"crop": "pad", "pad": 16}, "pad is 16"),
        ({"color_jitter": -1.0}, "color_jitter"),
        ({"rand_augment": "autoaug"}, "rand_augment"),
    ],
)
def test_contradictions_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_transform(DataConfig(img_size=16), AugmentConfig(**options))  # type: ignore[arg-type]


# Pixels


def test_pixels_are_normalised_per_channel() -> None:
    data = DataConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = noise(4, 3, 8, 9)
    wanted = (images / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    pipeline = PixelPipeline(data, AugmentConfig(erase_prob=1.0)).eval()
    result = pipeline(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)
    assert pipeline.state_dict() == {}
    assert torch.equal(PixelPipeline(data)(images), result)  # nothing to erase in training either
    with pytest.raises(ValueError, match="uint8"):
        pipeline(images.float())
    with pytest.raises(ValueError, match="std"):
        PixelPipeline(DataConfig(std=(0.0, 1.0, 1.0)))


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erased_rectangles(mode: str) -> None:
    torch.manual_seed(0)
    B, H, W = 600, 24, 36
    images = torch.full((B, 3, H, W), 255, dtype=torch.uint8)
    augment = AugmentConfig(erase_prob=0.25, erase_mode=mode, erase_scale=(0.05, 0.2))  # type: ignore[arg-type]
    pipeline = PixelPipeline(DataConfig(mean=(0.5,) * 3, std=(0.1,) * 3), augment).train()
    result = pipeline(images)
    touched = (result != pipeline.eval()(images)).any(dim=1)  # [B, H, W]
    erased = touched.flatten(1).any(dim=1)
    assert 0.19 < erased.float().mean() < 0.31
    areas, tops = [], []
    for mask in touched[erased]:
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        height, width = len(rows), len(columns)
        assert height == rows[-1] - rows[0] + 1
        areas.append(height * width / (H * W))
        tops.append(int(rows[0]))
        assert 0.3 * 0.7 < height / width < 1 / 0.3 / 0.7
    assert 0.03 < min(areas)
    assert max(areas) < 0.23
    assert len(set(tops)) > 8
    values = result.movedim(1, -1)[touched]
    if mode == "const":
        assert (values == 0).all()
    else:
        assert abs(values.mean()) < 0.05
        assert abs(values.std() - 1) < 0.05


def test_erasing_follows_the_seed_and_its_probability() -> None:
    images = noise(8, 3, 16, 16)
    always = PixelPipeline(DataConfig(), AugmentConfig(erase_prob=1.0))
    torch.manual_seed(3)
    first = always(images)
    torch.manual_seed(3)
    assert torch.equal(always(images), first)
    assert not torch.equal(always(images), first)
    assert (first != PixelPipeline(DataConfig())(images)).flatten(1).any(dim=1).all()


def test_pictures_too_small_for_the_rectangle_stay_whole() -> None:
    pipeline = PixelPipeline(DataConfig(), AugmentConfig(erase_prob=1.0, erase_scale=(1.0, 1.0)))
    images = noise(4, 3, 8, 8)
    assert torch.equal(pipeline(images), pipeline.eval()(images))
