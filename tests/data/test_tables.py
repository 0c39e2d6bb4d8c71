from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from volo.config import DataConfig
from volo.data.images import open_data
from volo.data.tables import open_all_table, open_targets
from volo.data.targets import TableTargets, as_labels
from volo.inference.evaluate import open_labelled


def write(path: Path, *rows: tuple, encoding: str = "utf-8", delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(24):
        Image.new("RGB", (6 + i % 3, 5), (10 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    return tmp_path


def rows_of(label, count: int = 24) -> list[tuple]:
    return [(f"{i:02}.png", label(i)) for i in range(count)]


def config(path: Path, **changes) -> DataConfig:
    return replace(DataConfig(path=str(path), img_size=8, val_fraction=0.25), **changes)


def test_table_is_the_folder_of_the_same_images(images: Path) -> None:
    """Same classes, targets and held-out images as class folders, where the paths are the same."""
    for name in ("cat", "dog"):
        (images / name).mkdir()
    names = [f"{'cat' if i % 3 else 'dog'}/{i:02}.png" for i in range(24)]
    for i, name in enumerate(names):
        (images / f"{i:02}.png").rename(images / name)
    folder = open_data(config(images))
    table = write(images.parent / f"{images.name}.csv", ("path", "label"), *((n, n.split("/")[0]) for n in names))
    splits = open_data(config(table, root=str(images)))
    assert splits.classes == folder.classes == ("cat", "dog")
    for part in ("train", "val"):
        ours, theirs = getattr(splits, part), getattr(folder, part)
        found, expected = (dict(zip(s.names, s.targets.tolist())) for s in (ours, theirs))
        assert found == expected
        assert ours.targets.dtype == torch.int64
    assert any("'path'" in note and "'label'" in note for note in splits.notes)
    assert any("cat" in note and "+" in note for note in splits.notes)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending, delimiter", [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_encodings_delimiters_and_split_column(images: Path, encoding: str, ending: str, delimiter: str) -> None:
    parts = ["train"] * 14 + ["Validation"] * 6 + ["test"] * 4
    rows = [(f"./{i:02}.png", "été" if i % 2 else "hiver, froid", parts[i]) for i in range(24)]
    table = write(images / f"l.{ending}", ("File", "Class", "Split"), *rows, encoding=encoding, delimiter=delimiter)
    splits = open_data(config(table))
    assert splits.classes == ("hiver, froid", "été")
    assert list(splits.train.names) == [f"{i:02}.png" for i in range(14)]
    assert list(splits.val.names) == [f"{i:02}.png" for i in range(14, 20)]
    assert any("4 test" in note for note in splits.notes)
    assert len(open_data(config(table, splits="none")).train) == 18  # a quarter of each class by seed
    assert len(open_data(config(table, splits="train,test")).val) == 4
    everything, _ = open_all_table(config(table, splits="none"))
    assert len(everything) == 24
    held, _ = open_all_table(config(table))
    assert list(held.names) == [f"{i:02}.png" for i in range(14, 20)]


def test_latin1_is_named(images: Path) -> None:
    table = write(images / "l.csv", ("path", "label"), *rows_of(lambda i: "é"), encoding="latin-1")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        open_data(config(table))


REFUSED = {
    "no image column": ([("url", "label"), ("00.png", "a")], {}, "data.image_column"),
    "two image columns": (
        [("path", "file", "label"), ("00.png", "00.png", "a")],
        {},
        "path and file.*data.image_column",
    ),
    "two label columns": (
        [("path", "label", "class"), ("00.png", "a", "a")],
        {},
        "label and class.*data.label_columns",
    ),
    "no label column": ([("path", "x", "y"), ("00.png", "a", "b")], {}, "path, x, y.*data.label_columns"),
    "unknown column": ([("path", "lable"), ("00.png", "a")], {"label_columns": ("label",)}, "did you mean 'lable'"),
    "missing files": ([("path", "label"), ("00.png", "a"), ("no.png", "b")], {}, "1 of 2.*no.png.*data.root"),
    "empty label": ([("path", "label"), ("00.png", "a"), ("01.png", "")], {}, "'label'.*empty in line 3"),
    "duplicate": ([("path", "label"), ("00.png", "a"), ("./00.png", "a")], {}, "more than once.*00.png.*lines 2, 3"),
    "no path": ([("path", "label"), ("", "a"), ("00.png", "b")], {}, "names no image in line 2"),
    "cells": ([("path", "label"), ("00.png", "a", "b")], {}, "line 2 with 3"),
    "header only": ([("path", "label")], {}, "1 lines"),
    "column twice": ([("path", "label", "label"), ("00.png", "a", "b")], {}, "several columns called 'label'"),
    "split cells": ([("path", "label", "split"), ("00.png", "a", "3")], {}, "'3'.*data.splits"),
    "no training": ([("path", "label", "split"), ("00.png", "a", "val")], {}, "no training images"),
    "unknown class": (
        [("path", "label", "split"), ("00.png", "a", "train"), ("01.png", "b", "train"), ("02.png", "c", "val")],
        {},
        "no training image has: c",
    ),
    "several labels": (
        [("path", "label"), ("00.png", "a;b"), ("01.png", "a")],
        {},
        "task 'table'.*label_separator none",
    ),
    "numbers": ([("path", "label"), ("00.png", "1.5"), ("01.png", "2")], {}, "task 'table'.*label_kinds class"),
    "several columns": (
        [("path", "a", "b"), ("00.png", "1", "0")],
        {"label_columns": ("a", "b")},
        "task 'classify' has one class an image",
    ),
    "root": ([("path", "label"), ("00.png", "a")], {"root": "/no/such"}, "data.root is /no/such"),
    "one class": ([("path", "label"), ("00.png", "a"), ("01.png", "a")], {}, "one class only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_names_and_the_key_to_set(images: Path, name: str) -> None:
    rows, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        open_data(config(write(images / "l.csv", *rows), **changes))


def test_free_text_is_no_class(images: Path) -> None:
    table = write(images / "l.csv", ("path", "label"), *rows_of(lambda i: f"caption {i}"))
    with pytest.raises(ValueError, match="24 different cells for 24 images.*label_columns"):
        open_data(config(table))


def test_separators_in_a_class_name(images: Path) -> None:
    table = write(images / "l.csv", ("path", "label"), *rows_of(lambda i: "a|b" if i % 2 else "c"))
    assert open_data(config(table, label_separator="none")).classes == ("a|b", "c")


def test_bad_images_are_named_or_left_out(images: Path) -> None:
    (images / "05.png").write_bytes(b"no image")
    rows = [("path", "label", "split")]
    rows += [(f"{i:02}.png", "ab"[i % 2], "train" if i < 16 else "val") for i in range(24)] + [("no.png", "a", "train")]
    table = write(images / "l.csv", *rows)
    with pytest.raises(ValueError, match="no.png"):
        open_data(config(table))
    splits = open_data(config(table, on_bad_image="skip"))
    assert sorted(bad.name for bad in splits.skipped) == ["05.png", "no.png"]
    assert len(splits.train) == 15
    assert list(splits.val.names) == [f"{i:02}.png" for i in range(16, 24)]
    assert splits.val.targets.tolist() == [i % 2 for i in range(16, 24)]


def test_exif_rotation_is_applied(images: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(images / "turned.jpg", exif=exif)
    table = write(images / "l.csv", ("path", "age"), ("turned.jpg", 3), *rows_of(lambda i: i))
    splits = open_targets(config(table))
    source = next(s for s in (splits.train, splits.val) if "turned.jpg" in list(s.names))
    assert source.load(list(source.names).index("turned.jpg")).shape == (3, 20, 10)


# Several labels, numbers, several outputs


def test_cells_with_several_labels(images: Path) -> None:
    cells = ["sea;sky", "sky", "", "sea; boat ;sky"]
    table = write(images / "l.csv", ("path", "labels"), *rows_of(lambda i: cells[i % 4]))
    splits = open_targets(config(table))
    (output,) = splits.targets.outputs
    assert (output.kind, output.classes) == ("labels", ("boat", "sea", "sky"))
    assert splits.targets.names == output.classes
    by_name = dict(zip(splits.train.names, splits.train.targets.tolist()))
    by_name |= dict(zip(splits.val.names, splits.val.targets.tolist()))
    expected = [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert by_name == {f"{i:02}.png": expected[i % 4] for i in range(24)}
    assert len(splits.val) == 6
    assert any("6 images have none" in note for note in splits.notes)


def test_columns_of_zero_and_one(images: Path) -> None:
    rows = [(f"{i:02}.png", i % 2, int(i % 3 == 0), int(i > 3)) for i in range(24)]
    table = write(images / "l.csv", ("path", "sea", "sky", "boat"), *rows)
    splits = open_targets(config(table))
    (output,) = splits.targets.outputs
    assert (output.kind, output.classes) == ("labels", ("sea", "sky", "boat"))
    i = int(splits.val.names[0][:2])
    assert splits.val.targets[0].tolist() == [i % 2, i % 3 == 0, i > 3]


def test_a_number_and_a_class(images: Path) -> None:
    rows = [(f"{i:02}.png", 20 + i / 2, "fm"[i % 2], "x") for i in range(24)]
    table = write(images / "l.csv", ("path", "age", "gender", "note"), *rows)
    splits = open_targets(config(table, label_columns=("age", "gender")))
    age, gender = splits.targets.outputs
    assert (age.kind, gender.kind, gender.classes) == ("number", "class", ("f", "m"))
    assert splits.targets.names == ("age", "gender: f", "gender: m")
    ages = torch.tensor([20 + int(name[:2]) / 2 for name in splits.train.names], dtype=torch.float64)
    torch.testing.assert_close(splits.train.targets[:, 0], ages)
    assert age.mean == pytest.approx(float(ages.mean()))
    assert age.std == pytest.approx(float(ages.std(correction=0)))
    assert sorted(splits.val.targets[:, 1].tolist()) == [0.0] * 3 + [1.0] * 3  # a quarter of each class
    assert any("not used: note" in note for note in splits.notes)
    assert TableTargets.from_list(splits.targets.to_list()) == splits.targets
    known = open_all_table(config(table), splits.targets)[0]
    assert len(known) == 24


def test_kinds_can_be_said(images: Path) -> None:
    rows = [(f"{i:02}.png", i % 5, i % 2) for i in range(24)]
    table = write(images / "l.csv", ("path", "stars", "old"), *rows)
    said = open_targets(config(table, label_columns=("stars", "old"), label_kinds=("class", "number")))
    assert [o.kind for o in said.targets.outputs] == ["class", "number"]
    assert said.targets.outputs[0].classes == ("0", "1", "2", "3", "4")
    guessed = open_targets(config(table, label_columns=("stars", "old")))
    assert [o.kind for o in guessed.targets.outputs] == ["number", "class"]
    with pytest.raises(ValueError, match="1 kinds for 2 label columns"):
        open_targets(config(table, label_columns=("stars", "old"), label_kinds=("class",)))


@pytest.mark.parametrize("cell", ["", "old", "nan", "inf", "3,5"])
def test_cells_that_are_no_numbers(images: Path, cell: str) -> None:
    table = write(images / "l.csv", ("path", "age"), *rows_of(lambda i: cell if i == 4 else i))
    with pytest.raises(ValueError, match="1 cells that are not a number.*line 6.*label_kinds"):
        open_targets(config(table, label_columns=("age",), label_kinds=("number",)))


def test_a_number_that_never_changes(images: Path) -> None:
    table = write(images / "l.csv", ("path", "age"), *rows_of(lambda i: 31))
    with pytest.raises(ValueError, match="age is 31 for each"):
        open_targets(config(table))


def test_known_outputs_refuse_what_they_do_not_know(images: Path) -> None:
    train = write(images / "l.csv", ("path", "labels"), *rows_of(lambda i: "sea;sky" if i % 2 else "sky"))
    targets = open_targets(config(train)).targets
    other = write(images / "m.csv", ("path", "labels"), ("00.png", "sky"), ("01.png", "sea;moon"))
    with pytest.raises(ValueError, match="made of sea, sky: line 3"):
        open_all_table(config(other), targets)
    with pytest.raises(ValueError, match="no column 'labels'"):
        open_all_table(config(write(images / "n.csv", ("path", "age"), ("00.png", 3))), targets)


def test_digests_see_small_changes() -> None:
    ages = torch.tensor([[31.0], [32.25]], dtype=torch.float64)
    assert not torch.equal(as_labels(ages), as_labels(ages + 1e-12))


def test_parquet(images: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {"path": [f"{i:02}.png" for i in range(24)], "tags": [["a", "b"] if i % 2 else ["b"] for i in range(24)]}
    )
    parquet.write_table(table, images / "l.parquet")
    (output,) = open_targets(config(images / "l.parquet")).targets.outputs
    assert (output.kind, output.classes) == ("labels", ("a", "b"))


def test_parquet_without_pyarrow(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (images / "l.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        open_targets(config(images / "l.parquet"))


def test_rows_of_another_split_are_not_looked_at(images: Path) -> None:
    """The test part of a competition has neither labels nor, often, files."""
    rows = [(f"{i:02}.png", "ab"[i % 2], "train" if i < 16 else "val") for i in range(24)]
    table = write(images / "l.csv", ("path", "label", "split"), *rows, ("gone.png", "", "test"))
    splits = open_data(config(table))
    assert (len(splits.train), len(splits.val)) == (16, 8)
    assert any("1 test" in note for note in splits.notes)


def test_classifier_is_scored_on_another_table(images: Path) -> None:
    trained = write(images / "l.csv", ("path", "label"), *rows_of(lambda i: "abc"[i % 3]))
    other = write(images / "m.csv", ("path", "label"), ("01.png", "c"), ("05.png", "b"))
    labelled = open_labelled(other, config(trained), ("a", "b", "c"))
    assert labelled.class_map == [1, 2]
    assert list(labelled.source.names) == ["01.png", "05.png"]
    assert len(open_labelled(None, config(trained), ("a", "b", "c")).source) == 6
    with pytest.raises(ValueError, match="class 'c', which the model does not know"):
        open_labelled(other, config(trained), ("a", "b"))
