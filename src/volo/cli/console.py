"""What a run looks like in a terminal, and in a log file: progress, figures, tables."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from volo.data.pack import Packed
from volo.inference.predictor import Prediction
from volo.training.report import NullReporter, RunInfo, StepReport, TrainResult

LIVE_SECONDS = 0.25
"""A terminal is redrawn no more often than this: drawing takes milliseconds that the training could use."""
LINE_SECONDS = 30.0
"""A log file gets a line no more often than this."""


FIGURES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "pixel_accuracy": "pixels",
    "mean_class_accuracy": "classes",
    "boundary_iou": "boundary",
    "ece": "ECE",
}
"""What the figures of an evaluation are called in a table, in this order; all are shares in 0..1."""


class Bar:
    """One line that is redrawn in a terminal, or a plain line once in a while anywhere else.

    Nothing runs beside the caller: it draws when it is told something. Use as a context manager.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._drawn = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    def show(self, what: str, done: int, total: int, figures: str = "") -> None:
        now = time.monotonic()
        if now - self._drawn < (LIVE_SECONDS if self.console.is_terminal else LINE_SECONDS):
            return
        self._drawn = now
        if not self.console.is_terminal:
            self.console.print(Text(f"{what}: {done:,} of {total:,}  {figures}".rstrip()))
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[figures]}", style="dim"),
                console=self.console,
                auto_refresh=False,
                transient=True,
                expand=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(what, figures=figures)
        self._progress.update(self._task, description=what, completed=done, total=total, figures=figures, refresh=True)

    def clear(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


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
        where = f"{run.device}, {run.world_size} processes" if run.world_size > 1 else str(run.device)
        self._say(
            Text.assemble(
                (name, "bold"),
                f" ({millions(run.num_parameters)} parameters) on {data.path or data.kind}: {run.num_train:,} training and "
                f"{run.num_val:,} held-out pictures of {len(run.classes)} classes\n"
                f"{run.total_steps:,} steps of {run.recipe.train.batch_size} pictures, {run.steps_per_epoch:,} an epoch; "
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
            f"{report.images_per_second:,.0f} pictures/s  {duration(left)} left",
        )

    def on_eval(self, metrics: dict[str, Any], is_best: bool) -> None:
        columns = [key for key in FIGURES if key in metrics]
        if not self._has_head:
            self._has_head = True
            head = "".join(f"{FIGURES[key]:>9}" for key in columns)
            self._say(Text(f"{'epoch':>7}{'step':>9}{'loss':>9}{'held out':>10}{head}{'time':>9}", style="dim"))
        loss = sum(self._since_eval) / len(self._since_eval) if self._since_eval else float("nan")
        self._since_eval.clear()
        figures = "".join(f"{metrics[k]:>9.4f}" if k == "ece" else f"{100 * metrics[k]:>7.2f} %" for k in columns)
        row = (
            f"{metrics['epoch']:>7.1f}{metrics['step']:>9,}{loss:>9.4f}{metrics['loss']:>10.4f}{figures}"
            f"{duration(time.monotonic() - self._started):>9}"
        )
        self._say(Text.assemble(row, (" best" if is_best else "", "bold green")))

    def on_message(self, text: str) -> None:
        self._say(Text(text, style="yellow"))

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def show_plan(console: Console, plan: dict[str, Any], title: str = "") -> None:
    """What a run will take (`volo.training.plan`), the annotator that comes first before it."""
    if "annotator" in plan:
        show_plan(console, plan["annotator"], "first, the annotator")
        title = "then, with its label maps"
    if title:
        console.print(Text(title, style="bold"))
    height, width = plan["img_size"]
    memory, seconds = plan["memory_bytes"], plan["seconds"]
    tried, micro_batch = plan["probed_micro_batch_size"], plan["micro_batch_size"]
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in memory.items() if size and name != "all")
    split = f" in micro batches of {plan['micro_batch_size']}" if plan["micro_batch_size"] < plan["batch_size"] else ""
    rows = [
        ("model", f"{plan['model']}, {millions(plan['num_parameters'])} parameters, pictures of {height} x {width}"),
        (
            "pictures",
            f"{plan['num_train']:,} for training, {plan['num_val']:,} held out, {plan['num_classes']} classes",
        ),
        (
            "steps",
            f"{plan['steps']:,} of {plan['batch_size']}{split}: {plan['epochs']:g} epochs of {plan['steps_per_epoch']:,} steps, "
            f"{plan['pictures']:,} pictures; {plan['evaluations']} evaluations",
        ),
        ("learning rate", f"{plan['peak_lr']:.3g} at its peak"),
        ("memory", f"about {megabytes(memory['all'])} on {plan['device']} ({parts})"),
    ]
    unknown = [name for name, size in memory.items() if size is None]
    if unknown:
        rows.append(("", f"and what could not be measured: {' and '.join(sorted(unknown))}"))
    if plan["peak_bytes"]:
        rows.append(("", f"{megabytes(plan['peak_bytes'])} at most while trying"))
    if plan["step_seconds"]:
        low, high = min(plan["step_seconds"]), max(plan["step_seconds"])
        rows += [
            (
                "time",
                f"about {duration(seconds['training'])} for the steps ({low:.3g} to {high:.3g} s each in {len(plan['step_seconds'])} tries, "
                f"{plan['pictures_per_second']:,.0f} pictures/s), {duration(seconds['evaluations'])} for evaluations",
            ),
            ("", _limit(plan)),
        ]
    else:
        rows.append(("time", "not measured: memory is too small even for a step with two pictures"))
    if 0 < tried < micro_batch:
        rows.append(("", f"activations and time are scaled up from {tried} pictures to {micro_batch} in a micro batch"))
    elif 0 < tried < plan["batch_size"] // plan["world_size"]:
        rows.append(("", "time is scaled up from one micro batch a step"))
    if "live_annotator" in plan:
        rows.append(("annotator", _live_annotator(plan["live_annotator"])))
    if "label_maps" in plan:
        maps = plan["label_maps"]
        grid = f" of {maps['grid'][0]} x {maps['grid'][1]}" if maps["grid"] else ""
        size = megabytes(maps["bytes"]) if maps["bytes"] else "size known when the annotator is"
        rows.append(("label maps", f"{size}{grid}, {'in' if maps['is_there'] else 'to be drawn in'} {maps['path']}"))
        if not maps["is_there"] and maps["seconds"] is None:
            rows.append(("", f"drawing them is not counted: {maps['not_counted']}"))
        elif not maps["is_there"]:
            rows.append(
                ("", f"about {duration(maps['seconds'])} to draw them ({maps['pictures_per_second']:,.3g} pictures/s)")
            )
    table = Table(show_header=False, box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table, highlight=False)
    if seconds["all"] is not None and ("annotator" in plan or seconds.get("label_maps")):
        console.print(f"{duration(seconds['all'])} in all", highlight=False)


def _limit(plan: dict[str, Any]) -> str:
    """Whether a plan's steps wait for their pictures."""
    data, workers = plan["data_seconds"], plan["num_workers"]
    if not workers:
        return f"pictures are made between the steps, {data:.3g} s of each"
    beside = f"{data:.3g} s for the pictures of a step, by {workers} processes beside it"
    return f"the pictures are the limit: {beside}" if plan["limit"] == "data" else f"the steps are the limit: {beside}"


def _live_annotator(annotator: dict[str, Any]) -> str:
    what = "of unknown size"
    if annotator["img_size"]:
        height, width = annotator["img_size"]
        what = f"{millions(annotator['num_parameters'])} parameters, pictures of {height} x {width}"
    if annotator["is_in_steps"]:
        return f"{what}; it looks on in the steps that were tried"
    if annotator["seconds_a_picture"] is None:
        return f"{what}; its time is not counted: {annotator['not_counted']}"
    return f"{what}; {annotator['seconds_a_picture']:.3g} s a picture on top of the steps that were tried"


def megabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count:,} bytes"


