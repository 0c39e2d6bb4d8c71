"""VOLO, from images to logits, in the order of the paper (arXiv 2106.13112, section 3 and Table 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from volo.layers import ClassBlock, Downsample, Outlooker, PatchEmbed, Transformer
from volo.models.fuse import pack_linear_layers
from volo.ops import portable
from volo.ops.dispatch import is_exporting
from volo.ops.outlook_attention import window_grid


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _listed(value: Any) -> tuple[Any, ...]:
    """Options come from TOML, from JSON and from callers: a list or tuple as a tuple, anything else as an empty one."""
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else _listed(value)
    if len(pair) != 2 or not all(_is_whole(v, 1) for v in pair):
        raise ValueError(f"{name} is a positive int or (height, width); given: {value!r}")
    return int(pair[0]), int(pair[1])


def _per_stage(value: Sequence[Any], name: str, num_groups: int) -> tuple[Any, Any]:
    """(stage 1, stage 2) from that pair, or from one entry a block group as the original code writes it."""
    pair = _listed(value)
    if len(pair) == num_groups and all(value == pair[1] for value in pair[1:]):
        pair = (pair[0], pair[1])
    if len(pair) != 2:
        raise ValueError(
            f"{name} is (stage 1, stage 2), or one entry for each of the {num_groups} depths with all but the first equal; given: {value!r}"
        )
    return pair  # type: ignore[return-value]


# Whole numbers of a VOLOConfig, and the least they can be.
_WHOLE = {
    "stem_dim": 1, "stem_stride": 1, "patch_size": 1, "outlook_kernel": 1, "outlook_stride": 1, "num_class_blocks": 0,
    "in_chans": 1, "num_classes": 0,
}  # fmt: skip


@dataclass(frozen=True)
class VOLOConfig:
    """Everything that shapes a VOLO. `VOLO(VOLOConfig(**dataclasses.asdict(model.config)))` rebuilds a model."""

    depths: tuple[int, ...] = (4, 4, 8, 2)
    """Outlookers, then the groups of transformer blocks."""
    embed_dims: tuple[int, int] = (192, 384)
    """Channels of stage 1 (outlookers) and stage 2 (transformers)."""
    num_heads: tuple[int, int] = (6, 12)
    mlp_ratios: tuple[float, float] = (3.0, 3.0)
    stem_dim: int = 64
    stem_stride: int = 2
    """Stride of the first convolution."""
    patch_size: int = 8
    """Pixels of a stage-1 token; a stage-2 token has twice that."""
    outlook_kernel: int = 3
    outlook_stride: int = 2
    outlook_padding: int | None = None
    """None: (outlook_kernel - 1) // 2, so that the windows are centred."""
    num_class_blocks: int = 2
    img_size: tuple[int, int] = (224, 224)
    """Size the position embedding is made for; other sizes run too, with the embedding resampled."""
    in_chans: int = 3
    num_classes: int = 1000
    """0: no heads; the model returns the features that the class head would see."""
    pool: Literal["token", "concat"] = "token"
    """What the class head sees: the class token, as in the paper; or class token, mean and maximum of the other tokens, one
    after another, which serves small networks on new classes better (`volo train photos_probe`)."""
    qkv_bias: bool = False
    drop_rate: float = 0.0
    """Dropout in the MLPs and after the projections, and before the heads."""
    pos_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    """Stochastic depth of the last transformer block, rising linearly from the first block."""
    outlooker_drop_path: bool = False
    """Let outlookers take part in stochastic depth; the original counts them in the schedule but leaves them out."""
    pad_input: bool = False
    """Pad images at the right and bottom to the next legal size instead of refusing them."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)  # the way to normalise fields of a frozen dataclass
        depths = _listed(self.depths)
        if len(depths) < 2 or not all(_is_whole(depth, 0) for depth in depths):
            raise ValueError(
                f"depths is (outlookers, transformers, ...) with at least two whole numbers, none negative; given: {self.depths!r}"
            )
        # Here and below: a NumPy integer would not be opened again with the weights.
        put("depths", tuple(map(int, depths)))
        for name in ("embed_dims", "num_heads", "mlp_ratios"):
            put(name, _per_stage(getattr(self, name), name, len(self.depths)))
        for name in ("embed_dims", "num_heads"):
            if not all(_is_whole(value, 1) for value in getattr(self, name)):
                raise ValueError(f"{name} is a pair of whole numbers, at least 1; given: {getattr(self, name)}")
            put(name, tuple(map(int, getattr(self, name))))
        if any(dim % heads for dim, heads in zip(self.embed_dims, self.num_heads)):
            raise ValueError(
                f"each of embed_dims is a multiple of num_heads; given: embed_dims={self.embed_dims}, num_heads={self.num_heads}"
            )
        if not all(_is_number(ratio) and ratio > 0 for ratio in self.mlp_ratios):
            raise ValueError(f"mlp_ratios is a pair of numbers above 0; given: {self.mlp_ratios}")
        for name, least in _WHOLE.items():
            if not _is_whole(getattr(self, name), least):
                raise ValueError(f"{name} is a whole number, at least {least}; given: {getattr(self, name)!r}")
            put(name, int(getattr(self, name)))
        for name in ("drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_path_rate"):
            rate = getattr(self, name)
            if not _is_number(rate) or not 0 <= rate < 1:
                raise ValueError(f"{name} is a probability, from 0 to below 1; given: {rate!r}")
        for name in ("qkv_bias", "outlooker_drop_path", "pad_input"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is true or false; given: {getattr(self, name)!r}")
        if not _is_number(self.norm_eps) or self.norm_eps <= 0:
            raise ValueError(f"norm_eps is a number above 0; given: {self.norm_eps!r}")
        if self.pool not in ("token", "concat"):
            raise ValueError(f'pool is "token" or "concat"; given: {self.pool!r}')
        put("img_size", _pair(self.img_size, "img_size"))
        if self.patch_size not in (2, 4, 8, 16) or self.patch_size % self.stem_stride:
            raise ValueError(
                f"patch_size is 2, 4, 8 or 16 and a multiple of stem_stride ({self.stem_stride}); given: {self.patch_size}"
            )
        if not self.pad_input and any(size % self.size_multiple for size in self.img_size):
            raise ValueError(_size_message(self.img_size, self.size_multiple))
        padding = self.outlook_padding
        if padding is not None and not (_is_whole(padding, 0) and padding < self.outlook_kernel):
            raise ValueError(
                f"outlook_padding is None or a whole number from 0 to outlook_kernel - 1 = {self.outlook_kernel - 1}; given: {padding!r}"
            )
        H, W = (2 * side for side in self.grid_size)
        stride = self.outlook_stride
        windows = window_grid(H, W, self.outlook_kernel, stride, self.window_padding)
        if windows != (-(-H // stride), -(-W // stride)):
            raise ValueError(
                f"outlook_kernel={self.outlook_kernel}, outlook_stride={stride}, outlook_padding={self.window_padding} give "
                f"{windows} windows on the {H} x {W} tokens of stage 1, but one every {stride} tokens, "
                f"{(-(-H // stride), -(-W // stride))}, is needed; an odd kernel with outlook_padding=None always fits"
            )

    @property
    def window_padding(self) -> int:
        """Tokens that the first window reaches over the edge."""
        return (self.outlook_kernel - 1) // 2 if self.outlook_padding is None else self.outlook_padding

    @property
    def size_multiple(self) -> int:
        """Height and width of an image are multiples of this many pixels."""
        return self.patch_size * 2

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of stage-2 tokens at `img_size`, padded if need be."""
        return -(-self.img_size[0] // self.size_multiple), -(-self.img_size[1] // self.size_multiple)


# Paper, Table 2. The drop path rates are those of training at 224; weights do not depend on them.
VARIANTS: dict[str, VOLOConfig] = {
    "volo_d1": VOLOConfig(),
    "volo_d2": VOLOConfig(depths=(6, 4, 10, 4), embed_dims=(256, 512), num_heads=(8, 16)),
    "volo_d3": VOLOConfig(depths=(8, 8, 16, 4), embed_dims=(256, 512), num_heads=(8, 16)),
    "volo_d4": VOLOConfig(depths=(8, 8, 16, 4), embed_dims=(384, 768), num_heads=(12, 16)),
    "volo_d5": VOLOConfig(
        depths=(12, 12, 20, 4), embed_dims=(384, 768), num_heads=(12, 16), mlp_ratios=(4.0, 4.0), stem_dim=128
    ),
    # Ours, for less compute.
    "volo_small": VOLOConfig(depths=(3, 3, 5, 1), embed_dims=(160, 320), num_heads=(5, 10)),
    "volo_tiny": VOLOConfig(
        depths=(2, 2, 3, 1), embed_dims=(128, 256), num_heads=(4, 8), stem_dim=32, num_class_blocks=1, img_size=(64, 64)
    ),
    "volo_nano": VOLOConfig(
        depths=(2, 3), embed_dims=(96, 160), num_heads=(3, 5), stem_dim=24, num_class_blocks=1, img_size=(64, 64)
    ),
}

# Stochastic depth the paper trains each variant with.
DROP_PATH_RATES = {"volo_d1": 0.1, "volo_d2": 0.2, "volo_d3": 0.5, "volo_d4": 0.5, "volo_d5": 0.75}


class VOLO(nn.Module):
    """Vision Outlooker: `forward(images [B, in_chans, H, W]) -> logits [B, num_classes]`, the same in train and eval.

    logits = head(class token) + 0.5 * max over tokens of aux_head(token). With num_classes = 0 the features of the
    class token [B, C] are returned instead. With pool = "concat" the head sees [B, 3 C]: class token, mean and maximum of
    the other tokens.

    Height and width may be any multiple of `config.size_multiple` (16 for D1-D5); other sizes raise ValueError, or are
    padded if `config.pad_input` is set.
    """

    def __init__(self, config: VOLOConfig = VOLOConfig()) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.grad_checkpointing = False
        dim1, dim2 = config.embed_dims
        self.num_features = dim2

        self.patch_embed = PatchEmbed(config.in_chans, config.stem_dim, config.patch_size, dim1, config.stem_stride)
        # The original's schedule runs over all blocks, the outlookers included.
        num_blocks = sum(config.depths)
        rates = [config.drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        outlookers = nn.Sequential(
            *(
                Outlooker(
                    dim1,
                    config.num_heads[0],
                    config.outlook_kernel,
                    config.outlook_stride,
                    config.window_padding,
                    config.mlp_ratios[0],
                    config.qkv_bias,
                    config.attn_drop_rate,
                    config.drop_rate,
                    rates[i] if config.outlooker_drop_path else 0.0,
                    config.norm_eps,
                )
                for i in range(config.depths[0])
            )
        )
        groups, first = [], config.depths[0]
        for depth in config.depths[1:]:
            blocks = (
                Transformer(
                    dim2,
                    config.num_heads[1],
                    config.mlp_ratios[1],
                    config.qkv_bias,
                    config.attn_drop_rate,
                    config.drop_rate,
                    rates[first + i],
                    config.norm_eps,
                )
                for i in range(depth)
            )
            groups.append(nn.Sequential(*blocks))
            first += depth
        self.network = nn.ModuleList([outlookers, Downsample(dim1, dim2), *groups])
        self.pos_embed = nn.Parameter(torch.zeros(1, *config.grid_size, dim2))
        self.pos_drop = nn.Dropout(config.pos_drop_rate)

        cls_token = nn.Parameter(torch.zeros(1, 1, dim2))
        self.cls_token: nn.Parameter | None = cls_token
        self.post_network = nn.ModuleList(
            ClassBlock(
                dim2,
                config.num_heads[1],
                config.mlp_ratios[1],
                config.qkv_bias,
                config.attn_drop_rate,
                config.drop_rate,
                config.norm_eps,
            )
            for _ in range(config.num_class_blocks)
        )
        self.norm: nn.Module = nn.LayerNorm(dim2, eps=config.norm_eps)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head: nn.Module
        self.aux_head: nn.Module
        self._make_heads(config.num_classes)

        self.feature_info: list[dict[str, Any]] = [
            {
                "num_chs": dim1 if level == 0 else dim2,
                "reduction": config.patch_size if level == 0 else config.size_multiple,
                "module": f"network.{0 if level == 0 else level + 1}",
            }
            for level in range(len(config.depths))
        ]
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(cls_token, std=0.02)
        self.apply(_init_weights)

    def _make_heads(self, num_classes: int) -> None:
        width = self.num_features * (3 if self.config.pool == "concat" else 1)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    # From images to tokens

    def forward_embed(self, images: Tensor) -> Tensor:
        """Stem: images [B, in_chans, H, W] -> fine tokens [B, H / patch_size, W / patch_size, C1]."""
        H, W = images.shape[-2:]
        m = self.config.size_multiple
        if H % m or W % m:
            if not self.config.pad_input:
                raise ValueError(_size_message((H, W), m))
            images = F.pad(images, (0, -W % m, 0, -H % m))
        tokens = self.patch_embed(images)
        if is_exporting():  # the same shape in other words, which say that an even number of tokens comes at every size
            tokens = tokens[:, : 2 * (H // m), : 2 * (W // m)]
        return tokens

    def forward_tokens(self, fine: Tensor) -> Tensor:
        """Everything after the stem: fine tokens [B, 2h, 2w, C1] -> normalised [B, 1 + h*w, C2], class token first."""
        return self._attend_class(self._run_stages(fine)[-1])

    def forward_features(self, images: Tensor) -> Tensor:
        """images [B, in_chans, H, W] -> normalised tokens [B, 1 + h*w, C2], class token first."""
        return self.forward_tokens(self.forward_embed(images))

    def _run_stages(self, fine: Tensor) -> list[Tensor]:
        """The feature map after the outlookers and after each group of transformers, as [B, H, W, C]."""
        outlookers, downsample, *groups = self.network
        maps = [self._run_group(outlookers, fine)]
        x = downsample(maps[0])
        x = self.pos_drop(x + self._pos_embed_for(x.shape[1], x.shape[2]))
        for group in groups:
            x = self._run_group(group, x)
            maps.append(x)
        return maps

    def _attend_class(self, tokens: Tensor) -> Tensor:
        """Last feature map [B, h, w, C2] -> normalised [B, 1 + h*w, C2], class token first."""
        if self.cls_token is None:
            raise ValueError(
                "this VOLO is a backbone whose class attention was removed: it has feature maps alone. "
                "Call forward_intermediates(images, intermediates_only=True)"
            )
        B, h, w, C = tokens.shape
        x = torch.cat([self.cls_token.expand(B, -1, -1), tokens.reshape(B, h * w, C)], dim=1)
        for block in self.post_network:
            x = self._run_block(block, x)
        return self.norm(x)

    def _run_group(self, group: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return group(x)  # as one call, so that hooks on the modules of `feature_info` fire
        for block in group.children():
            x = self._run_block(block, x)
        return x

    def _run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _pos_embed_for(self, height: int, width: int) -> Tensor:
        """The position embedding [1, height, width, C2], resampled if that is not the grid it was made for."""
        made_for = self.pos_embed.shape[1:3]
        if is_exporting() and (
            # Comparing a symbol with a number would fix it.
            any(isinstance(n, torch.SymInt) for n in (height, width)) or (height, width) != tuple(made_for)
        ):
            return portable.resample_pos_embed(self.pos_embed, height, width)
        if (height, width) == tuple(made_for):
            return self.pos_embed
        return resample_pos_embed(self.pos_embed, (height, width))

    # From tokens to logits

    def pool(self, features: Tensor, pool: Literal["token", "concat"] | None = None) -> Tensor:
        """features [B, 1 + N, C2] -> what the class head sees: the class token [B, C2], or [B, 3 C2] by `config.pool`,
        or by `pool` where that is given."""
        if (pool or self.config.pool) == "token":
            return features[:, 0]
        tokens = features[:, 1:]
        return torch.cat([features[:, 0], tokens.mean(dim=1), tokens.amax(dim=1)], dim=1)

    def class_and_token_logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, 1 + N, C2] -> class logits [B, num_classes] and token logits [B, N, num_classes]."""
        features = self.head_drop(features)
        return self.head(self.pool(features)), self.aux_head(features[:, 1:])

    def combine_logits(self, class_logits: Tensor, token_logits: Tensor) -> Tensor:
        """The prediction: class logits + 0.5 * the maximum over tokens, per class; [B, num_classes]."""
        return class_logits + 0.5 * token_logits.amax(dim=1)

    def forward_head(self, features: Tensor) -> Tensor:
        """features [B, 1 + N, C2] -> logits [B, num_classes]; what `pool` gives if num_classes is 0."""
        if self.num_classes == 0:
            return self.pool(features)
        return self.combine_logits(*self.class_and_token_logits(features))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    # What users of timm know

    @overload
    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...
    @overload
    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] | None = None, *, intermediates_only: Literal[True]
    ) -> list[Tensor]: ...
    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Features and the feature maps of the levels in `feature_info`, as [B, C, H, W].

        Args:
            images: [B, in_chans, H, W].
            indices: levels to return; an int n means the last n; None all of them.
            intermediates_only: return the maps alone; class attention is not computed.

        Returns:
            (`forward_features(images)`, list of maps); strides are `feature_info[i]["reduction"]`.
        """
        num_levels = len(self.feature_info)
        if indices is None:
            indices = num_levels
        levels = [i - indices for i in range(indices)] if isinstance(indices, int) else list(indices)
        if not levels or not all(-num_levels <= i < num_levels for i in levels):
            raise ValueError(
                f"indices are levels 0 to {num_levels - 1}, or how many (1 to {num_levels}); given: {indices}"
            )
        maps = self._run_stages(self.forward_embed(images))
        chosen = [maps[i].permute(0, 3, 1, 2) for i in levels]
        return chosen if intermediates_only else (self._attend_class(maps[-1]), chosen)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, pool: Literal["token", "concat"] | None = None) -> None:
        """New, randomly initialised heads (class and aux); 0 removes both, and `forward` returns features, [B, C2] or, with
        pool "concat", [B, 3 C2].

        pool: what the class head sees from now on; None: as before. Raises ValueError for what they cannot be.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is 0 or more; given: {num_classes}")
        reference = self.pos_embed
        self.num_classes = num_classes
        self.config = dataclasses.replace(self.config, num_classes=num_classes, pool=pool or self.config.pool)
        self._make_heads(num_classes)
        for head in (self.head, self.aux_head):
            head.apply(_init_weights)
            head.to(device=reference.device, dtype=reference.dtype)

    def remove_class_attention(self) -> None:
        """Drop class token, class blocks, last norm and heads, which dense tasks have no use for.

        What remains is `forward_intermediates(images, intermediates_only=True)`. Every parameter left takes part in it,
        as training in several processes demands.
        """
        if self.num_classes:
            self.reset_classifier(0)
        self.cls_token = None
        self.post_network = nn.ModuleList()
        self.norm = nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def fuse_for_inference(self) -> VOLO:
        """Fold the stem's BatchNorms into its convolutions, lay these out channels-last, and let the Linear layers keep
        their weights as a CPU's matrix kernels want them (`volo.models.fuse.PackedLinear`); returns the model itself.

        Outputs stay the same up to rounding. The state dict afterwards is that of the folded layers, and the model is
        no longer meant to be trained. Raises ValueError in training mode, where the running statistics do not hold.
        """
        if self.training:
            raise ValueError("fuse_for_inference folds running statistics: call model.eval() first")
        self.patch_embed.fold_batch_norm()
        pack_linear_layers(self)
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone (besides biases and norms)."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, in the form that timm's layer decay takes."""
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^network\.(\d+)" if coarse else r"^network\.(\d+)\.(\d+)", None),
                (r"^network\.1\.proj|^pos_embed", (1,)),
            ],
            "class_blocks": [
                (r"^cls_token", (0,)),
                (r"^post_network" if coarse else r"^post_network\.(\d+)", (0,) if coarse else None),
                (r"^norm", (99999,)),  # timm's sign for: together with the layer before
            ],
        }


def resample_pos_embed(pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, H, W, C] -> [1, *size, C], bicubic, antialiased where it shrinks; computed in float32."""
    H, W = pos_embed.shape[1:3]
    shrinks = size[0] < H or size[1] < W
    # One axis after the other, as matrix products: several times as fast as interpolating all channels.
    rows, columns = (_interpolation(n, m, shrinks, pos_embed.device) for n, m in zip((H, W), size))
    device = "cpu" if pos_embed.device.type == "meta" else pos_embed.device.type
    with torch.autocast(device, enabled=False):
        grid = (rows @ pos_embed[0].float().flatten(1)).unflatten(1, (W, -1))  # [h, W, C]
        return (columns @ grid)[None].to(pos_embed.dtype)


def _interpolation(length: int, new_length: int, antialias: bool, device: torch.device) -> Tensor:
    """What bicubic interpolation multiplies an axis by: [new_length, length]."""
    unit = torch.eye(length, device=device)[None, None]
    return F.interpolate(unit, size=(new_length, length), mode="bicubic", antialias=antialias)[0, 0]


def _size_message(size: tuple[int, int], multiple: int) -> str:
    legal = tuple(-(-s // multiple) * multiple for s in size)
    return (
        f"images must have height and width in multiples of {multiple} pixels; given: {size[0]} x {size[1]}. "
        f"The next legal size is {legal[0]} x {legal[1]}: resize to it, or set pad_input=True"
    )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
