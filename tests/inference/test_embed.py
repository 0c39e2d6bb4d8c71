"""Vectors of images: what the model computes, in files that others read and that never take the place of what is not ours."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import volo
from volo.config import DataConfig
from volo.data.sources import ArraySource
from volo.data.transforms import PixelPipeline
from volo.inference import embed as module
from volo.inference.embed import embed_source, folder_classes, is_ours, nearest, standardised, volo_classifier
from volo.inference.model_source import LoadedModel

TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8}


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = volo.create_model("volo_nano", num_classes=2, img_size=16, **TINY).eval()
    data = DataConfig(img_size=16, crop_pct=1.0, num_workers=0)
    return LoadedModel(model, "classify", ("cat", "dog"), data, "tiny")


@pytest.fixture
def images(loaded: LoadedModel) -> list[Path]:
    """Five images of the model's own size, in two class folders, and one that is none among them."""
    rng = np.random.default_rng(0)
    paths = [Path("photos", "cat" if i < 3 else "dog", f"{i}.png") for i in range(6)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    paths[2].write_bytes(b"no image")
    return paths


def test_vectors_are_the_model_s(loaded: LoadedModel, images: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    found = volo.embed(loaded, images, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    good = [path for i, path in enumerate(images) if i != 2]
    assert list(found.names) == list(map(str, good)) and found.classes == ("cat", "cat", "dog", "dog", "dog")
    assert len(found.errors) == 1 and "2.png" in found.errors[0]
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (5, 96)
    assert seen == [(2, 6), (4, 6), (6, 6)]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in good])
    with torch.no_grad():
        features = loaded.model.forward_features(PixelPipeline(loaded.preprocessing).eval()(pixels))
    for pool in ("concat", "token"):
        expected = loaded.model.pool(features, pool)
        given = volo.embed(loaded, good, pool=pool).vectors
        torch.testing.assert_close(torch.from_numpy(given), expected, atol=1e-4, rtol=1e-4)
    by_folder = volo.embed(loaded, "photos")
    np.testing.assert_allclose(by_folder.vectors, found.vectors, atol=1e-5)
    half = volo.embed(loaded, good, amp="bf16").vectors
    assert half.dtype == np.float32 and np.abs(half - found.vectors).max() < 0.3


def test_a_data_set_has_classes_and_parts(loaded: LoadedModel) -> None:
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    train = ArraySource(pixels[:3], torch.tensor([0, 1, 0]), ["t0", "t1", "t2"], ("cat", "dog"))
    val = ArraySource(pixels[3:], torch.tensor([1, 0]), ["v0", "v1"], ("cat", "dog"))
    found, features = embed_source(loaded, {"train": train, "val": val}, views=2)
    assert found.names == ("t0", "t1", "t2", "v0", "v1")
    assert found.classes == ("cat", "dog", "cat", "dog", "cat")
    assert found.parts == ("train",) * 3 + ("val",) * 2
    assert features.shape == (2, 5, 96) and torch.equal(features[0], torch.from_numpy(found.vectors))
    assert not torch.equal(features[0], features[1])


def test_npz_is_read_by_numpy_alone(loaded: LoadedModel, images: list[Path]) -> None:
    odd = Path("photos/cat/th\udce9 ü.png")
    images[0].rename(odd)
    found = volo.embed(loaded, [odd, *images[1:]])
    found.save("vectors.npz")
    with np.load("vectors.npz", allow_pickle=False) as file:
        assert sorted(file) == ["classes", "names", "vectors", "volo"]
        assert np.array_equal(file["vectors"], found.vectors)
        assert file["names"].tolist() == list(found.names) and file["classes"].tolist() == list(found.classes)
        about = json.loads(str(file["volo"]))
    assert about["model"] == "tiny" and about["pool"] == "concat" and about["img_size"] == 16
    assert is_ours(Path("vectors.npz"))
    with pytest.raises(ValueError, match=r"\.npz or \.parquet"):
        found.save("vectors.csv")


def test_only_files_with_the_mark_are_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.npz"
    np.savez(theirs, vectors=np.zeros((2, 3)), names=np.array(["a", "b"]))
    assert not is_ours(theirs)
    np.savez(theirs, volo=np.array("not JSON"))
    assert not is_ours(theirs)
    np.savez(theirs, volo=np.array(json.dumps({"format": "another 1"})))
    assert not is_ours(theirs)
    np.savez(theirs, volo=np.array(["an", "array"], dtype=object))  # pickled: not even opened
    assert not is_ours(theirs)
    with zipfile.ZipFile(theirs, "w") as archive:  # as .docx and .xlsx are
        archive.writestr("word/document.xml", "<text/>")
    assert not is_ours(theirs)
    with zipfile.ZipFile(theirs, "w") as archive:
        archive.writestr("volo.npy", "no array")
    assert not is_ours(theirs)
    for content in (b"", b"PK\x03\x04 cut off", b"text"):
        theirs.write_bytes(content)
        assert not is_ours(theirs)


def test_parquet(loaded: LoadedModel, images: list[Path]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    odd = Path("photos/cat/th\udce9.png")
    images[0].rename(odd)
    found = volo.embed(loaded, [odd, *images[1:]])
    found.save("vectors.parquet")
    table = parquet.read_table("vectors.parquet")
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), 96)
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), found.vectors)
    assert table["name"].to_pylist() == ["photos/cat/th\\udce9.png", *found.names[1:]]
    assert table["class"].to_pylist() == list(found.classes)
    assert is_ours(Path("vectors.parquet"))
    parquet.write_table(pyarrow.table({"vector": [1.0]}), "theirs.parquet")
    assert not is_ours(Path("theirs.parquet"))
    Path("theirs.parquet").write_bytes(b"PAR1 no more")
    assert not is_ours(Path("theirs.parquet"))


