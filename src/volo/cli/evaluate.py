"""`volo evaluate`: how good a model is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from volo.cli.console import Bar, note, results
from volo.cli.options import OF_MODELS, ModelOptions, WindowOptions, load_model, open_device, run
from volo.cli.outputs import begins_with, claim, is_figure, optional
from volo.cli.progress import FIGURES as LABELS
from volo.cli.progress import figure_text
from volo.config import read_size

if TYPE_CHECKING:
    from volo.data.sources import ImageSource
    from volo.inference.wrong import WrongAnswer

FIGURES = {"confusion.png": "confusion matrix", "iou.png": "IoU of classes"}
MAX_SHEET = 48


@dataclass(frozen=True)
class EvaluateOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt), a checkpoint, published weights such as volo_d1.224, or a weight file of timm's or the original's."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Class folders, a folder with val/, shards, npz files or a table; the images held out from the training if left out."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="real.json")] = None
    """ReaL labels of ImageNet's validation images; scored beside the folders' own."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Images that cannot be decoded: stop and name them all, or leave them out."""
    json: bool = False
    """Print one JSON object instead of tables; the rest goes to standard error."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write evaluation.json and confusion.png there."""
    wrong: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of a classifier: list the N wrong answers it is surest of; with --out in wrong.csv, and as images in wrong.png."""
    overwrite: bool = False
    """Replace files of these names in --out that are no earlier evaluation."""
    split: str = ""
    """Of a segmentation model: which images of the data, for example test; those held out from the training if left out."""
    object_value: int | None = None
    """Of a segmentation model of two classes: value of the object in the masks, 1 or 255; as in those it learned from if left out."""
    seen: Annotated[WindowOptions, tyro.conf.arg(name="")] = field(default_factory=WindowOptions)
    trust: bool = False
    """Open a MODEL that holds native code, a package of AOTInductor; loading it runs that code."""
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def evaluate(options: EvaluateOptions) -> int:
    """Score a model on labelled images: top-1, top-5, mean class accuracy, calibration, every class, confusion.

    Models of task "table" on a table with the same columns: mAP and F1 of labels, MAE, RMSE and R2 of numbers.

    Segmentation models on images with masks: mean IoU, IoU and accuracy of every class, boundary IoU, confusion.

    ImageNet for published weights: a folder of WordNet-id folders (all 1000 or some), or of the folders 0 to 999 of
    ImageNet-V2.

    Examples:
      volo evaluate runs/photos                                          on the images held out from the training
      volo evaluate runs/photos --data other_photos --out report         report/confusion.png, report/evaluation.json
      volo evaluate runs/photos --wrong 40 --out report                  report/wrong.csv, report/wrong.png
      volo evaluate runs/cifar10 --flip                                  averaged with the mirror images
      volo evaluate volo_d1.224 --data imagenet/val --real real.json --amp bf16
      volo evaluate volo_d4.448 --data imagenetv2 --crop original
      volo evaluate runs/camvid_cpu --split test --out report
      volo evaluate runs/cityscapes_volo_d1 --window 512 1024 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --amp bf16
    """
    from volo.data.files import write_atomically
    from volo.inference.model_source import refuse_published
    from volo.inference.score import evaluate as score
    from volo.inference.wrong import to_csv
    from volo.training.settings import keep_freed_memory

    if options.wrong < 0:
        raise ValueError(f"--wrong is a number of images, 0 for none; given: {options.wrong}")
    if options.out is not None:
        _claim(options.out, options.overwrite, bool(options.wrong))
    if options.split or options.object_value is not None or options.seen != WindowOptions(flip=options.seen.flip):
        refuse_published(
            options.model, "--split, --object-value, --window, --stride and --scales are for segmentation models"
        )
    device = open_device(options.how.device, options.how.threads)
    loaded = load_model(options.model, options.how, device, trust=options.trust)
    if loaded.task != "segment":  # its windows and scales are of many sizes, and its memory is bounded
        keep_freed_memory()
    console = results(options.json)
    mistakes: list[tuple[ImageSource, list[WrongAnswer]]] = []
    with Bar(console) as bar:

        def left_out(bad: object) -> None:
            bar.clear()
            note(f"left out: {bad}")

        def understood(said: str) -> None:
            bar.clear()
            note(said)

        figures = score(
            loaded,
            options.data,
            real=options.real,
            split=options.split,
            window=read_size("--window", options.seen.window, least=0),
            stride=read_size("--stride", options.seen.stride, least=0),
            scales=options.seen.scales,
            flip=options.seen.flip,
            object_value=options.object_value,
            batch_size=options.how.batch_size,
            device=device,
            amp=options.how.amp,
            on_bad_image=options.on_bad_image,
            on_progress=bar.show,
            on_skipped=left_out,
            on_note=understood,
            wrong=options.wrong,
            on_wrong=lambda *given: mistakes.append(given),
        )
    result = {"command": "volo evaluate", **figures}
    # What is no text in a file name is written as JSON escapes it.
    report = json.dumps(result, ensure_ascii=False).encode(errors="backslashreplace")
    if options.json:
        print(report.decode())
    else:
        show = {"segment": show_segmentation, "table": show_table}.get(loaded.task, show_evaluation)
        how = [result[key] for key in ("data", "test") if key in result]
        show(console, result, loaded.classes, ", ".join([*how, f"by {loaded.origin}"]))
        for _, wrong in mistakes:
            show_wrong(console, wrong)
    if options.out is not None:
        files = [options.out / "evaluation.json"]
        write_atomically(files[0], lambda file: file.write(report))
        for source, wrong in mistakes:
            lines = "".join(to_csv(wrong)).encode(errors="backslashreplace")
            files.append(options.out / "wrong.csv")
            write_atomically(files[-1], lambda file, lines=lines: file.write(lines))  # type: ignore[misc]
            files += _draw_wrong(options.out / "wrong.png", source, wrong)
        files[1:1] = _draw(options.out, result, loaded)
        if not options.json:
            console.print(", ".join(map(str, files)), style="cyan", soft_wrap=True, markup=False, highlight=False)
    return 0


def _claim(folder: Path, overwrite: bool, wrong: bool) -> None:
    """The images of a folder without an evaluation are those of another command."""
    is_report = begins_with('{"command": "volo evaluate"')
    report = folder / "evaluation.json"
    claim(report, is_report, overwrite=overwrite)
    for name, title in FIGURES.items():
        claim(folder / name, lambda path, title=title: report.exists() and is_figure(title)(path), overwrite=overwrite)  # type: ignore[misc]
    if wrong:
        from volo.inference.wrong import HEADER

        claim(folder / "wrong.csv", begins_with(",".join(HEADER) + "\n"), overwrite=overwrite)
        claim(folder / "wrong.png", is_figure("wrong answers"), overwrite=overwrite)


def _draw(folder: Path, result: dict[str, Any], loaded: Any) -> list[Path]:
    is_segment = loaded.task == "segment"
    if not result["confusion"]:
        return []
    files = [folder / name for name in FIGURES][: 1 + is_segment]
    with optional(" and ".join(path.name for path in files)):
        from volo.explain.plots import class_bars, confusion_matrix

        confusion_matrix(result["confusion"], loaded.classes, files[0], "pixels" if is_segment else "images")
        if is_segment:
            boundary = result["per_class_boundary_iou"]
            class_bars(result["per_class_iou"], loaded.classes, loaded.colours, files[1], boundary)
        return files
    return []


def _draw_wrong(out: Path, source: ImageSource, wrong: Sequence[WrongAnswer]) -> list[Path]:
    shown = wrong[:MAX_SHEET]
    if not shown:
        out.unlink(missing_ok=True)  # an earlier one would be taken for this evaluation's
        return []
    with optional(out.name):
        from volo.explain.plots import GREEN, RED, Caption, captioned_sheet

        captions = [
            Caption(
                answer.image,
                [(f"true: {answer.truth}", GREEN), (f"→ {answer.predicted}", RED), _percent(answer)],
            )
            for answer in shown
        ]
        heading = f"The {len(shown)} wrong answers that the model is surest of: true class → predicted class"
        captioned_sheet((source.load(a.index) for a in shown), captions, out, kind="wrong answers", heading=heading)
        return [out]
    return []


def _percent(answer: WrongAnswer) -> tuple[str, str]:
    """Of the predicted class, and of the true one."""
    return f"{100 * answer.probability:.1f} % (true: {100 * answer.probability_of_truth:.1f} %)", ""


def show_wrong(console: Console, wrong: Sequence[WrongAnswer], most: int = 40) -> None:
    """Wrong answers as a table, surest first."""
    if not console.is_terminal:
        console.width = max(console.width, 240)  # names stay on one line in a file
    title = f"wrong answers, surest first: {min(most, len(wrong))}" if wrong else "no wrong answer"
    console.print(Text(f"\n{title}", style="bold"))
    if not wrong:
        return
    table = Table(header_style="dim", box=None, padding=(0, 1))
    table.add_column("image", max_width=60, overflow="fold")
    for name in ("true class", "predicted class"):
        table.add_column(name, max_width=40, overflow="ellipsis")
    for name in ("predicted", "true"):
        table.add_column(name, justify="right")
    for answer in wrong[:most]:
        shares = (f"{100 * p:.1f} %" for p in (answer.probability, answer.probability_of_truth))
        table.add_row(Text(answer.image), Text(answer.truth), Text(answer.predicted), *shares)
    console.print(table, highlight=False)


def show_evaluation(
    console: Console, result: dict[str, Any], classes: Sequence[str], what: str, most: int = 60
) -> None:
    """Figures of an evaluation as tables; above `most` classes only the worst ones are listed."""
    columns = {"": result} | ({"ReaL labels": result["real"]} if "real" in result else {})
    console.print(Text(f"{result['count']:,} images, {what}", style="bold"), soft_wrap=True)
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
        figures.add_row("images with labels", *(f"{column['count']:,}" for column in columns.values()))
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


def show_table(console: Console, result: dict[str, Any], classes: Sequence[str], what: str, most: int = 60) -> None:
    """Figures of each output of a model of task "table"; of labels and classes the worst `most`."""
    console.print(Text(f"{result['count']:,} images, {what}", style="bold"), soft_wrap=True)
    figures = Table(show_header=False, box=None)
    figures.add_column()
    figures.add_column(justify="right")
    for name, its in result["outputs"].items():
        for key, value in its.items():
            if key in LABELS:
                figures.add_row(Text(f"{name}: {LABELS[key]}"), figure_text(key, value))
    figures.add_row("loss", f"{result['loss']:.4f}")
    console.print(figures, highlight=False)
    for name, its in result["outputs"].items():
        key, label = next(
            (
                (k, text)
                for k, text in (("per_class_ap", "average precision"), ("per_class_accuracy", "accuracy"))
                if k in its
            ),
            ("", ""),
        )
        if not key:
            continue
        own = its["classes"]
        seen = sorted((i for i, value in enumerate(its[key]) if value is not None), key=lambda i: its[key][i])
        shown = sorted(seen) if len(seen) <= most else seen[:20]
        worst = f" (the 20 worst of {len(seen)}: all of them with --json or --out)" if len(seen) > most else ""
        console.print(Text(f"\n{name}: {label}{worst}", style="bold"), soft_wrap=True)
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_column(max_width=40, no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right")
        table.add_column("")
        for i in shown:
            value = its[key][i]
            table.add_row(Text(own[i]), f"{100 * value:.1f} %", Text("━" * round(20 * value), style="cyan"))
        console.print(table, highlight=False)


def show_segmentation(console: Console, result: dict[str, Any], classes: Sequence[str], what: str) -> None:
    """Figures of an evaluation of pixels as tables."""
    console.print(Text(f"{result['count']:,} images, {what}", style="bold"), soft_wrap=True)
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


main = partial(run, evaluate, ours=OF_MODELS | {"--checkpoint": OF_MODELS["--weights"]})
