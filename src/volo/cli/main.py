"""`volo train | evaluate | predict | segment | annotate | info | pack | bench`: where names become objects.

Everything beyond the standard library is imported where it is used, so that help and spelling mistakes are answered at
once. A command is a function of one frozen dataclass: the docstring is its help, the fields are its options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import logging
import os
import shlex
import signal
import sys
import time
import tomllib
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from volo import __version__
from volo.config import Recipe, find_recipe, list_recipes, load_recipe, nearest

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from volo.inference.predictor import Prediction

logger = logging.getLogger(__name__)

Amp = Literal["off", "bf16", "fp16"]

HELP = f"""volo {__version__}: Vision Outlooker, image recognition with outlook attention (arXiv 2106.13112)

  volo train RECIPE      train on a folder of pictures, CIFAR, the digits that come along, or pictures with masks
  volo evaluate MODEL    how good a model is: top-1, top-5, every class, calibration, confusion; mIoU, boundaries
  volo predict MODEL ... name what is in pictures
  volo segment MODEL ... name every pixel of pictures: masks, overlays, areas
  volo annotate MODEL    draw label maps for token labeling, with any classifier of ours or timm's; check them
  volo info              versions, devices, engines of the operator; --models lists models, weights and recipes
  volo pack DATA         turn pictures into tar shards, for large sets and slow disks
  volo bench WHAT        measure: the operator, a model, a training step, the training loop, the input pipeline

MODEL is a run folder, a checkpoint in it, published weights such as volo_d1.224, or a file of the original's or timm's.

