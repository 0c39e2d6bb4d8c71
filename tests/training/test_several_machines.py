"""Two hosts, each a network namespace with a name and an address of its own, train together through torchrun.

One of them is killed with all its processes in the middle; started again with --resume, the run ends with the weights of
one that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from volo.config import Recipe
from volo.models.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RUN_SCRIPT = Path(__file__).resolve().parents[1] / "run_recipe.py"
PORT = 29500
# Set where the machine is busy: everything takes longer.
PATIENCE = float(os.environ.get("VOLO_TEST_PATIENCE", "1"))


class Host:
    """A network namespace, with a folder that the other host does not use."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.names = Path("/etc/netns") / name / "hosts"
        self.child: subprocess.Popen[str] | None = None
        folder.mkdir()

    def torchrun(self, meeting_point: Host, recipe: Recipe, *flags: str) -> None:
        """What one types on each host, run there."""
        run = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        run += ["--rdzv-id", "test", "--rdzv-endpoint", f"{meeting_point.name}:{PORT}"]
        self.child = subprocess.Popen(
            [*self.shell(), sys.executable, *run, str(RUN_SCRIPT), json.dumps(recipe.to_dict()), "run", *flags],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith(("GLOO_", "NCCL_", "MASTER_"))}
            | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def shell(self) -> list[str]:
        """What goes before a command that is to run on this host.

        The name of the host is its own too: torchrun and gloo look their address up by it.
        """
        rename = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", sys.executable, "-c", rename, self.name]

    def processes(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """As if the plug were pulled: every process of the host, again until none has slipped through."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def finish(self) -> tuple[int, str]:
        assert self.child is not None
        printed, _ = self.child.communicate(timeout=300 * PATIENCE)
        return self.child.returncode, printed


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts on a line of their own. Skips, with the reason, where that is not to be had."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing (Debian: iproute2, util-linux)")
    names = [f"volo{os.getpid()}{letter}" for letter in "ab"]
    pair = Host(names[0], "192.0.2.1", tmp_path / "a"), Host(names[1], "192.0.2.2", tmp_path / "b")
    etc_netns = Path("/etc/netns")
    was_there = etc_netns.exists()
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for host in pair:
                ip("-n", host.name, "link", "set", "lo", "up")
                ip("-n", host.name, "link", "set", "eth0", "up")
                ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
                # `ip netns exec` lays this over /etc/hosts.
                host.names.parent.mkdir(parents=True)
                host.names.write_text("127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in pair))
                called = subprocess.run([*host.shell(), "uname", "-n"], capture_output=True, text=True)
                if called.stdout.strip() != host.name:
                    raise OSError(called.stderr.strip() or "a name of its own is refused")
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here ({error})")
        yield pair
    finally:
        for host in pair:
            if host.name in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout:
                host.kill()
                ip("netns", "del", host.name)
            shutil.rmtree(host.names.parent, ignore_errors=True)
            if host.child is not None:
                host.child.communicate()
        if not was_there and etc_netns.is_dir():
            etc_netns.rmdir()


def start(hosts: tuple[Host, Host], recipe: Recipe, *flags: str) -> None:
    for host in hosts:
        host.torchrun(hosts[0], recipe, *flags)


def complete(hosts: tuple[Host, Host], recipe: Recipe, *flags: str) -> dict[str, Any]:
    """Run to the end, and return the checkpoint, which lies on the first host alone."""
    start(hosts, recipe, *flags)
    for code, printed in [host.finish() for host in hosts]:
        assert code == 0, printed
        assert "completed 26" in printed
    assert not (hosts[1].folder / "run").exists()
    return load_checkpoint(hosts[0].folder / "run" / "last.pt")


def steps_of(out: Path) -> list[int]:
    if not (out / "metrics.jsonl").exists():
        return []
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry["step"] for entry in entries if entry["kind"] == "step"]


def assert_same_bits(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_a_host_that_dies_amid_a_run_costs_no_more_than_the_steps_since_the_checkpoint(hosts, tiny) -> None:
    recipe = tiny()
    undisturbed = complete(hosts, recipe)
    assert undisturbed["history"]["world_size"] == 2
    shutil.rmtree(hosts[0].folder / "run")
    out = hosts[0].folder / "run"

    # First a host among others, then the one where all meet and the run folder lies.
    for victim, survivor in ((hosts[1], hosts[0]), (hosts[0], hosts[1])):
        start(hosts, recipe, "--wait-late")
        deadline = time.monotonic() + 240 * PATIENCE
        while not (done := steps_of(out)) or done[-1] < 14:
            assert all(host.child.poll() is None for host in hosts), [host.finish() for host in hosts]
            assert time.monotonic() < deadline, "the run did not get under way"
            time.sleep(0.02)
        victim.kill()
        code, printed = survivor.finish()
        assert code != 0, printed  # it notices, and does not wait for ever
        victim.finish()
        # That of the last evaluation, or the last whole step where the survivor was still able to save it.
        assert load_checkpoint(out / "last.pt")["step"] >= 12

        continued = complete(hosts, recipe, "--resume")
        assert steps_of(out) == list(range(1, 27))
        for part in ("step", "model", "ema", "optimizer"):
            assert_same_bits(continued[part], undisturbed[part], part)
        shutil.rmtree(out)