def show_result(console: Console, result: TrainResult, pictures: Sequence[Path]) -> None:
    """The end of a run: how good it is, where everything lies, what to do next."""
    best = result.best
    if best:
        more = [f"mean of classes {100 * best['mean_class_accuracy']:.2f} %"] if "mean_class_accuracy" in best else []
        more += [f"ECE {best['ece']:.4f}"] if "ece" in best else []
        console.print(
            Text.assemble(
                (f"best {FIGURES[result.score]} {100 * best[result.score]:.2f} %", "bold green"),
                f" at epoch {best['epoch']:g}" + (f" ({', '.join(more)})" if more else ""),
            ),
            soft_wrap=True,
        )
    speed = f", {result.images_per_second:,.0f} pictures/s in training" if result.images_per_second else ""
    console.print(f"{duration(result.seconds)} in all{speed}", highlight=False)
    weights = result.out / ("best.pt" if best else "last.pt")
    for path, what in [(weights, "the weights")] + [(p, p.stem) for p in pictures]:
        console.print(Text.assemble("  ", (str(path), "cyan"), f"  {what}"), soft_wrap=True)
    console.print(
        Text.assemble(
            "next: ",
            (f"volo {'segment' if result.score == 'miou' else 'predict'} {result.out} PICTURES...", "bold"),
            "   or   ",
            (f"volo evaluate {result.out}", "bold"),
        ),
        soft_wrap=True,
    )


