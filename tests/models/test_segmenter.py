"""Segmentation models: the decoder against an independent implementation, any size, weights from classification."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import volo
from volo.models.factory import list_segmenters
from volo.models.loading import read_state_dict
from volo.models.segmenter import Segmenter, segmenter_from_dict
from volo.models.upernet import AdaptivePool, FCNHead, PyramidNeck, UPerHead

TINY = {
    "depths": (1, 1, 1, 1),
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "stem_dim": 8,
    "img_size": 64,
    "channels": 16,
    "aux_channels": 8,
}


def tiny(name: str = "upernet_volo_d1", num_classes: int = 5, **overrides) -> Segmenter:
    torch.manual_seed(0)
    return volo.create_segmenter(name, num_classes, **{**TINY, **overrides})


def randomise(module: nn.Module) -> None:
    """Weights and statistics with which no two parts could be mixed up unseen."""
    torch.manual_seed(1)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.3)


def transformers_names(name: str) -> str:
    """Ours, which are mmsegmentation's, to those of transformers."""
    return name.replace(".bn.", ".batch_norm.").replace("conv_seg.", "classifier.")


@pytest.mark.parametrize("sizes", [(32, 16, 8, 4), (37, 19, 9, 5)])
def test_upernet_equals_the_one_in_transformers(sizes) -> None:
    pytest.importorskip("transformers")
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    channels = [12, 24, 24, 20]
    config = UperNetConfig(hidden_size=16, pool_scales=[1, 2, 3, 6], num_labels=7, auxiliary_channels=10)
    ours = [UPerHead(channels, 7, channels=16).eval(), FCNHead(channels[2], 7, channels=10).eval()]
    theirs = [UperNetHead(config, channels).eval(), UperNetFCNHead(config, channels).eval()]
    maps = [torch.randn(2, c, size, size + 3, requires_grad=True) for c, size in zip(channels, sizes)]
    for head, oracle in zip(ours, theirs):
        randomise(head)
        oracle.load_state_dict({transformers_names(name): t for name, t in head.state_dict().items()})
        mine = head(maps[2] if isinstance(head, FCNHead) else maps)
        other = oracle(maps)
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
        used = maps if isinstance(head, UPerHead) else maps[2:3]
        weight = torch.randn_like(mine)
        gradients = (torch.autograd.grad((out * weight).sum(), used) for out in (mine, other))
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@given(h=st.integers(1, 40), w=st.integers(1, 40), scale=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_adaptive_pool_is_that_of_torch(h: int, w: int, scale: int) -> None:
    x = torch.randn(2, 3, h, w)
    torch.testing.assert_close(AdaptivePool(scale)(x), nn.AdaptiveAvgPool2d(scale)(x), rtol=1e-5, atol=1e-6)


DOCS = Path(__file__).resolve().parents[2] / "docs" / "segmentation.md"


@pytest.mark.parametrize("name", list_segmenters())
def test_every_head_with_every_variant_is_of_the_size_the_documents_say(name: str) -> None:
    """Parameters (the auxiliary head, used in training only, not counted) and GMACs at 512 x 512, for 150 classes."""
    with torch.device("meta"), torch.no_grad():
        model = volo.create_segmenter(name, 150, img_size=512).eval()
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, 512, 512)).shape == (1, 150, 512, 512)
        assert [512 // m.shape[-1] for m in model.forward_maps(torch.empty(1, 3, 512, 512))] == [4, 8, 16, 32]
    parameters = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("auxiliary_head"))
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert row.split("|")[2:4] == [f" {parameters:,} ", f" {counter.get_total_flops() / 2e9:.1f} "]


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
def test_neck_makes_the_same_pyramid_of_any_patch_size(patch_size: int) -> None:
    model = tiny(patch_size=patch_size, img_size=64).eval()
    assert [m.shape[-1] for m in model.forward_maps(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]
    model = tiny("fpn_volo_nano", depths=(1, 1), patch_size=patch_size, img_size=64).eval()
    assert [m.shape[-1] for m in model.forward_maps(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]


def test_neck_levels_follow_the_paper() -> None:
    neck = PyramidNeck([8, 16, 16, 16], [8, 16, 16, 16])
    assert [type(s).__name__ for s in neck.scalers] == ["Sequential", "Sequential", "Identity", "MaxPool2d"]
    assert tiny().levels == (0, 1, 2, 3)
    assert tiny("fpn_volo_nano", depths=(1, 1)).levels == (0, 1, 1, 1)


@given(h=st.integers(1, 70), w=st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_any_size(h: int, w: int) -> None:
    model = tiny().eval()
    with torch.no_grad():
        images = torch.randn(1, 3, h, w)
        logits = model(images)
        assert logits.shape == (1, 5, h, w)
        # What is padded at the right and bottom is seen as black by the network, and cut off.
        padded = nn.functional.pad(images, (0, -w % 16, 0, -h % 16))
        torch.testing.assert_close(logits, model(padded)[..., :h, :w])


def test_odd_sizes_are_refused_where_padding_is_off() -> None:
    with pytest.raises(ValueError, match=r"multiples of 16 pixels; given: 60 x 64.*pad_input"):
        tiny(pad_input=False)(torch.randn(2, 3, 60, 64))


@pytest.mark.parametrize("name", ["upernet_volo_d1", "fpn_volo_d1"])
def test_every_parameter_is_trained(name: str) -> None:
    """As DDP demands; the auxiliary head belongs to training only."""
    model = tiny(name, drop_path_rate=0.0)
    logits, aux = model.forward_with_aux(torch.randn(2, 3, 48, 64))
    assert aux is not None and aux.shape == logits.shape == (2, 5, 48, 64)
    (logits.square().mean() + aux.square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert tiny(name, aux_channels=0).forward_with_aux(torch.randn(2, 3, 48, 64))[1] is None


def test_forward_is_the_same_with_and_without_the_auxiliary_head() -> None:
    model, images = tiny().eval(), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(model(images), model.forward_with_aux(images)[0])


def test_one_picture_and_batch_norm() -> None:
    with pytest.raises(
        ValueError, match=r"at least two images a micro batch.*'sync' with several GPUs, or the fpn head"
    ):
        tiny()(torch.randn(1, 3, 64, 64))
    tiny("fpn_volo_d1")(torch.randn(1, 3, 64, 64))
    tiny().eval()(torch.randn(1, 3, 64, 64))


def test_backbone_is_the_classifier_without_its_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = volo.create_model("volo_d1", **{k: v for k, v in TINY.items() if "channels" not in k}).eval()
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pt")
    model = tiny(pretrained=tmp_path / "c.pt").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, maps = classifier.forward_intermediates(images)
        mine = model.backbone.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, mine, strict=True))
    assert type(model.backbone) is volo.VOLO
    with pytest.raises(ValueError, match="class attention was removed"):
        model.backbone(images)


def test_weights_of_another_size_and_of_another_model(tmp_path: Path) -> None:
    options = {k: v for k, v in TINY.items() if "channels" not in k}
    classifier = volo.create_model("volo_d1", **options)
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pt")
    model = tiny(pretrained=tmp_path / "c.pt", img_size=(96, 128))
    assert model.backbone.pos_embed.shape[1:3] == (6, 8)
    assert model.config.backbone.img_size == (96, 128)
    with pytest.raises(ValueError, match="do not fit"):
        tiny(pretrained=tmp_path / "c.pt", stem_dim=16)


def test_segmentation_weights_with_other_classes(tmp_path: Path) -> None:
    model = tiny()
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    torch.save({"model": model.state_dict(), "model_config": config}, tmp_path / "s.pt")
    same = volo.create_segmenter("upernet_volo_d1", 5, tmp_path / "s.pt", **TINY)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))
    other = volo.create_segmenter("upernet_volo_d1", 9, tmp_path / "s.pt", **{**TINY, "img_size": 96})
    assert other.decode_head.conv_seg.weight.shape[0] == 9
    assert torch.equal(other.decode_head.bottleneck.conv.weight, model.decode_head.bottleneck.conv.weight)
    with pytest.raises(ValueError, match=r"other shape: decode_head\.\S+"):
        volo.create_segmenter("upernet_volo_d1", 5, tmp_path / "s.pt", **{**TINY, "channels": 24})
    assert read_state_dict(tmp_path / "s.pt").keys() == model.state_dict().keys()


