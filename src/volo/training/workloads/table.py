"""Training on what a table says of images: several labels, numbers, or several columns at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import nn

from volo.config import AugmentConfig, LossConfig, Recipe
from volo.data.sources import Progress
from volo.data.tables import open_targets
from volo.data.targets import as_labels
from volo.distributed import World, in_step
from volo.inference.table import evaluate_table, score_of
from volo.models.volo import VOLO
from volo.tasks.table import TableTask, output_weights
from volo.training.workloads.classification import Classification, build_model, share_of
from volo.training.workloads.workload import Batch, image_list, model_options


class Table(Classification):
    """The `Workload` of task "table": outputs of every kind side by side, so that one workload is enough."""

    def __init__(self, recipe: Recipe, world: World, on_progress: Progress | None = None) -> None:
        self.recipe, self.world = recipe, world
        check_recipe(recipe)
        model_options(recipe, recipe.model.name)  # what is wrong with them is said before the images are tried
        splits = open_targets(recipe.data, on_progress=on_progress, share=share_of(world))
        self.targets = splits.targets
        output_weights(self.targets, recipe.table)
        self.score = score_of(self.targets)
        self.classes = self.targets.names
        self.extras: dict[str, Any] = {"targets": self.targets.to_list()}
        self.notes = [f"left out: {bad}" for bad in splits.skipped] + splits.notes
        self._make_loaders(splits.train, splits.val)

    def list_images(self) -> dict[str, Any]:
        sources = {"training": self.loader.source, "held-out": self.val_loader.source}
        return {part: image_list(source.names, as_labels(source.targets)) for part, source in sources.items()}

    def held_out(self) -> Iterable[tuple[str, str]]:
        return ((name, "") for name in self.val_loader.source.names)

    def create_model(self) -> VOLO:
        return build_model(self.recipe, self.targets.width)

    def create_task(self, model: nn.Module) -> nn.Module:
        model = cast(VOLO, model)
        model.set_grad_checkpointing(self.recipe.train.grad_checkpointing)
        return TableTask(model, self.targets, self.recipe.loss, self.recipe.table)

    def prepare(self, batch: Batch) -> Batch:
        device = self.world.device
        images = self.pixels(batch["image"].to(device, non_blocking=True))
        target = batch["target"]
        if device.type == "mps":  # Apple's GPUs have no float64
            target = target.float()
        return {"image": images, "target": target.to(device, non_blocking=True)}

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None]) -> dict[str, Any]:
        return evaluate_table(
            model,
            in_step(model, self.val_loader),
            self.pixels,
            targets=self.targets,
            device=self.world.device,
            amp=self.recipe.train.amp,
            number_loss=self.recipe.table.number_loss,
            on_batch=on_batch,
            strict=False,  # the loop says so, trains on, and takes it for no best one
        )


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError for settings that this task does not know: they would have no effect."""
    idle = [
        f"{section}.{name}"
        for section, default, names in (
            ("augment", AugmentConfig(), ("mixup", "cutmix", "mix_token", "mix_prob")),
            ("loss", LossConfig(), ("token_weight",)),
        )
        for name in names
        if getattr(getattr(recipe, section), name) != getattr(default, name)
    ]
    if idle:
        known = ", ".join(f.name for f in dataclasses.fields(recipe.table))
        raise ValueError(
            f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect in task 'table', which mixes no images: leave them out. It knows "
            f"table.{{{known}}}, loss.label_smoothing and every other augment key"
        )
