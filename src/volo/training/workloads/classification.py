"""Training a classifier: images with one label each, a VOLO, top-1."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from volo.config import Recipe
from volo.data.images import data_kind, open_data
from volo.data.loader import EvalLoader, TrainLoader
from volo.data.sources import DataSplits, ImageSource, Progress, Share
from volo.data.token_labels import LabelMapReader
from volo.data.transforms import PixelPipeline
from volo.distributed import World, gather_from_all, in_step, main_first
from volo.inference.evaluate import evaluate
from volo.models.checkpoint import model_config_dict
from volo.models.factory import create_model
from volo.models.volo import VOLO, VOLOConfig
from volo.tasks.classify import ClassifyTask
from volo.training.workloads.workload import Batch, image_list, model_options


def share_of(world: World) -> Share:
    """This process's share of the check of the data."""
    return Share(world.rank, world.size, lambda mine: gather_from_all(mine, world))


class Classification:
    """The `Workload` of task "classify"."""

    score = "top1"

    def __init__(self, recipe: Recipe, world: World, on_progress: Progress | None = None) -> None:
        self.recipe, self.world = recipe, world
        model_options(recipe, recipe.model.name)  # what is wrong with them is said before the images are tried
        # One process downloads, and the others find it; images are tried by all together.
        downloads = data_kind(recipe.data) in ("cifar10", "cifar100")
        with main_first(world) if downloads else contextlib.nullcontext():
            splits = open_data(recipe.data, on_progress=on_progress, share=share_of(world))
        self.classes = splits.classes
        self.extras: dict[str, Any] = {}
        self.notes = [f"left out: {bad}" for bad in splits.skipped] + splits.notes
        self._make_loaders(splits.train, splits.val, self.open_label_maps(splits))

    def _make_loaders(self, train: ImageSource, val: ImageSource, label_maps: LabelMapReader | None = None) -> None:
        recipe, config, world = self.recipe, self.recipe.train, self.world
        self.num_train, self.num_val = len(train), len(val)
        batch_size, slices = config.batch_size, config.accumulation * world.size
        if recipe.model.probe and self.num_train < batch_size and self.num_train >= slices:
            batch_size = self.num_train // slices * slices
            self.notes.append(f"batches of {batch_size} images, since there are only {self.num_train} for training")
        self.loader = TrainLoader(
            train,
            recipe.data,
            recipe.augment,
            batch_size=batch_size,
            accumulation=config.accumulation,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
            label_maps=label_maps,
            crop_order=recipe.token_label.crop_order,
            small_size=recipe.schedule.small_size,
            small_epochs=recipe.schedule.small_epochs,
        )
        self.steps_per_epoch, self.num_workers = self.loader.steps_per_epoch, self.loader.num_workers
        self.val_loader = EvalLoader(
            val,
            recipe.data,
            batch_size=config.eval_batch_size or max(1, config.batch_size // config.accumulation // world.size),
            rank=world.rank,
            world_size=world.size,
            pin_memory=world.device.type == "cuda",
        )
        self.pixels = PixelPipeline(recipe.data, recipe.augment).to(world.device)

    def open_label_maps(self, splits: DataSplits) -> LabelMapReader | None:
        """Label maps that go along with the training images; None: there are none."""
        return None

    def list_images(self) -> dict[str, Any]:
        sources = {"training": self.loader.source, "held-out": self.val_loader.source}
        return {part: image_list(source.names, source.targets) for part, source in sources.items()}

    def held_out(self) -> Iterable[tuple[str, str]]:
        source = self.val_loader.source
        return zip(source.names, (self.classes[label] for label in source.targets.tolist()))

    def create_model(self) -> VOLO:
        return build_model(self.recipe, len(self.classes))

    def restore_model(self, config: dict[str, Any]) -> VOLO:
        return VOLO(VOLOConfig(**config))

    def model_config(self, model: nn.Module) -> dict[str, Any]:
        return model_config_dict(cast(VOLO, model))

    def create_task(self, model: nn.Module) -> nn.Module:
        model = cast(VOLO, model)
        model.set_grad_checkpointing(self.recipe.train.grad_checkpointing)
        return ClassifyTask(model, self.recipe.loss, self.recipe.augment)

    def batches(self, start_step: int, stop_step: int, most: int | None = None) -> Iterator[Batch]:
        return self.loader.batches(start_step, stop_step, most)

    def prepare(self, batch: Batch) -> Batch:
        device = self.world.device
        images = self.pixels(batch["image"].to(device, non_blocking=True))
        return {"image": images, "target": batch["target"].to(device, non_blocking=True)}

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None]) -> dict[str, Any]:
        return evaluate(
            model,
            in_step(model, self.val_loader),
            self.pixels,
            num_classes=len(self.classes),
            device=self.world.device,
            amp=self.recipe.train.amp,
            on_batch=on_batch,
            strict=False,  # the loop says so, trains on, and takes it for no best one
        )


def build_model(recipe: Recipe, num_classes: int) -> VOLO:
    """The model of a recipe for so many classes, with random weights from the recipe's seed or those of `model.weights`."""
    torch.manual_seed(recipe.train.seed)
    return create_model(
        recipe.model.name,
        recipe.model.weights or False,
        num_classes=num_classes,
        **model_options(recipe, recipe.model.name),
    )