def test_parquet_without_pyarrow(loaded: LoadedModel, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = volo.embed(loaded, images)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow, or write an .npz"):
        found.save("vectors.parquet")
    assert not Path("vectors.parquet").exists()


def test_what_has_no_vectors_is_refused(loaded: LoadedModel, scenes: Path) -> None:
    segmenter = LoadedModel(nn.Identity(), "segment", ("a",), DataConfig(), "masks.pt")
    with pytest.raises(ValueError, match="masks.pt is a segmentation model; .* VOLO classifier: give a run folder"):
        volo_classifier(segmenter)
    timm = pytest.importorskip("timm")
    other = LoadedModel(timm.create_model("resnet18"), "classify", (), DataConfig(), "timm's resnet18")
    with pytest.raises(ValueError, match="resnet18 is a ResNet; .* VOLO classifier"):
        volo_classifier(other)
    with pytest.raises(ValueError, match="resnet18.a1_in1k is a model of timm; .* VOLO classifier"):
        volo.embed("resnet18.a1_in1k", ["a.png"])
    with pytest.raises(FileNotFoundError, match="no model 'nothing_of_that_name'"):
        volo.embed("nothing_of_that_name", ["a.png"])
    Path("model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="model.onnx is an exported file, .* VOLO classifier"):
        volo.embed("model.onnx", ["a.png"])


@pytest.mark.parametrize("wrong", [{"pool": "mean"}, {"batch_size": 0}, {"amp": "fp8"}])
def test_options_out_of_range(loaded: LoadedModel, wrong: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match="pool is token or concat, batch_size at least 1 and amp one of off, bf16, fp16"
    ):
        volo.embed(loaded, ["a.png"], **wrong)


def test_nothing_readable_is_an_error(loaded: LoadedModel, images: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"(?s)no image could be read.*2\.png"):
        volo.embed(loaded, [images[2]])


def test_answers_that_are_not_finite_are_left_out(loaded: LoadedModel, images: list[Path]) -> None:
    loaded.model.cls_token.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"(?s)no image could be read.*not finite"):
        volo.embed(loaded, images[:2])
    source = ArraySource(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.tensor([0]), ["black"], ("cat", "dog"))
    with pytest.raises(ValueError, match="black: the model's answer is not finite"):
        embed_source(loaded, {"train": source})


def test_classes_by_folders() -> None:
    assert folder_classes(["p/a/1.png", "p/b/1.png"]) == ("a", "b")
    assert folder_classes(["p/a/1.png", "q/b/1.png"]) == ("", "")
    assert folder_classes(["p/a/1.png", "p/a/2.png"]) == ("", "")
    assert folder_classes(["p/a/1.png", "q/b/1.png"], ["b", "a", "c"]) == ("a", "b")


def test_nearest_ignores_what_all_have_in_common() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = 0.1 * torch.randn(40, 8, generator=generator) + 100
    vectors[7] = vectors[3] + 1e-3
    assert torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0) > 0.999
    similarity, numbers = nearest(vectors, [3, 7], 5)
    assert numbers[0, 0] == 7 and numbers[1, 0] == 3 and similarity[0, 0] > 0.99 > 0.98 > similarity[0, 1]
    assert 3 not in numbers[0].tolist()
    assert nearest(vectors[:3], [0], 9)[1].shape == (1, 2)
    unit = standardised(vectors)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(40))
    assert standardised(torch.ones(3, 4)).isfinite().all()


def test_the_mark_is_a_promise() -> None:
    assert module.FORMAT.startswith("volo embed ")
