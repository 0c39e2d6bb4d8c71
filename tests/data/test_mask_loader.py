"""Batches of masks: the same images, cut the same way, from any step, with any number of workers or processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from volo.config import DataConfig, SegmentConfig
from volo.data.decode import BadImageError
from volo.data.loader import MaskEvalLoader, MaskTrainLoader
from volo.data.masks import IGNORE, MaskedPictures, open_segmentation, open_split


@pytest.fixture(scope="module")
def data(scenes: Path) -> DataConfig:
    return DataConfig(path=str(scenes), img_size=(32, 40), num_workers=0)


@pytest.fixture(scope="module")
def pictures(data: DataConfig) -> MaskedPictures:
    return open_segmentation(data, SegmentConfig()).train


def batches(pictures, data, start=0, stop=7, **options):
    loader = MaskTrainLoader(pictures, data, SegmentConfig(), **{"batch_size": 4, "seed": 3, **options})
    return list(loader.batches(start, stop))


def assert_same(some, others) -> None:
    assert len(some) == len(others) > 0
    for a, b in zip(some, others):
        assert all(torch.equal(a[name], b[name]) for name in ("image", "mask", "index"))


def test_shapes_and_epochs(pictures, data) -> None:
    got = batches(pictures, data)
    assert got[0]["image"].shape == (4, 3, 32, 40) and got[0]["mask"].shape == (4, 32, 40)
    assert got[0]["image"].dtype == got[0]["mask"].dtype == torch.uint8
    assert set(got[0]["mask"].unique().tolist()) <= {0, 1, 2, IGNORE}
    first_epoch = torch.cat([b["index"] for b in got[:2]]).tolist()
    assert len(set(first_epoch)) == 8
    assert first_epoch != torch.cat([b["index"] for b in got[2:4]]).tolist()


def test_any_step_and_any_number_of_workers(pictures, data) -> None:
    whole = batches(pictures, data)
    assert_same(batches(pictures, data, start=3), whole[3:])
    assert_same(batches(pictures, data, num_workers=2), whole)
    torch.manual_seed(99)  # what others draw makes no difference
    assert_same(batches(pictures, data, stop=2), whole[:2])
    assert not torch.equal(batches(pictures, data, seed=4)[0]["image"], whole[0]["image"])


def test_loading_leaves_no_trace_in_the_generator(pictures, data) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches(pictures, data, stop=1)
    assert torch.equal(torch.rand(3), expected)


def test_processes_and_accumulation_share_the_same_batch(pictures, data) -> None:
    whole = batches(pictures, data, stop=3)
    ranks = [batches(pictures, data, stop=3, world_size=2, rank=rank) for rank in range(2)]
    accumulated = batches(pictures, data, stop=3, accumulation=2)
    for step, batch in enumerate(whole):
        for parts in ([rank[step] for rank in ranks], accumulated[2 * step : 2 * step + 2]):
            assert torch.equal(torch.cat([p["image"] for p in parts]), batch["image"])
            assert torch.equal(torch.cat([p["mask"] for p in parts]), batch["mask"])


def test_batches_that_cannot_be_formed(pictures, data) -> None:
    with pytest.raises(ValueError, match="only 10 training images"):
        batches(pictures, data, batch_size=16)


def test_evaluation_sees_every_picture_once_at_its_own_size(make_scenes, tmp_path: Path) -> None:
    make_scenes(tmp_path, train=3, val=5)
    make_scenes(tmp_path / "wide", size=(40, 80), val=2)
    for kind in ("images", "annotations"):
        for i, path in enumerate(sorted((tmp_path / "wide" / kind / "val").iterdir())):
            path.rename(tmp_path / kind / "val" / f"1{i}.png")
    data = DataConfig(path=str(tmp_path), num_workers=0)
    pictures, _ = open_split(data, SegmentConfig(), "val")
    for short_side, height in ((0, 48), (24, 24)):
        segment = SegmentConfig(short_side=short_side)
        got = list(MaskEvalLoader(pictures, data, segment, batch_size=3))
        assert [tuple(b["mask"].shape) for b in got] == [(3, 48, 64), (2, 48, 64), (2, 40, 80)]
        assert got[0]["image"].shape[-2] == height
        assert torch.cat([b["index"] for b in got]).tolist() == list(range(7))
        assert torch.equal(got[1]["mask"][0], pictures.load(3)[1][0])
    shares = [MaskEvalLoader(pictures, data, SegmentConfig(), batch_size=2, rank=r, world_size=3) for r in range(3)]
    assert torch.cat([b["index"] for share in shares for b in share]).tolist() == list(range(7))


def test_a_picture_that_vanishes_is_named(make_scenes, tmp_path: Path) -> None:
    make_scenes(tmp_path, train=3, val=1)
    data = DataConfig(path=str(tmp_path), num_workers=0, cache="none", img_size=16)
    pictures = open_segmentation(data, SegmentConfig()).train
    (tmp_path / "annotations/train/01.png").unlink()
    with pytest.raises(BadImageError, match=r"annotations/train/01\.png: no such file"):
        batches(pictures, data, batch_size=3, stop=1)
