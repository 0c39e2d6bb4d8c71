"""Weight files in every layout, and exact reports of loading them."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from volo.models.loading import load_weights, read_state_dict
from volo.models.volo import VOLO, VOLOConfig, resample_pos_embed

# Reading


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


STATE = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
LAYOUTS = {
    "plain": STATE,
    "ordered": OrderedDict(STATE),
    "state_dict": {"epoch": 3, "arch": "volo_d1", "state_dict": STATE},
    "the original's script": {"state_dict": OTHER, "state_dict_ema": STATE, "args": argparse.Namespace(lr=1e-3)},
    "ours": {"format": 1, "model": OTHER, "ema": STATE, "step": 5, "classes": ["a"], "best": {"top1": 1.0}},
    "ours without ema": {"format": 1, "model": STATE, "ema": None},
    "DDP": {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
    "compiled": {f"_orig_mod.{name}": tensor for name, tensor in STATE.items()},
    "both": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
    "both, other way": {f"_orig_mod.module.{name}": tensor for name, tensor in STATE.items()},
    "Lightning": {"state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()}, "global_step": 3},
    "Lightning of a compiled model": {"state_dict": {f"model._orig_mod.{name}": STATE[name] for name in STATE}},
    "AveragedModel": {"n_averaged": torch.tensor(9)} | {f"module.{name}": tensor for name, tensor in STATE.items()},
    "an average by another name": {"model": OTHER, "model_ema": {f"module.{name}": STATE[name] for name in STATE}},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save(LAYOUTS[layout], path, _use_new_zipfile_serialization=is_zip)
    assert equal(read_state_dict(path), STATE)


def test_models_among_others_are_found_by_their_names(tmp_path: Path) -> None:
    """A Lightning module holds a model, its average under a name of the author's choice, metrics and losses."""
    model, average = small_model().state_dict(), small_model().state_dict()
    beside = {"criterion.weight": torch.ones(7), "n_averaged": torch.tensor(3)}
    plain = {f"net.encoder.{name}": tensor for name, tensor in model.items()}
    averaged = {f"my_ema.module.{name}": tensor for name, tensor in average.items()}
    torch.save({"state_dict": plain | beside}, tmp_path / "plain.ckpt")
    torch.save({"state_dict": plain | averaged | beside}, tmp_path / "both.ckpt")
    assert equal(read_state_dict(tmp_path / "plain.ckpt"), model)
    assert equal(read_state_dict(tmp_path / "both.ckpt"), average)
    assert load_weights(small_model(), tmp_path / "plain.ckpt").is_exact


def test_weights_of_another_model_are_refused_in_one_line() -> None:
    given = {f"layer{i}.conv.weight": torch.ones(1) for i in range(50)}
    with pytest.raises(
        ValueError, match=r"none of their 50 names \(layer0\.conv\.weight, .*is one of the model's"
    ) as caught:
        load_weights(small_model(), given)
    assert len(str(caught.value).splitlines()) == 1


