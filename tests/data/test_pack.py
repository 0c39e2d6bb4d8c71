"""`volo pack`: the same images, names and training out of shards, the same bytes every time, whatever happens amid it."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from volo.cli.main import main
from volo.config import AugmentConfig, DataConfig
from volo.data.images import TarSource, open_data
from volo.data.loader import TrainLoader
from volo.data.pack import member_keys, pack, parse_size

SHARD = 12_000


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/ and val/ of two classes, with names that a shard cannot take as they are."""
    names = [
        "0.jpg",
        "1.png",
        "1.jpg",
        "a.b.jpg",
        "a_b.jpg",
        "ü mit Leerzeichen.webp",
        "deep/er/2.JPEG",
        "3.bmp",
        "x" * 120 + ".png",
    ]
    for part, count in (("train", len(names)), ("val", 2)):
        for c, label in enumerate(("cat", "dog")):
            for i, name in enumerate(names[:count]):
                path = tmp_path / "photos" / part / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(100 * c + i + (50 if part == "val" else 0)).save(path)
    return tmp_path / "photos"


def config(path: Path | str, **options: object) -> DataConfig:
    return DataConfig(path=str(path), **{"img_size": 16, "cache": "none", **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".volo-index")}


# The same images


def test_a_training_on_the_shards_is_the_training_on_the_folder(photos: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    packed = pack(config(photos), tmp_path / "out", shard_bytes=SHARD, on_packed=lambda *at: progress.append(at))
    assert (packed.num_train, packed.num_val, packed.classes) == (18, 4, ("cat", "dog"))
    assert progress == [(i, 22) for i in range(1, 23)]
    assert len(packed.shards) > 4
    assert packed.num_bytes == sum(path.stat().st_size for path in packed.shards)
    folder, shards = open_data(config(photos)), open_data(config(tmp_path / "out"))
    assert shards.classes == folder.classes
    assert shards.notes[2:] == []
    for a, b in ((folder.train, shards.train), (folder.val, shards.val)):
        assert isinstance(b, TarSource)
        assert list(b.names) == list(a.names)
        assert torch.equal(b.targets, a.targets)
        assert [b.read(i) for i in range(len(b))] == [a.read(i) for i in range(len(a))]  # type: ignore[attr-defined]
        assert [b.fingerprint(i) for i in range(len(b))] == [a.fingerprint(i) for i in range(len(a))]
    batches = [
        list(
            TrainLoader(
                part,
                config("", crop_pct=1.0),
                AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1"),
                batch_size=6,
                num_workers=0,
            ).batches(0, 5)
        )
        for part in (folder.train, shards.train)
    ]
    for a, b in zip(*batches):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_any_reader_of_tar_and_webdataset_understands_the_members(photos: Path, tmp_path: Path) -> None:
    packed = pack(config(photos), tmp_path / "out", shard_bytes=SHARD)
    samples: dict[str, dict[str, bytes]] = {}
    for path in packed.shards:
        if path.name.startswith("train"):
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    key, _, ending = member.name.partition(".")
                    file = tar.extractfile(member)
                    assert file is not None
                    assert ending not in samples.setdefault(key, {})
                    samples[key][ending] = file.read()
                    assert (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
    assert len(samples) == 18
    for key, sample in samples.items():
        assert int(sample["cls"]) == ("/dog/" in key)
        about = json.loads(sample["json"]) if "json" in sample else {}
        (ending,) = sample.keys() - {"cls", "json"}
        assert sample[ending] == (photos / about.get("name", f"{key}.{ending}")).read_bytes()
    # JSON only where the name says something else.
    assert "json" not in samples["train/cat/0"]
    assert json.loads(samples["train/cat/a_b"]["json"]) == {"label": 0, "class": "cat", "name": "train/cat/a.b.jpg"}
    assert json.loads(samples["train/cat/1_1"]["json"])["name"] == "train/cat/1.png"


def test_keys_are_unique_and_without_dots() -> None:
    names = ["a/1.jpg", "a/1.png", "a/1_1.jpg", "a/x.y.jpg", "a/x_y.jpg", "b.c/1.jpg", "train/17", "v1.5"]
    keys = member_keys(names)
    assert keys == ["a/1", "a/1_1", "a/1_1_1", "a/x_y", "a/x_y_1", "b.c/1", "train/17", "v1_5"]


def test_a_split_by_seed_is_kept(photos: Path, tmp_path: Path) -> None:
    pack(config(photos / "train", val_fraction=0.3, split_seed=3), tmp_path / "out")
    folder, shards = (
        open_data(config(photos / "train", val_fraction=0.3, split_seed=3)),
        open_data(config(tmp_path / "out")),
    )
    assert list(shards.train.names) == list(folder.train.names)
    assert list(shards.val.names) == list(folder.val.names)


def test_arrays_become_png_without_loss_and_keep_their_names(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 9, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=images, labels=np.arange(20) % 2, classes=np.array(["no", "yes"]))
    pack(config(tmp_path / "some.npz", val_fraction=0.2), tmp_path / "out")
    arrays, shards = open_data(config(tmp_path / "some.npz", val_fraction=0.2)), open_data(config(tmp_path / "out"))
    assert shards.classes == ("no", "yes")
    for a, b in ((arrays.train, shards.train), (arrays.val, shards.val)):
        assert list(b.names) == list(a.names)
        assert all(torch.equal(a.load(i), b.load(i)) for i in range(len(a)))
    pack(config(tmp_path / "out"), tmp_path / "again")  # shards of shards
    again = open_data(config(tmp_path / "again"))
    assert list(again.train.names) == list(shards.train.names)
    assert contents(tmp_path / "again")["train-000000.tar"] == contents(tmp_path / "out")["train-000000.tar"]


@pytest.mark.parametrize(("shorter", "quality"), [(15, 0), (15, 50), (0, 50), (30, 0)])
def test_smaller_pictures(photos: Path, tmp_path: Path, shorter: int, quality: int) -> None:
    tall = photos / "train/cat/0.jpg"
    picture(1, (20, 60)).save(tall)
    pack(config(photos), tmp_path / "out", shorter_side=shorter, quality=quality)
    folder, shards = open_data(config(photos)).train, open_data(config(tmp_path / "out")).train
    assert list(shards.names) == list(folder.names)
    sizes = {tuple(shards.load(i).shape[1:]) for i in range(len(shards))}
    expected = {(30, 40), (60, 20)} if shorter in (0, 30) else {(15, 20), (45, 15)}
    assert sizes == expected
    kept = [shards.read(i) == folder.read(i) for i in range(len(shards))]  # type: ignore[attr-defined]
    assert all(kept) if (shorter, quality) == (30, 0) else not any(kept)
    if not all(kept):
        with Image.open(io.BytesIO(shards.read(0))) as image:  # type: ignore[attr-defined]
            assert image.format == "JPEG"


# The same bytes


def test_twice_the_same_bytes_in_shards_of_the_size_asked_for(photos: Path, tmp_path: Path) -> None:
    pack(config(photos), tmp_path / "a", shard_bytes=SHARD, quality=70)
    pack(config(photos), tmp_path / "b", shard_bytes=SHARD, quality=70)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    sizes = [len(content) for name, content in contents(tmp_path / "a").items() if name.endswith(".tar")]
    assert len(sizes) > 2 and max(sizes) <= SHARD


def in_a_process(run: Callable[[], object]) -> int:
    """The exit code of a forked process that does `run`."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_anywhere_and_started_again_the_bytes_are_the_same(photos: Path, tmp_path: Path) -> None:
    whole = pack(config(photos), tmp_path / "whole", shard_bytes=SHARD)
    for stop in (1, 11, 19, 22):
        out = tmp_path / f"killed{stop}"

        def run(out: Path = out, stop: int = stop) -> None:
            pack(
                config(photos), out, shard_bytes=SHARD,
                on_packed=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == stop else None,
            )  # fmt: skip

        assert in_a_process(run) == -signal.SIGKILL
        made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        again = pack(config(photos), out, shard_bytes=SHARD)
        assert again.num_done_before == len(made) or again.num_done_before == len(made) - 1
        assert contents(out) == contents(tmp_path / "whole")
        redone = [path.name for path in out.glob("*.tar") if made.get(path.name, 0) == path.stat().st_mtime_ns]
        assert len(redone) >= again.num_done_before
        assert again.shards == [out / path.name for path in whole.shards]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_disk_that_is_full_leaves_no_half_shard(photos: Path, tmp_path: Path) -> None:
    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OSError, match="Make room"):
            pack(config(photos), tmp_path / "out", shard_bytes=SHARD)

    assert in_a_process(run) == 0
    pack(config(photos), tmp_path / "whole", shard_bytes=SHARD)
    left, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert {name for name in left if ".tar" in name} < {name for name in whole if name.endswith(".tar")}
    assert all(left[name] == whole[name] for name in left if ".tar" in name)
    pack(config(photos), tmp_path / "out", shard_bytes=SHARD)
    assert contents(tmp_path / "out") == whole


def test_lost_or_cut_shards_are_made_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packed = pack(config(photos), out, shard_bytes=SHARD)
    whole = contents(out)
    os.truncate(out / "train-000001.tar", 2048)
    (out / "val-000000.tar").unlink()
    again = pack(config(photos), out, shard_bytes=SHARD)
    assert 0 < again.num_done_before < len(packed.shards)
    assert contents(out) == whole
    assert pack(config(photos), out, shard_bytes=SHARD).num_done_before == len(packed.shards)


# What is refused


def test_other_settings_other_data_and_other_peoples_files(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(config(photos), out)
    with pytest.raises(ValueError, match="other data or settings .quality changed"):
        pack(config(photos), out, quality=90)
    picture(7).save(photos / "train/dog/new.png")
    with pytest.raises(ValueError, match="pictures changed"):
        pack(config(photos), out)
    assert pack(config(photos), out, overwrite=True).num_train == 19
    assert len(open_data(config(out)).train) == 19
    for name in ("train-7.tar", "classes.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"precious")
        with pytest.raises(FileExistsError, match=rf"holds {name}, which volo pack has not written; .*--overwrite"):
            pack(config(photos), tmp_path / name)
        assert (tmp_path / name / name).read_bytes() == b"precious"
    with pytest.raises(ValueError, match="lies in the data itself"):
        pack(config(photos), photos / "shards")
    for options in ({"shard_bytes": 5}, {"quality": 101}, {"shorter_side": -1}):
        with pytest.raises(ValueError, match="it is 10 KB at least|these are pixels"):
            pack(config(photos), tmp_path / "no", **options)  # type: ignore[arg-type]


def test_bad_pictures_are_named_or_left_out(photos: Path, tmp_path: Path) -> None:
    (photos / "train/cat/empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.jpg: the file is empty"):
        pack(config(photos), tmp_path / "out")
    packed = pack(config(photos, on_bad_image="skip"), tmp_path / "out")
    assert [bad.name for bad in packed.skipped] == ["train/cat/empty.jpg"]
    assert packed.num_train == 18


@pytest.mark.parametrize(("text", "size"), [("256MB", 256_000_000), ("1GiB", 2**30), ("1.5 kb", 1500), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1XB", "-3MB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="a size is a number with one of B, KB"):
        parse_size(text)


def test_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    words = ["pack", str(photos), "--out", str(out), "--shard-size", "12kB"]
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_train"], summary["num_val"], summary["num_classes"]) == (18, 4, 2)
    assert summary["shards"] == sorted(path.name for path in out.glob("*.tar"))
    assert summary["bytes"] == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "18 training and 4 held-out images of 2 classes" in shown
    assert f"{len(summary['shards'])} of them were there before" in shown
    assert main([*words, "--quality", "50"]) == 2
    assert "--overwrite" in capsys.readouterr().err
