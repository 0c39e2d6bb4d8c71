"""What a training tells on a terminal."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import torch
from rich.console import Console

from volo.cli.progress import TrainReporter, show_result
from volo.config import Recipe
from volo.training.report import RunInfo, StepReport, TrainResult


def shown() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=300), text


def test_the_weights_a_run_starts_from_have_no_training_loss():
    """A probe is evaluated before the first step: "nan" there reads like a training that diverged."""
    console, text = shown()
    run = RunInfo(Recipe(), Path("x"), torch.device("cpu"), 1, 1, ("a", "b"), 8, 2, 1, 1, 0, "top1")
    with TrainReporter(console) as reporter:
        reporter.on_start(run)
        reporter.on_eval({"epoch": 0.0, "step": 0, "loss": 0.5, "top1": 0.5}, True)
        reporter.on_step(StepReport(1, 1.0, 0.25, 1e-3, None, 10.0, 1.0))
        reporter.on_eval({"epoch": 1.0, "step": 1, "loss": 0.5, "top1": 0.5}, True)
    first, second = text.getvalue().splitlines()[-2:]
    assert first.split()[:4] == ["0.0", "0", "-", "0.5000"] and second.split()[:4] == ["1.0", "1", "0.2500", "0.5000"]


def test_the_commands_to_go_on_with_can_be_pasted(tmp_path: Path):
    out = tmp_path / "my photos; 'new'"
    console, text = shown()
    show_result(console, TrainResult("completed", 0, out, 1, 1, ("a",), {}, {}, "top1", [], 1.0, 1.0))
    commands = text.getvalue().partition("next: ")[2].strip().split("   or   ")
    assert [shlex.split(command) for command in commands] == [
        ["volo", "predict", str(out), "PICTURES..."],
        ["volo", "evaluate", str(out)],
    ]
