"""Prediction: which pictures, in which order, with which answers; unreadable ones among them."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from volo.config import DataConfig
from volo.data.decode import decode_image
from volo.data.transforms import PixelPipeline, eval_transform
from volo.inference.predictor import (
    Classifier,
    Prediction,
    find_pictures,
    imagenet_classes,
    load_classifier,
    predict,
    to_csv,
    to_json,
)
from volo.models.volo import create_model
from volo.models.weights import cached_path


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    options = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
    model = create_model("volo_nano", num_classes=4, img_size=16, **options).eval()
    return Classifier(model, ("ant", "bee", "cat", "dog"), DataConfig(img_size=16), "a test")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    colours = ["red", "green", "blue", "white", "black", "grey", "pink"]
    paths = [tmp_path / "in" / f"{i}_{colour}.png" for i, colour in enumerate(colours)]
    paths[0].parent.mkdir()
    for i, (path, colour) in enumerate(zip(paths, colours)):
        Image.new("RGB", (20 + i, 30), colour).save(path)
    return paths


def test_equals_the_model_one_picture_at_a_time(classifier: Classifier, pictures: list[Path]) -> None:
    got = list(predict(classifier, pictures, top=2, batch_size=3))
    assert [prediction.name for prediction in got] == [str(path) for path in pictures]
    pixels = PixelPipeline(classifier.data).eval()
    for path, prediction in zip(pictures, got):
        with torch.no_grad():
            image = eval_transform(classifier.data)(decode_image(path))
            probabilities = classifier.model(pixels(image[None]))[0].softmax(0)
        values, indices = probabilities.topk(2)
        assert [name for name, _ in prediction.top] == [classifier.classes[i] for i in indices]
        assert [p for _, p in prediction.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_bad_pictures_keep_their_place(classifier: Classifier, pictures: list[Path], bad: int) -> None:
    whole = list(predict(classifier, pictures, batch_size=2))
    pictures[bad].write_bytes(b"not a picture")
    got = list(predict(classifier, pictures, batch_size=2))
    assert [i for i, prediction in enumerate(got) if prediction.error] == [bad]
    assert str(pictures[bad]) in str(got[bad].error)
    assert got[bad].top == ()
    assert [p.name for p in got] == [p.name for p in whole]
    for i, (a, b) in enumerate(zip(got, whole)):
        if i != bad:
            assert [name for name, _ in a.top] == [name for name, _ in b.top]


def test_a_picture_that_is_gone_is_reported(classifier: Classifier, pictures: list[Path]) -> None:
    pictures[1].unlink()
    errors = [prediction.error for prediction in predict(classifier, pictures)]
    assert errors[1] is not None
    assert "no such file" in errors[1]
    assert sum(error is not None for error in errors) == 1


def test_no_more_classes_than_there_are(classifier: Classifier, pictures: list[Path]) -> None:
    (prediction,) = predict(classifier, pictures[:1], top=9)
    assert len(prediction.top) == 4
    assert sum(p for _, p in prediction.top) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        list(predict(classifier, pictures, top=0))


def test_pictures_are_found(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures[0].parent
    (folder / "notes.txt").write_text("not a picture")
    (folder / "deep" / "er").mkdir(parents=True)
    deep = folder / "deep" / "er" / "x.PNG"
    deep.write_bytes(pictures[0].read_bytes())
    strange = folder / "what [1]?.png"  # a name that is also a pattern
    strange.write_bytes(pictures[0].read_bytes())

    assert find_pictures([str(folder)]) == sorted([*pictures, deep, strange])
    assert find_pictures([str(folder / "*_b*.png")]) == [pictures[2], pictures[4]]
    assert find_pictures([str(folder / "**" / "x.*")]) == [deep]
    assert find_pictures([str(strange)]) == [strange]
    assert find_pictures([str(pictures[3]), str(folder / "3*"), str(pictures[0])]) == [pictures[3], pictures[0]]
    assert find_pictures(["-"], ["a.png\n", "\n", "b c.png\n"]) == [Path("a.png"), Path("b c.png")]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "name the pictures"),
        (["gone.png"], FileNotFoundError, r"no file or folder 'gone\.png'"),
        (["*.jpg"], ValueError, r"no pictures in '\*\.jpg'"),
        (["."], ValueError, r"no pictures in '\.'"),
        (["-"], ValueError, "standard input holds no paths"),
    ],
)
def test_nothing_to_predict_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        find_pictures(given)


def test_json_and_csv_survive_any_name() -> None:
    awkward = 'a, "b"\nc.png'
    predictions = [
        Prediction(awkward, (("ant, red", 0.75), ("bee", 0.25))),
        Prediction("bad.png", (), "bad.png: the file is empty (0 bytes)"),
    ]
    read = json.loads("".join(to_json(predictions)))
    assert read == [
        {
            "picture": awkward,
            "predictions": [{"class": "ant, red", "probability": 0.75}, {"class": "bee", "probability": 0.25}],
        },
        {"picture": "bad.png", "error": "bad.png: the file is empty (0 bytes)"},
    ]
    rows = list(csv.DictReader(io.StringIO("".join(to_csv(predictions)), newline="")))
    assert [(row["picture"], row["rank"], row["class"]) for row in rows] == [
        (awkward, "1", "ant, red"),
        (awkward, "2", "bee"),
        ("bad.png", "", ""),
    ]
    assert json.loads("".join(to_json([]))) == []


def test_names_of_imagenet() -> None:
    wnids, names = imagenet_classes()
    assert len(wnids) == len(set(wnids)) == len(set(names)) == 1000
    assert list(wnids) == sorted(wnids)
    assert (wnids[0], names[0]) == ("n01440764", "tench")


def test_published_weights_know_classes_and_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path))
    random = create_model("volo_d1", img_size=384)
    save_file(random.state_dict(), cached_path("volo_d1.384"))

    timm = load_classifier("volo_d1.384")
    assert (timm.data.img_size, timm.data.crop_pct) == (384, 1.0)
    assert timm.classes[999].startswith("toilet tissue")
    original = load_classifier("volo_d1.384", crop="original", img_size=(32, 48))
    assert (original.data.img_size, original.data.crop_pct) == ((32, 48), 0.96)
    Image.new("RGB", (60, 50), "red").save(tmp_path / "red.png")
    (prediction,) = predict(original, [tmp_path / "red.png"], top=1)
    with torch.no_grad():
        image = eval_transform(original.data)(decode_image(tmp_path / "red.png"))
        logits = random.eval()(PixelPipeline(original.data).eval()(image[None]))
    assert prediction.top[0][0] == timm.classes[int(logits.argmax())]


@pytest.mark.parametrize("name", ["timm.safetensors", "original.pth.tar"])
def test_weight_files_of_others_are_known_by_their_shapes(tmp_path: Path, name: str) -> None:
    import timm

    weights = timm.create_model("volo_d1_384").state_dict()
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        zeros = {f"module.{key}": torch.zeros_like(value) for key, value in weights.items()}
        averaged = {f"module.{key}": value for key, value in weights.items()}
        torch.save({"state_dict": zeros, "state_dict_ema": averaged, "args": argparse.Namespace(lr=1e-3)}, path)
    found = load_classifier(path)
    assert not found.model.training
    assert all(torch.equal(value, weights[key]) for key, value in found.model.state_dict().items())
    assert (found.data.img_size, found.data.crop_pct) == (384, 1.0)
    assert load_classifier(path, crop="original").data.crop_pct == 0.96
    assert (found.classes[0], found.wnids[0]) == ("tench", "n01440764")


def test_weight_files_with_other_classes_and_of_other_models(tmp_path: Path) -> None:
    model = create_model("volo_nano", num_classes=7, img_size=(32, 48)).half()
    torch.save(model.state_dict(), tmp_path / "nano.pth")
    found = load_classifier(tmp_path / "nano.pth")
    assert found.classes == tuple("0123456")
    assert found.data.img_size == (32, 48)
    assert found.model.head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="crop presets belong to published weights"):
        load_classifier(tmp_path / "nano.pth", crop="timm")
    for change, message in (
        ({"depths": (1, 1)}, "none of volo_d1"),
        ({"num_classes": 0}, "a volo_nano that has no heads"),
        ({"in_chans": 1}, "takes 1 channels"),
    ):
        save_file(create_model("volo_nano", **change).state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            load_classifier(tmp_path / "other.safetensors")


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean 'volo_d1\.224'"):
        load_classifier("volo_d1.225")
    with pytest.raises(FileNotFoundError, match=r"no best\.pt or last\.pt"):
        load_classifier(tmp_path)