Begin with:
  volo train digits                                     a minute or two
  volo train photos_cpu --data FOLDER                   FOLDER/CLASS/*.jpg, or FOLDER/train and FOLDER/val
  volo predict runs/photos_cpu new_pictures/
  volo COMMAND --help                                   every option, with examples
"""


@dataclass(frozen=True)
class TrainOptions:
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the pictures are: short for --data.path."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Run folder; runs/NAME of the recipe if left out."""
    on_bad_image: Literal["error", "skip"] | None = None
    """Pictures that cannot be decoded: stop and name them all, or leave them out. Short for --data.on_bad_image."""
    resume: bool = False
    """Continue the run in --out where it stopped (or begin it, if there is none)."""
    overwrite: bool = False
    """Replace the run in --out."""
    plan: bool = False
    """Only say what the run would take: steps, pictures, memory, time (tried out with a few pictures), label maps."""
    json: bool = False
    """Print the summary (with --plan, the plan) as one JSON object; everything else goes to standard error."""
    quiet: bool = False
    """No progress, only the result."""
    recipe: Annotated[tyro.conf.FlagConversionOff[Recipe], tyro.conf.arg(name="")] = field(default_factory=Recipe)


def train(options: TrainOptions) -> int:
    """Train a classifier, or a segmentation model: RECIPE is a .toml file, the name of one that ships with volo, or a run folder (to repeat it).

    Every key of the recipe can be changed: --section.key VALUE. Arguments of the model that have no key of their own
    go by --model.options.NAME VALUE, in TOML: --model.options.depths [2,2,3,1]. Those of the recipe hold for its own
    model and are left out with another --model.name.

    Examples:
      volo train digits
      volo train photos_cpu --data photos --out runs/photos --schedule.epochs 60
      volo train camvid_cpu --data camvid --out runs/camvid
      volo train runs/photos --resume                      after Ctrl-C or a power cut: the same weights, bit for bit
      volo train imagenet_volo_d1_384 --data imagenet --train.accumulation 8     8 micro batches of 64 a step
      volo train photos_finetune --data photos             from published weights; --train.amp bf16 on a GPU
      torchrun --nproc-per-node 8 -m volo train imagenet_volo_d1_224 --data imagenet --train.amp bf16
      volo train cifar10_token_labels --data cifar10       its annotator first, then the label maps, then the training
      volo train imagenet_volo_d1_224 --data imagenet --token_label.maps maps/imagenet --plan
      volo train photos_cpu --help                         all keys, with the values of that recipe
    """
    from volo.cli.console import TrainReporter, show_result
    from volo.training.loop import train as run_training

    recipe, out = options.recipe, options.out
    assert out is not None
    if options.data is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=options.data))
    if options.on_bad_image is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, on_bad_image=options.on_bad_image))
    is_main = int(os.environ.get("RANK", "0")) == 0
    console = _console(stderr=options.json)
    reporter = None if options.quiet or not is_main else TrainReporter(console)
    if options.plan:
        return _show_plan(recipe, out, options)
    program = "torchrun ... -m volo" if "RANK" in os.environ else "volo"
    resume_command = f"{program} train {shlex.quote(str(out))} --resume"
    try:
        with reporter or contextlib.nullcontext():
            result = run_training(recipe, out, resume=options.resume, overwrite=options.overwrite, reporter=reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_command) from None
    if not is_main:
        return 128 + result.signal if result.signal else 0
    if result.status == "interrupted":
        if options.json:  # of the annotator's training, if it was that
            print((result.out / "summary.json").read_text(encoding="utf-8"))
        message = f"stopped after step {result.step:,} of {result.total_steps:,}; go on with: {resume_command}"
        _console(stderr=True).print(message, style="yellow", soft_wrap=True, highlight=False)
        return 128 + result.signal

    from volo.explain.plots import confusion_matrix, training_curves

    pictures = [out / "curves.png"]
    training_curves(out / "metrics.jsonl", pictures[0])
    if result.confusion:
        pictures.append(out / "confusion.png")
        unit = "pixels" if recipe.task == "segment" else "pictures"
        confusion_matrix(result.confusion, result.classes, pictures[1], unit)
    if recipe.task == "segment" and result.best:
        pictures += _draw_segmentation(out, result.best, _device(ModelOptions(device=recipe.train.device)))
    if options.json:
        print((out / "summary.json").read_text(encoding="utf-8"))
    else:
        show_result(console, result, pictures)
    return 0


MAX_OVERLAYS = 6


def _draw_segmentation(out: Path, best: dict[str, Any], device: torch.device) -> list[Path]:
    """iou.png and overlays.png of a run: bars for the classes, and some held-out pictures as the best weights see them."""
    from volo.data.segmentation import BadImageError, find_pairs, load_pair, open_classes
    from volo.explain.plots import OverlayItem, class_bars, overlay_sheet
    from volo.inference.segment import HowToTest, load_pixel_classifier, segment

    classifier = load_pixel_classifier(out, device=device)
    bars, sheet = out / "iou.png", out / "overlays.png"
    class_bars(
        best["per_class_iou"], classifier.classes, classifier.colours, bars, best.get("per_class_boundary_iou", ())
    )
    root, classes = open_classes(classifier.data, classifier.segment)
    pairs = find_pairs(root, classifier.segment, classifier.segment.val_split)
    count = len(pairs.names)
    items = []
    for i in sorted({(2 * k + 1) * count // (2 * MAX_OVERLAYS) for k in range(MAX_OVERLAYS)}):
        name = pairs.names[i]
        try:
            image, truth = load_pair(root, name, pairs.masks[i], classes)
        except BadImageError:  # left out of the training, too
            continue
        how = HowToTest.from_config(classifier.segment, classifier.data.img_size)
        answer = next(segment(classifier, [root / name], how=how, device=device))
        items.append(OverlayItem(image, answer.classes, truth[0].numpy(), Path(name).name))
    overlay_sheet(items, classifier.classes, classifier.colours, sheet)
    return [bars, sheet]


def _show_plan(recipe: Recipe, out: Path, options: TrainOptions) -> int:
    from volo.cli.console import TrainReporter, show_plan
    from volo.training.plan import plan_training

    is_main = int(os.environ.get("RANK", "0")) == 0
    console = _console(stderr=options.json)
    reporter = None if options.quiet or not is_main else TrainReporter(console)
    with reporter or contextlib.nullcontext():
        plan = plan_training(recipe, out, reporter=reporter)
    if is_main and options.json:
        print(json.dumps(plan, indent=1))
    elif is_main:
        show_plan(console, plan)
    return 0


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it sees pictures."""

    crop: Annotated[str | None, tyro.conf.arg(metavar="original|timm|FLOAT")] = None
    """Share of the resized picture that is seen (above 1: padded). Published weights know two presets, that of the
    original code and timm's (which is the default); other models use what they were trained with."""
    img_size: tuple[int, ...] | None = None
    """Another size in pixels, or height and width; the position embedding is resampled."""
    batch_size: int = 0
    """Pictures at once, or windows of a segmentation model; 0: 32, and 1 for segmentation."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    amp: Amp = "off"
    """Autocast to bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""


@dataclass(frozen=True)
class WindowOptions:
    """What a segmentation model sees of a picture; `flip` is for classifiers too."""

    window: tuple[int, ...] | None = None
    """Overlapping windows of so many pixels (side, or height and width); 0: the whole picture at once."""
    stride: tuple[int, ...] | None = None
    """From window to window; two thirds of the window if left out."""
    scales: tuple[float, ...] = ()
    """Average the answers at these scales, for example 0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """Average with the answers to the mirror images."""


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
    if _is_segmentation(options.model):
        return _evaluate_segmentation(options)
    if options.seen != WindowOptions(flip=options.seen.flip) or options.split:
        raise ValueError(
            f"--split, --window, --stride and --scales are for segmentation models, which {options.model} is not"
        )
    from volo.cli.console import Bar, show_evaluation
    from volo.data.files import write_atomically
    from volo.data.loader import EvalLoader
    from volo.data.transforms import PixelPipeline
    from volo.inference.evaluate import MirrorAveraged, open_labelled, read_real_labels
    from volo.inference.evaluate import evaluate as run_evaluation

    console = _console(stderr=options.json)
    device = _device(options.how)
    classifier = _load_classifier(options.model, options.how, device)
    model = MirrorAveraged(classifier.model) if options.seen.flip else classifier.model
    data = dataclasses.replace(classifier.data, on_bad_image=options.on_bad_image)
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
            _console(stderr=True).print(
                f"left out: {bad}", style="yellow", soft_wrap=True, markup=False, highlight=False
            )
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


def _is_segmentation(model: str) -> bool:
    from volo.models.checkpoint import NoCheckpointError, find_checkpoint, is_segmentation, load_checkpoint

    path = Path(model)
    if not path.exists():
        return False
    try:
        return is_segmentation(load_checkpoint(find_checkpoint(path)))
    except NoCheckpointError:
        return False


def _evaluate_segmentation(options: EvaluateOptions) -> int:
    from volo.cli.console import Bar, show_segmentation
    from volo.data.segment_loader import SegmentEvalLoader
    from volo.data.segmentation import open_split
    from volo.data.transforms import PixelPipeline
    from volo.inference.evaluate import match_classes
    from volo.inference.segment import load_pixel_classifier
    from volo.inference.segment_evaluate import HowToTest, evaluate_segmentation
    from volo.models.checkpoint import write_atomically

    if options.real is not None or options.how.crop is not None or options.how.img_size is not None:
        raise ValueError(
            "--real, --crop and --img-size are for classifiers; segmentation models take --window and --scales"
        )
    console = _console(stderr=options.json)
    device = _device(options.how)
    classifier = load_pixel_classifier(options.model, device=device)
    segment, split = classifier.segment, options.split or classifier.segment.val_split
    data = dataclasses.replace(classifier.data, on_bad_image=options.on_bad_image)
    if options.data is not None:  # another layout than that of the training, and classes in another order, are fine
        data = dataclasses.replace(data, path=options.data)
        segment = dataclasses.replace(segment, layout="auto", num_classes=0)
    test = _how_to_test(HowToTest.from_config(segment, data.img_size), options.seen)
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
            _console(stderr=True).print(
                f"left out: {bad}", style="yellow", soft_wrap=True, markup=False, highlight=False
            )
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


def _how_to_test(default: Any, seen: WindowOptions) -> Any:
    from volo.inference.segment import how_to_test

    def size(name: str, given: tuple[int, ...] | None) -> Any:
        if given is None:
            return None
        if len(given) not in (1, 2) or min(given) < 0:
            raise ValueError(
                f"--{name} is one number of pixels, or height and width; given: {' '.join(map(str, given))}"
            )
        return given[0] if len(given) == 1 else given

    return how_to_test(
        default,
        window=size("window", seen.window),
        stride=size("stride", seen.stride),
        scales=seen.scales,
        flip=seen.flip,
    )


@dataclass(frozen=True)
class SegmentOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt) or a checkpoint of a recipe of task "segment". With --checkpoint, a picture."""
    pictures: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE")]] = ()
    """Files, folders (searched to the bottom), globs in quotes, or - for paths on standard input, one a line."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The model by an option: everything that is no option is a picture then."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("segmented")
    """NAME.png (classes by number, shown in colours), NAME_overlay.png and areas.json go there. Pictures are never replaced."""
    overlays: bool = True
    """Write overlays: the picture under the colours of its classes, with a legend."""
    cityscapes: bool = False
    """Masks hold Cityscapes' label ids and are named as its benchmark wants them; pictures are seen as volo evaluate sees
    them, so that what is submitted is what was scored. No overlays: the benchmark would take them for masks."""
    json: bool = False
    """Print areas.json instead of a table; the rest goes to standard error."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be read are named and left out either way; "error" ends with exit code 1, "skip" with 0."""
    batch_size: int = 1
    """Windows at once."""
    seen: Annotated[WindowOptions, tyro.conf.arg(name="")] = field(default_factory=WindowOptions)
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    amp: Amp = "off"
    """Autocast to bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""


def segment(options: SegmentOptions) -> int:
    """Name every pixel of pictures: masks, coloured overlays with a legend, areas as JSON.

    Pictures of more than a megapixel are seen by overlapping windows, blended smoothly, in bounded memory; --scales and
    --flip then look at each window several times.

    Examples:
      volo segment runs/camvid_cpu street.jpg
      volo segment runs/camvid_cpu "drive/**/*.png" --out masks --no-overlays
      volo segment street.jpg drive/ --checkpoint runs/camvid_cpu/last.pt
      volo segment runs/ade20k_volo_d1 huge.tif --window 1024 --batch-size 4 --amp bf16
      volo segment runs/cityscapes_volo_d1 leftImg8bit/test --cityscapes --scales 0.75 1 1.25 --flip --out submission
    """
    from volo.cli.console import Bar, area_line
    from volo.data.segmentation import CITYSCAPES
    from volo.inference.segment import (
        areas_json,
        load_pixel_classifier,
        output_files,
        write_areas,
        write_cityscapes,
        write_mask,
        write_overlay,
    )
    from volo.inference.segment import segment as run_segmentation
    from volo.inference.segment_evaluate import HowToTest

    model, pictures = _model_and_pictures(options)
    device = _device(ModelOptions(device=options.device, threads=options.threads))
    classifier = load_pixel_classifier(model, device=device)
    names, colours = classifier.classes, classifier.colours
    if options.cityscapes and names != tuple(name for name, _, _ in CITYSCAPES):
        raise ValueError(f"--cityscapes needs a model of Cityscapes' 19 classes; {model} knows {len(names)} others")
    # A submission is made as it was scored; other pictures are of any size.
    trained = HowToTest.from_config(classifier.segment, classifier.data.img_size) if options.cityscapes else None
    how = _how_to_test(trained, options.seen)
    views = HowToTest(scales=options.seen.scales or (1.0,), flip=options.seen.flip)
    targets = output_files(pictures, options.out, cityscapes=options.cityscapes, overlays=options.overlays)
    console, errors = _console(stderr=options.json), _console(stderr=True)
    width = min(60, max(len(str(path)) for path in pictures))
    options.out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    failed = 0
    with Bar(console) as bar:

        def on_window(done: int, total: int) -> None:
            if total > 1:
                bar.show(f"picture {len(entries) + 1} of {len(pictures)}, windows", done, total)

        results = run_segmentation(
            classifier,
            pictures,
            how=how,
            scales=views.scales,
            flip=views.flip,
            as_scored=options.cityscapes,
            batch_size=options.batch_size,
            device=device,
            amp=options.amp,
            on_window=on_window,
        )
        for files, result in zip(targets, results):
            if result.error:
                failed += 1
                errors.print(result.error, style="red", soft_wrap=True, markup=False, highlight=False)
            else:
                if options.cityscapes:
                    write_cityscapes(options.out / files["mask"], result.classes)
                else:
                    write_mask(options.out / files["mask"], result.classes, colours)
                if "overlay" in files:
                    write_overlay(options.out / files["overlay"], result.image, result.classes, names, colours)
            entries.append(areas_json(result, names, files))
            if not result.error and not options.json:
                shares = [(area["class"], area["share"]) for area in entries[-1]["areas"]]
                console.print(area_line(result.name, shares, width), no_wrap=True, overflow="ellipsis", crop=True)
            bar.show("segmenting", len(entries), len(pictures))
    areas = options.out / "areas.json"
    write_areas(areas, entries, classifier, str(how or f"whole pictures, windows above a megapixel{views.views}"))
    if options.json:
        print(areas.read_text(encoding="utf-8"))
    else:
        console.print(
            f"{options.out}: {', '.join(f'{kind}s' for kind in targets[0])}, areas.json", style="cyan", soft_wrap=True
        )
    if failed:
        message = f"{failed} of {len(pictures)} pictures could not be read"
        errors.print(message, style="yellow" if options.on_bad_image == "skip" else "red", highlight=False)
    return 1 if failed and options.on_bad_image == "error" else 0


@dataclass(frozen=True)
class PredictOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt), a checkpoint, published weights such as volo_d1.224, or a weight file of timm's or the
    original's. With --checkpoint, a picture."""
    pictures: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE")]] = ()
    """Files, folders (searched to the bottom), globs in quotes, or - for paths on standard input, one a line."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The model by an option: everything that is no option is a picture then."""
    top: int = 3
    """So many classes for each picture."""
    format: Literal["table", "json", "csv"] = "table"
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write there instead of standard output; the file appears when it is complete."""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw the first 48 pictures with their classes; if all lie in folders named like classes, right and wrong show."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be read are named and left out either way; "error" ends with exit code 1, "skip" with 0."""
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


