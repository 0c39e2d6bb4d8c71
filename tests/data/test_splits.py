"""Which folder or file is for training, which is held out and which is a class: by its name, or refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from volo.config import DataConfig
from volo.data.images import open_data
from volo.inference.evaluate import match_classes, open_labelled


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(str(path))).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(path)


def classes_in(*folders: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 4) -> None:
    for folder in folders:
        for name in names:
            for i in range(count):
                save(folder / name / f"{i}.png")


def opened(path: Path, **options: object):
    return open_data(DataConfig(path=str(path), img_size=8, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("train", "val"), ("Train", "Test"), ("TRAIN", "VALID"), ("training", "testing"), ("training_set", "test_set"),
        ("seg_train", "seg_test"), ("train", "Val"), ("train", "dev"), ("train2017", "val2017"), ("Train Images", "Validation"),
        ("train-data", "eval"), ("TrainSet", "TestSet"), ("imagenet_train", "imagenet-val"),
    ],
)  # fmt: skip
def test_folders_of_splits_by_any_name(tmp_path: Path, train: str, held: str) -> None:
    classes_in(tmp_path / train)
    classes_in(tmp_path / held, count=2)
    splits = opened(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert (len(splits.train), len(splits.val)) == (8, 4)
    assert all(name.startswith(f"{held}/") for name in splits.val.names)
    assert any(f"{train}/ and {held}/" in note for note in splits.notes), "it is said what is held out"
    assert "cat 4 + 2, dog 4 + 2" in splits.notes[0]
    labelled = open_labelled(tmp_path, DataConfig(), ("cat", "dog"))
    assert len(labelled.source) == 4, "an evaluation takes the held-out part by the same names"


def test_the_validation_part_goes_before_the_test_part_and_the_rest_is_named(tmp_path: Path) -> None:
    classes_in(*(tmp_path / name for name in ("train", "dev", "test")))
    splits = opened(tmp_path)
    assert splits.val.names[0].startswith("dev/")
    assert any("ignored" in note and "test/" in note for note in splits.notes)


def test_a_split_in_a_folder_of_its_own_name(tmp_path: Path) -> None:
    classes_in(tmp_path / "seg_train/seg_train", tmp_path / "seg_test/seg_test")
    save(tmp_path / "seg_pred/seg_pred/1.png")
    splits = opened(tmp_path)
    assert splits.classes == ("cat", "dog") and splits.train.names[0] == "seg_train/seg_train/cat/0.png"


def test_a_train_is_a_thing_of_which_there_are_images(tmp_path: Path) -> None:
    classes_in(tmp_path, names=("bus", "car", "train", "truck"))
    assert opened(tmp_path).classes == ("bus", "car", "train", "truck")
    classes_in(tmp_path / "train", names=("steam", "diesel"))
    with pytest.raises(ValueError, match=r"train/, which may be a split or a class beside bus/, car/, truck/.*splits"):
        opened(tmp_path)
    assert opened(tmp_path, splits="none").classes == ("bus", "car", "train", "truck")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "training", "val"), "train/, training/, which may all be the training images"),
        (("train", "val", "validation"), "val/, validation/, which may all be the held-out images"),
        (("train-1", "train-2"), "may all be the training images"),
        (("val",), "has val/ but no train/"),
    ],
)
def test_what_may_be_either_is_refused_with_the_way_out(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    classes_in(*(tmp_path / name for name in folders))
    with pytest.raises(ValueError, match=f"{message}.*--data.splits"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "folders", [("train", "test"), ("cat", "dog", "test"), ("Training", "Testing"), ("a_train", "a_test")]
)
def test_a_split_with_images_of_no_class_is_no_class(tmp_path: Path, folders: tuple[str, ...]) -> None:
    classes_in(tmp_path, names=folders)
    with pytest.raises(ValueError, match="no folders in them.*--data.splits"):
        opened(tmp_path)
    assert opened(tmp_path, splits="none").classes == tuple(sorted(folders))


def test_splits_by_name(tmp_path: Path) -> None:
    classes_in(tmp_path / "fold1", tmp_path / "fold2")
    splits = opened(tmp_path, splits="fold2,fold1")
    assert splits.classes == ("cat", "dog") and splits.val.names[0].startswith("fold1/")
    for wrong, message in (("fold1,fold3", "has no fold3/"), ("fold1", "two names")):
        with pytest.raises(ValueError, match=message):
            opened(tmp_path, splits=wrong)


def shard(path: Path, first: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + 4):
            file = io.BytesIO()
            Image.new("RGB", (8, 6), (i, i, i)).save(file, "PNG")
            for name, content in ((f"{i:03}.png", file.getvalue()), (f"{i:03}.cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("train-{}-of-00002.tar", "validation-{}-of-00001.tar"), ("train-part-{}.tar", "test-part-{}.tar"),
        ("cc_train_shard{}.tar", "cc_dev_shard{}.tar"), ("Train.{}.tar", "Val.{}.tar"), ("train/{}.tar", "val/{}.tar"),
    ],
)  # fmt: skip
def test_shards_of_splits_by_any_name(tmp_path: Path, train: str, held: str) -> None:
    for i in range(2):
        shard(tmp_path / train.format(f"0000{i}"), 10 * i)
    shard(tmp_path / held.format("00000"), 50)
    splits = opened(tmp_path)
    assert (len(splits.train), len(splits.val)) == (8, 4)
    assert splits.val.names[0] == "050.png"
    assert held.format("00000") in splits.notes[1]
    everything = opened(tmp_path, splits="none")
    assert len(everything.train) + len(everything.val) == 12


def test_a_shard_that_says_both_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train-test-0.tar", 0)
    with pytest.raises(ValueError, match=r"train-test-0.tar may be of the training or held out.*--data.splits"):
        opened(tmp_path)
    shard(tmp_path / "b-0.tar", 10)
    assert opened(tmp_path, splits="train-test,b-*").val.names[0] == "010.png"


def npz(path: Path, classes: tuple[str, ...] | None) -> None:
    more = {} if classes is None else {"classes": np.array(classes)}
    np.savez(path, images=np.zeros((6, 4, 4, 3), np.uint8), labels=np.arange(6) % 2, **more)


def test_class_lists_of_one_data_set_agree(tmp_path: Path) -> None:
    npz(tmp_path / "Train.npz", ("cat", "dog"))
    npz(tmp_path / "Test.npz", ("cat", "dog"))
    assert opened(tmp_path).classes == ("cat", "dog")
    npz(tmp_path / "Test.npz", ("dog", "cat"))
    with pytest.raises(ValueError, match=r"class 0 is 'cat' in .*Train.npz and 'dog' in .*Test.npz"):
        opened(tmp_path)
    npz(tmp_path / "Test.npz", None)
    (tmp_path / "classes.txt").write_text("cat\nbird\n")
    with pytest.raises(ValueError, match=r"class 1 is 'bird' in .*classes.txt and 'dog' in .*Train.npz"):
        opened(tmp_path)
    for folder, text in (("a", "cat\ndog\n"), ("b", "dog\ncat\n")):
        shard(tmp_path / folder / "0.tar", 0)
        (tmp_path / folder / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=r"class 0 is 'cat' in .*a/classes.txt and 'dog' in .*b/classes.txt"):
        opened(tmp_path / "{a,b}/0.tar")


def test_numbers_are_names_where_the_model_has_numbers(tmp_path: Path) -> None:
    assert match_classes(["7", "3"], ["3", "7"]) == [1, 0]
    assert match_classes(["1", "0"], ["cat", "dog"]) == [1, 0]
    for data, model in ((["0", "1"], ["3", "7"]), (["0", "1"], ["1", "2", "3"]), (["0"], ["cat", "5"])):
        with pytest.raises(ValueError, match="class '0', which the model does not know"):
            match_classes(data, model)
    classes_in(tmp_path, names=("0", "1", "2"))
    with pytest.raises(ValueError, match="1 class folders in .* are unknown: 0"):
        open_labelled(tmp_path, DataConfig(), ("1", "2", "3"))


def test_two_spellings_of_a_name_are_one_class(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", names=("caf\u00e9", "bar"))
    classes_in(tmp_path / "val", names=("cafe\u0301", "bar"))
    assert len(opened(tmp_path).val) == 8
    assert match_classes(["cafe\u0301"], ["bar", "caf\u00e9"]) == [1]


@pytest.mark.parametrize("folders", [("images", "masks"), ("Img", "Annotations")])
def test_images_and_masks_are_no_two_classes(tmp_path: Path, folders: tuple[str, str]) -> None:
    """A classifier would tell them apart without fail, and say nothing of the images."""
    classes_in(tmp_path / "plain", names=folders)
    classes_in(tmp_path / "split/train", tmp_path / "split/val", names=folders)
    for root, way_out in (("plain", "none"), ("split", "train,val")):
        with pytest.raises(ValueError, match=f"photos_masks.*--data.splits {way_out}"):
            opened(tmp_path / root)
        assert opened(tmp_path / root, splits=way_out).classes == tuple(sorted(folders))
    classes_in(tmp_path / "three", names=(*folders, "cats"))
    assert len(opened(tmp_path / "three").classes) == 3
