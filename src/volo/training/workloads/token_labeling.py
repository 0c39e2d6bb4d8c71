"""Training with token labels: from label maps, from an annotator that looks on, or from none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from volo.annotation.annotator import Annotator, check_view, load_annotator
from volo.config import Recipe
from volo.data.label_maps import LabelMaps
from volo.data.sources import DataSplits, Progress
from volo.data.token_labels import LabelMapReader, resample_label_maps, resample_position_logits
from volo.data.transforms import PixelPipeline, height_width
from volo.distributed import World, main_first
from volo.inference.evaluate import AMP_DTYPES, match_classes
from volo.models.volo import VOLO
from volo.tasks.token_label import TokenLabelTask
from volo.training.workloads.classification import Classification
from volo.training.workloads.workload import Batch

TEACHES = {"top1": 0.8, "positions": 0.5}
"""Shares of the images and of the positions that an annotator names as the data does, below which its label maps have not been
seen to pay (docs/token_labels.md)."""


def doubts(agreement: dict[str, float] | None) -> str:
    """A warning about label maps of an annotator that knows too little to teach; empty if there is none."""
    if agreement is None or all(agreement[key] >= least for key, least in TEACHES.items()):
        return ""
    return (
        f"the annotator agrees with the labels of {100 * agreement['top1']:.1f} % of the images, and at {100 * agreement['positions']:.1f} % of the "
        f"positions in them: below {100 * TEACHES['top1']:.0f} and {100 * TEACHES['positions']:.0f} % its label maps teach its mistakes as well, and "
        'plain labels (task "classify") usually do better. A better annotator, larger images for it (--annotator.img_size), or one '
        "whose tokens were trained too (loss.token_weight) helps"
    )


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
        if self.label_maps is not None and (doubt := doubts(self.label_maps.agreement)):
            self.notes.append(doubt)
        if recipe.token_label.source == "live":
            with main_first(world):  # downloads once
                self.annotator = LiveAnnotator(recipe, self.classes, world.device)

    def open_label_maps(self, splits: DataSplits) -> LabelMapReader | None:
        config = self.recipe.token_label
        if config.source != "maps":
            return None
        if not config.maps:
            raise ValueError(
                "token labels come from label maps: generate them with volo annotate and name them with --token_label.maps, let an "
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
                f"{len(missing):,} of {len(names):,} training images have no label map in {config.maps}: {_some(missing)}. "
                "Generate them again with volo annotate, on the same data (with the same val_fraction and split_seed)"
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
        check_annotator(recipe)
        loaded = load_annotator(config, device)
        self.model, self.size = Annotator(loaded.model), height_width(loaded.preprocessing.img_size)
        self.pixels = PixelPipeline(loaded.preprocessing).to(device).eval()
        self.flip, self.amp, self.device = config.flip, config.amp, device
        is_imagenet = loaded.wnids and set(classes) <= set(loaded.wnids)
        known = loaded.wnids if is_imagenet else loaded.classes or classes
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


def check_annotator(recipe: Recipe) -> None:
    crop = recipe.annotator.crop
    check_view(crop, recipe.annotator.img_size)
    if crop != "squash" and recipe.token_label.source == "live":
        raise ValueError(
            f"annotator.crop is {crop}, but a live annotator sees all that the training sees of an image; set it to squash, or "
            "take label maps (--token_label.source maps)"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
