"""Change a finished model for speed, in place: `volo.fuse(model)` gives one that somebody else wrote our outlook attention;
`pack_linear_layers` is what `VOLO.fuse_for_inference` does to the Linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.layers import Mlp, OutlookAttention
from volo.ops.linear import PackedWeight

_ATTRIBUTES = ("v", "attn", "proj", "kernel_size", "stride", "padding", "num_heads", "scale")


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did."""

    replaced: tuple[str, ...]
    """Names of the modules that were replaced."""
    left: dict[str, str]
    """Names of modules that look like outlook attention but were left alone, and why."""

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} outlook attention modules replaced: {', '.join(self.replaced) or 'none'}"]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Replace the outlook attention inside `model` by `volo.layers.OutlookAttention`, weights shared, nothing copied.

    Works on timm's VOLO (and what is built on it, MiVOLO for example), on the original code's, and on any module with the
    attributes v, attn, proj (Linear), kernel_size, stride, padding, num_heads and scale. Outputs stay the same, state
    dicts too. Modules of ours are left as they are.

    Raises ValueError where `model` itself is one outlook attention module: it cannot be replaced from inside.
    """
    if _looks_like_outlook_attention(model) and not isinstance(model, OutlookAttention):
        raise ValueError("this module is itself an outlook attention; fuse the model around it, or use fused(module)")
    replaced: list[str] = []
    left: dict[str, str] = {}
    done: dict[nn.Module, OutlookAttention] = {}  # a module used in two places stays one module
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # named_children leaves out the second place
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is None or isinstance(child, OutlookAttention) or not _looks_like_outlook_attention(child):
                continue
            reason = _why_not(child)
            if reason is not None:
                left[name] = reason
                continue
            if child not in done:
                done[child] = fused(child)
            parent._modules[child_name] = done[child]
            replaced.append(name)
    return FuseReport(tuple(replaced), left)


def fused(module: nn.Module) -> OutlookAttention:
    """Our outlook attention around the very Linear layers of `module`. Raises ValueError where they do not fit."""
    reason = _why_not(module)
    if reason is not None:
        raise ValueError(f"{type(module).__name__} cannot be replaced: {reason}")
    assert isinstance(module.v, nn.Linear)
    with torch.device("meta"):  # the layers made here are thrown away
        ours = OutlookAttention(
            module.v.in_features,
            module.num_heads,  # type: ignore[arg-type]
            _one(module.kernel_size),
            _one(module.stride),
            _one(module.padding),
            qkv_bias=module.v.bias is not None,
            attn_drop=_rate(getattr(module, "attn_drop", 0.0)),
            proj_drop=_rate(getattr(module, "proj_drop", 0.0)),
        )
    ours.scale = float(module.scale)  # type: ignore[arg-type]
    ours.v, ours.attn, ours.proj = module.v, module.attn, module.proj  # type: ignore[assignment]
    return ours.train(module.training)


def _looks_like_outlook_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _ATTRIBUTES)


def _why_not(module: nn.Module) -> str | None:
    for name in ("v", "attn", "proj"):
        if not isinstance(getattr(module, name, None), nn.Linear):
            return f"its {name} is {type(getattr(module, name, None)).__name__}, not Linear"
    v, attn, proj = module.v, module.attn, module.proj
    assert isinstance(v, nn.Linear) and isinstance(attn, nn.Linear) and isinstance(proj, nn.Linear)
    for name in ("kernel_size", "stride", "padding"):
        value = getattr(module, name)
        if isinstance(value, (tuple, list)) and len(set(value)) != 1:
            return f"its {name} is {value}, ours is the same in both directions"
    outputs = module.num_heads * _one(module.kernel_size) ** 4  # type: ignore[operator]
    if attn.out_features != outputs:
        return f"its attn has {attn.out_features} outputs, not num_heads * kernel_size^4 = {outputs}"
    if not v.in_features == v.out_features == proj.in_features:
        return f"its v maps {v.in_features} to {v.out_features} channels and proj takes {proj.in_features}"
    return None


def _one(value: object) -> int:
    return int(value[0]) if isinstance(value, (tuple, list)) else int(value)  # type: ignore[call-overload]


def _rate(drop: object) -> float:
    return float(getattr(drop, "p", drop))  # type: ignore[arg-type]


class PackedLinear(nn.Linear):
    """A Linear for inference, and the GELU behind it if `gelu`: on a CPU it keeps a second copy of its weight, in the layout
    of oneDNN's matrix kernels. Wherever these cannot serve (see `volo.ops.linear`) it is a plain Linear (and GELU).

    Parameters are those of `linear`, shared. The copy is made at the first call, and again after the weight has changed.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.gelu = gelu
        self._packed = PackedWeight()
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self._packed.serves(x, self.weight):
            return self._packed.multiply(x, self.weight, self.bias, self.gelu)
        out = F.linear(x, self.weight, self.bias)
        return F.gelu(out) if self.gelu else out

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:  # to(), half() ...
        self._packed.forget()
        return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", gelu=True" if self.gelu else "")


def pack_linear_layers(model: nn.Module) -> None:
    """Replace every Linear inside `model` by a `PackedLinear` around its parameters; GELUs of MLPs go into it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear) and not isinstance(child, PackedLinear):
                parent._modules[name] = PackedLinear(child)
        if isinstance(parent, Mlp) and isinstance(parent.act, nn.GELU) and parent.act.approximate == "none":
            assert isinstance(parent.fc1, PackedLinear)
            parent.fc1.gelu = True
            parent._modules["act"] = nn.Identity()
