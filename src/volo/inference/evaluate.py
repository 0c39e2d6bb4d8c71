"""Score a classifier on labelled images."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from volo.config import DataConfig, read_text
from volo.data.arrays import is_npz, open_all_npz
from volo.data.classes import match_classes
from volo.data.decode import BadImage
from volo.data.folders import open_folder
from volo.data.images import open_data
from volo.data.shards import is_shards, open_all_shards
from volo.data.sources import ImageSource
from volo.data.splits import inside, split_folders
from volo.data.tables import is_table, open_all_table
from volo.data.walk import list_folder, spelled
from volo.inference.metrics import ClassificationMetrics

Answer = TypeVar("Answer")
NONE = torch.iinfo(torch.int64).max
"""Index of no image."""

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class MirrorAveraged(nn.Module):
    """A classifier that looks twice: images [B, 3, H, W] -> the logarithm [B, num_classes] of the mean of what it gives
    the image and its mirror image, as probabilities. Twice the time, and usually a few tenths of a per cent."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        plain, mirrored = (self.model(x).float().log_softmax(-1) for x in (images, images.flip(-1)))
        return torch.logaddexp(plain, mirrored) - math.log(2)


def run_over(
    loader: Iterable[dict[str, Tensor]],
    model: nn.Module,
    pixels: nn.Module,
    look: Callable[[Tensor, dict[str, Tensor]], Answer],
    add: Callable[[Answer, dict[str, Tensor]], None],
    *,
    device: torch.device,
    amp: str = "off",
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Hand every batch to `look(normalised images, batch)`, under autocast and with `model` and `pixels` in eval mode, and
    what that says to `add(answer, batch)`; the modes are put back.

    `on_batch` is called with the number of images done so far on this rank. Raises ValueError for an unknown `amp`.
    """
    if amp not in AMP_DTYPES:
        raise ValueError(f"amp is one of {', '.join(AMP_DTYPES)}; given: {amp!r}")
    modules = [m for part in (model, pixels) for m in part.modules()]
    modes = [m.training for m in modules]
    model.eval()
    pixels.eval()
    done = 0
    try:
        for batch in loader:
            with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
                answer = look(pixels(batch["image"].to(device, non_blocking=True)), batch)
            add(answer, batch)
            done += len(batch["image"])
            if on_batch is not None:
                on_batch(done)
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode


def not_finite(amp: str) -> str:
    """What is said of an image for which a model has no answer."""
    way_out = "use amp off or bf16" if amp == "fp16" else "its weights are damaged, or it diverged while it was trained"
    return f"the model's answer is not finite (NaN or infinite); {way_out}"


def refuse_not_finite(bad: int, loss: float, loader: Iterable[Any], amp: str) -> None:
    """Raises ValueError if some answer was not finite: for the image of index `bad` here, or in another process."""
    if bad == NONE and math.isfinite(loss):
        return
    names = getattr(getattr(loader, "source", None), "names", None)
    what = "an image of another process" if bad == NONE else names[bad] if names else f"image {bad}"
    raise ValueError(f"{what}: {not_finite(amp)}")


def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Tensor]],
    pixels: nn.Module,
    *,
    num_classes: int,
    device: torch.device | str,
    amp: str = "off",
    class_map: Sequence[int] | None = None,
    label_sets: Sequence[Sequence[int]] | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_logits: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """Run `model` over `loader` once and score it; model and pixels are put in eval mode and back.

    Args:
        model: images [B, 3, H, W] float -> logits [B, num_classes], already on `device`.
        loader: batches {"image": uint8 [B, 3, H, W], "target": int64 [B], "index": int64 [B]}, an `EvalLoader`.
        pixels: the data module's `PixelPipeline`, uint8 -> normalised float.
        amp: "off", "bf16" or "fp16": the type of autocast.
        class_map: class of the model for each class of the data (`match_classes`); None: they are the same.
        label_sets: right classes of each image, by its index in the data (`read_real_labels`): scored as well, and
            reported under "real" with the keys of the others. Images with an empty set are left out there.
        on_batch: called with the number of images done so far on this rank.
        on_logits: called with the logits of each batch, the classes of the model that are right, and the numbers of the
            images.
        strict: False lets logits that are not finite pass; then the figures mean little.

    Returns:
        `ClassificationMetrics.compute()`, over the images of all ranks when torch.distributed is set up: then every
        rank must call this, each with its own share of the images.

    Raises ValueError, with the image's name, for logits that are not finite.
    """
    if getattr(model, "takes_pixels", False):
        raise ValueError("this file has its preprocessing inside, for `volo predict`; evaluate one exported without it")
    device = torch.device(device)
    metrics = ClassificationMetrics(num_classes, device)
    real = ClassificationMetrics(num_classes, device) if label_sets is not None else None
    to_model_class = None if class_map is None else torch.tensor(class_map)
    bad = torch.full((), NONE, device=device)

    def add(logits: Tensor, batch: dict[str, Tensor]) -> None:
        target, index = batch["target"], batch["index"].to(device)
        target = target if to_model_class is None else to_model_class[target]
        metrics.update(logits, target)
        if on_logits is not None:
            on_logits(logits, target, batch["index"])
        if real is not None and label_sets is not None:
            real.update(logits, [label_sets[i] for i in batch["index"].tolist()])
        # Looked at once, at the end: to look at each batch would stall a GPU.
        torch.minimum(bad, index.where(~logits.isfinite().all(dim=1), NONE).amin(), out=bad)

    run_over(loader, model, pixels, lambda images, _: model(images), add, device=device, amp=amp, on_batch=on_batch)
    metrics.merge()
    result = metrics.compute()
    if strict:
        refuse_not_finite(int(bad), result["loss"], loader, amp)
    if real is not None:
        real.merge()
        result["real"] = real.compute()
    return result


@dataclass(frozen=True)
class LabelledData:
    """Images to score a model on."""

    source: ImageSource
    class_map: list[int] | None
    """Class of the model for each class of `source`; None: they are the same."""
    skipped: list[BadImage]
    """Left out, because they cannot be decoded."""
    what: str
    """For people: which part of which data this is."""


def open_labelled(
    path: str | Path | None,
    data: DataConfig,
    classes: Sequence[str],
    wnids: Sequence[str] = (),
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelledData:
    """Images to score a model with `classes` on, prepared as `data` (that of its training) says.

    Args:
        path: None: the images held out from the training. A folder of class folders, named like the classes, by their
            WordNet id or by their number (ImageNet-V2); or one that has them in val/ (or validation/, dev/, test/, ...);
            or tar shards or npz files, those of val where there are such, else all; or a table, of which the same holds
            for its split column; or any other data of
            `volo.data.images.open_data`, whose held-out part is taken.
        wnids: WordNet ids of the classes, for models of ImageNet.

    Raises ValueError as `open_data` does, and for classes that the model does not know.
    """
    given = Path(data.path if path is None else path).expanduser()
    trained_on = Path(data.path).expanduser()
    if path is not None and (not data.path or given.resolve() != trained_on.resolve()):
        data = dataclasses.replace(
            data, path=str(given), kind="auto", splits=data.splits if data.splits == "none" else "auto"
        )
        is_new = True
    elif data.path or data.kind != "auto":
        is_new = False
    else:
        raise ValueError("these weights come without images; give a folder of class folders with --data")

    is_arrays, is_cifar = is_npz(given, data.splits), any(given.glob("cifar-*"))
    if is_new and (is_arrays or is_table(given) or (is_shards(given, data.splits) and not is_cifar)):
        source: ImageSource
        if is_arrays:
            source, skipped = open_all_npz(given, data, on_progress=on_progress)
        elif is_table(given):
            source, skipped = open_all_table(data, on_progress=on_progress)
        else:
            source, skipped = open_all_shards(given, data, on_progress=on_progress)
        known = wnids if wnids and set(source.classes) <= set(wnids) else classes
        class_map = None if source.classes == tuple(known) else match_classes(source.classes, known)
        return LabelledData(source, class_map, skipped, str(given))
    is_folder = data.path and given.is_dir() and data.kind in ("auto", "folder") and not (is_arrays or is_cifar)
    held = split_folders(given, data.splits).val if is_folder else []
    if is_folder and (held or is_new):
        folder = inside(given / held[0]) if held else given
        names = {spelled(name) for name in list_folder(folder)[0]}
        known = wnids if wnids and names <= set(wnids) else classes
        found, skipped = open_folder(folder, known, data, on_progress=on_progress)
        return LabelledData(found, None, skipped, str(folder))
    splits = open_data(data, on_progress=on_progress)
    class_map = None if splits.classes == tuple(classes) else match_classes(splits.classes, classes)
    return LabelledData(splits.val, class_map, splits.skipped, f"held-out part of {data.path or data.kind}")


def read_real_labels(path: str | Path, names: Sequence[str], num_classes: int = 1000) -> list[list[int]]:
    """ReaL labels (github.com/google-research/reassessed-imagenet, real.json) for images called `names`.

    The file is a list of lists of classes, in the order of ILSVRC2012_val_00000001 to ..._00050000; the numbers are
    looked up in `names`. Raises ValueError for another kind of file or name, FileNotFoundError.
    """
    path = Path(path)
    try:
        labels = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); ReaL's real.json is a list of lists of class numbers"
        ) from error
    if not isinstance(labels, list) or not all(
        isinstance(entry, list) and all(type(label) is int and 0 <= label < num_classes for label in entry)
        for entry in labels
    ):
        raise ValueError(
            f"{path} is not ReaL's real.json: that is a list of lists of class numbers 0 to {num_classes - 1}"
        )
    chosen = []
    for name in names:
        match = re.search(r"ILSVRC2012_val_(\d{8})", name)
        if match is None or not 1 <= int(match[1]) <= len(labels):
            raise ValueError(
                f"ReaL labels go by the image's number, ILSVRC2012_val_00000001 to ILSVRC2012_val_{len(labels):08d}; "
                f"{name!r} is none of these. Evaluate the ImageNet validation images under their own names, or leave --real out"
            )
        chosen.append(labels[int(match[1]) - 1])
    return chosen
