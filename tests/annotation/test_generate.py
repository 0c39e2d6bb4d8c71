"""Label maps of a data set: drawn right, resumed byte for byte, checked, imported; no image is lost silently."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import volo
from volo.annotation.annotator import load_annotator
from volo.annotation.check import check_store
from volo.annotation.generate import annotate
from volo.cli.main import main
from volo.config import AnnotatorConfig, DataConfig, Recipe
from volo.data.files import FolderLock
from volo.data.images import open_data
from volo.data.label_maps import INDEX, LabelMaps, ShardWriter, read_shard, shard_path
from volo.data.transforms import PixelPipeline, squash_transform
from volo.distributed import World
from volo.inference.model_source import LoadedModel, load
from volo.models.checkpoint import model_config_dict, save_checkpoint

RUN_SCRIPT = Path(__file__).with_name("run_annotate.py")
RANKS_SCRIPT = Path(__file__).parents[1] / "ranks.py"
CLASSES = ["ant", "bee", "cat", "dog"]
ONE = World(0, 1, torch.device("cpu"))
# 3 shards of training images and 2 of held-out ones.
ALL: dict[str, Any] = {"part": "all", "shard_size": 16, "world": ONE}


def at(data: Path, **changes: Any) -> DataConfig:
    return DataConfig(path=str(data), num_workers=0, **changes)


@pytest.fixture(scope="module")
def how(checkpoint: Path) -> AnnotatorConfig:
    return AnnotatorConfig(model=str(checkpoint), top=3, batch_size=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOLO of 26,000 random weights for 16 x 16 pixels and four classes: maps of 2 x 2."""
    torch.manual_seed(0)
    options = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
    model = volo.create_model("volo_nano", **options, num_classes=4, img_size=16)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    recipe = dataclasses.replace(Recipe(), data=DataConfig(img_size=16, interpolation="bilinear"))
    path = tmp_path_factory.mktemp("annotator") / "best.pt"
    content = {
        "format": 1,
        "model": model.state_dict(),
        "ema": None,
        "recipe": recipe.to_dict(),
        "metrics": {},
        "step": 7,
    }
    save_checkpoint(path, content | {"model_config": model_config_dict(model), "classes": CLASSES})
    return path


