"""Label maps of a data set: drawn right, resumed byte for byte, checked, imported; no picture is lost silently."""

from __future__ import annotations

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

import numpy as np
import pytest
import torch
from PIL import Image

import volo
from volo.annotation.drawing import (
    AnnotateConfig,
    OpenedAnnotator,
    annotate,
    check_store,
    import_original,
    open_annotator,
)
from volo.cli.main import main
from volo.config import DataConfig, Recipe
from volo.data.files import FolderLock
from volo.data.images import open_data
from volo.data.label_maps import INDEX, LabelMaps, ShardWriter, read_shard, shard_path
from volo.data.token_labels import PictureFrame, resample_label_maps, stack_frames
from volo.data.transforms import PixelPipeline, squash_transform
from volo.distributed import World
from volo.inference.model_source import load
from volo.models.checkpoint import model_config_dict, save_checkpoint

RUN_SCRIPT = Path(__file__).with_name("run_annotate.py")
CLASSES = ["ant", "bee", "cat", "dog"]
ONE = World(0, 1, torch.device("cpu"))
# 3 shards of training pictures and 2 of held-out ones.
CONFIG = AnnotateConfig(part="all", top=3, batch_size=4, shard_size=16, num_workers=0)


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
def annotator(checkpoint: Path) -> OpenedAnnotator:
    return open_annotator(str(checkpoint))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz with 45 pictures and val.npz with 20."""
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
def whole(annotator: OpenedAnnotator, arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "store"
    annotate(annotator, dataclasses.replace(CONFIG, data=str(arrays)), out, world=ONE)
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


def test_compact_maps_and_flips(annotator: OpenedAnnotator, whole: Path, arrays: Path, tmp_path: Path):
    config = dataclasses.replace(CONFIG, data=str(arrays), encoding="compact", part="train")
    annotate(annotator, config, tmp_path / "compact", world=ONE)
    exact, compact = LabelMaps.open(whole), LabelMaps.open(tmp_path / "compact")
    scores, classes = compact.read_batch(compact.names)
    assert torch.equal(classes, exact.read_batch(compact.names)[1])
    assert (scores - exact.read_batch(compact.names)[0]).abs().max() < 0.0501 + 2e-3
    annotate(annotator, dataclasses.replace(config, flip=True, encoding="exact"), tmp_path / "flip", world=ONE)
    assert not torch.equal(LabelMaps.open(tmp_path / "flip").read_batch(compact.names)[1], classes)


def start(checkpoint: Path, data: Path, out: Path, *words: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
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


def test_killed_at_any_moment_it_ends_the_same(checkpoint: Path, arrays: Path, whole: Path, tmp_path: Path):
    """SIGKILL at random moments, again and again; each start goes on where the one before was stopped."""
    out, rng, before = tmp_path / "store", random.Random(0), 0

    def sizes() -> list[tuple[str, int]]:
        return [(path.name, path.stat().st_size) for path in sorted(out.glob("maps-*"))]

    for _ in range(3):
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
    child = start(checkpoint, arrays, out)
    assert child.wait(timeout=250) == 0, child.communicate()
    child.communicate()
    assert contents(out) == contents(whole)


def test_two_processes_draw_the_same_bytes(checkpoint: Path, arrays: Path, whole: Path, tmp_path: Path):
    child = start(checkpoint, arrays, tmp_path / "store", processes=2)
    assert child.wait(timeout=280) == 0, child.communicate()
    child.communicate()
    assert contents(tmp_path / "store") == contents(whole)


def test_a_finished_store_is_not_drawn_again(annotator: OpenedAnnotator, whole: Path, arrays: Path):
    config, before = dataclasses.replace(CONFIG, data=str(arrays)), contents(whole)
    report = annotate(annotator, config, whole, world=ONE, resume=True)
    assert (report["pictures"], report["drawn"]) == (65, 0)
    assert contents(whole) == before


@pytest.mark.parametrize("damage", ["flip", "missing", "index"])
def test_damaged_files_are_found_and_drawn_again(
    annotator: OpenedAnnotator, whole: Path, arrays: Path, tmp_path: Path, damage: str
):
    out, config = tmp_path / "store", dataclasses.replace(CONFIG, data=str(arrays))
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
            annotate(annotator, config, out, world=ONE, resume=True)
        annotate(annotator, config, out, world=ONE, overwrite=True)
    report = annotate(annotator, config, out, world=ONE, resume=True)
    assert report["drawn"] == (0 if damage == "index" else 16)
    assert contents(out) == contents(whole)


def test_another_annotator_or_other_pictures_are_refused(
    annotator: OpenedAnnotator, whole: Path, arrays: Path, tmp_path: Path
):
    out, config = tmp_path / "store", dataclasses.replace(CONFIG, data=str(arrays))
    shutil.copytree(whole, out)
    with pytest.raises(ValueError, match=r"holds label maps; --resume goes on with them, --overwrite"):
        annotate(annotator, config, out, world=ONE)
    for change, words in (({"top": 2}, "top was 3, now 2"), ({"flip": True}, "flip was False, now True")):
        with pytest.raises(ValueError, match=words):
            annotate(annotator, dataclasses.replace(config, **change), out, world=ONE, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "val"):
        with np.load(arrays / f"{name}.npz") as held:
            np.savez(other / f"{name}.npz", **{k: held[k][:-1] if k != "classes" else held[k] for k in held.files})
    with pytest.raises(ValueError, match="the pictures are not those"):
        annotate(annotator, dataclasses.replace(config, data=str(other)), out, world=ONE, resume=True)
    changed = OpenedAnnotator(**(vars(annotator) | {"described": annotator.described | {"weights_digest": "0"}}))
    with pytest.raises(ValueError, match="weights_digest was"):
        annotate(changed, config, out, world=ONE, resume=True)
    assert contents(out) == contents(whole)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(ValueError, match=r"other things \(holiday.jpg\)"):
        annotate(annotator, config, tmp_path / "photos", world=ONE, overwrite=True)
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
def test_settings_that_make_no_sense(annotator: OpenedAnnotator, arrays: Path, tmp_path: Path, change, words):
    with pytest.raises(ValueError, match=words):
        annotate(annotator, dataclasses.replace(CONFIG, data=str(arrays), **change), tmp_path / "s", world=ONE)
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
    assert "800 of 850 pictures" in shown
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
    annotator: OpenedAnnotator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Pictures that were deleted, renamed, damaged, exchanged or added after their maps were drawn."""
    data, out = tmp_path / "data", tmp_path / "store"
    names = write_pictures(data, 1050)
    config = AnnotateConfig(data=str(data), part="all", top=1, batch_size=64, shard_size=256, num_workers=0)
    annotate(annotator, config, out, world=ONE)
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


