"""Folders, npz files, CIFAR and the digits through `open_data`, and what it says when they are wrong."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from volo.config import DataConfig
from volo.data import folders
from volo.data.decode import BadImageError
from volo.data.images import ArraySource, FolderSource, decode_image, open_data, open_folder
from volo.data.sources import DataSplits, Names, PixelCache, Share, cache_budget, local_processes
from volo.data.splits import held_out


def save(path: Path, color: int = 0, size: tuple[int, int] = (12, 8)) -> Path:
    """An image of noise around `color`, different for every path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path)) + color).integers(0, 50, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(color)).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """train/ with two classes of 6, val/ of 2."""
    for part, count in (("train", 6), ("val", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", 100 * c, (12 + i, 8))
    return tmp_path


def config(path: Path | str = "", **options: object) -> DataConfig:
    return DataConfig(path=str(path), **{"img_size": 16, **options})  # type: ignore[arg-type]


# Folders


def test_train_and_val_folders(pictures: Path) -> None:
    seen = []
    splits = open_data(config(pictures), on_progress=lambda done, total: seen.append((done, total)))
    assert splits.classes == splits.train.classes == ("cat", "dog")
    assert list(splits.train.names[:2]) == ["train/cat/0.png", "train/cat/1.png"]
    assert splits.train.targets.tolist() == [0] * 6 + [1] * 6
    assert list(splits.val.names) == ["val/cat/0.png", "val/cat/1.png", "val/dog/0.png", "val/dog/1.png"]
    assert splits.val.targets.tolist() == [0, 0, 1, 1]
    assert seen[-1] == (16, 16)
    assert splits.skipped == []
    assert splits.notes == [
        "2 classes (training + held-out images): cat 6 + 2, dog 6 + 2",
        "12 training images and 4 held out: train/ and val/",
    ]
    assert torch.equal(splits.val.load(3), decode_image(pictures / "val/dog/1.png"))


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_the_held_out_folder(pictures: Path, name: str) -> None:
    (pictures / "val").rename(pictures / name)
    assert open_data(config(pictures)).val.names[0] == f"{name}/cat/0.png"


@pytest.mark.parametrize("below", ["", "train"])
def test_one_folder_is_split_by_seed(pictures: Path, below: str) -> None:
    if below:
        for file in (pictures / "val").rglob("*.png"):
            file.unlink()
        for folder in ("val/cat", "val/dog", "val"):
            (pictures / folder).rmdir()
    root = pictures if below else pictures / "train"
    splits = open_data(config(root, val_fraction=0.34))
    names = [*splits.train.names, *splits.val.names]
    assert len(set(names)) == 12
    assert Counter(splits.val.targets.tolist()) == {0: 2, 1: 2}
    again = open_data(config(root, val_fraction=0.34))
    assert list(again.val.names) == list(splits.val.names)
    others = [list(open_data(config(root, val_fraction=0.34, split_seed=seed)).val.names) for seed in range(1, 5)]
    assert any(other != list(splits.val.names) for other in others)


@pytest.mark.parametrize("cache", ["auto", "ram", "none"])
def test_cached_pixels_are_the_decoded_ones(pictures: Path, cache: str) -> None:
    splits = open_data(config(pictures, cache=cache))
    assert isinstance(splits.train, FolderSource)
    assert (splits.train.cache is not None) == (cache != "none")
    for source in (splits.train, splits.val):
        for i, name in enumerate(source.names):
            assert torch.equal(source.load(i), decode_image(pictures / name))


def test_cache_gives_up_where_pictures_do_not_fit(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "cache_budget", lambda: 3 * 12 * 8 * 4)
    splits = open_data(config(pictures))
    assert isinstance(splits.train, FolderSource)
    assert splits.train.cache is None
    assert len(splits.train) == 12


def test_the_cache_budget_is_sane_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for nothing in ("4", "", "many"):  # as batch systems set it for purposes of their own
        monkeypatch.setenv("LOCAL_WORLD_SIZE", nothing)
        assert local_processes() == 1
    alone = cache_budget()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < cache_budget() < alone


def test_pixel_cache_takes_pictures_of_any_size() -> None:
    pictures = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((4, 7), (1, 1), (9, 2))]
    cache = PixelCache.of(list(pictures))
    assert all(torch.equal(cache[i], picture) for i, picture in enumerate(pictures))
    assert torch.equal(cache.select([2, 0])[0], pictures[2])


def spoil(root: Path) -> None:
    (root / "train/cat/empty.jpg").write_bytes(b"")
    (root / "train/dog/text.jpg").write_text("no image")
    data = (root / "val/dog/1.png").read_bytes()
    (root / "val/dog/1.png").write_bytes(data[: len(data) // 2])


def test_bad_files_are_all_named_before_training(pictures: Path) -> None:
    spoil(pictures)
    with pytest.raises(ValueError, match="3 of 18 images") as error:
        open_data(config(pictures))
    for part in (
        "train/cat/empty.jpg: the file is empty",
        "train/dog/text.jpg: not an image",
        "val/dog/1.png: damaged",
    ):
        assert part in str(error.value)
    assert "on_bad_image" in str(error.value)


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_bad_files_can_be_left_out(pictures: Path, cache: str) -> None:
    spoil(pictures)
    splits = open_data(config(pictures, on_bad_image="skip", cache=cache))
    assert sorted(bad.name for bad in splits.skipped) == ["train/cat/empty.jpg", "train/dog/text.jpg", "val/dog/1.png"]
    assert len(splits.train) == 12
    assert list(splits.val.names) == ["val/cat/0.png", "val/cat/1.png", "val/dog/0.png"]
    for source in (splits.train, splits.val):
        for i, name in enumerate(source.names):
            assert torch.equal(source.load(i), decode_image(pictures / name))


def test_a_class_of_bad_files_only_is_an_error_even_when_skipping(pictures: Path) -> None:
    for file in (pictures / "train/dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no image that can be decoded in 1 classes: dog"):
        open_data(config(pictures, on_bad_image="skip"))


def test_what_decoding_found_in_a_large_folder_is_kept(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(folders, "decode_image", lambda path, name: tried.append(name) or decode_image(path, name))
    monkeypatch.setattr(folders, "REMEMBERED_FROM", 4)
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path / "cache"))
    (pictures / "train/dog/text.jpg").write_text("text")
    damaged = config(pictures, on_bad_image="skip", cache="none")
    first = open_data(damaged)
    count = len(tried)
    assert count == len(first.train) + len(first.val) + 1
    again = open_data(damaged)
    assert len(tried) == count
    assert again.skipped == first.skipped and list(again.train.names) == list(first.train.names)
    assert torch.equal(again.train.targets, first.train.targets)
    with pytest.raises(ValueError, match="text.jpg"):
        open_data(config(pictures, cache="none"))
    assert len(tried) == count
    save(pictures / "train/dog/text.jpg")
    assert not open_data(damaged).skipped
    assert len(tried) > count
    count = len(tried)
    for file in (tmp_path / "cache/tried").iterdir():
        file.write_text("{")
    open_data(damaged)
    assert len(tried) > count, "a damaged cache is no cache"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_picture_of_a_large_set_is_decoded(tmp_path: Path) -> None:
    """One damaged file among 200,001 would otherwise stop the run hours later."""
    whole = save(tmp_path / "whole.png", size=(1, 1))
    for c in "ab":
        (tmp_path / "set" / c).mkdir(parents=True)
        for i in range(100_000):
            (tmp_path / "set" / c / f"{i}.png").symlink_to(whole)
    (tmp_path / "set/b/damaged.png").write_bytes(save(tmp_path / "damaged.png").read_bytes()[:100])
    splits = open_data(config(tmp_path / "set", on_bad_image="skip", cache="none"))
    assert [bad.name for bad in splits.skipped] == ["b/damaged.png"]


def test_what_lies_around_is_ignored_and_told(pictures: Path) -> None:
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
        (pictures / "train/cat" / name).write_text("x")
    (pictures / "train/.hidden").mkdir()
    save(pictures / "train/.hidden/x.png")
    save(pictures / "train/__MACOSX/x.png")
    (pictures / "train/README.txt").write_text("x")
    (pictures / "train/cat/labels.csv").write_text("x")
    splits = open_data(config(pictures))
    assert len(splits.train) == 12
    assert splits.classes == ("cat", "dog")
    note = splits.notes[2]
    assert "2 files" in note
    assert "README.txt" in note
    assert "cat/labels.csv" in note


def test_pictures_in_nested_folders_and_with_odd_names_count(pictures: Path) -> None:
    save(pictures / "train/cat/2024/märz/ä b.PNG")
    (pictures / "train/cat/2024/circle").symlink_to(pictures / "train")
    splits = open_data(config(pictures))
    assert "train/cat/2024/märz/ä b.PNG" in list(splits.train.names)
    assert len(splits.train) == 13


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x1b[31ma"])
def test_names_that_cannot_be_shown_are_refused(pictures: Path, name: str) -> None:
    for split in ("train", "val"):
        save(pictures / split / name / "1.png")
    with pytest.raises(ValueError, match="control character") as told:
        open_data(config(pictures))
    assert repr(name) in str(told.value)
    assert "\x1b" not in str(told.value)


def test_empty_classes_are_named(pictures: Path) -> None:
    (pictures / "train/emu").mkdir()
    (pictures / "train/fox").mkdir()
    with pytest.raises(ValueError, match="2 class folders.*emu, fox"):
        open_data(config(pictures))


def test_val_classes_that_training_does_not_know_are_named(pictures: Path) -> None:
    (pictures / "val/dog").rename(pictures / "val/Dog")
    with pytest.raises(ValueError, match="1 class folders in .* are unknown: Dog.*cat, dog"):
        open_data(config(pictures))


def test_a_class_without_held_out_pictures_is_noted(pictures: Path) -> None:
    for file in (pictures / "val/dog").iterdir():
        file.unlink()
    (pictures / "val/dog").rmdir()
    assert open_data(config(pictures)).notes[2:] == ["1 classes have no held-out images: dog"]


def test_layouts_that_are_not_understood(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(ValueError, match="which holds nothing"):
        open_data(config(other))
    (other / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt.*\n.*data.path can be"):
        open_data(config(other))
    with pytest.raises(ValueError, match="a file that is neither .npz nor .tar"):
        open_data(config(other / "notes.txt"))
    with pytest.raises(ValueError, match="does not exist"):
        open_data(config(other / "missing"))
    (other / "a").mkdir()
    with pytest.raises(ValueError, match="no images in the folders"):
        open_data(config(other))
    save(other / "a/0.png")
    with pytest.raises(ValueError, match="one class folder only, a"):
        open_data(config(other))
    save(other / "b/0.png")
    with pytest.raises(ValueError, match="none can be held out"):
        open_data(config(other))
    with pytest.raises(ValueError, match="needs a folder"):
        open_data(config("", kind="folder"))
    with pytest.raises(ValueError, match="val_fraction is 1.5"):
        open_data(config(other, val_fraction=1.5))
    save(pictures / "train/loose.png")
    for folder in ("train/cat", "train/dog"):
        (pictures / folder).rename(pictures / folder.replace("train/", ""))
    with pytest.raises(ValueError, match="has val/, which may be a split or a class beside cat/, dog/.*--data.splits"):
        open_data(config(pictures))
    (pictures / "train/loose.png").unlink()
    for folder in ("cat", "dog", "train"):
        shutil.rmtree(pictures / folder)
    with pytest.raises(ValueError, match="has val/ but no train/"):
        open_data(config(pictures))


def test_open_folder_for_evaluation(pictures: Path) -> None:
    source, skipped = open_folder(pictures / "val", ("ant", "cat", "dog"), config())
    assert source.targets.tolist() == [1, 1, 2, 2]
    assert skipped == []
    with pytest.raises(ValueError, match="unknown: dog"):
        open_folder(pictures / "val", ("ant", "cat"), config())
    # ImageNet-V2 names its folders by class number.
    (pictures / "val/cat").rename(pictures / "val/2")
    (pictures / "val/dog").rename(pictures / "val/0")
    source, _ = open_folder(pictures / "val", ("ant", "cat", "dog"), config())
    assert dict(zip(source.names, source.targets.tolist())) == {"0/0.png": 0, "0/1.png": 0, "2/0.png": 2, "2/1.png": 2}


def test_names_are_compact_and_keep_odd_bytes() -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    names = Names(iter(["a/b.jpg", odd, "ü.png"]))
    assert list(names) == ["a/b.jpg", odd, "ü.png"]
    assert names[1:] == [odd, "ü.png"]
    assert len(Names([])) == 0
    assert list(pickle.loads(pickle.dumps(names))) == list(names)


# The split


def test_split_is_stratified_and_blind_to_the_order_of_listing() -> None:
    names = [f"{'abc'[c]}/{i}.jpg" for c, count in enumerate((50, 10, 1)) for i in range(count)]
    targets = ["abc".index(name[0]) for name in names]
    train, val = held_out(names, targets, 0.1, 3)
    assert sorted(train + val) == list(range(61))
    assert Counter(targets[i] for i in val) == {0: 5, 1: 1}  # a single image stays with training
    held = {names[i] for i in val}
    pairs = list(zip(names, targets))
    random.Random(0).shuffle(pairs)
    shuffled, shuffled_targets = zip(*pairs)
    assert {shuffled[i] for i in held_out(shuffled, shuffled_targets, 0.1, 3)[1]} == held
    assert {names[i] for i in held_out(names, targets, 0.1, 4)[1]} != held


def test_more_pictures_move_few_to_the_other_part() -> None:
    names = [f"{i}.jpg" for i in range(1000)]
    before = {names[i] for i in held_out(names, [0] * 1000, 0.1, 0)[1]}
    grown = [*names, *(f"new{i}.jpg" for i in range(20))]
    after = {grown[i] for i in held_out(grown, [0] * 1020, 0.1, 0)[1]}
    assert len(before - after) <= 5


# Digits


def test_digits() -> None:
    splits = open_data(config(kind="digits", img_size=(24, 32)))
    assert isinstance(splits.train, ArraySource)
    assert splits.classes == tuple("0123456789")
    assert len(splits.train) + len(splits.val) == 1797
    assert splits.train.images.shape[1:] == (3, 24, 32)
    assert splits.train.images.min() == 0
    assert splits.train.images.max() == 255
    counts = torch.bincount(splits.val.targets, minlength=10)
    assert ((counts >= 17) & (counts <= 19)).all()
    assert not set(splits.train.names) & set(splits.val.names)


def test_digits_are_asked_for_by_name(pictures: Path) -> None:
    """A forgotten path must not train on something else, nor a path be passed over."""
    with pytest.raises(ValueError, match="name the images with --data PATH; --data.kind digits"):
        open_data(config())
    with pytest.raises(ValueError, match="data.kind is 'digits'.*leave data.path empty"):
        open_data(config(pictures, kind="digits"))


# Arrays


def cifar_batch(path: Path, count: int, first: int = 0, size: int = 8) -> list[np.ndarray]:
    """An npz of PNG bytes, so that pixels can be compared."""
    pictures = [
        np.random.default_rng(first + i).integers(0, 256, (size, size, 3), dtype=np.uint8) for i in range(count)
    ]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    labels = (np.arange(first, first + count) % 3).astype(np.uint8)
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)
    return pictures


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    cifar_batch(tmp_path / "data_batch_1.npz", 5)
    cifar_batch(tmp_path / "data_batch_2.npz", 4, first=5)
    cifar_batch(tmp_path / "test_batch.npz", 3, first=100)
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["auto", "npz", "cifar10"])
def test_npz_batches_of_encoded_pictures(batches: Path, kind: str) -> None:
    seen = []
    splits = open_data(config(batches, kind=kind), on_progress=lambda done, total: seen.append((done, total)))
    assert isinstance(splits.train, ArraySource)
    assert splits.classes == ("red", "green", "blue")
    assert list(splits.train.names) == [f"train/{i}" for i in range(9)]
    assert list(splits.val.names) == ["test/0", "test/1", "test/2"]
    assert splits.train.targets.tolist() == [i % 3 for i in range(9)]
    for i in range(9):
        wanted = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        assert (splits.train.load(i).permute(1, 2, 0).numpy() == wanted).all()
    assert seen[-1] == (12, 12)


def test_npz_without_a_test_batch_is_split(batches: Path) -> None:
    (batches / "test_batch.npz").unlink()
    splits = open_data(config(batches, val_fraction=0.3))
    assert (len(splits.train), len(splits.val)) == (6, 3)
    assert sorted(splits.val.targets.tolist()) == [0, 1, 2]


def test_bad_pictures_in_npz_are_named_or_left_out(batches: Path) -> None:
    with np.load(batches / "data_batch_2.npz") as archive:
        arrays = dict(archive)
    jpeg = arrays["jpeg"].copy()
    jpeg[arrays["offsets"][1] : arrays["offsets"][2]] = 0
    np.savez(batches / "data_batch_2.npz", **{**arrays, "jpeg": jpeg})
    with pytest.raises(ValueError, match="1 of 12 images.*\n  train/6: not an image"):
        open_data(config(batches))
    splits = open_data(config(batches, on_bad_image="skip"))
    assert list(splits.train.names) == [f"train/{i}" for i in range(9) if i != 6]
    assert splits.train.targets.tolist() == [i % 3 for i in range(9) if i != 6]
    assert [str(bad)[:7] for bad in splits.skipped] == ["train/6"]


def test_npz_pictures_need_one_size(batches: Path) -> None:
    cifar_batch(batches / "data_batch_2.npz", 4, size=9)
    with pytest.raises(ValueError, match=r"one size, but the files hold \[\(8, 8\), \(9, 9\)\]"):
        open_data(config(batches))


@pytest.mark.parametrize("shape", [(20, 6, 5, 3), (20, 3, 6, 5), (20, 6, 5), (20, 6, 5, 1)])
def test_npz_of_images_in_any_axis_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(20) % 2, classes=np.array(["no", "yes"]))
    splits = open_data(config(tmp_path / "set.npz", val_fraction=0.2))
    assert splits.classes == ("no", "yes")
    assert (len(splits.train), len(splits.val)) == (16, 4)
    index = int(splits.val.names[0].removeprefix("train/"))
    picture = splits.val.load(0)
    assert picture.shape == (3, 6, 5)
    wanted = {4: images[index], 3: images[index][..., None]}[images.ndim]
    wanted = wanted if wanted.shape[0] == 3 else wanted.transpose(2, 0, 1)
    assert (picture.numpy() == wanted).all()


def test_train_and_val_npz(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("val", 4)):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((count, 4, 4), np.uint8), labels=np.arange(count) % 2)
    splits = open_data(config(tmp_path))
    assert (len(splits.train), len(splits.val), splits.classes) == (6, 4, ("0", "1"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 5, 5), np.uint8)}, "holds the arrays images; needed are labels"),
        ({"images": np.zeros((4, 5, 5), np.float32), "labels": np.arange(4)}, "images are float32"),
        ({"images": np.zeros((3, 5, 5), np.uint8), "labels": np.arange(4)}, "for 4 labels"),
        ({"images": np.zeros((4, 5, 5), np.uint8), "labels": np.arange(4) - 1}, "integers from 0"),
        ({"images": np.zeros((4, 5, 5), np.uint8), "labels": np.eye(4)}, "integers from 0"),
        ({"images": np.zeros((4, 5, 5), np.uint8), "labels": np.zeros(4, int)}, "at least two"),
        ({"images": np.zeros((4, 5, 5), np.uint8), "labels": np.array([{}] * 4, object)}, "not a readable .npz"),
        (
            {"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 10]), "labels": np.zeros(1, int)},
            "offsets must rise",
        ),
    ],
)
def test_wrong_npz_arrays_are_told(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_data(config(tmp_path / "set.npz"))


def test_broken_npz_is_named(tmp_path: Path) -> None:
    cifar_batch(tmp_path / "set.npz", 6)
    data = (tmp_path / "set.npz").read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"x" * 100):
        (tmp_path / "set.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="set.npz is not a readable .npz"):
            open_data(config(tmp_path / "set.npz"))
    with pytest.raises(ValueError, match="no training .npz"):
        open_data(config(tmp_path / "elsewhere", kind="npz"))


def test_cifar_without_a_connection_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 of the loopback answers nobody, and no proxy is asked: the download fails at once, here as offline.
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(ValueError, match="cannot be downloaded.*by hand"):
        open_data(config(kind="cifar10"))


def test_torchvision_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real reader on files of the real layout, with checksums of our own small batches."""
    import hashlib

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch() -> dict[str, object]:
        return {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [3, 1, 0, 9]}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", batch()) for i in (1, 2)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch())])
    meta = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    splits = open_data(config(tmp_path))
    assert (len(splits.train), len(splits.val), len(splits.classes)) == (8, 4, 10)
    assert splits.train.names[7] == "train/7"
    assert splits.val.names[0] == "test/0"
    assert splits.train.targets.tolist() == [3, 1, 0, 9] * 2
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0].reshape(3, 32, 32)
    assert (splits.train.load(0).numpy() == first).all()


def test_shared_photos_and_cifar(shared: Path) -> None:
    splits = open_data(DataConfig(path=str(shared / "data/photos"), cache="none"))
    assert (len(splits.train), len(splits.val), len(splits.classes)) == (1279, 280, 10)
    assert splits.skipped == [] and splits.notes[-1] == "1,279 training images and 280 held out: train/ and val/"


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_processes_share_the_check_and_find_the_same(pictures: Path, tmp_path_factory, kind: str) -> None:
    """Threads stand for processes; every image is decoded by one of them alone, unless all keep it in memory."""
    spoil(pictures)
    root = pictures
    if kind == "tar":
        for part in ("train", "val"):
            for number in range(3):
                with tarfile.open(pictures / f"{part}-{number}.tar", "w") as tar:
                    for c, name in enumerate(("cat", "dog")):
                        for file in sorted((pictures / part / name).iterdir())[number::3]:
                            tar.add(file, f"{name}{file.name}")
                            label = tarfile.TarInfo(f"{name}{file.stem}.cls")
                            label.size = 1
                            tar.addfile(label, io.BytesIO(b"%d" % c))
        root = tmp_path_factory.mktemp("shards")
        for file in pictures.glob("*.tar"):
            file.rename(root / file.name)
    for cache in ("none", "auto"):
        wanted = open_data(config(root, on_bad_image="skip", cache=cache))
        for index in root.glob("*.volo-index"):
            index.unlink()
        for splits in open_by_three(config(root, on_bad_image="skip", cache=cache)):
            assert list(splits.train.names) == list(wanted.train.names)
            assert list(splits.val.names) == list(wanted.val.names)
            assert splits.skipped == wanted.skipped and len(splits.skipped) >= 3
            assert (splits.train.cache is not None) == (cache == "auto")
            assert torch.equal(splits.train.load(2), wanted.train.load(2))


def open_by_three(data: DataConfig) -> list[DataSplits]:
    found: list[object] = [None] * 3
    barrier = threading.Barrier(3, timeout=60)

    def process(rank: int) -> DataSplits:
        def gather(mine: object) -> list[object]:
            found[rank] = mine
            barrier.wait()
            everything = list(found)
            barrier.wait()
            return everything

        return open_data(data, share=Share(rank, 3, gather))

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(process, range(3)))


def test_a_check_that_is_left_out_opens_the_folder_as_it_is(pictures: Path) -> None:
    spoil(pictures)
    splits = open_data(config(pictures, check="off"))
    assert len(splits.train) + len(splits.val) == 18 and splits.skipped == []
    with pytest.raises(BadImageError, match="empty.jpg"):
        list(map(splits.train.load, range(len(splits.train))))
