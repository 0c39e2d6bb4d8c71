"""`volo embed`: images as vectors, and what they say of a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from volo.cli.console import Bar, note, results
from volo.cli.options import OF_MODELS, ModelOptions, open_device, read_crop, run
from volo.cli.outputs import begins_with, claim, is_figure, optional, try_folder
from volo.config import read_size

if TYPE_CHECKING:
    from torch import Tensor

    from volo.data.sources import ImageSource
    from volo.explain.data_check import DataCheck
    from volo.explain.plots import Caption
    from volo.inference.embed import Embeddings

Pool = Literal["token", "concat"]
QUERIES, NEIGHBOURS = 8, 7
"""Of a sheet of neighbours."""
MAX_PAIRS, MAX_LABELS = 24, 48
"""Of the sheets of a check."""
FIGURES = {"duplicates.png": "near-duplicates", "labels.png": "labels in question"}


@dataclass(frozen=True)
class EmbedOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A VOLO classifier: a run folder (its best.pt), a checkpoint, or published weights such as volo_d1.224."""
    pictures: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE")]] = ()
    """Files, folders (searched recursively), globs in quotes, or - for paths on standard input, one per line."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATASET")] = None
    """A data set as for training, in place of single images: class folders, train/ and val/, shards, npz files. With --check
    it may be left out for the model's own training data."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE|FOLDER")] = None
    """Write the vectors there: vectors.npz, or vectors.parquet (needs pyarrow). With --check a folder, for check.csv and
    sheets of what was found."""
    pool: Pool = "concat"
    """concat: class token, mean and maximum of the other tokens, one after another; token: the class token alone."""
    neighbours: Annotated[Path | None, tyro.conf.arg(metavar="SHEET.png")] = None
    """Draw a few images, spread over the classes, with those that are nearest to them."""
    check: bool = False
    """Look for near-duplicates within and between the training and held-out images, and for labels that are likely wrong."""
    threshold: float | None = None
    """Cosine similarity from which on --check calls two images with like pixels near-duplicates; 0.85 if left out, as measured
    in docs/data_check.md."""
    json: bool = False
    """Print one JSON object instead of tables; the rest goes to standard error."""
    overwrite: bool = False
    """Replace existing files at --out and --neighbours even if they are not earlier results."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Images that cannot be read are named and left out either way; "error" ends with exit code 1, "skip" with 0."""
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def embed(options: EmbedOptions) -> int:
    """Turn images into vectors for search, clustering or a classifier of your own; look over a data set with them.

    Examples:
      volo embed runs/photos new_photos/ --out vectors.npz
      volo embed volo_d1.224 "scans/**/*.png" --out vectors.parquet --pool token
      volo embed runs/photos photos/ --out vectors.npz --neighbours neighbours.png
      volo embed runs/photos --data photos --out vectors.npz        every image, with its class and its part
      volo embed runs/photos --data photos --check                  near-duplicates, and labels that are likely wrong
      volo embed volo_d1.224 --data photos --check --out check      check/check.csv, duplicates.png, labels.png
    """
    from volo.inference.embed import data_config, volo_classifier
    from volo.inference.embed import embed as embed_files
    from volo.inference.predictor import find_pictures
    from volo.training.settings import keep_freed_memory

    _refuse(options)
    pictures: list[Path] = []
    if not options.check and options.data is None:
        pictures = find_pictures(options.pictures, sys.stdin if "-" in options.pictures else ())
    _claim(options, pictures)
    device = open_device(options.how.device, options.how.threads)
    keep_freed_memory()
    loaded = volo_classifier(
        options.model,
        img_size=read_size("--img-size", options.how.img_size),
        crop=None if options.how.crop is None else read_crop(options.how.crop, "original", "timm"),
        device=device,
    )
    console = results(options.json)
    settings: dict[str, Any] = {"pool": options.pool, "device": device, "amp": options.how.amp}
    settings["batch_size"] = options.how.batch_size or 32
    check: DataCheck | None = None
    parts: dict[str, ImageSource] = {}
    with Bar(console) as bar:
        if pictures:
            found = embed_files(
                loaded, pictures, **settings, on_progress=lambda done, total: bar.show("embedding", done, total)
            )
            errors = list(found.errors)
        else:
            found, features, parts, classes, errors = _embed_data(
                loaded, data_config(loaded, options.data), 1 + options.check, bar, settings
            )
            if options.check:
                from volo.explain.data_check import THRESHOLD, check_data

                threshold = THRESHOLD if options.threshold is None else options.threshold
                check = check_data(
                    found, features, parts, classes, threshold=threshold, device=device, on_progress=bar.show
                )
    for error in errors:
        note(f"left out: {error}", "red" if options.on_bad_image == "error" else "yellow")
    if options.out is not None and check is None:
        found.save(options.out)
    if options.json:
        print(
            json.dumps(_summary(options, found, errors, check), ensure_ascii=False)
            .encode(errors="backslashreplace")
            .decode()
        )
    elif check is not None:
        show_check(console, check, f"by {loaded.origin}")
    else:
        where = f": {options.out}" if options.out is not None else ""
        line = f"{len(found):,} vectors of {found.vectors.shape[1]} numbers by {loaded.origin}{where}"
        console.print(Text(line, style="bold"), soft_wrap=True, highlight=False)
    _write(options, found, check, parts, console)
    return int(bool(errors) and options.on_bad_image == "error")


