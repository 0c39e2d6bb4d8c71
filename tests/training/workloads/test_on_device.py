"""Training with the images on the device: it learns, and goes on bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from volo.config import Recipe
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter, StepReport
from volo.training.workloads.on_device import on_device


class StopAt(NullReporter):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path, tiny: Callable[..., Recipe]) -> None:
    recipe = tiny({"augment.crop": "resized", "augment.color_jitter": 0.2, "augment.scale": [0.5, 1.0]})
    whole = train(recipe, tmp_path / "whole", workload=on_device)
    assert whole.status == "completed" and whole.best["top1"] > 0.3
    cut = train(recipe, tmp_path / "cut", workload=on_device, reporter=StopAt(15))
    assert cut.status == "interrupted" and 0 < cut.step < whole.step
    assert train(recipe, tmp_path / "cut", workload=on_device, resume=True).status == "completed"
    one, other = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_tasks_are_refused(tmp_path: Path, tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    with pytest.raises(ValueError, match="images on the device get resized crops"):
        train(recipe, tmp_path / "run", workload=on_device)
    with pytest.raises(ValueError, match="given: 'table'"):
        on_device(Recipe(task="table"), None, lambda done, total: None)  # type: ignore[arg-type]
