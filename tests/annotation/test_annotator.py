"""Any classifier says at each position what its own head says when it sees that position alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import volo
from volo.annotation import annotator as annotators
from volo.annotation.annotator import Annotator, draw_label_maps, load_annotator, weights_digest
from volo.config import AnnotatorConfig
from volo.inference.model_source import LoadedModel


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(
                torch.randn(8, 3, 64, 64)
            )  # statistics that keep signals at size, as those of a trained network
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        nn.init.normal_(head.weight, std=0.1)  # some begin as zeros
    return model.eval()


# name, options of timm, image, grid
POOLED = [
    ("resnet10t", {}, (64, 96), (2, 3)),
    ("regnetx_002", {}, (64, 64), (2, 2)),
    ("tf_efficientnet_lite0", {}, (64, 64), (2, 2)),
    ("nf_regnet_b0", {}, (64, 64), (2, 2)),
    ("densenet121", {}, (64, 64), (2, 2)),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2), "img_size": 56}, (56, 56), (7, 7)),
    ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "avg", "fc_norm": False, "img_size": (32, 64)}, (32, 64), (2, 4)),
]  # fmt: skip
OTHERS = [
    ("convnext_atto", {}, (64, 96), (2, 3)),  # a norm after pooling
    ("mobilenetv3_small_050", {}, (64, 64), (2, 2)),  # a hidden layer after pooling
    ("vit_tiny_patch16_224", {"depth": 1, "img_size": 48}, (48, 48), (3, 3)),  # a class token
    ("vit_tiny_patch16_224", {"depth": 1, "img_size": 48, "global_pool": "avg"}, (48, 48), (3, 3)),  # fc_norm
    ("deit_tiny_distilled_patch16_224", {"depth": 1, "img_size": 48}, (48, 48), (3, 3)),  # two heads
]


@pytest.mark.parametrize(("name", "options", "picture", "grid"), POOLED, ids=[case[0] for case in POOLED])
def test_the_mean_over_positions_is_the_answer_of_a_network_that_pools(name, options, picture, grid):
    model = build(name, **options)
    images = torch.randn(2, 3, *picture)
    with torch.inference_mode():
        logits = Annotator(model)(images)
        assert logits.shape == (2, *grid, 7)
        assert logits.std(dim=(1, 2)).max() > 0.01  # positions differ
        torch.testing.assert_close(logits.mean(dim=(1, 2)), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "options", "picture", "grid"), POOLED + OTHERS)
def test_a_map_of_one_position_everywhere_is_answered_like_that_position(name, options, picture, grid):
    model = build(name, **options)
    annotator = Annotator(model)
    with torch.inference_mode():
        features = model.forward_features(torch.randn(1, 3, *picture))
        seen, layout = annotator.features(torch.randn(1, 3, *picture))
        assert seen.shape[1:3] == grid
        position = seen[:, 1, 1]
        if features.dim() == 3:
            same = position[:, None].expand_as(features)
        elif features.shape[1:3] == grid:
            same = position[:, None, None].expand_as(features)
        else:
            same = position[:, :, None, None].expand_as(features)
        # Another one, that has looked at nothing yet.
        logits = Annotator(model).classify(seen, layout)
        torch.testing.assert_close(logits[:, 1, 1], model.forward_head(same), rtol=1e-4, atol=1e-5)


SMALL = {
    "depths": (1, 1),
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "stem_dim": 8,
    "patch_size": 4,
    "num_classes": 7,
}


def test_volo_has_a_head_for_tokens():
    torch.manual_seed(0)
    model = volo.create_model("volo_nano", **SMALL, pad_input=True).eval()
    for size, grid in (((32, 48), (4, 6)), ((20, 16), (3, 2))):
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            tokens = model.class_and_token_logits(model.forward_features(images))[1]
            assert torch.equal(Annotator(model)(images).flatten(1, 2), tokens)
            assert Annotator(model)(images).shape[1:3] == grid


def test_volo_of_timm_too():
    model = build("volo_d1_224", img_size=64)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        tokens = model.aux_head(model.forward_features(images)[:, 1:])
        assert torch.equal(Annotator(model)(images).flatten(1, 2), tokens)


def test_an_exported_file_is_refused_by_what_it_lacks(tmp_path: Path):
    (tmp_path / "x.onnx").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"x.onnx is an exported file.*tokens: give the run folder"):
        load_annotator(AnnotatorConfig(model=str(tmp_path / "x.onnx")))


def test_what_cannot_annotate():
    with pytest.raises(ValueError, match="needs classes"):
        Annotator(volo.create_model("volo_nano", **(SMALL | {"num_classes": 0})))
    plain = nn.Linear(3, 3)
    plain.num_classes = 3  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no forward_features"):
        Annotator(plain)

    class Several(nn.Module):
        num_classes = 3

        def forward_features(self, images):
            return [images, images]

        def forward_head(self, x):
            return x

    with pytest.raises(ValueError, match="several feature maps"):
        Annotator(Several())(torch.zeros(1, 3, 8, 8))


def test_drawing_keeps_the_best(monkeypatch: pytest.MonkeyPatch):
    annotator = Annotator(build("resnet10t"))
    images = torch.randn(3, 3, 64, 96)
    drawn = draw_label_maps(annotator, images, top=4)
    with torch.inference_mode():
        logits = annotator(images)
    assert drawn.scores.shape == drawn.classes.shape == (3, 4, 2, 3)
    assert (drawn.scores.diff(dim=1) <= 0).all()
    kept = logits.permute(0, 3, 1, 2).gather(1, drawn.classes)
    torch.testing.assert_close(drawn.scores.diff(dim=1), kept.diff(dim=1))
    assert torch.equal(drawn.classes[:, 0], logits.argmax(dim=3))
    torch.testing.assert_close(drawn.mean_logits, logits.mean(dim=(1, 2)))
    # Many classes and positions are gone through in groups of images.
    monkeypatch.setattr(annotators, "MAX_LOGITS", 1)
    again = draw_label_maps(annotator, images, top=4)
    torch.testing.assert_close(again.scores, drawn.scores)
    assert torch.equal(again.classes, drawn.classes)


@pytest.mark.parametrize("shift", [0.0, -10.0, 25.0])
def test_the_classes_left_out_are_zeros_together(shift: float):
    annotator = Annotator(build("resnet10t"))
    head = annotator.classifier.get_classifier()
    with torch.no_grad():
        head.weight.mul_(20)
        head.bias.add_(shift)
    images = torch.randn(3, 3, 64, 96)
    drawn = draw_label_maps(annotator, images, top=4)
    with torch.inference_mode():
        truth = annotator(images).softmax(dim=3).permute(0, 3, 1, 2)
    spread = torch.zeros(3, 7, 2, 3).scatter(1, drawn.classes, drawn.scores).softmax(dim=1)
    torch.testing.assert_close(spread.gather(1, drawn.classes), truth.gather(1, drawn.classes))
    everything = draw_label_maps(annotator, images, top=7)
    torch.testing.assert_close(everything.scores.softmax(dim=1), truth.gather(1, everything.classes))


def test_averaged_with_its_mirror_image_a_map_turns_with_the_picture():
    annotator = Annotator(build("resnet10t"))
    images = torch.randn(2, 3, 64, 96)
    drawn, mirrored = (draw_label_maps(annotator, x, top=7, flip=True) for x in (images, images.flip(-1)))
    torch.testing.assert_close(drawn.scores, mirrored.scores.flip(-1))
    torch.testing.assert_close(drawn.mean_logits, mirrored.mean_logits)
    plain = draw_label_maps(annotator, images, top=7)
    assert not torch.allclose(plain.scores, drawn.scores)


def load(name: str, **settings: Any) -> LoadedModel[Any]:
    return load_annotator(AnnotatorConfig(model=name, **settings))


def test_weights_of_a_file_tell_the_classes(tmp_path: Path):
    model = build("resnet10t")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    loaded = load("resnet10t", weights=str(tmp_path / "w.pth"), img_size=64)
    assert loaded.model.num_classes == 7 and loaded.preprocessing.img_size == 64 and not loaded.model.training
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.model(images), model(images))
    assert weights_digest(loaded.model) == weights_digest(model)
    loaded.model.fc.bias.data[0] += 1e-6
    assert weights_digest(loaded.model) != weights_digest(model)
    with pytest.raises(ValueError, match="no classifier head.fc as convnext_atto has"):
        load("convnext_atto", weights=str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match="does not fit resnet14t"):
        load("resnet14t", weights=str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match=r"no annotator 'resnet10x'; did you mean 'resnet10t'"):
        load("resnet10x")
    for given, words in (({"img_size": -64}, "img_size is a number of pixels"), ({"crop": 0.0}, "crop is squash, or")):
        with pytest.raises(ValueError, match=words):
            load("resnet10t", **given)


def test_a_transformer_is_built_for_another_size(tmp_path: Path):
    model = build("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load("vit_tiny_patch16_224", weights=str(tmp_path / "w.pth"), img_size=(64, 96))
    with torch.inference_mode():
        assert Annotator(loaded.model)(torch.zeros(1, 3, 64, 96)).shape == (1, 4, 6, 7)


def test_a_probe_cannot_label_tokens(tmp_path: Path) -> None:
    """The best weights of a run that began with a linear probe may be the probe, whose aux head is zero."""
    model = volo.create_model("volo_nano", num_classes=4)
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in silent.aux_head.parameters():
            parameter.zero_()
    run = tmp_path / "run"
    run.mkdir()
    for name, its in {"best.pt": silent, "last.pt": model}.items():
        torch.save(its.state_dict(), run / name)
    loaded = load_annotator(AnnotatorConfig(model=str(run)))
    assert torch.equal(loaded.model.aux_head.weight, model.aux_head.weight), "the last weights, then"
    torch.save(silent.state_dict(), run / "last.pt")
    with pytest.raises(ValueError, match=r"its aux head is zero.*loss\.token_weight"):
        load_annotator(AnnotatorConfig(model=str(run)))
