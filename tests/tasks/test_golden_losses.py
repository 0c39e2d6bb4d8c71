"""Training-mode outputs, losses and gradients of the original code, MixToken included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import volo
from volo.tasks.classify import restore_tokens
from volo.tasks.mixing import enlarge_mask, mix_inside
from volo.tasks.token_label import TokenLabelTargets, token_label_loss

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def golden(shared: Path):
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


def _forward(model, tensors):
    first_row, end_row, first_col, end_col = tensors["box_rows_cols"].tolist()
    fine = model.forward_embed(tensors["x"])
    mask = torch.zeros(fine.shape[1] // 2, fine.shape[2] // 2, dtype=torch.bool)
    mask[first_row:end_row, first_col:end_col] = True
    features = model.forward_tokens(mix_inside(fine, enlarge_mask(mask, 2)))
    class_logits, token_logits = model.class_and_token_logits(features)
    return class_logits, restore_tokens(token_logits, mask), 1.0 - mask.float().mean()


def test_mix_token_outputs_losses_and_gradients(golden):
    model, tensors = golden
    state = {k: v.clone() for k, v in model.state_dict().items()}
    class_logits, token_logits, lam = _forward(model, tensors)
    torch.testing.assert_close(class_logits, tensors["train_class_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        token_logits, tensors["train_token_logits"].reshape(token_logits.shape), atol=1e-5, rtol=0
    )
    targets = TokenLabelTargets.from_packed(tensors["targets"])
    loss = token_label_loss(class_logits, token_logits, targets, lam=lam)
    torch.testing.assert_close(loss, tensors["loss_token_label"].reshape(()), atol=1e-5, rtol=0)
    with_truth = token_label_loss(class_logits, token_logits, targets, lam=lam, ground_truth=True)
    torch.testing.assert_close(with_truth, tensors["loss_token_label_ground_truth"].reshape(()), atol=1e-5, rtol=0)
    label = targets.class_label
    fallback = TokenLabelTargets(label, label, label[:, None].expand_as(token_logits))
    plain = token_label_loss(class_logits, token_logits, fallback, lam=lam)
    torch.testing.assert_close(plain, tensors["loss_class_only_targets"].reshape(()), atol=1e-5, rtol=0)

    loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, tensors[f"grad.{name}"], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
        compared += 1
    assert compared == sum(k.startswith("grad.") for k in tensors) > 50
    model.load_state_dict(state)
