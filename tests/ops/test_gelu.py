"""GELU: the CPU kernel of its gradient against PyTorch's, and where PyTorch's must serve."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.layers import Mlp
from volo.models.fuse import FastGELU, use_training_kernels
from volo.ops import cpu_kernel
from volo.ops.gelu import MIN_ELEMENTS, gelu, why_not

pytestmark = pytest.mark.skipif(
    cpu_kernel.LOAD_ERROR is not None and shutil.which("c++") is None, reason=str(cpu_kernel.LOAD_ERROR)
)

eager_backward = torch.ops.aten.gelu_backward


@pytest.fixture(params=range(3), ids=["portable", "AVX2", "AVX-512"])
def isa(request, monkeypatch) -> str:
    if request.param > cpu_kernel._library.volo_best_isa():
        pytest.skip("this processor has no such instructions")
    monkeypatch.setattr(cpu_kernel, "_isa", request.param)
    return cpu_kernel.instruction_set()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The sizes that the kernel was called with."""
    sizes: list[int] = []
    kernel = cpu_kernel.gelu_backward

    def counted(grad_out: Tensor, x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return kernel(grad_out, x)

    monkeypatch.setattr(cpu_kernel, "_isa", min(1, cpu_kernel._library.volo_best_isa()))
    if cpu_kernel.instruction_set() == "portable":
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(cpu_kernel, "gelu_backward", counted)
    return sizes


def make(dtype: torch.dtype = torch.float32, size: tuple[int, ...] = (3, 67, 131)) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output, large enough for the kernel."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    return (2 * x).requires_grad_(), grad


def exact(x: Tensor) -> Tensor:
    """The derivative in float64; erfc, because 1 + erf cancels."""
    x = x.double()
    return torch.special.erfc(-x / 2**0.5) / 2 + x * (-x * x / 2).exp() / (2 * torch.pi) ** 0.5


# ---- numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reach", [30, 6, 1, 1e-30])
def test_gradients_keep_the_error_budget(isa, dtype, reach):
    x = torch.linspace(-reach, reach, 200_003).to(dtype)
    one = torch.ones_like(x)
    got, truth = cpu_kernel.gelu_backward(one, x), exact(x)
    assert got.dtype == dtype
    budget = 2 * (eager_backward(one, x).double() - truth).abs().max()
    assert (got.double() - truth).abs().max() <= budget + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ends_of_the_range(isa, dtype):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.tensor(
        [0.0, -0.0, smallest, -smallest, smallest / 64, -smallest / 64, 13.0, -13.0, 13.2, -13.2, largest, -largest],
        dtype=dtype,
    )
    got = cpu_kernel.gelu_backward(torch.ones_like(x), x).double()
    torch.testing.assert_close(got, exact(x).nan_to_num(), atol=1e-37, rtol=torch.finfo(dtype).eps)
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    assert cpu_kernel.gelu_backward(torch.ones_like(strange), strange).isnan().all()  # as PyTorch's
    number = torch.ones_like(strange)
    assert torch.equal(cpu_kernel.gelu_backward(strange, number).isnan(), strange.isnan())


@pytest.mark.parametrize("count", [0, 1, 3, 15, 17, 63, 65, 1000, 40_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_elements(isa, dtype, count):
    x, grad = make(dtype, (count,))
    got = cpu_kernel.gelu_backward(grad, x.detach())
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(got, eager_backward(grad, x.detach()), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_for_any_number_of_threads(dtype):
    x, grad = make(dtype, (40_001,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu_kernel.gelu_backward(grad, x.detach())
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(cpu_kernel.gelu_backward(grad, x.detach()), one)
    finally:
        torch.set_num_threads(before)


# ---- through autograd ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_pytorchs_and_backward_the_kernels(calls, dtype):
    x, grad = make(dtype)
    out = gelu(x)
    assert torch.equal(out, F.gelu(x))
    (got,) = torch.autograd.grad(out, x, grad)
    assert calls == [x.numel()] and got.dtype == dtype
    assert torch.equal(got, cpu_kernel.gelu_backward(grad, x.detach()))


def test_views_and_expanded_gradients(calls):
    x, _ = make(size=(130, 140))
    expected = torch.autograd.grad(F.gelu(x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(gelu(x).sum(), x)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(gelu(x.t()).sum(), x)[0], expected)
    assert len(calls) == 2


def test_second_derivative_is_pytorchs(calls):
    x, _ = make()

    def penalty(function) -> Tensor:
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(penalty(gelu), penalty(F.gelu))
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu, x) and torch.autograd.gradgradcheck(gelu, x)


def test_where_pytorchs_own_serves(calls, monkeypatch):
    x, grad = make()
    assert why_not(x) is None
    assert "float64" in str(why_not(x.double()))
    assert "meta" in str(why_not(x.to("meta")))
    assert str(MIN_ELEMENTS) in str(why_not(torch.zeros(MIN_ELEMENTS - 1)))
    monkeypatch.setattr(cpu_kernel, "LOAD_ERROR", "it was not built")
    assert why_not(x) == "it was not built"
    assert torch.equal(torch.autograd.grad(gelu(x), x, grad)[0], torch.autograd.grad(F.gelu(x), x, grad)[0])
    assert not calls


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(calls, dynamic):
    torch.compiler.reset()
    x, grad = make()
    compiled = torch.compile(gelu, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = torch.autograd.grad(compiled(x), x, grad)[0]
    assert torch.equal(got, torch.autograd.grad(F.gelu(x), x, grad)[0]) and not calls


def test_exported_and_traced_graphs_are_portable():
    x, _ = make()
    exported = torch.export.export(FastGELU(), (x,))
    assert "aten.gelu.default" in {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "aten::gelu" in str(torch.jit.trace(gelu, (x,), check_trace=False).graph)


def test_transforms_of_torch_func():
    x, _ = make()
    x = x.detach()
    loss = lambda x: gelu(x).square().sum()  # noqa: E731
    plain = lambda x: F.gelu(x).square().sum()  # noqa: E731
    assert torch.equal(torch.func.grad(loss)(x), torch.func.grad(plain)(x))
    assert torch.equal(torch.vmap(torch.func.grad(loss))(x), torch.vmap(torch.func.grad(plain))(x))
    assert torch.equal(torch.func.jvp(gelu, (x,), (x,))[1], torch.func.jvp(F.gelu, (x,), (x,))[1])


def test_autocast_and_checkpointing(calls):
    from torch.utils.checkpoint import checkpoint

    x, grad = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert gelu(x).dtype == torch.float32 and gelu(x.bfloat16()).dtype == torch.bfloat16
    kept = torch.autograd.grad(gelu(x), x, grad)[0]
    assert torch.equal(torch.autograd.grad(checkpoint(gelu, x, use_reentrant=False), x, grad)[0], kept)
    assert len(calls) == 2


def test_the_module(calls):
    mlp = Mlp(16, 128)
    use_training_kernels(mlp)
    assert isinstance(mlp.act, nn.GELU) and not mlp.act.state_dict()
    x = torch.randn(200, 16, requires_grad=True)
    mlp(x).sum().backward()
    assert calls == [200 * 128]
    small = torch.randn(7)
    assert torch.equal(FastGELU("tanh")(small), F.gelu(small, approximate="tanh"))