def test_pictures_that_vanish_meanwhile(annotator: OpenedAnnotator, tmp_path: Path):
    """All of them are named at the end; what is whole is kept, and the next start does the rest."""
    data, out = tmp_path / "data", tmp_path / "store"
    names = sorted(write_pictures(data, 64))
    config = dataclasses.replace(CONFIG, data=str(data), top=2)
    lost = [names[20], names[22], names[40]]
    saved = {name: (data / name).read_bytes() for name in lost}

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "annotating" and done == 4:
            for name in lost:
                (data / name).unlink(missing_ok=True)

    with pytest.raises(ValueError, match="3 of 64 pictures cannot be used") as raised:
        annotate(annotator, config, out, world=ONE, on_progress=on_progress)
    assert all(f"{name}: no such file" in str(raised.value) for name in lost)
    with pytest.raises(ValueError, match="of 64 pictures cannot be used") as raised:
        annotate(annotator, config, out, world=ONE, resume=True)
    assert all(f"{name}: gone since the annotation began" in str(raised.value) for name in lost)
    for name, content in saved.items():
        (data / name).write_bytes(content)
    report = annotate(annotator, config, out, world=ONE, resume=True)
    assert report["pictures"] == 64 and report["drawn"] < 40
    annotate(annotator, config, tmp_path / "again", world=ONE)
    assert contents(out) == contents(tmp_path / "again")


def test_pictures_that_vanish_may_be_left_out(annotator: OpenedAnnotator, tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "store"
    names = sorted(write_pictures(data, 64))
    config = dataclasses.replace(CONFIG, data=str(data), top=2, on_bad_image="skip")
    lost: list[str] = []

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "annotating" and not lost:
            lost.append(next(name for name in names[30:] if (data / name).exists()))
            (data / lost[-1]).unlink()

    report = annotate(annotator, config, out, world=ONE, on_progress=on_progress)
    assert lost and report["pictures"] == 64 - len(lost)
    assert report["skipped"] == dict.fromkeys(lost, "no such file or directory")


# Maps of the original tool


def write_original(folder: Path, names: list[str], num_classes: int = 4, dtype: torch.dtype = torch.float16) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in names:
        scores, classes = torch.randn(num_classes, 3, 3, generator=generator).topk(2, dim=0)
        path = (folder / name).with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([scores, classes.float()]).to(dtype), path)


def test_original_maps_are_imported(tmp_path: Path):
    data, folder = tmp_path / "data", tmp_path / "original"
    names = write_pictures(data, 40)
    write_original(folder, [*names, "cat/unused.png"])
    config = AnnotateConfig(data=str(data), part="all", batch_size=8, shard_size=16)
    report = import_original(folder, config, tmp_path / "store")
    assert (report["pictures"], report["unused"]) == (40, ["cat/unused.pt"])
    maps = LabelMaps.open(tmp_path / "store")
    for name in names:
        original = torch.load((folder / name).with_suffix(".pt"), weights_only=True)
        assert torch.equal(maps[name][0], original[0]) and torch.equal(maps[name][1], original[1].long())
    assert check_store(tmp_path / "store", str(data)) == []
    (folder / names[3]).with_suffix(".pt").unlink()
    torch.save(torch.zeros(3), (folder / names[5]).with_suffix(".pt"))
    with pytest.raises(ValueError, match="2 of 40") as raised:
        import_original(folder, config, tmp_path / "again")
    assert names[3] in str(raised.value) and "[2, top, h, w]" in str(raised.value)
    skipping = dataclasses.replace(config, on_bad_image="skip")
    assert set(import_original(folder, skipping, tmp_path / "again", resume=True)["skipped"]) == {names[3], names[5]}


