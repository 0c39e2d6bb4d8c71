"""Folders of images with masks: every layout, and everything that can be wrong, named before a training starts."""

from __future__ import annotations

import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from volo.config import DataConfig, SegmentConfig
from volo.data import masks
from volo.data.masks import (
    CITYSCAPES,
    IGNORE,
    find_pairs,
    open_classes,
    open_segmentation,
    open_split,
    palette,
)
from volo.data.sources import available_cores


def open_there(path: Path, on_bad_image="error", cache="auto", **segment):
    return open_segmentation(
        DataConfig(path=str(path), on_bad_image=on_bad_image, cache=cache), SegmentConfig(**segment)
    )


def save_mask(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def own(scenes: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(scenes, tmp_path / "own")


def test_folders(scenes: Path) -> None:
    seen = []
    splits = open_segmentation(
        DataConfig(path=str(scenes)), SegmentConfig(), on_progress=lambda done, total: seen.append((done, total))
    )
    assert (len(splits.train), len(splits.val)) == (10, 5)
    assert splits.classes.names == ("sky", "ground", "box")
    assert splits.classes.colours[2] == (220, 20, 60)
    assert seen[-1] == (15, 15)
    assert seen == sorted(seen)
    image, mask = splits.val.load(3)
    assert splits.val.names[3] == "images/val/03.png"
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(scenes / "images/val/03.png"))).permute(2, 0, 1))
    assert torch.equal(mask[0], torch.from_numpy(np.array(Image.open(scenes / "annotations/val/03.png"))))
    masks = [np.array(Image.open(path)) for path in (scenes / "annotations/train").glob("*.png")]
    assert splits.pixel_counts.tolist() == [int(sum((m == k).sum() for m in masks)) for k in range(3)]


def test_cached_or_not_the_pictures_are_the_same(scenes: Path) -> None:
    cached, plain = (open_there(scenes, cache=kind).train for kind in ("ram", "none"))
    assert cached.pixel_cache is not None and plain.pixel_cache is None
    for i in range(len(cached)):
        assert all(torch.equal(a, b) for a, b in zip(cached.load(i), plain.load(i), strict=True))


def test_ade20k_layout_with_zero_as_background(scenes: Path, tmp_path: Path) -> None:
    for split, name in (("train", "training"), ("val", "validation")):
        for kind in ("images", "annotations"):
            shutil.copytree(scenes / kind / split, tmp_path / kind / name)
    for path in tmp_path.glob("annotations/*/*.png"):
        mask = np.array(Image.open(path)).astype(int)
        save_mask(path, np.where(mask == 255, 0, mask + 1))
    rows = [f"{i + 1}\t0.1\t1\t1\t0\t{name}" for i, name in enumerate(["sky", "ground, earth", "box"])]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
    reduced, plain = open_there(tmp_path, reduce_zero_label=True), open_there(scenes)
    assert reduced.classes.names == ("sky", "ground", "box")
    for i in range(10):
        assert torch.equal(reduced.train.load(i)[1], plain.train.load(i)[1])
    with pytest.raises(ValueError, match=r"3 \(\d+ pixels\); allowed are 0 to 2, and 255 for void"):
        open_there(tmp_path)


def test_lists_choose_and_order(own: Path) -> None:
    (own / "train.txt").write_text("04\n01.png\n\n02 0.5\n")
    assert [Path(n).stem for n in open_there(own).train.names] == ["04", "01", "02"]
    (own / "train.txt").write_text("04\n17\n18.png x.png\n")
    (own / "annotations/val/01.png").unlink()
    with pytest.raises(ValueError, match=r"3 of 8 images") as error:
        open_there(own)
    assert "  17: train.txt names it, but images/train/ has no such image\n  18.png x.png: train" in str(error.value)
    splits = open_there(own, on_bad_image="skip")
    assert [Path(n).stem for n in splits.train.names] == ["04"] and len(splits.skipped) == 3
    (own / "train.txt").write_text("04\n04\n")
    with pytest.raises(ValueError, match="twice"):
        open_there(own)


def test_names_with_spaces(own: Path) -> None:
    for kind in ("images", "annotations"):
        (own / kind / "train/04.png").rename(own / kind / "train/04 b.png")
    (own / "train.txt").write_text("04 b.png\n02 b.png\n 03 0.5\ntrain/04 b\n")
    with pytest.raises(ValueError, match="twice"):
        open_there(own)
    (own / "train.txt").write_text("04 b.png\n02 b.png\n 03 0.5\n")
    assert [Path(n).stem for n in open_there(own).train.names] == ["04 b", "02", "03"]


