"""Batches that are made on the device: the right pixels, the right frames, and the same after a restart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from volo.config import AugmentConfig, DataConfig
from volo.data.loader import EvalLoader, TrainLoader
from volo.data.on_device import CropOnDevice, DeviceSource, MapsOnDevice, crop_by, recolour, to_device
from volo.data.samples import Whole, WithLabelMaps
from volo.data.sources import ArraySource

SIDE = 16
DATA = DataConfig(img_size=SIDE, crop_pct=1.0, interpolation="bilinear")
CROPS = AugmentConfig(scale=(0.3, 1.0), hflip=0.5)
JITTER = replace(CROPS, color_jitter=0.3)
CPU = torch.device("cpu")


def source(count: int = 40, side: int = SIDE) -> DeviceSource:
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    names = [f"train/{i}" for i in range(count)]
    return to_device(ArraySource(images, torch.arange(count) % 5, names, tuple("abcde")), DATA, CPU)


def ramps(count: int = 200) -> Tensor:
    """uint8 [count, 3, 16, 16] whose red is the place from the left, green that from the top, in 0..1 of the image."""
    place = (torch.arange(SIDE) + 0.5) / SIDE
    across, down = place.expand(SIDE, SIDE), place[:, None].expand(SIDE, SIDE)
    return (torch.stack([across, down, torch.zeros(SIDE, SIDE)]) * 255).round().byte().expand(count, 3, SIDE, SIDE)


def frame(top: float, left: float, height: float, width: float) -> Tensor:
    return torch.tensor([[[width, 0.0, left], [0.0, height, top]]])


@pytest.mark.parametrize("bicubic", [False, True])
def test_a_crop_is_torchvisions_away_from_its_border(bicubic: bool) -> None:
    image = source(1).images.float()
    mode = torch.tensor([bicubic])
    assert torch.allclose(crop_by(frame(0, 0, 1, 1), image, mode), image, atol=1e-3)
    assert torch.allclose(crop_by(frame(0, 1, 1, -1), image, mode), image.flip(-1), atol=1e-3)
    ours = crop_by(frame(4 / SIDE, 2 / SIDE, 8 / SIDE, 10 / SIDE), image, mode)
    interpolation = F.InterpolationMode.BICUBIC if bicubic else F.InterpolationMode.BILINEAR
    theirs = F.resized_crop(image, 4, 2, 8, 10, [SIDE, SIDE], interpolation, antialias=False).clamp(0, 255)
    inner = slice(4, -4)
    assert torch.allclose(ours[..., inner, inner], theirs[..., inner, inner], atol=0.05)
    assert not torch.allclose(ours, image, atol=20)


def test_colours_are_torchvisions() -> None:
    images = source(3).images.float()
    factors = torch.tensor([[0.7, 1.0, 1.0], [1.0, 1.3, 1.0], [1.2, 0.8, 0.5]])
    ours = recolour(images, factors)
    for image, (brightness, contrast, saturation), mine in zip(images / 255, factors.tolist(), ours):
        expected = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, brightness), contrast), saturation)
        assert torch.allclose(mine, expected * 255, atol=0.01)
    assert torch.allclose(recolour(images, torch.ones(3, 3)), images, atol=1e-3)


def test_frames_say_where_every_pixel_comes_from() -> None:
    indices = np.arange(200)
    batch = CropOnDevice(ramps(), DATA, CROPS, seed=0, with_frames=True)(3, indices)
    place = (torch.arange(SIDE) + 0.5) / SIDE
    frames = batch["frame"][:, 0]
    across = frames[:, 0, :1] * place + frames[:, 0, 2:]  # [b, W]
    down = frames[:, 1, 1:2] * place + frames[:, 1, 2:]
    inside = (0.5 / SIDE, 1 - 0.5 / SIDE)  # nearer to the border there is no pixel beyond
    assert (batch["image"][:, 0].float() / 255 - across.clamp(*inside)[:, None]).abs().max() < 0.005
    assert (batch["image"][:, 1].float() / 255 - down.clamp(*inside)[:, :, None]).abs().max() < 0.005
    assert (batch["size"] == SIDE).all()
    areas = (frames[:, 0, 0] * frames[:, 1, 1]).abs()
    aspects = (frames[:, 0, 0] / frames[:, 1, 1]).abs()
    assert areas.min() >= 0.3 - 1e-6 and areas.max() <= 1 and areas.std() > 0.1
    assert aspects.min() >= 0.75 - 1e-6 and aspects.max() <= 4 / 3 + 1e-6 and aspects.std() > 0.1
    flipped = (frames[:, 0, 0] < 0).float().mean()
    assert 0.35 < flipped < 0.65


def test_without_augmentation_a_batch_is_the_images() -> None:
    images = source().images
    plain = CropOnDevice(images, DATA, AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0), seed=0)
    indices = np.array([5, 3, 5])
    batch = plain(0, indices)
    assert torch.equal(batch["image"], images[indices]) and batch["index"].tolist() == indices.tolist()


@pytest.mark.parametrize("augment", [CROPS, JITTER], ids=["crops", "jitter"])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_a_restart_changes_nothing_and_every_epoch_is_another(augment: AugmentConfig, interpolation: str) -> None:
    data = replace(DATA, interpolation=interpolation)  # type: ignore[arg-type]

    def batches(start: int, stop: int) -> list[dict[str, Tensor]]:
        loader = TrainLoader(source(), data, augment, batch_size=8, seed=1)
        assert loader.num_workers == 0
        return list(loader.batches(start, stop))

    whole, restarted = batches(0, 10), batches(7, 10)
    for one, other in zip(whole[7:], restarted):
        assert all(torch.equal(one[name], other[name]) for name in ("image", "target", "index"))
    assert sorted(torch.cat([batch["index"] for batch in whole[:5]]).tolist()) == list(range(40))

    def of_first(epoch: list[dict[str, Tensor]]) -> Tensor:
        return next(b["image"][b["index"] == 0][0] for b in epoch if (b["index"] == 0).any())

    assert not torch.equal(of_first(whole[:5]), of_first(whole[5:]))


def test_the_draws_of_an_image_do_not_depend_on_its_batch() -> None:
    samples = CropOnDevice(source().images, DATA, JITTER, seed=0)
    together, alone = samples(2, np.arange(8))["image"][3], samples(2, np.array([3]))["image"][0]
    assert (together.int() - alone.int()).abs().max() <= 1, "a rounding of the mean, at most"


def test_evaluation_and_smaller_images() -> None:
    its = source(10)
    loader = EvalLoader(its, DATA, batch_size=4, num_workers=2)
    assert loader.num_workers == 0
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), its.images)
    small = TrainLoader(its, DATA, CROPS, batch_size=4, small_size=12, small_epochs=1)
    assert [tuple(batch["image"].shape[2:]) for batch in small.batches(1, 3)] == [(12, 12), (SIDE, SIDE)]
    other = to_device(ArraySource(its.images, its.targets, its.names, its.classes), replace(DATA, img_size=24), CPU)
    assert other.images.shape == (10, 3, 24, 24)
    expected = Whole(
        its.images, lambda images: F.resize(images, [24, 24], F.InterpolationMode.BILINEAR, antialias=True)
    )
    exact = other.images.int() - expected(0, np.arange(10))["image"].int()
    assert exact.abs().max() <= 1


class InMemory:
    """Label maps of one class at each position."""

    num_classes = 7

    def __contains__(self, name: object) -> bool:
        return True

    def read_batch(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor([int(name.partition("/")[2]) for name in names])
        scores = numbers[:, None, None, None] + torch.arange(2.0)[None, :, None, None].expand(len(numbers), 2, 3, 3)
        return scores, (numbers[:, None, None, None] % 7).expand(len(numbers), 2, 3, 3)

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        return 0.0, 0.0, 1.0, height / width


def test_label_maps_on_the_device_are_those_of_the_store() -> None:
    its, indices = source(), np.array([7, 0, 39])
    pictures = CropOnDevice(its.images, DATA, CROPS, seed=0, with_frames=True)
    one, other = (kind(pictures, its.names, InMemory())(1, indices) for kind in (MapsOnDevice, WithLabelMaps))
    assert one.keys() == other.keys() >= {"map_scores", "map_classes", "map_box", "frame"}
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert one["map_classes"].dtype == torch.int64


@pytest.mark.parametrize(
    ("augment", "options", "message"),
    [
        (AugmentConfig(crop="pad"), {}, "augment.crop 'pad'"),
        (AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1"), {}, "rand_augment 'rand-m9"),
        (CROPS, {"label_maps": InMemory(), "crop_order": "original"}, "crop_order"),
    ],
)
def test_what_is_not_done_on_the_device_is_refused(augment: AugmentConfig, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainLoader(source(), DATA, augment, batch_size=4, **options)
