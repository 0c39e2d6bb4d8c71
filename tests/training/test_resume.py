"""Runs that are cut off, in every way a run can be, end with the very weights of a run that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from volo.data.decode import BadImageError
from volo.data.loader import EvalLoader, ShiftAndFlip
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter, StepReport


class StopAt(NullReporter):
    """Sends this process a signal after a step, or amid the evaluation after it."""

    def __init__(self, step: int, in_evaluation: bool = False) -> None:
        self.step, self.in_evaluation, self.now = step, in_evaluation, 0

    def on_step(self, report: StepReport) -> None:
        self.now = report.step
        if report.step == self.step and not self.in_evaluation:
            signal.raise_signal(signal.SIGINT)

    def on_progress(self, what: str, done: int, total: int) -> None:
        if what == "evaluating" and self.in_evaluation and self.now == self.step:
            signal.raise_signal(signal.SIGTERM)


def metrics_lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same_run(out: Path, reference: Path) -> None:
    """Bit for bit: weights, average, optimizer, best checkpoint, and the log with every step once."""
    for name in ("last.pt", "best.pt"):
        a, b = load_checkpoint(out / name), load_checkpoint(reference / name)
        for part in ("model", "ema"):
            if a[part] is None and b[part] is None:
                continue
            assert a[part].keys() == b[part].keys()
            assert [k for k in a[part] if not torch.equal(a[part][k], b[part][k])] == []
        assert (a["step"], a["best"], a["metrics"]) == (b["step"], b["best"], b["metrics"])
        if a["optimizer"] is not None:
            for i, state in a["optimizer"]["state"].items():
                for k, value in state.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][i][k]))
    assert metrics_lines(out) == metrics_lines(reference)


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    assert train(tiny(), out).status == "completed"
    return out


def wait_for_steps(child: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until the run has logged `count` steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert child.poll() is None, f"ended too early: {child.communicate()}"
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count('"kind": "step"') >= count:
            return
        time.sleep(0.005)
    raise AssertionError("no progress in two minutes")


@pytest.mark.parametrize("step", [1, 7, 12, 26])
def test_resume_after_ctrl_c_is_bit_for_bit(tiny, tmp_path, reference, step) -> None:
    result = train(tiny(), tmp_path / "run", reporter=StopAt(step))
    if step < 26:
        assert (result.status, result.signal, result.step) == ("interrupted", signal.SIGINT, step)
        assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == step
    result = train(tiny(), tmp_path / "run", resume=True)
    assert (result.status, result.step) == ("completed", 26)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize("step", [12, 26])
def test_signal_amid_an_evaluation(tiny, tmp_path, reference, step) -> None:
    result = train(tiny(), tmp_path / "run", reporter=StopAt(step, in_evaluation=True))
    assert (result.status, result.signal, result.step) == ("interrupted", signal.SIGTERM, step)
    train(tiny(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.amp": "bf16", "train.accumulation": 2},
        {"train.amp": "fp16", "train.grad_checkpointing": True},
        {"optim.name": "muon", "optim.layer_decay": 0.8},
        {"optim.name": "sgd", "optim.ema_decay": 0.0, "train.channels_last": True},
        {"augment.mix_token": 0.0, "augment.mixup": 0.8, "augment.cutmix": 1.0, "loss.token_weight": 0.5},
        {"augment.crop": "resized", "augment.rand_augment": "rand-m9-mstd0.5-inc1"},
    ],
    ids=lambda o: ",".join(str(v) for v in o.values()),
)
def test_resume_of_every_kind_of_run(tiny, tmp_path, overrides) -> None:
    short = {"schedule.epochs": 0.8, "schedule.warmup_epochs": 0.2, "schedule.cooldown_epochs": 0.0}
    recipe = tiny(overrides | short)
    train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "cut", reporter=StopAt(4))
    assert train(recipe, tmp_path / "cut", resume=True).step == 10
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "signal_number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_killed_process(tiny, tmp_path, reference, start_run, signal_number) -> None:
    """A real process, saving after every step so that a kill may well hit a save, with two workers; continued without."""
    out = tmp_path / "run"
    child = start_run(tiny({"train.checkpoint_minutes": 0.0, "data.num_workers": 2}), out)
    wait_for_steps(child, out, random.randint(1, 20))
    time.sleep(random.uniform(0, 0.05))
    child.send_signal(signal_number)
    printed, errors = child.communicate(timeout=60)
    if signal_number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        step = load_checkpoint(out / "last.pt")["step"] if (out / "last.pt").exists() else 0
    else:
        assert child.returncode == 128 + signal_number, errors
        step = load_checkpoint(out / "last.pt")["step"]
        assert printed.split() == ["interrupted", str(step)]
        assert sorted(p.name for p in out.glob("*.tmp")) == []
    assert step < 26
    assert train(tiny(), out, resume=True).status == "completed"
    assert_same_run(out, reference)


def test_second_signal_ends_the_run_at_once(tiny, tmp_path, start_run) -> None:
    child = start_run(tiny(), tmp_path / "run", "--slow")
    wait_for_steps(child, tmp_path / "run", 3)
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None  # the step is being finished
    # On a busy machine two signals may arrive as one: press again until it is over.
    for _ in range(60):
        child.send_signal(signal.SIGINT)
        try:
            _, errors = child.communicate(timeout=2)
            break
        except subprocess.TimeoutExpired:
            continue
    assert child.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors


@pytest.mark.slow
def test_many_kills(tiny, tmp_path, reference, start_run) -> None:
    """One run killed twenty times, by all signals, at random moments from start-up on, with changing numbers of workers."""
    out, kills, rng = tmp_path / "run", 0, random.Random(0)
    while True:
        workers = rng.choice([0, 1, 3])
        child = start_run(tiny({"train.checkpoint_minutes": 0.0, "data.num_workers": workers}), out, "--resume")
        try:
            child.communicate(timeout=rng.uniform(2.0, 6.0) if kills < 20 else 120)
            assert child.returncode == 0
            break
        except subprocess.TimeoutExpired:
            child.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            child.communicate(timeout=60)
            kills += 1
            if (out / "last.pt").exists():
                load_checkpoint(out / "last.pt")
    assert kills > 0
    assert_same_run(out, reference)


class FailAt:
    """The data of the call with this number cannot be had, the first time."""

    def __init__(self, monkeypatch, owner: type, number: int, fail: Callable[[], None]) -> None:
        self.calls, make = 0, owner.__call__ if owner is not EvalLoader else owner.__iter__

        def counted(loader, *arguments):
            self.calls += 1
            if self.calls == number:
                fail()
            return make(loader, *arguments)

        monkeypatch.setattr(owner, make.__name__, counted)


def fail_to_read() -> None:
    raise BadImageError("train/7.png", "Stale file handle")


@pytest.mark.parametrize(
    ("owner", "number", "step"),
    [(ShiftAndFlip, 19, 9), (ShiftAndFlip, 20, 9), (EvalLoader, 1, 12)],
    ids=["first micro batch", "second micro batch", "evaluation"],
)
def test_data_that_cannot_be_read_ends_the_run_with_a_checkpoint(
    tiny, tmp_path, monkeypatch, owner, number, step
) -> None:
    """Of the last whole step, statistics of BatchNorm included, which half a step has moved."""
    recipe = tiny({"train.accumulation": 2, "augment.erase_prob": 0.0})
    with monkeypatch.context() as patched:
        FailAt(patched, owner, number, fail_to_read)
        with pytest.raises(BadImageError, match=r"train/7\.png.*Stale") as raised:
            train(recipe, tmp_path / "cut")
    assert raised.value.__notes__ == [f"Step {step} is saved in {tmp_path / 'cut' / 'last.pt'}: go on with --resume"]
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == step
    train(recipe, tmp_path / "cut", resume=True)
    train(recipe, tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.timeout(60)
def test_a_signal_ends_a_wait_for_a_worker_that_hangs(tiny, tmp_path, monkeypatch, reference) -> None:
    with monkeypatch.context() as patched:
        FailAt(patched, ShiftAndFlip, 5, lambda: time.sleep(1000))

        class Later(NullReporter):
            def on_step(self, report: StepReport) -> None:
                if report.step == 4:
                    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

        start = time.monotonic()
        result = train(tiny({"data.num_workers": 1}), tmp_path / "run", reporter=Later())
    assert (result.status, result.signal, result.step) == ("interrupted", signal.SIGTERM, 4)
    assert time.monotonic() - start < 30
    train(tiny(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)


def test_resume_with_another_recipe_is_refused(tiny, tmp_path) -> None:
    train(tiny(), tmp_path / "run", reporter=StopAt(2))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.003 -> 0\.1; train\.batch_size: 128 -> 64"):
        train(tiny({"optim.lr": 0.1, "train.batch_size": 64}), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resume_with_other_data_is_refused(tiny, tmp_path) -> None:
    train(tiny(), tmp_path / "run", reporter=StopAt(2))
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    checkpoint["classes"][0] = "nought"
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match="other class names"):
        train(tiny(), tmp_path / "run", resume=True)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tiny, tmp_path, reference) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.toml").write_text("")
    (out / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    train(tiny(), out, resume=True)
    assert_same_run(out, reference)


def test_resume_of_a_finished_run_changes_nothing(tiny, tmp_path) -> None:
    first = train(tiny({"schedule.epochs": 0.5}), tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.*") if p.name != "summary.json"}
    again = train(tiny({"schedule.epochs": 0.5}), tmp_path / "run", resume=True)
    assert (again.status, again.step, again.best) == ("completed", first.step, first.best)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.*") if p.name != "summary.json"} == before


def test_folder_with_a_run_is_not_overwritten(tiny, tmp_path) -> None:
    short: Callable[[], Any] = lambda: tiny({"schedule.epochs": 0.5, "schedule.cooldown_epochs": 0.0})  # noqa: E731
    train(short(), tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        train(short(), tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    train(short(), tmp_path / "run", overwrite=True)
    assert [line["step"] for line in metrics_lines(tmp_path / "run") if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
