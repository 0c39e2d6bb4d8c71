"""Numerics of the GPU kernels through Triton's interpreter; `test_triton_kernels.py` runs them in a process of their own.

The interpreter takes about a tenth of a second for a step of a program, so most cases put all cells into one program;
those that test the tiling do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from volo.ops import triton_kernels
from volo.ops.outlook_attention import outlook_attention, window_grid
from volo.ops.reference import outlook_attention_reference

GEOMETRIES = [  # B, H, W, heads, head_dim, kernel_size, stride, padding
    (2, 4, 4, 2, 32, 3, 2, 1),  # as in D1-D5
    (1, 7, 5, 3, 32, 3, 2, 1),  # odd sizes
    (1, 5, 6, 1, 8, 3, 1, 1),
    (1, 6, 6, 1, 12, 3, 2, 0),  # last row and column under no window
    (1, 5, 4, 2, 16, 1, 1, 0),
    (1, 5, 4, 2, 20, 2, 2, 0),
    (1, 7, 8, 1, 4, 2, 3, 1),  # gaps between windows
    (1, 4, 7, 1, 16, 3, 3, 2),
    (1, 3, 3, 1, 16, 3, 2, 2),
]
MORE_GEOMETRIES = [
    (1, 9, 10, 2, 64, 3, 2, 1),
    (3, 8, 8, 2, 24, 3, 1, 2),
    (1, 6, 7, 1, 16, 2, 1, 1),
    (1, 9, 8, 1, 16, 4, 3, 3),
    (1, 9, 10, 1, 16, 4, 2, 1),
    (1, 9, 10, 1, 16, 5, 2, 2),
    (1, 7, 6, 1, 16, 5, 1, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def draw(geometry: tuple[int, ...], dtype: torch.dtype, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, heads, head_dim, K, s, p = geometry
    generator = torch.Generator().manual_seed(sum(geometry))
    value = torch.randn(B, H, W, heads, head_dim, generator=generator)
    logits = torch.randn(B, *window_grid(H, W, K, s, p), heads, K * K, K * K, generator=generator) * spread
    return value.to(dtype), logits.to(dtype), torch.randn(value.shape, generator=generator).to(dtype)


def reference(value: Tensor, logits: Tensor, grad: Tensor, *geometry: float) -> list[Tensor]:
    value, logits = value.detach().requires_grad_(), logits.detach().requires_grad_()
    out = outlook_attention_reference(value, logits, *geometry)
    return [out.detach(), *torch.autograd.grad(out, (value, logits), grad)]


def one_program(value: Tensor, K: int, s: int, p: int) -> dict[str, triton_kernels.Tiling]:
    dtype, head_dim = value.dtype, value.shape[-1]
    whole = {"cells": 32, "rows_per_program": 64}
    return {
        "tiling": replace(triton_kernels.choose_tiling(dtype, head_dim, K, s, p), **whole),
        "logits_tiling": replace(triton_kernels.choose_tiling(dtype, head_dim, K, s, 0, keeps_sums=False), **whole),
    }


def check(
    value: Tensor, logits: Tensor, grad: Tensor, K: int, s: int, p: int, scale: float, whole: bool = True
) -> None:
    """error(fused vs float64) <= 2 error(eager in the same dtype vs float64) + one rounding of the largest number."""
    tilings = one_program(value, K, s, p) if whole else {"tiling": None, "logits_tiling": None}
    assert triton_kernels.why_not(value, logits, K, s, p) is None
    fused = [
        triton_kernels.forward(value, logits, K, s, p, scale, tiling=tilings["tiling"]),
        *triton_kernels.backward(grad, value, logits, K, s, p, scale, **tilings),
    ]
    exact = reference(value.double(), logits.double(), grad.double(), K, s, p, scale)
    eager = reference(value, logits, grad, K, s, p, scale)
    for name, ours, truth, peer in zip(("out", "grad_value", "grad_logits"), fused, exact, eager):
        assert ours.shape == truth.shape
        assert ours.dtype == value.dtype
        error, allowed = (ours - truth).abs().max().item(), (peer - truth).abs().max().item()
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


def test_tilings_agree_to_the_bit() -> None:
    value, logits, grad = draw((1, 5, 4, 2, 16, 3, 2, 1), torch.float32)
    whole = one_program(value, 3, 2, 1)
    expected_out = triton_kernels.forward(value, logits, 3, 2, 1, 0.3, tiling=whole["tiling"])
    expected_grads = triton_kernels.backward(grad, value, logits, 3, 2, 1, 0.3, **whole)
    cut = {k: replace(t, cells=2, rows_per_program=2) for k, t in whole.items()}
    assert torch.equal(triton_kernels.forward(value, logits, 3, 2, 1, 0.3, tiling=cut["tiling"]), expected_out)
    grads = triton_kernels.backward(grad, value, logits, 3, 2, 1, 0.3, **cut)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(scale: float) -> None:
    check(*draw((1, 4, 4, 1, 16, 3, 2, 1), torch.float32), 3, 2, 1, scale)


def test_large_logits_do_not_overflow() -> None:
    value, logits, grad = draw((1, 4, 4, 1, 16, 3, 2, 1), torch.float32)
    check(value, torch.full_like(logits, 1e30), grad, 3, 2, 1, 1.0)
    check(value, logits * 30, grad, 3, 2, 1, 1.0)
    logits *= 1e4
    out = triton_kernels.forward(value, logits, 3, 2, 1, 1.0, tiling=one_program(value, 3, 2, 1)["tiling"])
    torch.testing.assert_close(out, outlook_attention_reference(value, logits, 3, 2, 1, 1.0))


def test_views_of_linear_outputs() -> None:
    geometry = (2, 4, 5, 2, 16, 3, 2, 1)
    value, logits, grad = draw(geometry, torch.float32)
    wide = torch.randn(2, 4, 5, 96)
    wide[..., 32:64] = value.flatten(3)
    seen_value = wide[..., 32:64].unflatten(-1, (2, 16))
    tall = torch.randn(2, 2, 3, 200)
    tall[..., 11:173] = logits.flatten(3)
    seen_logits = tall[..., 11:173].unflatten(-1, (2, 9, 9))
    assert torch.equal(seen_value, value)
    assert not seen_value.is_contiguous()
    assert not seen_logits.is_contiguous()
    check(seen_value, seen_logits, grad, 3, 2, 1, 0.25)
    # Last dimensions that are not contiguous are copied; a gradient may be one number seen many times.
    turned = value.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    turned_logits = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    check(turned, turned_logits, torch.ones(()).expand(value.shape), 3, 2, 1, 0.25)


@pytest.mark.slow
def test_pictures_beyond_two_to_the_31_elements_apart() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # the memory in between is never touched
    value, logits, grad = draw((2, 2, 2, 1, 16, 3, 2, 1), torch.float16)
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided(value.shape, (2**31, 32, 16, 16, 1)).copy_(value)
    check(far, logits, grad, 3, 2, 1, 0.25)


def test_no_pictures() -> None:
    value, logits, grad = draw((0, 4, 4, 2, 16, 3, 2, 1), torch.float32)
    assert triton_kernels.forward(value, logits, 3, 2, 1, 0.25).shape == value.shape
    grads = triton_kernels.backward(grad, value, logits, 3, 2, 1, 0.25)
    assert [g.shape for g in grads] == [value.shape, logits.shape]


def test_public_function_differentiates_through_the_engine() -> None:
    value, logits, grad = draw((1, 4, 4, 1, 8, 3, 2, 1), torch.float32)
    exact = reference(value.double(), logits.double(), grad.double(), 3, 2, 1, 8**-0.5)
    value.requires_grad_()
    logits.requires_grad_()
    out = outlook_attention(value, logits, kernel_size=3, stride=2, padding=1, backend="triton")
    for ours, truth in zip((out, *torch.autograd.grad(out, (value, logits), grad)), exact):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "K", "says"), [(torch.float64, 3, "float64"), (torch.float32, 7, "up to 5 x 5")], ids=["dtype", "kernel"]
)
def test_says_why_not(dtype: torch.dtype, K: int, says: str) -> None:
    value, logits, _ = draw((1, 8, 8, 1, 8, K, 2, 1), dtype)
    with pytest.raises(ValueError, match=says):
        outlook_attention(value, logits, kernel_size=K, stride=2, padding=1, backend="triton")


def test_refuses_pictures_beyond_32_bit_offsets() -> None:
    side = math.isqrt(2**31 // 64) + 1
    value = torch.empty(1, dtype=torch.float32).expand(1, side, side, 1, 64)
    logits = torch.empty(1, dtype=torch.float32).expand(1, 1, 1, 1, 9, 9)
    reason = triton_kernels.why_not(value, logits, 3, side, 1)
    assert reason is not None
    assert "2**31" in reason
