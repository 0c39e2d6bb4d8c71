"""Tar shards: found, indexed once, read in any order like a folder, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from volo.config import AugmentConfig, DataConfig
from volo.data import shard_index
from volo.data.decode import BadImageError, decode_image
from volo.data.images import open_data
from volo.data.loader import TrainLoader
from volo.data.shard_index import split_member
from volo.data.shards import TarSource, expand_braces, find_shards, is_shards, open_all_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

Members = list[tuple[str, bytes]]


def picture(seed: int, size: tuple[int, int] = (12, 8), ending: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(ending, ending))
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def labelled(numbers: Iterable[int], classes: int = 2) -> Members:
    return [
        member
        for i in numbers
        for member in ((f"{i:04}.png", picture(i)), (f"{i:04}.cls", str(i % classes).encode() + b"\n"))
    ]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 6 training images, one of 4 held-out ones."""
    write_tar(tmp_path / "train-000000.tar", labelled(range(6)))
    write_tar(tmp_path / "train-000001.tar", labelled(range(6, 12)))
    write_tar(tmp_path / "val-000000.tar", labelled(range(100, 104)))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return tmp_path


def config(path: Path | str, **options: object) -> DataConfig:
    return DataConfig(path=str(path), **{"img_size": 16, **options})  # type: ignore[arg-type]


# Found and read


@pytest.mark.parametrize("cache", ["none", "auto", "ram"])
def test_shards_of_train_and_val(folder: Path, cache: str) -> None:
    splits = open_data(config(folder, cache=cache))
    assert isinstance(splits.train, TarSource)
    assert splits.classes == ("cat", "dog")
    assert list(splits.train.names) == [f"{i:04}.png" for i in range(12)]
    assert splits.train.targets.tolist() == [0, 1] * 6
    assert list(splits.val.names) == [f"{i:04}.png" for i in range(100, 104)]
    assert splits.notes[2:] == splits.skipped == []
    assert (splits.train.cache is not None) == (cache != "none")
    for i in reversed(range(12)):
        assert torch.equal(splits.train.load(i), decode_image(picture(i)))
        assert splits.train.read(i) == picture(i)
    assert torch.equal(splits.val.load(3), decode_image(picture(103)))


@pytest.mark.parametrize("how", ["one file", "braces", "folder without names of parts", "kind"])
def test_what_has_no_val_is_split_by_seed(tmp_path: Path, how: str) -> None:
    for i in range(3):
        write_tar(tmp_path / f"birds{i}.tar", labelled(range(20 * i, 20 * i + 20)))
    path = {"one file": "birds0.tar", "braces": "birds{0..1}.tar"}.get(how, ".")
    count = {"one file": 20, "braces": 40}.get(how, 60)
    (tmp_path / "notes").mkdir(exist_ok=how == "kind")
    if how != "kind":
        (tmp_path / "notes").rmdir()
    given = config(tmp_path / path, kind="tar" if how == "kind" else "auto")
    splits = open_data(given)
    assert len(splits.train) + len(splits.val) == count
    assert splits.val.targets.tolist().count(0) == splits.val.targets.tolist().count(1) == count // 20
    assert not set(splits.train.names) & set(splits.val.names)
    assert splits.classes == ("0", "1")
    again = open_data(given)
    assert list(again.val.names) == list(splits.val.names)


def test_other_names_of_parts(tmp_path: Path) -> None:
    write_tar(tmp_path / "imagenet1k-training-00.tar", labelled(range(4)))
    write_tar(tmp_path / "imagenet1k-validation-00.tar", labelled(range(4, 8)))
    write_tar(tmp_path / "imagenet1k-test-00.tar", labelled(range(8, 12)))
    write_tar(tmp_path / "devkit.tar", [("readme.txt", b"hello")])
    splits = open_data(config(tmp_path))
    assert list(splits.val.names) == [f"{i:04}.png" for i in range(4, 8)]
    assert list(splits.train.names) == [f"{i:04}.png" for i in range(4)]
    assert "ignored 2 tar files" in splits.notes[2] and "devkit.tar" in splits.notes[2]


