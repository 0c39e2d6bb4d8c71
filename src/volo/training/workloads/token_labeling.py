"""Training with token labels: where they come from, and the annotator that comes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from volo.annotation.drawing import AnnotateConfig, OpenedAnnotator, annotate, check_crop, open_annotator
from volo.config import AnnotatorConfig, Recipe, load_recipe, recipe_to_toml
from volo.data.files import write_atomically
from volo.data.label_maps import INDEX, LabelMaps
from volo.data.sources import DataSplits, Progress
from volo.data.token_labels import LabelMapReader, resample_label_maps, resample_position_logits
from volo.data.transforms import PixelPipeline, height_width
from volo.distributed import World, main_first
from volo.inference.evaluate import AMP_DTYPES, match_classes
from volo.models.volo import VOLO
from volo.tasks.token_label import TokenLabelTask
from volo.training.report import Reporter, TrainResult
from volo.training.workloads.classification import Classification
from volo.training.workloads.workload import Batch


class TokenLabeling(Classification):
    """The `Workload` of task "token_label": classification whose batches carry an annotator's logits.

    A live annotator stays out of the task: it is no part of what is optimised, averaged, sharded or saved.
    """

    def __init__(self, recipe: Recipe, world: World, on_progress: Progress | None = None) -> None:
        self.on_progress = on_progress
        self.annotator: LiveAnnotator | None = None
        self.label_maps: LabelMaps | None = None
        self.class_of: Tensor | None = None  # the data's class for each class of the maps, -1 for none; None: the same
        super().__init__(recipe, world, on_progress)
        if recipe.token_label.source == "live":
            with main_first(world):  # downloads once
                self.annotator = LiveAnnotator(recipe, self.classes, world.device)

    def open_label_maps(self, splits: DataSplits) -> LabelMapReader | None:
        config = self.recipe.token_label
        if config.source != "maps":
            return None
        if not config.maps:
            raise ValueError(
                "token labels come from label maps: draw them with volo annotate and name them with --token_label.maps, let an "
                "annotator look on with --token_label.source live --annotator.model MODEL, or do without (--token_label.source own)"
            )
        maps = LabelMaps.open(config.maps)
        try:
            known = match_classes(splits.classes, maps.classes)
        except ValueError as error:
            raise ValueError(f"the label maps in {config.maps} are of other classes: {error}") from None
        if known != list(range(maps.num_classes)):
            self.class_of = torch.full((maps.num_classes,), -1)
            self.class_of[known] = torch.arange(len(known))
        names, missing = splits.train.names, []
        for i in range(len(names)):
            if names[i] not in maps:
                missing.append(names[i])
            if self.on_progress and (i % 4096 == 4095 or i + 1 == len(names)):
                self.on_progress(i + 1, len(names))
        if missing:
            raise ValueError(
                f"{len(missing):,} of {len(names):,} training pictures have no label map in {config.maps}: {_some(missing)}. "
                "Draw them again with volo annotate, on the same data (with the same val_fraction and split_seed)"
            )
        self.label_maps = maps
        return maps

    def create_task(self, model: nn.Module) -> nn.Module:
        model = cast(VOLO, model)
        self.token_side = model.config.size_multiple
        for name, size in (
            ("data.img_size", self.recipe.data.img_size),
            ("schedule.small_size", self.recipe.schedule.small_size),
        ):
            height, width = height_width(size)
            if height % self.token_side or width % self.token_side:
                raise ValueError(
                    f"{name} is {height} x {width}; with token labels it is in multiples of {self.token_side}, the side of a token"
                )
        model.set_grad_checkpointing(self.recipe.train.grad_checkpointing)
        return TokenLabelTask(model, self.recipe.loss, self.recipe.augment, self.recipe.token_label)

    def prepare(self, batch: Batch) -> Batch:
        prepared = super().prepare(batch)
        if self.label_maps is not None:
            scores, classes, frames, boxes = (
                batch[name].to(self.world.device, non_blocking=True)
                for name in ("map_scores", "map_classes", "frame", "map_box")
            )
            if self.class_of is not None:
                classes = self.class_of.to(classes.device)[classes]
                scores, classes = scores * (classes >= 0), classes.clamp(min=0)

            def read(size: tuple[int, int]) -> Tensor:
                return resample_label_maps(scores, classes, frames, size, len(self.classes), boxes)

        elif self.annotator is not None:
            logits = self.annotator(batch["image"].to(self.world.device, non_blocking=True))

            def read(size: tuple[int, int]) -> Tensor:
                return resample_position_logits(logits, size)

        else:
            return prepared
        height, width = prepared["image"].shape[2:]
        grid = height // self.token_side, width // self.token_side
        return {**prepared, "class_annotation": read((1, 1))[:, 0], "token_annotation": read(grid)}


class LiveAnnotator:
    """A classifier that looks at the very crops of the training, before anything is erased from them."""

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], device: torch.device) -> None:
        """Raises ValueError for an annotator that does not know all of `classes`."""
        config = recipe.annotator
        if not config.model:
            raise ValueError(
                "token_label.source is live, but there is no annotator: name one with --annotator.model or --annotator.recipe"
            )
        _check_crop(recipe)
        opened = _open(config, device)
        self.model, self.size = opened.model, height_width(opened.data.img_size)
        self.pixels = PixelPipeline(opened.data).to(device).eval()
        self.flip, self.amp, self.device = config.flip, config.amp, device
        is_imagenet = opened.wnids and set(classes) <= set(opened.wnids)
        known = opened.wnids if is_imagenet else opened.classes or classes
        if len(known) != self.model.num_classes:
            raise ValueError(
                f"the annotator {config.model} knows {self.model.num_classes} classes without names, the data has {len(known)}"
            )
        chosen = match_classes(classes, known)
        self.class_map = None if chosen == list(range(len(known))) else torch.tensor(chosen, device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> logits of the data's classes at each position, float32 [B, h, w, K]."""
        if images.shape[2:] != self.size:
            images = F.resize(images, list(self.size), antialias=True)
        with torch.autocast(self.device.type, AMP_DTYPES[self.amp], enabled=self.amp != "off"):
            pixels = self.pixels(images)
            logits = self.model(pixels).float()
            if self.flip:
                logits = (logits + self.model(pixels.flip(-1)).float().flip(2)) / 2
        return logits if self.class_map is None else logits[..., self.class_map]


