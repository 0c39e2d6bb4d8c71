"""Processes share an epoch out: together every image they should see, none twice, from a folder as from shards."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from volo.config import AugmentConfig, DataConfig
from volo.data.images import FolderSource, TarSource, open_data
from volo.data.loader import EvalLoader, TrainLoader

COUNT = 37
DATA = DataConfig(img_size=4, crop_pct=1.0)
AS_IT_IS = AugmentConfig(crop="none", hflip=0.0)


def picture(number: int) -> np.ndarray:
    """4 x 4 pixels that say which image it is."""
    return np.full((4, 4, 3), number, np.uint8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FolderSource | TarSource]:
    root = tmp_path_factory.mktemp("data")
    shards = root / "shards"
    shards.mkdir()
    for part, first, count in (("train", 0, COUNT), ("val", 100, COUNT)):
        for i in range(first, first + count):
            path = root / "folder" / part / ("cat" if i % 2 else "dog") / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(i)).save(path)
            file = io.BytesIO()
            Image.fromarray(picture(i)).save(file, "PNG")
            with tarfile.open(shards / f"{part}-{(i - first) // 8:06}.tar", "a") as tar:
                for name, content in ((f"{i:03}.png", file.getvalue()), (f"{i:03}.cls", b"%d" % (i % 2))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    folder = open_data(DataConfig(path=str(root / "folder"), cache="none"))
    packed = open_data(DataConfig(path=str(shards), cache="none"))
    assert isinstance(folder.train, FolderSource) and isinstance(packed.train, TarSource)
    assert isinstance(folder.val, FolderSource) and isinstance(packed.val, TarSource)
    return {"folder": folder.train, "tar": packed.train, "folder val": folder.val, "tar val": packed.val}


def seen(batch: dict[str, torch.Tensor], source: FolderSource | TarSource) -> list[int]:
    """The numbers of a batch's images, as their pixels say."""
    numbers = batch["image"][:, 0, 0, 0].tolist()
    names = [source.names[i] for i in batch["index"].tolist()]
    assert [int(name.removesuffix(".png")[-3:]) % 256 for name in names] == numbers
    assert torch.equal(batch["target"], source.targets[batch["index"]])
    return numbers


@pytest.mark.parametrize("kind", ["folder", "tar"])
@settings(max_examples=12, deadline=None)
@given(
    world=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    micro=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_a_permutation_cut_in_shares(
    kind: str, sources: dict, world: int, accumulation: int, micro: int, seed: int, epoch: int
) -> None:
    source = sources[kind]
    micro = min(micro, COUNT // (world * accumulation))
    batch_size = world * accumulation * micro
    loaders = [
        TrainLoader(
            source, DATA, AS_IT_IS,
            batch_size=batch_size, accumulation=accumulation, seed=seed, rank=rank, world_size=world, num_workers=0,
        )
        for rank in range(world)
    ]  # fmt: skip
    steps = COUNT // batch_size
    assert {loader.steps_per_epoch for loader in loaders} == {steps}
    shares = [list(loader.batches(epoch * steps, (epoch + 1) * steps)) for loader in loaders]
    assert [len(share) for share in shares] == [steps * accumulation] * world
    by_step = [
        [
            number
            for m in range(accumulation)
            for share in shares
            for number in seen(share[step * accumulation + m], source)
        ]
        for step in range(steps)
    ]
    drawn = [number for step in by_step for number in step]
    assert len(set(drawn)) == len(drawn) == steps * batch_size
    assert set(drawn) <= set(range(COUNT))
    # One process alone has the same images in the same steps, and the rest of the permutation is less than a batch.
    alone = TrainLoader(source, DATA, AS_IT_IS, batch_size=batch_size, seed=seed, num_workers=0)
    assert [seen(batch, source) for batch in alone.batches(epoch * steps, (epoch + 1) * steps)] == by_step
    assert COUNT - len(drawn) < batch_size


@pytest.mark.parametrize("kind", ["folder val", "tar val"])
@settings(max_examples=12, deadline=None)
@given(world=st.integers(1, 50), batch_size=st.integers(1, 40))
def test_an_evaluation_sees_every_picture_once(kind: str, sources: dict, world: int, batch_size: int) -> None:
    source = sources[kind]
    shares = [
        EvalLoader(source, DATA, batch_size=batch_size, rank=rank, world_size=world, num_workers=0)
        for rank in range(world)
    ]
    numbers = [number for share in shares for batch in share for number in seen(batch, source)]
    assert numbers == [int(name.removesuffix(".png")[-3:]) % 256 for name in source.names]
    assert len(set(numbers)) == COUNT


def test_folder_and_shards_are_ordered_alike_in_every_process(sources: dict) -> None:
    """The order is of numbers in the source: two sources of the same length are shuffled in the same way."""
    for rank in range(3):
        orders = [
            [
                batch["index"].tolist()
                for batch in TrainLoader(
                    sources[kind], DATA, AS_IT_IS, batch_size=12, rank=rank, world_size=3, num_workers=0, seed=5
                ).batches(0, 6)
            ]
            for kind in ("folder", "tar")
        ]
        assert orders[0] == orders[1]
