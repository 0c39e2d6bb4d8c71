"""Change a finished model for speed, in place: `volo.fuse(model)` gives one that somebody else wrote our outlook attention;
`use_training_kernels` is what the trainer does to Linear layers and GELUs, `pack_linear_layers` what
`VOLO.fuse_for_inference` does.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.layers import ClassAttention, Mlp, OutlookAttention, SelfAttention
from volo.ops.gelu import gelu
from volo.ops.linear import PackedWeight, is_faster_than_pytorch, linear

_ROLES = ("v", "attn", "proj")
_LOOKS = re.compile(r"outlook_?att", re.IGNORECASE)


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did."""

    replaced: tuple[str, ...]
    """Names of the modules that were replaced."""
    left: dict[str, str]
    """Names of modules that look like outlook attention but were left alone, and why."""

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} attention modules replaced: {', '.join(self.replaced) or 'none'}"]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, portable: bool = False) -> FuseReport:
    """Replace the outlook attention inside `model` by `volo.layers.OutlookAttention`, weights shared, nothing copied.

    Works on timm's VOLO (and what is built on it, MiVOLO for example), on the original code's, and on copies of the module
    under other names, on [B, H, W, C] or [B, C, H, W]: a module is replaced only if it is the same function, which is tried
    out with random weights in float64, and has no parameters besides its three Linear layers. Outputs, names in state dicts
    and hooks stay. What looks like outlook attention and is not is left and named in the report; modules of ours are left as
    they are.

    Args:
        portable: make a model to be exported. Outlook attention is then computed by `volo.ops.portable`, slower here but in
            operations that every runtime has, and self-attention and class attention of timm's VOLO and of the original
            code, whose tensors have five dimensions, become ours, whose have four. So do the relative positions of timm's
            bottleneck attention, with which MiVOLO joins face and body.

    Raises ValueError where `model` itself is one outlook attention module: it cannot be replaced from inside.
    """
    if not isinstance(model, OutlookAttention) and _looks_like_outlook_attention(model):
        raise ValueError("this module is itself an outlook attention; fuse the model around it, or use fused(module)")
    replaced: list[str] = []
    left: dict[str, str] = {}
    done: dict[nn.Module, nn.Module] = {}  # a module used in two places stays one module
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # named_children leaves out the second place
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is None or isinstance(child, OutlookAttention):
                continue
            if portable and child not in done and (ours := _of_rank_four(child)) is not None:
                done[child] = ours
            if child not in done:
                if not _looks_like_outlook_attention(child):
                    continue
                try:
                    done[child] = fused(child)
                except ValueError as error:
                    left[name] = str(error)
                    continue
            parent._modules[child_name] = done[child]
            replaced.append(name)
    if portable:
        for module in model.modules():
            if isinstance(module, OutlookAttention):
                module.portable = True
    return FuseReport(tuple(replaced), left)


def fused(module: nn.Module) -> OutlookAttention:
    """Our outlook attention around the very Linear layers of `module`, with its hooks.

    Raises ValueError, which says why, where `module` is another function than outlook attention, or may be.
    """
    layers = {name: layer for name, child in module.named_children() if (layer := _only_linear(child)) is not None}
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    if further := [name for name, p in module.named_parameters() if id(p) not in owned]:
        raise ValueError(f"{type(module).__name__} has further parameters: {', '.join(further)}")
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ValueError(f"{type(module).__name__} has buffers: {', '.join(buffers)}")
    if len(layers) != len(_ROLES):
        kinds = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
        raise ValueError(
            f"{type(module).__name__} has {len(layers)} Linear layers of its own, where outlook attention has three (value, "
            f"logits, projection); its children are {kinds}"
        )
    if any(p.is_meta for p in module.parameters()):
        raise ValueError("its weights are on the meta device, where nothing can be compared; load them first")
    reasons = []
    for roles in _assignments(layers):
        for geometry in _geometries(module, layers[roles["v"]], layers[roles["attn"]]):
            reason = _difference(module, roles, geometry)
            if reason is None:
                return _rebuilt(module, roles, geometry)
            reasons.append(reason)
    if reasons:
        raise ValueError(reasons[0])
    heads, kernel = (getattr(module, name, name) for name in ("num_heads", "kernel_size"))
    outputs = ", ".join(f"{name} has {layer.out_features}" for name, layer in layers.items())
    raise ValueError(
        f"none of its Linear layers can give the logits, num_heads * kernel_size^4 with num_heads={heads} and "
        f"kernel_size={kernel}: {outputs} outputs"
    )


