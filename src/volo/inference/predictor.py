"""Name what is in images: find them, run a classifier over them, write the answers down."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from volo.data.decode import BadImageError, decode_image
from volo.data.transforms import PixelPipeline, eval_transform
from volo.data.walk import images_below
from volo.inference.evaluate import AMP_DTYPES, not_finite
from volo.inference.model_source import LoadedModel, load
from volo.inference.table import Answer, read_answers


@dataclass(frozen=True)
class Prediction:
    """What an image shows, most probable first; for an image that could not be read `error` says why."""

    name: str
    top: tuple[tuple[str, float], ...]
    error: str | None = None
    outputs: tuple[Answer, ...] = ()
    """Of a model of task "table", in place of `top`."""


def find_pictures(inputs: Sequence[str], lines: Iterable[str] = ()) -> list[Path]:
    """Images behind files, folders (searched recursively, sorted), globs ("in/*.jpg", "in/**/*.png") and "-".

    "-" stands for the paths in `lines`, one a line: those are not looked at here, so that one that is gone is reported
    among the predictions. An image that is named twice is listed once.
    Raises FileNotFoundError for a path that is not there, ValueError for no inputs, and for a folder or glob without
    images.
    """
    if not inputs:
        raise ValueError("name the images: files, folders, globs in quotes, or - for paths on standard input")
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if given == "-":
            pictures = [Path(line.strip()) for line in lines if line.strip()]
        elif path.is_dir():
            pictures = images_below(path)
        elif path.exists():
            pictures = [path]
        elif glob.has_magic(given):
            pictures = sorted(Path(p) for p in glob.glob(given, recursive=True) if Path(p).is_file())
        else:
            raise FileNotFoundError(
                f"no file or folder {given!r}; give images, folders, globs, or - for standard input"
            )
        if not pictures:
            raise ValueError(
                "standard input holds no paths; give one image a line"
                if given == "-"
                else f"no images in {given!r}; a folder is searched for files with the ending of an image (.jpg, .png, ...)"
            )
        found.update(dict.fromkeys(pictures))
    return list(found)


def predict(
    model: LoadedModel[Any] | str | Path,
    images: str | Path | Iterable[str | Path],
    *,
    top: int = 5,
    threshold: float = 0.5,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    amp: str = "off",
) -> Iterator[Prediction]:
    """Predictions for images, in their order, as they come; unreadable ones are part of the result, not an end.

    The next batch is decoded by threads while the model works on this one.

    Args:
        model: a classifier as `volo.inference.model_source.load` gives it, or what that takes.
        images: paths of files; a single string or path may be a folder or a glob, too (`find_pictures`).
        top: classes for each image.
        threshold: of several labels an image (task "table"): those with a probability of at least this are named.
        device: where the model is to run; None: where it is, and the CPU for one that is loaded here.
        amp: "off", "bf16" or "fp16": the type of autocast.

    An image whose logits are not all finite has an error in place of classes. Raises ValueError for a segmentation model
    and for options out of range, and as `load` and `find_pictures` do.
    """
    if top < 1 or batch_size < 1 or amp not in AMP_DTYPES:
        raise ValueError(
            f"top and batch_size are at least 1 and amp is one of {', '.join(AMP_DTYPES)}; given: {top}, {batch_size}, {amp!r}"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability between 0 and 1; given: {threshold}")
    classifier = model if isinstance(model, LoadedModel) else load(model, device=device or "cpu")
    if classifier.task == "segment":
        raise ValueError(f"{classifier.origin} is a segmentation model: use `volo segment`")
    if isinstance(images, str | Path):
        images = find_pictures([str(images)])
    device = classifier.device if device is None else torch.device(device)
    transform = eval_transform(classifier.preprocessing)
    pixels = PixelPipeline(classifier.preprocessing).to(device).eval()
    top = min(top, len(classifier.classes))
    targets = classifier.targets if classifier.task == "table" else None

    takes_pixels = getattr(classifier.model, "takes_pixels", False)  # an exported file with its preprocessing inside

    def prepare(path: str | Path) -> Tensor | str:
        try:
            image = decode_image(path)
            return image if takes_pixels else transform(image)
        except (BadImageError, OSError) as error:
            return str(error)

    def classify(batch: list[tuple[str | Path, Tensor | str]]) -> Iterator[Prediction]:
        decoded = [image for _, image in batch if isinstance(image, Tensor)]
        answers: Iterator[tuple[tuple[tuple[str, float], ...], tuple[Answer, ...], bool]] = iter(())
        if decoded:
            with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
                if takes_pixels:
                    given = torch.cat([classifier.model(image.permute(1, 2, 0)[None]) for image in decoded])
                else:
                    given = classifier.model(pixels(torch.stack(decoded).to(device))).float()
            none: list[tuple[Any, ...]] = [()] * len(given)
            names, outputs = none, none
            if targets is not None:
                outputs = list(read_answers(given, targets, top, threshold))
            else:
                best = (given if takes_pixels else given.softmax(dim=1)).topk(top, dim=1)
                names = [
                    tuple((classifier.classes[i], p) for i, p in zip(indices, values))
                    for values, indices in zip(best.values.tolist(), best.indices.tolist())
                ]
            answers = zip(names, outputs, given.isfinite().all(dim=1).tolist())
        for path, image in batch:
            if isinstance(image, str):
                yield Prediction(str(path), (), image)
                continue
            names_of_it, outputs_of_it, is_finite = next(answers)
            if is_finite:
                yield Prediction(str(path), names_of_it, outputs=outputs_of_it)
            else:
                yield Prediction(str(path), (), f"{path}: {not_finite(amp)}")

    for batch in prepared_batches(images, prepare, batch_size):
        yield from classify(batch)


Prepared = TypeVar("Prepared")


def prepared_batches(
    images: Iterable[str | Path], prepare: Callable[[str | Path], Prepared], batch_size: int
) -> Iterator[list[tuple[str | Path, Prepared]]]:
    """Images and what `prepare` makes of them, in their order; threads prepare the next batch while one is worked on."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        remaining = iter(images)

        def next_batch() -> list[tuple[str | Path, Future[Prepared]]]:
            return [(path, pool.submit(prepare, path)) for path in islice(remaining, batch_size)]

        batch = next_batch()
        while batch:
            following = next_batch()
            yield [(path, future.result()) for path, future in batch]
            batch = following