def test_safetensors_by_content_too(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.bin"):
        save_file(STATE, tmp_path / name)
        assert equal(read_state_dict(tmp_path / name), STATE)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused(is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "extra": Bomb()}, "w.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"w\.pth is refused.*posix\.mkdir"):
        read_state_dict("w.pth")
    Path("plain.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    with pytest.raises(ValueError, match="no weight file"):
        read_state_dict("plain.pth")
    assert not Path("exploded").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (0, 1, 5, 9, 40, 200, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[: min(length, len(whole) - 1)])
        with pytest.raises(ValueError, match="damaged, cut off, or no weight file"):
            read_state_dict(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for content in (b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid", bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no weight file"):
            read_state_dict(path)
    for content, found in (
        ({"state_dict": {"lr": 1.0}}, "'lr'"),
        ([1, 2], "list"),
        ({}, r"\[\]"),
        (torch.ones(2), "Tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"holds no state dict.*{found}"):
            read_state_dict(path)
    with pytest.raises(FileNotFoundError, match="there is no weight file at"):
        read_state_dict(tmp_path / "absent.pth")


# Loading


def test_exact_load_from_a_file_and_a_dict(tmp_path: Path) -> None:
    source, model = small_model(), small_model()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    report = load_weights(model, tmp_path / "w.pth")
    assert report.is_exact
    assert str(report) == "every name and shape agrees"
    assert equal(model.state_dict(), source.state_dict())
    assert load_weights(small_model(), source.state_dict()).is_exact


def test_a_strict_failure_names_everything_and_changes_nothing() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = small_model(num_classes=5, img_size=96).state_dict()
    del given["norm.bias"]
    given["extra.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="left unchanged") as caught:
        load_weights(model, given)
    message = str(caught.value)
    for line in (
        "missing in the file: norm.bias",
        "unexpected in the file: extra.weight",
        "other shape: head.weight is 5 x 32 in the file, 7 x 32 in the model",
        "other shape: aux_head.bias is 5 in the file, 7 in the model",
        "other shape: pos_embed is 1 x 6 x 6 x 32 in the file, 1 x 4 x 4 x 32 in the model",
        "adapt_pos_embed=True, adapt_head=True",
    ):
        assert line in message
    assert equal(model.state_dict(), before)


def test_not_strict_loads_what_fits() -> None:
    model, source = small_model(), small_model(num_classes=5)
    given = source.state_dict()
    given.pop("norm.bias")
    given["extra"] = torch.ones(1)
    head = model.head.weight.clone()
    report = load_weights(model, given, strict=False)
    assert report.missing == ("norm.bias",)
    assert report.unexpected == ("extra",)
    assert ("head.weight", (5, 32), (7, 32)) in report.misshaped
    assert len(report.misshaped) == 4
    assert not report.is_exact
    assert torch.equal(model.cls_token, source.cls_token)
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("size", [96, (64, 96), 32])
def test_adapt_pos_embed(size) -> None:
    source, model = small_model(img_size=(64, 80)), small_model(img_size=size)
    report = load_weights(model, source.state_dict(), adapt_pos_embed=True)
    assert len(report.adapted) == 1
    assert "resampled from 4 x 5" in report.adapted[0]
    rows, columns = model.pos_embed.shape[1:3]
    assert torch.equal(model.pos_embed, resample_pos_embed(source.pos_embed, (rows, columns)))
    assert not report.is_exact
    with pytest.raises(ValueError, match="pos_embed is 1 x 4 x 5 x 32"):  # other channels cannot be resampled
        load_weights(small_model(embed_dims=(16, 64)), source.state_dict(), adapt_pos_embed=True)


def test_adapt_head() -> None:
    source, model = small_model(num_classes=5), small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, source.state_dict(), adapt_head=True)
    assert len(report.adapted) == 2
    assert "head left as initialised (5 classes in the file, 7 in the model)" in report.adapted
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if "head" in name else source.state_dict())[name]), name
    same = load_weights(small_model(), model.state_dict(), adapt_head=True)
    assert same.is_exact  # heads that fit are loaded all the same

    headless = small_model(num_classes=0)
    assert "left out" in load_weights(headless, source.state_dict(), adapt_head=True).adapted[0]
    assert equal(headless.state_dict(), {n: t for n, t in source.state_dict().items() if "head" not in n})
    assert len(load_weights(model, headless.state_dict(), adapt_head=True).adapted) == 2
    with pytest.raises(ValueError, match=r"missing in the file: head\.weight"):
        load_weights(model, headless.state_dict())


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_adapt_stem(in_chans: int) -> None:
    source, model = small_model(), small_model(in_chans=in_chans)
    with pytest.raises(ValueError, match="adapt_stem=True"):
        load_weights(model, source.state_dict())
    report = load_weights(model, source.state_dict(), adapt_stem=True)
    assert report.adapted == (f"patch_embed.conv.0.weight turned from 3 input channels to {in_chans}",)
    adapt_input_conv = pytest.importorskip("timm.models").adapt_input_conv
    torch.testing.assert_close(
        model.patch_embed.conv[0].weight.data, adapt_input_conv(in_chans, source.patch_embed.conv[0].weight.data)
    )