MAX_SHEET = 48


def predict(options: PredictOptions) -> int:
    """Name what is in pictures. The class names come with the model.

    Examples:
      volo predict runs/photos holiday.jpg
      volo predict runs/photos new_pictures/ "more/**/*.png" --top 1 --format csv --out answers.csv
      find . -name "*.jpg" | volo predict runs/photos - --format json
      volo predict volo_d1.224 pictures/ --sheet sheet.png
      volo predict pictures/ --checkpoint runs/photos/last.pt
    """
    from volo.cli.console import Bar, prediction_line
    from volo.data.files import write_atomically
    from volo.inference.predictor import predict as run_prediction
    from volo.inference.predictor import to_csv, to_json

    model, pictures = _model_and_pictures(options)
    device = _device(options.how)
    classifier = _load_classifier(model, options.how, device)
    # Only one of the two streams may draw: a bar and lines on the same terminal must know of each other.
    to_terminal = options.out is None and sys.stdout.isatty()
    output, errors = _console(stderr=False), _console(stderr=True)
    bar = Bar(output if to_terminal else errors)
    for_sheet: list[Prediction] = []
    failed = 0

    def watched() -> Iterator[Prediction]:
        nonlocal failed
        answers = run_prediction(
            classifier,
            pictures,
            top=options.top,
            batch_size=options.how.batch_size or 32,
            device=device,
            amp=options.how.amp,
        )
        for done, prediction in enumerate(answers, start=1):
            if prediction.error:
                failed += 1
                if options.format != "table" or options.out is not None:
                    bar.console.print(prediction.error, style="red", soft_wrap=True, markup=False, highlight=False)
            elif len(for_sheet) < MAX_SHEET:
                for_sheet.append(prediction)
            yield prediction
            bar.show("predicting", done, len(pictures))

    def table() -> Iterator[str]:
        name_width = min(60, max(len(str(path)) for path in pictures))
        class_width = min(28, max(len(name) for name in classifier.classes))
        for prediction in watched():
            line = prediction_line(prediction, name_width, class_width)
            if to_terminal:
                output.print(line, no_wrap=True, overflow="ellipsis", crop=True)
            else:
                yield line.plain.rstrip() + "\n"

    lines = {"table": table, "json": lambda: to_json(watched()), "csv": lambda: to_csv(watched())}[options.format]()
    with bar:
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                options.out, lambda file: file.writelines(line.encode(errors="backslashreplace") for line in lines)
            )
        else:
            for line in lines:
                sys.stdout.write(line)
            sys.stdout.flush()
    if options.sheet is not None and for_sheet:
        _draw_sheet(for_sheet, classifier.classes, options.sheet)
    if failed:
        message = f"{failed} of {len(pictures)} pictures could not be read"
        errors.print(message, style="yellow" if options.on_bad_image == "skip" else "red", highlight=False)
    return 1 if failed and options.on_bad_image == "error" else 0