def to_json(predictions: Iterable[Prediction]) -> Iterator[str]:
    """One JSON array, an image a line: {"picture", "predictions": [{"class", "probability"}]} or {"picture", "error"}.

    Of a model of task "table": {"picture", "outputs": {NAME: ...}}, where a number is one, a class is such a list, most
    probable first, and several labels are one of those above the threshold.
    """
    separator = "[\n"
    for prediction in predictions:
        answer: dict[str, Any]
        if prediction.error:
            answer = {"error": prediction.error}
        elif prediction.outputs:
            answer = {
                "outputs": {
                    its.output: _listed(its.labels) if its.number is None else its.number for its in prediction.outputs
                }
            }
        else:
            answer = {"predictions": _listed(prediction.top)}
        yield separator + json.dumps({"picture": prediction.name} | answer, ensure_ascii=False)
        separator = ",\n"
    yield "[]\n" if separator == "[\n" else "\n]\n"


def _listed(top: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class": name, "probability": round(p, 6)} for name, p in top]


CSV_HEAD = ("picture", "rank", "class", "probability", "error")
TABLE_HEAD = ("picture", "output", "value", "probability", "error")


def to_csv(predictions: Iterable[Prediction], is_table: bool = False) -> Iterator[str]:
    """Lines of CSV: picture, rank (from 1), class, probability, error.

    Of a model of task "table" (`is_table`): picture, output, value, probability, error, a line for every number, class and
    label; an image without a label has one without value.
    """
    yield _csv_line(TABLE_HEAD if is_table else CSV_HEAD)
    for prediction in predictions:
        if prediction.error:
            yield _csv_line([prediction.name, "", "", "", prediction.error])
        for rank, (name, probability) in enumerate(prediction.top, start=1):
            yield _csv_line([prediction.name, rank, name, f"{probability:.6f}", ""])
        for its in prediction.outputs:
            if its.number is not None:
                yield _csv_line([prediction.name, its.output, f"{its.number:g}", "", ""])
            for name, probability in its.labels:
                yield _csv_line([prediction.name, its.output, name, f"{probability:.6f}", ""])
            if its.number is None and not its.labels:
                yield _csv_line([prediction.name, its.output, "", "", ""])


def _csv_line(values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
