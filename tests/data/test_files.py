"""Whole files under several writers; a folder for one process at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from volo.data.files import FolderLock, write_atomically

HOLD = """
import sys, time
from volo.data.files import FolderLock, write_atomically
def write(file):
    file.write(b"half")
    print("ready", flush=True)
    time.sleep(60)
with FolderLock(sys.argv[1], "training"):
    from pathlib import Path
    write_atomically(Path(sys.argv[1]) / "last.pt", write)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run and is in the middle of writing last.pt there."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def save_often(path: Path, value: int) -> None:
    for _ in range(30):
        write_atomically(path, lambda file: [file.write(bytes([value]) * 100_000) for _ in range(10)])


@pytest.mark.timeout(60)
def test_two_processes_write_the_same_file(tmp_path) -> None:
    path = tmp_path / "last.pt"
    start = multiprocessing.get_context("fork")
    writers = [start.Process(target=save_often, args=(path, value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    broken, seen = 0, set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            content = path.read_bytes()
            broken += len(content) != 1_000_000 or len(set(content)) != 1
            seen.add(content[0])
    assert broken == 0
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen == {1, 2}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_long_name_can_be_written(tmp_path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    write_atomically(path, lambda file: file.write(b"x"))
    assert path.read_bytes() == b"x"


def test_the_lock_names_who_has_it_and_goes_with_the_process(tmp_path, holder) -> None:
    folder = tmp_path / "run"
    with pytest.raises(
        ValueError, match=rf"pid {holder.pid} on {os.uname().nodename}, training.*choose another folder"
    ):
        FolderLock(folder, "training").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(list(folder.glob(".last.pt.*.tmp"))) == 1  # half a file, which nobody will finish
    with FolderLock(folder, "training"):
        assert [p.name for p in folder.iterdir()] == [FolderLock.NAME]
        with pytest.raises(ValueError, match="is at work in"):
            FolderLock(folder, "packing").__enter__()
        (folder / "kept").touch()
    assert [p.name for p in folder.iterdir()] == ["kept"]


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path) -> None:
    with FolderLock(tmp_path / "new", "training"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


@pytest.mark.timeout(30)
def test_forked_workers_do_not_keep_the_lock(tmp_path) -> None:
    """A worker that outlives its killed parent would otherwise keep the folder shut."""
    lock = FolderLock(tmp_path, "training").__enter__()
    start = multiprocessing.get_context("fork")
    is_up = start.Event()
    worker = start.Process(target=lambda: (is_up.set(), time.sleep(20)))
    worker.start()
    is_up.wait()
    try:
        assert lock._file is not None
        os.close(lock._file)  # as our death would
        lock._file = None
        with FolderLock(tmp_path, "training"):
            pass
    finally:
        worker.kill()
        worker.join()


def test_many_start_at_once_and_one_gets_it(tmp_path) -> None:
    """Also while others leave and take the file of the lock away."""
    script = """
import sys
from volo.data.files import FolderLock
from pathlib import Path
counter, got = Path(sys.argv[1], "counter"), 0
while got < 200:
    try:
        with FolderLock(sys.argv[1], "counting"):
            counter.write_text(str(int(counter.read_text()) + 1))
            got += 1
    except ValueError:
        pass
"""
    (tmp_path / "counter").write_text("0")
    words = [sys.executable, "-c", script, str(tmp_path)]
    children = [subprocess.Popen(words) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "600"
