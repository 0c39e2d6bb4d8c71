"""The operator and a model on a CUDA device, as users call them. Everything here is skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import volo.ops.outlook_attention as module
from volo.models.factory import create_model
from volo.ops.outlook_attention import choose_backend, outlook_attention

pytest.importorskip("triton")

from volo.ops import triton_kernels

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def draw(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """value, logits, gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (3, 13, 10, 2, 32), (3, 7, 5, 2, 9, 9), (3, 13, 10, 2, 32)
    value, logits, grad = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    return value, logits, grad


def operator(value: Tensor, logits: Tensor, backend: str = "auto") -> Tensor:
    return outlook_attention(value, logits, kernel_size=3, stride=2, padding=1, backend=backend)


def both(function, value: Tensor, logits: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradients of value and logits."""
    value, logits = (x.detach().clone().requires_grad_() for x in (value, logits))
    out = function(value, logits)
    return [out.detach(), *torch.autograd.grad(out, (value, logits), grad.to(out.dtype))]


@DTYPES
def test_values_and_gradients_keep_the_error_budget(dtype):
    value, logits, grad = draw(dtype)
    assert choose_backend(value, logits, 3, 2, 1).name == "triton"
    mine, again = both(operator, value, logits, grad), both(operator, value, logits, grad)
    eager = both(lambda v, a: operator(v, a, "reference"), value, logits, grad)
    exact = both(lambda v, a: operator(v, a, "reference"), value.double(), logits.double(), grad.double())
    for got, twin, theirs, truth in zip(mine, again, eager, exact):
        assert got.dtype == dtype and torch.equal(got, twin)
        budget = 2 * (theirs.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= budget


@DTYPES
def test_compiles_into_one_graph(dtype, monkeypatch: pytest.MonkeyPatch):
    calls: list[torch.dtype] = []
    forward = triton_kernels.forward
    monkeypatch.setattr(triton_kernels, "forward", lambda v, *rest: calls.append(v.dtype) or forward(v, *rest))
    torch.compiler.reset()
    mine = both(torch.compile(operator, fullgraph=True), *draw(dtype))
    assert calls == [dtype]  # the kernel, not the reference compiled
    for got, expected in zip(mine, both(operator, *draw(dtype))):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    value, logits, grad = draw()

    def autocast(value: Tensor, logits: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype):
            return operator(value, logits)

    mine = both(autocast, value, logits, grad)
    expected = both(operator, value.to(dtype), logits.to(dtype), grad)
    assert [x.dtype for x in mine] == [dtype, torch.float32, torch.float32]
    for got, wanted in zip(mine, expected):
        assert torch.equal(got, wanted.to(got.dtype))


@DTYPES
def test_a_cuda_graph_repeats_both_passes(dtype):
    value, logits, grad = draw(dtype)
    inputs = value.requires_grad_(), logits.requires_grad_()

    def run() -> list[Tensor]:
        out = operator(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the kernels compile before the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    others = draw(dtype, seed=1)
    with torch.no_grad():
        for mine, other in zip((*inputs, grad), others):
            mine.copy_(other)
    graph.replay()
    for got, expected in zip(captured, both(operator, *others)):
        assert torch.equal(got, expected)


def test_volo_d1_trains(monkeypatch: pytest.MonkeyPatch):
    calls: list[torch.dtype] = []
    forward = triton_kernels.forward
    monkeypatch.setattr(triton_kernels, "forward", lambda v, *rest: calls.append(v.dtype) or forward(v, *rest))
    torch.manual_seed(0)
    model = create_model("volo_d1").to("cuda", memory_format=torch.channels_last).train()
    images = torch.randn(4, 3, 224, 224).to("cuda", memory_format=torch.channels_last)
    target = torch.arange(4, device="cuda")

    def loss_of() -> Tensor:
        return torch.nn.functional.cross_entropy(model(images), target)

    def loss_and_gradients() -> list[Tensor]:
        loss = loss_of()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    mine = loss_and_gradients()
    assert calls == [torch.float32] * 4  # one an outlooker
    with monkeypatch.context() as patch:
        patch.setattr(module, "_backends", [module.REFERENCE])
        expected = loss_and_gradients()
    torch.testing.assert_close(mine[0], expected[0], rtol=1e-3, atol=0)
    # Convolutions are in tf32 and their gradients not the same from run to run.
    largest = max(gradient.abs().max().item() for gradient in expected[1:])
    for got, wanted in zip(mine[1:], expected[1:]):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-2 * largest)

    calls.clear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert calls == [torch.bfloat16] * 20
    assert losses[-1] < losses[0]
