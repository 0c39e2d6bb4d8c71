"""A run whose annotator trains first: nothing of a run that it replaces comes back, and nobody else works in its folder."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from volo.cli.main import main
from volo.cli.progress import TrainReporter
from volo.config import Recipe, recipe_to_toml
from volo.data.files import FolderLock
from volo.models.checkpoint import load_checkpoint
from volo.training.pipeline import annotator_recipe, train
from volo.training.report import NullReporter

SHORT = {"schedule.epochs": 0.5, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}


class StopsTheAnnotator(NullReporter):
    """A signal after two steps of it; `was_locked`: whether another one could have worked in the run's folder."""

    def on_start(self, run) -> None:
        self.out = run.out

    def on_step(self, report) -> None:
        if self.out.name == "annotator" and report.step == 2:
            try:
                with FolderLock(self.out.parent, "a test"):
                    self.was_locked = False
            except ValueError:
                self.was_locked = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def recipe(tiny, tmp_path: Path) -> Recipe:
    (tmp_path / "its.toml").write_text(recipe_to_toml(tiny(SHORT | {"loss.token_weight": 0.5})))
    changes = SHORT | {"annotator.recipe": str(tmp_path / "its.toml"), "data.splits": "none"}
    return dataclasses.replace(tiny(changes), task="token_label")


def test_a_replaced_run_does_not_come_back(recipe: Recipe, tmp_path: Path) -> None:
    """Replaced by one with another annotator, and stopped while that trains: what goes on is the new run."""
    out, its = tmp_path / "run", tmp_path / "its.toml"
    assert train(recipe, out).status == "completed"
    old = load_checkpoint(out / "last.pt")["model"]
    its.write_text(its.read_text().replace("\nseed = 0", "\nseed = 1"))
    reporter = StopsTheAnnotator()
    stopped = train(recipe, out, overwrite=True, reporter=reporter)
    assert (stopped.status, stopped.out) == ("interrupted", out / "annotator")
    assert not (out / "last.pt").exists()
    assert train(recipe, out, resume=True).status == "completed"
    new = load_checkpoint(out / "last.pt")["model"]
    assert not torch.equal(new["aux_head.weight"], old["aux_head.weight"])


def test_the_folder_is_locked_while_the_annotator_trains(recipe: Recipe, tmp_path: Path) -> None:
    reporter = StopsTheAnnotator()
    assert train(recipe, tmp_path / "run", reporter=reporter).status == "interrupted"
    assert reporter.was_locked
    assert not (tmp_path / "run" / FolderLock.NAME).exists()


def test_the_annotator_sees_the_same_split(recipe: Recipe) -> None:
    assert annotator_recipe(recipe).data.splits == "none"


def told_to_go_on(said: str) -> list[str]:
    return shlex.split(re.split(r"(?:go on|continue) with: ", said)[1].splitlines()[0])


def test_the_command_that_goes_on_works_while_the_annotator_trains(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has no folder of its own by then: `volo train FOLDER --resume` would find nothing there."""
    (tmp_path / "my recipe.toml").write_text(recipe_to_toml(recipe))
    out = tmp_path / "run"
    with monkeypatch.context() as changed:
        changed.setattr(TrainReporter, "on_start", StopsTheAnnotator.on_start)
        changed.setattr(TrainReporter, "on_step", StopsTheAnnotator.on_step)
        command = ["train", str(tmp_path / "my recipe.toml"), "--out", str(out), "--overwrite"]
        assert main(command) == 128 + signal.SIGINT
    program, *words = told_to_go_on(capsys.readouterr().err)
    assert program == "volo" and "--overwrite" not in words
    assert main([*words, "--quiet"]) == 0
    assert load_checkpoint(out / "last.pt")["step"] > 0


def test_the_command_that_goes_on_works_before_the_run_has_begun(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "its.toml").write_text(recipe_to_toml(tiny(SHORT)))

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr("volo.training.pipeline.fit_into_time", stop)
        assert main(["train", str(tmp_path / "its.toml"), "--out", str(tmp_path / "a run")]) == 128 + signal.SIGINT
    _, *words = told_to_go_on(capsys.readouterr().err)
    assert main([*words, "--quiet"]) == 0
    assert load_checkpoint(tmp_path / "a run" / "last.pt")["step"] > 0


def test_the_command_that_goes_on_does_not_resume_the_run_that_was_to_be_replaced(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "its.toml").write_text(recipe_to_toml(tiny(SHORT)))
    command = ["train", str(tmp_path / "its.toml"), "--out", str(tmp_path / "run")]
    assert main([*command, "--quiet"]) == 0

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    again = [*command, "--overwrite", "--train.seed", "7"]
    with monkeypatch.context() as changed:
        changed.setattr("volo.training.pipeline.fit_into_time", stop)
        assert main(again) == 128 + signal.SIGINT
    assert told_to_go_on(capsys.readouterr().err) == ["volo", *again]


def test_a_schedule_that_contradicts_itself_is_refused_before_images_are_read(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "its.toml").write_text(recipe_to_toml(tiny(SHORT)))
    options = ["--data", str(tmp_path / "gone"), "--schedule.epochs", "1", "--schedule.warmup_epochs", "2"]
    assert main(["train", str(tmp_path / "its.toml"), "--out", str(tmp_path / "run"), *options]) == 2
    assert "warmup_epochs=2" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_not_taken_for_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, why in ((tmp_path, "holds no run"), (tmp_path / "gone", "is not there")):
        assert main(["train", str(folder), "--resume"]) == 2
        told = capsys.readouterr().err
        assert why in told and "imagenet" not in told
