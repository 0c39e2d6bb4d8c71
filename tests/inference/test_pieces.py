"""Batches divided among threads: the same answers in the same order, and no session that nobody needs."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import volo
from volo.inference.exported import ExportedModel, open_exported
from volo.inference.pieces import MOST, InPieces
from volo.inference.runtimes import Run


class Runtime:
    """Doubles its input, and remembers who asked for what."""

    def __init__(self, can_open: bool = True) -> None:
        self.opened: list[bool] = []
        self.seen: list[tuple[bool, int, int]] = []
        self.can_open = can_open

    def session(self, alone: bool) -> Run:
        def run(x: np.ndarray) -> list[np.ndarray]:
            self.seen.append((alone, len(x), threading.get_ident()))
            return [2 * x, x.sum(axis=1)]

        return run

    def open(self, alone: bool) -> Run | None:
        if not self.can_open:
            return None
        self.opened.append(alone)
        return self.session(alone)


def numbers(count: int) -> np.ndarray:
    return np.arange(3.0 * count).reshape(count, 3)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33])
def test_the_same_in_the_same_order(threads: int, count: int) -> None:
    runtime = Runtime()
    outputs = InPieces(runtime.session(False), runtime.open, threads)(numbers(count))
    assert [output.tolist() for output in outputs] == [(2 * numbers(count)).tolist(), numbers(count).sum(1).tolist()]
    if count >= threads > 1:
        assert all(alone and size <= MOST for alone, size, _ in runtime.seen)
        assert len(runtime.seen) >= min(threads, count) - 1
        assert threading.get_ident() not in {thread for *_, thread in runtime.seen}
    else:
        assert [(alone, size) for alone, size, _ in runtime.seen] == [(False, count)]


def test_sessions_are_opened_when_they_are_needed() -> None:
    runtime = Runtime()
    run = InPieces(runtime.session(False), runtime.open, 2)
    run(numbers(8))
    run(numbers(8))
    assert runtime.opened == [True]
    run(numbers(1))  # what is left over of many
    run(numbers(8))
    run(numbers(1))
    assert runtime.opened == [True], "the first one was dropped unused, and one image does not bring it back"
    run(numbers(1))
    run(numbers(1))
    assert runtime.opened == [True, False]
    assert runtime.seen[-1][0] is False
    for count in (8, 1, 8, 1, 1):
        run(numbers(count))
    assert runtime.opened == [True, False], "both stay"


def test_what_is_in_use_stays() -> None:
    runtime = Runtime()
    run = InPieces(runtime.session(False), runtime.open, 2)
    for count in (1, 8, 1, 1, 8):
        run(numbers(count))
    assert runtime.opened == [True]
    assert [alone for alone, *_ in runtime.seen] == [False, True, True, False, False, True, True]


def test_without_another_session_the_one_at_hand_does_all() -> None:
    runtime = Runtime(can_open=False)
    run = InPieces(runtime.session(False), runtime.open, 2)
    assert run(numbers(8))[0].tolist() == (2 * numbers(8)).tolist()
    assert [(alone, size) for alone, size, _ in runtime.seen] == [(False, 8)]


# ---- real runtimes ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    sizes = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
    model = volo.create_model("volo_nano", num_classes=5, img_size=32, **sizes).eval()
    folder = tmp_path_factory.mktemp("files")
    made = {}
    for format, ending, dynamic in (("onnx", "onnx", "batch"), ("openvino", "xml", "batch"), ("onnx", "onnx", "none")):
        name = f"{format}_{dynamic}"
        made[name] = volo.export(model, folder / f"{name}.{ending}", format=format, dynamic=dynamic, img_size=32).path
    return made


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def answers(model: ExportedModel, images: torch.Tensor) -> torch.Tensor:
    found = model(images)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("name", ["onnx_batch", "openvino_batch", "onnx_none"])
def test_answers_do_not_depend_on_the_batch(name: str, files: dict[str, Path], threads: int) -> None:
    images = torch.randn(13, 3, 32, 32)
    one_by_one = torch.cat([answers(open_exported(files[name]), image[None]) for image in images])
    model = open_exported(files[name])
    for count in (13, 1, 4, 1, 1, 9, 2):
        torch.testing.assert_close(answers(model, images[:count]), one_by_one[:count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["onnx_batch", "openvino_batch"])
def test_several_callers_at_once(name: str, files: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = open_exported(files[name])
    finally:
        torch.set_num_threads(before)
    batches = [torch.randn(1 + i % 6, 3, 32, 32) for i in range(24)]
    expected = [answers(open_exported(files[name]), batch) for batch in batches[:6]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: answers(model, batch), batches))
    for mine, its in zip(found, expected):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert all(len(answer) == len(batch) for answer, batch in zip(found, batches))


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_a_file_in_the_place_of_the_first_does_not_answer_for_it(
    files: dict[str, Path], threads: int, tmp_path: Path
) -> None:
    """The second session is opened later than the first one: by then the file may be another."""
    path = Path(shutil.copy(files["onnx_batch"], tmp_path / "model.onnx"))
    images = torch.randn(8, 3, 32, 32)
    expected = answers(open_exported(path), images)
    opened = open_exported(path)
    torch.manual_seed(1)
    sizes = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
    other = volo.create_model("volo_nano", num_classes=5, img_size=32, **sizes).eval()
    volo.export(other, tmp_path / "other.onnx", img_size=32).path.replace(path)
    torch.testing.assert_close(answers(opened, images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers(open_exported(path), images), expected, rtol=1e-2)
    gone = open_exported(path)
    path.unlink()
    assert answers(gone, images).shape == expected.shape
