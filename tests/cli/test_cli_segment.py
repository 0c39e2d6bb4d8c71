"""`volo train`, `evaluate` and `segment` for masks, as people use them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import segmenter_recipe

from volo.cli.main import main
from volo.config import load_recipe
from volo.data.masks import CITYSCAPES
from volo.training.loop import train


@pytest.fixture(scope="module")
def work(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with street.toml and runs/street, trained."""
    folder = tmp_path_factory.mktemp("segment")
    (folder / "street.toml").write_text(segmenter_recipe(32, 40))
    words = [str(folder / "street.toml"), "--data", str(scenes), "--out", str(folder / "run"), "--json", "--quiet"]
    assert main(["train", *words]) == 0
    return folder


def test_a_run_ends_with_its_pictures(work: Path) -> None:
    for name in ("curves.png", "confusion.png", "iou.png", "overlays.png"):
        with Image.open(work / "run" / name) as picture:
            assert min(picture.size) > 100, name
    assert json.loads((work / "run" / "summary.json").read_text())["best"]["miou"] > 0.2


def test_evaluate_knows_masks(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(work / "run"), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    best = json.loads((work / "run" / "summary.json").read_text())["best"]
    assert plain["miou"] == pytest.approx(best["miou"], abs=1e-6)
    words = [
        "--split",
        "test",
        "--window",
        "32",
        "40",
        "--scales",
        "0.75",
        "1",
        "--flip",
        "--out",
        str(tmp_path / "report"),
    ]
    assert main(["evaluate", str(work / "run"), *words]) == 0
    shown = capsys.readouterr().out
    assert "mean IoU" in shown and "ground" in shown
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert report["count"] == 3
    assert report["test"] == "windows of 32 x 40 every 22 x 27, scales 0.75, 1, mirrored too"
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"evaluation.json", "iou.png", "confusion.png"}