def test_evaluation_takes_all_of_val_or_everything(folder: Path) -> None:
    source, skipped = open_all_shards(folder, config(""))
    assert list(source.names) == [f"{i:04}.png" for i in range(100, 104)]
    assert skipped == []
    source, _ = open_all_shards(folder / "train-{000000..000001}.tar", config(""))
    assert len(source) == 12
    for i in range(2):
        (folder / f"train-00000{i}.tar").unlink()
    assert len(open_all_shards(folder, config(""))[0]) == 4
    with pytest.raises(ValueError, match="held-out shards .* but none for training"):
        open_data(config(folder))


@settings(max_examples=40, deadline=None)
@given(st.permutations(labelled(range(5))), st.integers(1, 4))
def test_members_may_lie_in_any_order(members: Members, width: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "a.tar", [(f"./{'deep/' * width}{name}", content) for name, content in members])
        source, _ = open_all_shards(Path(folder) / "a.tar", config("", cache="none"))
        order = [int(name[:4]) for name, _ in members if name.endswith("png")]
        assert list(source.names) == [f"{'deep/' * width}{i:04}.png" for i in order]
        assert source.targets.tolist() == [i % 2 for i in order]
        assert [source.read(i) for i in range(5)] == [picture(i) for i in order]


def test_pictures_of_several_kinds_and_other_members(tmp_path: Path) -> None:
    endings = ["jpg", "png", "webp", "JPEG"]
    members: Members = [("folder/notes.txt", b"text"), (".hidden.png", b""), ("a/._0.png", b"")]
    for i, ending in enumerate(endings):
        members += [(f"a/{i}.{ending}", picture(i, ending=ending.lower())), (f"a/{i}.cls", b"%d" % (i % 2))]
        members += [(f"a/{i}.seg.png", b"a mask"), (f"a/{i}.json", b'{"width": 12}')]
    path = write_tar(tmp_path / "train.tar", members)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("a", tarfile.DIRTYPE), ("a/9.jpg", tarfile.SYMTYPE), ("a/8.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a/0.jpg"
            tar.addfile(info)
    source, skipped = open_all_shards(path, config(""))
    assert list(source.names) == [f"a/{i}.{ending}" for i, ending in enumerate(endings)]
    assert skipped == []
    notes = open_data(config(path)).notes
    assert "ignored 9 members" in notes[2] and "notes.txt" in notes[2]


@pytest.mark.parametrize(
    ("path", "parts"),
    [("a/b.jpg", ("a/b", "jpg")), ("b.JPG", ("b", "jpg")), ("x.y/b.seg.png", ("x.y/b", "seg.png")), ("a/.x.png", ("", "x.png"))],
)  # fmt: skip
def test_keys_are_those_of_webdataset(path: str, parts: tuple[str, str]) -> None:
    assert split_member(path) == parts


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for wrong, message in (("a{3..1}.tar", "upwards"), ("a{x}.tar", "neither a range")):
        with pytest.raises(ValueError, match=message):
            expand_braces(wrong)


def test_what_counts_as_shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert is_shards(folder)
    (folder / "extracted").mkdir()
    assert is_shards(folder)  # by the names of the tar files
    (folder / "train").mkdir()
    assert not is_shards(folder)  # ImageNet's own tar files beside what was unpacked from them
    other = tmp_path_factory.mktemp("classes")
    (other / "cat").mkdir()
    write_tar(other / "backup.tar", [])
    assert not is_shards(other)
    assert is_shards(other / "backup.tar") and is_shards("x/a-{0..3}.tar") and not is_shards(other / "none")


def test_missing_shards_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 4 files are not there: .*train-000002.tar.*train-000003.tar"):
        open_data(config(folder / "train-{000000..000003}.tar"))
    with pytest.raises(ValueError, match="data.path is empty"):
        open_data(config("", kind="tar"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"without .tar files \(but with x.tar.gz: unpack it"):
        find_shards(str(tmp_path / "empty"))


# Classes


def with_json(values: dict[int, object]) -> Members:
    return [
        member
        for i, value in values.items()
        for member in ((f"{i}.png", picture(i)), (f"{i}.json", json.dumps(value).encode()))
    ]


@pytest.mark.parametrize(
    ("values", "listed", "classes", "targets"),
    [
        ({0: {"label": 1}, 1: {"label": "0"}}, "", ("0", "1"), [1, 0]),
        ({0: {"class": "dog"}, 1: {"class": "cat"}}, "", ("cat", "dog"), [1, 0]),
        ({0: {"label": "dog"}, 1: {"label": "cat"}}, "", ("cat", "dog"), [1, 0]),
        ({0: {"label": 0, "class": "dog"}, 1: {"label": 2, "class": "cat"}}, "", ("dog", "1", "cat"), [0, 2]),
        ({0: {"class": "dog"}, 1: {"label": 0}}, "cat\ndog\nowl\n", ("cat", "dog", "owl"), [1, 0]),
    ],
)
def test_classes_from_json(
    tmp_path: Path, values: dict[int, object], listed: str, classes: tuple[str, ...], targets: list[int]
) -> None:
    path = write_tar(tmp_path / "a.tar", with_json(values))
    if listed:
        (tmp_path / "classes.txt").write_text(listed)
    source, _ = open_all_shards(path, config(""))
    assert source.classes == classes
    assert source.targets.tolist() == targets


def test_the_name_in_json_is_what_label_maps_go_by(tmp_path: Path) -> None:
    named = {0: {"label": 0, "name": "train/cat/a.b.jpg"}, 1: {"label": 1, "name": "train/dog/ü.jpg"}}
    source, _ = open_all_shards(write_tar(tmp_path / "a.tar", with_json(named)), config(""))
    assert list(source.names) == ["train/cat/a.b.jpg", "train/dog/ü.jpg"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({0: {"label": 0, "class": "dog"}, 1: {"label": 0, "class": "cat"}}, "class 0 .* is called"),
        ({0: {"class": "dog"}, 1: {"label": 0}}, "only a class name: put a\nclasses.txt|only a class name"),
        ({0: {"label": 0}, 1: {"label": 0}}, "one class only"),
        ({0: {"label": 0}, 1: {"label": 99_999_999}}, "classes.txt"),
        ({0: {}, 1: {}}, "no labelled images.*has no label"),
    ],
)
def test_classes_that_contradict(tmp_path: Path, values: dict[int, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        open_all_shards(write_tar(tmp_path / "a.tar", with_json(values)), config(""))


# What is wrong is named, all of it, at the start


def test_every_bad_picture_is_named_or_left_out(folder: Path) -> None:
    bad: Members = [
        ("a.png", picture(50)),  # no label
        ("b.png", picture(51)), ("b.cls", b"cat"),
        ("c.png", picture(52)), ("c.cls", b"2"),
        ("d.png", picture(53)[:100]), ("d.cls", b"0"),
        ("e.png", b""), ("e.cls", b"0"),
        ("f.png", picture(54)), ("f.cls", b"0"), ("f.json", b'{"label": 1}'),
        ("g.png", picture(55)), ("g.json", b'{"label": 0, "class": "dog"}'),
        ("h.png", picture(56)), ("h.json", b"{nonsense"),
        ("i.png", picture(57)), ("i.json", b'{"class": "dgo"}'),
        ("j.cls", b"1"),
        ("0003.png", picture(58)), ("0003.cls", b"1"),  # as in train-000000.tar
        ("k.png", picture(59)), ("k.cls", b"1"), ("k.png", picture(60)), ("k.jpg", picture(61, ending="jpg")),
    ]  # fmt: skip
    write_tar(folder / "train-000002.tar", bad)
    reasons = {
        "a.png": "has no label: neither a.cls nor a label in a.json",
        "b.png": "its label (.cls) is 'cat', which is not a valid class index",
        "c.png": "its class is 2, but there are 2 classes, 0 to 1",
        "d.png": "damaged",
        "e.png": "the file is empty",
        "f.png": "its .cls and its JSON disagree: classes 0 and 1",
        "g.png": "its class is 0, which is 'cat', but its JSON says 'dog'",
        "h.png": "its JSON cannot be read",
        "i.png": "its class 'dgo' is not in classes.txt; did you mean 'dog'?",
        "j.cls": "its image is not in the shard",
        "0003.png": "in train-000000.tar too; the names of a data set must differ",
        "k.png": "twice in the shard",
        "k.jpg": "its key is that of k.png too",
    }
    for _ in range(2):  # from the index it is the same
        with pytest.raises(ValueError, match="13 of 30 images") as error:
            open_data(config(folder))
        for name, reason in reasons.items():
            assert f"train-000002.tar: {name}: {reason}" in str(error.value)
        splits = open_data(config(folder, on_bad_image="skip"))
        assert {b.name: b.reason.partition(" (")[0] for b in splits.skipped} == {
            f"train-000002.tar: {name}": reason.partition(" (")[0] for name, reason in reasons.items()
        }
        assert list(splits.train.names) == [f"{i:04}.png" for i in range(12)] + ["k.png"]
        for i, number in enumerate([*range(12), 59]):
            assert torch.equal(splits.train.load(i), decode_image(picture(number)))


def cut_in_a_member(data: bytes) -> bytes:
    return data[: 512 + 100]


def cut_between_members(data: bytes) -> bytes:
    whole = len(picture(6))
    return data[: 2 * 512 + -(-whole // 512) * 512 + 512]  # the first image and its label


def spoil_a_header(data: bytes) -> bytes:
    start = cut_between_members(data)
    return start + b"\x7f" * 512 + data[len(start) + 512 :]


def join(data: bytes) -> bytes:
    return data + data


@pytest.mark.parametrize(
    ("spoil", "reason", "left"),
    [
        (cut_in_a_member, "cut off after 0 members|not a readable tar file", 0),
        (cut_between_members, "cut off after 2 members: the end mark of a tar file is missing", 1),
        (spoil_a_header, "damaged at byte .*, after 2 members", 1),
        (join, "data follows its end mark", 6),
        (gzip.compress, "not a readable tar file .it is compressed, unpack it first", 0),
        (lambda data: b"", "not a readable tar file", 0),
        (lambda data: b"<html>" + data, "not a readable tar file", 0),
        (lambda data: os.urandom(3000), "not a readable tar file", 0),
    ],
)
def test_damaged_shards_are_named_and_their_whole_pictures_usable(
    folder: Path, spoil: Callable[[bytes], bytes], reason: str, left: int
) -> None:
    shard = folder / "train-000001.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(ValueError, match=f"train-000001.tar: ({reason})"):
        open_data(config(folder))
    splits = open_data(config(folder, on_bad_image="skip"))
    assert list(splits.train.names) == [f"{i:04}.png" for i in range(6 + left)]
    assert len(splits.skipped) == 1
    for i in range(6 + left):
        assert splits.train.load(i).shape == (3, 8, 12)  # type: ignore[attr-defined]


# The index


def test_the_index_is_made_once_for_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    decoded: list[str] = []
    build, decode = shard_index.build_index, shard_index.decode_image
    monkeypatch.setattr(shard_index, "build_index", lambda path: built.append(path.name) or build(path))
    monkeypatch.setattr(shard_index, "decode_image", lambda data, name: decoded.append(name) or decode(data, name))
    first = open_data(config(folder, cache="none"))
    assert sorted(built) == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert len(decoded) == 16
    built.clear(), decoded.clear()
    again = open_data(config(folder, cache="none"))
    assert built == decoded == []
    assert list(again.train.names) == list(first.train.names)
    assert torch.equal(again.train.load(7), first.train.load(7))

    state = (folder / "train-000001.tar").stat()
    write_tar(folder / "train-000001.tar", labelled(range(20, 26)))
    os.utime(folder / "train-000001.tar", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    changed = open_data(config(folder, cache="none"))
    assert built == ["train-000001.tar"]
    assert list(changed.train.names)[6:] == [f"{i:04}.png" for i in range(20, 26)]

    place = shard_index.index_paths(folder / "train-000000.tar")[0]
    whole = place.read_bytes()
    for damaged in (b"", whole[:200], whole[:-30], b"x" * 500):
        place.write_bytes(damaged)
        built.clear()
        assert list(open_data(config(folder, cache="none")).train.names) == list(changed.train.names)
        assert built == ["train-000000.tar"]
        assert place.read_bytes() == whole


def test_where_the_folder_takes_no_index_the_cache_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in folder.glob("*.tar"):  # not to be written to, even for an administrator
        shard_index.index_paths(shard)[0].mkdir()
    first = open_data(config(folder))
    assert all(shard_index.index_paths(shard)[1].is_file() for shard in folder.glob("*.tar"))
    monkeypatch.setattr(shard_index, "build_index", None)
    assert list(open_data(config(folder)).train.names) == list(first.train.names)


# Read like a folder


def test_batches_are_those_of_the_folder_whatever_the_workers(folder: Path, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("unpacked")
    for part in ("train", "val"):
        for i in range(12) if part == "train" else range(100, 104):
            path = root / part / ("cat", "dog")[i % 2] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i))
    unpacked = open_data(config(root, cache="none")).train
    # Folders go class by class.
    order = torch.tensor([*range(0, 12, 2), *range(1, 12, 2)])
    packed = open_data(config(folder, cache="none")).train
    assert isinstance(packed, TarSource)
    packed = packed.select(order.tolist())
    assert torch.equal(packed.targets, unpacked.targets)

    def batches(source, workers: int, start: int = 0) -> dict[str, torch.Tensor]:
        augment = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1")
        loader = TrainLoader(source, config("", crop_pct=1.0), augment, batch_size=4, num_workers=workers)
        parts = list(loader.batches(start, 7))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    wanted = batches(unpacked, 0)
    for workers in (0, 2):
        for name, values in batches(packed, workers).items():
            assert torch.equal(values, wanted[name]), name
    for name, values in batches(packed, 1, start=5).items():
        assert torch.equal(values, wanted[name][4 * 5 :]), name


def test_threads_may_read_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "MAX_OPEN_SHARDS", 2)
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", labelled(range(4 * i, 4 * i + 4)))
    source, _ = open_all_shards(tmp_path, config("", cache="none"))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    order = np.random.default_rng(0).integers(0, 24, 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [picture(i) for i in order]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_source_can_be_sent_to_another_process(folder: Path) -> None:
    source, _ = open_all_shards(folder, config("", cache="none"))
    source.load(0)
    other = pickle.loads(pickle.dumps(source))
    assert torch.equal(other.load(3), source.load(3))


def test_a_shard_that_shrinks_or_goes_during_the_run_is_named(folder: Path) -> None:
    source, _ = open_all_shards(folder, config("", cache="none"))
    shard = folder / "val-000000.tar"
    os.truncate(shard, 1000)
    with pytest.raises(BadImageError, match=r"0103.png: .*val-000000.tar is shorter than when it was indexed"):
        source.load(3)
    shard.unlink()
    other = pickle.loads(pickle.dumps(source))
    with pytest.raises(BadImageError, match=r"0100.png: .*val-000000.tar: no such file"):
        other.load(0)
