"""What every operator with kernels of its own asks: may a kernel be used here, and may the call skip the dispatcher?"""

from __future__ import annotations

from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch.autograd import forward_ad

# By what is private to PyTorch a kernel learns whether it may be used. A version without one of these gets the reference
# everywhere: slow and right.
_MISSING = tuple(
    name
    for module, name in (
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C, "_has_storage"),
        (torch._C, "_len_torch_dispatch_stack"),
        (torch.compiler, "_is_exporting_flag"),
        (forward_ad, "_current_level"),
    )
    if not hasattr(module, name)
)


def no_kernel() -> str | None:
    """Reasons that hold for every kernel."""
    if _MISSING:
        return f"PyTorch {torch.__version__} has no {', no '.join(_MISSING)}, by which kernels know whether they may be used"
    if is_exporting():
        return "exported graphs are made of portable operations"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation has no kernel"
    if torch._C._are_functorch_transforms_active() and not _is_vmap_alone():
        return "of the transforms of torch.func only vmap has a kernel"
    return None


def is_exporting() -> bool:
    """Whether a graph is being made that other runtimes will run: torch.export, torch.onnx, torch.jit.trace."""
    # The flag itself: torch.compiler.is_exporting() is True under torch.compile as well before torch 2.14.
    return getattr(torch.compiler, "_is_exporting_flag", False) or torch.jit.is_tracing()


def _is_vmap_alone() -> bool:
    """Whether vmap is the only transform of torch.func that is active, as far as this version of PyTorch can tell."""
    if not (hasattr(functorch, "get_interpreter_stack") and hasattr(functorch, "TransformType")):
        return False
    return all(transform.key() == functorch.TransformType.Vmap for transform in functorch.get_interpreter_stack() or ())


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors in memory that nothing watches: no subclasses, no batched ones, no modes or transforms."""
    return (
        not _MISSING
        and all(type(x) in (Tensor, torch.nn.Parameter) and torch._C._has_storage(x) for x in tensors)
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