def test_evaluate_other_data_whatever_it_says_of_its_classes(
    work: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(data: Path) -> dict:
        assert main(["evaluate", str(work / "run"), "--data", str(data), "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        return {key: content[key] for key in ("classes", "confusion", "miou", "boundary_iou", "loss", "count")}

    expected = scores(scenes)
    other = shutil.copytree(scenes, tmp_path / "other")
    (other / "classes.csv").unlink()
    assert scores(other) == expected
    (other / "classes.txt").write_text("box\nsky\nground\n")
    number = np.arange(256, dtype=np.uint8)
    number[:3] = 1, 2, 0
    for path in (other / "annotations").rglob("*.png"):
        Image.fromarray(number[np.asarray(Image.open(path))]).save(path)
    assert scores(other) == expected


def test_options_for_the_other_kind_of_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--split", "test"], ["--object-value", "255"]):
        assert main(["evaluate", "volo_d1.224", *words]) == 2
        assert "are for segmentation models" in capsys.readouterr().err
    assert main(["evaluate", str(work / "run"), "--object-value", "255"]) == 2
    assert "segment.object_value is 255, which is for masks of two classes" in capsys.readouterr().err
    assert main(["evaluate", str(work / "run"), "--crop", "0.9"]) == 2
    assert "img_size and crop are for classifiers" in capsys.readouterr().err
    assert main(["predict", str(work / "run"), str(work / "run" / "iou.png")]) == 2
    assert "volo segment" in capsys.readouterr().err
    assert main(["segment", str(work / "run"), str(work / "run" / "iou.png"), "--stride", "5"]) == 2
    assert "give --window too" in capsys.readouterr().err


def test_segment_writes_masks_overlays_and_areas(
    work: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(scenes / "images" / "test", pictures)
    (pictures / "broken.jpg").write_bytes(b"no image")
    assert main(["segment", str(work / "run"), str(pictures), "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert "1 of 4 images could not be read" in output.err and "00.png" in output.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "areas.json", *(f"0{i}{end}" for i in range(3) for end in (".png", "_overlay.png"))
    }  # fmt: skip
    content = json.loads((tmp_path / "out" / "areas.json").read_text())
    assert [c["class"] for c in content["classes"]] == ["sky", "ground", "box"]
    entries = {Path(entry["picture"]).name: entry for entry in content["pictures"]}
    assert "error" in entries["broken.jpg"]
    for i in range(3):
        entry, mask = entries[f"0{i}.png"], np.asarray(Image.open(tmp_path / "out" / f"0{i}.png"))
        assert mask.shape == (entry["height"], entry["width"]) == (48, 64)
        counted = {area["index"]: area["pixels"] for area in entry["areas"]}
        assert counted == {int(k): int(n) for k, n in zip(*np.unique(mask, return_counts=True))}
    assert main(["segment", str(work / "run"), str(pictures), "--out", str(pictures)]) == 2
    assert "would replace the image" in " ".join(capsys.readouterr().err.split())
    assert (pictures / "00.png").read_bytes() == (scenes / "images/test/00.png").read_bytes()
    words = ["--no-overlays", "--json", "--on-bad-image", "skip", "--window", "32", "--out", str(tmp_path / "again")]
    assert main(["segment", str(work / "run"), str(pictures), *words]) == 0
    assert json.loads(capsys.readouterr().out)["test"].startswith("windows of 32 x 32")
    assert not list((tmp_path / "again").glob("*overlay*"))
    words = ["--json", "--on-bad-image", "skip", "--scales", "0.5", "1", "--flip", "--out", str(tmp_path / "several")]
    assert main(["segment", str(work / "run"), str(pictures), *words]) == 0
    how = json.loads(capsys.readouterr().out)["test"]
    assert how == "whole images, windows above a megapixel, scales 0.5, 1, mirrored too"


@pytest.fixture(scope="module")
def city(work: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ in Cityscapes' layout and run/, trained on it."""
    folder = tmp_path_factory.mktemp("city")
    ids = np.zeros(256, np.uint8)
    ids[:3] = 23, 7, 26  # sky, road, car; else unlabeled
    for split in ("train", "val"):
        for source in sorted((scenes / "images" / split).glob("*.png")):
            picture, mask = (folder / "data" / kind / split / "lindau" for kind in ("leftImg8bit", "gtFine"))
            name = f"lindau_0000{source.stem}_000019"
            picture.mkdir(parents=True, exist_ok=True)
            mask.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, picture / f"{name}_leftImg8bit.png")
            drawn = np.asarray(Image.open(scenes / "annotations" / split / source.name))
            Image.fromarray(ids[drawn]).save(mask / f"{name}_gtFine_labelIds.png")
    changes = {"data.path": str(folder / "data"), "segment.test": "slide", "segment.window": [24, 32]}
    train(load_recipe(work / "street.toml", changes), folder / "run")
    return folder


def test_a_submission_to_cityscapes_is_what_was_scored(
    city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    views = ["--scales", "0.75", "1.25", "--flip"]
    assert main(["evaluate", str(city / "run"), "--json", *views]) == 0
    scored = json.loads(capsys.readouterr().out)
    pictures, out = city / "data/leftImg8bit/val", tmp_path / "submission"
    assert main(["segment", str(city / "run"), str(pictures), "--cityscapes", "--out", str(out), "--json", *views]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == scored["test"]
    ids = [label_id for _, label_id, _ in CITYSCAPES]
    confusion = np.zeros((19, 19), np.int64)
    for mask in (city / "data/gtFine/val").rglob("*.png"):
        # The official script looks for CITY_SEQUENCE_FRAME*.png, to the bottom, and stops where there are two.
        (found,) = out.rglob(mask.name.removesuffix("gtFine_labelIds.png") + "*.png")
        truth, answer = (np.asarray(Image.open(path)) for path in (mask, found))
        pairs, counts = np.unique(np.stack([truth, answer])[:, truth > 0], axis=1, return_counts=True)
        for i, j, count in zip(*pairs.tolist(), counts.tolist()):
            confusion[ids.index(i), ids.index(j)] += count
    assert confusion.tolist() == scored["confusion"] and np.count_nonzero(confusion.sum(0)) > 1


def test_the_model_as_an_option(work: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, run = [str(scenes / "images/test" / f"0{i}.png") for i in range(2)], str(work / "run")
    texts = []
    for words in ([run, *pictures], [*pictures, "--checkpoint", run], ["--checkpoint", run, *pictures]):
        assert main(["segment", *words, "--out", str(tmp_path / "out"), "--json"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert main(["segment", run, "--out", str(tmp_path / "out")]) == 2
    assert "name the images" in capsys.readouterr().err
    assert main(["predict", pictures[0], "--checkpoint", run]) == 2
    assert "volo segment" in capsys.readouterr().err


def test_cityscapes_ids_need_cityscapes_classes(work: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment", str(work / "run"), str(scenes / "images" / "test"), "--cityscapes"]) == 2
    assert "19 classes" in capsys.readouterr().err


def test_training_stops_before_it_starts_when_masks_are_wrong(
    work: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(scenes, tmp_path / "own")
    (own / "annotations/train/03.png").unlink()
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(own / "annotations/val/01.png")
    words = ["train", str(work / "street.toml"), "--data", str(own), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(words) == 2
    complaint = capsys.readouterr().err
    assert "images/train/03.png: there is no mask for it" in complaint
    assert "annotations/val/01.png: values out of range: 9" in complaint
    assert not (tmp_path / "run").exists()
    assert main([*words, "--on-bad-image", "skip", "--schedule.steps", "2", "--json"]) == 0
