"""`volo evaluate`: how good a model is."""

from __future__ import annotations

import dataclasses
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
from volo.cli.options import ModelOptions, WindowOptions, how_to_test, load_model, open_device, run

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EvaluateOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt), a checkpoint, published weights such as volo_d1.224, or a weight file of timm's or the original's."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Class folders, a folder with val/, shards or npz files; the pictures held out from the training if left out."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="real.json")] = None
    """ReaL labels of ImageNet's validation pictures; scored beside the folders' own."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be decoded: stop and name them all, or leave them out."""
    json: bool = False
    """Print one JSON object instead of tables; the rest goes to standard error."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write evaluation.json and confusion.png there."""
    split: str = ""
    """Of a segmentation model: which pictures of the data, for example test; those held out from the training if left out."""
    seen: Annotated[WindowOptions, tyro.conf.arg(name="")] = field(default_factory=WindowOptions)
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def evaluate(options: EvaluateOptions) -> int:
    """Score a model on labelled pictures: top-1, top-5, mean class accuracy, calibration, every class, confusion.

    Segmentation models on pictures with masks: mean IoU, IoU and accuracy of every class, boundary IoU, confusion.

    ImageNet for published weights: a folder of WordNet-id folders (all 1000 or some), or of the folders 0 to 999 of
    ImageNet-V2.

    Examples:
      volo evaluate runs/photos                                          on the pictures held out from the training
      volo evaluate runs/photos --data other_photos --out report         report/confusion.png, report/evaluation.json
      volo evaluate runs/cifar10 --flip                                  averaged with the mirror images
      volo evaluate volo_d1.224 --data imagenet/val --real real.json --amp bf16
      volo evaluate volo_d4.448 --data imagenetv2 --crop original
      volo evaluate runs/camvid_cpu --split test --out report
      volo evaluate runs/cityscapes_volo_d1 --window 512 1024 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --amp bf16
    """
    device = open_device(options.how.device, options.how.threads)
    classifier = load_model(options.model, options.how, device)
    if classifier.task == "segment":
        return _evaluate_segmentation(options, classifier, device)
    if options.seen != WindowOptions(flip=options.seen.flip) or options.split:
        raise ValueError(
            f"--split, --window, --stride and --scales are for segmentation models, which {options.model} is not"
        )
    from volo.data.files import write_atomically
    from volo.data.loader import EvalLoader
    from volo.data.transforms import PixelPipeline
    from volo.inference.evaluate import MirrorAveraged, open_labelled, read_real_labels
    from volo.inference.evaluate import evaluate as run_evaluation

    console = results(options.json)
    model = MirrorAveraged(classifier.model) if options.seen.flip else classifier.model
    data = dataclasses.replace(classifier.preprocessing, on_bad_image=options.on_bad_image)
    with Bar(console) as bar:
        labelled = open_labelled(
            options.data,
            data,
            classifier.classes,
            classifier.wnids,
            on_progress=lambda done, total: bar.show("checking pictures", done, total),
        )
        bar.clear()
        for bad in labelled.skipped:
            note(f"left out: {bad}")
        source = labelled.source
        label_sets = None
        if options.real is not None:
            label_sets = read_real_labels(options.real, source.names, len(classifier.classes))
        result = run_evaluation(
            model,
            EvalLoader(source, data, batch_size=options.how.batch_size or 32),
            PixelPipeline(data).to(device),
            num_classes=len(classifier.classes),
            device=device,
            amp=options.how.amp,
            class_map=labelled.class_map,
            label_sets=label_sets,
            on_batch=lambda done: bar.show("evaluating", done, len(source)),
        )
    described = {
        "model": classifier.origin,
        "data": labelled.what,
        "img_size": data.img_size,
        "crop_pct": data.crop_pct,
        "flip": options.seen.flip,
    }
    report = json.dumps({**described, "classes": classifier.classes, **result}, ensure_ascii=False)
    if options.out is not None:
        from volo.explain.plots import confusion_matrix

        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "evaluation.json", lambda file: file.write(report.encode()))
        confusion_matrix(result["confusion"], classifier.classes, options.out / "confusion.png")
    if options.json:
        print(report)
        return 0
    show_evaluation(console, result, classifier.classes, f"{labelled.what}, by {classifier.origin}")
    if options.out is not None:
        console.print(
            f"{options.out / 'evaluation.json'}, {options.out / 'confusion.png'}", style="cyan", soft_wrap=True
        )
    return 0


def _evaluate_segmentation(options: EvaluateOptions, classifier: Any, device: torch.device) -> int:
    from volo.data.files import write_atomically
    from volo.data.masks import open_split
    from volo.data.segment_loader import SegmentEvalLoader
    from volo.data.transforms import PixelPipeline
    from volo.inference.evaluate import match_classes
    from volo.inference.segment_evaluate import HowToTest, evaluate_segmentation

    if options.real is not None:
        raise ValueError("--real is for classifiers; segmentation models take --window and --scales")
    console = results(options.json)
    segment, split = classifier.segment, options.split or classifier.segment.val_split
    data = dataclasses.replace(classifier.preprocessing, on_bad_image=options.on_bad_image)
    if options.data is not None:  # another layout than that of the training, and classes in another order, are fine
        data = dataclasses.replace(data, path=options.data)
        segment = dataclasses.replace(segment, layout="auto", num_classes=0)
    test = how_to_test(HowToTest.from_config(segment, data.img_size), options.seen)
    assert test is not None
    with Bar(console) as bar:
        pictures, skipped = open_split(
            data,
            segment,
            split,
            known=(classifier.classes, classifier.colours),
            on_progress=lambda done, total: bar.show("checking pictures", done, total),
        )
        bar.clear()
        for bad in skipped:
            note(f"left out: {bad}")
        names = pictures.classes.names
        result = evaluate_segmentation(
            classifier.model,
            SegmentEvalLoader(pictures, data, segment, batch_size=1),
            PixelPipeline(data).to(device),
            num_classes=len(classifier.classes),
            device=device,
            how=test,
            amp=options.how.amp,
            batch_size=options.how.batch_size or 1,
            class_map=None if names == classifier.classes else match_classes(names, classifier.classes),
            on_batch=lambda done: bar.show("evaluating", done, len(pictures)),
        )
    what = f"{split} of {data.path}"
    described = {"model": classifier.origin, "data": what, "test": str(test), "classes": classifier.classes}
    report = json.dumps({**described, **result}, ensure_ascii=False)
    if options.out is not None:
        from volo.explain.plots import class_bars, confusion_matrix

        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "evaluation.json", lambda file: file.write(report.encode()))
        confusion_matrix(result["confusion"], classifier.classes, options.out / "confusion.png", "pixels")
        class_bars(
            result["per_class_iou"],
            classifier.classes,
            classifier.colours,
            options.out / "iou.png",
            result["per_class_boundary_iou"],
        )
    if options.json:
        print(report)
        return 0
    show_segmentation(console, result, classifier.classes, f"{what}, {test}, by {classifier.origin}")
    if options.out is not None:
        files = ", ".join(str(options.out / name) for name in ("evaluation.json", "iou.png", "confusion.png"))
        console.print(files, style="cyan", soft_wrap=True)
    return 0


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


main = partial(run, evaluate)
