"""Classification, with plain labels or token labels, whose images lie on the training's device from the start to the end."""

from __future__ import annotations

from volo.config import Recipe
from volo.data.on_device import to_device
from volo.data.sources import ImageSource, Progress
from volo.data.token_labels import LabelMapReader
from volo.distributed import World
from volo.training.workloads.classification import Classification
from volo.training.workloads.token_labeling import TokenLabeling


class ClassificationOnDevice(Classification):
    """The `Workload` of task "classify" for small images of one size and a device that holds all of them (12 KB for 64 px).

    Everything but the making of batches is that of `Classification`; see `volo.data.on_device` for what is drawn.
    """

    def _make_loaders(self, train: ImageSource, val: ImageSource, label_maps: LabelMapReader | None = None) -> None:
        device, data = self.world.device, self.recipe.data
        super()._make_loaders(to_device(train, data, device), to_device(val, data, device), label_maps)


class TokenLabelingOnDevice(TokenLabeling):
    """The same of task "token_label"."""

    def _make_loaders(self, train: ImageSource, val: ImageSource, label_maps: LabelMapReader | None = None) -> None:
        device, data = self.world.device, self.recipe.data
        super()._make_loaders(to_device(train, data, device), to_device(val, data, device), label_maps)


def on_device(recipe: Recipe, world: World, on_progress: Progress) -> Classification:
    """The workload of `recipe` with its images on the device: to be given to `volo.training.loop.train`. Raises ValueError."""
    kinds: dict[str, type[Classification]] = {"classify": ClassificationOnDevice, "token_label": TokenLabelingOnDevice}
    if recipe.task not in kinds:
        raise ValueError(f"images stay on the device for the tasks {', '.join(kinds)}; given: {recipe.task!r}")
    return kinds[recipe.task](recipe, world, on_progress)
