"""What can go wrong on the way to a file: a clear error, and nothing half written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import volo
from volo.cli.main import main
from volo.config import DataConfig
from volo.deploy.export import KINDS
from volo.inference.model_source import LoadedModel
from volo.models.factory import create_model

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    model = create_model("volo_nano", num_classes=4, img_size=16, **TINY).eval()
    return LoadedModel(model, "classify", tuple("abcd"), DataConfig(img_size=16), "a test")


@pytest.fixture(scope="module")
def saved(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return volo.save_pretrained(loaded, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk("size=64k") -> a file system of its own with these options of mount."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here, which takes root")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `volo export` says as it fails; a message of one line or two, not a traceback."""
    capsys.readouterr()
    status = main(["export", *arguments])
    said = capsys.readouterr().err
    assert status not in (0, None) and "Traceback" not in said and said.count("\n") < 8, said
    return re.sub(r"\s+", " ", said)


def damaged(path: Path, saved: Path, how: str) -> Path:
    content = bytearray((saved / "model.safetensors").read_bytes())
    if how == "cut off":
        content = content[: len(content) // 2]
    elif how == "header":
        content[3:40] = os.urandom(37)
    elif how == "empty":
        content = bytearray()
    elif how == "a page":
        content = bytearray(b"<!doctype html><title>404</title>")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("how", ["cut off", "header", "empty", "a page"])
def test_a_corrupt_checkpoint(how: str, ending: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = damaged(tmp_path / f"bad{ending}", saved, how)
    said = fails([str(bad), "--out", str(tmp_path / "out.onnx")], capsys)
    assert bad.name in said
    assert [path.name for path in tmp_path.iterdir()] == [bad.name]


def test_weights_that_are_not_finite(loaded: LoadedModel, tmp_path: Path):
    model = create_model("volo_nano", num_classes=4, img_size=16, **TINY).eval()
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the model itself gives values that are not finite .* damaged"):
        volo.export(model, tmp_path / "out.pt2", format="torch", img_size=16)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = fails([str(saved), "--format", "onxn", "--out", str(tmp_path / "x.onnx")], capsys)
    assert "'onxn'" in said and "onnx" in said and "openvino" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind, package", [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("openvino", "openvino"), ("html", "onnx")]
)
def test_a_missing_runtime(
    kind: str,
    package: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what cannot be imported
    said = fails([str(saved), "--format", kind, "--out", str(tmp_path / f"x{KINDS[kind].ending}")], capsys)
    assert f"needs {package}, which is not installed: pip install 'volo[deploy]'" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind, kilobytes", [("onnx", 64), ("torch", 64), ("openvino", 64), ("onnx", 4)])
def test_a_full_disk(
    kind: str,
    kilobytes: int,
    saved: Path,
    disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
):
    place = disk(f"size={kilobytes}k")
    said = fails([str(saved), "--format", kind, "--out", str(place / f"x{KINDS[kind].ending}")], capsys)
    assert os.strerror(errno.ENOSPC) in said and "No file was written" in said and str(place) in said
    assert list(place.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(saved: Path, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    place = disk("size=64k")
    (place / "x.onnx").write_bytes(b"the old one")
    said = fails([str(saved), "--overwrite", "--out", str(place / "x.onnx")], capsys)
    assert os.strerror(errno.ENOSPC) in said
    assert [path.name for path in place.iterdir()] == ["x.onnx"] and (place / "x.onnx").read_bytes() == b"the old one"


def test_a_limit_on_the_size_of_files(saved: Path, tmp_path: Path):
    """As `ulimit -f` sets it; in a process of its own, which keeps the limit."""
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from volo.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
sys.exit(main(["export", {str(saved)!r}, "--out", {str(tmp_path / "x.onnx")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr
    assert os.strerror(errno.EFBIG) in re.sub(r"\s+", " ", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [".", "new"])
def test_a_read_only_folder(folder: str, saved: Path, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    place = disk("ro")  # modes would not stop root
    said = fails([str(saved), "--out", str(place / folder / "x.onnx")], capsys)
    assert os.strerror(errno.EROFS) in said and str(place) in said and ".volo-export" not in said
    assert list(place.iterdir()) == []


def test_an_interrupted_export(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C in the middle leaves nothing, either."""

    class Interrupting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded.model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if list(tmp_path.glob(".volo-export-*/*")):
                raise KeyboardInterrupt
            return self.model(images)

    with pytest.raises(KeyboardInterrupt):
        volo.export(Interrupting(), tmp_path / "x.pt2", format="torch", img_size=16)
    assert list(tmp_path.iterdir()) == []
