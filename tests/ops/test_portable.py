"""Outlook attention for exported graphs: against the reference in float64, and what graphs are made of."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import volo
from volo.layers import OutlookAttention
from volo.models.volo import resample_pos_embed
from volo.ops import linear, portable
from volo.ops.outlook_attention import window_grid
from volo.ops.reference import outlook_attention_reference


def reference(value: Tensor, logits: Tensor, heads: int, K: int, stride: int, padding: int, scale: float) -> Tensor:
    split = value.unflatten(-1, (heads, -1)), logits.unflatten(-1, (heads, K * K, K * K))
    return outlook_attention_reference(*split, K, stride, padding, scale).flatten(3)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, ...]:
    K = draw(st.integers(1, 6))
    stride, padding = draw(st.integers(1, 5)), draw(st.integers(0, K - 1))
    least = max(K - 2 * padding, 1)
    H, W = (draw(st.integers(least, least + 9)) for _ in range(2))
    return draw(st.integers(1, 3)), H, W, K, stride, padding


@settings(deadline=None, max_examples=200)
@given(geometries(), st.integers(0, 99))
def test_equals_the_reference_in_float64(geometry: tuple[int, ...], seed: int):
    B, H, W, K, stride, padding = geometry
    generator = torch.Generator().manual_seed(seed)
    h, w = window_grid(H, W, K, stride, padding)
    value = torch.randn(B, H, W, 6, dtype=torch.float64, generator=generator)
    logits = torch.randn(B, h, w, 2 * K**4, dtype=torch.float64, generator=generator)
    out = portable.outlook_attention(value, logits, 2, K, stride, padding, 0.7)
    torch.testing.assert_close(out, reference(value, logits, 2, K, stride, padding, 0.7), atol=1e-10, rtol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_pools_like_pytorch(H: int, W: int, stride: int):
    x = torch.randn(2, H, W, 3, dtype=torch.float64)
    expected = F.avg_pool2d(x.permute(0, 3, 1, 2), stride, stride, ceil_mode=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(portable.average_pool(x, stride), expected, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=100)
@given(*(st.integers(1, 16) for _ in range(2)), *(st.integers(1, 40) for _ in range(2)))
def test_resamples_the_position_embedding_as_the_model_does(H: int, W: int, height: int, width: int):
    made = torch.randn(1, H, W, 4)
    resampled = portable.resample_pos_embed(made, height, width)
    torch.testing.assert_close(resampled, resample_pos_embed(made, (height, width)), atol=3e-5, rtol=0)


def test_gradients_are_those_of_the_reference():
    value = torch.randn(2, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 3, 3, 2 * 81, dtype=torch.float64, requires_grad=True)
    results = []
    for operator in (portable.outlook_attention, reference):
        out = operator(value, logits, 2, 3, 2, 1, 0.5)
        results.append(torch.autograd.grad(out.square().sum(), (value, logits)))
    for mine, expected in zip(*results):
        torch.testing.assert_close(mine, expected, atol=1e-10, rtol=0)


FOLDING = {"aten.im2col.default", "aten.col2im.default"}


def test_a_layer_switches_by_itself_and_by_hand():
    torch.manual_seed(0)
    layer = OutlookAttention(12, 3, 3, 2, 1).eval()
    x = torch.randn(2, 5, 7, 12)
    expected = layer(x)
    program = torch.export.export(layer, (x,))
    assert "aten.cat.default" in operators(program) and not FOLDING & operators(program)
    torch.testing.assert_close(program.module()(x), expected, atol=1e-6, rtol=1e-5)

    layer.portable = False  # for runtimes that are PyTorch themselves
    program = torch.export.export(layer, (x,))
    assert operators(program) >= FOLDING
    torch.testing.assert_close(program.module()(x), expected, atol=1e-6, rtol=1e-5)

    layer.portable = True
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    assert list(layer.state_dict()) == list(OutlookAttention(12, 3).state_dict())


def test_dropout_on_the_softmax_stays():
    layer = OutlookAttention(12, 3, 3, 2, 1, attn_drop=0.9).train()
    layer.portable = True
    x = torch.randn(1, 4, 4, 12)
    assert not torch.equal(layer(x), layer(x))


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def largest_rank(program: torch.export.ExportedProgram) -> int:
    values = [node.meta.get("val") for node in program.graph.nodes]
    return max(value.dim() for value in values if isinstance(value, Tensor))


TINY = {"depths": (1, 1), "embed_dims": (12, 16), "num_heads": (2, 2), "stem_dim": 8, "patch_size": 4, "img_size": 32}


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return volo.create_model("volo_nano", **TINY).eval()


def test_one_graph_for_every_batch_and_size(tiny: nn.Module):
    Dim = torch.export.Dim
    free = {0: Dim.DYNAMIC, 2: 8 * Dim("h", min=1, max=99), 3: 8 * Dim("w", min=1, max=99)}
    program = torch.export.export(tiny, (torch.randn(2, 3, 48, 40),), dynamic_shapes=(free,))
    assert largest_rank(program) <= 4
    # An even grid is known to be one: nothing is padded by an amount that the graph would have to compute.
    pads = [node.args[1] for node in program.graph.nodes if str(node.target) == "aten.pad.default"]
    assert pads and all(isinstance(n, int) for pad in pads for n in pad)
    module = program.module()
    # The native grid is 4 x 4: smaller, native, larger, one smaller and one larger.
    for batch, height, width in ((1, 16, 24), (3, 32, 32), (2, 64, 40), (5, 16, 48)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(module(images), tiny(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mkl_is_slow", [True, False])
def test_the_batch_is_free_on_every_processor(tiny: nn.Module, mkl_is_slow: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "_mkl_is_slow", mkl_is_slow)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(tiny, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    assert largest_rank(program) <= 4
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), tiny(images), atol=1e-5, rtol=1e-5)


def test_another_stride_in_one_graph():
    kernel_size = stride = 3
    Dim = torch.export.Dim
    torch.manual_seed(0)
    layer = OutlookAttention(8, 2, kernel_size, stride, (kernel_size - 1) // 2).eval()
    free = {0: Dim.DYNAMIC, 1: stride * Dim("h", min=1, max=99), 2: stride * Dim("w", min=1, max=99)}
    program = torch.export.export(layer, (torch.randn(2, 3 * stride, 4 * stride, 8),), dynamic_shapes=(free,))
    assert largest_rank(program) <= 4
    module = program.module()
    for batch, h, w in ((1, 3, 3), (3, 2, 7)):
        x = torch.randn(batch, h * stride, w * stride, 8)
        torch.testing.assert_close(module(x), layer(x), atol=1e-6, rtol=1e-5)


def test_traced_graphs_are_portable_too(tiny: nn.Module):
    images = torch.randn(1, 3, 32, 32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(tiny, images)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(images), tiny(images), atol=1e-5, rtol=1e-5)
    assert "col2im" not in str(traced.inlined_graph) and "im2col" not in str(traced.inlined_graph)
