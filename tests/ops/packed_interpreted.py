"""Numerics of the GPU kernels for packed logits, and of the layer on them, through Triton's interpreter; `test_triton_kernels.py`
runs them in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from volo.bench import kernels
from volo.layers import OutlookAttention
from volo.models.fuse import pack_linear_layers
from volo.ops import triton_packed
from volo.ops.library import outlook_attention_packed, packed_why_not
from volo.ops.outlook_attention import window_grid
from volo.ops.packed import pack, packed_width, unpack
from volo.ops.reference import outlook_attention_reference

GEOMETRIES = [  # B, H, W, heads, head_dim, kernel_size, stride, padding
    (2, 4, 4, 2, 32, 3, 2, 1),  # as in D1-D5
    (1, 7, 5, 3, 32, 3, 2, 1),  # odd sizes
    (1, 5, 6, 1, 8, 3, 1, 1),
    (1, 6, 6, 1, 12, 3, 2, 0),  # last row and column under no window
    (1, 3, 4, 1, 16, 3, 1, 2),  # windows that hold one token
    (1, 4, 7, 1, 16, 3, 3, 2),
    (1, 3, 3, 1, 16, 3, 2, 2),
]
MORE_GEOMETRIES = [
    (1, 9, 10, 2, 64, 3, 2, 1),
    (3, 8, 8, 2, 24, 3, 1, 2),
    (1, 7, 8, 1, 4, 3, 4, 1),  # gaps between windows
    (1, 8, 9, 5, 6, 3, 2, 1),
    (1, 9, 10, 1, 16, 5, 2, 2),
    (1, 7, 6, 1, 16, 5, 1, 2),
    (1, 7, 7, 1, 16, 5, 3, 0),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def packed_of(logits: Tensor) -> Tensor:
    """[B, h, w, heads, K*K, K*K] -> packed, with NaN in the gap."""
    heads, taps = logits.shape[3:5]
    packed = pack(logits.flatten(3).movedim(-1, 0), heads, round(taps**0.5)).movedim(0, -1).contiguous()
    packed[..., heads * taps * taps :] = torch.nan
    return packed


def draw(geometry: tuple[int, ...], dtype: torch.dtype, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """value, logits, gradient of the output."""
    B, H, W, heads, head_dim, K, s, p = geometry
    generator = torch.Generator().manual_seed(sum(geometry))
    value = torch.randn(B, H, W, heads, head_dim, generator=generator)
    logits = torch.randn(B, *window_grid(H, W, K, s, p), heads, K * K, K * K, generator=generator) * spread
    return value.to(dtype), logits.to(dtype), torch.randn(value.shape, generator=generator).to(dtype)


def reference(value: Tensor, logits: Tensor, grad: Tensor, *geometry: float) -> list[Tensor]:
    value, logits = value.detach().requires_grad_(), logits.detach().requires_grad_()
    out = outlook_attention_reference(value, logits, *geometry)
    return [out.detach(), *torch.autograd.grad(out, (value, logits), grad)]


def fused(
    value: Tensor, packed: Tensor, grad: Tensor, K: int, s: int, p: int, scale: float, **of_tiling: int
) -> list[Tensor]:
    """Output and both gradients, in the tilings of a GPU but for what is given of them."""
    heads, head_dim = value.shape[3:]
    tilings = [
        replace(triton_packed.choose_packed_tiling(value.dtype, head_dim, K, s, p, is_backward=is_backward), **of_tiling)
        for is_backward in (False, True)
    ] if of_tiling else [None, None]  # fmt: skip
    out = triton_packed.forward(value, packed, K, s, p, scale, tiling=tilings[0])
    grad_value, grad_packed = triton_packed.backward(grad, value, packed, K, s, p, scale, tiling=tilings[1])
    assert not grad_packed[..., heads * K**4 :].any()
    return [out, grad_value, unpack(grad_packed, heads, K)]


def check(
    value: Tensor, logits: Tensor, grad: Tensor, K: int, s: int, p: int, scale: float, packed: Tensor | None = None,
    whole: bool = True,
) -> None:  # fmt: skip
    """error(fused vs float64) <= 2 error(eager in the same dtype vs float64) + one rounding of the largest number."""
    packed = packed_of(logits) if packed is None else packed
    assert triton_packed.why_not(value, packed.shape[1:3], K, s, p) is None
    one_program = {"cells": 32, "rows_per_program": 64} if whole else {}  # the interpreter takes long for each
    ours = fused(value, packed, grad, K, s, p, scale, **one_program)
    exact = reference(value.double(), logits.double(), grad.double(), K, s, p, scale)
    eager = reference(value, logits, grad, K, s, p, scale)
    for name, got, truth, peer in zip(("out", "grad_value", "grad_logits"), ours, exact, eager):
        assert got.shape == truth.shape
        assert got.dtype == value.dtype
        error, allowed = (got - truth).abs().max().item(), (peer - truth).abs().max().item()
        band = torch.finfo(value.dtype).eps * truth.abs().max().item()
        assert error <= 2 * allowed + band, f"{name}: {error:.2e}, eager {allowed:.2e}, band {band:.2e}"


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry: tuple[int, ...]) -> None:
    *_, head_dim, K, s, p = geometry
    check(*draw(geometry, torch.float32), K, s, p, head_dim**-0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES + MORE_GEOMETRIES, ids=str)
def test_all_geometries_and_dtypes(geometry: tuple[int, ...], dtype: torch.dtype) -> None:
    *_, head_dim, K, s, p = geometry
    check(*draw(geometry, dtype), K, s, p, head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """bfloat16 in the tiling of a GPU, several programs."""
    geometry = (1, 4, 5, 2, 32, 3, 2, 1)
    check(*draw(geometry, dtype), 3, 2, 1, 32**-0.5, whole=dtype == torch.float16)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_tilings_and_runs_agree_to_the_bit(dtype: torch.dtype) -> None:
    value, logits, grad = draw((1, 5, 4, 1, 16, 3, 2, 1), dtype)
    inputs = value, packed_of(logits), grad, 3, 2, 1, 0.3
    whole, again = (fused(*inputs, cells=32, rows_per_program=64) for _ in range(2))
    cut = fused(*inputs, cells=2, rows_per_program=2)
    for x, y, z in zip(whole, again, cut):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(scale: float) -> None:
    check(*draw((1, 4, 4, 1, 16, 3, 2, 1), torch.float32), 3, 2, 1, scale)


def test_large_logits_do_not_overflow() -> None:
    value, logits, grad = draw((1, 4, 4, 1, 16, 3, 2, 1), torch.float32)
    check(value, torch.full_like(logits, 1e30), grad, 3, 2, 1, 1.0)
    check(value, logits * 30, grad, 3, 2, 1, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(dtype: torch.dtype) -> None:
    value, logits, grad = draw((2, 4, 5, 2, 16, 3, 2, 1), dtype)
    packed = packed_of(logits)
    for begin, width in ((32, 96), (31, 95)):  # the second begins inside a word: 16-bit numbers are copied
        wide = torch.randn(2, 4, 5, width).to(dtype)
        wide[..., begin : begin + 32] = value.flatten(3)
        tall = torch.randn(2, 2, 3, width + packed.shape[-1]).to(dtype)
        tall[..., begin : begin + packed.shape[-1]] = packed
        seen = wide[..., begin : begin + 32].unflatten(-1, (2, 16))
        check(seen, logits, grad, 3, 2, 1, 0.25, packed=tall[..., begin : begin + packed.shape[-1]])
    turned = value.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    check(turned, logits, torch.ones((), dtype=dtype).expand(value.shape), 3, 2, 1, 0.25)


def test_no_pictures() -> None:
    value, packed = torch.zeros(0, 4, 4, 2, 16), torch.zeros(0, 2, 2, packed_width(2, 3))
    assert triton_packed.forward(value, packed, 3, 2, 1, 0.25).shape == value.shape
    grads = triton_packed.backward(value, value, packed, 3, 2, 1, 0.25)
    assert [g.shape for g in grads] == [value.shape, packed.shape]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "K", "says"),
    [
        (torch.float64, 8, 3, "float64"),
        (torch.float32, 8, 7, "up to 5 x 5"),
        (torch.float32, 8, 2, "not 2 x 2"),
        (torch.bfloat16, 7, 3, "head_dim is 7"),
    ],
    ids=str,
)
def test_says_why_not(dtype: torch.dtype, head_dim: int, K: int, says: str) -> None:
    value = torch.zeros(1, 8, 8, 1, head_dim, dtype=dtype)
    reason = packed_why_not(value, window_grid(8, 8, K, 2, 1), K, 2, 1)
    assert reason is not None
    assert says in reason


def test_refuses_pictures_beyond_32_bit_offsets() -> None:
    value = torch.empty(1).expand(1, 60000, 60000, 1, 4)
    reason = triton_packed.why_not(value, (20000, 20000), 3, 3, 1)
    assert reason is not None
    assert "2**31" in reason


def test_dtypes_are_the_same() -> None:
    value, packed = torch.zeros(1, 4, 4, 1, 8), torch.zeros(1, 2, 2, packed_width(1, 3), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="share a dtype"):
        outlook_attention_packed(value, packed, 3, 2, 1, 1.0)


# ---- the layer ----


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the kernels for packed logits have run."""
    seen: list[str] = []

    def watched(name: str):
        kernel = getattr(triton_packed, name)
        return lambda *args, **options: (seen.append(name), kernel(*args, **options))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(triton_packed, name, watched(name))
    return seen


