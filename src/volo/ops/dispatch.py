"""What every operator with kernels of its own asks: may a kernel serve here, and may the call skip the dispatcher?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad


def no_kernel() -> str | None:
    """Reasons that hold for every kernel."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "exported graphs are made of portable operations"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation has no kernel"
    transforms = torch._C._functorch.get_interpreter_stack() if torch._C._are_functorch_transforms_active() else ()
    if any(transform.key() != TransformType.Vmap for transform in transforms):
        return "of the transforms of torch.func only vmap has a kernel"
    return None


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors in memory that nothing watches: no subclasses, no batched ones, no modes or transforms."""
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) and torch._C._has_storage(x) for x in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def batched(op: Any, num_tensors: int) -> Any:
    """The rule of `torch.vmap` for an op whose first `num_tensors` arguments start with a batch: one more batch dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        tensors = [
            x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
            for x, dim in zip(args[:num_tensors], in_dims[:num_tensors])
        ]
        out = op(*(x.flatten(0, 1) for x in tensors), *args[num_tensors:])
        unflatten = (info.batch_size, tensors[0].shape[1])
        if isinstance(out, Tensor):
            return out.unflatten(0, unflatten), 0
        return tuple(x.unflatten(0, unflatten) for x in out), (0,) * len(out)

    return rule
