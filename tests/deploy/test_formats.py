"""Formats beyond ONNX, OpenVINO and torch.export: each file gives the model's answers, or is not there.

ExecuTorch, Core ML and LiteRT are no part of the developers' packages and need environments of their own: there,
`pip install -e '.[dev,executorch]'` (or coreml, or litert) and `pytest tests/deploy/test_formats.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import decided_volo, with_one_weight_changed
from torch import nn

import volo
from volo.cli.main import main
from volo.config import DataConfig
from volo.deploy import export as exporting
from volo.deploy.check import MismatchError
from volo.deploy.export import KINDS
from volo.deploy.formats import coreml
from volo.deploy.program import prepare
from volo.inference import runtimes
from volo.inference.exported import open_exported
from volo.inference.model_source import LoadedModel, load
from volo.inference.predictor import predict
from volo.inference.segment import segment
from volo.inference.segment_evaluate import HowToTest
from volo.models.factory import create_segmenter

CLASSES = ("ant", "bee", "猫", "dog")
TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
# A compiler takes its time.
ALL = [pytest.param("aoti", marks=pytest.mark.slow), "executorch", "coreml", "litert"]
THAT_RUN = [name for name in ALL if name != "coreml"]
FIXED = ["executorch", "coreml", "litert"]


def needed(name: str) -> None:
    for package in KINDS[name].packages:
        pytest.importorskip(package)
    if name == "aoti" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler, g++")


def write(model: Any, name: str, folder: Path, **options: Any) -> Path:
    needed(name)
    path = folder / f"model{KINDS[name].ending}"
    volo.export(model, path, format=name, **options)  # type: ignore[arg-type]
    return path


def opened(path: Path, name: str) -> nn.Module:
    return coreml.replay(path) if name == "coreml" else open_exported(path, trust=True)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = decided_volo(len(CLASSES), **TINY)
    return LoadedModel(model, "classify", CLASSES, DataConfig(img_size=16, crop_pct=0.8), "a test")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for i, size in enumerate([(16, 16), (40, 23), (97, 64)]):
        path = folder / f"{i}.png"
        coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def files(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the classifier, in each format that is asked for, for batches of two where they are fixed."""
    written: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in written:
            written[name] = write(loaded, name, tmp_path_factory.mktemp(name), batch_size=2, licence="MIT")
        return written[name]

    return file


@pytest.mark.parametrize("name", ALL)
def test_a_file_gives_the_models_answers_and_says_what_it_is(name: str, loaded: LoadedModel, files: Any):
    path = files(name)
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.json"}
    report = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    rows, description = report["compared"], report["description"]
    assert all(row["relative_error"] < 1e-4 and row["top1_agreement"] == 1 for row in rows)
    assert [row["shape"][0] for row in rows] == ([1, 8] if name == "aoti" else [2] * 4)
    assert description["batch"] == (None if name == "aoti" else 2) and description["size"] == [16, 16]
    assert ("not_run" in report) == (name == "coreml") != ("milliseconds" in report)
    assert report["bytes"] > sum(p.numel() for p in loaded.model.parameters())

    model = opened(path, name)
    for key in ("classes", "preprocessing", "origin", "licence", "task"):
        assert model.description[key] == description[key]
    assert model.description["classes"] == list(CLASSES) and description["licence"] == "MIT"
    assert description["preprocessing"]["crop_pct"] == 0.8
    images = torch.randn(5, 3, 16, 16)  # more than one batch, and not a multiple of it
    with torch.inference_mode():
        torch.testing.assert_close(model(images), loaded.model(images), atol=1e-5, rtol=1e-4)
        # What was returned is not written to again, and the memory format makes no difference.
        first = model(images[:1])
        kept = first.clone()
        model(images[1:2])
        assert torch.equal(first, kept)
        torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), model(images))
    with pytest.raises(ValueError, match="16 x 16"):
        model(torch.zeros(1, 3, 24, 24))


@pytest.mark.parametrize("name", THAT_RUN)
def test_files_are_models_for_predict(name: str, loaded: LoadedModel, files: Any, pictures: list[Path]):
    exported = load(files(name), trust=True)
    assert exported.classes == CLASSES and exported.preprocessing == loaded.preprocessing
    for mine, expected in zip(predict(exported, pictures, top=4), predict(loaded, pictures, top=4), strict=True):
        assert mine.error is None and mine.top[0][0] == expected.top[0][0]
        assert dict(mine.top) == pytest.approx(dict(expected.top), abs=1e-5)


