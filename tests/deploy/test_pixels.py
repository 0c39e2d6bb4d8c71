"""A file with its preprocessing inside, where there is neither volo nor PyTorch: the answers of `volo predict`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import volo
from volo.cli.main import main
from volo.deploy import export as exporting
from volo.deploy.program import prepare

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# What a user writes who has ONNX Runtime and Pillow alone.
BARE = """
import json, sys
sys.modules["volo"] = sys.modules["torch"] = None  # what imports them fails
import numpy as np, onnxruntime
from PIL import Image, ImageOps

try:
    import volo
    sys.exit("volo can be imported")
except ModuleNotFoundError:
    pass
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["volo"])
answers = {}
for path in sys.argv[2:]:
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))[None]
    (probabilities,) = session.run(None, {"pixels": pixels})
    answers[path] = dict(zip(about["classes"], probabilities[0].tolist()))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Large and small, wide and high, grey, turned by EXIF, with a palette, in several formats."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(5)
    sizes = [(64, 64), (320, 240), (240, 320), (1, 1), (3, 200), (9, 12), (65, 64), (2200, 15), (1024, 769), (17, 1500)]
    paths = []
    for i, size in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        path = folder / f"{i}.{('png', 'webp', 'bmp')[i % 3]}"
        coarse.save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
        paths.append(path)
        if i == 1:
            for mode in ("L", "P", "1"):
                paths.append(folder / f"mode_{mode}.png")
                coarse.convert(mode).save(paths[-1])
            for orientation in range(2, 9):
                exif = Image.Exif()
                exif[0x0112] = orientation
                paths.append(folder / f"turned_{orientation}.jpg")
                coarse.save(paths[-1], exif=exif, quality=95)
    return paths


def bare(model: Path, pictures: list[Path]) -> list[dict[str, float]]:
    command = [sys.executable, "-c", BARE, str(model), *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return [answers[str(path)] for path in pictures]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "nano.onnx"
    assert main(["export", "volo_nano", "--with-preprocessing", "--out", str(path)]) == 0
    return path


def test_the_answers_of_predict_without_volo(exported: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["predict", "volo_nano", *map(str, pictures), "--top", "202", "--format", "json"]) == 0
    expected = [
        {entry["class"]: entry["probability"] for entry in row["predictions"]}
        for row in json.loads(capsys.readouterr().out)
    ]
    assert len(expected) == len(pictures) and len({max(row, key=row.__getitem__) for row in expected}) > 3
    for picture, answer, wanted in zip(pictures, bare(exported, pictures), expected, strict=True):
        assert max(answer, key=answer.__getitem__) == max(wanted, key=wanted.__getitem__), picture.name
        assert answer == pytest.approx(wanted, abs=1e-2), picture.name


def test_one_changed_weight_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def changed(model: nn.Module, *, portable: bool = True) -> nn.Module:
        copy = prepare(model, portable=portable)
        with torch.no_grad():
            copy.norm.weight[7] += 1.0  # type: ignore[union-attr, operator, index]
        return copy

    monkeypatch.setattr(exporting, "prepare", changed)
    assert main(["export", "volo_nano", "--with-preprocessing", "--out", str(tmp_path / "x.onnx")]) != 0
    said = capsys.readouterr().err
    assert "differ" in said and "No file was written" in " ".join(said.split())
    assert list(tmp_path.iterdir()) == []


def test_volo_and_its_file_agree_in_python(exported: Path, pictures: list[Path]):
    """`volo.predict` takes the file as it takes the model."""
    both = [list(volo.predict(model, pictures[:4])) for model in ("volo_nano", exported)]
    for mine, theirs in zip(*both, strict=True):
        assert mine.top[0][0] == theirs.top[0][0] and dict(mine.top) == pytest.approx(dict(theirs.top), abs=1e-2)