@dataclass(frozen=True)
class _Geometry:
    num_heads: int
    kernel_size: int
    stride: int
    padding: int
    scale: float
    channels_first: bool


class _Renamed(OutlookAttention):
    """Outlook attention whose layers keep the names that a copy of the module gave them, and the layout of its tensors."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(self.__dict__.get("_names", {}).get(name, name))

    def forward(self, x: Tensor) -> Tensor:
        if not self._channels_first:
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, H, W]


def _rebuilt(module: nn.Module, roles: Mapping[str, str], geometry: _Geometry) -> OutlookAttention:
    """Ours with the layers, hooks and mode of `module`."""
    is_plain = not geometry.channels_first and all(roles[role] == role for role in _ROLES)
    value = _only_linear(module.get_submodule(roles["v"]))
    assert value is not None
    with torch.device("meta"):  # the layers made here are thrown away
        ours = (OutlookAttention if is_plain else _Renamed)(
            value.in_features,
            geometry.num_heads,
            geometry.kernel_size,
            geometry.stride,
            geometry.padding,
            attn_drop=_rate(getattr(module, "attn_drop", 0.0)),
            proj_drop=_rate(getattr(module, "proj_drop", 0.0)),
        )
    ours.scale = geometry.scale
    for role in _ROLES:
        del ours._modules[role]
    for role in _ROLES:
        ours.add_module(roles[role], module.get_submodule(roles[role]))
    if not is_plain:
        vars(ours).update(_names=dict(roles), _channels_first=geometry.channels_first)
    _take_hooks(ours, module)
    return ours.train(module.training)


def _take_hooks(new: nn.Module, old: nn.Module) -> None:
    """The very containers, so that handles which remove a hook go on working."""
    vars(new).update({name: value for name, value in vars(old).items() if "_hooks" in name and name in vars(new)})


class _RelativePositions(nn.Module):
    """timm's `PosEmbedRel` with tensors of rank 4: q [B, H * W, C] -> logits [B, H * W, H * W], for each query and key the
    product of q with the entries for their distance in width and in height."""

    def __init__(self, height_rel: nn.Parameter, width_rel: nn.Parameter) -> None:
        super().__init__()
        self.height_rel, self.width_rel = height_rel, width_rel  # [2 H - 1, C], [2 W - 1, C]

    def forward(self, q: Tensor) -> Tensor:
        H, W = ((len(table) + 1) // 2 for table in (self.height_rel, self.width_rel))
        q = q.reshape(-1, H, W, q.shape[-1])
        by_width = _by_distance(q, self.width_rel).reshape(-1, H * W, 1, W)
        by_height = _by_distance(q.transpose(1, 2), self.height_rel).transpose(1, 2).reshape(-1, H * W, H, 1)
        return (by_width + by_height).reshape(-1, H * W, H * W)


def _by_distance(q: Tensor, table: Tensor) -> Tensor:
    """q [B, L, N, C], table [2 N - 1, C] -> [B, L, N, N]: of query i and key j, q_i times entry j - i + N - 1."""
    L, N = q.shape[1:3]
    products = (q @ table.T).reshape(-1, N, 2 * N - 1)
    # Row i is wanted from entry N - 1 - i on. Rows that are one entry longer, read as rows of the old length, begin one
    # entry earlier each time.
    skewed = F.pad(products, (0, 1)).reshape(-1, 2 * N * N)[:, : N * (2 * N - 1)].reshape(-1, N, 2 * N - 1)
    return skewed[..., N - 1 :].reshape(-1, L, N, N)


def _of_rank_four(module: nn.Module) -> nn.Module | None:
    """Ours around the layers of `module`, if that is self-attention or class attention of somebody's VOLO, or timm's
    relative positions."""
    if type(module).__name__ == "PosEmbedRel" and type(module).__module__ == "timm.layers.bottleneck_attn":
        positions = _RelativePositions(module.height_rel, module.width_rel)  # type: ignore[arg-type]
        _take_hooks(positions, module)
        return positions.train(module.training)
    # Other models have attention with the same attributes and other inputs, [B, N, C] instead of [B, H, W, C].
    if type(module).__module__.rpartition(".")[2] != "volo":
        return None
    kinds: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
        (SelfAttention, {"qkv": 3, "proj": 1}),
        (ClassAttention, {"kv": 2, "q": 1, "proj": 1}),
    )
    for kind, widths in kinds:
        layers = {name: getattr(module, name, None) for name in widths}
        if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
            continue
        dim, num_heads = layers["proj"].in_features, module.num_heads  # type: ignore[union-attr]
        if module.scale != (dim // num_heads) ** -0.5 or any(  # type: ignore[operator]
            layers[name].out_features != width * dim  # type: ignore[union-attr]
            for name, width in widths.items()
        ):
            return None
        with torch.device("meta"):  # the layers made here are thrown away
            ours = kind(
                dim,
                num_heads,
                attn_drop=_rate(getattr(module, "attn_drop", 0.0)),
                proj_drop=_rate(getattr(module, "proj_drop", 0.0)),
            )
        for name, layer in layers.items():
            setattr(ours, name, layer)
        _take_hooks(ours, module)
        return ours.train(module.training)
    return None


def _looks_like_outlook_attention(module: nn.Module) -> bool:
    named = _LOOKS.search(type(module).__name__) is not None and any(True for _ in module.children())
    return named or all(hasattr(module, name) for name in (*_ROLES, "kernel_size", "stride", "padding", "num_heads"))


def _only_linear(child: nn.Module) -> nn.Linear | None:
    """The Linear that `child` is, or is together with dropout."""
    inner = [m for m in child.children() if not isinstance(m, (nn.Dropout, nn.Identity))]
    if isinstance(child, nn.Sequential) and len(inner) == 1:
        child = inner[0]
    return child if isinstance(child, nn.Linear) else None


def _assignments(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, str]]:
    """Which of three Linear layers may be which, the likeliest first."""
    orders = sorted(itertools.permutations(layers), key=lambda names: names != tuple(n for n in _ROLES if n in layers))
    for v, attn, proj in orders:
        dim = layers[v].in_features
        if {layers[v].out_features, layers[attn].in_features, layers[proj].in_features, layers[proj].out_features} == {
            dim
        }:
            yield {"v": v, "attn": attn, "proj": proj}


def _geometries(module: nn.Module, value: nn.Linear, logits: nn.Linear) -> Iterator[_Geometry]:
    """What kernel, stride, padding, heads and scale may be, from attributes where they have the usual names."""

    def said(*names: str) -> Any:
        given = next((getattr(module, name) for name in names if hasattr(module, name)), None)
        if isinstance(given, (tuple, list)):
            if len(set(given)) != 1:
                raise ValueError(f"its {names[0]} is {given}, ours is the same in both directions")
            given = given[0]
        return given

    kernel, stride, padding = said("kernel_size", "kernel"), said("stride"), said("padding", "pad")
    heads, scale = said("num_heads", "heads"), said("scale")
    for K in (3, 5, 7) if kernel is None else (int(kernel),):
        count = logits.out_features // K**4
        if not count or logits.out_features != count * K**4 or value.in_features % count or heads not in (None, count):
            continue
        own_scale = (value.in_features // count) ** -0.5 if scale is None else float(scale)
        for s in (1, 2) if stride is None else (int(stride),):
            for channels_first in (False, True):
                p = (K - 1) // 2 if padding is None else int(padding)
                yield _Geometry(count, K, s, p, own_scale, channels_first)


def _difference(module: nn.Module, roles: Mapping[str, str], geometry: _Geometry) -> str | None:
    """None where `module` computes outlook attention in float64, with random weights; otherwise what differs."""
    name = type(module).__name__
    try:
        theirs = copy.deepcopy(module).to("cpu", torch.float64)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be copied, and so not be tried out: {error}") from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    for part in theirs.modules():
        for hooks in [value for key, value in vars(part).items() if "_hooks" in key and isinstance(value, dict)]:
            hooks.clear()
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    ours = _rebuilt(theirs, roles, geometry)
    ours.attn_drop = ours.proj_drop.p = 0.0
    C, s = theirs.get_submodule(roles["v"]), geometry.stride
    dim = next(C.parameters()).shape[1]
    for is_training in (False, True):
        # Sides that are multiples of the stride, other than the channels; then odd ones, if that module takes them.
        for H, W in ((3 * s, 5 * s), (7, 5)):
            x = torch.randn(2, H, W, dim, generator=generator, dtype=torch.float64)
            x = x.permute(0, 3, 1, 2) if geometry.channels_first else x
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                expected = ours.train(is_training)(x)
                try:
                    got = theirs.train(is_training)(x)
                except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                    if H % s == 0 and W % s == 0:
                        return f"{name} does not take {tuple(x.shape)} as outlook attention does: {str(error).splitlines()[0]}"
                    continue
            if not isinstance(got, Tensor) or got.shape != expected.shape:
                return (
                    f"{name} does not return what outlook attention does, {tuple(expected.shape)} from {tuple(x.shape)}"
                )
            difference = float((got - expected).abs().max() / expected.abs().max())
            if not difference < 1e-9:
                return f"{name} computes something else than outlook attention (relative difference {difference:.2g})"
    return None


def _rate(drop: object) -> float:
    return float(getattr(drop, "p", drop))  # type: ignore[arg-type]


class FastLinear(nn.Linear):
    """nn.Linear with the matrix product that is fastest on the processor at hand, in training too."""

    is_plain_linear = True  # for layers that use its parameters without calling it

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FastGELU(nn.GELU):
    """nn.GELU with the backward pass that is fastest on the processor at hand."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x) if self.approximate == "none" else super().forward(x)


