"""What users may write where a model is wanted, and what comes of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from volo.data.decode import decode_image
from volo.data.imagenet import imagenet_classes
from volo.data.transforms import PixelPipeline, eval_transform
from volo.inference.model_source import load
from volo.inference.predictor import predict
from volo.models.factory import create_model
from volo.models.hub import cached_path


def test_names_of_imagenet() -> None:
    wnids, names = imagenet_classes()
    assert len(wnids) == len(set(wnids)) == len(set(names)) == 1000
    assert list(wnids) == sorted(wnids)
    assert (wnids[0], names[0]) == ("n01440764", "tench")


def test_published_weights_know_classes_and_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path))
    random = create_model("volo_d1", img_size=384)
    save_file(random.state_dict(), cached_path("volo_d1.384"))

    timm = load("volo_d1.384")
    assert (timm.preprocessing.img_size, timm.preprocessing.crop_pct) == (384, 1.0)
    assert timm.classes[999].startswith("toilet tissue")
    original = load("volo_d1.384", crop="original", img_size=(32, 48))
    assert (original.preprocessing.img_size, original.preprocessing.crop_pct) == ((32, 48), 0.96)
    Image.new("RGB", (60, 50), "red").save(tmp_path / "red.png")
    (prediction,) = predict(original, [tmp_path / "red.png"], top=1)
    with torch.no_grad():
        image = eval_transform(original.preprocessing)(decode_image(tmp_path / "red.png"))
        logits = random.eval()(PixelPipeline(original.preprocessing).eval()(image[None]))
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
    found = load(path)
    assert not found.model.training
    assert all(torch.equal(value, weights[key]) for key, value in found.model.state_dict().items())
    assert (found.preprocessing.img_size, found.preprocessing.crop_pct) == (384, 1.0)
    assert load(path, crop="original").preprocessing.crop_pct == 0.96
    assert (found.classes[0], found.wnids[0]) == ("tench", "n01440764")


def test_weight_files_with_other_classes_and_of_other_models(tmp_path: Path) -> None:
    model = create_model("volo_nano", num_classes=7, img_size=(32, 48)).half()
    torch.save(model.state_dict(), tmp_path / "nano.pth")
    found = load(tmp_path / "nano.pth")
    assert found.classes == tuple("0123456")
    assert found.preprocessing.img_size == (32, 48)
    assert found.model.head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="crop presets belong to published weights"):
        load(tmp_path / "nano.pth", crop="timm")
    for change, message in (
        ({"depths": (1, 1)}, "none of volo_d1"),
        ({"num_classes": 0}, "a volo_nano that has no heads"),
        ({"in_chans": 1}, "takes 1 channels"),
    ):
        save_file(create_model("volo_nano", **change).state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "other.safetensors")


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean 'volo_d1\.224'"):
        load("volo_d1.225")
    with pytest.raises(FileNotFoundError, match=r"no best\.pt or last\.pt"):
        load(tmp_path)


def test_architectures_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan reads and downloads nothing, whatever the name stands for."""
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.save(create_model("volo_nano").state_dict(), tmp_path / "nano.pth")
    for source, size in (("volo_d5.512", 512), (tmp_path / "nano.pth", 64), ("resnet18.a1_in1k", (288, 288))):
        outline = load(source, device="meta", timm=True)
        assert all(p.is_meta for p in outline.model.parameters())
        assert (outline.device.type, outline.preprocessing.img_size) == ("meta", size)


def test_names_of_timm_mean_nothing_where_none_is_asked_for() -> None:
    with pytest.raises(FileNotFoundError, match="hf-hub:user/name"):
        load("resnet18.a1_in1k")
    with pytest.raises(ValueError, match=r"no annotator 'resnet19'; did you mean 'resnet1"):
        load("resnet19", timm=True)
    with pytest.raises(ValueError, match="weights of its own"):
        load("volo_d1.224", timm=True, weights="w.pth")
