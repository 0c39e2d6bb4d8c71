"""What an annotator is and how long it takes, without its weights: a plan downloads nothing.

Shapes follow from the architecture, on torch's meta device; a forward pass with random weights takes as long as any.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from volo.annotation.annotator import Annotator, draw_label_maps, load_timm_classifier
from volo.config import AnnotatorConfig, Recipe, Size
from volo.data.transforms import height_width
from volo.inference.evaluate import AMP_DTYPES
from volo.inference.model_source import load
from volo.models.factory import create_model
from volo.models.hub import PRETRAINED
from volo.models.volo import VOLO
from volo.training.memory import free_bytes, is_out_of_memory
from volo.training.pipeline import annotator_recipe
from volo.training.workloads.classification import build_model

MOST_PARAMETERS = 500_000_000
"""A larger annotator is not tried out."""
ENOUGH_SECONDS = 1.0
"""Batches grow until one of them takes so long."""


@dataclass(frozen=True)
class AnnotatorOutline:
    """An annotator without its weights."""

    build: Callable[[], nn.Module]
    """A classifier of that architecture, on the meta device or with random weights."""
    img_size: tuple[int, int]
    """Of the pictures it sees, in pixels."""
    grid: tuple[int, int]
    """Positions of its maps, rows and columns."""
    num_classes: int
    num_parameters: int


def outline_annotator(recipe: Recipe, num_classes: int, is_there: bool) -> AnnotatorOutline | None:
    """The annotator of a recipe, by the same names as `volo.annotation.drawing.open_annotator`; None for an architecture that
    tells nothing without its weights, since it looks at values.

    is_there: it is `annotator.model`; else it will be trained by `annotator.recipe`, for `num_classes` classes.

    Raises ValueError, FileNotFoundError for names and files that nothing stands behind.
    """
    name, size = recipe.annotator.model, recipe.annotator.img_size or None
    build: Callable[[], nn.Module]
    native: Size | None
    if not is_there:
        its = annotator_recipe(recipe)
        its = dataclasses.replace(its, model=dataclasses.replace(its.model, weights=""))
        build, native = lambda: build_model(its, num_classes), its.data.img_size
    elif Path(name).exists():
        ours = load(name, task="classify", device="meta")
        config = ours.model.config
        build, native = lambda: VOLO(config), ours.preprocessing.img_size
    elif name in PRETRAINED or f"{name}.224" in PRETRAINED:
        published = PRETRAINED[name if name in PRETRAINED else f"{name}.224"]
        build = lambda: create_model(published.variant, img_size=published.img_size)  # noqa: E731
        native = published.img_size
    else:
        outline = lambda: load_timm_classifier(name, "", img_size=size)  # noqa: E731
        build, native = lambda: outline().model, None
    try:
        with torch.device("meta"), torch.no_grad():
            height, width = height_width(size or native or outline().img_size)
            annotator = Annotator(build()).eval()
            rows, columns = annotator.features(torch.zeros(1, 3, height, width))[0].shape[1:3]
    except RuntimeError:
        return None
    num_parameters = sum(p.numel() for p in annotator.parameters())
    return AnnotatorOutline(build, (height, width), (rows, columns), annotator.num_classes, num_parameters)


def seconds_a_picture(
    outline: AnnotatorOutline, config: AnnotatorConfig, device: torch.device
) -> tuple[float | None, str]:
    """Seconds that a picture takes the annotator of one process, its mirror image included; or None, and why."""
    size = 4 * outline.num_parameters
    free = free_bytes(device)
    if outline.num_parameters > MOST_PARAMETERS:
        return None, f"an annotator of {outline.num_parameters / 1e6:.0f} M parameters is too large to be tried out"
    if free is not None and 2 * size > free:
        return None, f"memory is too small to try out an annotator of {size / 1e9:.1f} GB"
    try:
        annotator = Annotator(outline.build()).to(device).eval()
        return _try_batches(annotator, outline, config, device), ""
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None, "memory is too small to try out the annotator"


def _try_batches(
    annotator: Annotator, outline: AnnotatorOutline, config: AnnotatorConfig, device: torch.device
) -> float:
    """Of batches of 1, 2, 4, ... pictures the least seconds a picture."""
    best, pictures, top = float("inf"), 1, min(config.top, outline.num_classes)
    while True:
        images = torch.zeros(pictures, 3, *outline.img_size, device=device)
        start = time.perf_counter()
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device.type, AMP_DTYPES[config.amp], enabled=config.amp != "off"),
            ):
                drawing = draw_label_maps(annotator, images, top=top, flip=config.flip)
            drawing.mean_logits.cpu()  # waits for the device
        except (MemoryError, RuntimeError) as error:
            if best == float("inf") or not is_out_of_memory(error):
                raise
            return best
        seconds = time.perf_counter() - start
        best = min(best, seconds / pictures)
        pictures *= 2
        if seconds > ENOUGH_SECONDS or pictures > config.batch_size:
            return best
