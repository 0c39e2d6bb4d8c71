"""Small models, and a recipe of one, for tests of exported files and of the command line."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from volo.models.factory import create_model
from volo.models.volo import VOLO


def decided_volo(num_classes: int, **options: object) -> VOLO:
    """A tiny VOLO for images of 16 px whose weights are large enough for answers that differ from image to image."""
    torch.manual_seed(0)
    model = create_model("volo_nano", num_classes=num_classes, img_size=16, **options).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.25)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.05, 0.2)
    return model


def centred(model: VOLO, images: torch.Tensor) -> VOLO:
    """`model`, changed so that no class is everybody's answer to `images`."""
    with torch.no_grad():
        for head in (model.head, model.aux_head):
            head.weight.mul_(5)  # type: ignore[union-attr, operator]
        model.head.bias.sub_(model(images).mean(0))  # type: ignore[union-attr, operator]
    return model


def with_one_weight_changed(prepare: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`volo.deploy.program.prepare` that goes wrong: what is written then is another model."""

    def changed(model: nn.Module, **how: bool) -> nn.Module:
        copy = prepare(model, **how)
        with torch.no_grad():
            copy.head.bias[1] += 0.1  # type: ignore[union-attr, operator, index]
        return copy

    return changed


def segmenter_recipe(height: int, width: int) -> str:
    """A recipe, in TOML, of a segmenter that 20 steps teach a little."""
    return f"""
task = "segment"
[model]
name = "fpn_volo_nano"
[model.options]
depths = [1, 1]
embed_dims = [16, 32]
num_heads = [1, 2]
stem_dim = 8
channels = 16
[data]
img_size = [{height}, {width}]
num_workers = 0
[optim]
lr = 5e-3
[schedule]
steps = 20
warmup_steps = 2
[train]
batch_size = 4
threads = 1
device = "cpu"
tensorboard = false
eval_steps = 10
"""
