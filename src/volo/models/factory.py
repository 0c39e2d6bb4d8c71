"""Models by name: with random weights, with published ones, or with those of a file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from volo.config import nearest
from volo.models.checkpoint import find_checkpoint
from volo.models.hub import OWN, PRETRAINED, WEIGHTS, fetch, known_tag, list_pretrained
from volo.models.loading import load_weights, read_file, state_dict_in
from volo.models.segmenter import HEAD_DEFAULTS, Segmenter, SegmenterConfig
from volo.models.volo import VARIANTS, VOLO, VOLOConfig

logger = logging.getLogger(__name__)


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return sorted(VARIANTS)


def list_segmenters() -> list[str]:
    """Names that `create_segmenter` takes: every head with every variant of VOLO."""
    return sorted(f"{head}_{variant}" for head in HEAD_DEFAULTS for variant in VARIANTS)


def create_model(name: str, pretrained: bool | str | Path = False, **overrides: Any) -> VOLO:
    """Build a VOLO.

    Image size, classes and input channels are those of the weights, where there are any. Overrides of `img_size`,
    `num_classes` and `in_chans` adapt position embedding, heads and stem to them.

    Args:
        name: one of `list_models()`.
        pretrained: False for random weights; True (or "pretrained") for our own weights (volo_nano, volo_tiny), else the
            published ones of `name` (at `img_size`, or at 224 where none are published at that size); a tag such as "volo_d1.384"; or a run folder or the path of a weight file.
        **overrides: fields of `VOLOConfig`: num_classes, img_size (int or (H, W)), in_chans, patch_size, depths,
            embed_dims, num_heads, mlp_ratios, stem_dim, outlook_kernel, outlook_stride, drop_path_rate, ...

    Raises ValueError for an unknown name or override, naming the nearest known one, for weights of another model or an
    unknown tag; DownloadError if published weights cannot be had.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}{nearest(name, VARIANTS)} (known: {', '.join(list_models())})")
    _check_options(name, overrides, _fields(VOLOConfig))
    if not pretrained:
        return VOLO(dataclasses.replace(VARIANTS[name], **overrides))
    content, origin = _read_pretrained(name, pretrained, overrides)
    return _with_weights(name, content, origin, overrides)


def create_segmenter(name: str, num_classes: int, pretrained: bool | str | Path = False, **overrides: Any) -> Segmenter:
    """Build a VOLO that gives every pixel a class.

    Args:
        name: one of `list_segmenters()`, for example "upernet_volo_d1".
        num_classes: classes a pixel can have.
        pretrained: False for random weights. Weights of classification go into the backbone: True (published ones at
            224, or at `img_size` where there are some), a tag such as "volo_d1.384", or the path of a checkpoint;
            class attention and heads are left out. The path of a segmentation checkpoint of ours fills the decoder as
            well; classifiers stay random where it has another number of classes.
        **overrides: fields of `SegmenterConfig` (channels, aux_channels, ...) or of `VOLOConfig` (img_size, patch_size,
            drop_path_rate, ...). `img_size` is what the position embedding is made for: the crop size of the training.

    Images may have any size: they are padded at the right and bottom to whole tokens, unless pad_input=False.
    Raises ValueError for an unknown name or override (naming the nearest), or weights of another model.
    """
    if name not in list_segmenters():
        raise ValueError(
            f"unknown segmentation model {name!r}{nearest(name, list_segmenters())} (known: {', '.join(list_segmenters())})"
        )
    head, _, variant = name.partition("_")
    own, inner = _fields(SegmenterConfig) - {"backbone", "head", "num_classes"}, _fields(VOLOConfig) - {"num_classes"}
    _check_options(name, overrides, own | inner)
    head_options = HEAD_DEFAULTS[head] | {k: v for k, v in overrides.items() if k in own}
    backbone_options = {"pad_input": True} | {k: v for k, v in overrides.items() if k in inner}
    config = SegmenterConfig(
        backbone=dataclasses.replace(VARIANTS[variant], num_classes=0, **backbone_options),
        num_classes=num_classes,
        head=head,
        **head_options,
    )
    if not pretrained:
        return Segmenter(config)
    content, origin = _read_pretrained(variant, pretrained, backbone_options)
    if holds_segmenter(content):
        model = Segmenter(config)
        try:
            report = load_weights(model, state_dict_in(content, origin), adapt_pos_embed=True, adapt_head=True)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
        logger.info("%s from %s: %s", name, origin, report)
        return model
    backbone = _with_weights(variant, content, origin, backbone_options | {"num_classes": 0})
    return Segmenter(dataclasses.replace(config, backbone=backbone.config), backbone)


