"""Training-mode outputs, losses and gradients of the original code, MixToken included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import volo
from volo.config import AugmentConfig, LossConfig, TokenLabelConfig
from volo.tasks.mixing import draw_box
from volo.tasks.token_label import TokenLabelTargets, TokenLabelTask, token_label_loss

safetensors = pytest.importorskip("safetensors.torch")


def test_heads_and_losses(golden: Path):
    """The head, the joined logits and the three losses, from recorded logits."""
    tensors = safetensors.load_file(golden / "heads_and_losses.safetensors")
    case = json.loads((golden / "cases.json").read_text())["heads_and_losses"]
    model = volo.create_model("volo_nano", num_classes=case["num_classes"], embed_dims=(48, 64), num_heads=(3, 4))
    model.head.load_state_dict({"weight": tensors["state.head.weight"], "bias": tensors["state.head.bias"]})
    class_logits = model.head(tensors["class_token"])
    torch.testing.assert_close(class_logits, tensors["class_logits"], atol=1e-5, rtol=0)
    joined = model.combine_logits(class_logits, tensors["token_logits"])
    torch.testing.assert_close(joined, tensors["logits_eval"], atol=1e-5, rtol=0)

    targets = TokenLabelTargets.from_packed(tensors["targets"])
    first_row, end_row, first_col, end_col = tensors["box_rows_cols"].tolist()
    side = round(tensors["train_token_logits"].shape[1] ** 0.5)
    lam = 1 - (end_row - first_row) * (end_col - first_col) / side**2
    same = TokenLabelTargets.from_label(targets.class_label, side**2)
    for name, labels, ground_truth in (
        ("loss_token_label", targets, False),
        ("loss_token_label_ground_truth", targets, True),
        ("loss_class_only_targets", same, False),
    ):
        loss = token_label_loss(
            tensors["train_class_logits"],
            tensors["train_token_logits"],
            labels,
            lam=lam,
            cls_weight=case["cls_weight"],
            dense_weight=case["dense_weight"],
            ground_truth=ground_truth,
        )
        torch.testing.assert_close(loss, tensors[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def whole_model(shared: Path):
    tensors = safetensors.load_file(shared / "golden" / "model.safetensors")
    case = json.loads((shared / "golden" / "cases.json").read_text())["model"]
    model = volo.create_model(
        "volo_d1",
        img_size=case["img_size"],
        num_classes=case["num_classes"],
        depths=case["layers"],
        embed_dims=case["embed_dims"],
        num_heads=case["num_heads"],
        mlp_ratios=case["mlp_ratios"],
        stem_dim=case["stem_hidden_dim"],
    )
    model.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    return model.train(), tensors


def _seed_of(box: torch.Tensor) -> int:
    """A seed with which the task draws the golden box, so that the task itself is what is compared."""
    for seed in range(10_000):
        torch.manual_seed(seed)
        if torch.equal(draw_box(*box.shape, 1.0), box):
            return seed
    raise AssertionError("no seed draws the golden box")


def test_mix_token_outputs_losses_and_gradients_of_the_task(whole_model):
    model, tensors = whole_model
    state = {k: v.clone() for k, v in model.state_dict().items()}
    first_row, end_row, first_col, end_col = tensors["box_rows_cols"].tolist()
    box = torch.zeros(model.config.grid_size, dtype=torch.bool)
    box[first_row:end_row, first_col:end_col] = True
    seed = _seed_of(box)
    targets = TokenLabelTargets.from_packed(tensors["targets"])
    batch = {
        "image": tensors["x"],
        "target": targets.truth,
        # Without smoothing the targets are the softmax of these.
        "class_annotation": targets.class_label.log(),
        "token_annotation": targets.token_labels.log(),
    }

    def result_of(batch, **config):
        model.load_state_dict(state)
        torch.manual_seed(seed)
        loss, augment = LossConfig(label_smoothing=0.0), AugmentConfig(mix_token=1.0)
        return TokenLabelTask(model, loss, augment, TokenLabelConfig(**config)).train()(batch)

    with_truth = result_of(batch, ground_truth=True)["loss"]
    torch.testing.assert_close(with_truth, tensors["loss_token_label_ground_truth"].reshape(()), atol=1e-5, rtol=0)
    own = result_of({"image": tensors["x"], "target": targets.class_label})["loss"]
    torch.testing.assert_close(own, tensors["loss_class_only_targets"].reshape(()), atol=1e-5, rtol=0)

    result = result_of(batch)
    torch.testing.assert_close(result["class_logits"], tensors["train_class_logits"], atol=1e-5, rtol=0)
    token_logits = tensors["train_token_logits"].reshape(result["token_logits"].shape)
    torch.testing.assert_close(result["token_logits"], token_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(result["loss"], tensors["loss_token_label"].reshape(()), atol=1e-5, rtol=0)
    result["loss"].backward()
    compared = 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, tensors[f"grad.{name}"], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
        compared += 1
    assert compared == sum(k.startswith("grad.") for k in tensors) > 50
    model.load_state_dict(state)
