"""Name what is in pictures: find them, run a classifier over them, write the answers down."""

from __future__ import annotations

import csv
import dataclasses
import glob
import importlib.util
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from volo.config import DataConfig, Size, nearest
from volo.data.decode import BadImageError, decode_image
from volo.data.folders import is_image_name
from volo.data.transforms import PixelPipeline, eval_transform
from volo.inference.evaluate import AMP_DTYPES
from volo.models.checkpoint import NoCheckpointError, find_checkpoint, load_model
from volo.models.volo import VOLO, create_model
from volo.models.weights import PRETRAINED, create_from_file


@dataclass(frozen=True)
class Classifier:
    """A model with all it takes to use it: names of its classes and how it wants its pictures."""

    model: VOLO
    classes: tuple[str, ...]
    data: DataConfig
    """Size, crop and normalisation; `path` and `kind` are those of its own training run."""
    origin: str
    """For people: the file or tag, and the step of the training."""
    wnids: tuple[str, ...] = ()
    """WordNet ids of the classes where they are ImageNet's."""


@dataclass(frozen=True)
class Prediction:
    """What a picture shows, most probable first; for a picture that could not be read `error` says why."""

    name: str
    top: tuple[tuple[str, float], ...]
    error: str | None = None


def load_classifier(
    source: str | Path,
    *,
    img_size: Size | None = None,
    crop: float | Literal["original", "timm"] | None = None,
    device: torch.device | str = "cpu",
) -> Classifier:
    """A classifier in eval mode from a run folder, a checkpoint of a run, a weight file of another's, or a pretrained tag
    ("volo_d1.224").

    Args:
        source: a run folder stands for its best.pt; a model's bare name ("volo_d1") for its 224 px weights. A weight file
            in the original's or timm's layout is known by its shapes (`volo.models.weights.create_from_file`); its
            classes are ImageNet's if there are 1000, else numbers.
        img_size: another size than the one it was made for.
        crop: another crop_pct, or the preset of the original code or of timm (for models and sizes that are published;
            timm's is the default).

    Raises FileNotFoundError where nothing is there, ValueError for what is neither a checkpoint nor weights that are
    known, and for presets of models that have none.
    """
    path = find_checkpoint(source)
    tag = str(source) if str(source) in PRETRAINED else f"{source}.224"
    if path.is_file():
        try:
            loaded = load_model(path, device=device)
        except NoCheckpointError:
            tag, classifier = _from_weight_file(path, device)
        else:
            origin = f"{path}, step {loaded.step}"
            classifier = Classifier(loaded.model, tuple(loaded.classes), loaded.recipe.data, origin)
            tag = ""
    elif tag in PRETRAINED:
        model = create_model(PRETRAINED[tag].variant, pretrained=tag).to(device).eval()
        classifier = _with_published_settings(model, tag, f"published weights {tag}")
    else:
        raise FileNotFoundError(
            f"no checkpoint {str(source)!r}{nearest(str(source), PRETRAINED)} (give a run folder, a .pt file of `volo train`, "
            f"or a pretrained tag: {', '.join(PRETRAINED)})"
        )
    data = classifier.data
    if crop in ("original", "timm"):
        if tag not in PRETRAINED:
            raise ValueError(
                f"crop presets belong to published weights, which {path} does not have; its crop_pct is {data.crop_pct}. "
                "Leave --crop out, or give a number"
            )
        preset = PRETRAINED[tag]
        share = preset.crop_pct_original if crop == "original" else preset.crop_pct_timm
        data = dataclasses.replace(data, crop_pct=share)
    if isinstance(crop, float | int):
        if not 0 < crop <= 4:
            raise ValueError(f"crop is img_size / size before the crop, above 0 and at most 4; given: {crop}")
        data = dataclasses.replace(data, crop_pct=float(crop))
    if img_size is not None:
        data = dataclasses.replace(data, img_size=img_size)
    return dataclasses.replace(classifier, data=data)


def _from_weight_file(path: Path, device: torch.device | str) -> tuple[str, Classifier]:
    """The classifier of a weight file that is no checkpoint of ours, and the tag it would have if it were published."""
    name, model = create_from_file(path)
    if not model.num_classes or model.config.in_chans != 3:
        lacks = "has no heads" if not model.num_classes else f"takes {model.config.in_chans} channels in place of RGB"
        raise ValueError(f"{path} holds weights of a {name} that {lacks}; it cannot name what is in pictures")
    height, width = model.config.img_size
    tag = f"{name}.{height}" if height == width else ""
    return tag, _with_published_settings(model.to(device).eval(), tag, f"{path}, weights of {name}")


def _with_published_settings(model: VOLO, tag: str, origin: str) -> Classifier:
    """Size by the model, crop by the tag if it is a published one, classes by their number."""
    height, width = model.config.img_size
    data = DataConfig(img_size=height if height == width else (height, width), interpolation="bicubic")
    if tag in PRETRAINED:
        data = dataclasses.replace(data, crop_pct=PRETRAINED[tag].crop_pct_timm)
    if model.num_classes != 1000:
        return Classifier(model, tuple(map(str, range(model.num_classes))), data, origin)
    wnids, names = imagenet_classes()
    return Classifier(model, names, data, origin, wnids)


