"""The task of token labeling: what it minimises, and that it leaves the model alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import volo
from volo.config import AugmentConfig, LossConfig, TokenLabelConfig
from volo.tasks.classify import ClassifyTask
from volo.tasks.token_label import TokenLabelTargets, TokenLabelTask, token_label_loss


@pytest.fixture
def model() -> volo.VOLO:
    torch.manual_seed(0)
    return volo.create_model(
        "volo_nano",
        depths=(1, 1),
        embed_dims=(32, 64),
        num_heads=(1, 2),
        stem_dim=8,
        patch_size=4,
        img_size=32,
        num_classes=5,
    )


def annotated(size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(size, 3, 32, 32, generator=generator),
        "target": torch.arange(size) % 5,
        "class_annotation": torch.randn(size, 5, generator=generator),
        "token_annotation": torch.randn(size, 16, 5, generator=generator),
    }


def test_without_mixing_the_output_is_the_model_bit_for_bit(model):
    batch = annotated()
    task = TokenLabelTask(model).train()
    result = task(batch)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.reset_running_stats()
    assert torch.equal(result["output"], model(batch["image"]))
    task = TokenLabelTask(model, augment=AugmentConfig(mix_token=1.0)).eval()
    with torch.no_grad():
        result = task(batch)
        assert torch.equal(result["output"], model(batch["image"]))
        assert torch.equal(task({"image": batch["image"]})["output"], result["output"])
    torch.testing.assert_close(result["loss"], F.cross_entropy(result["output"], batch["target"]))


def test_the_loss_is_the_weighted_sum_put_together_by_hand(model):
    batch = annotated()
    task = TokenLabelTask(
        model, LossConfig(label_smoothing=0.0), None, TokenLabelConfig(cls_weight=0.7, dense_weight=0.3)
    )
    result = task.train()(batch)
    class_loss = F.cross_entropy(result["class_logits"], batch["class_annotation"].softmax(-1))
    token_loss = F.cross_entropy(
        result["token_logits"].flatten(0, 1), batch["token_annotation"].softmax(-1).flatten(0, 1)
    )
    torch.testing.assert_close(result["loss"], 0.7 * class_loss + 0.3 * token_loss)


def test_tokens_go_home_before_they_meet_their_labels(model):
    """A batch whose second half repeats the first in reverse is mixed with itself: the box changes nothing."""
    batch = annotated()
    whole = {name: torch.cat([value, value.flip(0)]) for name, value in batch.items()}
    plain = TokenLabelTask(model).train()(whole)
    mixing = TokenLabelTask(model, augment=AugmentConfig(mix_token=1.0)).train()
    for seed in range(5):
        torch.manual_seed(seed)
        torch.testing.assert_close(mixing(whole)["loss"], plain["loss"])
    moved = {**whole, "token_annotation": whole["token_annotation"].roll(1, 1)}
    assert abs(mixing(moved)["loss"] - plain["loss"]) > 1e-4


def test_without_annotation_the_picture_labels_its_tokens_as_in_plain_training(model):
    batch = {name: annotated()[name] for name in ("image", "target")}
    augment = AugmentConfig(mix_token=1.0)
    torch.manual_seed(3)
    own = TokenLabelTask(model, LossConfig(), augment).train()(batch)["loss"]
    torch.manual_seed(3)
    plain = ClassifyTask(model, LossConfig(token_weight=0.5), augment).train()(batch)["loss"]
    assert torch.equal(own, plain)


def test_ground_truth_counts_half_where_the_annotator_agrees_and_a_tenth_elsewhere():
    truth = torch.eye(4)[[0, 1]]
    label = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    targets = TokenLabelTargets(truth, label, label[:, None])
    logits = torch.randn(2, 4)
    mixed = torch.stack([0.5 * label[0] + 0.5 * truth[0], 0.9 * label[1] + 0.1 * truth[1]])
    loss = token_label_loss(logits, logits[:, None], targets, dense_weight=0.0, ground_truth=True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, mixed))
    alone = token_label_loss(logits, logits[:, None], targets, dense_weight=0.5, ground_truth="only")
    torch.testing.assert_close(alone, F.cross_entropy(logits, truth) + 0.5 * F.cross_entropy(logits, label))


def test_what_does_not_go_together_is_refused(model):
    with pytest.raises(ValueError, match="augment.mix_token, or train with plain labels"):
        TokenLabelTask(model, augment=AugmentConfig(cutmix=1.0))
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="reset_classifier"):
        TokenLabelTask(model)