def _draw_sheet(predictions: Sequence[Prediction], classes: Sequence[str], out: Path) -> None:
    from volo.data.decode import decode_image
    from volo.data.transforms import ResizeAndCenterCrop
    from volo.explain.plots import SheetItem, prediction_sheet

    def thumbnail(path: str) -> Any:
        image = decode_image(path)
        H, W = image.shape[1:]
        scale = min(1.0, 400 / max(H, W))
        size = (max(1, round(H * scale)), max(1, round(W * scale)))
        return ResizeAndCenterCrop(size)(image) if scale < 1 else image

    folders = [Path(p.name).absolute().parent.name for p in predictions]
    truths: Sequence[str | None] = folders if set(folders) <= set(classes) else [None] * len(folders)
    items = [SheetItem(thumbnail(p.name), p.top, p.name, truth) for p, truth in zip(predictions, truths)]
    prediction_sheet(items, out)


@dataclass(frozen=True)
class AnnotateOptions:
    annotator: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ANNOTATOR")]] = ""
    """A model of timm (resnet50.a1_in1k, dm_nfnet_f6, ...), a run folder or checkpoint of volo train, or published
    weights such as volo_d1.224."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Class folders, npz files, ... as for volo train; what a run was trained on if left out."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the label maps go."""
    annotator_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights of a timm model, in place of its published ones, which are downloaded."""
    img_size: tuple[int, ...] | None = None
    """What the annotator sees, in pixels, or height and width: larger pictures give finer maps. Its own size if left out."""
    crop: Annotated[str, tyro.conf.arg(metavar="squash|FLOAT")] = "squash"
    """squash: the whole picture, whatever its shape, so that the map covers all of it. A number: a centre crop, as
    --crop of volo evaluate; the map then covers the centre."""
    top: int = 5
    """Classes kept for each position."""
    encoding: Literal["exact", "compact"] = "exact"
    """exact: logits as float16. compact: to the nearest 0.1, which moves no probability by more than 0.025."""
    flip: bool = False
    """Average the logits with those of the mirrored picture; takes twice the time."""
    part: Literal["train", "val", "all"] = "train"
    """Which pictures of the data."""
    val_fraction: float = 0.1
    """Share of each class that is held out where the data has no split of its own: as data.val_fraction of the training."""
    split_seed: int = 0
    """As data.split_seed of the training."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be decoded are named either way: stop, or leave them out."""
    resume: bool = False
    """Go on with --out where it stopped; damaged files of a finished store are drawn again."""
    overwrite: bool = False
    """Replace the label maps in --out."""
    batch_size: int = 64
    workers: int = -1
    """Processes that decode pictures; -1 chooses."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    amp: Amp = "off"
    """Autocast to bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    check: Annotated[Path | None, tyro.conf.arg(metavar="STORE")] = None
    """Instead of drawing: find missing, extra, corrupt and mismatched maps of the pictures in --data."""
    quick: bool = False
    """With --check: do not read the pictures again to see whether they have changed."""
    import_original: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Instead of drawing: pack label maps of the original tool, CLASS/NAME.pt, for the pictures in --data."""
    json: bool = False
    """Print one JSON object; everything else goes to standard error."""
    quiet: bool = False
    """No progress, only the result."""


def annotate(options: AnnotateOptions) -> int:
    """Draw label maps for token labeling: what an annotator sees at each position of every picture.

    The same command with --resume goes on after Ctrl-C, kill -9 or a power cut; the result is the same, byte for byte,
    and the same for any number of processes.

    Examples:
      volo annotate dm_nfnet_f6.dm_in1k --data imagenet --out maps/imagenet --amp bf16
      volo annotate runs/photos --data photos --img-size 448 --out maps/photos --encoding compact
      volo annotate resnet50 --annotator-weights resnet50.pth --data my_pictures --out maps/mine --part all
      torchrun --nproc-per-node 8 -m volo annotate volo_d5.512 --data imagenet --out maps/imagenet --flip
      volo annotate --check maps/imagenet --data imagenet
      volo annotate --import-original label_top5_train_nfnet --data imagenet --out maps/imagenet
    """
    from volo.annotation.drawing import AnnotateConfig, import_original, open_annotator
    from volo.annotation.drawing import annotate as run_annotation
    from volo.cli.console import Bar, show_annotation
    from volo.distributed import join_world

    if options.check is not None:
        return _check_label_maps(options)
    if options.out is None:
        raise ValueError("--out says which folder the label maps go to")
    if options.data is None and (options.import_original is not None or not Path(options.annotator).exists()):
        raise ValueError("--data says where the pictures are")
    config = AnnotateConfig(
        data=options.data,
        part=options.part,
        top=options.top,
        encoding=options.encoding,
        val_fraction=options.val_fraction,
        split_seed=options.split_seed,
        flip=options.flip,
        amp=options.amp,
        batch_size=options.batch_size,
        num_workers=options.workers,
        on_bad_image=options.on_bad_image,
    )
    is_main = int(os.environ.get("RANK", "0")) == 0
    console = _console(stderr=options.json)
    with Bar(console) as bar:
        on_progress = _with_rate(bar) if is_main and not options.quiet else None
        if options.import_original is not None:
            if options.annotator:
                raise ValueError(
                    f"--import-original takes maps that are there; {options.annotator} has nothing to draw"
                )
            report = import_original(
                options.import_original,
                config,
                options.out,
                resume=options.resume,
                overwrite=options.overwrite,
                on_progress=on_progress,
            )
        else:
            if not options.annotator:
                raise ValueError(
                    "volo annotate needs an annotator: a model of timm, a run folder, a checkpoint, or a tag such as volo_d1.224"
                )
            # A process that is done waits for the others, which may have a slow shard before them.
            with join_world(options.device, patience=timedelta(days=1)) as world:
                _set_threads(options.threads)
                opened = open_annotator(
                    options.annotator,
                    weights=options.annotator_weights,
                    img_size=_size(options.img_size),
                    crop="squash" if options.crop == "squash" else _crop_share(options.crop, "squash"),
                    device=world.device,
                )
                report = run_annotation(
                    opened,
                    config,
                    options.out,
                    world=world,
                    resume=options.resume,
                    overwrite=options.overwrite,
                    on_progress=on_progress,
                )
    if not is_main:
        return 0
    errors = _console(stderr=True)
    for note in report["notes"]:
        errors.print(note, style="yellow", soft_wrap=True, markup=False, highlight=False)
    for name, reason in report["skipped"].items():
        errors.print(f"left out: {name}: {reason}", style="yellow", soft_wrap=True, markup=False, highlight=False)
    for name in report["ignored"]:
        errors.print(f"no picture by its name: {name}", style="yellow", soft_wrap=True, markup=False, highlight=False)
    for name in report.get("unused", ()):
        errors.print(f"belongs to no picture: {name}", style="yellow", soft_wrap=True, markup=False, highlight=False)
    if options.json:
        print(json.dumps(report))
    else:
        show_annotation(console, report)
    return 0


def _check_label_maps(options: AnnotateOptions) -> int:
    from volo.annotation.drawing import check_store
    from volo.cli.console import Bar

    assert options.check is not None
    if options.data is None:
        raise ValueError("--data says which pictures the label maps belong to")
    console = _console(stderr=options.json)
    with Bar(console) as bar:
        problems = check_store(
            options.check,
            options.data,
            with_pictures=not options.quick,
            on_progress=None if options.quiet else bar.show,
        )
    if options.json:
        print(json.dumps({"store": str(options.check), "problems": [dataclasses.asdict(p) for p in problems]}))
        return 1 if problems else 0
    for problem in problems:
        console.print(str(problem), style="red", soft_wrap=True, markup=False, highlight=False)
    counts = ", ".join(
        f"{count} {kind}"
        for kind in ("missing", "extra", "corrupt", "mismatched", "unreadable")
        if (count := sum(p.kind == kind for p in problems))
    )
    console.print(
        counts or "every picture has its map, and every map is as it was drawn", style="red" if counts else "green"
    )
    return 1 if problems else 0


def _with_rate(bar: Any) -> Callable[[str, int, int], None]:
    """`bar.show`, with pictures per second since the first call about the same thing."""
    begun: dict[str, tuple[float, int]] = {}

    def show(what: str, done: int, total: int) -> None:
        from volo.cli.console import duration

        now = time.monotonic()
        start, first = begun.setdefault(what, (now, done))
        figures = ""
        if done > first and now > start:
            rate = (done - first) / (now - start)
            figures = f"{rate:,.0f}/s  {duration((total - done) / rate)} left"
        bar.show(what, done, total, figures)

    return show


@dataclass(frozen=True)
class InfoOptions:
    models: bool = False
    """List models, published weights and recipes as well."""
    json: bool = False
    """Print one JSON object."""


def info(options: InfoOptions) -> int:
    """Versions, devices, which engine computes outlook attention here and why not another; models and weights.

    Examples:
      volo info
      volo info --models
      volo info --json
    """
    from volo.cli.console import show_info

    facts = _facts(options.models)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show_info(_console(stderr=False), facts)
    return 0


def _facts(with_models: bool) -> dict[str, Any]:
    import importlib.metadata
    import platform

    import torch

    from volo.data.files import cache_folder
    from volo.models.segmenter import list_segmenters
    from volo.models.volo import VARIANTS, create_model
    from volo.models.weights import PRETRAINED, cached_path
    from volo.ops.outlook_attention import list_backends

    versions: dict[str, str | None] = {"volo": __version__, "python": platform.python_version()}
    for name in (
        "torch",
        "torchvision",
        "timm",
        "triton",
        "numpy",
        "pillow",
        "safetensors",
        "tyro",
        "rich",
        "matplotlib",
        "tensorboard",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        )
    # Stage 1 of D1 at 224 px, what most calls look like.
    engines = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        value = torch.zeros(1, 28, 28, 6, 32, device=device)
        logits = torch.zeros(1, 14, 14, 6, 9, 9, device=device)
        engines[device] = {engine.name: engine.why_not(value, logits, 3, 2, 1) for engine in list_backends()}
    facts: dict[str, Any] = {
        "versions": versions,
        "devices": devices,
        "outlook_attention": engines,
        "cache": str(cache_folder()),
    }
    if with_models:
        facts["models"] = {}
        for name in VARIANTS:
            with torch.device("meta"):
                model = create_model(name)
            facts["models"][name] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "img_size": model.config.img_size[0],
                "depths": model.config.depths,
                "embed_dims": model.config.embed_dims,
            }
        facts["pretrained"] = {
            tag: {
                "top1": w.top1,
                "real": w.real,
                "v2": w.v2,
                "crop_original": w.crop_pct_original,
                "crop_timm": w.crop_pct_timm,
                "cached": any(cached_path(tag, source).exists() for source in ("hub", "release")),
            }
            for tag, w in PRETRAINED.items()
        }
        facts["segmentation"] = list_segmenters()
        facts["recipes"] = {path.stem: _title(path) for path in list_recipes()}
    return facts


def _title(recipe: Path) -> str:
    """What the first line of a recipe says it is."""
    with recipe.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


@dataclass(frozen=True)
class PackOptions:
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Anything that data.path of a recipe can be: class folders, train/ and val/, npz files, other shards."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the shards go."""
    shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "256MB"
    """A shard is no larger than this."""
    shorter_side: Annotated[int, tyro.conf.arg(metavar="PIXELS")] = 0
    """Scale pictures down whose shorter side is longer than this, and save them as JPEG; 0: leave them as they are."""
    quality: Annotated[int, tyro.conf.arg(metavar="1..100")] = 0
    """Save every picture as JPEG of this quality; 0: only those that are scaled down, with 95."""
    kind: Annotated[str, tyro.conf.arg(metavar="KIND")] = "auto"
    """How DATA is read, as data.kind of a recipe."""
    val_fraction: float = 0.1
    """Share of each class that goes to val where the data has no split of its own."""
    split_seed: int = 0
    """Seed of that split; with the same seed a recipe holds out the same pictures."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be decoded: stop and name them all, or leave them out."""
    overwrite: bool = False
    """Replace the shards in FOLDER."""
    json: bool = False
    """Print a summary as one JSON object; everything else goes to standard error."""