def show_evaluation(
    console: Console, result: dict[str, Any], classes: Sequence[str], what: str, most: int = 60
) -> None:
    """Figures of an evaluation as tables; above `most` classes only the worst ones are listed."""
    columns = {"": result} | ({"ReaL labels": result["real"]} if "real" in result else {})
    console.print(Text(f"{result['count']:,} pictures, {what}", style="bold"), soft_wrap=True)
    figures = Table(show_header=len(columns) > 1, header_style="dim", box=None)
    figures.add_column()
    for name in columns:
        figures.add_column(name or "labels", justify="right")
    for key, label in (
        ("top1", "top-1"),
        ("top5", f"top-{min(5, len(classes))}"),
        ("mean_class_accuracy", "mean of classes"),
    ):
        figures.add_row(label, *(f"{100 * column[key]:.2f} %" for column in columns.values()))
    for key, label in (("ece", "calibration error (ECE)"), ("loss", "loss")):
        figures.add_row(label, *(f"{column[key]:.4f}" for column in columns.values()))
    if len(columns) > 1:
        figures.add_row("pictures with labels", *(f"{column['count']:,}" for column in columns.values()))
    console.print(figures, highlight=False)

    counts = [sum(row) for row in result["confusion"]]
    accuracies = result["per_class_accuracy"]
    seen = [i for i, accuracy in enumerate(accuracies) if accuracy is not None]
    shown = seen if len(seen) <= most else sorted(seen, key=lambda i: accuracies[i])[:20]
    title = (
        "accuracy by class"
        if len(seen) <= most
        else f"the 20 worst of {len(seen)} classes (all of them: --json or --out)"
    )
    console.print(Text(f"\n{title}", style="bold"))
    table = Table(header_style="dim", box=None, padding=(0, 1))
    table.add_column("class", max_width=40, no_wrap=True, overflow="ellipsis")
    table.add_column("right", justify="right")
    table.add_column("of", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("")
    for i in shown:
        share = accuracies[i]
        table.add_row(
            Text(classes[i]),
            f"{result['confusion'][i][i]:,}",
            f"{counts[i]:,}",
            f"{100 * share:.1f} %",
            Text("━" * round(20 * share), style="cyan"),
        )
    console.print(table, highlight=False)


def show_segmentation(console: Console, result: dict[str, Any], classes: Sequence[str], what: str) -> None:
    """Figures of an evaluation of pixels as tables."""
    console.print(Text(f"{result['count']:,} pictures, {what}", style="bold"), soft_wrap=True)
    figures = Table(show_header=False, box=None)
    figures.add_column()
    figures.add_column(justify="right")
    for key, label in (
        ("miou", "mean IoU"),
        ("pixel_accuracy", "pixels right"),
        ("mean_class_accuracy", "mean of classes"),
        ("boundary_iou", "boundary IoU"),
    ):
        if key in result:
            figures.add_row(label, f"{100 * result[key]:.2f} %")
    figures.add_row("loss", f"{result['loss']:.4f}")
    console.print(figures, highlight=False)

    total = sum(map(sum, result["confusion"]))
    console.print(Text("\nby class", style="bold"))
    table = Table(header_style="dim", box=None, padding=(0, 1))
    table.add_column("class", max_width=40, no_wrap=True, overflow="ellipsis")
    for name in ("IoU", "right", "boundary", "of pixels"):
        table.add_column(name, justify="right")
    table.add_column("")
    boundaries = result.get("per_class_boundary_iou", [None] * len(classes))
    for i, iou in enumerate(result["per_class_iou"]):
        if iou is None:
            continue
        shares = [iou, result["per_class_accuracy"][i], boundaries[i], sum(result["confusion"][i]) / total]
        cells = ("" if share is None else f"{100 * share:.1f} %" for share in shares)
        table.add_row(Text(classes[i]), *cells, Text("━" * round(20 * iou), style="cyan"))
    console.print(table, highlight=False)


def area_line(name: str, areas: Sequence[tuple[str, float]], name_width: int, most: int = 5) -> Text:
    """One picture of a table of areas: the classes with the largest shares, in the order given."""
    name = name if len(name) <= name_width else "…" + name[1 - name_width :]
    line = Text(f"{name:<{name_width}}  ")
    for rank, (label, share) in enumerate(areas[:most]):
        line.append(f"{label} {100 * share:.1f} %  ", style="bold" if rank == 0 else "dim")
    if len(areas) > most:
        line.append(f"and {len(areas) - most} more", style="dim")
    line.rstrip()
    return line


def show_annotation(console: Console, report: dict[str, Any]) -> None:
    """What `volo annotate` made: how many maps, how large, and how far the annotator agrees with the labels."""
    h, w = report["grid"]
    console.print(
        Text.assemble(
            (f"{report['pictures']:,} label maps", "bold green"),
            f" of {h} x {w} positions, the best {report['top']} of {report['num_classes']:,} classes, in {report['out']}",
        ),
        soft_wrap=True,
    )
    speed = f"; {report['drawn']:,} drawn now, {report['pictures_per_second']:,.0f} a second" if report["drawn"] else ""
    console.print(
        f"{report['bytes'] / 1e6:,.1f} MB, {report['bytes_per_picture']:,.0f} bytes a picture ({report['encoding']}){speed}",
        highlight=False,
        soft_wrap=True,
    )
    if report["agreement"]:
        top1, positions = (100 * report["agreement"][key] for key in ("top1", "positions"))
        console.print(
            f"the annotator agrees with the labels on {top1:.2f} % of the pictures, at {positions:.2f} % of the positions",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("agreement is unknown: the annotator has other classes than the data", style="yellow")
    if report["skipped"]:
        console.print(f"{len(report['skipped']):,} pictures have no map, since they cannot be decoded", style="yellow")


def prediction_line(prediction: Prediction, name_width: int, class_width: int) -> Text:
    """One picture of a table of predictions; the widths align it with the others."""
    name = prediction.name if len(prediction.name) <= name_width else "…" + prediction.name[1 - name_width :]
    line = Text(f"{name:<{name_width}}  ")
    if prediction.error:
        reason = prediction.error.removeprefix(f"{prediction.name}: ")
        return line.append(f"not read: {reason}", style="red")
    for rank, (label, probability) in enumerate(prediction.top):
        label = label if len(label) <= class_width else label[: class_width - 1] + "…"
        line.append(f"{label:<{class_width}} {100 * probability:5.1f} %  ", style="bold" if rank == 0 else "dim")
    line.rstrip()
    return line


def show_info(console: Console, facts: dict[str, Any]) -> None:
    """What `volo info` found out, as tables."""

    def table(title: str, *columns: str) -> Table:
        console.print(Text(title, style="bold"))
        made = Table(header_style="dim", box=None, show_header=bool(columns))
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i and columns[i] not in ("", "what", "depths") else "left")
        return made

    def show(made: Table) -> None:
        console.print(made, highlight=False)
        console.print()

    versions = table("versions")
    for name, version in facts["versions"].items():
        versions.add_row(name, version or Text("not installed", style="dim"))
    show(versions)
    devices = table("devices")
    for name, what in facts["devices"].items():
        devices.add_row(name, what)
    show(devices)
    for device, engines in facts["outlook_attention"].items():
        made = table(f"engines of outlook attention on {device}, the first that serves is taken")
        for name, why_not in engines.items():
            made.add_row(name, Text(f"no: {why_not}", style="yellow") if why_not else Text("serves", style="green"))
        show(made)
    if "models" in facts:
        made = table("models", "", "parameters", "pixels", "depths", "widths")
        for name, m in facts["models"].items():
            depths, widths = (", ".join(map(str, m[key])) for key in ("depths", "embed_dims"))
            made.add_row(name, f"{m['parameters']:,}", str(m["img_size"]), depths, widths)
        show(made)
        made = table(
            "published weights (ImageNet-1k, %)", "", "top-1", "ReaL", "V2", "crop original", "crop timm", "here"
        )
        for tag, w in facts["pretrained"].items():
            figures = (f"{w[key]:.2f}" for key in ("top1", "real", "v2", "crop_original", "crop_timm"))
            made.add_row(tag, *figures, "yes" if w["cached"] else "")
        show(made)
        console.print(Text("segmentation models", style="bold"))
        console.print(", ".join(facts["segmentation"]) + "\n", highlight=False)
        made = table("recipes", "", "what")
        for name, what in facts["recipes"].items():
            made.add_row(name, what)
        show(made)
    console.print(f"downloads are kept in {facts['cache']}", soft_wrap=True, highlight=False)


def show_packed(console: Console, packed: Packed) -> None:
    """What `volo pack` has made, and what to do with it."""
    before = f", {packed.num_done_before} of them were there before" if packed.num_done_before else ""
    console.print(
        f"{packed.num_train:,} training and {packed.num_val:,} held-out pictures of {len(packed.classes)} classes in "
        f"{len(packed.shards)} shards{before}: {packed.num_bytes / 1e6:,.1f} MB in {duration(packed.seconds)}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(Text.assemble("next: ", (f"volo train RECIPE --data {packed.out}", "bold")), soft_wrap=True)


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def duration(seconds: float) -> str:
    """H:MM:SS, without hours that are not there."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def show_benchmark(console: Console, result: dict[str, Any]) -> None:
    """The rows of a measurement as a table, under what was measured and where."""
    plain = {k: v for k, v in result.items() if k != "rows" and not isinstance(v, (dict, list))}
    console.print(", ".join(f"{k.replace('_', ' ')} {_figure(v)}" for k, v in plain.items()), highlight=False)
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    table = Table(header_style="dim", box=None)
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="right" if i else "left")
    for row in result["rows"]:
        table.add_row(*(_figure(row.get(column, "")) for column in columns))
    console.print(table, highlight=False)


def _figure(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(_figure(v) for v in value) if len(value) == 2 else ", ".join(map(_figure, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
