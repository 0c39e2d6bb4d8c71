"""Features: what the model computes, kept by content."""

from pathlib import Path

import pytest
import torch

import volo
from volo.config import DataConfig
from volo.data.sources import ArraySource
from volo.data.transforms import PixelPipeline
from volo.inference import features as module
from volo.inference.features import extract_features

TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8}
DATA = DataConfig(img_size=32, crop_pct=1.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path))
    return tmp_path / "features"


def some(seed: int = 0, count: int = 5) -> ArraySource:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ArraySource(images, torch.arange(count), [f"{i}" for i in range(count)], tuple("abcde"))


def test_features_are_the_model_s(cache: Path) -> None:
    model = volo.create_model("volo_nano", num_classes=5, img_size=32, pool="concat", **TINY)
    source = some()
    found = extract_features(model, source, DATA, views=2, batch_size=2)
    images = PixelPipeline(DATA).eval()(source.images)
    model.eval()
    with torch.no_grad():
        for view, shown in enumerate((images, images.flip(-1))):
            torch.testing.assert_close(found[view], model.pool(model.forward_features(shown)), atol=1e-4, rtol=1e-4)
    token = extract_features(model, source, DATA, pool="token")
    torch.testing.assert_close(token[0], found[0, :, :32])
    assert model.patch_embed.conv[1].weight is not None, "the model itself was not folded"


def test_kept_by_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = volo.create_model("volo_nano", num_classes=5, img_size=32, **TINY)
    first = extract_features(model, some(), DATA)
    computed = []
    original = module.for_features
    monkeypatch.setattr(module, "for_features", lambda *given: computed.append(1) or original(*given))
    model.head.weight.data += 1  # heads do not matter
    assert torch.equal(extract_features(model, some(), DATA), first) and not computed
    extract_features(model, some(seed=1), DATA)  # other images
    extract_features(model, some(), DataConfig(img_size=48, crop_pct=1.0))
    extract_features(model, some(), DATA, pool="token")
    other = volo.create_model("volo_nano", num_classes=5, img_size=32, norm_eps=1e-2, **TINY)
    other.load_state_dict(model.state_dict())
    extract_features(other, some(), DATA)  # the same weights, another network
    model.cls_token.data += 1
    changed = extract_features(model, some(), DATA)
    assert len(computed) == 5 and not torch.equal(changed, first)


def test_a_cache_that_cannot_be_used_is_passed_over(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = volo.create_model("volo_nano", num_classes=5, img_size=32, **TINY)
    expected = extract_features(model, some(), DATA)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    for place in (0, 9, 60, len(whole) // 2, len(whole) - 5):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert torch.equal(extract_features(model, some(), DATA), expected), "computed again"
    kept.write_bytes(whole[:100])
    assert torch.equal(extract_features(model, some(), DATA), expected), "computed again"
    monkeypatch.setenv("VOLO_CACHE", str(kept))  # a file where a folder should be
    assert torch.equal(extract_features(model, some(), DATA), expected)