@pytest.fixture(scope="module")
def annotator(how: AnnotatorConfig) -> LoadedModel:
    return load_annotator(how)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz with 45 images and val.npz with 20."""
    folder = tmp_path_factory.mktemp("arrays")
    generator = np.random.default_rng(0)
    for name, count in (("train", 45), ("val", 20)):
        images = generator.integers(0, 256, (count, 12, 20, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count) % 4, classes=np.array(CLASSES))
    return folder


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Tiny PNG files of random noise in class folders; their names."""
    generator = np.random.default_rng(seed)
    names = [f"{CLASSES[i % 4]}/{i:04}.png" for i in range(count)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(annotator: LoadedModel, how: AnnotatorConfig, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "store"
    annotate(annotator, how, at(arrays), out, **ALL)
    return out


def test_maps_are_what_the_annotator_says(whole: Path, checkpoint: Path, arrays: Path):
    maps = LabelMaps.open(whole)
    assert sorted(contents(whole)) == [INDEX, *(f"maps-0000{i}.bin" for i in range(5))]
    assert (len(maps), maps.top, maps.grid, maps.classes) == (65, 3, (2, 2), tuple(CLASSES))
    assert list(maps.names) == [f"train/{i}" for i in range(45)] + [f"test/{i}" for i in range(20)]
    assert maps.annotator["model"] == "best.pt" and maps.annotator["crop"] == "squash"
    loaded = load(checkpoint)
    data = dataclasses.replace(loaded.recipe.data, path=str(arrays), kind="npz")
    splits, right, right_positions = open_data(data), 0, 0
    for source in (splits.train, splits.val):
        images = PixelPipeline(data).eval()(squash_transform(data)(source.images))
        with torch.inference_mode():
            logits = loaded.model.class_and_token_logits(loaded.model.forward_features(images))[1]
        spread = logits.transpose(1, 2).unflatten(2, (2, 2))
        best = spread.topk(3, dim=1)
        rest = spread.scatter(1, best.indices, -math.inf)  # counts as zeros, together
        level = rest.logsumexp(dim=1, keepdim=True) - math.log(len(CLASSES) - 3)
        scores, classes = maps.read_batch(source.names)
        torch.testing.assert_close(scores, (best.values - level).half(), rtol=2e-3, atol=1e-5)
        assert torch.equal(classes, best.indices)
        right += int((logits.mean(dim=1).argmax(dim=1) == source.targets).sum())
        right_positions += int((classes[:, 0] == source.targets[:, None, None]).sum())
    assert maps.agreement == {"top1": right / 65, "positions": right_positions / 65 / 4}
    assert 0 < right < 65


def test_compact_maps_and_flips(
    annotator: LoadedModel, how: AnnotatorConfig, whole: Path, arrays: Path, tmp_path: Path
):
    train: dict[str, Any] = ALL | {"part": "train"}
    annotate(annotator, dataclasses.replace(how, encoding="compact"), at(arrays), tmp_path / "compact", **train)
    exact, compact = LabelMaps.open(whole), LabelMaps.open(tmp_path / "compact")
    scores, classes = compact.read_batch(compact.names)
    assert torch.equal(classes, exact.read_batch(compact.names)[1])
    assert (scores - exact.read_batch(compact.names)[0]).abs().max() < 0.0501 + 2e-3
    annotate(annotator, dataclasses.replace(how, flip=True), at(arrays), tmp_path / "flip", **train)
    assert not torch.equal(LabelMaps.open(tmp_path / "flip").read_batch(compact.names)[1], classes)


def start(checkpoint: Path, data: Path, out: Path, *words: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += [str(RANKS_SCRIPT), str(processes)]
    return subprocess.Popen(
        [*launcher, str(RUN_SCRIPT), str(checkpoint), str(data), str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def maps_on_disk(out: Path) -> int:
    """Maps in shards and journals; nobody may be writing."""
    count = 0
    for path in out.glob("maps-*"):
        number = int(path.stem.removeprefix("maps-"))
        if path.suffix == ".bin":
            count += len(read_shard(out, number).names)
        else:
            writer = ShardWriter(out, number)
            count += len(writer.block.names)
            writer.close()
    return count


def test_killed_at_any_moment_it_ends_the_same(
    annotator: LoadedModel, how: AnnotatorConfig, checkpoint: Path, arrays: Path, whole: Path, tmp_path: Path
):
    """SIGKILL at random moments, twice; each start goes on where the one before was stopped."""
    out, rng, before = tmp_path / "store", random.Random(0), 0

    def sizes() -> list[tuple[str, int]]:
        return [(path.name, path.stat().st_size) for path in sorted(out.glob("maps-*"))]

    for _ in range(2):
        found = sizes()
        child = start(checkpoint, arrays, out, "--slow", "1.0")
        while child.poll() is None and sizes() == found:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        assert child.poll() is None, child.communicate()
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        done = maps_on_disk(out)
        assert before < done < 65
        before = done
        with pytest.raises(FileNotFoundError, match="not finished"):
            LabelMaps.open(out)
    annotate(annotator, how, at(arrays), out, **ALL, resume=True)
    assert contents(out) == contents(whole)


def test_two_processes_draw_the_same_bytes(checkpoint: Path, arrays: Path, whole: Path, tmp_path: Path):
    child = start(checkpoint, arrays, tmp_path / "store", processes=2)
    assert child.wait(timeout=280) == 0, child.communicate()
    child.communicate()
    assert contents(tmp_path / "store") == contents(whole)


def test_a_finished_store_is_not_drawn_again(annotator: LoadedModel, how: AnnotatorConfig, whole: Path, arrays: Path):
    before = contents(whole)
    report = annotate(annotator, how, at(arrays), whole, **ALL, resume=True)
    assert (report["pictures"], report["drawn"]) == (65, 0)
    assert contents(whole) == before


@pytest.mark.parametrize("damage", ["flip", "missing", "index"])
def test_damaged_files_are_found_and_drawn_again(
    annotator: LoadedModel, how: AnnotatorConfig, whole: Path, arrays: Path, tmp_path: Path, damage: str
):
    out, data = tmp_path / "store", at(arrays)
    shutil.copytree(whole, out)
    assert check_store(out, str(arrays)) == []
    path = shard_path(out, 1)
    content = bytearray(path.read_bytes())
    content[-10] ^= 16  # in the last record of the shard
    if damage == "flip":
        path.write_bytes(content)
        problems = check_store(out, str(arrays))
        assert [(p.kind, p.name) for p in problems] == [("corrupt", "maps-00001.bin"), ("corrupt", "train/31")]
    elif damage == "missing":
        path.unlink()
        problems = check_store(out, str(arrays))
        assert [(p.kind, p.name) for p in problems] == [
            ("corrupt", name) for name in ["maps-00001.bin", *(f"train/{i}" for i in range(16, 32))]
        ]
    else:
        (out / INDEX).write_bytes((out / INDEX).read_bytes()[:-1])
        assert [(p.kind, p.name) for p in check_store(out, str(arrays))] == [("corrupt", INDEX)]
        with pytest.raises(ValueError, match=r"index in .* damaged.*--overwrite"):
            annotate(annotator, how, data, out, **ALL, resume=True)
        annotate(annotator, how, data, out, **ALL, overwrite=True)
    report = annotate(annotator, how, data, out, **ALL, resume=True)
    assert report["drawn"] == (0 if damage == "index" else 16)
    assert contents(out) == contents(whole)


def test_another_annotator_or_other_pictures_are_refused(
    annotator: LoadedModel, how: AnnotatorConfig, whole: Path, arrays: Path, tmp_path: Path
):
    out, data = tmp_path / "store", at(arrays)
    shutil.copytree(whole, out)
    with pytest.raises(ValueError, match=r"holds label maps; --resume goes on with them, --overwrite"):
        annotate(annotator, how, data, out, **ALL)
    for change, words in (({"top": 2}, "top was 3, now 2"), ({"flip": True}, "flip was False, now True")):
        with pytest.raises(ValueError, match=words):
            annotate(annotator, dataclasses.replace(how, **change), data, out, **ALL, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "val"):
        with np.load(arrays / f"{name}.npz") as held:
            np.savez(other / f"{name}.npz", **{k: held[k][:-1] if k != "classes" else held[k] for k in held.files})
    with pytest.raises(ValueError, match="the images are not those"):
        annotate(annotator, how, at(other), out, **ALL, resume=True)
    other_weights = copy.deepcopy(annotator)
    other_weights.model.aux_head.bias.data += 1e-6
    with pytest.raises(ValueError, match="weights_digest was"):
        annotate(other_weights, how, data, out, **ALL, resume=True)
    assert contents(out) == contents(whole)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(ValueError, match=r"other things \(holiday.jpg\)"):
        annotate(annotator, how, data, tmp_path / "photos", **ALL, overwrite=True)
    assert (tmp_path / "photos" / "holiday.jpg").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top": 5}, "from 1 to 4"),
        ({"top": 0}, "from 1 to 4"),
        ({"batch_size": 0}, "at least 1"),
        ({"amp": "int8"}, "amp"),
    ],
)
def test_settings_that_make_no_sense(
    annotator: LoadedModel, how: AnnotatorConfig, arrays: Path, tmp_path: Path, change, words
):
    with pytest.raises(ValueError, match=words):
        annotate(annotator, dataclasses.replace(how, **change), at(arrays), tmp_path / "s", **ALL)
    assert not (tmp_path / "s").exists()


BREAK: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:60]),
    lambda path: path.write_bytes(b"<html>404</html>"),
    lambda path: (path.unlink(), path.symlink_to("gone.png")),
    lambda path: path.rename(path.with_suffix(".txt")),
]


