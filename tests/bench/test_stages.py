"""Stages in processes of their own: what becomes of the others, and of the files, when one goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from volo.bench import stages
from volo.bench.stages import Stage, run_stages

HERE = Path(__file__).parent
SRC = Path(stages.__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SRC), str(HERE)]))


def stage(name: str, seconds: float = 20.0, **values: Any) -> Stage:
    return Stage(name, f"the stage that {name}", f"faulty_stages:{name.partition('-')[0]}", seconds, **values)


def of_file(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def is_alive(pid: int) -> bool:
    """A zombie, whom nobody has asked for its exit code, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_what_a_stage_does_to_itself_costs_the_others_nothing(tmp_path: Path) -> None:
    told = []
    results = run_stages(
        [stage("raises"), stage("dies"), stage("leaves"), stage("works", arguments={"figure": float("nan")})],
        tmp_path,
        seconds=60,
        head={"machine": "this"},
        tell=lambda progress: told.append((progress.stage.name, progress.result is not None)),
    )
    assert {name: result["status"] for name, result in results.items()} == {
        "raises": "failed: ArithmeticError: what went wrong",
        "dies": "ended by SIGKILL",
        "leaves": "ended with exit code 3",
        "works": "completed",
    }
    for name, result in results.items():
        assert of_file(tmp_path, name) == result
        assert result["what"] == f"GPU: the stage that {name}" and result["machine"] == "this"
        assert told.count((name, True)) == 1
        assert len(result["rows"]) == (name != "leaves"), "what was found before the end is kept"
    assert "ArithmeticError" in results["raises"]["log"]
    assert results["works"]["rows"][0]["figure"] is None, "JSON has no NaN"
    assert 10 < results["works"]["rows"][0]["left"] <= 20
    assert "log" not in results["works"]


def test_a_stage_that_hangs_is_ended_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "GRACE", 1.0)
    pids = tmp_path / "pids"
    started = time.monotonic()
    results = run_stages([stage("hangs", 4.0, arguments={"pids": str(pids)}), stage("works")], tmp_path, seconds=60)
    assert results["hangs"]["status"] == "ended after its 4 seconds"
    assert 4.9 < results["hangs"]["seconds"] < 15 and time.monotonic() - started < 40
    assert len(results["hangs"]["rows"]) == 1
    assert results["works"]["status"] == "completed"
    assert not [pid for pid in map(int, pids.read_text().split()) if is_alive(pid)]


def test_a_stage_has_time_to_save_at_the_end_of_its_box(tmp_path: Path) -> None:
    results = run_stages([stage("saves_when_asked", 3.0)], tmp_path, seconds=60)
    assert results["saves_when_asked"]["saved"] and results["saves_when_asked"]["status"] == "completed"


def test_the_whole_time_is_kept_and_so_is_the_time_of_later_stages(tmp_path: Path) -> None:
    order = [
        stage("sleeps-1", 100, arguments={"seconds": 60}),
        stage("sleeps-2", 100, arguments={"seconds": 0.1}, least=4.0),
        stage("sleeps-3", 100, arguments={"seconds": 60}),
        stage("sleeps-4", 100, arguments={"seconds": 0.1}),
    ]
    started = time.monotonic()
    results = run_stages(order, tmp_path, seconds=7 + stages.GRACE)
    assert time.monotonic() - started < 7 + stages.GRACE
    assert [result["status"] for result in results.values()] == [
        "ended after its 3 seconds",
        "completed",
        results["sleeps-3"]["status"],
        "not begun: no time was left",
    ]
    assert results["sleeps-3"]["status"].startswith("ended after its")
    assert of_file(tmp_path, "sleeps-4")["status"] == "not begun: no time was left"


def test_only_what_is_not_timed_runs_together(tmp_path: Path) -> None:
    beside: dict[str, Any] = {"is_timed": False, "arguments": {"seconds": 1.0}}
    order = [stage("sleeps-1", **beside), stage("sleeps-2", **beside), stage("sleeps-3", arguments={"seconds": 0.1})]
    one, two, alone = run_stages(order, tmp_path, seconds=60).values()
    assert max(one["began"], two["began"]) < min(one["ended"], two["ended"])
    assert alone["began"] > max(one["ended"], two["ended"])


PARENT = """
import sys
from pathlib import Path
from volo.bench.stages import Stage, run_stages
folder, pids = Path(sys.argv[1]), sys.argv[2]
run_stages([Stage("works", "a", "faulty_stages:works", 20),
            Stage("hangs", "b", "faulty_stages:hangs", 60, arguments={"pids": pids}),
            Stage("later", "c", "faulty_stages:works", 20)], folder, seconds=100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_its_files_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    folder, pids = tmp_path / "out", tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, folder, pids], stderr=subprocess.DEVNULL)
    try:
        wait_for(pids.exists)
        stage_pid, deaf_pid = map(int, pids.read_text().split())
        assert is_alive(stage_pid) and is_alive(deaf_pid)
        parent.send_signal(number)
        parent.wait(30)
        wait_for(lambda: not is_alive(stage_pid), 5)
        if number == signal.SIGKILL:  # nobody is left who could end what the stage has started
            os.kill(deaf_pid, signal.SIGKILL)
        assert not is_alive(deaf_pid) or number == signal.SIGKILL
    finally:
        parent.kill()
    assert of_file(folder, "works")["status"] == "completed"
    assert of_file(folder, "hangs")["rows"] == [{"figure": 1.0}]
    assert of_file(folder, "hangs")["status"] == ("begun" if number == signal.SIGKILL else "interrupted")
    assert not (folder / "later.json").exists()


def test_a_folder_that_cannot_be_written_to_is_an_error_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file where a folder is needed"):
        run_stages([stage("works")], tmp_path / "file", seconds=60)
    with pytest.raises(ValueError, match="another process"):
        with stages.FolderLock(tmp_path, "measuring"):
            run_stages([stage("works")], tmp_path, seconds=60)
