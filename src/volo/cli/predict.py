"""`volo predict`: name what is in images."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.text import Text

from volo.cli.console import Bar, note, print_row, results
from volo.cli.options import OF_MODELS, ModelOptions, load_model, model_and_pictures, open_device, run
from volo.cli.outputs import begins_with, claim, is_figure, optional

if TYPE_CHECKING:
    from volo.inference.predictor import Prediction


@dataclass(frozen=True)
class PredictOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt), a checkpoint, published weights such as volo_d1.224, or a weight file of timm's or the
    original's. With --checkpoint, an image."""
    pictures: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE")]] = ()
    """Files, folders (searched recursively), globs in quotes, or - for paths on standard input, one per line."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The model, given as an option; all positional arguments are then images."""
    top: int = 3
    """Number of classes shown per image."""
    threshold: float = 0.5
    """Of a model that gives several labels an image: labels with a probability of at least this."""
    format: Literal["table", "json", "csv"] = "table"
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write there instead of standard output; the file appears when it is complete."""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw up to 48 images, spread over the predicted classes, with their answers; if all lie in folders named like classes,
    right and wrong show."""
    overwrite: bool = False
    """Replace existing files at --out and --sheet even if they are not earlier results."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Images that cannot be read are named and left out either way; "error" ends with exit code 1, "skip" with 0."""
    trust: bool = False
    """Open a MODEL that holds native code, a package of AOTInductor; loading it runs that code."""
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


MAX_SHEET = 48


def predict(options: PredictOptions) -> int:
    """Classify images. The class names come with the model.

    Models of task "table" say what they have learned: numbers, classes, all labels above --threshold.

    Examples:
      volo predict runs/photos holiday.jpg
      volo predict runs/photos new_pictures/ "more/**/*.png" --top 1 --format csv --out answers.csv
      find . -name "*.jpg" | volo predict runs/photos - --format json
      volo predict volo_d1.224 pictures/ --sheet sheet.png
      volo predict pictures/ --checkpoint runs/photos/last.pt
    """
    from volo.data.files import write_atomically
    from volo.inference.predictor import CSV_HEAD, TABLE_HEAD, to_csv, to_json
    from volo.inference.predictor import predict as run_prediction
    from volo.inference.spread import Spread
    from volo.training.settings import keep_freed_memory

    model, pictures = model_and_pictures(options.model, options.pictures, options.checkpoint)
    for option, path, is_ours in (
        (
            "--out",
            options.out,
            begins_with('[\n{"picture": ', *(",".join(head) + "\n" for head in (CSV_HEAD, TABLE_HEAD))),
        ),
        ("--sheet", options.sheet, is_figure("prediction sheet")),
    ):
        if path is not None:
            if path.resolve() in {picture.resolve() for picture in pictures}:
                raise ValueError(f"{option} would replace the image {path}")
            claim(path, is_ours, overwrite=options.overwrite, option=option)
    device = open_device(options.how.device, options.how.threads)
    keep_freed_memory()
    classifier = load_model(model, options.how, device, trust=options.trust)
    if classifier.task == "segment":
        raise ValueError(f"{model} is a segmentation model, which names pixels: use `volo segment` or `volo evaluate`")
    is_table = classifier.task == "table"
    if is_table and options.sheet is not None:
        raise ValueError("--sheet draws images with their class; for a model of task 'table' take --format csv or json")
    # Only one of the two streams may draw: a bar and lines on the same terminal must know of each other.
    to_terminal = options.out is None and sys.stdout.isatty()
    output = results()
    bar = Bar(results(json=not to_terminal))
    for_sheet: Spread[Prediction] = Spread(MAX_SHEET)
    failed = 0

    def watched() -> Iterator[Prediction]:
        nonlocal failed
        answers = run_prediction(
            classifier,
            pictures,
            top=options.top,
            threshold=options.threshold,
            batch_size=options.how.batch_size or 32,
            device=device,
            amp=options.how.amp,
        )
        for done, prediction in enumerate(answers, start=1):
            if prediction.error:
                failed += 1
                if options.format != "table" or options.out is not None:
                    bar.console.print(prediction.error, style="red", soft_wrap=True, markup=False, highlight=False)
            elif options.sheet is not None:
                for_sheet.add(prediction.top[0][0], prediction)
            yield prediction
            bar.show("predicting", done, len(pictures))

    def table() -> Iterator[str]:
        name_width = min(60, max(len(str(path)) for path in pictures))
        class_width = min(28, max(len(name) for name in classifier.classes))
        for prediction in watched():
            line = prediction_line(prediction, name_width, class_width)
            if to_terminal:
                print_row(output, line)
            else:
                yield line.plain.rstrip() + "\n"

    lines = {"table": table, "json": lambda: to_json(watched()), "csv": lambda: to_csv(watched(), is_table)}[
        options.format
    ]()
    with bar:
        if options.out is not None:
            write_atomically(
                options.out, lambda file: file.writelines(line.encode(errors="backslashreplace") for line in lines)
            )
        else:
            for line in lines:
                sys.stdout.write(line)
            sys.stdout.flush()
    if options.sheet is not None and (shown := for_sheet.chosen()):
        with optional(options.sheet.name):
            _draw_sheet(shown, classifier.classes, options.sheet)
    if failed:
        is_error = options.on_bad_image == "error"
        note(f"{failed} of {len(pictures)} images could not be read", "red" if is_error else "yellow")
        return int(is_error)
    return 0


def _draw_sheet(predictions: Sequence[Prediction], classes: Sequence[str], out: Path) -> None:
    from volo.data.decode import decode_image
    from volo.explain.plots import SheetItem, prediction_sheet, thumbnail

    folders = [Path(p.name).absolute().parent.name for p in predictions]
    truths: Sequence[str | None] = folders if set(folders) <= set(classes) else [None] * len(folders)
    items = [SheetItem(thumbnail(decode_image(p.name)), p.top, p.name, truth) for p, truth in zip(predictions, truths)]
    prediction_sheet(items, out)


def prediction_line(prediction: Prediction, name_width: int, class_width: int) -> Text:
    """One image of a table of predictions; the widths align it with the others."""
    name = prediction.name if len(prediction.name) <= name_width else "…" + prediction.name[1 - name_width :]
    line = Text(f"{name:<{name_width}}  ")
    if prediction.error:
        reason = prediction.error.removeprefix(f"{prediction.name}: ")
        return line.append(f"not read: {reason}", style="red")
    for rank, (label, probability) in enumerate(prediction.top):
        label = label if len(label) <= class_width else label[: class_width - 1] + "…"
        line.append(f"{label:<{class_width}} {100 * probability:5.1f} %  ", style="bold" if rank == 0 else "dim")
    for its in prediction.outputs:
        named = [f"{name} {100 * p:.1f} %" for name, p in (its.labels[:1] if its.kind == "class" else its.labels)]
        line.append(f"{its.output} ", style="dim")
        line.append(f"{f'{its.number:.4g}' if its.number is not None else ', '.join(named) or 'none'}  ", style="bold")
    line.rstrip()
    return line


_HABITS = OF_MODELS | {
    "--json": "--format json prints JSON",
    "--csv": "--format csv prints CSV",
    "--data": "images are named after the model, files or folders; volo evaluate scores a data set",
}
main = partial(run, predict, ours=_HABITS)
