"""Label maps stay with their images: geometry against moving images, resampling against torchvision's ROI-align."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as F

from volo.config import AugmentConfig, DataConfig
from volo.data import keyed
from volo.data.loader import ShiftAndFlip, TrainLoader
from volo.data.rand_augment import OPERATIONS, move
from volo.data.sources import ArraySource
from volo.data.token_labels import (
    PictureFrame,
    resample_label_maps,
    resample_position_logits,
    stack_frames,
)
from volo.data.transforms import RandomResizedCrop, train_transform
from volo.tasks.mixing import smooth_one_hot
from volo.tasks.token_label import TokenLabelTargets

safetensors = pytest.importorskip("safetensors.torch")

GRID = 14


def slopes(height: int, width: int) -> torch.Tensor:
    """An image that says of each pixel where it is: red is the column, green the row, as shares of the image."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    picture = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)])
    return (picture * 255).round().to(torch.uint8)


def map_of_slopes(side: int = 18) -> tuple[torch.Tensor, torch.Tensor]:
    """The label map that is that image: the logits of classes 0, 1 and 2 are red, green and blue."""
    at = (torch.arange(side) + 0.5) / side
    scores = torch.stack([at.expand(side, side), at[:, None].expand(side, side), torch.ones(side, side)])
    return scores, torch.arange(3)[:, None, None].expand(3, side, side)


