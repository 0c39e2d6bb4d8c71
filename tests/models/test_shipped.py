"""Weights of our own: small, whole, usable by their name alone."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import pytest
import torch

import volo
from volo.models.hub import OWN, SHIPPED_FOLDER, find, list_pretrained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_their_files_are_small_and_those_we_know() -> None:
    assert (
        list_pretrained("volo_nano") == ["volo_nano"] and find("volo_nano") == SHIPPED_FOLDER / "volo_nano.safetensors"
    )
    for name, bound in {"volo_nano": 3_000_000, "volo_tiny": 13_000_000}.items():
        path = find(name)
        assert path is not None and path.stat().st_size <= bound
        assert hashlib.sha256(path.read_bytes()).hexdigest() == OWN[name]
        assert (ROOT / f"docs/models/{name}.md").is_file(), "its card"
    assert [path.name for path in SHIPPED_FOLDER.iterdir()] == ["volo_nano.safetensors"], "what the wheel holds"


def test_every_way_leads_to_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = volo.load("volo_nano")
    assert loaded.tag == "volo_nano" and loaded.task == "classify" and len(loaded.classes) == len(loaded.wnids) == 202
    assert "goldfish" in loaded.classes and loaded.preprocessing.img_size == 64
    assert loaded.metrics["top1"] > 0.35 and loaded.preprocessing.path == ""
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = loaded.model(images)
        for pretrained in (True, "pretrained", "volo_nano", SHIPPED_FOLDER / "volo_nano.safetensors"):
            model = volo.create_model("volo_nano", pretrained=pretrained).eval()
            assert all(p.dtype == torch.float32 for p in model.parameters())
            torch.testing.assert_close(model(images), expected)
    larger = volo.create_model("volo_nano", pretrained=True, num_classes=5, img_size=128, pool="concat")
    assert larger(torch.randn(1, 3, 128, 128)).shape == (1, 5)
    assert torch.equal(larger.network[0][0].attn.v.weight, loaded.model.network[0][0].attn.v.weight)
    with pytest.raises(ValueError, match="its embed_dims"):
        volo.create_model("volo_nano", pretrained=True, embed_dims=(32, 64), num_heads=(1, 2))


def test_a_file_of_that_name_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("volo_nano").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged"):
        volo.load("volo_nano")


def test_segmentation_starts_from_them_too() -> None:
    segmenter = volo.create_segmenter("fpn_volo_nano", 3, pretrained="pretrained", channels=16)
    own = volo.create_model("volo_nano", pretrained=True)
    assert torch.equal(segmenter.backbone.network[0][0].attn.v.weight, own.network[0][0].attn.v.weight)
