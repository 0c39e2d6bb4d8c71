"""Runs of two real processes on a CPU, started by torchrun or as it starts them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from volo.config import Recipe
from volo.distributed import is_main_process, launched_by_torchrun
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter, StepReport


@pytest.fixture(scope="module")
def recipe_for(tiny, tmp_path_factory) -> Callable[..., Recipe]:
    """Fine-tuning in which nothing depends on how a batch is shared out: no draws in a micro batch, no statistics of one."""
    out = tmp_path_factory.mktemp("start") / "run"
    train(tiny({"schedule.epochs": 3, "augment.mix_token": 0.0}), out)
    shared = {
        "model.weights": str(out / "last.pt"),
        "train.batch_norm": "frozen",
        "model.drop_path_rate": 0.0,
        "augment.mix_token": 0.0,
        "augment.erase_prob": 0.0,
        "optim.name": "sgd",  # Adam's division by the gradient's own size would blow rounding up
        "optim.lr": 0.01,  # at 0.03 a ReLU that rounding tips over changes single weights by 1e-4
        "loss.token_weight": 0.5,  # without it the maximum over tokens is trained, and rounding decides where two nearly tie
    }
    return lambda **train_keys: tiny(shared | {f"train.{k}": v for k, v in train_keys.items()})


@pytest.fixture(scope="module")
def alone(recipe_for, tmp_path_factory) -> Path:
    """The run of one process that all others are held against."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(recipe_for(), out)
    return out


def steps_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def assert_same_up_to_rounding(out: Path, reference: Path) -> None:
    """Rounding may tip a ReLU over, which changes single weights by 3e-5 here, where they move by up to 0.4."""
    a, b = load_checkpoint(out / "last.pt"), load_checkpoint(reference / "last.pt")
    assert a["step"] == b["step"] == 26
    for part in ("model", "ema"):
        for name in b[part]:
            torch.testing.assert_close(
                a[part][name],
                b[part][name],
                rtol=1e-4,
                atol=1e-4,
                msg=lambda m, part=part, name=name: f"{part} {name}: {m}",
            )
    assert [line["step"] for line in steps_of(out)] == list(range(1, 27))
    for mine, theirs in zip(steps_of(out), steps_of(reference)):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
    assert a["metrics"]["count"] == b["metrics"]["count"]


def test_the_reference_learns(alone) -> None:
    losses = [line["loss"] for line in steps_of(alone)]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5]), losses


def test_two_processes_are_one_even_when_stopped_amid(recipe_for, tmp_path, alone, start_run) -> None:
    """SIGTERM to torchrun: both processes agree on the last step, save and leave; continued, they end where one would."""
    out = tmp_path / "run"
    child = start_run(recipe_for(accumulation=2), out, "--wait", processes=2, torchrun=True)
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and len(steps_of(out)) >= 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    printed, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    step = load_checkpoint(out / "last.pt")["step"]
    assert 5 <= step < 26, errors
    assert printed.count(f"interrupted {step}") == 2
    child = start_run(recipe_for(accumulation=2), out, "--resume", processes=2)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert_same_up_to_rounding(out, alone)


def test_sharded_and_replicated_weights_train_the_same(recipe_for, tmp_path, alone, start_run) -> None:
    """With what recipes set, two and two; the first is continued from a run of one process."""
    sharded = {"parallel": "fsdp", "channels_last": True}
    runs = [
        recipe_for(**sharded),
        recipe_for(**sharded, accumulation=2, eval_batch_size=1, eval_every=3),
        recipe_for(channels_last=True, accumulation=2),
        recipe_for(**sharded, amp="bf16"),
    ]
    with pytest.raises(ConnectionError):
        train(recipe_for(), tmp_path / "0", reporter=GivesUp())
    assert load_checkpoint(tmp_path / "0" / "last.pt")["step"] == 12
    child = start_run(runs, tmp_path, "--resume", processes=2)
    train(recipe_for(amp="bf16"), tmp_path / "bf16")
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    assert_same_up_to_rounding(tmp_path / "0", alone)
    assert_same_up_to_rounding(tmp_path / "1", alone)
    assert_same_up_to_rounding(tmp_path / "2", alone)
    sharded_bf16, alone_bf16 = (load_checkpoint(tmp_path / name / "last.pt") for name in ("3", "bf16"))
    for part in ("model", "ema"):
        for name, value in alone_bf16[part].items():
            torch.testing.assert_close(sharded_bf16[part][name], value, rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_sharded_and_compiled(recipe_for, tmp_path, alone, start_run) -> None:
    child = start_run(recipe_for(parallel="fsdp", compile=True, channels_last=True), tmp_path / "run", processes=2)
    _, errors = child.communicate(timeout=500)
    assert child.returncode == 0, errors
    assert_same_up_to_rounding(tmp_path / "run", alone)


def test_death_of_one_process_ends_all_and_the_run_continues(recipe_for, tmp_path, alone, start_run) -> None:
    """From sharded weights in two processes to whole ones in one."""
    out = tmp_path / "run"
    child = start_run(recipe_for(parallel="fsdp"), out, processes=2, torchrun=True, RANK_TO_KILL=1)
    child.communicate(timeout=120)
    assert child.returncode != 0
    assert load_checkpoint(out / "last.pt")["step"] == 12
    train(recipe_for(), out, resume=True)
    assert_same_up_to_rounding(out, alone)


class GivesUp(NullReporter):
    def on_step(self, report: StepReport) -> None:
        if report.step == 15:
            raise ConnectionError("the line is dead")


def test_only_the_first_process_needs_to_see_the_run_folder(recipe_for, tmp_path, alone, start_run) -> None:
    """As on machines without a common disk: the others are sent the checkpoint, and never start anew beside it."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with pytest.raises(ConnectionError):
        train(recipe_for(), out, reporter=GivesUp())
    assert load_checkpoint(out / "last.pt")["step"] == 12

    child = start_run(recipe_for(), out, "--resume", processes=2, OUT_OF_RANK_0=elsewhere)
    _, errors = child.communicate(timeout=120)
    assert child.returncode != 0
    assert "has the checkpoint of this run (last.pt), but the first process" in errors
    assert load_checkpoint(out / "last.pt")["step"] == 12

    child = start_run(recipe_for(), out, "--resume", processes=2, OUT_OF_RANK_1=elsewhere)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert_same_up_to_rounding(out, alone)
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    "outside", [{"RANK": "3"}, {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "7"}, {"RANK": "", "WORLD_SIZE": "many"}]
)
def test_some_of_torchruns_variables_are_no_torchrun(tiny, tmp_path, monkeypatch, outside) -> None:
    """As batch systems set them for purposes of their own: the run is alone, and the one that writes and reports."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in outside.items():
        monkeypatch.setenv(name, value)
    assert not launched_by_torchrun() and is_main_process()
    recipe = tiny({"schedule.epochs": 0.1, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0})
    train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "last.pt").is_file()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in {"MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launched_by_torchrun() and not is_main_process()
