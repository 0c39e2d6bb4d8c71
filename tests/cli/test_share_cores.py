"""How OpenMP's threads wait is settled before torch is loaded, and users have the last word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401 - as in a notebook

from volo.cli.main import WAITING

CHILD = """
import os, sys
from volo.cli.main import main
main(["info", "--json"])
"""


@pytest.mark.parametrize(
    ("given", "holds"),
    [
        ({}, {"GOMP_SPINCOUNT": "1500"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "100"}, {"GOMP_SPINCOUNT": "100"}),
        ({"KMP_BLOCKTIME": "1"}, {"KMP_BLOCKTIME": "1"}),
    ],
)
def test_the_command_line_lets_threads_spin_briefly(
    given: dict[str, str], holds: dict[str, str], tmp_path: Path
) -> None:
    env = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=env | given, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["openmp"] == holds


def test_a_process_that_has_loaded_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from volo.cli.main import share_cores

    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    share_cores()  # torch is here: too late, and other libraries of the process would be slowed
    assert not any(name in os.environ for name in WAITING)
