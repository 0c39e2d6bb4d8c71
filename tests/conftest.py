"""Fixtures every test may use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from volo.config import Recipe, recipe_from_dict

GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on data that is not in the repository are no part of a run without it."""
    if not SHARED.is_dir():
        without = [item for item in items if "shared" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


# A shell has what it starts in the background ignore Ctrl-C, and so would the processes started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from more threads, and parallel test processes fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of real images and more golden cases beside the checkout."""
    return SHARED


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers recorded from the original code; see the README there."""
    return GOLDEN


def draw_scene(seed: int, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [H, W, 3] of sky above ground with a red box in between, and its mask uint8 [H, W]: 0, 1, 2; one
    corner is void (255)."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    horizon = int(rng.integers(height // 3, 2 * height // 3))
    mask[horizon:] = 1
    top, left = int(rng.integers(4, height - 20)), int(rng.integers(4, width - 20))
    mask[top : top + 14, left : left + 14] = 2
    colours = np.array([[90, 140, 220], [70, 130, 60], [200, 40, 40]], np.int64)
    image = np.clip(colours[mask] + rng.integers(-25, 26, (height, width, 3)), 0, 255).astype(np.uint8)
    mask[-6:, -6:] = 255
    return image, mask


@pytest.fixture(scope="session")
def make_scenes() -> Callable[..., Path]:
    """make_scenes(folder, train=8, val=4) -> folder, with images/SPLIT/*.png, annotations/SPLIT/*.png and classes.csv."""

    def make(folder: Path, size: tuple[int, int] = (48, 64), **counts: int) -> Path:
        for split, count in (counts or {"train": 8, "val": 4}).items():
            for kind in ("images", "annotations"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image, mask = draw_scene(sum(map(ord, split)) + i, *size)
                Image.fromarray(image).save(folder / "images" / split / f"{i:02}.png")
                Image.fromarray(mask).save(folder / "annotations" / split / f"{i:02}.png")
        (folder / "classes.csv").write_text("index,name,r,g,b\n0,sky,70,130,180\n1,ground,90,60,30\n2,box,220,20,60\n")
        return folder

    return make


@pytest.fixture(scope="session")
def scenes(make_scenes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training and five held-out images of 48 x 64 pixels with masks of three classes; not to be changed."""
    return make_scenes(tmp_path_factory.mktemp("scenes"), train=10, val=5, test=3)


@pytest.fixture(scope="session")
def make_table() -> Callable[..., Path]:
    """make_table(folder, count=120) -> folder/labels.csv: images of 20 x 16 pixels whose brightness is the number in the
    column "age" (20 to 80) and whose colour is the class in "gender" and one of the labels in "tags"; "bright" is another."""

    def make(folder: Path, count: int = 120) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        rows = ["path,age,gender,tags"]
        for i in range(count):
            age, kind = rng.uniform(20, 80), int(rng.integers(3))
            pixels = np.full((16, 20, 3), age, np.float64)
            pixels[:, :, kind] += 100
            pixels += rng.normal(0, 8, pixels.shape)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
            tags = ";".join([("red", "green", "blue")[kind]] + ["bright"] * (age > 50))
            rows.append(f"{i:03}.png,{age:.3f},{'abc'[kind]},{tags}")
        (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return folder / "labels.csv"

    return make


# Runs that take a second: a VOLO of 26,000 parameters on the handwritten digits, one thread, 26 steps

RUN_SCRIPT = Path(__file__).with_name("run_recipe.py")
RANKS_SCRIPT = Path(__file__).with_name("ranks.py")


def tiny(overrides: dict[str, Any] | None = None) -> Recipe:
    values: dict[str, Any] = {
        "model": {
            "name": "volo_nano",
            "drop_path_rate": 0.1,
            "options": {"depths": [1, 1], "embed_dims": [16, 32], "num_heads": [1, 2], "stem_dim": 8, "patch_size": 4},
        },
        "data": {"kind": "digits", "img_size": 16, "num_workers": 0},
        "augment": {"crop": "pad", "pad": 2, "hflip": 0.0, "erase_prob": 0.2, "mix_token": 1.0},
        "optim": {"lr": 3e-3, "ema_decay": 0.99, "clip_grad": 1.0},
        "schedule": {"epochs": 2, "warmup_epochs": 0.5, "cooldown_epochs": 0.2},
        "train": {"batch_size": 128, "threads": 1, "tensorboard": False, "device": "cpu"},
    }
    for dotted, value in (overrides or {}).items():
        section, name = dotted.split(".", 1)
        values.setdefault(section, {})[name] = value
    return recipe_from_dict(values)


@pytest.fixture(scope="session", name="tiny")
def _tiny() -> Callable[..., Recipe]:
    """tiny({"optim.lr": 1.0}) -> the recipe with that changed."""
    return tiny


@pytest.fixture
def start_run() -> Callable[..., subprocess.Popen[str]]:
    """start_run(recipe, out, "--resume", processes=2, RANK_TO_KILL=1) -> the process (for several, the one that started them).

    A list of recipes is trained one after the other, in out/0, out/1, ... With torchrun=True torchrun itself starts several
    processes, which takes longer."""
    children: list[subprocess.Popen[str]] = []

    def start(
        recipe: Recipe | list[Recipe], out: Path, *flags: str, processes: int = 1, torchrun: bool = False, **env: Any
    ) -> subprocess.Popen[str]:
        launcher = [sys.executable]
        if torchrun:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        elif processes > 1:
            launcher += [str(RANKS_SCRIPT), str(processes)]
        child = subprocess.Popen(
            [*launcher, str(RUN_SCRIPT), json.dumps(recipe, default=Recipe.to_dict), str(out), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in env.items()},
            start_new_session=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
