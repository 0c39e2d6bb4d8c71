"""VOLO against the golden cases and timm, and everything its users touch."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import volo
from volo.models.factory import model_of_shapes
from volo.models.loading import load_weights
from volo.models.volo import DROP_PATH_RATES, VARIANTS, VOLO, VOLOConfig, resample_pos_embed

PARAMETERS = {
    "volo_d1": 26_632_040,
    "volo_d2": 58_678_336,
    "volo_d3": 86_325_072,
    "volo_d4": 192_961_520,
    "volo_d5": 295_455_584,
}
BIG = [pytest.param(name, marks=pytest.mark.slow) for name in list(PARAMETERS)[1:]]


def small_model(**overrides) -> VOLO:
    config = {
        "depths": (2, 1, 2),
        "embed_dims": (16, 32),
        "num_heads": (2, 2),
        "stem_dim": 8,
        "img_size": 64,
        "num_classes": 7,
    }
    return randomise(VOLO(VOLOConfig(**{**config, **overrides})))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Values at which every parameter and buffer matters: norms are not the identity, nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.empty(tensor.shape).normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() == 1:
                tensor.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
            elif name in ("pos_embed", "cls_token"):
                tensor.copy_(noise * 0.3)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model


def pictures(*shape: int, seed: int = 1) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


# The original and timm


def test_golden_model(shared: Path) -> None:
    case = json.loads((shared / "golden/cases.json").read_text())["model"]
    golden = load_file(shared / "golden/model.safetensors")
    model = VOLO(
        VOLOConfig(
            depths=case["layers"],
            embed_dims=case["embed_dims"],
            num_heads=case["num_heads"],
            mlp_ratios=case["mlp_ratios"],
            stem_dim=case["stem_hidden_dim"],
            patch_size=case["patch_size"],
            outlook_kernel=case["outlook_kernel"],
            outlook_stride=case["outlook_stride"],
            outlook_padding=case["outlook_padding"],
            img_size=case["img_size"],
            num_classes=case["num_classes"],
        )
    ).eval()
    model.load_state_dict({k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")})
    with torch.no_grad():
        features, maps = model.forward_intermediates(golden["x"])
        class_logits, token_logits = model.class_and_token_logits(features)
        logits = model(golden["x"])
    found = {
        "tokens": maps[-1].permute(0, 2, 3, 1),
        "class_token": features[:, 0],
        "class_logits": class_logits,
        "token_logits": token_logits,
        "logits_eval": logits,
    }
    for name, value in found.items():
        torch.testing.assert_close(
            value, golden[name].view(value.shape), atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def on_meta(build, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_and_names(name: str) -> None:
    model = on_meta(volo.create_model, name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    timm = pytest.importorskip("timm")
    theirs = on_meta(timm.create_model, f"{name}_224").state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(("name", "millions"), [("volo_nano", 1.7), ("volo_tiny", 6), ("volo_small", 14)])
def test_our_own_sizes(name: str, millions: float) -> None:
    count = sum(p.numel() for p in on_meta(volo.create_model, name).parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.2)


@pytest.mark.parametrize("name", ["volo_d1", *BIG])
def test_same_logits_as_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomise(on_meta(timm.create_model, f"{name}_224").to_empty(device="cpu")).eval()
    images = pictures(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(images)
        state_dict = theirs.state_dict()
        del theirs
        model = on_meta(volo.create_model, name).to_empty(device="cpu").eval()
        assert load_weights(model, state_dict).is_exact
        logits = model(images)
    assert expected.std() > 0.3  # logits at which 1e-5 means something
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


# Image sizes


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), training=st.booleans())
def test_any_size_and_one_return_type(rows: int, columns: int, training: bool) -> None:
    model = SMALL.train(training)
    images = pictures(2, 3, rows * 16, columns * 16)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert model.forward_features(images).shape == (2, 1 + rows * columns, 32)
    assert model.forward_embed(images).shape == (2, rows * 2, columns * 2, 16)


SMALL = small_model()


@pytest.mark.parametrize("size", [(256, 320), (384, 384)])
def test_d1_at_other_sizes(size: tuple[int, int]) -> None:
    """The resampled embedding gives what a model made for that size with that embedding gives."""
    model = randomise(volo.create_model("volo_d1", depths=(1, 1, 1), num_class_blocks=1)).eval()
    made_for = volo.create_model("volo_d1", depths=(1, 1, 1), num_class_blocks=1, img_size=size).eval()
    grid = (size[0] // 16, size[1] // 16)
    resampled = resample_pos_embed(model.pos_embed.detach(), grid)
    made_for.load_state_dict({**model.state_dict(), "pos_embed": resampled})
    images = pictures(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), made_for(images))


def test_resampling_is_smooth_and_antialiased() -> None:
    grid = torch.linspace(0, 1, 14).view(1, 14, 1, 1).expand(1, 14, 14, 2).contiguous()
    for size in ((28, 20), (7, 5)):
        out = resample_pos_embed(grid, size)
        assert out.shape == (1, *size, 2)
        assert (out.diff(dim=1) > 0).all()  # a slope stays a slope
        assert out.diff(dim=2).abs().max() < 1e-5
    checkers = (torch.arange(14).view(14, 1) + torch.arange(14)).remainder(2).view(1, 14, 14, 1) * 2.0 - 1
    assert resample_pos_embed(checkers, (5, 5)).abs().max() < 0.2  # without antialiasing they would come out at random
    assert resample_pos_embed(grid.bfloat16(), (16, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("size", "legal"), [((65, 64), "80 x 64"), ((64, 100), "64 x 112"), ((1, 1), "16 x 16"), ((224, 225), "224 x 240")]
)
def test_illegal_size_names_the_next_legal_one(size: tuple[int, int], legal: str) -> None:
    with pytest.raises(
        ValueError, match=f"given: {size[0]} x {size[1]}. The next legal size is {legal}.*pad_input=True"
    ):
        SMALL(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=f"The next legal size is {legal}"):
        small_model(img_size=size)


@pytest.mark.parametrize("name", ["volo_d1", "volo_d2", "volo_d3", "volo_d4", "volo_d5"])
def test_published_models_take_other_sizes(name: str) -> None:
    with torch.device("meta"):
        model = volo.create_model(name).eval()
        for size in ((224, 224), (256, 320), (384, 384)) if name == "volo_d1" else ((256, 320),):
            assert model(torch.empty(2, 3, *size)).shape == (2, 1000)


def test_padding_allows_any_size_of_the_model_too() -> None:
    model = volo.create_model("volo_nano", img_size=30, pad_input=True, depths=(1, 1)).eval()
    assert model.pos_embed.shape[1:3] == (2, 2)
    assert model(torch.randn(1, 3, 30, 30)).shape == (1, 1000)
    with pytest.raises(ValueError, match="32 x 32"):
        volo.create_model("volo_nano", img_size=30)


def test_pad_input() -> None:
    plain, padding = small_model().eval(), small_model(pad_input=True).eval()
    images = pictures(2, 3, 50, 70)
    padded = torch.zeros(2, 3, 64, 80)
    padded[:, :, :50, :70] = images
    assert torch.equal(padding(images), plain(padded))
    assert torch.equal(padding(padded), plain(padded))


@pytest.mark.parametrize("size", [(6, 5), (2, 2), (3, 9), (4, 4)])
def test_the_position_embedding_is_resampled_as_interpolate_does(size: tuple[int, int]) -> None:
    pos_embed = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    grid = F.interpolate(pos_embed.permute(0, 3, 1, 2), size, mode="bicubic", antialias=min(size) < 4)
    expected = grid.permute(0, 2, 3, 1)
    torch.testing.assert_close(resample_pos_embed(pos_embed, size), expected, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resample_pos_embed(pos_embed, size), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("write", ["data.copy_", "data = ", "vector_to_parameters", "mul_"])
def test_new_weights_are_used_at_once_at_any_size(write: str) -> None:
    """Averaging codes write through .data, which raises no version; the model stays in eval mode all the while."""
    model, images = small_model().eval(), pictures(1, 3, 96, 80)
    with torch.no_grad():
        model(images)
        new = [torch.randn_like(p) * 0.1 for p in model.parameters()]
        if write == "vector_to_parameters":
            torch.nn.utils.vector_to_parameters(torch.cat([n.flatten() for n in new]), model.parameters())
        for parameter, values in zip(model.parameters(), new):
            if write == "data.copy_":
                parameter.data.copy_(values)
            elif write == "data = ":
                parameter.data = values
            elif write == "mul_":
                parameter.mul_(0).add_(values)
        fresh = small_model().eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(images), fresh(images))
    model(images).sum().backward()
    assert model.pos_embed.grad.abs().max() > 0


# What users of timm know


def test_forward_intermediates_and_feature_info() -> None:
    model = small_model(depths=(2, 1, 2, 1), img_size=(64, 96)).eval()
    images = pictures(2, 3, 64, 96)
    features, maps = model.forward_intermediates(images)
    assert torch.equal(features, model.forward_features(images))
    assert torch.equal(model.forward_head(features), model(images))
    assert [info["reduction"] for info in model.feature_info] == [8, 16, 16, 16]
    for info, level in zip(model.feature_info, maps):
        assert level.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])
        hooked: list[Tensor] = []
        handle = model.get_submodule(info["module"]).register_forward_hook(lambda *a, out=hooked: out.append(a[-1]))
        model(images)
        handle.remove()
        assert torch.equal(hooked[0].permute(0, 3, 1, 2), level)
    for indices, expected in ((2, [2, 3]), (4, [0, 1, 2, 3]), ([0, -1], [0, 3]), ((1,), [1])):
        _, some = model.forward_intermediates(images, indices)
        assert len(some) == len(expected)
        assert all(torch.equal(level, maps[i]) for level, i in zip(some, expected))
    for indices in (0, 5, [4], [-5]):
        with pytest.raises(ValueError, match="indices are levels 0 to 3"):
            model.forward_intermediates(images, indices)


def test_logits_are_class_logits_and_half_the_best_token() -> None:
    model = small_model().eval()
    images = pictures(2, 3, 64, 64)
    features = model.forward_features(images)
    class_logits, token_logits = model.class_and_token_logits(features)
    assert (class_logits.shape, token_logits.shape) == ((2, 7), (2, 16, 7))
    expected = model.head(features[:, 0]) + 0.5 * model.aux_head(features[:, 1:]).max(dim=1).values
    torch.testing.assert_close(model(images), expected)


def test_reset_classifier() -> None:
    model = small_model().double().eval()
    images = pictures(2, 3, 64, 64).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_classifier(3)
    assert model.get_classifier() is model.head
    assert model(images).shape == (2, 3)
    assert model.num_classes == model.config.num_classes == 3
    assert model.aux_head.weight.shape == (3, 32)
    assert model.head.weight.dtype == torch.float64
    assert model.head.weight.detach().std() == pytest.approx(0.02, rel=0.3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "head" not in k)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_features(images)[:, 0])
    assert not any("head" in k for k in model.state_dict())
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    with pytest.raises(ValueError, match="0 or more; given: -1"):
        model.reset_classifier(-1)


def test_no_classes_gives_the_class_token() -> None:
    model, headless = small_model().eval(), small_model(num_classes=0).eval()
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if "head" not in k})
    images = pictures(2, 3, 64, 64)
    assert torch.equal(headless(images), model.forward_features(images)[:, 0])


def test_grad_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for enable in (False, True):
        model = small_model(drop_rate=0.1, drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        calls = []
        model.network[0][0].register_forward_pre_hook(lambda *_, out=calls: out.append(1))
        torch.manual_seed(0)
        model(pictures(2, 3, 64, 64)).square().sum().backward()
        assert len(calls) == (2 if enable else 1)  # recomputed in the backward pass
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda m, n=name: f"{n}: {m}")


def test_drop_path_schedule() -> None:
    model = on_meta(volo.create_model, "volo_d1", drop_path_rate=DROP_PATH_RATES["volo_d1"])
    assert all(block.drop_path.drop_prob == 0 for block in model.network[0])
    rates = [block.drop_path.drop_prob for group in model.network[2:] for block in group]
    assert rates[0] == pytest.approx(0.0235, abs=5e-5)  # the outlookers count in the schedule
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates)
    with_outlookers = on_meta(volo.create_model, "volo_d1", drop_path_rate=0.1, outlooker_drop_path=True)
    assert with_outlookers.network[0][3].drop_path.drop_prob == pytest.approx(0.1 * 3 / 17)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"num_class_blocks": 0}, {"depths": (2, 2), "num_classes": 0}])
def test_group_matcher(coarse: bool, overrides: dict) -> None:
    pytest.importorskip("timm")
    from timm.models import group_parameters

    model = small_model(**overrides)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    layer = {name: i for i, group in groups.items() for name in group}
    assert layer["patch_embed.conv.0.weight"] == 0
    assert layer["network.0.0.attn.v.weight"] == 1
    in_order = ["network.0.0.mlp.fc1.weight", "network.0.1.mlp.fc1.weight", "pos_embed", "network.2.0.attn.qkv.weight"]
    in_order += ["cls_token", "norm.weight"]
    layers = [layer[name] for name in in_order]
    assert layers == sorted(layers)
    assert layer["pos_embed"] == layer["network.1.proj.weight"]
    assert layer["cls_token"] > layer["network.2.0.attn.qkv.weight"]
    if model.post_network:
        assert layer["norm.weight"] == layer["post_network.1.mlp.fc1.weight"]
        assert layer["cls_token"] == layer["post_network.0.mlp.fc1.weight"]
        assert (layer["post_network.0.mlp.fc1.weight"] == layer["post_network.1.mlp.fc1.weight"]) == coarse
    if model.num_classes:
        assert set(groups[max(groups)]) == {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}
    assert (layer["network.0.0.norm1.weight"] == layer["network.0.1.norm1.weight"]) == coarse


def test_no_weight_decay_names_parameters() -> None:
    model = small_model()
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


# Building


@pytest.mark.parametrize("patch_size", [4, 8, 16])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_patch_sizes_and_channels(patch_size: int, in_chans: int) -> None:
    model = small_model(patch_size=patch_size, in_chans=in_chans)
    features, maps = model.forward_intermediates(pictures(1, in_chans, 64, 96))
    assert maps[0].shape[2:] == (64 // patch_size, 96 // patch_size)
    assert maps[1].shape[2:] == (32 // patch_size, 48 // patch_size)
    assert model.forward_head(features).shape == (1, 7)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_classes": 3},
        {"img_size": 96},
        {"img_size": (64, 96)},
        {"depths": (1, 1)},
        {"depths": (0, 2)},
        {"embed_dims": (24, 48), "num_heads": (3, 4)},
        {"embed_dims": (16, 32, 32), "num_heads": (2, 4, 4), "mlp_ratios": (2, 4, 4)},
        {"mlp_ratios": (2.0, 1.5)},
        {"stem_dim": 12},
        {"stem_stride": 1},
        {"outlook_kernel": 5},
        {"outlook_kernel": 5, "outlook_padding": 2, "outlook_stride": 1},
        {"outlook_kernel": 2},
        {"outlook_stride": 3},
        {"num_class_blocks": 0},
        {"qkv_bias": True},
        {"drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1, "drop_path_rate": 0.1},
        {"norm_eps": 1e-6},
    ],
    ids=str,
)
def test_overrides(overrides: dict) -> None:
    """Each override builds, runs and trains, and the configuration rebuilds the model after a round trip by JSON."""
    model = small_model(**overrides).train()
    logits = model(pictures(2, 3, 96, 96))
    assert logits.shape == (2, model.num_classes)
    logits.sum().backward()
    again = VOLO(VOLOConfig(**json.loads(json.dumps(dataclasses.asdict(model.config)))))
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    images = pictures(1, 3, 64, 96)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_overrides_of_a_named_model() -> None:
    """A variant's own derived values do not stand in the way of an override."""
    model = on_meta(volo.create_model, "volo_d1", outlook_kernel=5)
    assert model.network[0][0].attn.padding == 2
    assert model.network[0][0].attn.attn.out_features == 6 * 5**4
    assert on_meta(volo.create_model, "volo_d1", patch_size=16, img_size=(224, 256)).pos_embed.shape == (1, 7, 8, 384)
    counted = on_meta(
        volo.create_model,
        "volo_d1",
        num_classes=np.int64(4),
        embed_dims=tuple(np.array([96, 192])),
        img_size=(np.int64(64), 96),
    )
    sizes = (counted.config.num_classes, *counted.config.embed_dims, *counted.config.img_size)
    assert sizes == (4, 96, 192, 64, 96) and all(type(size) is int for size in sizes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_clases": 3}, "did you mean 'num_classes'"),
        ({"depths": (4,)}, "depths is"),
        ({"embed_dims": (192, 384, 256, 512)}, "embed_dims is"),
        ({"embed_dims": (190, 384)}, "multiple of num_heads"),
        ({"img_size": (224, 224, 3)}, "img_size is a positive int or"),
        ({"img_size": 0}, "img_size is a positive int or"),
        ({"img_size": 225}, "next legal size is 240 x 240"),
        ({"patch_size": 7}, "patch_size is"),
        ({"num_classes": -1}, "num_classes is a whole number, at least 0; given: -1"),
        ({"in_chans": 0}, "in_chans is a whole number, at least 1; given: 0"),
        # As typed on a command line, where any TOML may follow --model.options.NAME.
        ({"num_heads": 2}, r"num_heads is \(stage 1, stage 2\).*given: 2"),
        ({"num_heads": "6"}, "num_heads is .*given: '6'"),
        ({"num_heads": (0, 12)}, r"at least 1; given: \(0, 12\)"),
        ({"embed_dims": 192}, "embed_dims is .*given: 192"),
        ({"embed_dims": (192.0, 384)}, "embed_dims is a pair of whole numbers"),
        ({"depths": 3}, "depths is .*given: 3"),
        ({"depths": (4, "4", 8)}, "depths is .*whole numbers"),
        ({"mlp_ratios": (3, "3")}, "mlp_ratios is a pair of numbers above 0"),
        ({"img_size": 22.4}, "img_size is a positive int or"),
        ({"patch_size": "8"}, "patch_size is a whole number.*given: '8'"),
        ({"stem_stride": 0}, "stem_stride is a whole number, at least 1; given: 0"),
        ({"stem_dim": True}, "stem_dim is a whole number"),
        ({"num_class_blocks": 1.0}, "num_class_blocks is a whole number"),
        ({"drop_rate": 1}, "drop_rate is a probability"),
        ({"drop_path_rate": "much"}, "drop_path_rate is a probability.*given: 'much'"),
        ({"qkv_bias": 1}, "qkv_bias is true or false"),
        ({"norm_eps": 0}, "norm_eps is a number above 0"),
        ({"outlook_padding": 3}, r"outlook_padding is None or .*outlook_kernel - 1 = 2; given: 3"),
        ({"outlook_kernel": 4, "outlook_stride": 1}, r"\(27, 27\) windows on the 28 x 28 tokens.*an odd kernel"),
        ({"outlook_padding": 0}, r"\(13, 13\) windows"),
    ],
)
def test_bad_overrides(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(volo.create_model, "volo_d1", **overrides)


def test_names() -> None:
    assert volo.list_models() == sorted(VARIANTS)
    with pytest.raises(ValueError, match="unknown model 'volo_d6'; did you mean 'volo_d"):
        volo.create_model("volo_d6")


def test_construction_is_seeded_and_initialised() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(VOLO(VOLOConfig(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2), stem_dim=8, img_size=32)))
    a, b = (model.state_dict() for model in models)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["pos_embed"].std() == pytest.approx(0.02, rel=0.2)
    assert a["network.0.0.mlp.fc1.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert a["head.bias"].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = small_model().eval()
    images = pictures(2, 3, 96, 64)
    with torch.no_grad():
        expected = model(images)
        logits = model.to(dtype)(images.to(dtype))
    assert logits.dtype == dtype
    tolerance = {torch.float64: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


def test_autocast_and_deepcopy() -> None:
    model = small_model().eval()
    images = pictures(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(images).float() - expected).abs().max() < 0.3
        assert torch.equal(copy.deepcopy(model)(images), expected)


def test_the_class_head_may_see_the_other_tokens_too() -> None:
    model = volo.create_model("volo_nano", num_classes=4, img_size=32, pool="concat").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(images)
        tokens = features[:, 1:]
        seen = torch.cat([features[:, 0], tokens.mean(1), tokens.max(1).values], dim=1)
        torch.testing.assert_close(model.pool(features), seen)
        expected = model.head(seen) + 0.5 * model.aux_head(tokens).max(1).values
        torch.testing.assert_close(model(images), expected)
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), seen)
        model.reset_classifier(3, pool="token")
    assert model.head.weight.shape == (3, model.num_features) and model.config.pool == "token"
    rebuilt = VOLO(VOLOConfig(**dataclasses.asdict(model.config)))
    rebuilt.load_state_dict(model.state_dict())
    concat = volo.create_model("volo_nano", num_classes=4, pool="concat")
    name, found = model_of_shapes(concat.state_dict(), "a file without a configuration")
    assert (name, found.config.pool) == ("volo_nano", "concat")
    with pytest.raises(ValueError, match='pool is "token" or "concat"'):
        volo.create_model("volo_nano", pool="mean")
