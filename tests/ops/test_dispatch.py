"""What is private to PyTorch may be gone in another version: nothing breaks then, and the numbers stay."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from volo.layers import Mlp
from volo.models.fuse import pack_linear_layers
from volo.ops import cpu_kernel, dispatch, self_attention
from volo.ops import linear as linear_ops
from volo.ops.outlook_attention import choose_backend, outlook_attention
from volo.ops.reference import outlook_attention_reference

GEOMETRY = {"kernel_size": 3, "stride": 2, "padding": 1}

WITHOUT = """
import sys
import torch
from torch.autograd import forward_ad

missing = set(sys.argv[1:])
found = torch._ops._OpNamespace.__getattr__

def find(namespace, name):
    if name in missing:
        raise AttributeError(name)
    return found(namespace, name)

torch._ops._OpNamespace.__getattr__ = find
for module in (torch.cpu, torch._C._functorch, forward_ad):
    for name in missing & set(vars(module)):
        delattr(module, name)

import volo
torch.manual_seed(0)
model = volo.create_model("volo_nano")
images = torch.randn(2, 3, 32, 32)
logits = model(images)
logits.square().sum().backward()
assert all(p.grad is not None for p in model.parameters())
fused = model.eval()(images).detach()
with torch.inference_mode():
    torch.testing.assert_close(model.fuse_for_inference()(images), fused, atol=1e-4, rtol=1e-4)
"""


def test_a_model_runs_without_any_of_it() -> None:
    names = ["_is_amx_tile_supported", "_linear_pointwise", "_reorder_linear_weight", "get_interpreter_stack"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *names, "_current_level"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 5, 2, 8, generator=generator), torch.randn(2, 3, 3, 2, 9, 9, generator=generator)


def test_without_a_look_at_what_is_active_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MISSING", ("_current_level",))
    value, logits = draw()
    assert not dispatch.is_plain(value)
    assert "has no _current_level" in str(dispatch.no_kernel())
    assert choose_backend(value, logits, 3, 2, 1).name == "reference"
    value = value.requires_grad_()
    expected = outlook_attention_reference(value, logits, 3, 2, 1, 8**-0.5)
    out = outlook_attention(value, logits, **GEOMETRY)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), value)[0] for y in (out, expected)))
    qkv = torch.randn(1, 5, 48)
    torch.testing.assert_close(self_attention.self_attention(qkv, 2), self_attention.self_attention_reference(qkv, 2))
    x, weight = torch.randn(100, 24), torch.randn(40, 24)
    torch.testing.assert_close(linear_ops.linear(x, weight, None), F.linear(x, weight))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value.detach(), torch.ones_like(value))
        tangent = forward_ad.unpack_dual(outlook_attention(dual, logits, **GEOMETRY)).tangent
    ones = outlook_attention_reference(torch.ones_like(value), logits, 3, 2, 1, 8**-0.5)
    torch.testing.assert_close(tangent, ones)


@pytest.mark.parametrize("name", ["get_interpreter_stack", "TransformType"])
def test_without_a_look_at_the_transforms_all_of_them_get_the_reference(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    value, logits = draw()
    many = torch.stack([value, 2 * value])
    expected = torch.stack([outlook_attention(x, logits, **GEOMETRY, backend="reference") for x in many])
    seen: list[str] = []

    def operator(x: torch.Tensor) -> torch.Tensor:
        seen.append(choose_backend(x, logits, 3, 2, 1).name)
        return outlook_attention(x, logits, **GEOMETRY)

    monkeypatch.delattr(torch._C._functorch, name)
    torch.testing.assert_close(torch.vmap(operator)(many), expected)
    gradient = torch.func.grad(lambda x: operator(x).sum())(value)
    assert seen == ["reference"] * 2
    plain = outlook_attention_reference(value.requires_grad_(), logits, 3, 2, 1, 8**-0.5)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), value)[0])
    if cpu_kernel.LOAD_ERROR is None:
        assert choose_backend(value, logits, 3, 2, 1).name == "cpu"


def test_without_a_look_at_the_processor_bfloat16_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert self_attention._has_amx() is False
    monkeypatch.setattr(self_attention, "_HAS_AMX", False)
    qkv = torch.randn(2, 9, 48).bfloat16()
    torch.testing.assert_close(
        self_attention.self_attention(qkv, 2), self_attention.self_attention_reference(qkv, 2), atol=0.02, rtol=0.02
    )


def changed(name: str) -> object:
    """An operator of oneDNN that wants other arguments: here those of another one."""
    names = [n for n in linear_ops._ARGUMENTS if n != name]
    return getattr(torch.ops.mkldnn, names[0])


@pytest.mark.skipif(not linear_ops._dtypes, reason="PyTorch has no oneDNN for this processor")
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "changed"])
@pytest.mark.parametrize("name", linear_ops._ARGUMENTS)
def test_without_onednns_operators_linear_layers_are_pytorchs(
    monkeypatch: pytest.MonkeyPatch, name: str, is_gone: bool
) -> None:
    operators = {n: getattr(torch.ops.mkldnn, n) for n in linear_ops._ARGUMENTS}
    operators |= {name: changed(name)}
    if is_gone:
        del operators[name]
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operators))
    monkeypatch.setattr(linear_ops, "_mkl_is_slow", True)
    monkeypatch.setattr(linear_ops, "_dtypes", linear_ops._supported_dtypes())
    assert linear_ops._dtypes == ()
    x, weight = torch.randn(100, 24), torch.randn(40, 24)
    torch.testing.assert_close(linear_ops.linear(x, weight, None), F.linear(x, weight))
    model = nn.Sequential(Mlp(24, 72), nn.Linear(24, 10)).eval()
    with torch.inference_mode():
        expected = model(x)
        pack_linear_layers(model)
        torch.testing.assert_close(model(x), expected)
