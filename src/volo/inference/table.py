"""Models of tables (`volo.data.targets`): how good they are, and what they say of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from volo.data.targets import Output, TableTargets
from volo.inference.evaluate import NONE, refuse_not_finite, run_over
from volo.tasks.table import table_losses

SCORE_OF = {"class": "top1", "labels": "map", "number": "r2"}
"""The figure of each kind of output that a model is judged by; higher is better."""


def score_of(targets: TableTargets) -> str:
    """The figure that decides which weights are the best: that of the outputs' kind, or, where they are of several kinds,
    "score", the mean of those of all outputs."""
    kinds = {output.kind for output in targets.outputs}
    return SCORE_OF[next(iter(kinds))] if len(kinds) == 1 else "score"


class MirrorMean(nn.Module):
    """A model that looks twice: the mean of its outputs for an image and its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images).float() + self.model(images.flip(-1)).float()) / 2


def evaluate_table(
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    pixels: nn.Module,
    *,
    targets: TableTargets,
    device: torch.device | str,
    amp: str = "off",
    number_loss: str = "huber",
    on_batch: Callable[[int], None] | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Run `model` (images -> [B, targets.width]) over `loader` once and score it: see `table_figures`.

    Arguments as in `volo.inference.evaluate.evaluate`; when torch.distributed is set up, every rank calls this with its own
    share of the images, and all get the figures of all. Outputs of all images are kept, since average precision ranks them.
    Raises ValueError, with the image's name, for outputs that are not finite.
    """
    device = torch.device(device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    bad = NONE

    def add(logits: Tensor, batch: dict[str, Tensor]) -> None:
        nonlocal bad
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            bad = min(bad, int(batch["index"][~logits.isfinite().all(dim=1)].min()))
        kept.append((batch["index"].cpu(), logits, batch["target"].cpu()))

    run_over(loader, model, pixels, lambda images, _: model(images), add, device=device, amp=amp, on_batch=on_batch)
    empty = (
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, targets.width),
        torch.empty(0, targets.target_width).double(),
    )
    mine = tuple(map(torch.cat, zip(empty, *kept)))
    everywhere: list[Any] = [mine]
    bads: list[Any] = [bad]
    if dist.is_available() and dist.is_initialized():
        everywhere, bads = [None] * dist.get_world_size(), [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        dist.all_gather_object(bads, bad)
    if strict:
        refuse_not_finite(min(bads), 0.0, loader, amp)
    index, logits, target = map(torch.cat, zip(*everywhere))
    order = index.argsort(stable=True)  # the figures do not depend on who has looked at which image
    return table_figures(logits[order], target[order], targets, number_loss)


def table_figures(logits: Tensor, target: Tensor, targets: TableTargets, number_loss: str = "huber") -> dict[str, Any]:
    """Figures of all images, as plain numbers: logits [N, targets.width], target [N, targets.target_width].

    Keys: count; loss (the sum of the outputs', as they are without weights and smoothing); outputs, a dict with the
    figures of each output by its name (`label_figures`, `number_figures`, or those of a class); over the outputs of each
    kind the mean of each figure: top1, mean_class_accuracy; map, f1_micro, f1_macro; mae, rmse, r2; and for outputs of
    several kinds score, the mean of what each is judged by. Raises ValueError if no image was seen.
    """
    if not len(logits):
        raise ValueError("no labelled images were evaluated: the data is empty")
    losses = table_losses(logits, target, targets, number_loss=number_loss)
    parts = zip(targets.outputs, targets.split_logits(logits), targets.split_targets(target))
    each = [_figures_of(output, its, wanted) for output, its, wanted in parts]
    result: dict[str, Any] = {"count": len(logits), "loss": float(sum(losses))}
    judged = []
    for kind, score in SCORE_OF.items():
        figures = [its for output, its in zip(targets.outputs, each) if output.kind == kind]
        judged += [its[score] for its in figures]
        for name in figures[0] if figures else ():
            if not isinstance(figures[0][name], list):
                result[name] = sum(its[name] for its in figures) / len(figures)
    if score_of(targets) == "score":
        result["score"] = sum(judged) / len(judged)
    return result | {
        "outputs": {output.name: its for output, its in zip(targets.outputs, each)},
        "confusion": [],
    }


def _figures_of(output: Output, logits: Tensor, target: Tensor) -> dict[str, Any]:
    if output.kind == "class":
        predicted, truth = logits.argmax(dim=1), target[:, 0].long()
        K = len(output.classes)
        confusion = torch.bincount(truth * K + predicted, minlength=K * K).reshape(K, K)
        per_class = confusion.diagonal().double() / confusion.sum(1)
        return {
            "classes": list(output.classes),
            "top1": float((predicted == truth).double().mean()),
            "mean_class_accuracy": float(per_class.nanmean()),
            "per_class_accuracy": [None if value != value else value for value in per_class.tolist()],
            "confusion": confusion.tolist(),
        }
    if output.kind == "labels":
        return {"classes": list(output.classes), **label_figures(logits, target > 0.5)}
    return number_figures(logits[:, 0].double() * output.std + output.mean, target[:, 0].double())


def label_figures(logits: Tensor, truth: Tensor) -> dict[str, Any]:
    """Several labels an image: logits [N, K], truth bool [N, K].

    map: mean over the labels that some image has of the average precision, sum over ranks of (recall gained) x precision,
    images of equal logits being one rank; 0 where no image has any. f1_micro, f1_macro: of the labels with a probability
    of at least 0.5, over all pairs of image and label, and the mean over labels (one that is neither there nor predicted
    counts 0). per_class_ap, per_class_f1: [K], None for the average precision of a label that no image has.
    """
    precisions = [average_precision(logits[:, k], truth[:, k]) for k in range(truth.shape[1])]
    known = [value for value in precisions if value is not None]
    predicted = logits >= 0
    hits, wrong = (predicted & truth).sum(0).double(), (predicted ^ truth).sum(0).double()
    f1 = (2 * hits / (2 * hits + wrong)).nan_to_num(0.0)
    return {
        "map": sum(known) / len(known) if known else 0.0,
        "f1_micro": float((2 * hits.sum() / (2 * hits.sum() + wrong.sum())).nan_to_num(0.0)),
        "f1_macro": float(f1.mean()),
        "per_class_ap": precisions,
        "per_class_f1": f1.tolist(),
    }


def average_precision(scores: Tensor, truth: Tensor) -> float | None:
    """Of one label: scores [N], truth bool [N]; None where no image has it."""
    if not truth.any():
        return None
    order = scores.argsort(descending=True, stable=True)
    scores, hits = scores[order], truth[order].double().cumsum(0)
    # Where the rank of each different score ends.
    ends = torch.cat([(scores[1:] != scores[:-1]).nonzero()[:, 0], torch.tensor([len(scores) - 1])])
    hits = hits[ends]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gained * hits / (ends + 1)).sum() / hits[-1])


def number_figures(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """A number, in its own units: float64 [N] each. mae, rmse; r2, 1 - squared errors / squared deviations from the mean of
    `truth` (where all of that is one number: 1 if it is met, otherwise 0)."""
    errors = predicted - truth
    squares, spread = float(errors.square().sum()), float((truth - truth.mean()).square().sum())
    return {
        "mae": float(errors.abs().mean()),
        "rmse": (squares / len(truth)) ** 0.5,
        "r2": 1 - squares / spread if spread else float(squares == 0),
    }


@dataclass(frozen=True)
class Answer:
    """What a model says of an image for one output."""

    output: str
    kind: str
    number: float | None = None
    """In the table's own units."""
    labels: tuple[tuple[str, float], ...] = ()
    """Names and probabilities, most probable first: the top classes, or all labels above the threshold."""


def read_answers(logits: Tensor, targets: TableTargets, top: int, threshold: float) -> list[tuple[Answer, ...]]:
    """For each image of logits [B, targets.width]: what it says of each output."""
    columns = []
    for output, its in zip(targets.outputs, targets.split_logits(logits.float().cpu())):
        if output.kind == "number":
            numbers = its[:, 0].double() * output.std + output.mean
            columns.append([Answer(output.name, output.kind, number) for number in numbers.tolist()])
            continue
        probabilities = its.softmax(1) if output.kind == "class" else its.sigmoid()
        most = min(top, its.shape[1]) if output.kind == "class" else its.shape[1]
        least = 0.0 if output.kind == "class" else threshold
        best = probabilities.sort(dim=1, descending=True, stable=True)
        columns.append(
            [
                Answer(
                    output.name,
                    output.kind,
                    labels=tuple((output.classes[i], p) for p, i in zip(values[:most], indices) if p >= least),
                )
                for values, indices in zip(best.values.tolist(), best.indices.tolist())
            ]
        )
    return list(zip(*columns))
