"""What a table says of an image (`volo.data.targets`): classes, several labels and numbers, side by side in one head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from volo.config import LossConfig, TableConfig
from volo.data.targets import Output, TableTargets
from volo.models.volo import VOLO


class TableTask(nn.Module):
    """A VOLO and what it is trained for: `forward(batch) -> {"loss", "output"}`.

    batch: "image" float [B, in_chans, H, W], normalised; "target" float [B, targets.target_width].
    Returned: "loss", a scalar (without "target" in the batch there is none); "output", the logits [B, targets.width] of
    `model.forward`, in which numbers are standardised.

    The loss is the weighted sum of that of each output: cross-entropy of a class, binary cross-entropy with logits,
    averaged over labels, of several labels, and Huber's loss or the squared error of a number in standard deviations.
    Labels are smoothed in training mode: with label_smoothing s, a 0 or 1 of several labels becomes s / 2 or 1 - s / 2.
    """

    def __init__(
        self,
        model: VOLO,
        targets: TableTargets,
        loss: LossConfig | None = None,
        table: TableConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.targets = targets
        self.loss = loss or LossConfig()
        self.table = table or TableConfig()
        if model.num_classes != targets.width:
            raise ValueError(
                f"the model has {model.num_classes} logits and the outputs take {targets.width}: create it with num_classes={targets.width}"
            )
        self.weights = output_weights(targets, self.table)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(batch["image"])
        if "target" not in batch:
            return {"output": logits}
        smoothing = self.loss.label_smoothing if self.training else 0.0
        losses = table_losses(logits, batch["target"], self.targets, smoothing, self.table.number_loss)
        weighted = [weight * loss for weight, loss in zip(self.weights, losses)]
        return {"loss": sum(weighted[1:], weighted[0]), "output": logits}


def output_weights(targets: TableTargets, table: TableConfig) -> tuple[float, ...]:
    """Weight of each output in the loss. Raises ValueError where `table.weights` are not one for each, or negative."""
    outputs = targets.outputs
    weights = table.weights or (1.0,) * len(outputs)
    if len(weights) != len(outputs) or min(weights) < 0 or not any(weights):
        raise ValueError(
            f"table.weights is {list(table.weights)}; it takes a number of at least 0 for each of the outputs, not all 0: "
            f"{', '.join(output.name for output in outputs)}"
        )
    return weights


def table_losses(
    logits: Tensor, target: Tensor, targets: TableTargets, smoothing: float = 0.0, number_loss: str = "huber"
) -> list[Tensor]:
    """The mean loss of each output: logits [B, targets.width], target [B, targets.target_width]."""
    parts = zip(targets.outputs, targets.split_logits(logits.float()), targets.split_targets(target))
    return [_loss(output, its, wanted, smoothing, number_loss) for output, its, wanted in parts]


def _loss(output: Output, logits: Tensor, target: Tensor, smoothing: float, number_loss: str) -> Tensor:
    if output.kind == "class":
        return F.cross_entropy(logits, target[:, 0].long(), label_smoothing=smoothing)
    if output.kind == "labels":
        return F.binary_cross_entropy_with_logits(logits, target.float() * (1 - smoothing) + smoothing / 2)
    # In the target's own precision: the year 2024 has to keep its decimals.
    standardised = ((target - output.mean) / output.std).float()
    return F.huber_loss(logits, standardised) if number_loss == "huber" else F.mse_loss(logits, standardised)
