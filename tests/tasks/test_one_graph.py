"""Every task is one graph, compiled once, whatever is drawn: forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import volo
from volo.config import AugmentConfig, LossConfig, SegmentConfig, TokenLabelConfig
from volo.tasks.classify import ClassifyTask
from volo.tasks.segment import SegmentTask
from volo.tasks.token_label import TokenLabelTask

SMALL = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4, "img_size": 32}


def classify(**augment: float) -> nn.Module:
    model = volo.create_model("volo_nano", num_classes=5, **SMALL)
    return ClassifyTask(model, LossConfig(token_weight=0.5), AugmentConfig(**augment))


def token_label() -> nn.Module:
    model = volo.create_model("volo_nano", num_classes=5, **SMALL)
    return TokenLabelTask(model, None, AugmentConfig(mix_token=1.0), TokenLabelConfig(ground_truth=True))


def segment() -> nn.Module:
    model = volo.create_segmenter("fpn_volo_nano", 5, channels=8, aux_channels=8, **SMALL)
    return SegmentTask(model, SegmentConfig(ohem=0.5, ohem_min_kept=100), [0.5, 1.0, 1.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: classify(mixup=0.8),
        lambda: classify(cutmix=1.0, mix_prob=0.5),
        lambda: classify(mixup=0.8, cutmix=1.0, mix_prob=0.5),
        lambda: classify(mix_token=1.0),
        token_label,
        segment,
    ],
    ids=["mixup", "cutmix", "mixup and cutmix", "mix_token", "token_label", "segment"],
)
def test_one_graph_compiled_once_whatever_is_drawn(make) -> None:
    task, graphs = make().train(), 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(task, backend=counting, fullgraph=True)
    batch = {"image": torch.randn(4, 3, 32, 32), "target": torch.arange(4)}
    if isinstance(task, TokenLabelTask):
        batch |= {"class_annotation": torch.randn(4, 5), "token_annotation": torch.randn(4, 16, 5)}
    if isinstance(task, SegmentTask):
        batch["target"] = torch.randint(0, 5, (4, 32, 32))
    losses = set()
    for _ in range(12):
        task.zero_grad()
        loss = compiled(batch)["loss"]
        loss.backward()
        losses.add(loss.item())
    assert graphs == 1
    assert len(losses) > 1 or isinstance(task, SegmentTask)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in task.parameters())
