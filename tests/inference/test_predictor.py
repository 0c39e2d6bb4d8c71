"""Prediction: which images, in which order, with which answers; unreadable ones among them."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from volo.config import DataConfig
from volo.data.decode import decode_image
from volo.data.transforms import PixelPipeline, eval_transform
from volo.inference.model_source import LoadedModel
from volo.inference.predictor import (
    Prediction,
    find_pictures,
    predict,
    to_csv,
    to_json,
)
from volo.inference.sharing import save_pretrained
from volo.models.factory import create_model


@pytest.fixture(scope="module")
def classifier() -> LoadedModel:
    torch.manual_seed(0)
    options = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
    model = create_model("volo_nano", num_classes=4, img_size=16, **options).eval()
    return LoadedModel(model, "classify", ("ant", "bee", "cat", "dog"), DataConfig(img_size=16), "a test")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    colours = ["red", "green", "blue", "white", "black", "grey", "pink"]
    paths = [tmp_path / "in" / f"{i}_{colour}.png" for i, colour in enumerate(colours)]
    paths[0].parent.mkdir()
    for i, (path, colour) in enumerate(zip(paths, colours)):
        Image.new("RGB", (20 + i, 30), colour).save(path)
    return paths


def test_equals_the_model_one_picture_at_a_time(classifier: LoadedModel, pictures: list[Path]) -> None:
    got = list(predict(classifier, pictures, top=2, batch_size=3))
    assert [prediction.name for prediction in got] == [str(path) for path in pictures]
    pixels = PixelPipeline(classifier.preprocessing).eval()
    for path, prediction in zip(pictures, got):
        with torch.no_grad():
            image = eval_transform(classifier.preprocessing)(decode_image(path))
            probabilities = classifier.model(pixels(image[None]))[0].softmax(0)
        values, indices = probabilities.topk(2)
        assert [name for name, _ in prediction.top] == [classifier.classes[i] for i in indices]
        assert [p for _, p in prediction.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_bad_pictures_keep_their_place(classifier: LoadedModel, pictures: list[Path], bad: int) -> None:
    whole = list(predict(classifier, pictures, batch_size=2))
    pictures[bad].write_bytes(b"not an image")
    got = list(predict(classifier, pictures, batch_size=2))
    assert [i for i, prediction in enumerate(got) if prediction.error] == [bad]
    assert str(pictures[bad]) in str(got[bad].error)
    assert got[bad].top == ()
    assert [p.name for p in got] == [p.name for p in whole]
    for i, (a, b) in enumerate(zip(got, whole)):
        if i != bad:
            assert [name for name, _ in a.top] == [name for name, _ in b.top]


def test_a_picture_that_is_gone_is_reported(classifier: LoadedModel, pictures: list[Path]) -> None:
    pictures[1].unlink()
    errors = [prediction.error for prediction in predict(classifier, pictures)]
    assert errors[1] is not None
    assert "no such file" in errors[1]
    assert sum(error is not None for error in errors) == 1


def test_an_answer_that_is_not_finite_is_an_error_of_that_image(classifier: LoadedModel, pictures: list[Path]) -> None:
    """float16 overflows for one image and not for the next; damaged weights have no answer for any."""

    class Overflowing(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = classifier.model(images)
            logits[1, 2] = torch.inf
            return logits

    partly = dataclasses.replace(classifier, model=Overflowing())
    got = list(predict(partly, pictures[:3], device="cpu"))
    assert [prediction.error is not None for prediction in got] == [False, True, False]
    assert f"{pictures[1]}: the model's answer is not finite" in str(got[1].error)
    assert got[1].top == ()
    assert ": NaN" not in "".join(to_json(got))

    damaged = copy.deepcopy(classifier.model)
    torch.nn.init.constant_(damaged.head.bias, torch.nan)
    broken = dataclasses.replace(classifier, model=damaged)
    assert all(prediction.error and not prediction.top for prediction in predict(broken, pictures))


def test_strings_do_as_well(classifier: LoadedModel, pictures: list[Path], tmp_path: Path) -> None:
    folder = save_pretrained(classifier, tmp_path / "saved")
    by_name = list(predict(folder, pictures[0].parent, top=2))
    assert by_name == list(predict(classifier, pictures, top=2))


ALONE = """
import sys
for name in ("timm", "matplotlib", "tensorboard", "sklearn"):
    sys.modules[name] = None  # makes `import name` fail
from volo.cli.main import main
assert main(["predict", sys.argv[1], sys.argv[2]]) == 0
from volo.data.imagenet import imagenet_classes
assert imagenet_classes()[1][207] == "golden retriever"
"""


def test_prediction_needs_neither_timm_nor_matplotlib(
    classifier: LoadedModel, pictures: list[Path], tmp_path: Path
) -> None:
    folder = save_pretrained(classifier, tmp_path / "saved")
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder), str(pictures[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in classifier.classes)


def test_no_more_classes_than_there_are(classifier: LoadedModel, pictures: list[Path]) -> None:
    (prediction,) = predict(classifier, pictures[:1], top=9)
    assert len(prediction.top) == 4
    assert sum(p for _, p in prediction.top) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        list(predict(classifier, pictures, top=0))


def test_pictures_are_found(tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures[0].parent
    (folder / "notes.txt").write_text("not an image")
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
        ([], ValueError, "name the images"),
        (["gone.png"], FileNotFoundError, r"no file or folder 'gone\.png'"),
        (["*.jpg"], ValueError, r"no images in '\*\.jpg'"),
        (["."], ValueError, r"no images in '\.'"),
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
