"""Training and evaluation on tar shards: the run on the images they were packed from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from volo.config import DataConfig
from volo.data.pack import pack
from volo.inference.evaluate import open_labelled
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter, StepReport


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/ with 60 training images, and shards/ packed from it."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("val", 12)):
        for i in range(count):
            label = ("bright", "dark")[i % 2]
            pixels = generator.integers(0, 128, (20, 24, 3), dtype=np.uint8) + np.uint8(127 * (i % 2 == 0))
            path = root / "folder" / part / label / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    pack(DataConfig(path=str(root / "folder")), root / "shards", shard_bytes=30_000)
    return root


class GivesUp(NullReporter):
    def on_step(self, report: StepReport) -> None:
        if report.step == 9:
            raise ConnectionError("the line is dead")


def test_a_run_moves_from_a_folder_to_its_shards_bit_for_bit(root: Path, tmp_path: Path, tiny) -> None:
    def recipe(name: str, **changed: object):
        data = {"data.kind": "auto", "data.path": str(root / name), "data.cache": "none"}
        augment = {"augment.crop": "resized", "augment.rand_augment": "rand-m9-mstd0.5-inc1"}
        return tiny({**data, **augment, "train.batch_size": 16, "schedule.epochs": 4, **changed})

    whole = train(recipe("folder"), tmp_path / "whole")
    with pytest.raises(ConnectionError):
        train(recipe("folder"), tmp_path / "moved", reporter=GivesUp())
    assert load_checkpoint(tmp_path / "moved" / "last.pt")["step"] == 6
    moved = train(recipe("shards", **{"data.num_workers": 1}), tmp_path / "moved", resume=True)
    assert moved.step == whole.step > 9
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "moved"))
    for part in ("model", "ema"):
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), (part, name)
    assert a["metrics"] == b["metrics"]


def test_evaluation_on_shards(root: Path) -> None:
    trained_on = DataConfig(path=str(root / "folder"), img_size=16)
    labelled = open_labelled(root / "shards", trained_on, ("bright", "dark"))
    assert len(labelled.source) == 12
    assert labelled.class_map is None
    assert labelled.source.classes == ("bright", "dark")
    # Another order of classes, and ids of ImageNet.
    assert open_labelled(root / "shards", trained_on, ("dark", "bright")).class_map == [1, 0]
    assert open_labelled(root / "shards", trained_on, ("a", "b", "c"), ("dark", "n2", "bright")).class_map == [2, 0]
    everything = open_labelled(root / "shards" / "train-{000000..000001}.tar", trained_on, ("bright", "dark"))
    assert 12 < len(everything.source) < 60
    with pytest.raises(ValueError, match="the data has the class 'dark'"):
        open_labelled(root / "shards", trained_on, ("bright", "pale"))
    # A run on shards is evaluated on its own held-out part.
    own = open_labelled(None, DataConfig(path=str(root / "shards"), img_size=16), ("bright", "dark"))
    assert list(own.source.names) == list(labelled.source.names)
