"""`volo segment`: a class for every pixel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.text import Text

from volo.cli.console import Bar, note, print_row, results
from volo.cli.options import OF_MODELS, DeviceOptions, WindowOptions, how_to_test, model_and_pictures, open_device, run


@dataclass(frozen=True)
class SegmentOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt) or a checkpoint of a recipe of task "segment". With --checkpoint, an image."""
    pictures: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE")]] = ()
    """Files, folders (searched recursively), globs in quotes, or - for paths on standard input, one per line."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The model, given as an option; all positional arguments are then images."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("segmented")
    """NAME.png (classes by number, shown in colours), NAME_overlay.png and areas.json go there. Nothing else is ever replaced."""
    overlays: bool = True
    """Write overlays: the image under the colours of its classes, with outlines and a legend; a background has no colour."""
    alpha: float | None = None
    """Opacity of the colours in overlays, 0 (outlines alone) to 1; 0.55 if left out."""
    cityscapes: bool = False
    """Masks hold Cityscapes' label ids and are named as its benchmark wants them; images are seen as volo evaluate sees
    them, so that what is submitted is what was scored. No overlays: the benchmark would take them for masks."""
    json: bool = False
    """Print the areas as JSON instead of a table; the rest goes to standard error."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Images that cannot be read are named and left out either way; "error" ends with exit code 1, "skip" with 0."""
    batch_size: int = 1
    """Windows at once."""
    seen: Annotated[WindowOptions, tyro.conf.arg(name="")] = field(default_factory=WindowOptions)
    trust: bool = False
    """Open a MODEL that holds native code, a package of AOTInductor; loading it runs that code."""
    how: Annotated[DeviceOptions, tyro.conf.arg(name="")] = field(default_factory=DeviceOptions)


def segment(options: SegmentOptions) -> int:
    """Classify every pixel of images: masks, coloured overlays with a legend, areas as JSON.

    Images of more than a megapixel are seen by overlapping windows, blended smoothly, in bounded memory; --scales and
    --flip then look at each window several times.

    Examples:
      volo segment runs/camvid_cpu street.jpg
      volo segment runs/camvid_cpu "drive/**/*.png" --out masks --no-overlays
      volo segment street.jpg drive/ --checkpoint runs/camvid_cpu/last.pt
      volo segment runs/ade20k_volo_d1 huge.tif --window 1024 --batch-size 4 --amp bf16
      volo segment runs/cityscapes_volo_d1 leftImg8bit/test --cityscapes --scales 0.75 1 1.25 --flip --out submission
    """
    from volo.data.files import FolderLock
    from volo.data.mask_values import CITYSCAPES
    from volo.inference.model_source import load
    from volo.inference.segment import (
        OPACITY,
        areas_json,
        areas_text,
        earlier_areas,
        is_result,
        masks_beside_images,
        output_files,
        write_areas,
        write_cityscapes,
        write_mask,
        write_overlay,
    )
    from volo.inference.segment import segment as run_segmentation
    from volo.inference.segment_evaluate import HowToTest

    alpha = OPACITY if options.alpha is None else options.alpha
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha is the opacity of the colours, 0 to 1; given: {alpha:g}")
    model, pictures = model_and_pictures(options.model, options.pictures, options.checkpoint)
    device = open_device(options.how.device, options.how.threads)
    classifier = load(model, task="segment", device=device, trust=options.trust)
    names, colours = classifier.classes, classifier.colours
    if options.cityscapes and names != tuple(name for name, _, _ in CITYSCAPES):
        raise ValueError(
            f"--cityscapes needs a model of Cityscapes' 19 classes; {model} has {len(names)} other classes"
        )
    # A submission is made as it was scored; other images are of any size.
    trained = (
        HowToTest.from_config(classifier.segment, classifier.preprocessing.img_size) if options.cityscapes else None
    )
    how = how_to_test(trained, options.seen)
    views = HowToTest(scales=options.seen.scales or (1.0,), flip=options.seen.flip)
    if left_out := [path for path in pictures if is_result(path)]:
        note(f"left out: {len(left_out):,} results of volo segment, such as {left_out[0]}")
        pictures = [path for path in pictures if path not in set(left_out)]
    folders = [path for word in (options.model, *options.pictures) if (path := Path(word).expanduser()).is_dir()]
    if masks := masks_beside_images(pictures, folders):
        note(f"left out: {len(masks):,} masks, such as {masks[0]}; name their folder to have them segmented")
        pictures = [path for path in pictures if path not in set(masks)]
    if not pictures:
        raise ValueError("no images are left: all that were named are results of volo segment, or masks")
    targets = output_files(pictures, options.out, cityscapes=options.cityscapes, overlays=options.overlays)
    console = results(options.json)
    width = min(60, max(len(str(path)) for path in pictures))
    entries: list[dict[str, Any]] = []
    failed, said = 0, str(how or f"whole images, windows above a megapixel{views.views}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(FolderLock(options.out, "segmenting"))
        earlier = earlier_areas(options.out, pictures, targets, classifier)
        # What is done stays in areas.json, whatever ends the rest.

        def save_areas() -> None:
            if entries:
                write_areas(options.out, areas_text(earlier + entries, classifier, said))

        stack.callback(save_areas)
        bar = stack.enter_context(Bar(console))

        def on_window(done: int, total: int) -> None:
            if total > 1:
                bar.show(f"image {len(entries) + 1} of {len(pictures)}, windows", done, total)

        answers = run_segmentation(
            classifier,
            pictures,
            how=how,
            scales=views.scales,
            flip=views.flip,
            as_scored=options.cityscapes,
            batch_size=options.batch_size,
            device=device,
            amp=options.how.amp,
            on_window=on_window,
        )
        for files, result in zip(targets, answers):
            if result.error:
                failed += 1
                note(result.error, "red")
            else:
                if options.cityscapes:
                    write_cityscapes(options.out / files["mask"], result.classes)
                else:
                    write_mask(options.out / files["mask"], result.classes, colours)
                if "overlay" in files:
                    write_overlay(options.out / files["overlay"], result.image, result.classes, names, colours, alpha)
            entries.append(areas_json(result, names, files))
            if not result.error and not options.json:
                shares = [(area["class"], area["share"]) for area in entries[-1]["areas"]]
                print_row(console, area_line(result.name, shares, width))
            bar.show("segmenting", len(entries), len(pictures))
    if options.json:
        print(areas_text(entries, classifier, said))
    else:
        console.print(
            f"{options.out}: {', '.join(f'{kind}s' for kind in targets[0])}, areas.json", style="cyan", soft_wrap=True
        )
    if failed:
        is_error = options.on_bad_image == "error"
        note(f"{failed} of {len(pictures)} images could not be read", "red" if is_error else "yellow")
        return int(is_error)
    return 0


def area_line(name: str, areas: Sequence[tuple[str, float]], name_width: int, most: int = 5) -> Text:
    """One image of a table of areas: the classes with the largest shares, in the order given."""
    name = name if len(name) <= name_width else "…" + name[1 - name_width :]
    line = Text(f"{name:<{name_width}}  ")
    for rank, (label, share) in enumerate(areas[:most]):
        line.append(f"{label} {100 * share:.1f} %  ", style="bold" if rank == 0 else "dim")
    if len(areas) > most:
        line.append(f"and {len(areas) - most} more", style="dim")
    line.rstrip()
    return line


main = partial(run, segment, ours=OF_MODELS)
