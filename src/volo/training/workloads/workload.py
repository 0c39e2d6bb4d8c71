"""What the training loop wants to know about the kind of training it runs.

The loop (`volo.training.loop`) knows steps, accumulation, processes, averages, checkpoints and signals. It does not know
whether images have one label or one for every pixel, what a model returns, or what a good score is: that is a
`Workload`, one class for each value of `Recipe.task`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from volo.config import Recipe
from volo.data.sources import Progress
from volo.distributed import World
from volo.models.volo import DROP_PATH_RATES

Batch = dict[str, Tensor]
"""By name, the images as "image"; all tensors begin with the dimension of the batch."""


class Workload(Protocol):
    """Data, model, task and score of one recipe, as one process of a run sees them.

    Made from (recipe, world, on_progress): opens and checks the data, and raises ValueError for everything that a run
    would stumble over later. Randomness on the CPU is keyed (`volo.data.keyed`); what is drawn in `prepare` and in the
    task comes from torch's global generators, which the loop seeds before each micro batch.
    """

    score: str
    """The figure of `evaluate` that decides which weights are the best; higher is better."""
    classes: tuple[str, ...]
    num_train: int
    num_val: int
    """Held-out images; 0: there are none, and the run is not evaluated."""
    notes: list[str]
    """What a person should know about the data before the run starts."""
    steps_per_epoch: int
    num_workers: int
    """Processes that make the training batches beside this one; 0: it makes them itself, between the steps."""
    extras: dict[str, Any]
    """What users of the weights need besides names of classes, kept in checkpoints: plain containers and numbers."""

    def list_images(self) -> dict[str, Any]:
        """`image_list` of each part of the data, by which a run that is continued knows it again."""

    def held_out(self) -> Iterable[tuple[str, str]]:
        """Names of the held-out images, each with that of its class, or "" where an image has none."""

    def create_model(self) -> nn.Module:
        """The model with the recipe's first weights, on the CPU. It may download them."""

    def restore_model(self, config: dict[str, Any]) -> nn.Module:
        """The model of a checkpoint, from its `model_config`; its weights are loaded afterwards."""

    def model_config(self, model: nn.Module) -> dict[str, Any]:
        """What `restore_model` takes: dicts, lists, strings and numbers."""

    def create_task(self, model: nn.Module) -> nn.Module:
        """What is minimised: `forward(batch) -> {"loss", "output", ...}`, and {"output"} for a batch without targets.

        Where "loss" is the mean over another number of terms in each batch, "weight" is in proportion to that number: the
        step is then that of the mean over all terms of its micro batches and processes. Its submodule "model" is what is optimised, averaged and saved.
        """

    def batches(self, start_step: int, stop_step: int, most: int | None = None) -> Iterator[Batch]:
        """This process's micro batches of steps start_step..stop_step-1 on the CPU, `accumulation` for each step, and of
        each the first `most` images alone."""

    def prepare(self, batch: Batch) -> Batch:
        """A training batch on the device as the task takes it, pixels normalised; called without gradients."""

    def evaluate(self, model: nn.Module, on_batch: Callable[[int], None]) -> dict[str, Any]:
        """Score `model` (images -> outputs, on the device) on this process's share of the held-out images.

        `on_batch` is called with the number of images done. Returns plain numbers and lists over the images of all
        processes: `score` and other figures; "confusion" [classes][classes], rows: truth; lists named "per_class_..."
        have a value for each class.
        """


OpenWorkload = Callable[[Recipe, World, Progress], Workload]


def image_list(names: Sequence[str], labels: Tensor | None = None) -> dict[str, Any]:
    """What tells some images, in their order, from others: how many there are, digests of their names and their labels
    (int64 [N]), and a few of the names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    step = max(1, len(names) // 50)
    return {
        "count": len(names),
        "names": digest.hexdigest(),
        "labels": "" if labels is None else hashlib.sha256(labels.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
        "sample": [names[i] for i in range(0, len(names), step)],
    }


def model_options(recipe: Recipe, variant: str) -> dict[str, Any]:
    """What a recipe says of its model besides name, classes and weights; `variant` is the VOLO in it.

    Raises ValueError for options that have a place of their own.
    """
    options = dict(recipe.model.options)
    for name in ("num_classes", "drop_path_rate"):
        if name in options:
            instead = "it follows from the data" if name == "num_classes" else "use model.drop_path_rate"
            raise ValueError(f"model.options must not hold {name}: {instead}")
    if options.get("in_chans", 3) != 3:
        raise ValueError(
            f"model.options.in_chans is {options['in_chans']!r}, but images are given to the model as RGB, grey ones too: leave it at 3. "
            "Models of other channels are trained with your own loop, from volo.create_model"
        )
    rate = recipe.model.drop_path_rate
    rate = DROP_PATH_RATES.get(variant, 0.0) if rate is None else rate
    return {"img_size": recipe.data.img_size, "drop_path_rate": rate, **options}
