"""Plots come out as whole PNG files for every amount of data; what they look like is for people to judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from volo.explain.plots import (
    RED,
    Caption,
    OverlayItem,
    SheetItem,
    captioned_sheet,
    class_bars,
    confusion_matrix,
    overlay_sheet,
    prediction_sheet,
    training_curves,
)


def colours_of(path: Path) -> int:
    """A drawing that is not empty has many."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width * image.height < 40e6
        return len(image.convert("RGB").resize((400, 400)).getcolors(400 * 400))


def write_metrics(path: Path, steps: int, evaluations: int) -> None:
    lines = []
    for step in range(1, steps + 1):
        lines.append({"kind": "step", "step": step, "epoch": step / 10, "loss": 2 / step, "lr": 1e-3 * step})
    for epoch in range(1, evaluations + 1):
        figures = {"top1": 1 - 0.5 / epoch, "mean_class_accuracy": 0.9, "loss": 1 / epoch}
        lines.append({"kind": "eval", "step": 10 * epoch, "epoch": epoch, **figures})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(("steps", "evaluations"), [(1, 0), (30, 3), (500, 50), (0, 2)])
def test_curves(tmp_path: Path, steps: int, evaluations: int) -> None:
    write_metrics(tmp_path / "metrics.jsonl", steps, evaluations)
    training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert colours_of(tmp_path / "curves.png") > 50


@pytest.mark.filterwarnings("error")
def test_curves_of_mean_iou_have_room_for_the_mean_accuracy(tmp_path: Path) -> None:
    figures = {"miou": 0.11, "mean_class_accuracy": 0.6, "loss": 1.1}
    lines = [
        {"kind": "step", "step": 1, "epoch": 1.0, "loss": 0.9, "lr": 1e-3},
        {"kind": "eval", "step": 1, "epoch": 1.0, **figures},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2.5 * picture.height, "nothing is drawn outside the axes"


def test_curves_of_a_file_that_was_cut_off(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write_metrics(metrics, 30, 3)
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-20])
    training_curves(metrics, tmp_path / "curves.png")
    metrics.write_bytes(whole[:40] + b"\n" + whole)
    with pytest.raises(ValueError, match="line 1, is not JSON"):
        training_curves(metrics, tmp_path / "curves.png")
    metrics.write_bytes(b"")
    with pytest.raises(ValueError, match="no steps yet"):
        training_curves(metrics, tmp_path / "curves.png")


@pytest.mark.parametrize("num_classes", [1, 20, 21, 61])
def test_confusion(tmp_path: Path, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    confusion = rng.poisson(0.3, (num_classes, num_classes)) + 9 * np.eye(num_classes, dtype=int)
    confusion[0] = 0  # a class without images
    classes = [f"$a_{i}$ class with quite a long name, {i} {'é' * (i % 9)}" for i in range(num_classes)]
    confusion_matrix(confusion.tolist(), classes, tmp_path / "confusion.png")
    assert colours_of(tmp_path / "confusion.png") > 10


def test_confusion_of_a_perfect_model_with_many_classes(tmp_path: Path) -> None:
    confusion_matrix(np.eye(70, dtype=int).tolist(), [str(i) for i in range(70)], tmp_path / "confusion.png")
    assert colours_of(tmp_path / "confusion.png") > 10
    with pytest.raises(ValueError, match="3 classes need a 3 x 3 matrix; given: 2 x 2"):
        confusion_matrix([[1, 0], [0, 1]], ["a", "b", "c"], tmp_path / "x.png")


@pytest.mark.parametrize("count", [1, 13])
def test_sheet(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    items = [
        SheetItem(
            rng.integers(0, 256, (3, 8 + 3 * i, 20 + i % 5), dtype=np.uint8),
            [("$ a very long name of a class $", 0.9), ("b", 0.1)][: 1 + i % 2],
            name=f"some/where/deep/picture_{i}.png",
            truth=[None, "b", "$ a very long name of a class $"][i % 3],
        )
        for i in range(count)
    ]
    prediction_sheet(items, tmp_path / "new" / "sheet.png")
    assert colours_of(tmp_path / "new" / "sheet.png") > 1000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_an_empty_sheet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        prediction_sheet([], tmp_path / "sheet.png")


COLOURS = np.random.default_rng(5).integers(0, 256, (150, 3)).tolist()


@pytest.mark.parametrize("num_classes", [1, 11, 150])
def test_bars_of_classes(tmp_path: Path, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    iou = rng.random(num_classes).tolist()
    boundary = [value / 2 for value in iou]
    if num_classes > 1:
        iou[1] = boundary[1] = None  # does not occur
    names = [f"$ class {i} {'long ' * (i % 6)}$" for i in range(num_classes)]
    class_bars(iou, names, COLOURS, tmp_path / "iou.png", boundary)
    assert colours_of(tmp_path / "iou.png") > 10
    class_bars(iou, names, COLOURS, tmp_path / "plain.png")
    with pytest.raises(ValueError, match="no class occurs"):
        class_bars([None, None], ["a", "b"], COLOURS, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(("count", "with_truth"), [(1, True), (3, False), (4, True)])
def test_overlays(tmp_path: Path, count: int, with_truth: bool) -> None:
    rng = np.random.default_rng(0)
    items = []
    for i in range(count):
        labels = rng.integers(0, 40, (30 + i, 50), dtype=np.uint8)
        truth = np.where(rng.random(labels.shape) < 0.1, 255, labels).astype(np.uint8) if with_truth else None
        image = rng.integers(0, 256, (3, 30 + i, 50), dtype=np.uint8)
        items.append(OverlayItem(image, labels, truth, f"a/$very$/long/name_{i}.png"))
    overlay_sheet(items, [f"class {i}" for i in range(40)], COLOURS, tmp_path / "overlays.png")
    assert colours_of(tmp_path / "overlays.png") > 1000
    with pytest.raises(ValueError, match="at least one image"):
        overlay_sheet([], ["a"], COLOURS, tmp_path / "x.png")


@pytest.mark.parametrize(("count", "together"), [(1, 1), (2, 2), (13, 1), (12, 4)])
def test_captioned_sheets_take_images_one_by_one(tmp_path: Path, count: int, together: int) -> None:
    rng = np.random.default_rng(0)
    shapes = [(20, 30), (900, 500), (1, 1)]
    images = (rng.integers(0, 256, (3, *shapes[i % 3]), dtype=np.uint8) for i in range(count))  # a generator is enough
    captions = [Caption(f"folder/{i}.png", [("$cat", RED), ("0.99", "")][: i % 3]) for i in range(count)]
    captioned_sheet(images, captions, tmp_path / "sheet.png", kind="test", heading="words " * 30, together=together)
    assert colours_of(tmp_path / "sheet.png") > 50
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.info["Title"] == "test"


def test_captioned_sheets_need_whole_groups(tmp_path: Path) -> None:
    for captions in ([], [Caption("a")] * 3):
        with pytest.raises(ValueError, match=f"at least one group of 2 images; given: {len(captions)} images"):
            captioned_sheet([], captions, tmp_path / "sheet.png", kind="test", heading="", together=2)
