"""`volo.fuse` on models that are not ours, and `fuse_for_inference` on those that are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.volo import VOLO
from torch import Tensor, nn

import volo
from volo.layers import OutlookAttention
from volo.models.fuse import PackedLinear


class OriginalOutlookAttention(nn.Module):
    """The published formula with the attributes of the published class."""

    def __init__(
        self, dim: int, num_heads: int, scale: float | None = None, kernel_size: int = 3, stride: int = 2
    ) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.stride = num_heads, kernel_size, stride
        self.padding = (kernel_size - 1) // 2
        self.scale = scale or (dim // num_heads) ** -0.5
        self.v = nn.Linear(dim, dim, bias=False)
        self.attn = nn.Linear(dim, kernel_size**4 * num_heads)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        K, s, p, heads = self.kernel_size, self.stride, self.padding, self.num_heads
        windows = F.unfold(self.v(x).permute(0, 3, 1, 2), K, padding=p, stride=s)
        windows = windows.reshape(B, heads, C // heads, K * K, -1).permute(0, 1, 4, 3, 2)
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), s, s, ceil_mode=True).permute(0, 2, 3, 1)
        attn = self.attn(pooled).reshape(B, -1, heads, K * K, K * K).transpose(1, 2) * self.scale
        mixed = (attn.softmax(-1) @ windows).permute(0, 1, 4, 3, 2).reshape(B, C * K * K, -1)
        return self.proj(F.fold(mixed, (H, W), K, padding=p, stride=s).permute(0, 2, 3, 1))


def test_timm_model_keeps_outputs_weights_and_gradients():
    torch.manual_seed(0)
    theirs = VOLO(
        layers=(2, 1, 1, 1), embed_dims=(64, 64, 64, 64), num_heads=(2, 2, 2, 2), img_size=64, num_classes=7
    ).eval()
    ours = copy.deepcopy(theirs)
    before = {name: p.data_ptr() for name, p in ours.named_parameters()}
    report = volo.fuse(ours)
    assert report.replaced == ("network.0.0.attn", "network.0.1.attn") and not report.left
    assert isinstance(ours.network[0][0].attn, OutlookAttention)
    assert {name: p.data_ptr() for name, p in ours.named_parameters()} == before
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    for model in (ours, theirs):
        model(images).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if expected[name].grad is not None:
            scale = expected[name].grad.abs().max().clamp(min=1.0)
            torch.testing.assert_close(parameter.grad / scale, expected[name].grad / scale, atol=1e-5, rtol=0)
    assert volo.fuse(ours).replaced == ()


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (3, 2), (5, 2)])
def test_original_module_with_its_own_scale_shared_in_two_places(kernel_size: int, stride: int):
    torch.manual_seed(0)
    module = OriginalOutlookAttention(32, 4, scale=0.7, kernel_size=kernel_size, stride=stride)
    model = nn.Sequential(module, nn.GELU(), module)
    x = torch.randn(2, 9, 6, 32)
    expected = model(x)
    report = volo.fuse(model)
    assert report.replaced == ("0", "2") and model[0] is model[2]
    assert isinstance(model[0], OutlookAttention) and isinstance(model[2], OutlookAttention)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


def test_what_does_not_fit_is_left_and_named():
    good, bad = OriginalOutlookAttention(32, 4), OriginalOutlookAttention(32, 4)
    bad.attn = nn.Linear(32, 5)
    model = nn.ModuleDict({"good": good, "bad": bad})
    report = volo.fuse(model)
    assert report.replaced == ("good",) and model["bad"] is bad
    assert "attn has 5" in report.left["bad"] and "bad" in str(report)
    with pytest.raises(ValueError, match="itself an outlook attention"):
        volo.fuse(bad)


class Halved(OriginalOutlookAttention):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class NoisyInTraining(OriginalOutlookAttention):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.randn_like(out) if self.training else out


class Gated(OriginalOutlookAttention):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.gate = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class Dilated(OriginalOutlookAttention):
    def forward(self, x: Tensor) -> Tensor:
        self.stride, unfold = 1, F.unfold
        B, H, W, C = x.shape
        windows = unfold(self.v(x).permute(0, 3, 1, 2), 3, padding=2, dilation=2)
        windows = windows.reshape(B, self.num_heads, -1, 9, H * W).permute(0, 1, 4, 3, 2)
        attn = self.attn(x).reshape(B, -1, self.num_heads, 9, 9).transpose(1, 2) * self.scale
        mixed = (attn.softmax(-1) @ windows).permute(0, 1, 4, 3, 2).reshape(B, C * 9, -1)
        return self.proj(F.fold(mixed, (H, W), 3, padding=2, dilation=2).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Halved, "something else"),
        (NoisyInTraining, "something else"),
        (Gated, "further parameters: gate"),
        (Dilated, "something else"),
    ],
)
def test_other_functions_are_left_and_named(kind: type[OriginalOutlookAttention], reason: str):
    torch.manual_seed(0)
    module = kind(32, 4)
    nn.init.zeros_(module.proj.weight)  # what the weights are now must not hide a difference
    model = nn.Sequential(module).eval()
    x = torch.randn(1, 6, 10, 32)
    expected = model(x)
    report = volo.fuse(model)
    assert report.replaced == () and model[0] is module and reason in report.left["0"]
    assert torch.equal(model(x), expected)


class ChannelsFirst(OriginalOutlookAttention):
    """As detectors' plug-ins have it: [B, C, H, W] in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [20, 32])