def test_a_thousand_bad_files_are_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Empty, cut off, web pages, dangling links, renamed: each is named, by the run that stops and by the one that goes on."""
    data, out = tmp_path / "data", tmp_path / "store"
    names = write_pictures(data, 1050)
    bad = names[:1000]
    for i, name in enumerate(bad):
        BREAK[i % 5](data / name)
    renamed = [name.replace(".png", ".txt") for name in bad[4::5]]
    undecodable = [name for i, name in enumerate(bad) if i % 5 != 4]
    command = [
        "annotate",
        str(checkpoint),
        "--data",
        str(data),
        "--out",
        str(out),
        "--top",
        "2",
        "--part",
        "all",
        "--json",
    ]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert "800 of 850" in shown
    assert all(f"{name}: " in shown for name in undecodable)
    assert main([*command, "--on-bad-image", "skip"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["pictures"] == 50 and sorted(report["skipped"]) == sorted(undecodable)
    assert sorted(report["ignored"]) == sorted(renamed)
    assert all(name in captured.err for name in [*undecodable, *renamed])
    assert sorted(LabelMaps.open(out).names) == sorted(names[1000:])
    assert check_store(out, str(data)) == []


def test_check_names_a_thousand_differences(
    annotator: LoadedModel, how: AnnotatorConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Images that were deleted, renamed, damaged, exchanged or added after their maps were drawn."""
    data, out = tmp_path / "data", tmp_path / "store"
    names = write_pictures(data, 1050)
    annotate(annotator, dataclasses.replace(how, top=1, batch_size=64), at(data), out, **ALL | {"shard_size": 256})
    expected = set()
    for i, name in enumerate(names[:1000]):
        path = data / name
        if i % 4 == 0:
            path.unlink()
            expected.add(("extra", name))
        elif i % 4 == 1:
            path.rename(path.with_name(f"new{path.name}"))
            expected |= {("extra", name), ("missing", str(Path(name).with_name(f"new{path.name}")))}
        elif i % 4 == 2:
            path.write_bytes(path.read_bytes()[:50])
            expected.add(("unreadable", name))
        else:
            shutil.copy(data / names[1001], path)
            expected.add(("mismatched", name))
    problems = check_store(out, str(data))
    assert {(p.kind, p.name) for p in problems} == expected and len(problems) == 1250
    quick = check_store(out, str(data), with_pictures=False)
    assert {(p.kind, p.name) for p in quick} == {(kind, name) for kind, name in expected if kind != "mismatched"}
    capsys.readouterr()
    assert main(["annotate", "--check", str(out), "--data", str(data), "--json", "--quiet"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1250
    assert main(["annotate", "--check", str(out), "--data", str(data), "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert all(f"{kind}: {name}: " in shown for kind, name in expected)
    assert "250 missing, 500 extra, 250 mismatched, 250 unreadable" in shown


def test_pictures_that_vanish_meanwhile(annotator: LoadedModel, how: AnnotatorConfig, tmp_path: Path):
    """All of them are named at the end; what is whole is kept, and the next start does the rest."""
    data, out = tmp_path / "data", tmp_path / "store"
    names = sorted(write_pictures(data, 64))
    lost = [names[20], names[22], names[40]]
    saved = {name: (data / name).read_bytes() for name in lost}

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "annotating" and done == 4:
            for name in lost:
                (data / name).unlink(missing_ok=True)

    with pytest.raises(ValueError, match="3 of 64 images cannot be used") as raised:
        annotate(annotator, how, at(data), out, **ALL, on_progress=on_progress)
    assert all(f"{name}: no such file" in str(raised.value) for name in lost)
    with pytest.raises(ValueError, match="of 64 images cannot be used") as raised:
        annotate(annotator, how, at(data), out, **ALL, resume=True)
    assert all(f"{name}: gone since the annotation began" in str(raised.value) for name in lost)
    for name, content in saved.items():
        (data / name).write_bytes(content)
    report = annotate(annotator, how, at(data), out, **ALL, resume=True)
    assert report["pictures"] == 64 and report["drawn"] < 40
    annotate(annotator, how, at(data), tmp_path / "again", **ALL)
    assert contents(out) == contents(tmp_path / "again")


def test_pictures_that_vanish_may_be_left_out(annotator: LoadedModel, how: AnnotatorConfig, tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "store"
    names = sorted(write_pictures(data, 64))
    lost: list[str] = []

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "annotating" and not lost:
            lost.append(next(name for name in names[30:] if (data / name).exists()))
            (data / lost[-1]).unlink()

    report = annotate(annotator, how, at(data, on_bad_image="skip"), out, **ALL, on_progress=on_progress)
    assert lost and report["pictures"] == 64 - len(lost)
    assert report["skipped"] == dict.fromkeys(lost, "no such file or directory")


def test_one_process_a_store(annotator: LoadedModel, how: AnnotatorConfig, arrays: Path, tmp_path: Path):
    with FolderLock(tmp_path / "store", "a test"), pytest.raises(ValueError, match="is at work in"):
        annotate(annotator, how, at(arrays), tmp_path / "store", **ALL)


def test_the_command_line(checkpoint: Path, arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "store"
    command = ["annotate", str(checkpoint), "--data", str(arrays), "--out", str(out), "--top", "2", "--device", "cpu"]
    assert main([*command, "--encoding", "compact", "--batch-size", "16"]) == 0
    shown = capsys.readouterr().out
    assert "45 label maps of 2 x 2 positions" in shown and "agrees with the labels on" in shown
    assert main(command) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert main(["annotate", "--check", str(out), "--data", str(arrays)]) == 0
    assert "every image has its map" in capsys.readouterr().out
    for words, message in (
        (["annotate", str(checkpoint), "--data", str(arrays)], "--out says"),
        (["annotate", "--data", str(arrays), "--out", str(out)], "needs an annotator"),
        (["annotate", "resnet50", "--out", str(out)], "--data says"),
        (["annotate", "resnet5O", "--data", str(arrays), "--out", str(out)], "did you mean"),
        (["annotate", str(checkpoint), "--data", str(arrays), "--out", str(out), "--crop", "half"], "--crop is squash"),
        ([*command, "--annotator-weights", "w.pt"], "weights of its own"),
        (["annotate", "--check", str(tmp_path), "--data", str(arrays)], "no label maps at"),
    ):
        assert main(words) == 2
        assert message in " ".join(capsys.readouterr().err.split())
