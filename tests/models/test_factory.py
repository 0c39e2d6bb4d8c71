"""Models by name, with published weights or those of files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import volo
from volo.models.hub import cached_path
from volo.models.volo import VARIANTS, VOLO, VOLOConfig, resample_pos_embed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VOLO_CACHE", str(folder))
    return folder


def small_model(**overrides) -> VOLO:
    config = {
        "depths": (1, 1, 1),
        "embed_dims": (16, 32),
        "num_heads": (2, 2),
        "stem_dim": 8,
        "num_class_blocks": 1,
        "img_size": 64,
        "num_classes": 7,
    }
    return VOLO(VOLOConfig(**{**config, **overrides}))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# create_model(pretrained=...)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, VOLO]:
    """Small stand-ins for D1 and two of its published files, already in the cache."""
    config = small_model(img_size=224).config
    monkeypatch.setitem(VARIANTS, "volo_d1", config)
    models = {
        "volo_d1.224": VOLO(config).eval(),
        "volo_d1.384": VOLO(dataclasses.replace(config, img_size=384)).eval(),
    }
    cache.mkdir()
    save_file(models["volo_d1.224"].state_dict(), cached_path("volo_d1.224"))
    torch.save({"state_dict": models["volo_d1.384"].state_dict()}, cached_path("volo_d1.384", "release"))
    return models


def test_create_pretrained_by_size_and_tag(published: dict[str, VOLO], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="volo")
    model = volo.create_model("volo_d1", pretrained=True).eval()
    assert equal(model.state_dict(), published["volo_d1.224"].state_dict())
    assert "every name and shape agrees" in caplog.text
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(images), published["volo_d1.224"](images))
    for options in ({"pretrained": True, "img_size": 384}, {"pretrained": "volo_d1.384"}):
        model = volo.create_model("volo_d1", **options)
        assert model.config.img_size == (384, 384)
        assert equal(model.state_dict(), published["volo_d1.384"].state_dict())


def test_create_pretrained_adapts_what_the_caller_asks(
    published: dict[str, VOLO], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="volo")
    source = published["volo_d1.224"]
    model = volo.create_model(
        "volo_d1", pretrained=True, img_size=(256, 320), num_classes=3, in_chans=1, drop_path_rate=0.3
    )
    assert model.config.drop_path_rate == 0.3
    assert model.head.weight.shape == (3, 32)
    assert torch.equal(model.pos_embed, resample_pos_embed(source.pos_embed, (16, 20)))
    assert torch.equal(model.norm.weight, source.norm.weight)
    for what in ("resampled from 14 x 14 to 16 x 20", "head left as initialised", "3 input channels to 1"):
        assert what in caplog.text
    assert volo.create_model("volo_d1", pretrained=True, num_classes=0)(torch.randn(1, 3, 64, 64)).shape == (1, 32)


def test_create_pretrained_errors(published: dict[str, VOLO]) -> None:
    with pytest.raises(ValueError, match=r"volo_d1\.225.*did you mean 'volo_d1\.224'"):
        volo.create_model("volo_d1", pretrained="volo_d1.225")
    with pytest.raises(
        ValueError, match=r"volo_d2\.224 are weights of volo_d2, not of volo_d1.*did you mean 'volo_d1\.224'"
    ):
        volo.create_model("volo_d1", pretrained="volo_d2.224")
    with pytest.raises(
        ValueError, match="no weights of volo_small are published, only of volo_nano, volo_tiny, volo_d1"
    ):
        volo.create_model("volo_small", pretrained=True)
    with pytest.raises(ValueError, match="neither a published tag nor an existing file"):
        volo.create_model("volo_d1", pretrained="runs/none/best.pt")
    with pytest.raises(ValueError, match=r"missing in the file: network\.2\.1"):
        volo.create_model("volo_d1", pretrained=True, depths=(1, 2, 1))


def test_create_pretrained_from_files(published: dict[str, VOLO], tmp_path: Path) -> None:
    """A plain file says sizes and classes by its shapes, one of our checkpoints by its configuration."""
    source = small_model(img_size=(96, 64), num_classes=11, in_chans=1, drop_path_rate=0.2)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    model = volo.create_model("volo_d1", pretrained=str(tmp_path / "plain.pth"))
    assert equal(model.state_dict(), source.state_dict())
    assert model.config == dataclasses.replace(source.config, drop_path_rate=0.0)

    own = {"format": 1, "model": source.state_dict(), "model_config": dataclasses.asdict(source.config)}
    torch.save(own, tmp_path / "best.pt")
    model = volo.create_model("volo_d1", pretrained=tmp_path / "best.pt")
    assert model.config == source.config
    model = volo.create_model("volo_d1", pretrained=tmp_path / "best.pt", num_classes=2)
    assert model.head.weight.shape == (2, 32)
    assert torch.equal(model.norm.weight, source.norm.weight)
    with pytest.raises(ValueError, match=r"another model than volo_d2: its depths is \(1, 1, 1\), not \(6, 4, 10, 4\)"):
        volo.create_model("volo_d2", pretrained=tmp_path / "best.pt")
    own["model_config"]["colour"] = "blue"
    torch.save(own, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"another version of volo.*colour"):
        volo.create_model("volo_d1", pretrained=tmp_path / "best.pt")