def pack(options: PackOptions) -> int:
    """Turn pictures into tar shards (train-000000.tar, ..., val-000000.tar, ..., classes.txt), which WebDataset reads too.

    Pictures keep order, bytes and names, so that a training on the shards is the training on the data. The same command
    continues after an interruption.

    Examples:
      volo pack imagenet --out shards/imagenet
      volo pack photos --out shards/photos --shorter-side 512 --quality 90       smaller, and quicker to decode
      volo train imagenet_volo_d1_224 --data shards/imagenet
      volo train imagenet_volo_d1_224 --data "shards/imagenet/train-{000000..000511}.tar"
    """
    from volo.cli.console import Bar, show_packed
    from volo.config import recipe_from_dict
    from volo.data.pack import pack as run_packing
    from volo.data.pack import parse_size

    console = _console(stderr=options.json)
    names = ("kind", "val_fraction", "split_seed", "on_bad_image")
    data = recipe_from_dict({"data": {"path": options.data, **{name: getattr(options, name) for name in names}}}).data
    command = shlex.join(["volo", "pack", *sys.argv[2:]]) if sys.argv[1:2] == ["pack"] else "the same command"
    try:
        with Bar(console) as bar:
            packed = run_packing(
                data,
                options.out,
                shard_bytes=parse_size(options.shard_size),
                shorter_side=options.shorter_side,
                quality=options.quality,
                overwrite=options.overwrite,
                on_checked=lambda done, total: bar.show("checking pictures", done, total),
                on_packed=lambda done, total: bar.show("packing", done, total),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(command) from None
    for line in [f"left out: {bad}" for bad in packed.skipped] + packed.notes:
        _console(stderr=True).print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)
    if options.json:
        summary = {
            "out": str(packed.out),
            "num_classes": len(packed.classes),
            "num_train": packed.num_train,
            "num_val": packed.num_val,
            "shards": [path.name for path in packed.shards],
            "bytes": packed.num_bytes,
            "shards_done_before": packed.num_done_before,
            "skipped": [str(bad) for bad in packed.skipped],
            "notes": packed.notes,
            "seconds": round(packed.seconds, 3),
        }
        print(json.dumps(summary))
    else:
        show_packed(console, packed)
    return 0