def test_channels_first_copies_keep_their_layout(side: int):
    torch.manual_seed(0)
    model = nn.Sequential(ChannelsFirst(32, 4))
    x = torch.randn(1, 32, side, side)
    expected = model(x)
    assert volo.fuse(model).replaced == ("0",) and isinstance(model[0], OutlookAttention)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


class OutlookAttentionOfOthers(nn.Module):
    """The same mathematics under the names that another collection gave it, dropout inside its projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.1))
        self.to_attn = nn.Linear(dim, heads * 81)
        self.v_pj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        windows = F.unfold(self.v_pj(x).permute(0, 3, 1, 2), 3, padding=1)
        windows = windows.reshape(B, self.heads, C // self.heads, 9, H * W).permute(0, 1, 4, 3, 2)
        attn = self.to_attn(x).reshape(B, H * W, self.heads, 9, 9).transpose(1, 2) * (C // self.heads) ** -0.5
        mixed = (attn.softmax(-1) @ windows).permute(0, 1, 4, 3, 2).reshape(B, C * 9, -1)
        return self.to_out(F.fold(mixed, (H, W), 3, padding=1).permute(0, 2, 3, 1))


def test_copies_under_other_names_are_recognised_and_keep_their_names():
    torch.manual_seed(0)
    model = nn.Sequential(OutlookAttentionOfOthers(32, 4)).eval()
    names, x = set(model.state_dict()), torch.randn(2, 6, 9, 32)
    expected = model(x)
    assert volo.fuse(model).replaced == ("0",) and isinstance(model[0], OutlookAttention)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    assert set(model.state_dict()) == names and model[0].to_out[1].p == 0.1
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, atol=1e-5, rtol=0)


def test_hooks_stay_and_can_be_removed():
    model, seen = nn.Sequential(OriginalOutlookAttention(32, 4)), []
    handle = model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    volo.fuse(model)
    assert seen == []  # trying the module out is no forward pass of the user's
    model(torch.randn(1, 4, 4, 32))
    assert seen == ["before", "after"]
    handle.remove()
    model(torch.randn(1, 4, 4, 32))
    assert seen == ["before", "after", "before"]


def test_what_is_left_can_be_scripted():
    torch.manual_seed(0)
    model = VOLO(layers=(1, 1, 1, 1), embed_dims=(64,) * 4, num_heads=(2,) * 4, img_size=64, num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        volo.fuse(model)
        torch.testing.assert_close(torch.jit.script(model)(images), expected, atol=1e-5, rtol=0)


def test_training_mode_and_dropout_rates_stay():
    module = OriginalOutlookAttention(32, 4)
    module.attn_drop.p, module.proj_drop.p = 0.25, 0.5
    model = nn.Sequential(module).train()
    volo.fuse(model)
    assert model[0].training and model[0].attn_drop == 0.25 and model[0].proj_drop.p == 0.5


def test_fuse_for_inference_keeps_the_logits():
    torch.manual_seed(0)
    model = volo.create_model("volo_nano")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    images = torch.randn(3, 3, 32, 32)
    with pytest.raises(ValueError, match="eval"):
        model.train().fuse_for_inference()
    model.eval()
    with torch.no_grad():
        expected = model(images)
        assert model.fuse_for_inference() is model
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(m.bias is not None for m in model.patch_embed.conv if isinstance(m, nn.Conv2d))
    assert all(isinstance(m, PackedLinear) for m in model.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():  # copies of a fused model, and exported ones, answer the same
        torch.testing.assert_close(copy.deepcopy(model)(images), expected, atol=1e-5, rtol=1e-5)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=1e-5)


def test_portable_timm_model_exports_in_tensors_of_rank_four():
    torch.manual_seed(0)
    theirs = VOLO(
        layers=(1, 1, 1, 1), embed_dims=(32, 64, 64, 64), num_heads=(2, 4, 4, 4), img_size=64, num_classes=7
    ).eval()
    ours = copy.deepcopy(theirs)
    report = volo.fuse(ours, portable=True)
    assert {"network.0.0.attn", "network.2.0.attn", "post_network.0.attn"} <= set(report.replaced) and not report.left
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(ours, (images,), dynamic_shapes=({0: batch},))
        more = torch.randn(5, 3, 64, 64)
        torch.testing.assert_close(program.module()(more), theirs(more), atol=1e-5, rtol=0)
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert max(value.dim() for value in values if isinstance(value, Tensor)) <= 4
    targets = {str(node.target) for node in program.graph.nodes}
    assert not {"aten.col2im.default", "aten.im2col.default"} & targets


def test_portable_leaves_attention_of_other_models_alone():
    class Attention(nn.Module):  # timm's vision transformers have these attributes too, for [B, N, C]
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.scale = 2, 4**-0.5
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    model = nn.Sequential(Attention())
    assert volo.fuse(model, portable=True).replaced == ()
