"""Start from a linear probe: fit the class head to frozen features first, so that fine-tuning does not distort them
(LP-FT: Kumar et al., arXiv 2202.10054)."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from volo.config import Recipe
from volo.distributed import World, main_only
from volo.inference.features import extract_features
from volo.inference.regression import fit_probe
from volo.models.volo import VOLO
from volo.training.report import Reporter
from volo.training.workloads.classification import Classification
from volo.training.workloads.workload import Workload


def check_probe(recipe: Recipe) -> None:
    """Raises ValueError where `model.probe` makes no sense in a recipe."""
    if recipe.task in ("segment", "table"):
        raise ValueError(f"model.probe fits the head of a classifier; leave it out for task {recipe.task!r}")
    if not recipe.model.weights:
        raise ValueError(
            "model.probe fits a head to what pretrained weights see, and model.weights is empty: name them (--model.weights "
            "pretrained), or leave the probe out (--model.probe false)"
        )


def fit_head(recipe: Recipe, model: VOLO, workload: Workload, world: World, reporter: Reporter) -> str:
    """Put a linear probe, fitted to the training images and their mirror images, in the place of the model's class head, and
    silence its aux head; returns a sentence about it. All processes call it, the first one fits.
    """
    assert isinstance(workload, Classification)
    weight, bias, told = main_only(world, lambda: _fitted(recipe, model, workload, world, reporter))
    with torch.no_grad():
        model.head.weight.copy_(weight)  # type: ignore[operator, union-attr]
        model.head.bias.copy_(bias)  # type: ignore[operator, union-attr]
        for parameter in model.aux_head.parameters():
            parameter.zero_()
    return told


def _fitted(
    recipe: Recipe, model: VOLO, workload: Classification, world: World, reporter: Reporter
) -> tuple[Tensor, Tensor, str]:
    """Weight [K, F] and bias [K] of the head, and what to say of them."""
    start = time.monotonic()
    source = workload.loader.source
    features = extract_features(
        model,
        source,
        recipe.data,
        pool=model.config.pool,
        views=2 if recipe.augment.hflip else 1,
        device=world.device,
        amp=recipe.train.amp,
        on_progress=lambda done, total: reporter.on_progress("computing features", done, total),
    )
    views, count, width = features.shape
    probe = fit_probe(
        features.reshape(views * count, width),
        source.targets.repeat(views),
        len(workload.classes),
        groups=torch.arange(count).repeat(views),
        on_progress=lambda done, total: reporter.on_progress("fitting the probe", done, total),
    )
    told = (
        f"linear probe on {width} features of {count:,} training images in {time.monotonic() - start:.1f} s: {100 * probe.accuracy:.1f} % "
        f"in five-fold cross-validation on them, which chose the penalty {probe.penalty:g}"
    )
    return probe.weight, probe.bias, told