def model_of_shapes(
    state_dict: Mapping[str, Tensor], origin: str, *, device: torch.device | str = "cpu"
) -> tuple[str, VOLO]:
    """The model of weights that do not say what they are of (the original's, timm's, a plain state dict), and its name.

    It is the one of `VARIANTS`, with its own options, that has these names and shapes. Image size, classes and input
    channels are those of the weights; on the device "meta" it is the architecture alone. Raises ValueError where there is
    none.
    """
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    for name, variant in VARIANTS.items():
        with torch.device("meta"):  # the weights follow; drawing random ones would only take time
            model = VOLO(dataclasses.replace(variant, **_sizes_in(state_dict, variant)))
        if {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes:
            if torch.device(device).type != "meta":
                copies = {name: tensor.to(device, tensor.dtype, copy=True) for name, tensor in state_dict.items()}
                model.load_state_dict(copies, assign=True)
            return name, model.float()
    raise ValueError(
        f"{origin} holds {len(shapes)} tensors ({', '.join(list(shapes)[:3])}, ...), which by names and shapes are none of "
        f"{', '.join(VARIANTS)} with their own options. Other models are known by the checkpoints of `volo train`; in "
        "Python, volo.create_model(name, pretrained=path, **options) loads them"
    )


def holds_segmenter(content: Any) -> bool:
    """Whether what `read_file` gave says that it is a segmentation model of ours."""
    config = content.get("model_config") if isinstance(content, Mapping) else None
    return isinstance(config, Mapping) and "backbone" in config


def _fields(config: type) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}


def _check_options(name: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{nearest(key, known)} (known: {', '.join(sorted(known))})")


def _read_pretrained(name: str, pretrained: bool | str | Path, overrides: Mapping[str, Any]) -> tuple[Any, str]:
    """What the file of the weights holds, and what to call it."""
    given = str(pretrained)
    tags = list_pretrained(name)
    if pretrained is True or given == "pretrained":
        if not tags:
            variants = sorted({weights.variant for weights in PRETRAINED.values()})
            raise ValueError(
                f"no weights of {name} are published, only of {', '.join([*OWN, *variants])}; "
                "give pretrained the path of a checkpoint"
            )
        if name in OWN:
            return read_file(fetch(name)), f"the weights of {name}"
        size = dataclasses.replace(VARIANTS[name], **overrides).img_size
        given = f"{name}.{size[0]}" if size[0] == size[1] and f"{name}.{size[0]}" in tags else f"{name}.224"
    if given not in PRETRAINED and Path(given).exists():
        saved = Path(given) / WEIGHTS  # of save_pretrained
        path = saved if saved.is_file() else find_checkpoint(given)
        return read_file(path), str(path)
    if given == name and name in OWN:
        return read_file(fetch(name)), f"the weights of {name}"
    weights = known_tag(given)
    if weights.variant != name:
        raise ValueError(
            f"{given} are weights of {weights.variant}, not of {name}{nearest(given, tags)} "
            f"(tags of {name}: {', '.join(tags) or 'none'})"
        )
    return read_file(fetch(given)), given


# What the weights of a model depend on; the rest of a VOLOConfig is free, or adapted.
_ARCHITECTURE = (
    "depths", "embed_dims", "num_heads", "mlp_ratios", "stem_dim", "stem_stride", "patch_size", "outlook_kernel",
    "outlook_stride", "window_padding", "num_class_blocks", "qkv_bias", "norm_eps",
)  # fmt: skip


def _with_weights(name: str, content: Any, origin: str, overrides: Mapping[str, Any]) -> VOLO:
    state_dict = state_dict_in(content, origin)
    asked = dataclasses.replace(VARIANTS[name], **overrides)
    stored = content.get("model_config") if isinstance(content, Mapping) else None
    if isinstance(stored, Mapping):
        try:
            own = VOLOConfig(**stored)
        except TypeError as error:
            raise ValueError(f"{origin} was written by another version of volo: {error}") from error
        pairs = {field: (getattr(own, field), getattr(asked, field)) for field in _ARCHITECTURE}
        if differing := [f"{field} is {its}, not {ours}" for field, (its, ours) in pairs.items() if its != ours]:
            raise ValueError(
                f"{origin} holds another model than {name}: its {', its '.join(differing)}. Ask for that model: options in Python, "
                "--model.options.NAME VALUE for volo train"
            )
    else:
        own = dataclasses.replace(asked, **_sizes_in(state_dict, asked))
    model = VOLO(dataclasses.replace(own, **overrides))
    report = load_weights(
        model,
        state_dict,
        adapt_pos_embed="img_size" in overrides,
        adapt_head="num_classes" in overrides or "pool" in overrides,
        adapt_stem="in_chans" in overrides,
    )
    logger.info("%s from %s: %s", name, origin, report)
    return model


def _sizes_in(state_dict: Mapping[str, Tensor], config: VOLOConfig) -> dict[str, Any]:
    """The fields of the configuration that the shapes of the weights tell."""
    sizes: dict[str, Any] = {"num_classes": len(state_dict["head.weight"]) if "head.weight" in state_dict else 0}
    heads = [state_dict.get(f"{name}.weight") for name in ("head", "aux_head")]
    if all(head is not None and head.dim() == 2 for head in heads) and heads[0].shape[1] == 3 * heads[1].shape[1]:  # type: ignore[union-attr]
        sizes["pool"] = "concat"
    if (pos_embed := state_dict.get("pos_embed")) is not None and pos_embed.dim() == 4:
        sizes["img_size"] = tuple(n * config.size_multiple for n in pos_embed.shape[1:3])
    if (stem := state_dict.get("patch_embed.conv.0.weight")) is not None and stem.dim() == 4:
        sizes["in_chans"] = stem.shape[1]
    return sizes
