"""The wrong answers of a classifier that it was the surest of: where labels, or the model, deserve a look."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from volo.data.sources import ImageSource

HEADER = ("image", "true class", "predicted class", "probability of predicted class", "probability of true class")


@dataclass(frozen=True)
class WrongAnswer:
    """An image whose most probable class is not its own."""

    image: str
    truth: str
    predicted: str
    probability: float
    """Of the predicted class."""
    probability_of_truth: float
    index: int
    """Of the image in its source."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "true_class": self.truth,
            "predicted_class": self.predicted,
            "probability_of_predicted_class": round(self.probability, 6),
            "probability_of_true_class": round(self.probability_of_truth, 6),
        }


class WrongAnswers:
    """Collects the `most` wrong answers with the highest probability, batch by batch, on the device of the logits."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"the number of wrong answers to list is at least 1; given: {most}")
        self.most = most
        self._columns: Tensor | None = None  # float64 [5, n]: probability (-1: none), its class, of truth, truth, index

    def add(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """logits [B, num_classes]; target and index int64 [B], classes of the model and numbers of the images."""
        target, index = target.to(logits.device), index.to(logits.device)
        probabilities = logits.float().softmax(dim=1)
        best, predicted = probabilities.max(dim=1)
        of_truth = probabilities.gather(1, target[:, None])[:, 0]
        confidence = torch.where(predicted != target, best, -1.0)
        columns = torch.stack([x.double() for x in (confidence, predicted, of_truth, target, index)])
        if self._columns is not None:
            columns = torch.cat([self._columns, columns], dim=1)
        order = columns[0].sort(descending=True, stable=True).indices[: self.most]
        self._columns = columns[:, order]

    def listed(self, source: ImageSource, classes: Sequence[str]) -> list[WrongAnswer]:
        """Surest first; `source` is that of the images, `classes` are those of the model."""
        if self._columns is None:
            return []
        return [
            WrongAnswer(source.names[int(i)], classes[int(truth)], classes[int(predicted)], p, of_truth, int(i))
            for p, predicted, of_truth, truth, i in self._columns.T.tolist()
            if p >= 0
        ]


def to_csv(answers: Iterable[WrongAnswer]) -> Iterator[str]:
    """Lines of CSV under `HEADER`."""
    for values in (HEADER, *(answer.to_dict().values() for answer in answers)):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        yield line.getvalue()