def test_original_maps_are_of_the_centre_square(tmp_path: Path):
    """A map whose logits are the place it shows: read back for the whole picture, they are where they were."""
    data, folder = tmp_path / "data", tmp_path / "original"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (400, 300)).save(data / name / f"{i}.png")
            place = (50 + (torch.arange(6) + 0.5) * 50) / 400  # of the middle 300 columns
            scores = torch.stack([place.expand(6, 6), torch.zeros(6, 6)])
            classes = torch.stack([torch.zeros(6, 6), torch.ones(6, 6)])
            torch.save(torch.stack([scores, classes]), folder / name / f"{i}.pt")
    config = AnnotateConfig(data=str(data), part="all")
    import_original(folder, config, tmp_path / "store")
    maps = LabelMaps.open(tmp_path / "store")
    assert maps.annotator["crop"] == 1.0 and maps.box(300, 400) == pytest.approx((0, 0.125, 1, 0.875))
    scores, classes = maps.read_batch(["cat/0.png"])
    frames, boxes = stack_frames([PictureFrame.whole(300, 400)]), torch.tensor([maps.box(300, 400)])
    read = resample_label_maps(scores, classes, frames, (8, 8), 2, boxes).view(8, 8, 2)[4, :, 0]
    torch.testing.assert_close(read[2:6], (torch.arange(8)[2:6] + 0.5) / 8, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match=r"crop was 1\.0, now squash"):
        import_original(folder, config, tmp_path / "store", crop="squash", resume=True)
    command = ["annotate", "--import-original", str(folder), "--data", str(data), "--part", "all", "--quiet"]
    for words, box in ((["--crop", "squash"], (0, 0, 1, 1)), (["--crop", "0.5"], (0.25, 0.3125, 0.75, 0.6875))):
        assert main([*command, "--out", str(tmp_path / words[1]), *words]) == 0
        assert LabelMaps.open(tmp_path / words[1]).box(300, 400) == pytest.approx(box)


def test_one_process_a_store(annotator: OpenedAnnotator, arrays: Path, tmp_path: Path):
    with FolderLock(tmp_path / "store", "a test"), pytest.raises(ValueError, match="is at work in"):
        annotate(annotator, dataclasses.replace(CONFIG, data=str(arrays)), tmp_path / "store", world=ONE)


def test_original_maps_whose_first_ones_are_damaged(tmp_path: Path):
    """They are named like any other, and may be left out."""
    data, folder = tmp_path / "data", tmp_path / "original"
    write_original(folder, write_pictures(data, 40))
    names = open_data(DataConfig(path=str(data))).train.names
    paths = [(folder / name).with_suffix(".pt") for name in names]
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    paths[1].write_bytes(b"<html>404</html>")
    torch.save(torch.full((2, 2, 3, 3), 1e30), paths[2])
    torch.save(torch.stack([torch.full((2, 3, 3), 1e30), torch.ones(2, 3, 3)]), paths[3])  # no encoding holds it
    config = AnnotateConfig(data=str(data), batch_size=8, shard_size=16)
    with pytest.raises(ValueError, match=f"4 of {len(names)}") as raised:
        import_original(folder, config, tmp_path / "store")
    assert all(name in str(raised.value) for name in names[:4])
    skipping = dataclasses.replace(config, on_bad_image="skip")
    report = import_original(folder, skipping, tmp_path / "store", resume=True)
    assert (report["pictures"], set(report["skipped"])) == (len(names) - 4, set(names[:4]))
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"none of the {len(names)} label maps") as raised:
        import_original(folder, skipping, tmp_path / "again")
    assert all(str(path) in str(raised.value) for path in paths)


def test_the_command_line(checkpoint: Path, arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "store"
    command = ["annotate", str(checkpoint), "--data", str(arrays), "--out", str(out), "--top", "2", "--device", "cpu"]
    assert main([*command, "--encoding", "compact", "--batch-size", "16"]) == 0
    shown = capsys.readouterr().out
    assert "45 label maps of 2 x 2 positions" in shown and "agrees with the labels on" in shown
    assert main(command) == 2
    assert "--resume goes on" in capsys.readouterr().err
    assert main(["annotate", "--check", str(out), "--data", str(arrays)]) == 0
    assert "every picture has its map" in capsys.readouterr().out
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