@dataclass(frozen=True)
class BenchOptions:
    what: tyro.conf.Positional[Literal["op", "model", "train", "loop", "data", "labels", "kernels", "gpu"]]
    """op: outlook attention, each engine against the reference; model: inference against timm's VOLO with the same
    weights; train: a training step against timm's; loop: volo train against a bare loop over ready tensors; data: what a
    core does of reading, decoding and augmenting pictures; labels: label maps, their size, reading, writing, and drawing
    them against the annotator's bare forward pass; kernels: the GPU kernels against the copy bandwidth of the GPU, or
    without one what the compiler makes of them (registers, spills); gpu: errors, kernels, inference, training step and
    memory on a GPU, in bfloat16, against what is asked."""
    model: str = ""
    """Name of a model; volo_d1, for loop volo_nano, if left out. For labels an annotator, as volo annotate takes it."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Of labels: the pictures."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Of labels: weights of a timm model, in place of its published ones."""
    pictures: int = 2048
    """Of labels: so many pictures."""
    part: Literal["train", "val", "all"] = "train"
    """Of labels: of which part."""
    batch_size: int = 0
    """Pictures at once; 0: 8, for loop 256, for labels 64, for kernels and gpu 128."""
    img_size: int = 0
    """Side of the pictures; 0: 224, for loop 32, for labels the annotator's own."""
    rounds: int = 0
    """Turns of every candidate; 0: enough for a steady median in a minute or two."""
    amp: Literal["off", "bf16"] = "off"
    """Of train and labels: autocast of both sides."""
    compiled: bool = False
    """Of op, model, train and kernels: torch.compile too; takes minutes."""
    images_per_second: float = 1000.0
    """Of data: what a GPU takes; the cores that this needs are reported."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Write the result there as well."""


