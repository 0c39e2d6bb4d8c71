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
    assert "324" in report.left["bad"] and "bad" in str(report)
    with pytest.raises(ValueError, match="itself an outlook attention"):
        volo.fuse(bad)


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
