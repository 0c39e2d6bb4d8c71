"""What a training will take, before anything runs: steps, pictures, memory, time, label maps."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from volo.config import Recipe
from volo.data.label_maps import INDEX, LabelMaps
from volo.data.transforms import height_width
from volo.engine.classification import build_model
from volo.engine.report import Reporter
from volo.engine.token_labeling import annotator_recipe, trains_annotator
from volo.engine.train import Probe, probe
from volo.models.weights import PRETRAINED

LABEL_MAP_BYTES = 3.2
"""Of an exact label map, for each class kept at a position: two for the logit, the rest for the class and the index."""
EVALUATION_SHARE = 1 / 3
"""Time of a picture in an evaluation, which has no backward pass, as a share of that in a training step."""


def plan_training(
    recipe: Recipe, out: str | Path, *, steps: int = 3, reporter: Reporter | None = None
) -> dict[str, Any]:
    """The figures of a run that would go to `out`, as plain numbers, strings and dicts; nothing is written.

    A few steps are really taken (`volo.engine.train.probe`), on this machine and with the data of the recipe, so times
    hold for this machine and what else it does. Raises ValueError as `train` does.

    Returns steps, pictures, epochs, batch and learning rate, memory in bytes, seconds (training, evaluations, and all),
    with label maps their size, with an annotator that is to be trained first its own plan.
    """
    label_maps = _label_maps(recipe, Path(out))
    probed = recipe
    if (label_maps is not None and not label_maps["is_there"]) or _is_annotator_missing(recipe, Path(out)):
        # The steps are the same but for the annotation, which is not there yet.
        probed = dataclasses.replace(recipe, token_label=dataclasses.replace(recipe.token_label, source="own"))
    elif label_maps is not None:
        labels = dataclasses.replace(recipe.token_label, maps=label_maps["path"])
        probed = dataclasses.replace(recipe, token_label=labels)
    result = _figures(recipe, probe(probed, steps=steps, reporter=reporter))
    if label_maps is not None:
        positions = math.prod(label_maps["grid"]) if label_maps["grid"] else 0
        if not label_maps["is_there"] and positions:
            size = positions * recipe.annotator.top * LABEL_MAP_BYTES
            label_maps["bytes"] = round(size * result["num_train"])
        result["label_maps"] = label_maps
    if _is_annotator_missing(recipe, Path(out)):
        first = annotator_recipe(recipe)
        result["annotator"] = plan_training(first, Path(out) / "annotator", steps=steps, reporter=reporter)
        result["seconds"]["all"] += result["annotator"]["seconds"]["all"]
    return result


def _figures(recipe: Recipe, probe: Probe) -> dict[str, Any]:
    config, workload = recipe.train, probe.workload
    step = statistics.median(probe.step_seconds)
    every = config.eval_steps or config.eval_every * workload.steps_per_epoch
    evaluations = math.ceil(probe.total_steps / max(every, 1.0)) if every > 0 else 1
    evaluations = evaluations if workload.num_val else 0
    evaluation = EVALUATION_SHARE * step * workload.num_val / config.batch_size
    memory = {**probe.state_bytes, "activations": probe.activation_bytes}
    seconds = {"step": step, "training": step * probe.total_steps, "evaluations": evaluation * evaluations}
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
        "micro_batch_size": config.batch_size // config.accumulation // probe.world_size,
        "world_size": probe.world_size,
        "peak_lr": recipe.peak_lr,
        "device": str(probe.device),
        "memory_bytes": memory | {"all": sum(memory.values())},
        "peak_bytes": probe.peak_bytes,
        "step_seconds": probe.step_seconds,
        "pictures_per_second": config.batch_size / step,
        "seconds": seconds | {"all": seconds["training"] + seconds["evaluations"]},
    }


def _label_maps(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """Where the label maps of a recipe are or will be, their grid if it can be told, and their size if they are there."""
    labels, annotator = recipe.token_label, recipe.annotator
    if recipe.task != "token_label" or labels.source != "maps":
        return None
    path = Path(labels.maps or out / "label_maps")
    if (path / INDEX).is_file():
        size = sum(file.stat().st_size for file in path.iterdir())
        return {"path": str(path), "is_there": True, "grid": list(LabelMaps.open(path).grid), "bytes": size}
    grid: list[int] = []
    if trains_annotator(recipe, out):
        its = annotator_recipe(recipe)
        with torch.device("meta"):
            without_weights = dataclasses.replace(its, model=dataclasses.replace(its.model, weights=""))
            multiple = build_model(without_weights, 2).config.size_multiple
        size_seen = height_width(annotator.img_size or its.data.img_size)
        grid = [side // multiple for side in size_seen]
    elif annotator.model in PRETRAINED:
        grid = [(annotator.img_size or PRETRAINED[annotator.model].img_size) // 16] * 2
    return {"path": str(path), "is_there": False, "grid": grid, "bytes": None}


def _is_annotator_missing(recipe: Recipe, out: Path) -> bool:
    """The annotator is to be trained first, and no one has done it yet."""
    label_maps = _label_maps(recipe, out)
    is_drawn = label_maps is not None and label_maps["is_there"]
    return trains_annotator(recipe, out) and not is_drawn and not (out / "annotator" / "summary.json").is_file()
