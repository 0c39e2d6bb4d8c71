"""What a training will take, before anything runs: steps, images, memory, time, label maps."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import Any

from volo.config import Recipe
from volo.data.label_maps import INDEX, LabelMaps
from volo.data.transforms import height_width
from volo.distributed import join_world
from volo.inference.model_source import LoadedModel
from volo.training.annotator_cost import map_grid, num_parameters, outline_annotator, seconds_a_picture
from volo.training.image_size import fit_to_images
from volo.training.optim import LearningRate
from volo.training.pipeline import annotator_recipe, trains_annotator
from volo.training.probe import Probe, probe
from volo.training.report import NullReporter, Reporter
from volo.training.settings import torch_settings
from volo.training.time_limit import EVALUATION_SHARE, check_limit, epochs_that_fit, with_epochs

MOST_PICTURES = 16
"""In a micro batch that is tried out: enough to tell the time, and room for them is nearly everywhere."""
LABEL_MAP_BYTES = {"exact": 3.2, "compact": 2.1}
"""Of a label map, for each class kept at a position, by encoding; surer annotators and few classes take less."""
INDEX_BYTES = 60
"""For each image: its name, checksums, and where its map is."""


def plan_training(
    recipe: Recipe,
    out: str | Path,
    *,
    steps: int = 3,
    most_pictures: int = MOST_PICTURES,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """The figures of a run that would go to `out`, as plain numbers, strings and dicts; nothing is written.

    A few steps are really taken (`volo.training.probe`), on this machine and with the data of the recipe, so times
    hold for this machine and what else it does. A process takes them with `most_pictures` at most; what they cost is
    scaled up to the micro batches of the recipe. Raises ValueError as `train` does.

    Returns steps, images, epochs, batch and learning rate, memory in bytes, seconds (training, evaluations, and all;
    None: not measured), with label maps their size and the time for generating them, with an annotator that is to be
    trained first its own plan.
    """
    with join_world(recipe.train.device) as world:
        recipe = fit_to_images(recipe, world, reporter or NullReporter())
        return _plan(recipe, Path(out), steps, most_pictures, reporter)


def _plan(recipe: Recipe, out: Path, steps: int, most_pictures: int, reporter: Reporter | None) -> dict[str, Any]:
    is_trained_here, label_maps = trains_annotator(recipe, out), _label_maps(recipe, out)
    draws = label_maps is not None and not label_maps["is_there"]
    is_missing = is_trained_here and (label_maps is None or draws)
    if is_missing and (out / "annotator" / "summary.json").is_file():
        is_missing = False
        trained = dataclasses.replace(recipe.annotator, model=str(out / "annotator"))
        recipe = dataclasses.replace(recipe, annotator=trained)
    has_annotator = is_missing or bool(recipe.annotator.model)
    looks_on = recipe.task == "token_label" and recipe.token_label.source == "live" and has_annotator
    # One that is here looks on in the probe; another one is measured for itself.
    looks_on_apart = looks_on and (is_missing or not Path(recipe.annotator.model).exists())
    labels = recipe.token_label
    if draws or looks_on_apart:
        # The steps are the same but for the annotation, which is not there yet.
        labels = dataclasses.replace(labels, source="own")
    elif label_maps is not None:
        labels = dataclasses.replace(labels, maps=label_maps["path"])
    probed = dataclasses.replace(recipe, token_label=labels)
    started = time.monotonic()
    if probed.model.probe:  # the head is not looked at, and takes long to fit
        probed = dataclasses.replace(probed, model=dataclasses.replace(probed.model, probe=False))
        if not probed.schedule.epochs:
            schedule = dataclasses.replace(probed.schedule, epochs=1.0)
            probed = dataclasses.replace(probed, schedule=schedule)
    measured = probe(probed, steps=steps, most_pictures=most_pictures, reporter=reporter)
    if not recipe.schedule.epochs:
        measured = dataclasses.replace(measured, total_steps=0)
    if recipe.schedule.minutes and measured.step_seconds:
        check_limit(recipe)
        # A run prepares in about the time that this has taken.
        timed = with_epochs(recipe, epochs_that_fit(recipe, measured, time.monotonic() - started))
        steps_that_fit = LearningRate.from_recipe(timed, measured.workload.steps_per_epoch).total_steps
        measured = dataclasses.replace(measured, total_steps=steps_that_fit)

    annotator, outline = None, None
    if (draws or looks_on) and has_annotator:
        outline = outline_annotator(recipe, len(measured.workload.classes), not is_missing)
        annotator = _annotator(recipe, outline, measured, is_in_steps=looks_on and not looks_on_apart)
    result = _figures(recipe, measured, annotator)
    if label_maps is not None:
        result["label_maps"] = label_maps
        if draws:
            label_maps |= _drawing(recipe, outline, measured, annotator)
            result["seconds"]["label_maps"] = label_maps["seconds"]
            if label_maps["seconds"] is not None:
                result["seconds"]["all"] = _sum(result["seconds"]["all"], label_maps["seconds"])
    elif looks_on:
        result["live_annotator"] = annotator
    if is_missing:
        first = annotator_recipe(recipe)
        its = plan_training(first, out / "annotator", steps=steps, most_pictures=most_pictures, reporter=reporter)
        result["annotator"] = its
        result["seconds"]["all"] = _sum(result["seconds"]["all"], its["seconds"]["all"])
    return result


def _figures(recipe: Recipe, probe: Probe, annotator: dict[str, Any] | None) -> dict[str, Any]:
    config, workload = recipe.train, probe.workload
    micro_batch = config.batch_size // config.accumulation // probe.world_size
    memory: dict[str, int | None] = {
        **dict.fromkeys(("weights", "gradients", "optimizer", "average")),
        **probe.state_bytes,
        "activations": probe.activation_bytes if probe.pictures else None,
    }
    added = 0.0
    if annotator is not None and recipe.token_label.source == "live":
        count = annotator["num_parameters"]
        memory["annotator"] = None if count is None else 4 * count
        if not annotator["is_in_steps"] and annotator["seconds_a_picture"] is not None:
            added = annotator["seconds_a_picture"] * micro_batch * config.accumulation
    every = config.eval_steps or config.eval_every * workload.steps_per_epoch
    evaluations = math.ceil(probe.total_steps / max(every, 1.0)) if every > 0 else 1
    evaluations = evaluations if workload.num_val else 0
    seconds: dict[str, float | None] = dict.fromkeys(("step", "training", "evaluations", "all"))
    limit = None
    if probe.step_seconds:
        own = statistics.median(probe.step_seconds) + added
        # Where a process makes its own batches, that is part of its steps.
        waited = probe.data_seconds if workload.num_workers else None
        limit = "data" if waited is not None and waited > own else "steps"
        step = max(own, waited or 0.0)
        training = step * probe.total_steps
        evaluating = EVALUATION_SHARE * step * workload.num_val / config.batch_size * evaluations
        seconds = {"step": step, "training": training, "evaluations": evaluating, "all": training + evaluating}
    return {
        "task": recipe.task,
        "model": recipe.model.name,
        "num_parameters": probe.num_parameters,
        "num_classes": len(workload.classes),
        "num_train": workload.num_train,
        "num_val": workload.num_val,
        "epochs": round(probe.total_steps / workload.steps_per_epoch, 2),
        "steps_per_epoch": workload.steps_per_epoch,
        "steps": probe.total_steps,
        "pictures": probe.total_steps * config.batch_size,
        "evaluations": evaluations,
        "img_size": list(height_width(recipe.data.img_size)),
        "batch_size": config.batch_size,
        "micro_batch_size": micro_batch,
        "probed_micro_batch_size": probe.pictures,
        "world_size": probe.world_size,
        "num_workers": workload.num_workers,
        "peak_lr": recipe.peak_lr,
        "device": str(probe.device),
        "memory_bytes": memory | {"all": sum(size or 0 for size in memory.values())},
        "peak_bytes": probe.peak_bytes,
        "step_seconds": probe.step_seconds,
        "data_seconds": probe.data_seconds,
        "limit": limit,
        "pictures_per_second": config.batch_size / seconds["step"] if seconds["step"] else None,
        "seconds": seconds,
    }


def _annotator(recipe: Recipe, outline: LoadedModel[Any] | None, probe: Probe, is_in_steps: bool) -> dict[str, Any]:
    """What is known of an annotator, and how long it takes; `is_in_steps`: that is measured already."""
    seconds, why_not = None, "" if outline else f"{recipe.annotator.model} tells nothing without its weights"
    if outline is not None and not is_in_steps:
        with torch_settings(recipe.train, probe.device):
            seconds, why_not = seconds_a_picture(outline, recipe.annotator, probe.device)
    return {
        "num_parameters": outline and num_parameters(outline),
        "img_size": list(height_width(outline.preprocessing.img_size)) if outline else [],
        "is_in_steps": is_in_steps,
        "seconds_a_picture": seconds,
        "not_counted": why_not,
    }


def _label_maps(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """Where the label maps of a recipe are or will be, and their grid and size if they are there."""
    labels = recipe.token_label
    if recipe.task != "token_label" or labels.source != "maps":
        return None
    path = Path(labels.maps or out / "label_maps")
    if (path / INDEX).is_file():
        size = sum(file.stat().st_size for file in path.iterdir())
        return {"path": str(path), "is_there": True, "grid": list(LabelMaps.open(path).grid), "bytes": size}
    return {"path": str(path), "is_there": False, "grid": [], "bytes": None}


def _drawing(
    recipe: Recipe, outline: LoadedModel[Any] | None, probe: Probe, annotator: dict[str, Any] | None
) -> dict[str, Any]:
    """Grid and size of label maps that are to be generated, and how long that takes."""
    size, count = None, probe.workload.num_train
    seconds: float | None = annotator["seconds_a_picture"] if annotator else None
    grid = map_grid(outline) if outline else ()
    if outline is not None:
        top = min(recipe.annotator.top, outline.model.num_classes)
        size = round(count * (math.prod(grid) * top * LABEL_MAP_BYTES[recipe.annotator.encoding] + INDEX_BYTES))
    if seconds is not None:
        # Images are read and decoded as for the training, beside the annotator or in turn with it.
        seconds /= probe.world_size
        reading = (probe.data_seconds or 0.0) / recipe.train.batch_size
        seconds = count * (max(seconds, reading) if probe.workload.num_workers else seconds + reading)
    return {
        "grid": list(grid),
        "bytes": size,
        "seconds": seconds,
        "pictures_per_second": count / seconds if seconds else None,
        "not_counted": annotator["not_counted"] if annotator else "no annotator is named",
    }


def _sum(a: float | None, b: float | None) -> float | None:
    """None: one of them is not known."""
    return None if a is None or b is None else a + b
