from __future__ import annotations

import errno
import os
import pickle
import resource
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import volo
from volo.config import Recipe
from volo.inference.model_source import load
from volo.models.checkpoint import load_checkpoint, model_config_dict, save_checkpoint

SMALL = {
    "depths": (1, 1),
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "stem_dim": 8,
    "patch_size": 4,
    "num_classes": 3,
}


def checkpoint_of(model: volo.VOLO, ema: volo.VOLO | None = None, **other) -> dict:
    return {
        "format": 1,
        "model": model.state_dict(),
        "ema": ema and ema.state_dict(),
        "optimizer": None,
        "scaler": None,
        "step": 7,
        "best": {},
        "recipe": Recipe().to_dict(),
        "model_config": model_config_dict(model),
        "classes": ["a", "b", "c"],
        "metrics": {"top1": 0.5},
        "volo_version": volo.__version__,
        "torch_version": str(torch.__version__),
    } | other


def test_model_comes_back_with_all_it_needs(tmp_path) -> None:
    torch.manual_seed(0)
    model, average = volo.create_model("volo_nano", **SMALL), volo.create_model("volo_nano", **SMALL)
    images = torch.randn(2, 3, 32, 32)
    model.train()(images)  # BatchNorm's statistics are part of it
    save_checkpoint(tmp_path / "last.pt", checkpoint_of(model, average))
    loaded = load(tmp_path / "last.pt")
    assert not loaded.model.training
    assert loaded.model.config == model.config
    assert asdict(loaded.recipe) == asdict(Recipe())
    assert (loaded.classes, loaded.step, loaded.metrics) == (("a", "b", "c"), 7, {"top1": 0.5})
    assert torch.equal(loaded.model(images), average.eval()(images))
    assert torch.equal(load(tmp_path / "last.pt", use_ema=False).model(images), model.eval()(images))


def test_model_without_an_average(tmp_path) -> None:
    model = volo.create_model("volo_nano", **SMALL).eval()
    save_checkpoint(tmp_path / "last.pt", checkpoint_of(model))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "last.pt").model(images), model(images))


def test_only_whole_files_are_ever_seen(tmp_path) -> None:
    """A reader that looks all the time while a file is replaced meets the old or the new one, nothing between."""
    path, stop, seen = tmp_path / "last.pt", threading.Event(), []
    common = {"format": 1, "model_config": {}}
    save_checkpoint(path, common | {"step": 0, "model": torch.full((50_000,), 0.0)})

    def read() -> None:
        while not stop.is_set():
            checkpoint = load_checkpoint(path)
            seen.append(checkpoint["step"])
            assert (checkpoint["model"] == checkpoint["step"]).all()

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 40):
        save_checkpoint(path, common | {"step": step, "model": torch.full((50_000,), float(step))})
    stop.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_a_save_that_fails_keeps_the_old_file(tmp_path) -> None:
    """A limit on the size of files cuts the write off, as a full disk does."""
    model = volo.create_model("volo_nano", **SMALL)
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of(model, step=1))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large.*old last\.pt is unchanged.*--resume") as raised:
            save_checkpoint(path, checkpoint_of(model, step=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_small_disk_runs_full(tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount here")
    try:
        weights = {"w": torch.randn(100_000)}  # 400 kB
        common = {"format": 1, "model_config": {}}
        save_checkpoint(disk / "last.pt", common | {"model": weights, "step": 1})
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(disk / "last.pt", common | {"model": weights, "step": 2})
        assert [p.name for p in disk.iterdir()] == ["last.pt"]
        checkpoint = load_checkpoint(disk / "last.pt")
        assert checkpoint["step"] == 1
        assert torch.equal(checkpoint["model"]["w"], weights["w"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit_is_reported_too(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as raised:
            save_checkpoint(tmp_path / "last.pt", {"format": 1, "model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_write_that_fails_leaves_nothing(tmp_path) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(tmp_path / "last.pt", {"format": 1, "weights": torch.zeros(1000), "model": lambda: None})
    assert list(tmp_path.iterdir()) == []


def test_truncated_file(tmp_path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of(volo.create_model("volo_nano", **SMALL)))
    whole = path.read_bytes()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"last\.pt"):
            load_checkpoint(path)


class Trap:
    """A pickle that creates a file when it is opened carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_code_in_a_file_is_not_run(tmp_path) -> None:
    torch.save({"format": 1, "model_config": {}, "model": Trap(tmp_path / "sprung")}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="run code"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"w": torch.zeros(1)}}, "not a checkpoint of volo"),
        (torch.zeros(3), "not a checkpoint of volo"),
        ({"format": 99, "model_config": {}, "volo_version": "9.0"}, "format 99, written by volo 9.0"),
    ],
)
def test_foreign_file(tmp_path, content, message) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "x.pt")


def test_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="last.pt and best.pt"):
        load_checkpoint(tmp_path / "x.pt")


def test_weights_that_do_not_fit(tmp_path) -> None:
    model = volo.create_model("volo_nano", **SMALL)
    broken = checkpoint_of(model)
    del broken["model"]["head.weight"]
    save_checkpoint(tmp_path / "x.pt", broken)
    with pytest.raises(ValueError, match=r"head\.weight"):
        load(tmp_path / "x.pt")


def test_kill_amid_a_save_leaves_the_old_file(tmp_path) -> None:
    """A process that does nothing but save is killed; what is on the disk is whole."""
    script = (
        "import sys, torch\nfrom volo.models.checkpoint import save_checkpoint\n"
        "for step in range(10**6):\n"
        "    save_checkpoint(sys.argv[1], {'format': 1, 'model_config': {}, 'step': step, 'model': torch.full((300_000,), float(step))})\n"
        "    print(step, flush=True)\n"
    )
    path = tmp_path / "last.pt"
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    printed = [int(child.stdout.readline()) for _ in range(5)]
    child.kill()
    printed += [int(line) for line in child.stdout.read().splitlines()]
    child.wait()
    checkpoint = load_checkpoint(path)
    assert checkpoint["step"] in (printed[-1], printed[-1] + 1)
    assert (checkpoint["model"] == checkpoint["step"]).all()