def test_few_decoded_pictures_wait(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[weakref.ref] = []
    most = 0

    read_pair = masks._read_pair

    def watched(*args):
        pair = read_pair(*args)
        decoded.append(weakref.ref(pair[0]))
        return pair

    def slow(done: int, total: int) -> None:
        nonlocal most
        time.sleep(0.02)  # the others could all be decoded meanwhile
        most = max(most, sum(ref() is not None for ref in decoded))

    monkeypatch.setattr("volo.data.masks._read_pair", watched)
    data = DataConfig(path=str(scenes), cache="none")
    open_split(data, SegmentConfig(), "train", on_progress=slow)
    assert len(decoded) == 10 and most <= max(2, available_cores()), "no more than are being decoded"


def test_flat_folders_with_lists(scenes: Path, tmp_path: Path) -> None:
    for kind in ("images", "annotations"):
        (tmp_path / kind).mkdir()
        for path in (scenes / kind / "train").iterdir():
            shutil.copy(path, tmp_path / kind / path.name)
    assert len(open_there(tmp_path, num_classes=3).val) == 1, "held out by the seed"
    (tmp_path / "train.txt").write_text("\n".join(f"{i:02}" for i in range(7)))
    with pytest.raises(ValueError, match="has no split 'val'"):
        open_there(tmp_path, num_classes=3)
    (tmp_path / "val.txt").write_text("07\n08")
    splits = open_there(tmp_path, num_classes=3)
    assert (len(splits.train), len(splits.val)) == (7, 2)
    assert splits.classes.names == ("0", "1", "2")


def test_cityscapes_layout(tmp_path: Path) -> None:
    ids = np.arange(34, dtype=np.uint8).repeat(4).reshape(8, 17)
    ids[0, 0] = 255
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / split / city).mkdir(parents=True)
        stem = f"{city}_000000_000019"
        Image.new("RGB", (17, 8)).save(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        save_mask(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", ids)
    splits = open_there(tmp_path)
    assert splits.classes.names[:2] == ("road", "sidewalk") and len(splits.classes) == 19
    mask = splits.train.load(0)[1][0].numpy()
    expected = np.full(256, IGNORE)
    expected[[label_id for _, label_id, _ in CITYSCAPES]] = np.arange(19)
    assert (mask == expected[ids]).all()
    assert (mask == IGNORE).sum() == (34 - 19) * 4  # 255 took the place of one pixel of id 0
    (tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match="lindau_000000_000019_leftImg8bit.png: there is no mask for it"):
        open_there(tmp_path)
    with pytest.raises(ValueError, match="no test/"):
        find_pairs(tmp_path, SegmentConfig(), "test")


def test_camvid(shared: Path) -> None:
    data, segment = DataConfig(path=str(shared / "data/camvid")), SegmentConfig(ignore_label=11)
    root, classes = open_classes(data, segment)
    counts = {split: len(find_pairs(root, segment, split).names) for split in ("train", "val", "test")}
    assert counts == {"train": 367, "val": 101, "test": 233}
    assert classes.names[0] == "sky" and classes.names[-1] == "bicyclist" and len(classes) == 11
    assert classes.meaning[11] == classes.meaning[255] == IGNORE


def test_everything_that_is_wrong_is_named_at_once(own: Path) -> None:
    (own / "annotations/train/00.png").unlink()
    save_mask(own / "annotations/train/01.png", np.zeros((48, 63)))
    mask = np.array(Image.open(own / "annotations/val/02.png"))
    mask[:2, :3] = 7
    save_mask(own / "annotations/val/02.png", mask)
    Image.open(own / "images/val/03.png").convert("RGB").save(own / "annotations/val/03.png")
    (own / "images/train/04.png").write_bytes((own / "images/train/04.png").read_bytes()[:200])
    (own / "annotations/train/05.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        open_there(own)
    text = str(error.value)
    assert text.startswith("6 of 15 images")
    for line in (
        "images/train/00.png: there is no mask for it",
        "annotations/train/01.png: the mask has 63 x 48 pixels and its image 64 x 48",
        "annotations/val/02.png: values out of range: 7 (6 pixels); allowed are 0 to 2, and 255 for void",
        "annotations/val/03.png: a mask has one channel of class numbers, this is RGB",
        "images/train/04.png: damaged",
        "annotations/train/05.png: the file is empty",
    ):
        assert line in text
    splits = open_there(own, on_bad_image="skip")
    assert (len(splits.train), len(splits.val), len(splits.skipped)) == (6, 3, 6)
    assert [Path(n).stem for n in splits.train.names] == ["02", "03", "06", "07", "08", "09"]
    assert torch.equal(splits.train.load(1)[1], open_there(own, on_bad_image="skip", cache="none").train.load(1)[1])


def test_masks_without_pictures_are_noted(own: Path) -> None:
    (own / "images/train/03.png").unlink()
    assert any("1 masks" in note and "03" in note for note in open_there(own).notes)


def test_a_class_without_training_pixels_is_noted(own: Path) -> None:
    with (own / "classes.csv").open("a") as file:
        file.write("3,unicorn,255,255,255\n")
    assert open_there(own).notes[2:] == ["1 of 4 classes have no training pixels: unicorn"]


def test_an_ignored_label_and_palette_masks(own: Path) -> None:
    for path in own.glob("annotations/*/*.png"):
        mask = np.array(Image.open(path))
        image = Image.fromarray(np.where(mask == 255, 11, mask).astype(np.uint8))
        image.putpalette([i for i in range(256) for _ in range(3)])
        image.save(path)
    with pytest.raises(ValueError, match=r"11 \(36 pixels\)"):
        open_there(own)
    assert int(open_there(own, ignore_label=11).train.load(0)[1].max()) == IGNORE


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own: shutil.rmtree(own / "annotations"), "no images/ and annotations/"),
        (lambda own: (own / "classes.csv").unlink(), "says nothing about classes"),
        (lambda own: (own / "classes.csv").write_text("index,name\n0,a\n2,b\n"), "index must count from 0"),
        (lambda own: shutil.rmtree(own / "images/val"), "has no split 'val'"),
        (lambda own: shutil.copy(own / "images/train/00.png", own / "images/train/00.jpg"), "the same name"),
    ],
)
def test_layouts_that_are_not_understood(own: Path, spoil, message: str) -> None:
    spoil(own)
    with pytest.raises(ValueError, match=message):
        open_there(own)