def layer_of(seed: int = 0, **options: int) -> OutlookAttention:
    torch.manual_seed(seed)
    geometry = {"dim": 32, "num_heads": 2, "kernel_size": 3, "stride": 2, "padding": 1}
    layer = OutlookAttention(**(geometry | options)).half()
    layer.packs = True
    return layer


def test_layers_pack_when_they_are_told_to(calls: list[str]) -> None:
    layer, x = layer_of(dim=8, num_heads=1), torch.randn(1, 2, 4, 8).half()
    packed = layer(x)
    assert calls == ["forward"]
    del layer.packs
    torch.testing.assert_close(layer(x), packed, atol=2e-3, rtol=2e-3)
    assert calls == ["forward"]


def run(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    out = layer(x)
    named = {"x": x} | dict(layer.named_parameters())
    return {"out": out} | dict(zip(named, torch.autograd.grad(out, list(named.values()), grad.to(out.dtype))))


@pytest.mark.parametrize(
    "options", [{}, {"stride": 1, "dim": 8, "num_heads": 1, "qkv_bias": 1}], ids=["D1", "stride 1, a bias"]
)
def test_layer_and_its_parameters(options: dict[str, int], calls: list[str]) -> None:
    layer = layer_of(**options)
    names = list(layer.state_dict())
    x, grad = (torch.randn(1, 3, 4, layer.v.in_features).half() for _ in range(2))
    ours = run(layer, x, grad)
    assert calls == ["forward", "backward"]
    assert list(layer.state_dict()) == names
    exact = run(layer.double(), x.double(), grad.double())  # float64 has no kernel
    assert calls == ["forward", "backward"]
    for name, truth in exact.items():
        error = (ours[name] - truth).abs().max() / truth.abs().max()
        assert error < 8 * torch.finfo(torch.float16).eps, (name, error)


def test_float32_is_packed_without_gradients_only(calls: list[str]) -> None:
    layer, x = layer_of(dim=8, num_heads=1).float(), torch.randn(1, 2, 4, 8)
    expected = layer(x)  # one kernel for both gradients would be slower than two
    assert calls == []
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        assert calls == ["forward"]


def test_what_a_gpu_is_checked_by(calls: list[str]) -> None:
    results = kernels.check_layer(torch.bfloat16, "cpu", shape=(1, 3, 4), heads=1, head_dim=8)
    assert calls == ["forward", "backward"] * 2  # the other path has other kernels
    assert [name for name in results if name.endswith("attn.weight")] == ["rows attn.weight", "packed attn.weight"]
    for name, result in results.items():
        assert 0 < result["error"] <= result["allowed"], (name, result)


def test_layer_under_autocast(calls: list[str]) -> None:
    layer, x, grad = layer_of().float(), torch.randn(1, 3, 4, 32), torch.randn(1, 3, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(layer, x, grad)
    assert calls == ["forward", "backward"]
    assert ours["out"].dtype == torch.bfloat16
    exact = run(layer, x, grad)
    for name, truth in exact.items():
        error = (ours[name].float() - truth).abs().max() / truth.abs().max()
        assert error < 0.03, (name, error)


def test_layer_compiled_is_one_graph_with_the_kernels(calls: list[str]) -> None:
    layer, x, grad = layer_of(), torch.randn(1, 3, 4, 32).half(), torch.randn(1, 3, 4, 32).half()
    expected = run(layer, x, grad)
    calls.clear()
    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, grad)
    assert calls == ["forward", "backward"]
    for name, got in compiled.items():
        torch.testing.assert_close(got, expected[name.removeprefix("_orig_mod.")])


def test_inference_keeps_the_packed_parameters(calls: list[str]) -> None:
    layer, x = layer_of(dim=8, num_heads=1).eval(), torch.randn(1, 2, 4, 8).half()
    pack_linear_layers(layer)
    with torch.no_grad():
        first = layer(x)
        kept = layer._kept
        assert torch.equal(layer(x), first)
        assert layer._kept is kept is not None
        layer.attn.weight.mul_(2.0)  # seen, and packed anew
        changed = layer(x)
    assert layer._kept is not kept
    assert not torch.allclose(changed, first)
    torch.testing.assert_close(changed, layer(x))  # with gradients wanted, nothing is kept
    assert calls == ["forward"] * 4


def test_layer_does_without_where_its_linear_is_more_than_one(calls: list[str]) -> None:
    layer, x = layer_of(dim=8, num_heads=1), torch.randn(1, 2, 4, 8).half()
    expected = layer(x)
    assert calls == ["forward"]
    seen: list[Tensor] = []
    handle = layer.attn.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(layer(x), expected)
    assert len(seen) == 1
    handle.remove()

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    layer.attn.__class__ = Adapted
    assert not torch.allclose(layer(x), expected)
    assert calls == ["forward"]


def test_exported_layers_have_portable_operations(calls: list[str]) -> None:
    exported = torch.export.export(layer_of().eval(), (torch.randn(1, 4, 4, 32).half(),))
    assert not [node for node in exported.graph.nodes if "volo" in str(node.target)]
    assert calls == []


def test_vmap_of_the_layer(calls: list[str]) -> None:
    layer, x = layer_of(dim=8, num_heads=1).eval(), torch.randn(2, 1, 2, 4, 8).half()
    with torch.no_grad():
        assert torch.allclose(torch.vmap(layer)(x), layer(x.flatten(0, 1)).unflatten(0, (2, 1)), atol=1e-3)
    assert calls == ["forward", "forward"]