@cache
def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """WordNet ids and English names of ImageNet-1k's 1000 classes, in the order of published weights."""
    # Two text files inside timm are all that is needed; importing timm would take seconds.
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("names of ImageNet's classes come with timm: pip install timm")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "_info"
    wnids = tuple((folder / "imagenet_synsets.txt").read_text(encoding="utf-8").split())
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    lemmas = dict(line.split("\t", 1) for line in lines)
    names = [lemmas[wnid].split(",")[0] for wnid in wnids]
    # Short names that occur twice (crane, maillot) are written out; the bird and the machine differ by id alone.
    names = [lemmas[w] if names.count(n) > 1 else n for w, n in zip(wnids, names)]
    return wnids, tuple(f"{n} ({w})" if names.count(n) > 1 else n for w, n in zip(wnids, names))


def find_pictures(inputs: Sequence[str], lines: Iterable[str] = ()) -> list[Path]:
    """Pictures behind files, folders (searched to the bottom, sorted), globs ("in/*.jpg", "in/**/*.png") and "-".

    "-" stands for the paths in `lines`, one a line: those are not looked at here, so that one that is gone is reported
    among the predictions. A picture that is named twice is listed once.
    Raises FileNotFoundError for a path that is not there, ValueError for no inputs, and for a folder or glob without
    pictures.
    """
    if not inputs:
        raise ValueError("name the pictures: files, folders, globs in quotes, or - for paths on standard input")
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if given == "-":
            pictures = [Path(line.strip()) for line in lines if line.strip()]
        elif path.is_dir():
            pictures = sorted(p for p in path.rglob("*") if is_image_name(p.name) and p.is_file())
        elif path.exists():
            pictures = [path]
        elif glob.has_magic(given):
            pictures = sorted(Path(p) for p in glob.glob(given, recursive=True) if Path(p).is_file())
        else:
            raise FileNotFoundError(
                f"no file or folder {given!r}; give pictures, folders, globs, or - for standard input"
            )
        if not pictures:
            raise ValueError(
                "standard input holds no paths; give one picture a line"
                if given == "-"
                else f"no pictures in {given!r}; a folder is searched for files with the ending of a picture (.jpg, .png, ...)"
            )
        found.update(dict.fromkeys(pictures))
    return list(found)


def predict(
    classifier: Classifier,
    pictures: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    amp: str = "off",
) -> Iterator[Prediction]:
    """Predictions for `pictures`, in their order, as they come; unreadable ones are part of the result, not an end.

    The next batch is decoded by threads while the model works on this one.
    """
    if top < 1 or batch_size < 1 or amp not in AMP_DTYPES:
        raise ValueError(
            f"top and batch_size are at least 1 and amp is one of {', '.join(AMP_DTYPES)}; given: {top}, {batch_size}, {amp!r}"
        )
    device = torch.device(device)
    transform = eval_transform(classifier.data)
    pixels = PixelPipeline(classifier.data).to(device).eval()
    top = min(top, len(classifier.classes))

    def prepare(path: str | Path) -> Tensor | str:
        try:
            return transform(decode_image(path))
        except (BadImageError, OSError) as error:
            return str(error)

    def classify(batch: list[tuple[str | Path, Future[Tensor | str]]]) -> Iterator[Prediction]:
        prepared = [future.result() for _, future in batch]
        images = [image for image in prepared if isinstance(image, Tensor)]
        answers: Iterator[tuple[list[float], list[int]]] = iter(())
        if images:
            with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
                logits = classifier.model(pixels(torch.stack(images).to(device)))
                best = logits.float().softmax(dim=1).topk(top, dim=1)
            answers = zip(best.values.tolist(), best.indices.tolist())
        for (path, _), image in zip(batch, prepared):
            if isinstance(image, str):
                yield Prediction(str(path), (), image)
            else:
                values, indices = next(answers)
                yield Prediction(str(path), tuple((classifier.classes[i], p) for i, p in zip(indices, values)))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        remaining = iter(pictures)

        def next_batch() -> list[tuple[str | Path, Future[Tensor | str]]]:
            return [(path, pool.submit(prepare, path)) for path in islice(remaining, batch_size)]

        batch = next_batch()
        while batch:
            following = next_batch()
            yield from classify(batch)
            batch = following


def to_json(predictions: Iterable[Prediction]) -> Iterator[str]:
    """One JSON array, a picture a line: {"picture", "predictions": [{"class", "probability"}]} or {"picture", "error"}."""
    separator = "[\n"
    for prediction in predictions:
        answer = (
            {"error": prediction.error}
            if prediction.error
            else {"predictions": [{"class": name, "probability": round(p, 6)} for name, p in prediction.top]}
        )
        yield separator + json.dumps({"picture": prediction.name} | answer, ensure_ascii=False)
        separator = ",\n"
    yield "[]\n" if separator == "[\n" else "\n]\n"


def to_csv(predictions: Iterable[Prediction]) -> Iterator[str]:
    """Lines of CSV: picture, rank (from 1), class, probability, error."""
    yield _csv_line(["picture", "rank", "class", "probability", "error"])
    for prediction in predictions:
        if prediction.error:
            yield _csv_line([prediction.name, "", "", "", prediction.error])
        for rank, (name, probability) in enumerate(prediction.top, start=1):
            yield _csv_line([prediction.name, rank, name, f"{probability:.6f}", ""])


def _csv_line(values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
