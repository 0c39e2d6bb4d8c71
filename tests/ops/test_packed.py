"""The order of packed logits, and the operator on them as torch.library knows it, on a CPU."""

from __future__ import annotations

import pytest
import torch

from volo.ops.library import packed_why_not
from volo.ops.packed import pack, packed_width, unpack
from volo.ops.reference import outlook_attention_reference


@pytest.mark.parametrize(("heads", "kernel_size", "width"), [(6, 3, 496), (1, 3, 96), (16, 3, 1296), (2, 5, 1264)])
def test_there_and_back(heads: int, kernel_size: int, width: int) -> None:
    taps = kernel_size**2
    logits = torch.randn(2, 3, heads, taps, taps)
    packed = pack(logits.flatten(2).movedim(-1, 0), heads, kernel_size).movedim(0, -1)
    assert packed.shape == (2, 3, width) and packed_width(heads, kernel_size) == width
    assert torch.equal(unpack(packed, heads, kernel_size), logits)
    assert not packed[..., heads * taps * taps :].any()


def test_first_eight_of_each_row_stand_together() -> None:
    packed = pack(torch.arange(6 * 81), 6, 3)
    assert packed[:16].tolist() == [*range(8), *range(9, 17)]
    assert packed[6 * 72 : 6 * 72 + 3].tolist() == [8, 17, 26]


def test_a_packed_linear_gives_packed_logits() -> None:
    linear, x = torch.nn.Linear(10, 2 * 81), torch.randn(4, 10)
    packed = torch.nn.functional.linear(x, pack(linear.weight, 2, 3), pack(linear.bias, 2, 3))
    assert torch.allclose(unpack(packed, 2, 3), linear(x).unflatten(-1, (2, 9, 9)), atol=1e-6)


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 4, 1, 4, generator=generator, dtype=torch.float64).requires_grad_()
    packed = torch.randn(2, 2, 2, packed_width(1, 3), generator=generator, dtype=torch.float64).requires_grad_()
    return value, packed


def test_the_op_is_the_operator() -> None:
    value, packed = draw()
    out = torch.ops.volo.outlook_attention_packed(value, packed, 3, 2, 1, 0.5)
    expected = outlook_attention_reference(value, unpack(packed, 1, 3), 3, 2, 1, 0.5)
    assert torch.allclose(out, expected)
    grad = torch.randn_like(out)
    for mine, wanted in zip(*(torch.autograd.grad(y, (value, packed), grad) for y in (out, expected))):
        assert torch.allclose(mine, wanted)


def test_torch_library_finds_nothing_wrong() -> None:
    value, packed = draw()
    torch.library.opcheck(torch.ops.volo.outlook_attention_packed, (value, packed, 3, 2, 1, 0.5))


def test_derivatives_twice() -> None:
    def operator(value: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return torch.ops.volo.outlook_attention_packed(value, packed, 3, 2, 1, 0.5)

    value, packed = (x.detach()[:1].requires_grad_() for x in draw())
    assert torch.autograd.gradcheck(operator, (value, packed), fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, (value, packed), fast_mode=True)


def test_one_more_batch_dimension() -> None:
    value, packed = (torch.stack([x, x.flip(0)]) for x in draw())

    def operator(value: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return torch.ops.volo.outlook_attention_packed(value, packed, 3, 2, 1, 0.5)

    out = torch.vmap(operator)(value, packed)
    assert torch.allclose(out, torch.stack([operator(v, p) for v, p in zip(value, packed)]))


def test_a_cpu_has_no_kernels_for_it() -> None:
    reason = packed_why_not(torch.zeros(1, 4, 4, 1, 8), (2, 2), 3, 2, 1)
    assert reason is not None and "cuda" in reason.lower()
