"""A training as it goes: a bar, a row of figures for every evaluation, and how it ended."""

from __future__ import annotations

import shlex
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.text import Text

from volo.cli.console import Bar, duration, millions
from volo.training.report import NullReporter, RunInfo, StepReport, TrainResult

FIGURES = {
    "score": "score",
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "pixel_accuracy": "pixels",
    "mean_class_accuracy": "classes",
    "boundary_iou": "boundary",
    "map": "mAP",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "r2": "R²",
    "mae": "MAE",
    "rmse": "RMSE",
    "ece": "ECE",
}
"""What the figures of an evaluation are called in a table, in this order."""

PLAIN = frozenset(("score", "r2", "mae", "rmse", "ece"))
"""Figures that are no shares in 0..1, or small ones."""


def figure_text(key: str, value: float) -> str:
    return f"{value:.4g}" if key in ("mae", "rmse") else f"{value:.4f}" if key in PLAIN else f"{100 * value:.2f} %"


class TrainReporter(NullReporter):
    """Shows a training run: a bar with speed and time left, and a row of figures for every evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Bar(console)
        self._losses: deque[float] = deque(maxlen=50)
        self._since_eval: list[float] = []
        self._has_head = False

    def __enter__(self) -> TrainReporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.clear()

    def on_progress(self, what: str, done: int, total: int) -> None:
        self.bar.show(what, done, total)
        if done >= total:
            self.bar.clear()

    def on_start(self, run: RunInfo) -> None:
        self.run = run
        self._started, self._first = time.monotonic(), run.start_step
        data, name = run.recipe.data, run.recipe.model.name
        of_classes = "" if run.recipe.task == "table" else f" of {len(run.classes)} classes"  # the notes say of what
        where = f"{run.device}, {run.world_size} processes" if run.world_size > 1 else str(run.device)
        self._say(
            Text.assemble(
                (name, "bold"),
                f" ({millions(run.num_parameters)} parameters) on {data.path or data.kind}: {run.num_train:,} training and "
                f"{run.num_val:,} held-out images{of_classes}\n"
                f"{run.total_steps:,} steps of {run.recipe.train.batch_size} images, {run.steps_per_epoch:,} an epoch; "
                f"{where}; everything goes to {run.out}",
            )
        )
        if run.start_step:
            self._say(Text(f"continued after step {run.start_step:,}", style="green"))

    def on_step(self, report: StepReport) -> None:
        self._losses.append(report.loss)
        self._since_eval.append(report.loss)
        run = self.run
        left = (time.monotonic() - self._started) / (report.step - self._first) * (run.total_steps - report.step)
        self.bar.show(
            f"epoch {report.epoch:.1f}/{round(run.total_steps / run.steps_per_epoch, 1):g}",
            report.step,
            run.total_steps,
            f"loss {sum(self._losses) / len(self._losses):.3f}  lr {report.lr:.1e}  "
            f"{report.images_per_second:,.0f} images/s  {duration(left)} left",
        )

    def on_eval(self, metrics: dict[str, Any], is_best: bool) -> None:
        columns = [key for key in FIGURES if key in metrics]
        if not self._has_head:
            self._has_head = True
            head = "".join(f"{FIGURES[key]:>9}" for key in columns)
            self._say(Text(f"{'epoch':>7}{'step':>9}{'loss':>9}{'held out':>10}{head}{'time':>9}", style="dim"))
        # None before the first step: what is evaluated there are the weights it starts from.
        loss = f"{sum(self._since_eval) / len(self._since_eval):.4f}" if self._since_eval else "-"
        self._since_eval.clear()
        figures = "".join(f"{figure_text(key, metrics[key]):>9}" for key in columns)
        row = (
            f"{metrics['epoch']:>7.1f}{metrics['step']:>9,}{loss:>9}{metrics['loss']:>10.4f}{figures}"
            f"{duration(time.monotonic() - self._started):>9}"
        )
        self._say(Text.assemble(row, (" best" if is_best else "", "bold green")))

    def on_message(self, text: str) -> None:
        self._say(Text(text, style="yellow"))

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def show_result(console: Console, result: TrainResult) -> None:
    """The end of a run: how good it is, where everything lies, what to do next."""
    best = result.best
    if best:
        more = [f"mean of classes {100 * best['mean_class_accuracy']:.2f} %"] if "mean_class_accuracy" in best else []
        more += [f"{FIGURES[key]} {figure_text(key, best[key])}" for key in ("f1_micro", "mae", "rmse") if key in best]
        more += [f"ECE {best['ece']:.4f}"] if "ece" in best else []
        console.print(
            Text.assemble(
                (f"best {FIGURES[result.score]} {figure_text(result.score, best[result.score])}", "bold green"),
                f" at epoch {best['epoch']:g}" + (f" ({', '.join(more)})" if more else ""),
            ),
            soft_wrap=True,
        )
    speed = f", {result.images_per_second:,.0f} images/s in training" if result.images_per_second else ""
    console.print(f"{duration(result.seconds)} in all{speed}", highlight=False)
    weights, out = result.out / ("best.pt" if best else "last.pt"), shlex.quote(str(result.out))
    console.print(Text.assemble("  ", (str(weights), "cyan"), "  the weights"), soft_wrap=True)
    console.print(
        Text.assemble(
            "next: ",
            (f"volo {'segment' if result.score == 'miou' else 'predict'} {out} PICTURES...", "bold"),
            "   or   ",
            (f"volo evaluate {out}", "bold"),
        ),
        soft_wrap=True,
    )