def _refuse(options: EmbedOptions) -> None:
    """Options that do not go together."""
    if options.pictures and (options.check or options.data is not None):
        given = "--check" if options.check else "--data"
        raise ValueError(f"{given} is for a data set; name it with --data DATASET and leave {options.pictures[0]} out")
    if options.threshold is not None and not options.check:
        raise ValueError("--threshold belongs to --check")
    if options.threshold is not None and not -1 < options.threshold <= 1:
        raise ValueError(f"--threshold is a cosine similarity, above -1 and at most 1; given: {options.threshold}")
    if options.how.batch_size < 0:
        raise ValueError(f"--batch-size is a number of images, 0 for 32; given: {options.how.batch_size}")
    if not options.check and options.out is None and options.neighbours is None:
        raise ValueError("say where the vectors go: --out vectors.npz (or .parquet), or --neighbours SHEET.png")


def _claim(options: EmbedOptions, pictures: Sequence[Path]) -> None:
    """Try what will be written, before the work."""
    from volo.explain.data_check import HEADER
    from volo.inference.embed import check_ending, is_ours, require_pyarrow

    inputs = {picture.resolve() for picture in pictures}
    if options.data is not None and Path(options.data).is_file():
        inputs.add(Path(options.data).resolve())
    for option, path in (("--out", options.out), ("--neighbours", options.neighbours)):
        if path is not None and path.resolve() in inputs:
            raise ValueError(f"{option} would replace {path}, which is to be read")
    if options.out is not None and options.check:
        try_folder(options.out)
        claim(options.out / "check.csv", begins_with(",".join(HEADER) + "\n"), overwrite=options.overwrite)
        for name, title in FIGURES.items():
            claim(options.out / name, is_figure(title), overwrite=options.overwrite)
    elif options.out is not None:
        if check_ending(options.out) == ".parquet":
            require_pyarrow()
        claim(options.out, is_ours, overwrite=options.overwrite)
    if options.neighbours is not None:
        claim(options.neighbours, is_figure("nearest neighbours"), overwrite=options.overwrite, option="--neighbours")


def _embed_data(
    loaded: Any, config: Any, views: int, bar: Bar, settings: dict[str, Any]
) -> tuple[Embeddings, Tensor, dict[str, ImageSource], tuple[str, ...], list[str]]:
    """Vectors of a data set, those of all views, its parts, its classes, and what cannot be read."""
    from volo.data.images import open_data
    from volo.inference.embed import embed_source

    splits = open_data(config, on_progress=lambda done, total: bar.show("checking images", done, total))
    parts = {"train": splits.train, "val": splits.val}
    found, features = embed_source(loaded, parts, views=views, on_progress=bar.show, **settings)
    return found, features, parts, splits.classes, [str(bad) for bad in splits.skipped]