def test_configuration_rebuilds_the_model() -> None:
    model = tiny(pool_scales=(1, 2))
    again = segmenter_from_dict(json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again.config == model.config
    again.load_state_dict(model.state_dict())


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'upernet_volo_d1'"):
        volo.create_segmenter("upernet_volo_d11", 3)
    with pytest.raises(ValueError, match="did you mean 'aux_channels'"):
        volo.create_segmenter("upernet_volo_d1", 3, aux_chanels=3)
    with pytest.raises(ValueError, match="at least 1"):
        volo.create_segmenter("upernet_volo_d1", 0)


def test_layer_decay_knows_the_layers_of_the_backbone() -> None:
    from timm.optim import create_optimizer_v2

    model = tiny()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert {v for k, v in scales.items() if not k.startswith("backbone.")} == {1.0}
    assert scales["backbone.patch_embed.proj.weight"] < scales["backbone.network.0.0.mlp.fc1.weight"]
    assert scales["backbone.network.0.0.mlp.fc1.weight"] < scales["backbone.network.4.0.mlp.fc1.weight"] < 1.0


def test_float_bf16_autocast_and_channels_last() -> None:
    model, images = tiny().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
        assert (mixed.float() - plain).abs().max() < 0.1 * plain.abs().max()
        assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
def test_upernet_volo_d1_trains_on_a_crop_and_tests_on_a_street() -> None:
    torch.manual_seed(0)
    model = volo.create_segmenter("upernet_volo_d1", 19, img_size=512)
    logits, aux = model.forward_with_aux(torch.randn(2, 3, 512, 512))
    (logits.square().mean() + 0.4 * aux.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