def test_contradictions(scenes: Path) -> None:
    with pytest.raises(ValueError, match=r"num_classes is 4, but .*classes\.csv names 3"):
        open_there(scenes, num_classes=4)
    with pytest.raises(ValueError, match="which is no folder"):
        open_there(scenes / "nowhere")
    with pytest.raises(ValueError, match="ignore_label"):
        open_there(scenes, ignore_label=300)


def test_one_split_for_an_evaluation(scenes: Path) -> None:
    pictures, skipped = open_split(DataConfig(path=str(scenes)), SegmentConfig(), "test")
    assert (len(pictures), skipped) == (3, [])
    assert pictures.sizes.tolist() == [[48, 64]] * 3


def test_classes_that_are_known_already(own: Path) -> None:
    known = ("a", "b", "c"), tuple(palette(3))
    there, _ = open_split(DataConfig(path=str(own)), SegmentConfig(), "test", known=known)
    assert there.classes.names == ("sky", "ground", "box")
    (own / "classes.csv").unlink()
    bare, _ = open_split(DataConfig(path=str(own)), SegmentConfig(), "test", known=known)
    assert (bare.classes.names, bare.classes.colours) == known


def test_palette_never_repeats() -> None:
    assert len(set(palette(255))) == 255
    assert palette(2) == [(128, 0, 0), (0, 128, 0)]


def test_black_and_white_masks_are_stopped_before_the_training(own: Path) -> None:
    (own / "classes.csv").unlink()
    (own / "classes.txt").write_text("background\nlesion\n")
    for path in own.glob("annotations/*/*.png"):
        save_mask(path, np.where(np.array(Image.open(path)) > 0, 255, 0))
    with pytest.raises(
        ValueError,
        match=r"values 0 \(.* 255 \(.*only the class 'background' .*255 means void.*object_value to 255.*1 for white",
    ):
        open_there(own, object_value=1)
    for path in own.glob("annotations/*/*.png"):
        Image.open(path).convert("1").save(path)  # one bit: 0 and 1
    splits = open_there(own)
    assert (splits.pixel_counts > 0).all()
    assert splits.notes[0].startswith("2 classes (share of the training pixels): background 4")