def prepare_annotator(
    recipe: Recipe,
    out: Path,
    world: World,
    reporter: Reporter,
    train: Callable[..., TrainResult],
) -> tuple[Recipe, TrainResult | None]:
    """Do what [annotator] says: train it, in `out`/annotator, then draw the label maps, in `token_label.maps` or
    `out`/label_maps. What is there is not done again, what was cut off goes on.

    train: `volo.training.loop.train`.

    Returns the recipe with the places filled in, as they are now (the run folder may be moved before it is continued), and
    the result of the annotator's training if a signal ended that.
    """
    config, labels = recipe.annotator, recipe.token_label
    if recipe.task != "token_label" or labels.source == "own" or not (config.recipe or config.model):
        return recipe, None
    is_trained_here = trains_annotator(recipe, out)
    _check_crop(recipe)
    if is_trained_here and config.weights:
        raise ValueError(
            f"annotator.weights are for a model of timm, but the annotator is trained first, by {config.recipe}; name the model "
            "with --annotator.model, or leave the weights out"
        )
    if world.is_main:
        # What was cut off here is continued like any run, by its folder.
        out.mkdir(parents=True, exist_ok=True)
        text = recipe_to_toml(recipe).encode()
        write_atomically(out / "recipe.toml", lambda file: file.write(text))
    if is_trained_here:
        config = dataclasses.replace(config, model=str(out / "annotator"))
        recipe = dataclasses.replace(recipe, annotator=config)
    if labels.source == "maps":
        labels = dataclasses.replace(labels, maps=labels.maps or str(out / "label_maps"))
        recipe = dataclasses.replace(recipe, token_label=labels)
        if (Path(labels.maps) / INDEX).is_file():
            return recipe, None
    if is_trained_here:
        reporter.on_message(f"first the annotator, by the recipe {config.recipe}, in {config.model}")
        its = annotator_recipe(recipe, begun=Path(config.model))
        result = train(its, config.model, resume=True, reporter=reporter)
        if result.status == "interrupted":
            return recipe, result
    if labels.source == "maps":
        reporter.on_message(f"then the label maps, in {labels.maps}")
        with main_first(world):
            opened = _open(config, world.device)
        its_data = dataclasses.replace(opened.data, path=recipe.data.path, kind=recipe.data.kind)
        report = annotate(
            dataclasses.replace(opened, data=its_data),
            AnnotateConfig(
                data=None,  # what the annotator's own data says
                part="train",
                val_fraction=recipe.data.val_fraction,
                split_seed=recipe.data.split_seed,
                top=min(config.top, opened.model.num_classes),
                encoding=config.encoding,
                flip=config.flip,
                amp=config.amp,
                batch_size=config.batch_size,
                num_workers=recipe.data.num_workers,
                on_bad_image=recipe.data.on_bad_image,
            ),
            labels.maps,
            world=world,
            resume=True,
            on_progress=reporter.on_progress,
        )
        if world.is_main:
            reporter.on_message(_described(report))
    return recipe, None