def use_training_kernels(model: nn.Module) -> None:
    """Let the Linear and GELU modules inside `model` compute with the kernels for CPUs, in place.

    They stay the very modules: parameters, names, hooks and state dicts do not change. Models are built of plain nn.Linear
    and nn.GELU, so that tools which go by the exact type (quantisation, pruning, counters) find them.
    """
    for module in model.modules():
        if type(module) is nn.Linear and is_faster_than_pytorch():
            module.__class__ = FastLinear
        elif type(module) is nn.GELU:
            module.__class__ = FastGELU


class PackedLinear(nn.Linear):
    """A Linear for inference, and the GELU behind it if `gelu`: on a CPU it keeps a second copy of its weight, in the layout
    of oneDNN's matrix kernels. Wherever these cannot be used (see `volo.ops.linear`) it is a plain Linear (and GELU).

    Parameters are those of `linear`, shared. The copy is made at the first call, and again after the weight has changed.
    """

    is_plain_linear = True  # without a GELU

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(linear))  # parameters, hooks and mode
        self.gelu = gelu
        self._packed = PackedWeight()

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
    """Replace every Linear inside `model` by a `PackedLinear` around its parameters; GELUs of MLPs go into it. Outlook
    attention keeps the parameters of its logits as GPU kernels want them, too.

    Only plain ones: what others derived from nn.Linear (adapters, parametrizations) computes something else.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) in (nn.Linear, FastLinear):
                parent._modules[name] = PackedLinear(child)  # type: ignore[arg-type]
        if isinstance(parent, OutlookAttention):
            parent.keeps_packed = True
        if not isinstance(parent, Mlp) or type(parent.fc1) is not PackedLinear:
            continue
        if type(parent.act) in (nn.GELU, FastGELU) and parent.act.approximate == "none":
            parent.fc1.gelu = True
            parent._modules["act"] = nn.Identity()
