"""Scores of segmentations against torchmetrics and against boundaries drawn by erosion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from volo.inference.segment_metrics import SegmentationMetrics, boundary_band


def random_maps(seed: int, num_classes: int, shape=(2, 24, 30), void: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(0, num_classes, shape, generator=generator)
    target = torch.where(torch.rand(shape, generator=generator) < 0.4, predicted, predicted.flip(-1))
    target[torch.rand(shape, generator=generator) < void] = 255
    return predicted, target


@given(seed=st.integers(0, 1000), num_classes=st.integers(2, 7), absent=st.booleans())
@settings(max_examples=15, deadline=None)
def test_scores_equal_those_of_torchmetrics(seed: int, num_classes: int, absent: bool) -> None:
    K = num_classes + absent  # one class more than occurs
    ours = SegmentationMetrics(K, boundary=False)
    jaccard = {a: MulticlassJaccardIndex(K, average=a, ignore_index=255) for a in ("macro", "none")}
    others = [
        MulticlassAccuracy(K, average="micro", ignore_index=255),
        MulticlassConfusionMatrix(K, ignore_index=255),
    ]
    for i in range(3):
        predicted, target = random_maps(seed + i, num_classes)
        ours.update(predicted, target)
        for metric in (*jaccard.values(), *others):
            metric.update(predicted, target)
    got = ours.compute()
    assert got["miou"] == pytest.approx(jaccard["macro"].compute().item(), abs=1e-6)
    known = [value for value in got["per_class_iou"] if value is not None]
    assert known == pytest.approx(jaccard["none"].compute()[: len(known)].tolist(), abs=1e-6)
    assert got["pixel_accuracy"] == pytest.approx(others[0].compute().item(), abs=1e-6)
    assert got["confusion"] == others[1].compute().tolist()
    assert got["count"] == 6
    if absent:
        assert got["per_class_iou"][-1] is None


def test_batches_and_processes_add_up() -> None:
    maps = [random_maps(seed, 4) for seed in range(4)]
    one_by_one, at_once = SegmentationMetrics(4), SegmentationMetrics(4)
    for predicted, target in maps:
        for i in range(len(target)):
            one_by_one.update(predicted[i : i + 1], target[i : i + 1], torch.tensor(3.0))
    at_once.update(torch.cat([m[0] for m in maps]), torch.cat([m[1] for m in maps]), torch.tensor(24.0))
    assert one_by_one.compute() == at_once.compute()


def test_memory_does_not_grow_with_the_pictures() -> None:
    metrics = SegmentationMetrics(3)
    before = {name: value.numel() for name, value in vars(metrics).items() if isinstance(value, torch.Tensor)}
    metrics.update(*random_maps(0, 3, (1, 200, 300)))
    assert {name: v.numel() for name, v in vars(metrics).items() if isinstance(v, torch.Tensor)} == before


def eroded_band(labels: np.ndarray, reach: int) -> np.ndarray:
    """Each class's mask minus its erosion by a square, with zeros around the image: the definition of Boundary IoU."""
    band = np.zeros(labels.shape, bool)
    for label in np.unique(labels):
        mask = labels == label
        kept = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=reach, border_value=0)
        band |= mask & ~kept
    return band


@pytest.mark.parametrize("shape", [(60, 80), (17, 130), (5, 5)])
def test_band_is_what_erosion_takes_away(shape) -> None:
    rng = np.random.default_rng(0)
    labels = ndimage.zoom(rng.integers(0, 4, (4, 5)), (shape[0] / 4, shape[1] / 5), order=0)
    reach = max(1, round(0.02 * np.hypot(*labels.shape)))
    assert (boundary_band(torch.from_numpy(labels)[None])[0].numpy() == eroded_band(labels, reach)).all()


def test_boundary_iou_by_hand() -> None:
    rng = np.random.default_rng(1)
    target = ndimage.zoom(rng.integers(0, 3, (3, 4)), (30, 30), order=0)
    predicted = np.roll(target, 2, axis=1)
    target[:10, :10] = 255
    metrics = SegmentationMetrics(3)
    metrics.update(torch.from_numpy(predicted)[None], torch.from_numpy(target)[None])
    seen = np.where(target == 255, 255, predicted)
    reach = round(0.02 * np.hypot(*target.shape))
    bands = [eroded_band(labels, reach) for labels in (target, seen)]
    got = metrics.compute()
    for k in range(3):
        a, b = (band & (labels == k) for band, labels in zip(bands, (target, seen)))
        assert got["per_class_boundary_iou"][k] == pytest.approx((a & b).sum() / (a | b).sum())
    assert got["boundary_iou"] < got["miou"]
    perfect = SegmentationMetrics(3)
    perfect.update(torch.from_numpy(target).clamp(max=2)[None], torch.from_numpy(target)[None])
    assert perfect.compute()["boundary_iou"] == perfect.compute()["miou"] == 1.0


def test_errors() -> None:
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match="no pixel"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"\[B, H, W\]"):
        metrics.update(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="classes are 0 to 2"):
        metrics.update(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3))
    metrics.update(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 255))
    with pytest.raises(ValueError, match="no pixel"):
        metrics.compute()
