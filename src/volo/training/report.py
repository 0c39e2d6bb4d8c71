"""What a training run tells: to a `Reporter` while it goes, to metrics.jsonl and TensorBoard for later."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from volo import __version__
from volo.config import Recipe
from volo.data.files import finite, write_json
from volo.training.run_folder import EVENTS


@dataclass(frozen=True)
class RunInfo:
    """What is about to be trained."""

    recipe: Recipe
    out: Path
    device: torch.device
    world_size: int
    num_parameters: int
    classes: tuple[str, ...]
    num_train: int
    num_val: int
    steps_per_epoch: int
    total_steps: int
    start_step: int
    """Above 0 when a run is continued."""
    score: str
    """The figure of an evaluation that decides which weights are the best."""


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step."""

    step: int
    """Counted from 1."""
    epoch: float
    loss: float
    """Mean over the global batch."""
    lr: float
    """Of groups without layer decay."""
    grad_norm: float | None
    """Before clipping; None when gradients are not clipped."""
    images_per_second: float
    """Over all processes, data included."""
    seconds: float
    """Since the start of the run, evaluations included, interruptions not."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    status: str
    """"completed" or "interrupted"."""
    signal: int
    """The signal that interrupted it, 0 for none."""
    out: Path
    step: int
    total_steps: int
    classes: tuple[str, ...]
    metrics: dict[str, Any]
    """Of the last evaluation: step, epoch and what the workload found, for a classifier top1, top5,
    mean_class_accuracy, ece, loss, per_class_accuracy, count."""
    best: dict[str, Any]
    """The same of the evaluation with the highest `score`: the weights in best.pt."""
    score: str
    """Name of the figure by which evaluations are compared, "top1" for a classifier."""
    confusion: list[list[int]]
    """Of the best evaluation, rows are the truth; empty if there was none."""
    seconds: float
    images_per_second: float
    """Mean over the steps of this process, 0 if there were none."""


class Reporter:
    """Who wants to know how it goes; the command line shows it. Called in the first process only; nothing happens here."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """A long task other than training ("checking images", "evaluating") has come to `done` of `total`."""

    def on_start(self, run: RunInfo) -> None: ...

    def on_step(self, report: StepReport) -> None: ...

    def on_eval(self, metrics: dict[str, Any], is_best: bool) -> None: ...

    def on_checkpoint(self, path: Path, step: int) -> None: ...

    def on_message(self, text: str) -> None: ...

    def on_end(self, result: TrainResult) -> None: ...


class NullReporter(Reporter):
    """Says nothing; a base for reporters that care about some of the events."""


class RunLog:
    """metrics.jsonl, and TensorBoard where it is installed."""

    def __init__(self, out: Path, keep_bytes: int, step: int, tensorboard: bool) -> None:
        # Lines after the checkpoint are of steps that will be taken once more.
        self._path = out / "metrics.jsonl"
        self._file = self._path.open("ab", buffering=0)
        self._file.truncate(min(keep_bytes, self._file.tell()))
        self._file.seek(0, os.SEEK_END)
        self._board = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(out / "tensorboard"), purge_step=step + 1 if step else None, filename_suffix=EVENTS
            )

    def write_step(self, report: StepReport) -> None:
        figures = {
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "images_per_second": round(report.images_per_second, 1),
        }
        self._write({"kind": "step", "step": report.step, "epoch": report.epoch, **figures, "seconds": report.seconds})
        self._plot("train", figures, report.step)

    def write_evaluation(self, metrics: dict[str, Any], seconds: float) -> None:
        figures = {k: v for k, v in metrics.items() if not isinstance(v, (list, dict))}
        self._write({"kind": "eval", **figures, "seconds": seconds})
        self._plot("val", {k: v for k, v in figures.items() if k not in ("step", "epoch", "count")}, metrics["step"])

    def _plot(self, part: str, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            if self._board is not None and finite(value) is not None:
                self._board.add_scalar(f"{part}/{name}", value, step)

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(finite({k: v for k, v in record.items() if v is not None})).encode() + b"\n")
        except OSError as error:
            advice = f"{error.strerror}. Checkpoints are whole: make room, then continue with --resume"
            raise OSError(error.errno, advice, str(self._path)) from error

    def sync(self) -> int:
        """Bring everything to the disk; the length of metrics.jsonl."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def write_summary(info: RunInfo, result: TrainResult) -> None:
    """summary.json: what came out, of what, by which versions."""
    import timm

    def figures(metrics: dict[str, Any]) -> dict[str, Any]:
        return {
            name: dict(zip(info.classes, value)) if name.startswith("per_class_") else value
            for name, value in metrics.items()
        }

    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "status": result.status,
        "step": result.step,
        "total_steps": result.total_steps,
        "epoch": round(result.step / info.steps_per_epoch, 4),
        "best": figures(result.best),
        "final": figures(result.metrics),
        "seconds": result.seconds,
        "images_per_second": round(result.images_per_second, 1),
        "model": info.recipe.model.name,
        "num_parameters": info.num_parameters,
        "num_classes": len(info.classes),
        "num_train": info.num_train,
        "num_val": info.num_val,
        "device": torch.cuda.get_device_name(info.device) if info.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "world_size": info.world_size,
        "versions": {
            "volo": __version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }
    write_json(result.out / "summary.json", summary)