def tokens_of(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> mean colour of each token, [B, GRID * GRID, 3] in 0..1."""
    patches = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, GRID)
    return patches.flatten(2).transpose(1, 2)


def misalignment(images: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Mean distance in tokens between what tokens show and what the map says they show, where they show the image."""
    scores, classes = (part.expand(len(images), -1, -1, -1) for part in map_of_slopes())
    said = resample_label_maps(scores, classes, frames, (GRID, GRID), 3)
    shown = tokens_of(images)
    inside = (shown[..., 2] > 0.99) & (said[..., 2] > 0.99)
    assert inside.float().mean() > 0.2
    # In tokens of the original: a crop shows it enlarged, so this is the smaller unit.
    return ((said - shown)[..., :2].norm(dim=-1) * GRID)[inside].mean()


PHOTO = AugmentConfig(crop="resized", hflip=0.5)
EVERYTHING = {
    "crop and flip": PHOTO,
    "photo with RandAugment": AugmentConfig(rand_augment="rand-m9-n3-p1-mstd0.5-inc1"),
    "pad": AugmentConfig(crop="pad", pad=14),
    "none": AugmentConfig(crop="none"),
    "pad with RandAugment": AugmentConfig(crop="pad", pad=14, rand_augment="rand-m9-n2-p1"),
}


@pytest.fixture
def only_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of RandAugment's operations those that move pixels: colours carry the place here."""
    for name in [name for name, operation in OPERATIONS.items() if operation.apply is not None]:
        monkeypatch.delitem(OPERATIONS, name)


def moved(
    augment: AugmentConfig, count: int, crop_order: str = "corrected", square: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    data = DataConfig(img_size=112, mean=(0, 0, 0), interpolation="bilinear")
    transform = train_transform(data, augment, crop_last=crop_order == "original")
    images, frames = [], []
    with keyed.own_random_state():
        keyed.seed_random_state(5)
        for i in range(count):
            height, width = 100 + 4 * (i % 30), 100 + 4 * (i % 30) if square else 90 + 6 * (i % 23)
            image, frame = transform(slopes(height, width), PictureFrame.whole(height, width, crop_order))
            assert frame.canvas_size == (112, 112) == tuple(image.shape[1:])
            images.append(image)
            frames.append(frame)
    return torch.stack(images), stack_frames(frames)


def test_a_map_that_is_the_picture_stays_with_it_through_a_thousand_crops_and_flips() -> None:
    errors = [float(misalignment(*moved(PHOTO, 250))) for _ in range(4)]
    assert max(errors) < 0.25
    images, frames = moved(PHOTO, 250, crop_order="original")
    assert misalignment(images, frames) > 2.0, "the original exchanges rows and columns"


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_transform_leaves_the_map_behind(name: str, only_geometry: None) -> None:
    assert misalignment(*moved(EVERYTHING[name], 60)) < 0.5


def test_the_original_order_moves_maps_with_all_but_the_crop(only_geometry: None) -> None:
    augment = AugmentConfig(crop="none", hflip=0.5, rand_augment="rand-m9-n2-p1")
    assert misalignment(*moved(augment, 60, crop_order="original", square=True)) < 0.5


def test_the_original_order_flips_before_it_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tool did: label.flip(3), then ROI-align with (top, left) in the place of (x, y)."""
    drawn: list[dict[str, int]] = []
    make_params = RandomResizedCrop.make_params
    monkeypatch.setattr(RandomResizedCrop, "make_params", lambda *args: drawn.append(make_params(*args)) or drawn[-1])
    side = 120
    transform = train_transform(DataConfig(img_size=112), AugmentConfig(crop="resized", hflip=1.0), crop_last=True)
    scores, classes = (part[None] for part in map_of_slopes())
    with keyed.own_random_state():
        keyed.seed_random_state(1)
        for _ in range(10):
            _, frame = transform(slopes(side, side), PictureFrame.whole(side, side, "original"))
            got = resample_label_maps(scores, classes, stack_frames([frame]), (GRID, GRID), 3)
            top, left, height, width = (
                drawn[-1][name] / side * scores.shape[-1] for name in ("top", "left", "height", "width")
            )
            box = torch.tensor([[0.0, top, left, top + height, left + width]])
            expected = roi_align(scores.flip(3), box, (GRID, GRID), aligned=True)
            torch.testing.assert_close(got[0].T.reshape(3, GRID, GRID), expected[0], atol=1e-5, rtol=0)


def test_shifted_arrays_keep_the_original_order_too() -> None:
    """The vectorised path against one image at a time: where a map is read, not only what is seen."""
    images = torch.stack([slopes(28, 28) for _ in range(40)])
    data, augment = DataConfig(img_size=28), AugmentConfig(crop="pad", pad=5, hflip=0.5)
    batch = ShiftAndFlip(images, data, augment, 3, "original")(0, np.arange(40))
    centre = torch.tensor([0.5, 0.5, 1.0])
    seen = batch["image"][:, :2, 13:15, 13:15].float().mean(dim=(2, 3)) / 255  # (x, y) at the centre of the image
    read = batch["frame"][:, 0] @ centre
    flipped = batch["frame"][:, 0, 0, 0] < 0
    assert 5 < flipped.sum() < 35
    # What is read lies as far down as what is seen lies right, in the image that is cropped: the flipped one.
    seen[flipped, 0], read[flipped, 0] = 1 - seen[flipped, 0], 1 - read[flipped, 0]
    torch.testing.assert_close(read, seen.flip(1), atol=0.01, rtol=0)


@given(
    st.sampled_from(["rotate", "shear_x", "shear_y", "translate_x", "translate_y"]),
    st.floats(-0.45, 0.45),
    st.integers(20, 60),
    st.integers(20, 60),
)
@settings(deadline=None, max_examples=60)
def test_geometric_operations_move_a_frame_as_they_move_pixels(name, amount, height, width) -> None:
    amount *= 60 if name == "rotate" else 1
    yes = torch.full((1, height, width), 255, dtype=torch.uint8)
    picture = torch.cat([slopes(height, width)[:2], yes]).float()
    image = move(picture, name, amount, fill=[0.0, 0.0, 0.0])
    frame = move(PictureFrame.whole(height, width), name, amount, None).as_subclass(torch.Tensor)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack([x / width, y / height, torch.ones_like(x)], dim=-1).double()
    at = points @ frame[0].T  # [H, W, 2]
    inside = (image[2] > 254.9) & ((at - 0.5).abs() < 0.5 - 1 / min(height, width)).all(-1)
    error = (at - image[:2].permute(1, 2, 0) / 255).abs().amax(-1)
    assert not inside.any() or error[inside].max() < 0.004
    outside = ((at < -0.01) | (at > 1.01)).any(-1)
    assert (image[2][outside] < 255).all(), "what the frame takes for filling is filling"


@given(
    top=st.integers(0, 60),
    left=st.integers(0, 60),
    height=st.integers(40, 64),
    width=st.integers(40, 64),
    out=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_resampling_is_roi_align_of_the_map_spread_over_all_classes(top, left, height, width, out) -> None:
    h, w = out.draw(st.sampled_from([(18, 18), (7, 9), (4, 4), (1, 1)]))
    size = out.draw(st.sampled_from([(14, 14), (3, 5), (1, 1), (18, 18)]))
    generator = torch.Generator().manual_seed(top + 100 * left)
    classes = torch.rand(2, 11, h, w, generator=generator).argsort(dim=1)[:, :5]
    scores = torch.randn(2, 5, h, w, generator=generator)
    frame = F.crop(PictureFrame.whole(128, 128), top, left, height, width)
    frames = stack_frames([frame, F.horizontal_flip(PictureFrame.whole(30, 20))])
    result = resample_label_maps(scores, classes, frames, size, 11)
    dense = torch.zeros(2, 11, h, w).scatter_(1, classes, scores)
    dense[1] = dense[1].flip(-1)
    box = torch.tensor([left / 128 * w, top / 128 * h, (left + width) / 128 * w, (top + height) / 128 * h])
    boxes = [box[None], torch.tensor([[0.0, 0.0, w, h]])]
    expected = roi_align(dense, boxes, size, aligned=True)
    torch.testing.assert_close(result, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("crop_order", "name"), [("original", "targets_original"), ("corrected", "targets_crop_corrected")]
)
def test_golden_token_label_targets(golden: Path, crop_order: str, name: str) -> None:
    facts = json.loads((golden / "cases.json").read_text())["token_label_targets"]
    golden = safetensors.load_file(golden / "token_label_targets.safetensors")
    side = 10**8  # crops are given as shares; in an image so large none is rounded
    frames = []
    for crop in golden["crop_top_left_height_width"].double() * side:
        top, left, height, width = map(round, crop.tolist())
        frames.append(F.crop(PictureFrame.whole(side, side, crop_order), top, left, height, width))
    maps = golden["scores"], golden["classes"].long(), stack_frames(frames)
    targets = TokenLabelTargets.from_annotation(
        smooth_one_hot(golden["ground_truth"], facts["num_classes"], facts["smoothing"]),
        resample_label_maps(*maps, (1, 1), facts["num_classes"])[:, 0],
        resample_label_maps(*maps, (facts["token_label_size"],) * 2, facts["num_classes"]),
        facts["smoothing"],
    )
    expected = TokenLabelTargets.from_packed(golden[name])
    for part in ("truth", "class_label", "token_labels"):
        torch.testing.assert_close(getattr(targets, part), getattr(expected, part), atol=1e-5, rtol=0)


def test_filling_has_no_label_and_a_mirrored_border_is_read_mirrored() -> None:
    scores, classes = (part[None] for part in map_of_slopes(8))
    shifted = F.affine(PictureFrame.whole(64, 64), angle=0.0, translate=[32.0, 0.0], scale=1.0, shear=[0.0, 0.0])
    logits = resample_label_maps(scores, classes, stack_frames([shifted]), (8, 8), 3).view(8, 8, 3)
    assert (logits[:, :4] == 0).all()
    torch.testing.assert_close(logits[:, 4:, 0], scores[0, 0, :, :4])
    padded = F.pad(PictureFrame.whole(64, 64), [32, 0, 0, 0], padding_mode="reflect")
    logits = resample_label_maps(scores, classes, stack_frames([padded]), (8, 12), 3).view(8, 12, 3)
    torch.testing.assert_close(logits[:, 4:, 0], scores[0, 0])
    torch.testing.assert_close(logits[:, :4, 0], scores[0, 0, :, :4].flip(-1))


def test_position_logits_follow_the_same_rule() -> None:
    logits = torch.randn(2, 7, 9, 6)
    assert torch.equal(resample_position_logits(logits, (7, 9)), logits.flatten(1, 2))
    scores = logits.permute(0, 3, 1, 2)
    classes = torch.arange(6)[None, :, None, None].expand(2, 6, 7, 9)
    whole = stack_frames([PictureFrame.whole(32, 32)] * 2)
    for size in ((1, 1), (4, 4), (14, 14)):
        expected = resample_label_maps(scores, classes, whole, size, 6)
        torch.testing.assert_close(resample_position_logits(logits, size), expected, atol=1e-5, rtol=0)


class Maps(dict):
    """Label maps in a dict."""

    num_classes = 3

    def read_batch(self, names):
        return tuple(torch.stack(parts) for parts in zip(*(self[name] for name in names)))

    def box(self, height, width):
        return 0.0, 0.0, 1.0, 1.0


@pytest.mark.parametrize("rand_augment", ["", "rand-m9-mstd0.5-inc1"], ids=["as a batch", "one by one"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_the_maps_of_their_pictures(rand_augment: str, workers: int, only_geometry: None) -> None:
    picture = slopes(224, 224)
    names = [f"train/{i}" for i in range(12)]
    source = ArraySource(picture.expand(12, -1, -1, -1).contiguous(), torch.arange(12), names, tuple("abcdefghijkl"))
    scores, classes = map_of_slopes()
    maps = Maps({name: (scores + 0.001 * i, classes) for i, name in enumerate(names)})
    data = DataConfig(img_size=224, mean=(0, 0, 0))
    augment = AugmentConfig(crop="pad", pad=20, rand_augment=rand_augment)
    loader = TrainLoader(source, data, augment, batch_size=12, num_workers=workers, label_maps=maps)
    assert loader.is_vectorised == (not rand_augment)
    plain = TrainLoader(source, data, augment, batch_size=12, num_workers=0)
    (batch,), (without,) = list(loader.batches(3, 4)), list(plain.batches(3, 4))
    assert torch.equal(batch["image"], without["image"]), "maps change no draw"
    offset = (batch["map_scores"][:, 0, 0, 0] - scores[0, 0, 0]).mul(1000).round().long()
    assert torch.equal(offset, batch["index"])
    assert misalignment(batch["image"], batch["frame"]) < 0.5
    assert batch["map_box"].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 12


def test_a_map_of_a_part_of_the_picture_is_read_in_its_place() -> None:
    scores, classes = (part[None] for part in map_of_slopes(8))
    frames = stack_frames([PictureFrame.whole(64, 64)])
    box = torch.tensor([[0.25, 0.0, 0.75, 1.0]])  # the map shows the middle rows
    logits = resample_label_maps(scores, classes, frames, (16, 8), 3, box).view(16, 8, 3)
    torch.testing.assert_close(logits[4:12, :, 1], scores[0, 1])
    # Beyond its border the map goes on as it ends.
    torch.testing.assert_close(logits[:4, :, 1], scores[0, 1, :1].expand(4, 8))


def test_padding_by_center_crop_matches_pixels() -> None:
    picture = slopes(30, 41)
    for size in ([20, 50], [31, 41], [29, 40], [51, 12]):
        image = F.center_crop(picture, size)
        frame = F.center_crop(PictureFrame.whole(30, 41), size).as_subclass(torch.Tensor)
        y, x = np.nonzero(image[2].numpy())
        points = np.stack([(x + 0.5) / size[1], (y + 0.5) / size[0], np.ones(len(x))])
        at = frame[0].numpy() @ points
        assert np.abs(at - image[:2, y, x].numpy() / 255).max() < 0.003