def bench(options: BenchOptions) -> int:
    """Measure on this machine. Candidates run in turns in one process; medians and quartiles are reported.

    Keep the machine otherwise idle: a second process that computes can slow one of two threads tenfold.

    Examples:
      volo bench op
      volo bench op --batch-size 1 --threads 2 --compiled --out op.json
      volo bench model --model volo_d1 --batch-size 8
      volo bench train --amp bf16 --device cuda --batch-size 128 --compiled
      volo bench loop
      volo bench labels --model runs/cifar10 --data cifar10
      volo bench data --images-per-second 2500
      volo bench gpu --out benchmarks/results/gpu.json
    """
    from volo.cli.console import show_benchmark
    from volo.data.files import write_atomically

    device = _device(ModelOptions(device=options.device, threads=options.threads))
    is_loop = options.what == "loop"
    name = options.model or ("volo_nano" if is_loop else "volo_d1")
    batch_size = options.batch_size or (256 if is_loop else 8)
    img_size = options.img_size or (32 if is_loop else 224)
    rounds = (
        options.rounds
        or {"op": 41, "model": 7, "train": 5, "loop": 5, "data": 7, "labels": 5, "kernels": 15, "gpu": 15}[options.what]
    )
    result: dict[str, Any]
    if options.what == "op":
        from volo.bench.op import bench_op

        result = bench_op(
            name,
            batch_size=batch_size,
            img_size=img_size,
            compiled=options.compiled,
            device=str(device),
            rounds=rounds,
        )
    elif options.what == "model":
        from volo.bench.model import bench_model

        result = bench_model(
            name,
            batch_size=batch_size,
            img_size=img_size,
            compiled=options.compiled,
            device=str(device),
            rounds=rounds,
        )
    elif options.what == "train":
        from volo.bench.model import bench_train

        result = bench_train(
            name,
            batch_size=batch_size,
            img_size=img_size,
            amp=options.amp,
            compiled=options.compiled,
            device=str(device),
            rounds=rounds,
        )
    elif options.what == "labels":
        from volo.bench.labels import bench_labels

        if not options.model or options.data is None:
            raise ValueError("volo bench labels needs an annotator and pictures: --model and --data")
        result = bench_labels(
            options.model,
            options.data,
            weights=options.weights,
            img_size=options.img_size or None,
            batch_size=options.batch_size or 64,
            pictures=options.pictures,
            part=options.part,
            rounds=rounds,
            amp=options.amp,
            device=str(device),
        )
    elif options.what == "data":
        from volo.bench.data import bench_data

        result = bench_data(img_size=img_size, images_per_second=options.images_per_second, rounds=rounds)
    elif options.what == "kernels":
        from volo.bench.kernels import bench_kernels, compile_report

        if device.type == "cuda":
            result = bench_kernels(options.batch_size or 128, compiled=options.compiled, rounds=rounds)
        else:
            result = compile_report()
    elif options.what == "gpu":
        from volo.bench.gpu import bench_gpu

        result = bench_gpu(
            name, batch_size=options.batch_size or 128, img_size=img_size, device=str(device), rounds=rounds
        )
    else:
        from volo.bench.loop import bench_loop

        result = bench_loop(name, img_size=img_size, batch_size=batch_size, device=str(device), rounds=rounds)
    result = {"what": result["what"], "command": _bench_command(options)} | result
    report = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, lambda file: file.write(report.encode()))
    if options.json:
        print(report)
    else:
        show_benchmark(_console(stderr=False), result)
    return 0


def _bench_command(options: BenchOptions) -> str:
    """The command that repeats a measurement: what differs from the defaults. Of files and folders the names alone, since
    the rest of a path says nothing on another machine."""
    words = ["volo", "bench", options.what]
    for option in dataclasses.fields(options):
        given = getattr(options, option.name)
        if option.name in ("what", "json", "out") or given == option.default:
            continue
        words.append("--" + option.name.replace("_", "-"))
        if given is not True:
            words.append(Path(given).name if option.name in ("model", "data", "weights") else str(given))
    return shlex.join(words)


# From words to options


COMMANDS: dict[str, tuple[Callable[[Any], int], type]] = {
    "train": (train, TrainOptions),
    "evaluate": (evaluate, EvaluateOptions),
    "predict": (predict, PredictOptions),
    "segment": (segment, SegmentOptions),
    "annotate": (annotate, AnnotateOptions),
    "info": (info, InfoOptions),
    "pack": (pack, PackOptions),
    "bench": (bench, BenchOptions),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv if None) and return its exit code: 0; 1: some pictures could not be read, or nobody reads
    our output; 2: an error that the message explains; 130: Ctrl-C; 143: SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StderrHandler()])
    # What was done otherwise than one may think, such as heads left as initialised, is told; by one process of a run.
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.getLogger("volo").setLevel(logging.INFO if is_main else logging.WARNING)
    # Names of files are bytes, of any encoding or none; a terminal that cannot show one is no reason to stop.
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"volo {__version__}")
        return 0
    try:
        return _run(argv[0], argv[1:])
    except KeyboardInterrupt as interrupt:
        _complain("stopped" + (f"; go on with: {interrupt}" if str(interrupt) else ""))
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. Python's own flush at exit must not stumble over it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("VOLO_TRACEBACK"):
            raise
        _complain(_message(error))
        return 2
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError) or os.environ.get("VOLO_TRACEBACK"):
            raise
        _complain(
            f"{str(error).splitlines()[0]}\nUse a smaller --batch-size (training: --train.batch_size, or the same with "
            "--train.accumulation 4), --amp bf16 (--train.amp bf16), a smaller picture, or --train.grad_checkpointing true"
        )
        return 2


