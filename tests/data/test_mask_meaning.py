"""Masks as people have them: held out by a seed, of another size, under other names, 0 and 255, in colours."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from volo.config import DataConfig, SegmentConfig
from volo.data.decode import BadImageError
from volo.data.mask_values import OKABE_ITO, default_colours, palette
from volo.data.masks import (
    IGNORE,
    SegmentationSplits,
    match_names,
    open_classes,
    open_segmentation,
    open_split,
    resize_nearest,
    same_proportions,
)
from volo.data.splits import held_out


def open_there(path: Path, data: dict | None = None, **segment) -> SegmentationSplits:
    return open_segmentation(DataConfig(path=str(path), **(data or {})), SegmentConfig(**segment))


def save_mask(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(path)


def change(root: Path, function) -> None:
    """Write every mask anew: `function` of its values."""
    for path in sorted(root.glob("annotations/**/*.png")) + sorted(root.glob("masks/*.png")):
        save_mask(path, function(np.array(Image.open(path))))


@pytest.fixture
def own(scenes: Path, tmp_path: Path) -> Path:
    return shutil.copytree(scenes, tmp_path / "own")


@pytest.fixture
def flat(scenes: Path, tmp_path: Path) -> Path:
    """images/ and masks/ with 15 files each."""
    for kind, name in (("images", "images"), ("annotations", "masks")):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for split in ("train", "val"):
            for path in (scenes / kind / split).iterdir():
                shutil.copy(path, tmp_path / "flat" / name / f"{split}{path.name}")
    shutil.copy(scenes / "classes.csv", tmp_path / "flat")
    return tmp_path / "flat"


@pytest.fixture
def black_and_white(own: Path) -> Path:
    """Masks of 0 and 255, and no word about classes."""
    (own / "classes.csv").unlink()
    change(own, lambda mask: np.where(mask == 2, 255, 0))
    return own


# Held-out images


def test_a_folder_without_splits_is_split_by_the_seed(flat: Path) -> None:
    splits = open_there(flat, {"val_fraction": 0.2, "split_seed": 3})
    names = [f"images/{path.name}" for path in sorted((flat / "images").iterdir())]
    train, val = held_out(names, [0] * 15, 0.2, 3)
    assert list(splits.val.names) == [names[i] for i in val] and len(val) == 3
    assert list(splits.train.names) == [names[i] for i in train]
    assert splits.notes[1] == "12 training images and 3 held out, chosen by split_seed 3 among the files of images/"
    data = DataConfig(path=str(flat), val_fraction=0.2, split_seed=3)
    said: list[str] = []
    again, _ = open_split(data, SegmentConfig(), "val", on_note=said.append)
    assert list(again.names) == list(splits.val.names)
    assert said == ["3 images of images/, chosen by split_seed 3 among its files"]
    assert list(open_split(data, SegmentConfig(), "train")[0].names) == list(splits.train.names)
    for other in ("test", "elsewhere"):
        with pytest.raises(ValueError, match=f"has no split '{other}'"):
            open_split(data, SegmentConfig(), other)


def test_a_damaged_image_does_not_change_which_are_held_out(flat: Path) -> None:
    before = open_there(flat, {"val_fraction": 0.3})
    broken = before.train.names[2]
    (flat / broken).write_bytes(b"no image")
    (flat / "images" / "lonely.png").write_bytes(b"no mask")
    with pytest.raises(ValueError, match="2 of 16 images") as error:
        open_there(flat, {"val_fraction": 0.3})
    assert str(error.value).count("lonely.png") == 2  # its name, and that of the mask it lacks
    after = open_there(flat, {"val_fraction": 0.3, "on_bad_image": "skip"})
    assert list(after.val.names) == list(before.val.names)
    assert set(before.train.names) - set(after.train.names) == {broken}
    assert len(after.skipped) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda flat: (flat / "images/train").mkdir(),
        lambda flat: (flat / "masks/val").mkdir(),
        lambda flat: (flat / "test.txt").write_text("train00"),
        lambda flat: shutil.move(flat / "images/train00.png", flat / "images/patient" / "a.png"),
    ],
)
def test_a_folder_with_splits_is_not_split_again(flat: Path, spoil) -> None:
    (flat / "images/patient").mkdir()
    spoil(flat)
    (flat / "images/patient").rmdir() if not any((flat / "images/patient").iterdir()) else None
    with pytest.raises(ValueError, match="has no split '(train|val)'"):
        open_there(flat)


def test_one_image_cannot_be_held_out(flat: Path) -> None:
    for path in list((flat / "images").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="1 image with a mask: none can be held out"):
        open_there(flat)
    with pytest.raises(ValueError, match="val_fraction is 1.5"):
        open_there(flat, {"val_fraction": 1.5})


@given(
    st.lists(st.text("abc0123", min_size=1, max_size=6), min_size=2, max_size=40, unique=True),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
    st.randoms(),
)
def test_who_is_held_out_depends_on_names_and_seed_alone(names, fraction, seed, random) -> None:
    train, val = held_out(names, [0] * len(names), fraction, seed)
    assert sorted(train + val) == list(range(len(names))) and train and val
    other = names[:]
    random.shuffle(other)
    again = held_out(other, [0] * len(other), fraction, seed)[1]
    assert {other[i] for i in again} == {names[i] for i in val}


# Sizes


sides = st.integers(8, 400)


@given(sides, sides, st.floats(0.05, 12), st.sampled_from([np.floor, np.ceil, np.round]))
@settings(max_examples=300)
def test_what_one_factor_makes_of_an_image_fits_it(H: int, W: int, factor: float, rounding) -> None:
    mask = (int(rounding(H * factor)), int(rounding(W * factor)))
    if min(mask) >= 4 and (mask[0] == H) == (mask[1] == W) and mask != (H, W):
        assert same_proportions(mask, (H, W)) and same_proportions((H, W), mask)


@given(sides, sides, sides, sides)
def test_what_fits_is_within_a_pixel_of_one_factor(h: int, w: int, H: int, W: int) -> None:
    if same_proportions((h, w), (H, W)):
        (h, w), (H, W) = sorted(((h, w), (H, W)))
        assert abs(w * H - h * W) <= H + W  # a pixel of the smaller one, in units of 1 / (H W)


@pytest.mark.parametrize(
    "mask", [(1, 1), (2, 2), (3, 4), (48, 63), (47, 64), (48, 65), (64, 48), (32, 24), (24, 34), (24, 30), (96, 124)]
)
def test_other_shapes_do_not_fit(mask: tuple[int, int]) -> None:
    assert not same_proportions(mask, (48, 64))


def test_not_even_of_a_square() -> None:
    assert not same_proportions((1, 1), (64, 64)) and same_proportions((16, 16), (64, 64))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_nearest_is_exact_both_ways(h: int, w: int, factor: int) -> None:
    values = np.arange(h * w, dtype=np.uint8).reshape(h, w)
    large = resize_nearest(values, (h * factor, w * factor))
    assert (large == values.repeat(factor, 0).repeat(factor, 1)).all()
    assert (resize_nearest(large, (h, w)) == values).all()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_nearest_is_the_pixel_under_the_centre(h: int, w: int, H: int, W: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (h, w), dtype=np.uint8)
    rows = [min(range(h), key=lambda r: (abs((r + 0.5) / h - (i + 0.5) / H) > 0.5 / h + 1e-9, -r)) for i in range(H)]
    columns = [min(range(w), key=lambda c: (abs((c + 0.5) / w - (i + 0.5) / W) > 0.5 / w + 1e-9, -c)) for i in range(W)]
    assert (resize_nearest(values, (H, W)) == values[rows][:, columns]).all()


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_masks_of_another_size_are_resized(own: Path, cache: str) -> None:
    expected = np.array(Image.open(own / "annotations/train/03.png"))[1::2, 1::2].repeat(2, 0).repeat(2, 1)
    for path in own.glob("annotations/*/*.png"):
        save_mask(path, np.array(Image.open(path))[1::2, 1::2])
    splits = open_there(own, {"cache": cache})
    assert (splits.train.load(3)[1][0].numpy() == expected).all()
    assert splits.train.sizes.tolist() == [[48, 64]] * 10
    (note,) = [note for note in splits.notes if "another size" in note]
    assert note.startswith("15 masks") and note.endswith("annotations/train/00.png: 32 x 24 to 64 x 48")
    assert splits.pixel_counts.sum() + sum(
        int((splits.train.load(i)[1] == IGNORE).sum()) for i in range(10)
    ) == 10 * 48 * 64  # fmt: skip
    save_mask(own / "annotations/train/04.png", np.zeros((24, 35)))
    save_mask(own / "annotations/train/05.png", np.zeros((1, 1)))
    with pytest.raises(ValueError, match="2 of 15") as error:
        open_there(own)
    assert "04.png: the mask has 35 x 24 pixels and its image 64 x 48" in str(error.value)
    assert "05.png: the mask has 1 x 1 pixels and its image 64 x 48" in str(error.value)


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_that_is_turned_and_a_mask_of_half_its_size(own: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in own.glob("images/train/*.png"):
        Image.fromarray(np.array(Image.open(path))).save(path, exif=exif)
    for path in own.glob("annotations/train/*.png"):
        Image.fromarray(np.array(Image.open(path))[::2, ::2]).save(path, exif=exif)
    image, mask = open_there(own).train.load(3)
    stored = torch.from_numpy(np.array(Image.open(own / "annotations/train/03.png")))
    turned = stored.rot90({3: 2, 6: -1}[orientation])
    assert image.shape[1:] == mask.shape[1:]
    assert torch.equal(mask[0, ::2, ::2], turned)
    for path in own.glob("annotations/train/*.png"):
        save_mask(path, np.array(Image.open(path)))
    if orientation == 6:
        with pytest.raises(
            ValueError, match=r"32 x 24 pixels and its image 48 x 64\. The image has EXIF orientation 6"
        ):
            open_there(own)
    else:
        assert sum("EXIF" in note for note in open_there(own).notes) == 1


# Names


def test_masks_may_say_that_they_are_masks(own: Path) -> None:
    plain = open_there(own)
    others = "00_mask 01-mask 02.mask 03_label 04_labels 05_SEG 06_gt 07_annotation mask_08 09_segmentation".split()
    for name in others:
        stem = "".join(c for c in name if c.isdigit())
        (own / f"annotations/train/{stem}.png").rename(own / f"annotations/train/{name}.png")
    splits = open_there(own)
    assert [Path(name).stem for name in splits.train.masks] == others
    assert all(torch.equal(splits.train.load(i)[1], plain.train.load(i)[1]) for i in range(10))
    (note,) = [note for note in splits.notes if "extend their image" in note]
    assert note.startswith("10 masks") and "annotations/train/00_mask.png" in note
    assert not any("extend their image" in note for note in plain.notes)


def test_the_very_name_comes_first_and_two_others_are_refused(own: Path) -> None:
    folder = own / "annotations/train"
    shutil.copy(folder / "01.png", folder / "00_mask.png")
    splits = open_there(own)
    assert splits.train.masks[0] == "annotations/train/00.png"
    assert any("1 masks" in note and "00_mask" in note for note in splits.notes)
    (folder / "00.png").rename(folder / "00_label.png")
    with pytest.raises(ValueError, match=r"has 00_label and 00_mask, which may all be the mask of 00; keep one"):
        open_there(own)


def test_names_of_masks() -> None:
    here = Path("masks")
    assert match_names(["a", "b_mask"], ["a_mask", "b_mask", "b"], here) == {"a": "a_mask", "b_mask": "b_mask"}
    assert match_names(["a", "a_mask"], ["a_mask"], here) == {"a_mask": "a_mask"}
    assert match_names(["x/1", "y/1"], ["x/1_mask", "y/mask_1"], here) == {"x/1": "x/1_mask", "y/1": "y/mask_1"}
    assert match_names(["a"], ["amask", "a_masked", "b_mask", "_mask"], here) == {}
    with pytest.raises(ValueError, match="may be the mask of mask_a or of a_gt"):
        match_names(["mask_a", "a_gt"], ["mask_a_gt"], here)


# What values mean


def test_black_and_white_masks_of_which_nothing_is_said(black_and_white: Path) -> None:
    splits = open_there(black_and_white)
    assert splits.classes.names == ("background", "object")
    assert splits.classes.colours == ((0, 0, 0), OKABE_ITO[0])
    assert splits.classes.object_value == 255
    assert "255 is the object, since masks hold 0 and 255 alone: 0 background, 255 object" in splits.notes
    assert len(splits.notes) == len(set(splits.notes))
    values = np.array(Image.open(black_and_white / "annotations/train/03.png"))
    for cache in ("ram", "none"):
        mask = open_there(black_and_white, {"cache": cache}).train.load(3)[1][0].numpy()
        assert (mask == values // 255).all()
    assert (splits.pixel_counts > 0).all()


@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("classes.txt", "sky\nbox\n", ("sky", "box")),
        ("classes.txt", "lesion\n", ("background", "lesion")),
        ("classes.csv", "index,name\n0,lesion\n", ("background", "lesion")),
        ("classes.csv", "index,name,r,g,b\n1,lesion,9,8,7\n", ("background", "lesion")),
    ],
)
@pytest.mark.parametrize("white", [1, 255])
def test_two_classes_by_name(black_and_white: Path, file: str, content: str, names, white: int) -> None:
    (black_and_white / file).write_text(content)
    change(black_and_white, lambda mask: mask // 255 * white)
    splits = open_there(black_and_white)
    assert splits.classes.names == names and splits.classes.object_value == white
    assert any(note.startswith(f"{white} is the object, since masks hold 0 and {white} alone") for note in splits.notes)
    assert int(splits.train.load(0)[1].max()) == 1
    if "r,g,b" in content:
        assert splits.classes.colours == ((0, 0, 0), (9, 8, 7))


def test_two_classes_by_number(black_and_white: Path) -> None:
    assert open_there(black_and_white, num_classes=2).classes.names == ("background", "object")
    with pytest.raises(ValueError, match="num_classes is 1; it counts the background too: 2"):
        open_there(black_and_white, num_classes=1)
    (black_and_white / "classes.txt").write_text("lesion")
    with pytest.raises(ValueError, match=r"num_classes is 3, but .*names 2 classes \(background, lesion\)"):
        open_there(black_and_white, num_classes=3)


def test_void_never_takes_the_place_of_an_object(own: Path, black_and_white: Path) -> None:
    (own / "classes.txt").write_text("background\nlesion\n")
    change(own, lambda mask: np.where(mask == 255, 1, 0))

    def with_void(mask: np.ndarray) -> np.ndarray:
        mask[:2] = 255
        mask[2, 0] = 1
        return mask

    change(own, with_void)
    splits = open_there(own)
    assert (
        splits.classes.object_value == 1
        and "1 is the object and 255 void, since masks hold both: 0 background, 1 lesion" in splits.notes
    )
    assert (splits.train.load(0)[1][0, :2] == IGNORE).all()
    # More than two classes: 255 stays void.
    change(own, lambda mask: np.where(mask == 255, 255, 0))
    (own / "classes.txt").write_text("background\nlesion\nscar\n")
    with pytest.raises(ValueError, match="only the class 'background' .*255 means void"):
        open_there(own)


def test_masks_that_contradict_one_another(black_and_white: Path) -> None:
    path = black_and_white / "annotations/val/02.png"
    save_mask(path, np.array(Image.open(path)) // 255)
    (black_and_white / "classes.txt").write_text("lesion")
    with pytest.raises(
        ValueError,
        match=r"annotations/val/02\.png holds 1, .*annotations/train/00\.png holds 255 .*segment\.object_value: 1",
    ):
        open_there(black_and_white)
    with pytest.raises(ValueError, match=r"02\.png: values out of range: 1 \(.*allowed are 0, and 255 for the object"):
        open_there(black_and_white, object_value=255)


def test_the_value_of_the_object_can_be_said(black_and_white: Path) -> None:
    (black_and_white / "classes.txt").write_text("lesion")
    assert open_there(black_and_white, object_value=255).classes.object_value == 255
    change(black_and_white, lambda mask: mask // 255 * 128)
    with pytest.raises(ValueError, match=r"128 \(.*if 128 is the object, set segment.object_value to 128"):
        open_there(black_and_white)
    assert int(open_there(black_and_white, object_value=128).train.load(0)[1].max()) == 1
    for value in (0, -2, 256):
        with pytest.raises(
            ValueError, match=f"object_value is {value}; it is the value of the object in masks, 1 to 255"
        ):
            open_there(black_and_white, object_value=value)
    with pytest.raises(ValueError, match="both 128: the object or void"):
        open_there(black_and_white, object_value=128, ignore_label=128)


def test_the_value_of_the_object_is_for_two_classes(own: Path) -> None:
    with pytest.raises(ValueError, match="object_value is 255, which is for masks of two classes"):
        open_there(own, object_value=255)


def test_values_of_which_nothing_is_said_are_named(own: Path) -> None:
    (own / "classes.csv").unlink()
    with pytest.raises(
        ValueError, match=r"says nothing about classes .*values 0, 1, 2, 255\. .*num_classes = 3 \(then 255 is void"
    ):
        open_there(own)
    change(own, lambda mask: np.where(mask > 2, 0, mask))
    with pytest.raises(ValueError, match=r"says nothing about classes .*values 0, 1, 2\. .*num_classes = 3$"):
        open_there(own)


def test_one_name_does_not_shift_with_zero_as_void(black_and_white: Path) -> None:
    (black_and_white / "classes.txt").write_text("lesion")
    with pytest.raises(
        ValueError, match="names one class, 'lesion', beside the background, and segment.reduce_zero_label"
    ):
        open_there(black_and_white, reduce_zero_label=True)
    (black_and_white / "classes.txt").write_text("background")
    with pytest.raises(ValueError, match="names the background alone"):
        open_there(black_and_white)


def test_a_sample_is_looked_at_where_nothing_is_checked(black_and_white: Path) -> None:
    splits = open_there(black_and_white, {"check": "off"})
    assert splits.classes.names == ("background", "object") and int(splits.train.load(0)[1].max()) == 1
    assert any("(10 of them were looked at)" in note for note in splits.notes)
    path = black_and_white / "annotations/val/02.png"
    save_mask(path, np.array(Image.open(path)) // 255)
    with pytest.raises(
        BadImageError, match=r"02\.png: values out of range: 1 .*255 is the object, since .*looked at.*object_value"
    ):
        splits.val.load(2)
    change(black_and_white, lambda mask: np.where(mask > 0, 1, 0))
    splits = open_there(black_and_white, {"check": "off"})
    save_mask(path, np.array(Image.open(path)) * 255)
    with pytest.raises(
        BadImageError, match=r"02\.png: values out of range: 255 .*1 is the object, since .*object_value"
    ):
        splits.val.load(2)


# What a model has learned


KNOWN = ("background", "lesion"), ((0, 0, 0), (9, 9, 9))


def test_a_model_that_learned_255_as_void_does_not_see_it_as_the_object(black_and_white: Path) -> None:
    data = DataConfig(path=str(black_and_white))
    with pytest.raises(
        ValueError,
        match=r"hold 0 and 255, as if 255 were the object; .*with 1 for the object and 255 for void.*object-value 255",
    ):
        open_split(data, SegmentConfig(), "val", known=KNOWN, learned=1)
    said = open_split(data, SegmentConfig(object_value=255), "val", known=KNOWN, learned=1)[0]
    same = open_split(data, SegmentConfig(), "val", known=KNOWN, learned=255)[0]
    assert all(torch.equal(said.load(i)[1], same.load(i)[1]) for i in range(5))
    save_mask(black_and_white / "annotations/val/02.png", np.ones((48, 64)))
    notes: list[str] = []
    open_split(data, SegmentConfig(), "val", known=KNOWN, learned=1, on_note=notes.append)
    assert notes == ["1 is the object and 255 void in these masks, as the model learned"]
    change(black_and_white, lambda mask: np.where(mask == 1, 0, mask))
    void = open_split(data, SegmentConfig(object_value=1), "val", known=KNOWN, learned=1)[0]
    assert {int(v) for v in void.load(0)[1].unique()} == {0, IGNORE}
    change(black_and_white, lambda mask: mask // 255)
    with pytest.raises(ValueError, match=r"hold 0 and 1, as if 1 were the object; .*with 255 for the object\."):
        open_split(data, SegmentConfig(), "val", known=KNOWN, learned=255)


# Palettes and colours


def test_indices_of_a_palette_are_the_classes(own: Path) -> None:
    plain = open_there(own)
    for path in own.glob("annotations/train/*.png"):
        image = Image.open(path).copy()
        image.putpalette([255 - i for i in range(256) for _ in range(3)])
        image.save(path)
    splits = open_there(own)
    assert torch.equal(splits.train.load(0)[1], plain.train.load(0)[1])
    (note,) = [note for note in splits.notes if "palette" in note]
    assert note.startswith(
        "10 masks, such as annotations/train/00.png, are palette images: their indices are the numbers"
    )


def in_colours(root: Path) -> None:
    """Masks in the colours of classes.csv; void, which it does not name, is sky."""
    table = np.zeros((256, 3), np.uint8)
    table[:] = 70, 130, 180
    table[1], table[2] = (90, 60, 30), (220, 20, 60)
    change(root, lambda mask: table[mask])


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_colours_that_classes_csv_names_are_the_classes(own: Path, cache: str) -> None:
    change(own, lambda mask: np.where(mask == 255, 0, mask))
    plain = open_there(own)
    in_colours(own)
    splits = open_there(own, {"cache": cache})
    assert splits.pixel_counts.tolist() == plain.pixel_counts.tolist()
    assert all(torch.equal(splits.train.load(i)[1], plain.train.load(i)[1]) for i in range(10))
    assert any("15 masks" in note and "their colours are the classes" in note for note in splits.notes)


def test_other_colours_are_named(own: Path) -> None:
    in_colours(own)
    mask = np.array(Image.open(own / "annotations/val/01.png"))
    mask[:2, :3] = 255, 0, 16
    save_mask(own / "annotations/val/01.png", mask)
    with pytest.raises(
        ValueError, match=r"1 of 15 .*\n.*val/01\.png: .*does not name #ff0010 \(6 pixels\); .*index,name,r,g,b"
    ):
        open_there(own)
    for content in (
        "index,name\n0,sky\n1,ground\n2,box\n",
        "index,name,r,g,b\n0,sky,1,1,1\n1,ground,1,1,1\n2,box,2,2,2\n",
    ):
        (own / "classes.csv").write_text(content)
        with pytest.raises(ValueError, match=r"15 of 15 .*\n.*this is RGB, with the colours #4682b4 \("):
            open_there(own)
    (own / "classes.csv").unlink()
    with pytest.raises(ValueError, match=r"15 of 15 .*\n.*this is RGB, with the colours"):
        open_there(own)


def test_grey_masks_in_rgb(black_and_white: Path) -> None:
    plain = open_there(black_and_white)
    for path in black_and_white.glob("annotations/*/*.png"):
        Image.open(path).convert("RGB").save(path)
    splits = open_there(black_and_white)
    assert splits.pixel_counts.tolist() == plain.pixel_counts.tolist()
    assert any("15 masks" in note and "their grey levels" in note for note in splits.notes)


def test_default_colours() -> None:
    assert default_colours(["background", "a", "b"]) == [(0, 0, 0), *OKABE_ITO[:2]]
    assert len(set(default_colours([*"abcdefgh"]))) == 8
    assert default_colours([*"abcdefghi"]) == palette(9)


def test_classes_without_a_look_at_the_masks(black_and_white: Path) -> None:
    data = DataConfig(path=str(black_and_white))
    with pytest.raises(ValueError, match="says nothing about classes"):
        open_classes(data, SegmentConfig())
    _, classes = open_classes(data, SegmentConfig(object_value=255), KNOWN)
    assert classes.meaning[[0, 255, 1]].tolist() == [0, 1, -1]
