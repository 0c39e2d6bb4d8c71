"""The public operator and its reference: mathematics, geometry, errors, choice of the backend."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import volo.ops.outlook_attention as module
from volo.layers import OutlookAttention
from volo.ops.outlook_attention import Backend, choose_backend, list_backends, outlook_attention, window_grid


def make(B, H, W, heads, head_dim, K, stride, padding, dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    h, w = window_grid(H, W, K, stride, padding)
    value = torch.randn(B, H, W, heads, head_dim, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(B, h, w, heads, K * K, K * K, generator=generator, dtype=torch.float64)
    return value.to(dtype), logits.to(dtype), {"kernel_size": K, "stride": stride, "padding": padding}


def by_the_formula(value: Tensor, logits: Tensor, K: int, stride: int, padding: int, scale: float) -> Tensor:
    """Equations 3 to 5, index by index."""
    _, H, W, _, _ = value.shape
    out = torch.zeros_like(value)
    offsets = [(a, b) for a in range(K) for b in range(K)]
    for i in range(logits.shape[1]):
        for j in range(logits.shape[2]):
            tokens = [(stride * i + a - padding, stride * j + b - padding) for a, b in offsets]
            inside = [0 <= y < H and 0 <= x < W for y, x in tokens]
            attn = torch.softmax(scale * logits[:, i, j], -1)  # [B, heads, query, key]
            for q, (y, x) in enumerate(tokens):
                for k, (v, u) in enumerate(tokens):
                    if inside[q] and inside[k]:
                        out[:, y, x] += attn[:, :, q, k, None] * value[:, v, u]
    return out


geometries = st.tuples(
    st.integers(0, 2), st.integers(1, 6), st.integers(1, 6), st.integers(1, 2), st.integers(1, 5),
    st.integers(1, 4), st.integers(1, 5), st.integers(0, 3),
).filter(lambda g: g[7] < g[5] and min(window_grid(g[1], g[2], g[5], g[6], g[7])) >= 1)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(geometries, st.sampled_from(["auto", "reference"]))
def test_every_geometry_follows_the_formula(geometry, backend):
    value, logits, kwargs = make(*geometry)
    out = outlook_attention(value, logits, **kwargs, scale=0.7, backend=backend)
    torch.testing.assert_close(out, by_the_formula(value, logits, *geometry[5:], 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_golden_cases_of_the_original(golden: Path, backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(module, "_backends", [module.REFERENCE])
    assert compare_with_the_original(golden) == 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_more_golden_cases_of_the_original(shared: Path, backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(module, "_backends", [module.REFERENCE])
    assert compare_with_the_original(shared / "golden") == 5


def compare_with_the_original(folder: Path) -> int:
    """Output and every gradient of the recorded cases; how many there are."""
    tensors = load_file(folder / "outlook_attention.safetensors")
    cases = json.loads((folder / "cases.json").read_text())["outlook_attention"]
    for case in cases:
        compare_case(case, tensors)
    return len(cases)


def compare_case(case, tensors):
    number = case["case"]
    mine = {key.removeprefix(f"case{number}."): t for key, t in tensors.items() if key.startswith(f"case{number}.")}
    layer = OutlookAttention(
        case["dim"], case["num_heads"], case["kernel_size"], case["stride"], case["padding"], case["qkv_bias"]
    ).double()
    layer.load_state_dict({k.removeprefix("param."): t for k, t in mine.items() if k.startswith("param.")})
    x = mine["x"].requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, mine["y"], rtol=0, atol=1e-12)
    y.backward(mine["grad_y"])
    torch.testing.assert_close(x.grad, mine["grad_x"], rtol=0, atol=1e-11)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, mine[f"grad.{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("K, stride, padding", [(3, 2, 1), (2, 1, 1), (1, 1, 0), (2, 3, 1)])
def test_differentiable_twice(backend, K, stride, padding):
    value, logits, kwargs = make(1, 3, 3, 1, 2, K, stride, padding)
    inputs = value.requires_grad_(), logits.requires_grad_()

    def operator(value: Tensor, logits: Tensor) -> Tensor:
        return outlook_attention(value, logits, **kwargs, backend=backend)

    torch.autograd.gradcheck(operator, inputs)
    torch.autograd.gradgradcheck(operator, inputs)


def test_rows_of_attention_sum_to_one():
    value, logits, kwargs = make(1, 6, 6, 2, 4, 3, 3, 0)  # windows side by side: every token in exactly one
    out = outlook_attention(torch.ones_like(value), logits, **kwargs)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_padding_takes_part_in_the_softmax():
    value, logits, kwargs = make(1, 3, 3, 1, 2, 3, 3, 1)  # one window centred on the first token
    out = outlook_attention(torch.ones_like(value), torch.zeros_like(logits), **kwargs)
    torch.testing.assert_close(out[0, 0, 0, 0], torch.full((2,), 4 / 9, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_come_back(dtype, backend):
    value, logits, kwargs = make(1, 6, 6, 2, 8, 3, 2, 1, dtype=dtype)
    out = outlook_attention(value, logits, **kwargs, backend=backend)
    assert out.dtype == dtype and out.shape == value.shape
    exact = outlook_attention(value.double(), logits.double(), **kwargs, backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_autocast_casts_both_inputs_and_gradients_come_back_in_float32():
    value, logits, kwargs = make(1, 6, 6, 2, 8, 3, 2, 1, dtype=torch.float32)
    value.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = outlook_attention(value, logits.bfloat16(), **kwargs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert value.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_batch(backend):
    value, logits, kwargs = make(0, 6, 6, 2, 8, 3, 2, 1, dtype=torch.float32)
    value.requires_grad_()
    out = outlook_attention(value, logits, **kwargs, backend=backend)
    assert out.shape == value.shape
    out.sum().backward()
    assert value.grad.shape == value.shape


def test_meta_tensors_give_shapes():
    value, logits, kwargs = make(2, 6, 6, 2, 8, 3, 2, 1)
    out = outlook_attention(value.to("meta"), logits.to("meta"), **kwargs)
    assert out.is_meta and out.shape == value.shape


VALUE, LOGITS, GEOMETRY = make(1, 6, 6, 2, 8, 3, 2, 1, dtype=torch.float32)


@pytest.mark.parametrize(
    "value, logits, changes, message",
    [
        (VALUE[0], LOGITS, {}, r"value is \[B, H, W, heads, head_dim\]"),
        (VALUE, LOGITS[0], {}, r"given: value \(1, 6, 6, 2, 8\), logits \(3, 3, 2, 9, 9\)"),
        (VALUE, LOGITS, {"kernel_size": 0}, "at least 1"),
        (VALUE, LOGITS, {"stride": 0}, "at least 1"),
        (VALUE, LOGITS, {"padding": 3}, r"padding is in 0..kernel_size-1"),
        (VALUE, LOGITS, {"stride": 1}, r"logits must be \(1, 6, 6, 2, 9, 9\)"),
        (VALUE, LOGITS[:, :2], {}, r"given: \(1, 2, 3, 2, 9, 9\)"),
        (VALUE[:, :1], LOGITS, {"kernel_size": 4, "padding": 1}, "smaller than one 4 x 4 window"),
        (VALUE, LOGITS.double(), {}, "given: float32 and float64"),
        (VALUE.int(), LOGITS.int(), {}, "float64, float32, bfloat16, float16; given: int32"),
        (VALUE, LOGITS.to("meta"), {}, "one device; given: cpu and meta"),
        (VALUE, LOGITS, {"backend": "cuda"}, "unknown backend 'cuda'; known: auto, "),
        (VALUE, LOGITS, {"backend": "triton"}, "backend 'triton' does not support this call: it computes on CUDA"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(value, logits, changes, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        outlook_attention(value, logits, **{**GEOMETRY, **changes})


def test_auto_takes_the_first_engine_that_can_and_says_once_when_none_did(monkeypatch, caplog):
    never = Backend("never", lambda *_: "it is a test", lambda *_: None)
    monkeypatch.setattr(module, "_backends", [never, module.REFERENCE])
    monkeypatch.setattr(module, "_reported_fallbacks", set())
    with caplog.at_level(logging.INFO, "volo"):
        for _ in range(2):
            assert choose_backend(VALUE, LOGITS, *GEOMETRY.values()) is module.REFERENCE
    assert [record.getMessage() for record in caplog.records] == [
        "outlook attention runs on the reference backend (never: it is a test)"
    ]
    module.register_backend(Backend("always", lambda *_: None, lambda value, *_: value))
    assert [b.name for b in list_backends()] == ["always", "never", "reference"]
    assert outlook_attention(VALUE, LOGITS, **GEOMETRY) is VALUE
