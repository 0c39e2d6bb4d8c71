"""Self-attention: the CPU kernel against PyTorch's, and everything of PyTorch that must see it as an operator."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch import Tensor

from volo.ops import cpu_kernel
from volo.ops import self_attention as self_attention_module
from volo.ops.self_attention import (
    MAX_TOKENS,
    MAX_TOKENS_AMX,
    MAX_TOKENS_AMX_TRAINING,
    self_attention,
    self_attention_reference,
    why_not,
)

pytestmark = pytest.mark.skipif(
    cpu_kernel.LOAD_ERROR is not None and shutil.which("c++") is None, reason=str(cpu_kernel.LOAD_ERROR)
)

# batch, tokens, heads, head_dim
SHAPES = [
    (2, 196, 2, 32),
    (1, 1, 1, 1),
    (3, 7, 2, 20),
    (1, 33, 3, 48),
    (2, 16, 1, 64),
    (1, 65, 2, 7),
    (1, 50, 1, 130),
    (1, 1500, 1, 32),
]


def make(B: int, N: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """qkv, gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    qkv = 2 * torch.randn(B, N, 3 * heads * head_dim, generator=generator)
    return qkv.to(dtype), torch.randn(B, N, heads * head_dim, generator=generator).to(dtype)


def both(function, qkv: Tensor, grad: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Output and gradient of `qkv`."""
    qkv = qkv.detach().clone().requires_grad_()
    out = function(qkv, heads)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


@pytest.fixture(params=range(3), ids=["portable", "AVX2", "AVX-512"])
def isa(request, monkeypatch) -> str:
    if request.param > cpu_kernel._library.volo_best_isa():
        pytest.skip("this processor has no such instructions")
    monkeypatch.setattr(cpu_kernel, "_isa", request.param)
    return cpu_kernel.instruction_set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_keep_the_error_budget(isa, dtype):
    for shape in SHAPES:
        qkv, grad = make(*shape, dtype=dtype)
        exact = both(self_attention_reference, qkv.double(), grad.double(), shape[2])
        eager = both(self_attention_reference, qkv, grad, shape[2])
        mine = cpu_kernel.attention_forward(qkv, shape[2]), cpu_kernel.attention_backward(grad, qkv, shape[2])
        for got, theirs, truth in zip(mine, eager, exact):
            assert got.dtype == dtype and got.is_contiguous()
            error = (got.double() - truth).abs().max().item()
            budget = 2 * (theirs.double() - truth).abs().max().item()
            # One token attends to itself alone: what should cancel in its gradient is as large as what cancels.
            largest = max(truth.abs().max().item(), (qkv.double().abs().max() * grad.double().abs().max()).item())
            assert error <= budget + torch.finfo(dtype).eps * largest, shape


def test_wide_logits_and_what_is_not_finite(isa):
    qkv, _ = make(1, 40, 1, 16)
    torch.testing.assert_close(
        cpu_kernel.attention_forward(50 * qkv, 1), self_attention_reference(50 * qkv, 1), atol=1e-3, rtol=1e-4
    )
    qkv[0, 3, 0] = float("nan")  # a query: its own row alone
    out = cpu_kernel.attention_forward(qkv, 1)
    assert out[0, 3].isnan().all() and not out[0, :3].isnan().any() and not out[0, 4:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_for_any_number_of_threads(dtype):
    qkv, grad = make(1, 150, 2, 32, dtype=dtype)  # 2 heads: more threads share a head
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu_kernel.attention_forward(qkv, 2), cpu_kernel.attention_backward(grad, qkv, 2)
        for threads in (2, 3, 7, 64):
            torch.set_num_threads(threads)
            assert torch.equal(cpu_kernel.attention_forward(qkv, 2), one[0])
            assert torch.equal(cpu_kernel.attention_backward(grad, qkv, 2), one[1])
    finally:
        torch.set_num_threads(before)


def test_views_need_no_copy():
    qkv, grad = make(2, 21, 2, 16)
    wide = torch.randn(2, 23, 100)
    wide[:, 2:, 4:] = qkv
    view = wide[:, 2:, 4:]
    assert torch.equal(cpu_kernel.attention_forward(view, 2), cpu_kernel.attention_forward(qkv, 2))
    assert torch.equal(cpu_kernel.attention_backward(grad, view, 2), cpu_kernel.attention_backward(grad, qkv, 2))
    one = torch.ones(()).expand_as(grad)  # what sum().backward() hands over
    assert torch.equal(
        cpu_kernel.attention_backward(one, qkv, 2), cpu_kernel.attention_backward(one.contiguous(), qkv, 2)
    )


def test_no_memory_is_kept():
    resource = pytest.importorskip("resource")
    qkv, grad = make(1, 4, 1, 8)

    def both_passes() -> None:
        cpu_kernel.attention_forward(qkv, 1)
        cpu_kernel.attention_backward(grad, qkv, 1)

    for _ in range(1000):
        both_passes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        both_passes()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB; a leaked scratch would be 100 MiB


def test_in_bfloat16_with_a_matrix_unit_few_tokens_are_the_kernels(monkeypatch):
    monkeypatch.setattr(cpu_kernel, "_isa", 1)
    monkeypatch.setattr(self_attention_module, "_HAS_AMX", True)

    def serves(tokens: int, trains: bool, dtype: torch.dtype = torch.bfloat16) -> bool:
        return why_not(torch.zeros(1, tokens, 3, dtype=dtype, requires_grad=trains)) is None

    assert serves(MAX_TOKENS_AMX, trains=False) and not serves(MAX_TOKENS_AMX + 1, trains=False)
    assert serves(MAX_TOKENS_AMX_TRAINING, trains=True) and not serves(MAX_TOKENS_AMX_TRAINING + 1, trains=True)
    with torch.no_grad():
        assert not serves(MAX_TOKENS_AMX_TRAINING, trains=True)
    assert serves(MAX_TOKENS, trains=False, dtype=torch.float32)  # the unit multiplies no float32
    monkeypatch.setattr(self_attention_module, "_HAS_AMX", False)
    assert serves(MAX_TOKENS, trains=False)


def test_where_pytorchs_own_serves(monkeypatch):
    qkv, _ = make(1, 4, 1, 8)
    monkeypatch.setattr(cpu_kernel, "_isa", 1)
    assert why_not(qkv) is None
    assert "dropout" in str(why_not(qkv, 0.1))
    assert "float64" in str(why_not(qkv.double()))
    assert "meta" in str(why_not(qkv.to("meta")))
    assert "tokens" in str(why_not(torch.zeros(1, MAX_TOKENS + 1, 3)))
    monkeypatch.setattr(cpu_kernel, "_isa", 0)
    assert "AVX2" in str(why_not(qkv))
    monkeypatch.setattr(cpu_kernel, "LOAD_ERROR", "it was not built")
    assert why_not(qkv) == "it was not built"
    torch.testing.assert_close(self_attention(qkv, 1), self_attention_reference(qkv, 1))
    with pytest.raises(ValueError, match="num_heads=5"):
        self_attention(qkv, 5)


# ---- as an operator of PyTorch ----


@pytest.fixture
def qkv() -> Tensor:
    return make(2, 9, 2, 8)[0].requires_grad_()


def gradients(function, *inputs: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def operator(qkv: Tensor) -> Tensor:
    return self_attention(qkv, 2)


def test_opcheck(qkv):
    torch.library.opcheck(torch.ops.volo.self_attention.default, (qkv, 2))
    torch.library.opcheck(torch.ops.volo.self_attention_backward.default, (torch.randn(2, 9, 16), qkv, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(qkv, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for mine, expected in zip(gradients(compiled, qkv), gradients(operator, qkv)):
        torch.testing.assert_close(mine, expected)


def test_exported_and_traced_graphs_are_portable(qkv):
    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return operator(qkv)

    exported = torch.export.export(Module(), (qkv.detach(),))
    targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in targets and not any("volo" in t for t in targets)
    torch.testing.assert_close(exported.module()(qkv.detach()), operator(qkv.detach()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "volo::" not in str(torch.jit.trace(operator, (qkv.detach(),), check_trace=False).graph)


def test_transforms_of_torch_func(qkv):
    qkv = qkv.detach()
    many = torch.stack([qkv, 2 * qkv, qkv - 1])
    torch.testing.assert_close(torch.vmap(operator)(many), torch.stack([operator(x) for x in many]))
    loss = lambda x: operator(x).square().sum()  # noqa: E731
    expected = gradients(operator, qkv.clone().requires_grad_())[1]
    torch.testing.assert_close(torch.func.grad(loss)(qkv), expected, atol=1e-4, rtol=1e-4)


def test_second_derivative(qkv):
    def penalty(function) -> Tensor:
        (grad,) = torch.autograd.grad(function(qkv).square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), qkv)[0]

    def plain(x: Tensor) -> Tensor:
        q, k, v = x.view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 16)

    torch.testing.assert_close(penalty(operator), penalty(plain), atol=1e-2, rtol=1e-3)


def test_autocast_computes_in_its_dtype(qkv):
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(qkv).dtype == torch.bfloat16
        assert operator(qkv.double()).dtype == torch.float64


def test_activation_checkpointing(qkv):
    from torch.utils.checkpoint import checkpoint

    checkpointed = gradients(lambda x: checkpoint(operator, x, use_reentrant=False), qkv)
    for mine, expected in zip(checkpointed, gradients(operator, qkv)):
        assert torch.equal(mine, expected)