def _summary(
    options: EmbedOptions, found: Embeddings, errors: Sequence[str], check: DataCheck | None
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "command": "volo embed",
        **found.about,
        "count": len(found),
        "size": found.vectors.shape[1],
    }
    if any(found.classes):
        summary["classes"] = {name: found.classes.count(name) for name in sorted(set(found.classes))}
    if options.out is not None:
        summary["out"] = str(options.out)
    summary["left_out"] = list(errors)
    return summary | ({"check": check.to_dict()} if check is not None else {})


def _write(
    options: EmbedOptions, found: Embeddings, check: DataCheck | None, parts: dict[str, ImageSource], console: Console
) -> None:
    """Lists and sheets; what was written is told."""
    from volo.data.files import write_atomically

    files: list[Path] = []
    if check is not None and options.out is not None:
        files.append(options.out / "check.csv")
        lines = "".join(check.to_csv()).encode(errors="backslashreplace")
        write_atomically(files[0], lambda file: file.write(lines))
        files += _draw_check(options.out, check, parts)
    if options.neighbours is not None:
        with optional(options.neighbours.name):
            _draw_neighbours(options.neighbours, found, parts)
            files.append(options.neighbours)
    if files and not options.json:
        console.print(", ".join(map(str, files)), style="cyan", soft_wrap=True, markup=False, highlight=False)


def _load_all(numbers: Sequence[int], found: Any, parts: dict[str, ImageSource]) -> Iterator[Tensor]:
    """Images by their number among all, decoded one after the other."""
    from volo.data.decode import decode_image

    for number in numbers:
        if not parts:
            yield decode_image(found.names[number])
            continue
        for source in parts.values():
            if number < len(source):
                yield source.load(number)
                break
            number -= len(source)


def _draw_neighbours(out: Path, found: Embeddings, parts: dict[str, ImageSource]) -> None:
    import torch

    from volo.explain.plots import BLUE, GREEN, RED, Caption, captioned_sheet
    from volo.inference.embed import nearest
    from volo.inference.spread import spread

    if len(found) < 2:
        raise ValueError("neighbours need at least two images")
    queries = spread(found.classes, QUERIES)
    similarities, numbers = nearest(torch.from_numpy(found.vectors), queries, NEIGHBOURS)
    captions: list[Caption] = []
    shown: list[int] = []
    for query, row, its in zip(queries, numbers.tolist(), similarities.tolist()):
        label = found.classes[query]
        captions.append(Caption(found.names[query], [(label or "query", BLUE), ("query", BLUE)][: 1 + bool(label)]))
        shown += [query, *row]
        for number, similarity in zip(row, its):
            other = found.classes[number]
            named = [(other, GREEN if other == label else RED)] if label else []
            captions.append(Caption(found.names[number], [*named, (f"{similarity:.3f}", "")]))
    heading = "Images (left) and their nearest neighbours by cosine similarity of standardised vectors"
    together = len(captions) // len(queries)
    images = _load_all(shown, found, parts)
    captioned_sheet(images, captions, out, kind="nearest neighbours", heading=heading, together=together, most=1)


def _draw_check(folder: Path, check: DataCheck, parts: dict[str, ImageSource]) -> list[Path]:
    from volo.explain.data_check import PARTS

    files = []
    for name, title in FIGURES.items():
        out = folder / name
        is_labels = name == "labels.png"
        if not (check.issues if is_labels else check.duplicates):
            out.unlink(missing_ok=True)  # an earlier one would be taken for this check's
            continue
        with optional(name):
            from volo.explain.plots import GREEN, RED, Caption, captioned_sheet

            captions: list[Caption] = []
            shown: list[int] = []
            if is_labels:
                issues = check.issues[:MAX_LABELS]
                for issue in issues:
                    shown.append(issue.image)
                    texts = [
                        (f"label: {check.labels[issue.image]}", RED),
                        (f"→ {check.classes[issue.suggested]}", GREEN),
                    ]
                    chances = f"{100 * issue.confidence:.1f} % → {100 * issue.of_suggested:.1f} %"
                    captions.append(Caption(check.names[issue.image], [*texts, (chances, "")]))
                heading = (
                    f"Labels that are likely wrong: {len(issues)} of {len(check.issues)}, likeliest first "
                    "(label → suggested class, out-of-fold probabilities)"
                )
            else:
                pairs = check.duplicates[:MAX_PAIRS]
                for pair in pairs:
                    same = check.labels[pair.first] == check.labels[pair.second]
                    for number in (pair.first, pair.second):
                        shown.append(number)
                        how = f"{pair.similarity:.3f}{', mirrored' if pair.is_mirrored else ''}"
                        texts = [
                            (check.labels[number], GREEN if same else RED),
                            (PARTS[check.parts[number]], ""),
                            (how, ""),
                        ]
                        captions.append(Caption(check.names[number], texts))
                heading = (
                    f"Near-duplicates: {len(pairs)} of {check.duplicate_count:,} pairs, those between training and "
                    "held-out images first (cosine similarity; red: different labels)"
                )
            images = _load_all(shown, check, parts)
            together = 1 if is_labels else 2
            captioned_sheet(images, captions, out, kind=title, heading=heading, together=together)
            files.append(out)
    return files


