"""The loss of every pixel: void, class weights, hard examples, the auxiliary head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import volo
from volo.config import SegmentConfig
from volo.tasks.segment import SegmentTask, class_weights, hard_pixels

K = 4


class Pixelwise(nn.Module):
    """A model of one 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, K, 1)

    def forward(self, images):
        return self.conv(images)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    target = torch.randint(0, K, (2, 9, 11))
    target[0, :3] = 255
    return {"image": torch.randn(2, 3, 9, 11), "target": target}


def test_void_counts_for_nothing(batch) -> None:
    torch.manual_seed(1)
    task = SegmentTask(Pixelwise())
    out = task(batch)
    expected = F.cross_entropy(task.model(batch["image"]), batch["target"], ignore_index=255)
    torch.testing.assert_close(out["loss"], expected)
    assert torch.equal(out["output"], task.model(batch["image"]))
    assert "loss" not in task({"image": batch["image"]})
    # Changing what is void changes neither the loss nor its gradient.
    images = batch["image"].clone().requires_grad_()
    task({**batch, "image": images})["loss"].backward()
    assert images.grad[0, :, :3].abs().sum() == 0 < images.grad[0, :, 3:].abs().sum()


def test_a_batch_of_void_is_no_catastrophe(batch) -> None:
    task = SegmentTask(Pixelwise(), SegmentConfig(ohem=0.7))
    loss = task({**batch, "target": torch.full((2, 9, 11), 255)})["loss"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad.abs().sum() == 0 for p in task.parameters())


def test_class_weights_multiply_the_losses(batch) -> None:
    weights = [0.5, 1.0, 2.0, 4.0]
    task = SegmentTask(Pixelwise(), class_weights=weights)
    logits = task.model(batch["image"])
    by_hand = F.cross_entropy(logits, batch["target"], torch.tensor(weights), ignore_index=255, reduction="sum")
    torch.testing.assert_close(task(batch)["loss"], by_hand / (batch["target"] != 255).sum())
    assert "class_weights" not in task.state_dict()


def test_weights_from_shares() -> None:
    assert class_weights([1, 2], "none") is None
    median = class_weights([100, 200, 400, 0], "median")
    assert [w / median[1] for w in median[:3]] == pytest.approx([2.0, 1.0, 0.5])
    assert sum(median[:3]) / 3 == pytest.approx(1.0) and median[3] == 1.0
    log = class_weights([100, 300], "log")
    assert log[0] / log[1] == pytest.approx(math.log(1.77) / math.log(1.27))
    assert class_weights([0, 0], "log") == [1.0, 1.0]


@pytest.mark.parametrize("min_kept", [1, 20, 500])
def test_hard_pixels_are_those_below_the_threshold_or_the_hardest(batch, min_kept) -> None:
    logits = torch.randn(2, K, 9, 11, generator=torch.Generator().manual_seed(2)) * 3
    losses = F.cross_entropy(logits, batch["target"], ignore_index=255, reduction="none").flatten()
    counts = (batch["target"].flatten() != 255).float()
    kept = hard_pixels(losses, counts, 0.3, min_kept).bool() & counts.bool()
    truth = batch["target"].flatten()
    probability = logits.softmax(1).permute(0, 2, 3, 1).flatten(0, 2)[range(len(truth)), truth.clamp(max=K - 1)]
    valid = truth != 255
    hard = (probability < 0.3) & valid
    if int(hard.sum()) < min_kept:
        order = torch.where(valid, probability, torch.inf).argsort()[:min_kept]
        hard = torch.zeros_like(valid)
        hard[order] = True
        hard &= valid
    assert torch.equal(kept, hard)


def test_ohem_is_for_training_only(batch) -> None:
    torch.manual_seed(3)
    task = SegmentTask(Pixelwise(), SegmentConfig(ohem=0.2, ohem_min_kept=5))
    plain = SegmentTask(task.model)
    assert task(batch)["loss"] > plain(batch)["loss"]
    torch.testing.assert_close(task.eval()(batch)["loss"], plain(batch)["loss"])


def test_auxiliary_head_counts_in_training_with_its_weight() -> None:
    torch.manual_seed(0)
    model = volo.create_segmenter(
        "upernet_volo_d1",
        K,
        depths=(1, 1, 1, 1),
        embed_dims=(16, 32),
        num_heads=(1, 2),
        stem_dim=8,
        img_size=64,
        channels=16,
        aux_channels=8,
        dropout=0.0,
        drop_path_rate=0.0,
    )
    batch = {"image": torch.randn(2, 3, 64, 64), "target": torch.randint(0, K, (2, 64, 64))}
    losses = {}
    for weight in (0.0, 0.4, 1.0):
        losses[weight] = SegmentTask(model, SegmentConfig(aux_weight=weight))(batch)["loss"].item()
    assert losses[0.4] == pytest.approx(losses[0.0] + 0.4 * (losses[1.0] - losses[0.0]), rel=1e-5)
    task = SegmentTask(model).eval()
    with torch.no_grad():
        assert torch.equal(task(batch)["output"], model(batch["image"]))
