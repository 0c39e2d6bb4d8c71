"""`volo.evaluate`: the same flow for both tasks, and the figures of the loops below it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import volo
from volo.config import DataConfig, Recipe, SegmentConfig
from volo.data.images import open_data
from volo.data.loader import EvalLoader
from volo.data.transforms import PixelPipeline
from volo.inference.evaluate import evaluate as evaluate_classifier
from volo.inference.model_source import LoadedModel
from volo.inference.sharing import save_pretrained

TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8}
DIGITS = DataConfig(kind="digits", img_size=16, num_workers=0)


def test_a_classifier_on_its_held_out_images() -> None:
    torch.manual_seed(0)
    model = volo.create_model("volo_nano", img_size=16, num_classes=10, **TINY).eval()
    loaded = LoadedModel(model, "classify", tuple("0123456789"), DIGITS, "a test")
    stages: set[str] = set()
    report = volo.evaluate(loaded, batch_size=64, on_progress=lambda what, done, total: stages.add(what))
    source = open_data(DIGITS).val
    loader = EvalLoader(source, DIGITS, batch_size=64)
    plain = evaluate_classifier(model, loader, PixelPipeline(DIGITS), num_classes=10, device="cpu")
    assert {key: report[key] for key in plain} == plain
    assert report["model"] == "a test"
    assert report["data"] == "held-out part of digits"
    assert "evaluating" in stages
    assert json.loads(json.dumps(report, allow_nan=False))["count"] == len(source)
    assert volo.evaluate(loaded, flip=True)["loss"] != plain["loss"]
    with pytest.raises(ValueError, match="split, window, stride and scales are for segmentation models"):
        volo.evaluate(loaded, split="test")


def test_a_segmentation_model_by_name(scenes: Path, tmp_path: Path) -> None:
    model = volo.create_segmenter("fpn_volo_nano", 3, channels=16, **TINY).eval()
    recipe = Recipe(task="segment", data=DataConfig(img_size=32, num_workers=0), segment=SegmentConfig())
    loaded = LoadedModel(model, "segment", ("sky", "ground", "box"), recipe.data, "a test", recipe=recipe)
    folder = save_pretrained(loaded, tmp_path / "saved")
    report = volo.evaluate(folder, scenes, split="test")
    assert report["count"] == 3
    assert report["data"] == f"test of {scenes}"
    assert report["classes"] == ["sky", "ground", "box"]
    windows = volo.evaluate(folder, scenes, split="test", window=32)
    assert "windows of 32 x 32" in windows["test"]
    with pytest.raises(ValueError, match="ReaL labels are for classifiers"):
        volo.evaluate(folder, scenes, real="real.json")
    torch.nn.init.constant_(model.decode_head.conv_seg.bias, torch.nan)
    with pytest.raises(ValueError, match=r"png: the model's answer is not finite"):
        volo.evaluate(dataclasses.replace(loaded, origin="damaged"), scenes)