@pytest.mark.parametrize("orientation", [2, 3, 4, 6, 8])
def test_image_and_mask_are_turned_together(own: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    before = open_there(own).train.load(3)
    for kind in ("images", "annotations"):
        for path in own.glob(f"{kind}/train/*.png"):
            Image.fromarray(np.array(Image.open(path))).save(path, exif=exif)
    image, mask = open_there(own).train.load(3)
    turn = {2: lambda x: x.flip(-1), 3: lambda x: x.rot90(2, (-2, -1)), 4: lambda x: x.flip(-2), 6: lambda x: x.rot90(-1, (-2, -1)), 8: lambda x: x.rot90(1, (-2, -1))}  # fmt: skip
    assert torch.equal(image, turn[orientation](before[0])) and torch.equal(mask, turn[orientation](before[1]))
    for path in own.glob("annotations/train/*.png"):
        save_mask(path, np.array(Image.open(path)))
    if orientation < 5:
        assert any("10 images have an EXIF orientation and their masks none" in note for note in open_there(own).notes)
    else:
        with pytest.raises(ValueError, match=rf"EXIF orientation {orientation} and the mask 1: draw the mask"):
            open_there(own)


def test_texts_with_a_byte_order_mark_or_in_another_encoding(own: Path) -> None:
    (own / "train.txt").write_bytes("\ufeff00\r\n01.png\r\n".encode())
    (own / "classes.csv").write_bytes(b"\xef\xbb\xbf" + (own / "classes.csv").read_bytes())
    splits = open_there(own)
    assert len(splits.train) == 2 and splits.classes.names == ("sky", "ground", "box")
    (own / "classes.csv").unlink()
    (own / "classes.txt").write_bytes("\ufeffsky\r\nground\r\nbox\r\n".encode())
    assert open_there(own).classes.names == ("sky", "ground", "box")
    for content, line in (("sky\nstra\xdfe\nbox\n".encode("latin-1"), 2), ("sky\nroad\nbox\n".encode("utf-16"), 1)):
        (own / "classes.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"classes\.txt is not UTF-8 text .* in line {line}"):
            open_there(own)


def test_it_is_said_why_there_is_no_mask(own: Path) -> None:
    folder = own / "annotations/train"
    Image.open(folder / "00.png").save(folder / "00.jpg")
    (folder / "00.png").unlink()
    (folder / "01.png").rename(folder / "01_roi.png")
    (folder / "02.png").unlink()
    with pytest.raises(ValueError) as error:
        open_there(own)
    for line in (
        "images/train/00.png: there is no mask for it: annotations/train/ has 00.jpg, but JPEG changes class numbers",
        "images/train/01.png: there is no mask for it: annotations/train/ has 01_roi.png, but the name has to be 01.png",
        "images/train/02.png: there is no mask for it (annotations/train/02.png)",
    ):
        assert line in str(error.value)


def test_lists_with_paths_and_names_in_two_spellings(own: Path) -> None:
    for kind, name in (("images", "caf\u00e9.png"), ("annotations", "cafe\u0301.png")):
        (own / kind / "train/00.png").rename(own / kind / "train" / name)
    assert len(open_there(own).train) == 10
    shutil.move(own / "annotations/train/03.png", own / "annotations/other.png")
    (own / "train.txt").write_text(
        "images/train/01.png annotations/train/01.png\ntrain/02.png\n./images/train/03.png annotations/other.png\n"
        "images\\train\\04.png\ncafe\u0301\n"
    )
    splits = open_there(own)
    assert [Path(name).stem for name in splits.train.names] == ["01", "02", "03", "04", "caf\u00e9"]
    assert splits.train.masks[2] == "annotations/other.png"


@pytest.mark.parametrize(("train", "val"), [("Train", "Test-not"), ("training_set", "dev"), ("my_train", "my_val")])
def test_splits_of_masks_by_any_name(own: Path, train: str, val: str) -> None:
    val = "Val" if val == "Test-not" else val
    for kind in ("images", "annotations"):
        (own / kind / "train").rename(own / kind / train)
        (own / kind / "val").rename(own / kind / val)
    splits = open_there(own)
    assert (len(splits.train), len(splits.val)) == (10, 5)
    assert f"images/{train}/" in splits.notes[1] and f"images/{val}/" in splits.notes[1]


def test_data_that_is_not_checked_opens_at_once(own: Path) -> None:
    (own / "annotations/train/05.png").write_bytes(b"")
    data = DataConfig(path=str(own), check="off")
    splits = open_segmentation(data, SegmentConfig())
    assert (len(splits.train), splits.val.sizes[0].tolist()) == (10, [48, 64])
    with pytest.raises(ValueError, match="class_weights 'log' are computed from the masks"):
        open_segmentation(data, SegmentConfig(class_weights="log"))
