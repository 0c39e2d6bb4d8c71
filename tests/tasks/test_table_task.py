from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from volo.config import LossConfig, TableConfig
from volo.data.targets import Output, TableTargets
from volo.models.factory import create_model
from volo.tasks.table import TableTask, table_losses

TARGETS = TableTargets(
    (
        Output("age", "number", (), ("age",), 40.0, 12.0),
        Output("gender", "class", ("f", "m", "x"), ("gender",)),
        Output("tags", "labels", ("sea", "sky"), ("tags",)),
    )
)
TARGET = torch.tensor([[52.0, 1, 0, 1], [28.0, 2, 1, 1]], dtype=torch.float64)


def model(width: int = TARGETS.width):
    torch.manual_seed(0)
    return create_model(
        "volo_nano", num_classes=width, img_size=16, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), stem_dim=8,
        patch_size=4,
    )  # fmt: skip


def test_losses_are_those_of_torch() -> None:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    number, label, several = table_losses(logits, TARGET, TARGETS)
    torch.testing.assert_close(number, F.huber_loss(logits[:, 0], torch.tensor([1.0, -1.0])))
    torch.testing.assert_close(label, F.cross_entropy(logits[:, 1:4], torch.tensor([1, 2])))
    torch.testing.assert_close(several, F.binary_cross_entropy_with_logits(logits[:, 4:], TARGET[:, 2:].float()))
    squared = table_losses(logits, TARGET, TARGETS, number_loss="mse")[0]
    torch.testing.assert_close(squared, F.mse_loss(logits[:, 0], torch.tensor([1.0, -1.0])))
    smooth = table_losses(logits, TARGET, TARGETS, smoothing=0.2)[2]
    torch.testing.assert_close(
        smooth, F.binary_cross_entropy_with_logits(logits[:, 4:], TARGET[:, 2:].float() * 0.8 + 0.1)
    )


def test_large_numbers_keep_their_decimals() -> None:
    year = TableTargets((Output("when", "number", (), ("when",), 1.7e9, 0.25),))
    found = table_losses(torch.zeros(1, 1), torch.tensor([[1.7e9 + 0.5]], dtype=torch.float64), year, number_loss="mse")
    assert float(found[0]) == pytest.approx(4.0)


def test_task_weighs_its_outputs_and_returns_the_logits_of_the_model() -> None:
    net, images = model(), torch.randn(2, 3, 16, 16)
    task = TableTask(net, TARGETS, LossConfig(label_smoothing=0.0), TableConfig(weights=(0.5, 2.0, 0.0))).eval()
    result = task({"image": images, "target": TARGET})
    logits = net(images)
    assert torch.equal(result["output"], logits)
    number, label, _ = table_losses(logits, TARGET, TARGETS)
    torch.testing.assert_close(result["loss"], 0.5 * number + 2 * label)
    assert task({"image": images}).keys() == {"output"}


def test_labels_are_smoothed_in_training_alone() -> None:
    task = TableTask(model(), TARGETS, LossConfig(label_smoothing=0.2))
    batch = {"image": torch.randn(2, 3, 16, 16), "target": TARGET}
    plain = sum(table_losses(task.eval()(batch)["output"], TARGET, TARGETS))
    torch.testing.assert_close(task(batch)["loss"], plain)
    smooth = sum(table_losses(task.train()(batch)["output"], TARGET, TARGETS, smoothing=0.2))
    torch.testing.assert_close(task(batch)["loss"], smooth)


def test_one_graph() -> None:
    task = TableTask(model(), TARGETS)
    batch = {"image": torch.randn(2, 3, 16, 16), "target": TARGET}
    explained = torch._dynamo.explain(task)(batch)
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0)])
def test_weights_that_do_not_fit(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="for each of the outputs, not all 0: age, gender, tags"):
        TableTask(model(), TARGETS, table=TableConfig(weights=weights))


def test_model_of_another_width() -> None:
    with pytest.raises(ValueError, match="5 logits and the outputs take 6"):
        TableTask(model(5), TARGETS)
