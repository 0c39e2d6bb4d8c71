"""`volo annotate`: label maps for token labeling."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from volo.cli.console import Bar, duration, is_main_process, note, results
from volo.cli.options import read_crop, run, set_threads
from volo.config import AnnotatorConfig, DataConfig


@dataclass(frozen=True)
class AnnotateOptions(AnnotatorConfig):
    """Those of `AnnotatorConfig`, and which images, where to, and on what device."""

    recipe: tyro.conf.Suppress[str] = ""
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ANNOTATOR")]] = ""
    weights: Annotated[str, tyro.conf.arg(name="annotator-weights", metavar="FILE")] = ""
    crop: Annotated[str | None, tyro.conf.arg(metavar="squash|FLOAT")] = None  # type: ignore[assignment]  # read below
    """squash: the whole image, whatever its shape, so that the map covers all of it. A number: a centre crop, as
    --crop of volo evaluate; the map then covers the centre. squash if left out; 1.0 with --import-original."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Class folders, npz files, ... as for volo train; what a run was trained on if left out."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the label maps go."""
    part: Literal["train", "val", "all"] = "train"
    """Which images of the data."""
    val_fraction: float = 0.1
    """Share of each class that is held out where the data has no split of its own: as data.val_fraction of the training."""
    split_seed: int = 0
    """As data.split_seed of the training."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Images that cannot be decoded are named either way: stop, or leave them out."""
    resume: bool = False
    """Continue --out where it stopped; damaged files of a finished store are regenerated."""
    overwrite: bool = False
    """Replace the label maps in --out."""
    workers: int = -1
    """Processes that decode images; -1 chooses."""
    check: Annotated[Path | None, tyro.conf.arg(metavar="STORE")] = None
    """Instead of generating: find missing, extra, corrupt and mismatched maps of the images in --data."""
    quick: bool = False
    """With --check: do not read the images again to see whether they have changed."""
    import_original: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Instead of generating: pack label maps of the original tool, CLASS/NAME.pt, for the images in --data."""
    json: bool = False
    """Print one JSON object; everything else goes to standard error."""
    quiet: bool = False
    """No progress, only the result."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""


def annotate(options: AnnotateOptions) -> int:
    """Generate label maps for token labeling: what an annotator sees at each position of every image.

    The same command with --resume goes on after Ctrl-C, kill -9 or a power cut; the result is the same, byte for byte,
    and the same for any number of processes.

    Examples:
      volo annotate dm_nfnet_f6.dm_in1k --data imagenet --out maps/imagenet --amp bf16
      volo annotate runs/photos --data photos --img-size 448 --out maps/photos --encoding compact
      volo annotate resnet50 --annotator-weights resnet50.pth --data my_images --out maps/mine --part all
      torchrun --nproc-per-node 8 -m volo annotate volo_d5.512 --data imagenet --out maps/imagenet --flip
      volo annotate --check maps/imagenet --data imagenet
      volo annotate --import-original label_top5_train_nfnet --data imagenet --out maps/imagenet
    """
    from volo.annotation.annotator import load_annotator
    from volo.annotation.generate import annotate as generate
    from volo.annotation.original_maps import import_original
    from volo.distributed import join_world
    from volo.training.settings import keep_freed_memory

    if options.check is not None:
        return _check_label_maps(options)
    if options.out is None:
        raise ValueError("--out says which folder the label maps go to")
    if options.data is None and (options.import_original is not None or not Path(options.model).exists()):
        raise ValueError("--data says where the images are")
    crop = read_crop(options.crop or ("squash" if options.import_original is None else "1.0"), "squash")
    given: dict[str, Any] = {
        "val_fraction": options.val_fraction,
        "split_seed": options.split_seed,
        "on_bad_image": options.on_bad_image,
        "num_workers": options.workers,
    }
    is_main = is_main_process()
    console = results(options.json)
    with Bar(console) as bar:
        on_progress = _with_rate(bar) if is_main and not options.quiet else None
        how: dict[str, Any] = {
            "part": options.part,
            "resume": options.resume,
            "overwrite": options.overwrite,
            "on_progress": on_progress,
        }
        if options.import_original is not None:
            if options.model:
                raise ValueError(
                    f"--import-original imports existing maps and takes no annotator; leave {options.model} out"
                )
            report = import_original(
                options.import_original,
                DataConfig(path=options.data or "", **given),
                options.out,
                encoding=options.encoding,
                crop=crop,
                img_size=options.img_size,
                batch_size=options.batch_size,
                **how,
            )
        else:
            if not options.model:
                raise ValueError(
                    "volo annotate needs an annotator: a model of timm, a run folder, a checkpoint, or a tag such as volo_d1.224"
                )
            keep_freed_memory()
            # A process that is done waits for the others, which may have a slow shard before them.
            with join_world(options.device, patience=timedelta(days=1)) as world:
                set_threads(options.threads)
                annotator = dataclasses.replace(options, crop=crop)
                loaded = load_annotator(annotator, world.device)
                data = loaded.preprocessing if options.data is None else DataConfig(path=options.data)
                data = dataclasses.replace(data, **given)
                report = generate(loaded, annotator, data, options.out, world=world, **how)
    if not is_main:
        return 0
    for text in report["notes"]:
        note(text)
    for name, reason in report["skipped"].items():
        note(f"left out: {name}: {reason}")
    for name in report["ignored"]:
        note(f"no image by its name: {name}")
    for name in report.get("unused", ()):
        note(f"belongs to no image: {name}")
    if options.json:
        print(json.dumps(report))
    else:
        show_annotation(console, report)
    return 0


def _check_label_maps(options: AnnotateOptions) -> int:
    from volo.annotation.check import check_store

    assert options.check is not None
    if options.data is None:
        raise ValueError("--data says which images the label maps belong to")
    console = results(options.json)
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
        counts or "every image has its map, and every map is as it was generated", style="red" if counts else "green"
    )
    return 1 if problems else 0


def _with_rate(bar: Any) -> Callable[[str, int, int], None]:
    """`bar.show`, with images per second since the first call about the same thing."""
    begun: dict[str, tuple[float, int]] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, first = begun.setdefault(what, (now, done))
        figures = ""
        if done > first and now > start:
            rate = (done - first) / (now - start)
            figures = f"{rate:,.0f}/s  {duration((total - done) / rate)} left"
        bar.show(what, done, total, figures)

    return show


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
    speed = (
        f"; {report['drawn']:,} generated now, {report['pictures_per_second']:,.0f} a second" if report["drawn"] else ""
    )
    console.print(
        f"{report['bytes'] / 1e6:,.1f} MB, {report['bytes_per_picture']:,.0f} bytes an image ({report['encoding']}){speed}",
        highlight=False,
        soft_wrap=True,
    )
    if report["agreement"]:
        top1, positions = (100 * report["agreement"][key] for key in ("top1", "positions"))
        console.print(
            f"the annotator agrees with the labels on {top1:.2f} % of the images, at {positions:.2f} % of the positions",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("agreement is unknown: the annotator has other classes than the data", style="yellow")
    if report["skipped"]:
        console.print(f"{len(report['skipped']):,} images have no map, since they cannot be decoded", style="yellow")


main = partial(run, annotate)
