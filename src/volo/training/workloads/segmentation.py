"""Training a segmentation model: images with masks, a VOLO with a decoder, mIoU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from volo.config import AugmentConfig, LossConfig, Recipe, SegmentConfig
from volo.data.loader import MaskEvalLoader, MaskTrainLoader
from volo.data.masks import open_segmentation
from volo.data.sources import Progress
from volo.data.transforms import PixelPipeline
from volo.distributed import World, in_step
from volo.inference.segment_evaluate import HowToTest, evaluate_segmentation
from volo.models.checkpoint import model_config_dict
from volo.models.factory import create_segmenter
from volo.models.segmenter import Segmenter, segmenter_from_dict
from volo.tasks.segment import SegmentTask, class_weights
from volo.training.workloads.classification import share_of
from volo.training.workloads.workload import Batch, image_list, model_options


class Segmentation:
    """The `Workload` of task "segment"."""

    score = "miou"

    def __init__(self, recipe: Recipe, world: World, on_progress: Progress | None = None) -> None:
        config, segment = recipe.train, recipe.segment
        self.recipe, self.world = recipe, world
        check_recipe(recipe)
        model_options(recipe, recipe.model.name.partition("_")[2])  # before the images are tried
        self.how = HowToTest.from_config(segment, recipe.data.img_size)
        self.splits = splits = open_segmentation(recipe.data, segment, on_progress=on_progress, share=share_of(world))
        self.classes = splits.classes.names
        self.extras = {
            "colours": [list(colour) for colour in splits.classes.colours],
            "object_value": splits.classes.object_value,
        }
        self.num_train, self.num_val = len(splits.train), len(splits.val)
        self.notes = [f"left out: {bad}" for bad in splits.skipped] + splits.notes
        self.weights = class_weights(splits.pixel_counts.tolist(), segment.class_weights)
        self.loader = MaskTrainLoader(
            splits.train,
            recipe.data,
            segment,
            hflip=recipe.augment.hflip,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
        )
        self.steps_per_epoch, self.num_workers = self.loader.steps_per_epoch, self.loader.num_workers
        # Whole images are larger than crops, by how much nobody knows: one at a time unless the recipe says more.
        self.val_loader = MaskEvalLoader(
            splits.val,
            recipe.data,
            segment,
            batch_size=config.eval_batch_size or 1,
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
        )
        self.pixels = PixelPipeline(recipe.data).to(world.device)

    def list_images(self) -> dict[str, Any]:
        return {"training": image_list(self.splits.train.names), "held-out": image_list(self.splits.val.names)}

    def held_out(self) -> Iterable[tuple[str, str]]:
        return ((name, "") for name in self.splits.val.names)

    def create_model(self) -> nn.Module:
        return build_segmenter(self.recipe, len(self.classes))

    def restore_model(self, config: dict[str, Any]) -> nn.Module:
        return segmenter_from_dict(config)

    def model_config(self, model: nn.Module) -> dict[str, Any]:
        return model_config_dict(cast(Segmenter, model))

    def create_task(self, model: nn.Module) -> nn.Module:
        if self.recipe.train.grad_checkpointing:
            cast(Segmenter, model).set_grad_checkpointing()
        return SegmentTask(model, self.recipe.segment, self.weights)

    def batches(self, start_step: int, stop_step: int, most: int | None = None) -> Iterator[Batch]:
        return self.loader.batches(start_step, stop_step, most)

    def prepare(self, batch: Batch) -> Batch:
        device = self.world.device
        images = self.pixels(batch["image"].to(device, non_blocking=True))
        return {"image": images, "target": batch["mask"].to(device, non_blocking=True).long()}

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None]) -> dict[str, Any]:
        return evaluate_segmentation(
            model,
            in_step(model, self.val_loader),
            self.pixels,
            num_classes=len(self.classes),
            device=self.world.device,
            how=self.how,
            amp=self.recipe.train.amp,
            batch_size=self.loader.micro_batch_size,
            on_batch=on_batch,
            strict=False,  # the loop says so, trains on, and takes it for no best one
        )


def build_segmenter(recipe: Recipe, num_classes: int) -> Segmenter:
    """The model of a recipe for so many classes, with random weights from its seed or those of `model.weights`."""
    torch.manual_seed(recipe.train.seed)
    return create_segmenter(
        recipe.model.name,
        num_classes,
        recipe.model.weights or False,
        **model_options(recipe, recipe.model.name.partition("_")[2]),
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError for settings that this task does not know: they would have no effect."""
    idle = [
        f"{section}.{f.name}"
        for section, default in (("augment", AugmentConfig()), ("loss", LossConfig()))
        for f in dataclasses.fields(default)
        if getattr(getattr(recipe, section), f.name) != getattr(default, f.name)
        and (section, f.name) != ("augment", "hflip")
    ]
    idle += [f"schedule.{name}" for name in ("small_size", "small_epochs") if getattr(recipe.schedule, name)]
    idle += ["data.max_upscale"] if recipe.data.max_upscale else []
    if idle:
        known = ", ".join(f.name for f in dataclasses.fields(SegmentConfig))
        raise ValueError(
            f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect in task 'segment', which flips by augment.hflip and knows "
            f"segment.{{{known}}}"
        )