def trains_annotator(recipe: Recipe, out: Path) -> bool:
    """A run that goes to `out` begins by training its annotator, unless the label maps are there: `annotator.recipe` says
    how, and `annotator.model` names no other one."""
    wanted = recipe.task == "token_label" and recipe.token_label.source != "own" and recipe.annotator.recipe
    return bool(wanted) and recipe.annotator.model in ("", str(out / "annotator"))


def annotator_recipe(recipe: Recipe, begun: Path | None = None) -> Recipe:
    """The recipe of a recipe's annotator: `annotator.recipe`, on the same pictures and the same machine.

    begun: the annotator's run folder, whose recipe serves where that one is not found (from another working directory).
    """
    try:
        its = load_recipe(recipe.annotator.recipe)
    except FileNotFoundError:
        if begun is None or not (begun / "recipe.toml").is_file():
            raise
        its = load_recipe(begun / "recipe.toml")
    mine = recipe.data
    data = dataclasses.replace(
        its.data,
        path=mine.path,
        kind=mine.kind,
        val_fraction=mine.val_fraction,
        split_seed=mine.split_seed,
        on_bad_image=mine.on_bad_image,
        cache=mine.cache,
        num_workers=mine.num_workers,
    )
    train = dataclasses.replace(its.train, device=recipe.train.device, threads=recipe.train.threads)
    return dataclasses.replace(its, data=data, train=train)


def _check_crop(recipe: Recipe) -> None:
    crop = recipe.annotator.crop
    check_crop(crop)
    if crop != "squash" and recipe.token_label.source == "live":
        raise ValueError(
            f"annotator.crop is {crop}, but a live annotator sees all that the training sees of a picture; set it to squash, or "
            "take label maps (--token_label.source maps)"
        )


def _open(config: AnnotatorConfig, device: torch.device) -> OpenedAnnotator:
    return open_annotator(
        config.model,
        weights=config.weights or None,
        img_size=config.img_size or None,
        crop=config.crop,
        device=device,
    )


def _described(report: dict) -> str:
    agreement = report["agreement"]
    agrees = (
        f"; the annotator agrees with {100 * agreement['top1']:.1f} % of the labels" if agreement is not None else ""
    )
    return f"{report['pictures']:,} label maps of {report['grid'][0]} x {report['grid'][1]}, {report['bytes'] / 1e6:.1f} MB{agrees}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
