"""The size of a run on images that are smaller than what its recipe was made for: scaled up, they show no more, and cost more."""

from __future__ import annotations

import dataclasses
import statistics

from volo.config import Recipe
from volo.data.decode import BadImageError
from volo.data.images import open_data
from volo.data.tables import open_targets
from volo.distributed import World, main_only
from volo.training.report import Reporter

STEP = 32
"""Sizes are multiples of it, which every model takes."""
LEAST = 64
"""No smaller than this: tokens would be too few, and the weights that ship learned from images of this size."""
LOOKED_AT = 200
"""Images whose sizes are looked at, evenly spread over the training images."""


def fit_to_images(recipe: Recipe, world: World, reporter: Reporter) -> Recipe:
    """`recipe` with a smaller `data.img_size` where its images are so small that `data.max_upscale` asks for it.

    The same images give the same size, so a continued run is the same run. All processes must call it; it says what it
    chose. Raises ValueError as opening the data does, and for a factor that is none.
    """
    data = recipe.data
    if not data.max_upscale:
        return recipe
    if data.max_upscale < 1:
        raise ValueError(f"data.max_upscale is a factor of at least 1, or 0 for any; given: {data.max_upscale:g}")
    if recipe.task == "segment" or not isinstance(data.img_size, int) or data.img_size <= LEAST:
        return recipe
    side = main_only(world, lambda: median_side(recipe))
    if side is None:
        return recipe
    size = max(LEAST, STEP * -(-int(side * data.max_upscale) // STEP))
    if size >= data.img_size:
        return recipe
    if world.is_main:
        reporter.on_message(
            f"images of {size} in place of {data.img_size} pixels, since these have {side:g} (the median of their shorter sides) and are "
            f"scaled up by {data.max_upscale:g} at most (data.max_upscale; --data.img_size chooses otherwise)"
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(data, img_size=size))


def median_side(recipe: Recipe) -> float | None:
    """Of the shorter sides of the training images, in pixels; None if none can be read, which the check of the data will say."""
    config = dataclasses.replace(recipe.data, check="off", cache="none")
    source = (open_targets if recipe.task == "table" else open_data)(config).train
    sides = []
    for index in range(0, len(source), max(1, len(source) // LOOKED_AT)):
        try:
            sides.append(min(source.load(index).shape[1:]))
        except BadImageError:
            continue
    return float(statistics.median(sides)) if sides else None
