"""The same images whatever the workers, processes and restarts; workers that behave when things go wrong."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from volo.config import AugmentConfig, DataConfig
from volo.data import decode
from volo.data.decode import BadImageError
from volo.data.images import ArraySource, FolderSource, open_data
from volo.data.loader import EvalLoader, TrainLoader, default_workers
from volo.data.samples import shift
from volo.data.transforms import eval_transform

# torch advises against more workers than cores; the tests run everywhere.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

PLAIN = AugmentConfig(crop="pad", pad=3)
HEAVY = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1")
DATA = DataConfig(img_size=16, crop_pct=1.0)


def arrays(count: int, side: int = 16) -> ArraySource:
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ArraySource(images, torch.arange(count) % 5, [f"train/{i}" for i in range(count)], tuple("abcde"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = root / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 50 - i, 3), dtype=np.uint8)).save(path)
    splits = open_data(DataConfig(path=str(root), cache="none", val_fraction=0.05))
    assert isinstance(splits.train, FolderSource)
    return splits.train  # 22 images


def loader(source: ArraySource | FolderSource, augment: AugmentConfig = PLAIN, **options: object) -> TrainLoader:
    return TrainLoader(source, DATA, augment, **{"batch_size": 4, "num_workers": 0, **options})  # type: ignore[arg-type]


def joined(batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    parts = list(batches)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# The same images


@pytest.mark.parametrize("augment", [PLAIN, HEAVY], ids=["vectorised", "one by one"])
@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_workers_and_restarts_change_nothing(augment: AugmentConfig, kind: str, files: FolderSource) -> None:
    source = arrays(22) if kind == "arrays" else files
    steps = 13  # more than two epochs of 5
    wanted = joined(loader(source, augment).batches(0, steps))
    assert wanted["image"].shape == (52, 3, 16, 16)
    assert wanted["image"].dtype == torch.uint8
    assert wanted["target"].dtype == wanted["index"].dtype == torch.int64
    for workers in (1, 2):
        assert_same(joined(loader(source, augment, num_workers=workers).batches(0, steps)), wanted)
    for start in (1, 5, 12):
        late = joined(loader(source, augment, num_workers=start % 2).batches(start, steps))
        assert_same(late, {name: values[4 * start :] for name, values in wanted.items()})


def test_caching_changes_nothing(files: FolderSource) -> None:
    cached = open_data(DataConfig(path=str(files.root), cache="ram", val_fraction=0.05)).train
    assert isinstance(cached, FolderSource)
    assert cached.cache is not None
    for workers in (0, 1):
        a = joined(loader(cached, HEAVY, num_workers=workers).batches(0, 5))
        assert_same(a, joined(loader(files, HEAVY).batches(0, 5)))


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("augment", [PLAIN, HEAVY], ids=["vectorised", "one by one"])
def test_ranks_and_micro_batches_are_slices_of_the_global_batch(
    kind: str, augment: AugmentConfig, files: FolderSource
) -> None:
    source = arrays(30) if kind == "arrays" else files
    whole = list(loader(source, augment, batch_size=12).batches(0, 2))
    for world, accumulation in ((2, 1), (1, 3), (2, 3), (4, 1)):
        ranks = [
            loader(source, augment, batch_size=12, rank=r, world_size=world, accumulation=accumulation)
            for r in range(world)
        ]
        parts = [list(one.batches(0, 2)) for one in ranks]
        assert all(len(part) == 2 * accumulation for part in parts)
        for step in range(2):
            micro = [parts[r][step * accumulation + m] for m in range(accumulation) for r in range(world)]
            assert_same(joined(micro), whole[step])


@pytest.mark.parametrize("augment", [PLAIN, HEAVY], ids=["vectorised", "one by one"])
def test_fewer_pictures_are_the_first_of_each_micro_batch(augment: AugmentConfig) -> None:
    one = loader(arrays(30), augment, batch_size=12, accumulation=2)
    for few, whole in zip(one.batches(0, 3, 4), one.batches(0, 3), strict=True):
        assert_same(few, {name: values[:4] for name, values in whole.items()})


@pytest.mark.parametrize("augment", [PLAIN, HEAVY], ids=["vectorised", "one by one"])
def test_every_picture_once_an_epoch_in_another_order_and_another_look(augment: AugmentConfig) -> None:
    source = arrays(24)
    one = loader(source, augment)
    assert one.steps_per_epoch == 6
    epochs = [joined(one.batches(6 * e, 6 * e + 6)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch["index"].tolist()) == list(range(24))
        assert torch.equal(epoch["target"], source.targets[epoch["index"]])
    assert len({tuple(epoch["index"].tolist()) for epoch in epochs}) == 3
    looks = [epoch["image"][epoch["index"].argsort()] for epoch in epochs]
    assert (looks[0] != looks[1]).flatten(1).any(dim=1).float().mean() > 0.5
    other_seed = joined(loader(source, augment, seed=1).batches(0, 6))
    assert not torch.equal(other_seed["index"], epochs[0]["index"])


def test_what_does_not_fill_a_batch_is_left_for_other_epochs() -> None:
    one = loader(arrays(11), batch_size=4)
    assert one.steps_per_epoch == 2
    seen = [set(joined(one.batches(2 * e, 2 * e + 2))["index"].tolist()) for e in range(6)]
    assert all(len(epoch) == 8 for epoch in seen)
    assert set.union(*seen) == set(range(11))


@pytest.mark.parametrize("augment", [PLAIN, HEAVY], ids=["vectorised", "one by one"])
def test_the_random_state_of_the_training_process_is_left_alone(augment: AugmentConfig, files: FolderSource) -> None:
    for workers in (0, 1):
        torch.manual_seed(5)
        random.seed(5)
        wanted = torch.rand(4), random.random()
        torch.manual_seed(5)
        random.seed(5)
        joined(loader(files, augment, num_workers=workers).batches(0, 2))
        joined(EvalLoader(files, DATA, batch_size=5, num_workers=workers))
        assert torch.equal(torch.rand(4), wanted[0])
        assert random.random() == wanted[1]


# The vectorised path


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(3, 20), st.integers(3, 20), st.data())
def test_shift_is_a_crop_of_the_mirrored_picture(B: int, H: int, W: int, data: st.DataObject) -> None:
    pad = data.draw(st.integers(1, min(H, W) - 1))
    down, right = (np.array(data.draw(st.lists(st.integers(0, 2 * pad), min_size=B, max_size=B))) for _ in range(2))
    images = np.random.default_rng(0).integers(0, 256, (B, 3, H, W), dtype=np.uint8)
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    result = shift(images, pad, down, right)
    for i in range(B):
        assert (result[i] == padded[i, :, down[i] : down[i] + H, right[i] : right[i] + W]).all()


def test_vectorised_shifts_and_flips_are_all_there_and_even() -> None:
    # The image tells where it was cut: its values are coordinates.
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    images = torch.stack([rows, columns, rows]).to(torch.uint8).expand(900, 3, 12, 12)
    source = ArraySource(images, torch.zeros(900, dtype=torch.int64), [""] * 900, ("a", "b"))
    data = DataConfig(img_size=12)
    shown = joined(TrainLoader(source, data, AugmentConfig(crop="pad", pad=2), batch_size=900).batches(0, 4))["image"]
    centre = shown[:, :, 5:7, 5:7].int()  # away from the mirrored border
    flipped = centre[:, 1, 0, 1] < centre[:, 1, 0, 0]
    assert abs(flipped.float().mean() - 0.5) < 0.04
    down = centre[:, 0, 0, 0] - 5
    right = torch.where(flipped, centre[:, 1, 0, 1], centre[:, 1, 0, 0]) - 5
    counts = torch.bincount((down + 2) * 5 + right + 2, minlength=25)
    assert len(counts) == 25
    assert counts.min() > 90
    assert counts.max() < 210
    # Flip and both shifts are independent of each other.
    table = torch.stack([flipped.float(), down.float(), right.float()])
    assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 0.06


def test_vectorised_without_augmentation_is_the_picture_and_other_sizes_are_scaled() -> None:
    source = arrays(8)
    nothing = AugmentConfig(crop="none", hflip=0)
    batch = joined(loader(source, nothing).batches(0, 2))
    assert torch.equal(batch["image"], source.images[batch["index"]])
    large = joined(TrainLoader(source, replace(DATA, img_size=(20, 24)), nothing, batch_size=4).batches(0, 1))
    assert large["image"].shape == (4, 3, 20, 24)
    wanted = eval_transform(replace(DATA, img_size=(20, 24)))(source.images[large["index"]])
    assert torch.equal(large["image"], wanted)
    assert torch.equal(source.images, arrays(8).images)  # flips and shifts happen in copies


def test_the_vectorised_path_is_for_plain_augmentation_of_arrays(files: FolderSource) -> None:
    assert loader(arrays(8)).is_vectorised
    assert not loader(arrays(8), HEAVY).is_vectorised
    assert not loader(files).is_vectorised
    assert loader(arrays(8), num_workers=-1).num_workers == 0
    assert loader(files, num_workers=-1).num_workers == default_workers() >= 1
    assert TrainLoader(arrays(8), replace(DATA, num_workers=3), PLAIN, batch_size=4).num_workers == 3


@pytest.mark.parametrize("augment", [PLAIN, HEAVY], ids=["vectorised", "one by one"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_epochs_see_the_same_pictures_smaller(augment: AugmentConfig, workers: int) -> None:
    source = arrays(8)
    shrunk = loader(source, augment, small_size=(8, 12), small_epochs=2, num_workers=workers)  # two steps an epoch
    plain = list(loader(source, augment).batches(0, 6))
    for step, (batch, full) in enumerate(zip(shrunk.batches(0, 6), plain, strict=True)):
        wanted = full["image"] if step >= 4 else F.resize(full["image"], [8, 12], antialias=True)
        assert_same(batch, {**full, "image": wanted})
    # A resumed run begins where it stopped.
    assert_same(
        joined(shrunk.batches(3, 4)), {**plain[3], "image": F.resize(plain[3]["image"], [8, 12], antialias=True)}
    )


@pytest.mark.parametrize("size, epochs", [(0, 2), (8, 0), (17, 2), ((8, 24), 2), (8, -1)])
def test_small_pictures_need_a_size_and_a_time(size: int, epochs: int) -> None:
    with pytest.raises(ValueError, match="schedule.small_size is from 1 to data.img_size"):
        loader(arrays(8), small_size=size, small_epochs=epochs)


# Sizes that cannot be


def test_batches_that_cannot_be_formed_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide by 3 accumulated micro batches x 2 processes; .* is 12"):
        loader(arrays(30), batch_size=8, accumulation=3, world_size=2)
    with pytest.raises(ValueError, match="only 10 training images; it can be 8 at most"):
        loader(arrays(10), batch_size=16, accumulation=4)
    with pytest.raises(ValueError, match="4 are needed"):
        loader(arrays(3), batch_size=4, accumulation=4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        loader(arrays(3), batch_size=0)
    with pytest.raises(ValueError, match="at least 1"):
        EvalLoader(arrays(3), DATA, batch_size=0)
    with pytest.raises(ValueError, match="color_jitter"):
        loader(arrays(8), replace(HEAVY, color_jitter=0.4))


# Evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_evaluation_sees_every_picture_once_in_order(kind: str, workers: int, files: FolderSource) -> None:
    source = arrays(22) if kind == "arrays" else files
    batches = list(EvalLoader(source, DATA, batch_size=5, num_workers=workers))
    assert [len(batch["index"]) for batch in batches] == [5, 5, 5, 5, 2]
    whole = joined(batches)
    assert whole["index"].tolist() == list(range(22))
    assert torch.equal(whole["target"], source.targets)
    transform = eval_transform(DATA)
    assert torch.equal(whole["image"], torch.stack([transform(source.load(i)) for i in range(22)]))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_shares(count: int, batch_size: int, world: int) -> None:
    source = arrays(count, side=2)
    data = replace(DATA, img_size=2)
    loaders = [
        EvalLoader(source, data, batch_size=batch_size, rank=r, world_size=world, num_workers=0) for r in range(world)
    ]
    batches = [[batch["index"].tolist() for batch in one] for one in loaders]
    assert [i for rank in batches for batch in rank for i in batch] == list(range(count))
    assert all(0 < len(batch) <= batch_size for rank in batches for batch in rank)
    assert [len(rank) for rank in batches] == [len(one) for one in loaders]
    if count >= world and (batch_size > 1 or count % world == 0):
        assert len({len(rank) for rank in batches}) == 1


# When things go wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_during_the_run_is_named(
    workers: int, files: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PAUSES", (0.01,))
    broken = FolderSource(tmp_path, files.targets, files.names, files.classes)  # nothing of it is there
    with pytest.raises(BadImageError, match=r"[ab]/\d\d\.png: no such file.*At the start"):
        list(loader(broken, HEAVY, num_workers=workers).batches(0, 2))
    with pytest.raises(BadImageError, match=r"[ab]/\d\d\.png: no such file"):
        list(EvalLoader(broken, DATA, batch_size=4, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_any_more_is_left_out_where_the_run_says_so(
    workers: int, files: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one takes its place, the same whatever the workers and restarts; an evaluation goes without."""
    monkeypatch.setattr(decode, "PAUSES", (0.01,))
    root = shutil.copytree(files.root, tmp_path / "copy")
    gone = FolderSource(root, files.targets, files.names, files.classes)
    (root / files.names[5]).unlink()
    data = replace(DATA, on_bad_image="skip")
    one = TrainLoader(gone, data, HEAVY, batch_size=11, num_workers=workers)
    with pytest.warns(UserWarning, match=f"left out: {files.names[5]}: no such file"):
        epoch = joined(one.batches(0, 2))
    assert sorted(epoch["index"].tolist()) == [*range(5), 6, *range(6, 22)]
    assert torch.equal(epoch["target"], gone.targets[epoch["index"]])
    assert one.left_out == {files.names[5]: "no such file or directory"}
    with pytest.warns(UserWarning, match="left out"):
        assert_same(joined(TrainLoader(gone, data, HEAVY, batch_size=11, num_workers=0).batches(0, 2)), epoch)
    with pytest.warns(UserWarning, match="left out"):
        shown = joined(EvalLoader(gone, data, batch_size=4, num_workers=workers))
    assert shown["index"].tolist() == [i for i in range(22) if i != 5]
    (root / files.names[0]).parent.rename(tmp_path / "away")
    (tmp_path / "b").mkdir()
    (root / files.names[-1]).parent.rename(tmp_path / "b/away")
    with pytest.raises(BadImageError, match="nor can the 7 before it be read"):
        list(one.batches(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_away_for_a_moment_is_waited_for(workers: int, files: FolderSource, tmp_path: Path) -> None:
    root = shutil.copytree(files.root, tmp_path / "copy")
    moment = FolderSource(root, files.targets, files.names, files.classes)
    path = root / files.names[5]
    path.rename(tmp_path / "away")
    threading.Timer(0.7, lambda: (tmp_path / "away").rename(path)).start()
    got = joined(TrainLoader(moment, DATA, HEAVY, batch_size=11, num_workers=workers).batches(0, 2))
    assert_same(got, joined(loader(files, HEAVY, batch_size=11).batches(0, 2)))


class Grumpy(FolderSource):
    def load(self, index: int) -> torch.Tensor:
        raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_failures_name_the_picture_too(workers: int, files: FolderSource) -> None:
    grumpy = Grumpy(files.root, files.targets, files.names, files.classes)
    with pytest.raises(RuntimeError, match="a bug of ours") as error:
        list(loader(grumpy, HEAVY, num_workers=workers).batches(0, 1))
    notes = " ".join(getattr(error.value, "__notes__", []))
    assert "while loading image" in notes + str(error.value)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_the_iterator(files: FolderSource) -> None:
    before = set(children(os.getpid()))
    batches = loader(files, HEAVY, num_workers=2).batches(0, 1000)
    next(batches)
    assert len(set(children(os.getpid())) - before) == 2
    batches.close()  # type: ignore[attr-defined]
    assert set(children(os.getpid())) <= before


def train_until_told(source: FolderSource, messages: Connection, fails: bool) -> None:
    """A training process of its own process group; says "running", then how it ended."""
    os.setsid()
    stop: list[str] = []
    for told in (signal.SIGINT, signal.SIGTERM):
        signal.signal(told, lambda number, _: stop.append(signal.Signals(number).name))
    batches = loader(source, HEAVY, num_workers=2).batches(0, 10**6)
    after = 0
    for i, _ in enumerate(batches):
        if i == 0:
            messages.send("running")
        if i == 3 and fails:
            sys.kept = batches  # type: ignore[attr-defined]  # as the traceback of an error may do
            raise SystemExit(3)
        after += bool(stop)
        if after == 30:  # more than were ready when the signal came
            messages.send(stop)
            break


@pytest.mark.skipif(sys.platform != "linux", reason="process groups and /proc")
@pytest.mark.parametrize("event", ["SIGINT", "SIGTERM", "SIGKILL", "error"])
def test_signals_are_for_the_training_process_and_workers_never_outlive_it(event: str, files: FolderSource) -> None:
    context = multiprocessing.get_context("fork")
    messages, theirs = context.Pipe()
    process = context.Process(target=train_until_told, args=(files, theirs, event == "error"))
    process.start()
    assert process.pid is not None
    try:
        assert messages.poll(60)
        assert messages.recv() == "running"
        workers = children(process.pid)
        if event == "SIGKILL":
            process.kill()  # nobody is left to tell the workers
        elif event != "error":
            assert len(workers) == 2
            os.killpg(process.pid, getattr(signal, event))  # as a terminal or a batch system does
            assert messages.poll(60)
            assert messages.recv() == [event]
        process.join(60)
        assert process.exitcode == {"SIGKILL": -signal.SIGKILL, "error": 3}.get(event, 0)
        deadline = time.monotonic() + 3
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline, "workers outlive the training process"
            time.sleep(0.05)
    finally:
        process.kill()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
