"""What a table says of an image besides one class: several labels, numbers, or several of these, side by side.

`TableTargets` is the one description from which loss, figures and predictions follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["class", "labels", "number"]


@dataclass(frozen=True)
class Output:
    """One thing to learn of an image."""

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    """Of a class, and of several labels, in the order of the logits."""
    columns: tuple[str, ...] = ()
    """Where the table has it: one column, or for several labels a column of 0 and 1 for each."""
    mean: float = 0.0
    """Of a number in the training images: the model predicts (number - mean) / std."""
    std: float = 1.0

    @property
    def width(self) -> int:
        """Logits of a model."""
        return 1 if self.kind == "number" else len(self.classes)

    @property
    def target_width(self) -> int:
        """Values of a target: the class or the number itself, a 0 or 1 for each of several labels."""
        return len(self.classes) if self.kind == "labels" else 1


@dataclass(frozen=True)
class TableTargets:
    """All outputs of a model, one after another in its logits [B, width] and in targets [B, target_width]."""

    outputs: tuple[Output, ...]

    @property
    def width(self) -> int:
        return sum(output.width for output in self.outputs)

    @property
    def target_width(self) -> int:
        return sum(output.target_width for output in self.outputs)

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each logit."""
        if len(self.outputs) == 1 and self.outputs[0].classes:
            return self.outputs[0].classes
        return tuple(
            f"{output.name}: {part}" if part else output.name
            for output in self.outputs
            for part in output.classes or ("",)
        )

    def split_logits(self, logits: Tensor) -> list[Tensor]:
        """[B, width] -> [B, output.width] for each output."""
        return list(logits.split([output.width for output in self.outputs], dim=1))

    def split_targets(self, targets: Tensor) -> list[Tensor]:
        """[B, target_width] -> [B, output.target_width] for each output."""
        return list(targets.split([output.target_width for output in self.outputs], dim=1))

    def standardised(self, targets: Tensor) -> TableTargets:
        """These with mean and standard deviation of the numbers in `targets`, float64 [N, target_width].

        Raises ValueError for numbers that are all the same.
        """
        fitted = []
        for output, values in zip(self.outputs, self.split_targets(targets)):
            if output.kind == "number":
                mean, std = float(values.mean()), float(values.std(correction=0))
                if std == 0:
                    raise ValueError(
                        f"the column {output.name} is {mean:g} for each of the {len(values)} training images: there is nothing "
                        "to learn. Leave it out of data.label_columns"
                    )
                output = dataclasses.replace(output, mean=mean, std=std)
            fitted.append(output)
        return TableTargets(tuple(fitted))

    def to_list(self) -> list[dict[str, Any]]:
        """Plain containers, strings and numbers, for checkpoints."""
        return [{k: list(v) if isinstance(v, tuple) else v for k, v in vars(output).items()} for output in self.outputs]

    @classmethod
    def from_list(cls, described: Sequence[Mapping[str, Any]]) -> TableTargets:
        values: list[dict[str, Any]] = [
            {name: tuple(value) if isinstance(value, list) else value for name, value in its.items()}
            for its in described
        ]
        return cls(tuple(Output(**its) for its in values))


def as_labels(targets: Tensor) -> Tensor:
    """int64 numbers that differ where float64 `targets` do: what digests of labels are made of."""
    return targets if targets.dtype == torch.int64 else targets.contiguous().view(torch.int64)
