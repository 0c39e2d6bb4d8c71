"""`volo bench labels` measures what it says; how fast anything is, is not a test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

import volo
from volo.bench.labels import bench_labels
from volo.config import DataConfig, Recipe
from volo.models.checkpoint import model_config_dict, save_checkpoint


def test_rows_for_drawing_and_for_each_encoding(tmp_path: Path):
    options = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
    model = volo.create_model("volo_nano", **options, num_classes=7, img_size=16)
    recipe = dataclasses.replace(Recipe(), data=DataConfig(img_size=16))
    content = {
        "format": 1,
        "model": model.state_dict(),
        "ema": None,
        "recipe": recipe.to_dict(),
        "metrics": {},
        "step": 1,
    }
    classes = [str(i) for i in range(7)]
    save_checkpoint(tmp_path / "best.pt", content | {"model_config": model_config_dict(model), "classes": classes})
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=images, labels=np.arange(40) % 7)
    np.savez(tmp_path / "val.npz", images=images[:7], labels=np.arange(7))
    result = bench_labels(str(tmp_path / "best.pt"), str(tmp_path), pictures=30, batch_size=8, rounds=2)
    assert (result["pictures"], result["grid"], result["top"], result["num_classes"]) == (30, [2, 2], 5, 7)
    everything = bench_labels(
        str(tmp_path / "best.pt"), str(tmp_path), pictures=100, part="all", batch_size=8, rounds=1
    )
    assert (everything["pictures"], everything["stored_pictures"]) == (47, 40)
    drawing, bare, exact, compact = result["rows"]
    assert [row["candidate"] for row in result["rows"]] == ["volo annotate", "bare forward", "exact", "compact"]
    assert result["ratios"] == [d / b for d, b in zip(drawing["rounds"], bare["rounds"])] and len(result["ratios"]) == 2
    assert exact["largest_probability_error"] < 1e-3
    assert exact["largest_logit_error"] < compact["largest_logit_error"] < 0.0501
    assert 0 < compact["mean_probability_error"] < compact["largest_probability_error"] < 0.025
    for row in (exact, compact):
        assert row["bytes_per_picture"] > 20 and row["read_per_second"] > 0 and row["written_per_second"] > 0
