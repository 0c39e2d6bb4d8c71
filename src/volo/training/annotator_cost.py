"""What an annotator is and how long it takes, without its weights: a plan downloads nothing.

Shapes follow from the architecture, on torch's meta device; a forward pass with random weights takes as long as any.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch

from volo.annotation.annotator import Annotator, draw_label_maps, load_annotator
from volo.config import AnnotatorConfig, Recipe
from volo.data.transforms import height_width
from volo.inference.evaluate import AMP_DTYPES
from volo.inference.model_source import LoadedModel
from volo.training.memory import free_bytes, is_out_of_memory
from volo.training.pipeline import annotator_recipe
from volo.training.workloads.classification import build_model

MOST_PARAMETERS = 500_000_000
"""A larger annotator is not tried out."""
ENOUGH_SECONDS = 1.0
"""Batches grow until one of them takes so long."""


def outline_annotator(recipe: Recipe, num_classes: int, is_there: bool) -> LoadedModel[Any] | None:
    """The annotator of a recipe on the meta device; None for an architecture that tells nothing without its weights, since
    it looks at values.

    is_there: it is `annotator.model`; else it will be trained by `annotator.recipe`, for `num_classes` classes.

    Raises ValueError, FileNotFoundError for unknown names and missing files.
    """
    try:
        if is_there:
            loaded = load_annotator(recipe.annotator, "meta")
        else:
            its = annotator_recipe(recipe)
            data = dataclasses.replace(its.data, img_size=recipe.annotator.img_size or its.data.img_size)
            with torch.device("meta"):
                its = dataclasses.replace(its, model=dataclasses.replace(its.model, weights=""))
                model = build_model(its, num_classes).eval()
            loaded = LoadedModel(model, "classify", (), data, recipe.annotator.recipe)
        map_grid(loaded)
    except RuntimeError:
        return None
    return loaded


def map_grid(outline: LoadedModel[Any]) -> tuple[int, int]:
    """Rows and columns of its label maps."""
    return Annotator(outline.model).grid(*height_width(outline.preprocessing.img_size))


def num_parameters(outline: LoadedModel[Any]) -> int:
    return sum(p.numel() for p in outline.model.parameters())


def seconds_a_picture(
    outline: LoadedModel[Any], config: AnnotatorConfig, device: torch.device
) -> tuple[float | None, str]:
    """Seconds that an image takes the annotator of one process, its mirror image included; or None, and why."""
    count, free = num_parameters(outline), free_bytes(device)
    if count > MOST_PARAMETERS:
        return None, f"an annotator of {count / 1e6:.0f} M parameters is too large to be tried out"
    if free is not None and 8 * count > free:
        return None, f"memory is too small to try out an annotator of {4 * count / 1e9:.1f} GB"
    try:
        model = copy.deepcopy(outline.model).to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().fill_(0.01)  # any normal number takes as long; as an index it is 0
        return _try_batches(Annotator(model), height_width(outline.preprocessing.img_size), config, device), ""
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None, "memory is too small to try out the annotator"


def _try_batches(
    annotator: Annotator, img_size: tuple[int, int], config: AnnotatorConfig, device: torch.device
) -> float:
    """Of batches of 1, 2, 4, ... images the least seconds an image."""
    best, pictures, top = float("inf"), 1, min(config.top, annotator.num_classes)
    while True:
        images = torch.zeros(pictures, 3, *img_size, device=device)
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
