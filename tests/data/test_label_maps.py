"""The store of label maps: what was written is read, by name, from anywhere; what was damaged is found out."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volo.data.label_maps import (
    INDEX,
    Block,
    LabelMaps,
    NoLabelMapError,
    ShardWriter,
    parse_container,
    read_shard,
    shard_path,
    write_index,
)

Map = tuple[np.ndarray, np.ndarray]


def draw(count: int, shape: tuple[int, int, int] = (3, 4, 5), num_classes: int = 70_000, seed: int = 0) -> list[Map]:
    generator = np.random.default_rng(seed)
    return [
        (
            -np.sort(-generator.normal(0, 4, shape).astype(np.float16), axis=0),
            generator.integers(0, num_classes, shape),
        )
        for _ in range(count)
    ]


def write_store(
    folder: Path, names: Sequence[str], drawn: Sequence[Map], *, shard: int = 3, **header: Any
) -> LabelMaps:
    folder.mkdir(parents=True, exist_ok=True)
    encoding = header.get("encoding", "exact")
    number = 0
    for start in range(0, len(names), shard):
        writer = ShardWriter(folder, number)
        for i in range(start, min(start + shard, len(names))):
            block = Block()
            block.add(names[i], *drawn[i], encoding, i)
            writer.append(block)
        writer.finish()
        number += 1
    top, h, w = drawn[0][0].shape if drawn else (1, 1, 1)
    described = {
        "top": top,
        "grid": [h, w],
        "num_classes": 70_000,
        "classes": [],
        "encoding": encoding,
        "annotator": {"crop": "squash", "img_size": [64, 64]},
    }
    write_index(folder, {**described, **header}, number)
    return LabelMaps.open(folder)


NAMES = [
    "train/a b.jpg",
    "train/ä/日本.png",
    "train/z\udcff.jpg",
    "0",
    "x/" * 60 + "deep.jpg",
    "q.jpg",
    "r.jpg",
    "s.jpg",
]


@pytest.fixture
def store(tmp_path: Path) -> LabelMaps:
    return write_store(tmp_path / "store", NAMES, draw(len(NAMES)))


def test_maps_are_read_by_name(store: LabelMaps):
    assert len(store) == 8 and list(store.names) == NAMES
    assert store.names[-1] == "s.jpg" and store.names[2:4] == NAMES[2:4]
    assert (store.top, store.grid, store.num_classes) == (3, (4, 5), 70_000)
    for i, (name, (scores, classes)) in enumerate(zip(NAMES, draw(len(NAMES)))):
        assert name in store
        read, indices = store[name]
        assert read.dtype == torch.float16 and indices.dtype == torch.int64
        assert torch.equal(read, torch.from_numpy(scores)) and torch.equal(indices, torch.from_numpy(classes))
        assert store.fingerprint(name) == i
    order = [NAMES[i] for i in (5, 0, 5, 2)]
    scores, classes = store.read_batch(order)
    assert scores.shape == classes.shape == (4, 3, 4, 5)
    assert all(torch.equal(scores[i], store[name][0]) for i, name in enumerate(order))
    assert [part.shape for part in store.read_batch([])] == [(0, 3, 4, 5)] * 2


@settings(deadline=None, max_examples=40)
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), unique=True, max_size=20
    ),
    encoding=st.sampled_from(["exact", "compact"]),
    shard=st.integers(1, 7),
)
def test_any_names_any_shards(names: list[str], encoding: str, shard: int, tmp_path_factory: pytest.TempPathFactory):
    drawn = draw(len(names), num_classes=(1 << 32) - 1)
    maps = write_store(tmp_path_factory.mktemp("any") / "s", names, drawn, shard=shard, encoding=encoding)
    assert list(maps.names) == names
    for name, (scores, classes) in zip(names, drawn):
        read, indices = maps[name]
        np.testing.assert_array_equal(indices.numpy(), classes)
        np.testing.assert_allclose(read.numpy(), scores, atol=0.0501 if encoding == "compact" else 0)


def test_a_name_that_is_not_there(store: LabelMaps):
    assert "other.jpg" not in store and 3 not in store
    with pytest.raises(NoLabelMapError, match=r"no label map for other.jpg; it has 8, such as train/a b.jpg") as raised:
        store["other.jpg"]
    assert isinstance(raised.value, KeyError) and isinstance(raised.value, ValueError)


def test_a_skipped_picture_says_why(tmp_path: Path):
    writer = ShardWriter(tmp_path, 0)
    writer.append(Block(skipped=[("bad.jpg", "the file is empty (0 bytes)")]))
    writer.finish()
    header = {"top": 1, "grid": [1, 1], "num_classes": 2, "classes": [], "encoding": "exact", "annotator": {}}
    write_index(tmp_path, header, 1, [("worse.jpg", "cut off")])
    maps = LabelMaps.open(tmp_path)
    assert len(maps) == 0 and maps.skipped == {"worse.jpg": "cut off", "bad.jpg": "the file is empty (0 bytes)"}
    with pytest.raises(NoLabelMapError, match="could not be decoded: the file is empty"):
        maps["bad.jpg"]
    with pytest.raises(NoLabelMapError, match="it is empty"):
        maps["good.jpg"]


def test_names_are_unique(tmp_path: Path):
    with pytest.raises(ValueError, match=r"two images are called a\.jpg"):
        write_store(tmp_path / "s", ["a.jpg", "b.jpg", "a.jpg"], draw(3))


def test_names_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("volo.data.label_maps._key", lambda name: np.uint64(len(name) % 2))
    maps = write_store(tmp_path / "colliding", NAMES, draw(len(NAMES)))
    for name, (_, classes) in zip(NAMES, draw(len(NAMES))):
        np.testing.assert_array_equal(maps[name][1].numpy(), classes)
    assert "other.jpg" not in maps


def test_a_store_can_be_moved_and_pickled(store: LabelMaps, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(store.path, moved)
    again = pickle.loads(pickle.dumps(LabelMaps.open(moved)))
    assert len(pickle.dumps(store)) < 300
    assert all(torch.equal(again[name][0], store[name][0]) for name in NAMES)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_read_at_once(store: LabelMaps, method: str):
    # A spawned process takes seconds to import torch, and one shows that a store can be sent.
    with multiprocessing.get_context(method).Pool(2 if method == "fork" else 1) as pool:
        read = pool.map(store.__getitem__, NAMES * 5, chunksize=3)
    assert len(read) == 40
    for name, (scores, classes) in zip(NAMES * 5, read):
        assert torch.equal(scores, store[name][0]) and torch.equal(classes, store[name][1])


def test_reading_keeps_no_file_open(store: LabelMaps):
    def open_files() -> int:
        return sum(
            "maps-" in str(link.resolve()) or "index" in str(link.resolve()) for link in Path("/proc/self/fd").iterdir()
        )

    for name in NAMES:
        store[name]
    assert open_files() == 0


def test_every_flipped_byte_is_found(tmp_path: Path):
    """Of the index when it is opened, of a shard when it is read as a whole; of a record when that map is read."""
    names = ["a.jpg", "b.jpg"]
    maps = write_store(tmp_path / "s", names, draw(2, (2, 2, 2)), shard=2)
    expected = {name: maps[name] for name in names}
    for path, whole in ((maps.path / INDEX, LabelMaps.open), (shard_path(maps.path, 0), lambda p: read_shard(p, 0))):
        content, found = path.read_bytes(), 0
        for i in range(len(content)):
            damaged = bytearray(content)
            damaged[i] ^= 1 << (i % 8)
            # A new file each time: pages that are mapped must not change below the reader.
            path.unlink()
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged|not a file of label maps"):
                whole(maps.path)
            if path.name != INDEX:
                again = LabelMaps.open(maps.path)
                for name in names:
                    try:
                        read = again[name]
                    except ValueError:
                        found += 1
                    else:
                        assert all(torch.equal(a, b) for a, b in zip(read, expected[name]))
        if path.name != INDEX:
            assert found >= int(maps._lengths.sum())  # each byte of a record spoils one map
        path.unlink()
        path.write_bytes(content)
        for size in (0, 1, 8, 30, len(content) // 2, len(content) - 1):
            path.unlink()
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match="damaged|cut off|not a file of label maps"):
                whole(maps.path)
        path.unlink()
        path.write_bytes(content)


def test_maps_of_two_names_that_change_places_are_found(tmp_path: Path):
    """The checksum covers the name: a record under another name is no valid one."""
    writer = ShardWriter(tmp_path, 0)
    block = Block()
    for name, drawn in zip(("a.jpg", "b.jpg"), draw(2)):
        block.add(name, *drawn, "exact", 0)
    block.records.reverse()
    block.checksums.reverse()
    writer.append(block)
    writer.finish()
    header = {"top": 3, "grid": [4, 5], "num_classes": 9, "classes": [], "encoding": "exact", "annotator": {}}
    write_index(tmp_path, header, 1)
    with pytest.raises(ValueError, match=r"label map of a\.jpg .* damaged"):
        LabelMaps.open(tmp_path)["a.jpg"]


def _missing(folder: Path) -> None:
    shard_path(folder, 1).unlink()


def _another(folder: Path) -> None:
    shutil.copy(shard_path(folder, 0), shard_path(folder, 1))


@pytest.mark.parametrize(
    ("damage", "what"), [(_missing, "missing"), (_another, "not the file that the index was made for")]
)
def test_a_shard_that_is_gone_or_another(store: LabelMaps, damage: Callable[[Path], None], what: str):
    damage(store.path)
    maps = LabelMaps.open(store.path)
    assert maps[NAMES[0]][0].shape == (3, 4, 5)
    with pytest.raises(ValueError, match=f"maps-00001.bin is {what}.*--resume"):
        maps[NAMES[3]]


def test_what_is_not_finished_is_not_opened(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="volo annotate"):
        LabelMaps.open(tmp_path / "nothing")
    writer = ShardWriter(tmp_path, 0)
    writer.append(Block())
    assert not shard_path(tmp_path, 0).exists()
    with pytest.raises(FileNotFoundError, match=r"not finished.*--resume"):
        LabelMaps.open(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("volo.data.label_maps.FORMAT", 2)
    write_store(tmp_path, ["a.jpg"], draw(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 2; this version of volo reads format 1"):
        LabelMaps.open(tmp_path)


@pytest.mark.parametrize("lost", [0, 1, 5, 60, 400])
def test_a_journal_that_was_cut_off_goes_on_where_it_is_whole(tmp_path: Path, lost: int):
    names, drawn = ["a.jpg", "b.jpg", "c.jpg"], draw(3)

    def append(writer: ShardWriter, i: int) -> None:
        block = Block(tally=[1, i, 20, 3])
        block.add(names[i], *drawn[i], "exact", i)
        writer.append(block)

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = ShardWriter(tmp_path / "whole", 0)
    for i in range(3):
        append(whole, i)
    whole.finish()
    killed = ShardWriter(tmp_path / "cut", 0)
    append(killed, 0)
    first = killed.journal.stat().st_size
    append(killed, 1)
    killed.close()
    with killed.journal.open("r+b") as file:
        file.truncate(killed.journal.stat().st_size - lost)
    resumed = ShardWriter(tmp_path / "cut", 0)
    assert resumed.num_batches == (2 if lost == 0 else 1)
    assert resumed.journal.stat().st_size >= first
    for i in range(resumed.num_batches, 3):
        append(resumed, i)
    resumed.finish()
    assert shard_path(tmp_path / "cut", 0).read_bytes() == shard_path(tmp_path / "whole", 0).read_bytes()
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["maps-00000.bin"]
    assert read_shard(tmp_path / "cut", 0).tally == [3, 3, 60, 9]


def test_a_write_that_fails_leaves_no_shard(tmp_path: Path):
    writer = ShardWriter(tmp_path, 0)
    block = Block()
    block.add("a.jpg", *draw(1)[0], "exact", 0)
    writer.append(block)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # as a full disk cuts it off
    try:
        with pytest.raises(OSError, match="too large"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["maps-00000.part"]
    again = ShardWriter(tmp_path, 0)
    assert again.num_batches == 1
    again.finish()
    assert read_shard(tmp_path, 0).names == [b"a.jpg"]


def test_the_container_says_what_it_is_not():
    with pytest.raises(ValueError, match=r"thing\.bin is a shard of label maps where a index is needed"):
        parse_container(memoryview(Block().to_bytes("shard")), "index", "thing.bin")


@pytest.mark.parametrize(
    ("crop", "size", "picture", "expected"),
    [
        ("squash", [64, 64], (100, 300), (0, 0, 1, 1)),
        (1.0, [64, 64], (100, 100), (0, 0, 1, 1)),
        (0.5, [64, 64], (100, 100), (0.25, 0.25, 0.75, 0.75)),
        (1.0, [64, 64], (100, 200), (0, 0.25, 1, 0.75)),
        (1.25, [64, 64], (100, 100), (-0.125, -0.125, 1.125, 1.125)),
        (1.0, [32, 64], (100, 100), (0.25, 0, 0.75, 1)),
    ],
)
def test_the_box_of_the_picture_that_a_map_shows(tmp_path: Path, crop, size, picture, expected):
    maps = write_store(tmp_path, ["a"], draw(1), annotator={"crop": crop, "img_size": size})
    assert maps.box(*picture) == pytest.approx(expected)
    assert maps.is_whole_picture == (crop == "squash")


def test_the_golden_maps_survive(tmp_path: Path, golden: Path):
    from safetensors.numpy import load_file

    golden = load_file(golden / "token_label_targets.safetensors")
    names = [f"{i}.jpg" for i in range(len(golden["scores"]))]
    maps = write_store(tmp_path, names, list(zip(golden["scores"], golden["classes"])))
    scores, classes = maps.read_batch(names)
    np.testing.assert_array_equal(classes.numpy(), golden["classes"])
    np.testing.assert_array_equal(scores.numpy(), golden["scores"].astype(np.float16))