class _StderrHandler(logging.Handler):
    """Writes to what is sys.stderr at that moment: while a bar is drawn, rich puts lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _run(name: str, argv: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(
            f"no command {name!r}{nearest(name, COMMANDS)} (commands: {', '.join(COMMANDS)}; see volo --help)"
        )
    command, options_type = COMMANDS[name]
    default: Any = tyro.MISSING_NONPROP
    prog = f"volo {name}"
    of_recipe: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if name == "train":
        argv, default, of_recipe, given = _prepare_train(argv)
        prog += " RECIPE"
    options = tyro.cli(
        options_type,
        prog=prog,
        description=inspect.cleandoc(command.__doc__ or ""),
        args=argv,
        default=default,
        # Recipe keys are shown as they are written in recipes.
        use_underscores=name == "train",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if getattr(options, "quiet", False):
        logging.getLogger("volo").setLevel(logging.WARNING)
    if name == "train":
        recipe, own = options.recipe, default.recipe.model.name
        if of_recipe and recipe.model.name != own:
            logger.info("model.options of the recipe are left out (%s): they are for %s", ", ".join(of_recipe), own)
            of_recipe = {}
        model = dataclasses.replace(recipe.model, options=of_recipe | given)
        options = dataclasses.replace(options, recipe=dataclasses.replace(recipe, model=model))
    return command(options)


def _prepare_train(argv: list[str]) -> tuple[list[str], TrainOptions, dict[str, Any], dict[str, Any]]:
    """The words after the recipe, options with the recipe's values for a start, and the arguments of the model: those of
    the recipe and those given."""
    if not argv:
        raise ValueError("volo train needs a recipe: a .toml file, " + ", ".join(path.stem for path in list_recipes()))
    if argv[0].startswith("-"):
        if not {"-h", "--help"} & set(argv):
            raise ValueError(f"the recipe comes first: volo train RECIPE {' '.join(argv)}")
        return ["--help"], TrainOptions(), {}, {}
    folder = Path(argv[0])
    path = find_recipe(folder / "recipe.toml" if (folder / "recipe.toml").is_file() else argv[0])
    # The recipe a run was started with lies in its folder, where it is also continued.
    out = folder if (folder / "recipe.toml").is_file() else Path("runs") / path.stem
    recipe = load_recipe(path)
    argv, given_options = _take_model_options(argv[1:])
    default = TrainOptions(
        out=out, recipe=dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options={}))
    )
    return _spell_booleans(argv), default, recipe.model.options, given_options


def _take_model_options(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Split off --model.options.NAME VALUE (or NAME=VALUE): their types are the model's business, so they are TOML."""
    prefix, rest, options = "--model.options.", [], {}
    words = iter(argv)
    for word in words:
        if not word.startswith(prefix):
            rest.append(word)
            continue
        name, has_value, text = word.removeprefix(prefix).partition("=")
        if not has_value:
            try:
                text = next(words)
            except StopIteration:
                raise ValueError(f"{word} needs a value in TOML, such as 2, true, [2, 2, 3, 1] or text") from None
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # bare words are text: quotes would have to be quoted in a shell
        options[name.replace("-", "_")] = value
    return rest, options


def _spell_booleans(argv: list[str]) -> list[str]:
    """--train.compile true (as in TOML), or without a value, as the parser wants it: --train.compile True."""
    hints = typing.get_type_hints(Recipe)
    switches = {
        f"--{section}.{key.name}"
        for section, hint in hints.items()
        if dataclasses.is_dataclass(hint)
        for key in dataclasses.fields(hint)
        if typing.get_type_hints(hint)[key.name] is bool
    }
    result: list[str] = []
    words = iter(argv)
    following = next(words, None)
    while following is not None:
        word, following = following, next(words, None)
        name, has_value, value = word.partition("=")
        if "--" + name[2:].replace("-", "_") not in switches:
            result.append(word)
        elif has_value:
            result.append(f"{name}={value.capitalize()}")
        elif following is None or following.startswith("--"):
            result += [word, "True"]
        else:
            result += [word, following.capitalize()]
            following = next(words, None)
    return result


def _model_and_pictures(options: PredictOptions | SegmentOptions) -> tuple[str, list[Path]]:
    """What was meant by MODEL PICTURE..., or by PICTURE... --checkpoint MODEL."""
    from volo.inference.predictor import find_pictures

    model, words = options.model, options.pictures
    if options.checkpoint is not None:
        model, words = options.checkpoint, (model, *words)
    return model, find_pictures(words, sys.stdin if "-" in words else ())


def _load_classifier(model: str, how: ModelOptions, device: torch.device) -> Any:
    from volo.inference.predictor import load_classifier

    crop: Any = how.crop
    if crop is not None and crop not in ("original", "timm"):
        crop = _crop_share(crop, "original, timm")
    return load_classifier(model, img_size=_size(how.img_size), crop=crop, device=device)


def _crop_share(crop: str, words: str) -> float:
    try:
        return float(crop)
    except ValueError:
        raise ValueError(f"--crop is {words} or a number such as 0.96; given: {crop!r}") from None


def _size(size: tuple[int, ...] | None) -> Any:
    """--img-size as a side in pixels or (height, width)."""
    if size is None:
        return None
    if len(size) not in (1, 2) or min(size) < 1:
        raise ValueError(f"--img-size is one number of pixels, or height and width; given: {' '.join(map(str, size))}")
    return size[0] if len(size) == 1 else size


def _set_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def _device(how: ModelOptions) -> torch.device:
    import torch

    _set_threads(how.threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if how.device == "auto" else how.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known to torch; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name} was asked for, but torch sees {torch.cuda.device_count()} GPUs here; use --device cpu"
        )
    return device


def _console(stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _message(error: Exception) -> str:
    """What an error says, without Python's decoration of OSErrors."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _complain(message: str) -> None:
    from rich.text import Text

    rank = os.environ.get("RANK")
    who = f"volo (process {rank})" if rank else "volo"
    _console(stderr=True).print(Text.assemble((f"{who}: ", "bold red"), (message, "red")), soft_wrap=True)