@pytest.mark.parametrize("name", ["aoti", "executorch", "coreml", "litert"])
@pytest.mark.slow
def test_segmenter(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model = create_segmenter("fpn_volo_nano", num_classes=3, img_size=32, **TINY).eval()
    loaded = LoadedModel(model, "segment", ("a", "b", "c"), DataConfig(img_size=(32, 48)), "a test")
    path = write(loaded, name, tmp_path)
    if name == "coreml":
        return
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(picture)
    exported = load(path, task="segment", trust=True)
    assert exported.colours == loaded.colours
    how = HowToTest.by_windows((32, 48))
    mine, expected = (next(iter(segment(m, [picture], how=how))) for m in (exported, loaded))
    assert mine.error is None and (mine.classes == expected.classes).mean() > 0.999


@pytest.mark.parametrize("name", ALL)
def test_one_changed_weight_leaves_no_file(
    name: str, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporting, "prepare", with_one_weight_changed(prepare))
    with pytest.raises(MismatchError, match="No file was written"):
        write(loaded, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", THAT_RUN)
def test_damaged_files(name: str, files: Any, tmp_path: Path):
    content = files(name).read_bytes()
    for what, damaged in (("half", content[: len(content) // 2]), ("other", b"not a model"), ("empty", b"")):
        path = tmp_path / f"{what}{KINDS[name].ending}"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{what}.*cannot be opened|{what}.*no exported program"):
            load(path, trust=True)


@pytest.mark.slow
def test_native_code_is_trusted_explicitly(files: Any, pictures: list[Path], capsys: pytest.CaptureFixture[str]):
    path = files("aoti")
    with pytest.raises(ValueError, match=r"native code.*trust=True"):
        load(path)
    renamed = path.with_name("renamed.pt2")
    shutil.copy(path, renamed)
    for arguments, code in (((), 2), (("--trust",), 0)):
        assert main(["predict", str(renamed), str(pictures[0]), *arguments]) == code
        said = capsys.readouterr()
        assert ("--trust" in said.err) == (code == 2)
    renamed.unlink()


def test_native_code_in_a_program_is_found(loaded: LoadedModel, tmp_path: Path):
    """`torch.export.load` runs it, whatever else is in the archive."""
    path = tmp_path / "model.pt2"
    volo.export(loaded, path, format="torch")
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/data/aotinductor/model/code.so", b"")
    with pytest.raises(ValueError, match=r"native code.*trust=True"):
        load(path)


def test_native_code_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.aoti.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/code.so", b"")
        archive.writestr("model/extra/volo.json", json.dumps({"processor": "x86_64 AVX512"}))
    for here in ("x86_64 AVX2", "aarch64 DEFAULT"):
        monkeypatch.setattr(runtimes, "processor", lambda here=here: here)
        with pytest.raises(ValueError, match=f"x86_64 AVX512.*{here}.*export"):
            open_exported(path, trust=True)
    monkeypatch.setattr(runtimes, "processor", lambda: "x86_64 AVX512")
    with pytest.raises(ValueError, match="cannot be opened by AOTInductor"):
        open_exported(path, trust=True)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("options", [{"dynamic": ("batch",)}, {"dynamic": ("size",)}, {"with_preprocessing": True}])
def test_fixed_shapes_are_said_before_any_work(name: str, options: dict[str, Any], loaded: LoadedModel, tmp_path: Path):
    with pytest.raises(ValueError, match=f"{name} have one batch size.*--batch-size"):
        volo.export(loaded, tmp_path / f"x{KINDS[name].ending}", format=name, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FIXED)
def test_missing_packages(name: str, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    install = rf"pip install 'volo\[{name}\]'"
    with pytest.raises(ModuleNotFoundError, match=install):
        volo.export(loaded, tmp_path / f"x{KINDS[name].ending}", format=name)  # type: ignore[arg-type]
    path = tmp_path / f"model{KINDS[name].ending}"
    if name == "coreml":
        path.mkdir()
        with pytest.raises(ValueError, match="Apple"):
            load(path)
    else:
        path.touch()
        with pytest.raises(ModuleNotFoundError, match=install):
            load(path)


def test_missing_compiler(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="no-such-compiler.*install"):
        volo.export(loaded, tmp_path / "x.aoti.pt2", format="aoti")


def test_core_ml_operations_that_cannot_be_checked(tmp_path: Path):
    class Sine(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)).sin()

    needed("coreml")
    with pytest.raises(ValueError, match="cannot be checked outside Apple's systems: sin"):
        volo.export(Sine(), tmp_path / "sine.mlpackage", format="coreml", img_size=16)
    assert list(tmp_path.iterdir()) == []


def test_core_ml_in_half_precision(loaded: LoadedModel, files: Any, tmp_path: Path):
    path = write(loaded, "coreml", tmp_path, dtype="fp16")
    report = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
    assert 1e-5 < max(row["relative_error"] for row in report["compared"]) < 2e-2
    full = json.loads(files("coreml").with_name("model.mlpackage.json").read_text(encoding="utf-8"))
    assert report["bytes"] < 0.8 * full["bytes"]


def test_a_package_that_is_a_folder_replaces_an_earlier_one(tmp_path: Path):
    target = tmp_path / "model.mlpackage"
    for text in ("old", "new"):
        folder = tmp_path / "made"
        (folder / target.name / "Data").mkdir(parents=True)
        (folder / target.name / "Data" / "model").write_text(text)
        (folder / f"{target.name}.json").write_text("{}")
        exporting._publish(folder, target)
        shutil.rmtree(folder)
    assert (target / "Data" / "model").read_text() == "new"
