"""The classification task: what mixing does to images, tokens and targets, and what the loss is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import volo
from volo.config import AugmentConfig, LossConfig
from volo.tasks.classify import ClassifyTask
from volo.tasks.mixing import (
    draw_box,
    draw_share,
    enlarge_mask,
    mix_inside,
    mix_pixels,
    mix_targets,
    restore_tokens,
    smooth_one_hot,
    soft_cross_entropy,
)


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


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(size, 3, 32, 32, generator=generator), "target": torch.arange(size) % 5}


def test_evaluation_is_the_model_bit_for_bit_whatever_mixing_is_on(model):
    task = ClassifyTask(model, LossConfig(token_weight=0.5), AugmentConfig(mix_token=1.0)).eval()
    data = batch()
    with torch.no_grad():
        result = task(data)
        assert torch.equal(result["output"], model(data["image"]))
        torch.testing.assert_close(result["loss"], F.cross_entropy(result["output"], data["target"]))
        assert "loss" not in task({"image": data["image"]})


def test_training_without_mixing_is_the_model_bit_for_bit(model):
    task = ClassifyTask(model, LossConfig(label_smoothing=0.1)).train()
    data = batch()
    result = task(data)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.reset_running_stats()
    assert torch.equal(result["output"], model(data["image"]))
    expected = F.cross_entropy(result["output"], data["target"], label_smoothing=0.1)
    torch.testing.assert_close(result["loss"], expected)


@given(st.integers(1, 16), st.integers(1, 16), st.floats(0.1, 4.0), st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_a_box_is_one_rectangle_of_about_the_drawn_area(height, width, alpha, seed):
    torch.manual_seed(seed)
    mask = draw_box(height, width, alpha)
    assert mask.shape == (height, width)
    rows, columns = mask.any(1), mask.any(0)
    assert torch.equal(mask, rows[:, None] & columns[None, :])
    for line in (rows, columns):
        inside = line.nonzero().flatten()
        assert len(inside) == 0 or len(inside) == inside[-1] - inside[0] + 1


def test_boxes_and_shares_follow_the_generator_and_the_distribution():
    torch.manual_seed(3)
    first = [draw_box(14, 14, 1.0) for _ in range(400)]
    torch.manual_seed(3)
    assert all(torch.equal(a, draw_box(14, 14, 1.0)) for a in first)
    areas = torch.stack([m.float().mean() for m in first])
    assert 0.25 < float(areas.mean()) < 0.45  # half, less what is cut off at the edges
    shares = torch.stack([draw_share(1.0) for _ in range(400)])
    assert 0.4 < float(shares.mean()) < 0.6
    assert float(shares.min()) < 0.1
    assert float(shares.max()) > 0.9


def test_mixing_is_its_own_inverse_and_tokens_go_home():
    x = torch.randn(4, 6, 6, 3)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1:4, 2:6] = True
    mixed = mix_inside(x, mask)
    assert torch.equal(mixed[0][mask], x[3][mask])
    assert torch.equal(mixed[0][~mask], x[0][~mask])
    assert torch.equal(mix_inside(mixed, mask), x)
    assert torch.equal(restore_tokens(mixed.flatten(1, 2), mask), x.flatten(1, 2))
    fine = enlarge_mask(mask, 2)
    assert fine.shape == (12, 12)
    assert torch.equal(fine[::2, ::2], mask)
    assert torch.equal(fine[1::2, 1::2], mask)


def test_targets():
    soft = smooth_one_hot(torch.tensor([0, 2]), 3, 0.3)
    torch.testing.assert_close(soft, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]))
    torch.testing.assert_close(mix_targets(soft, 0.75)[0], torch.tensor([0.625, 0.1, 0.275]))
    logits = torch.randn(2, 3)
    torch.testing.assert_close(soft_cross_entropy(logits, soft), F.cross_entropy(logits, soft))


def test_mix_token_mixes_the_class_target_by_area(model):
    """The loss of a mixed batch, put together by hand from the same draws."""
    loss, augment = LossConfig(label_smoothing=0.0, token_weight=0.5), AugmentConfig(mix_token=1.0)
    task = ClassifyTask(model, loss, augment).train()
    data = batch()
    for seed in range(20):  # until the box is neither empty nor everything
        torch.manual_seed(seed)
        mask = draw_box(4, 4, 1.0)
        if 0 < mask.float().mean() < 1:
            break
    torch.manual_seed(seed)
    result = task(data)
    hard = F.one_hot(data["target"], 5).float()
    fine = mix_inside(model.forward_embed(data["image"]), enlarge_mask(mask, 2))
    class_logits, token_logits = model.class_and_token_logits(model.forward_tokens(fine))
    class_loss = F.cross_entropy(class_logits, mix_targets(hard, 1 - mask.float().mean()))
    restored = restore_tokens(token_logits, mask)
    token_loss = F.cross_entropy(restored.flatten(0, 1), data["target"].repeat_interleave(16))
    torch.testing.assert_close(result["loss"], class_loss + 0.5 * token_loss)


@pytest.mark.parametrize(
    "augment", [AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=0.2, cutmix=1.0)]
)
def test_pixel_mixing_changes_training_only_and_follows_the_generator(model, augment):
    task, data = ClassifyTask(model, None, augment), batch()
    torch.manual_seed(0)
    first = task.train()(data)["loss"]
    torch.manual_seed(0)
    assert torch.equal(task(data)["loss"], first)
    torch.manual_seed(1)
    assert not torch.equal(task(data)["loss"], first)
    never = ClassifyTask(model, None, AugmentConfig(mixup=0.8, mix_prob=0.0)).train()
    plain = ClassifyTask(model).train()
    torch.testing.assert_close(never(data)["loss"], plain(data)["loss"])


def test_contradictions_are_refused(model):
    with pytest.raises(ValueError, match="choose one"):
        ClassifyTask(model, None, AugmentConfig(mix_token=1.0, cutmix=1.0))
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="reset_classifier"):
        ClassifyTask(model)


class Averages(nn.Module):
    """No VOLO: a layer on the mean colour of an image."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean(dim=(2, 3)))


def test_any_classifier_can_be_trained_where_no_tokens_are_asked_for():
    data, model = batch(), Averages()
    result = ClassifyTask(model, LossConfig(label_smoothing=0.1), AugmentConfig(mixup=0.8, mix_prob=0.0)).train()(data)
    assert torch.equal(result["output"], model(data["image"]))
    torch.testing.assert_close(result["loss"], F.cross_entropy(result["output"], data["target"], label_smoothing=0.1))
    for loss, augment in ((LossConfig(token_weight=0.5), None), (None, AugmentConfig(mix_token=1.0))):
        with pytest.raises(ValueError, match="the model is a Averages"):
            ClassifyTask(model, loss, augment)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_images_are_made_of_themselves_and_their_partners(mixup, cutmix):
    images = torch.stack([torch.full((3, 8, 8), float(i)) for i in range(2)])
    target, kinds = torch.eye(2), set()
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, soft = mix_pixels(images, target, mixup, cutmix, 0.7)
        other = mixed[0, 0]  # the share of the partner at each place
        torch.testing.assert_close(mixed[1], 1.0 - mixed[0])
        torch.testing.assert_close(soft, torch.stack([1 - other.mean(), other.mean()])[torch.tensor([[0, 1], [1, 0]])])
        is_box = bool(((other == 0) | (other == 1)).all())
        assert is_box or bool((other == other[0, 0]).all())
        kinds.add("none" if not other.any() else "cutmix" if is_box else "mixup")
    assert kinds == {"none"} | ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())
