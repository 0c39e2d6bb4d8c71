"""What counts in a folder, the same in training, prediction, evaluation and segmentation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from volo.config import DataConfig, SegmentConfig
from volo.data.images import open_data
from volo.data.masks import open_segmentation
from volo.inference.evaluate import open_labelled
from volo.inference.predictor import find_pictures

AROUND = (
    ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "__MACOSX/._0.png", "@eaDir/0.png/SYNOPHOTO_THUMB_M.png",
    "$RECYCLE.BIN/0.png", ".Trash-1000/files/0.png", "System Volume Information/0.png", "lost+found/0.png",
)  # fmt: skip


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """cat/ and dog/ with three images each; one of cat's is behind a link to a folder, and there is a circle."""
    for name in ("cat/0", "cat/1", "dog/0", "dog/1", "dog/2"):
        save(tmp_path / f"in/{name}.png")
    save(tmp_path / "elsewhere/2.png")
    (tmp_path / "in/cat/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/cat/circle").symlink_to(tmp_path / "in")
    (tmp_path / "in/cat/itself").symlink_to("itself")
    (tmp_path / "in/cat/itself").unlink()
    os.mkfifo(tmp_path / "in/dog/pipe.png")
    for name in AROUND:
        save(tmp_path / "in" / name)
        save(tmp_path / "in/cat" / name)
    return tmp_path / "in"


WANTED = ["cat/0.png", "cat/1.png", "cat/linked/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]


def test_training_prediction_and_evaluation_see_the_same(folders: Path) -> None:
    splits = open_data(DataConfig(path=str(folders), val_fraction=0.34))
    assert sorted([*splits.train.names, *splits.val.names]) == WANTED
    assert [path.relative_to(folders).as_posix() for path in find_pictures([str(folders)])] == WANTED
    assert list(open_labelled(folders, DataConfig(), ("cat", "dog")).source.names) == WANTED


def test_folders_by_wordnet_id_with_others_around(folders: Path) -> None:
    (folders / "cat").rename(folders / "n01")
    (folders / "dog").rename(folders / "n02")
    assert len(open_labelled(folders, DataConfig(), ("cat", "dog"), ("n01", "n02")).source) == 6


def test_images_with_masks_are_found_by_the_same_rules(make_scenes: Callable[..., Path], tmp_path: Path) -> None:
    root, more = make_scenes(tmp_path / "a", train=3, val=2), make_scenes(tmp_path / "b", train=2)
    for kind in ("images", "annotations"):
        (root / kind / "train/city").symlink_to(more / kind / "train")
        for name in AROUND:
            (root / kind / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / kind / "train/00.png", root / kind / "train" / name)
    names = list(open_segmentation(DataConfig(path=str(root)), SegmentConfig()).train.names)
    assert names == [f"images/train/{name}.png" for name in ("00", "01", "02", "city/00", "city/01")]


@pytest.mark.skipif(sys.platform != "linux", reason="user namespaces")
def test_a_folder_that_may_not_be_listed_is_named(folders: Path) -> None:
    """An administrator may list everything, so somebody else tries."""
    (folders / "cat/secret").mkdir()
    (folders / "cat/secret").chmod(0)
    who = ["unshare", "-U", "--map-user=12345", "--map-group=12345"] if os.getuid() == 0 else []
    script = (
        "import sys; from pathlib import Path; from volo.data.walk import images_below\n"
        "try: images_below(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([*who, sys.executable, "-c", script, folders], capture_output=True, text=True)
    (folders / "cat/secret").chmod(0o755)
    if who and "unshare" in done.stderr:
        pytest.skip("no user namespaces here")
    assert "cat/secret cannot be listed: permission denied" in done.stdout, done.stderr