def show_check(console: Console, check: DataCheck, what: str, most: int = 20) -> None:
    """What a check found, as tables."""
    if not console.is_terminal:
        console.width = max(console.width, 240)  # names stay on one line in a file
    counts = " and ".join(f"{check.parts.count(part):,} {said} images" for part, said in _parts().items())
    console.print(Text(f"{counts}, {what}", style="bold"), soft_wrap=True)
    kinds = [check.kind(pair) for pair in check.duplicates]
    figures = Table(show_header=False, box=None)
    figures.add_column()
    figures.add_column(justify="right")
    unlisted = check.duplicate_count - len(check.duplicates)
    figures.add_row(f"near-duplicates (similarity {check.threshold:g} or more)", f"{check.duplicate_count:,}")
    for kind, said in (
        ("train-val", "between training and held-out images"),
        ("train", "among training images"),
        ("val", "among held-out images"),
    ):
        figures.add_row(f"  {said}", f"{kinds.count(kind):,}{' or more' if unlisted else ''}")
    figures.add_row("labels that are likely wrong", f"{len(check.issues):,}")
    figures.add_row("accuracy of the probe that judges them", f"{100 * check.accuracy:.1f} %")
    console.print(figures, highlight=False)
    if check.not_judged:
        some = ", ".join(check.not_judged[:20]) + (", ..." if len(check.not_judged) > 20 else "")
        note(f"labels are not judged for lack of training images: {some}")
    if check.duplicates:
        console.print(Text(f"\nnear-duplicates, {min(most, len(kinds))} of {check.duplicate_count:,}", style="bold"))
        table = _table("image", "label", "other image", "its label", "similarity")
        for pair, kind in list(zip(check.duplicates, kinds))[:most]:
            i, j = pair.first, pair.second
            said = f"{pair.similarity:.3f}{' mirrored' if pair.is_mirrored else ''}"
            names = [
                f"{check.names[k]} ({_parts()[check.parts[k]]})" if kind == "train-val" else check.names[k]
                for k in (i, j)
            ]
            table.add_row(Text(names[0]), Text(check.labels[i]), Text(names[1]), Text(check.labels[j]), said)
        console.print(table, highlight=False)
    if check.issues:
        title = f"\nlabels that are likely wrong, {min(most, len(check.issues))} of {len(check.issues):,}"
        console.print(Text(title, style="bold"))
        table = _table("image", "label", "its probability", "suggested class", "its probability")
        for issue in check.issues[:most]:
            label, suggested = check.labels[issue.image], check.classes[issue.suggested]
            shares = [f"{100 * p:.1f} %" for p in (issue.confidence, issue.of_suggested)]
            table.add_row(Text(check.names[issue.image]), Text(label), shares[0], Text(suggested), shares[1])
        console.print(table, highlight=False)


def _parts() -> dict[str, str]:
    from volo.explain.data_check import PARTS

    return {part: said.replace(" ", "-") for part, said in PARTS.items()}


def _table(*columns: str) -> Table:
    table = Table(header_style="dim", box=None, padding=(0, 1))
    for name in columns:
        is_number = name.endswith(("probability", "similarity"))
        table.add_column(name, justify="right" if is_number else "left", max_width=60, overflow="fold")
    return table


main = partial(run, embed, ours=OF_MODELS)
