"""How good a model is on labelled data: one flow for classifiers and segmentation models, from names to a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from volo.config import DataConfig, Size
from volo.data.classes import match_classes
from volo.data.decode import BadImage
from volo.data.loader import EvalLoader, MaskEvalLoader
from volo.data.masks import open_split
from volo.data.sources import FolderSource, ImageSource, Progress
from volo.data.tables import open_all_table, open_targets
from volo.data.transforms import PixelPipeline
from volo.inference.evaluate import MirrorAveraged, open_labelled, read_real_labels
from volo.inference.evaluate import evaluate as evaluate_classifier
from volo.inference.model_source import LoadedModel, load
from volo.inference.segment import how_to_test
from volo.inference.segment_evaluate import HowToTest, evaluate_segmentation
from volo.inference.table import MirrorMean, evaluate_table
from volo.inference.wrong import WrongAnswer, WrongAnswers

OnProgress = Callable[[str, int, int], None]
"""`on_progress(what, done, total)`."""


def evaluate(
    model: LoadedModel[Any] | str | Path,
    data: str | Path | None = None,
    *,
    real: str | Path | None = None,
    split: str = "",
    window: Size | None = None,
    stride: Size | None = None,
    scales: Sequence[float] = (),
    flip: bool = False,
    object_value: int | None = None,
    batch_size: int = 0,
    device: torch.device | str | None = None,
    amp: str = "off",
    on_bad_image: Literal["error", "skip"] = "error",
    on_progress: OnProgress | None = None,
    on_skipped: Callable[[BadImage], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    wrong: int = 0,
    on_wrong: Callable[[ImageSource, list[WrongAnswer]], None] | None = None,
) -> dict[str, Any]:
    """Score a model on labelled images.

    Args:
        model: as `volo.load` gives it, or what that takes.
        data: as in `open_labelled` for classifiers, a segmentation data set for segmentation models, a table with the
            same columns for models of task "table" (of a split column the held-out part); None: the images held out from
            the training.
        real: ReaL labels of ImageNet (`read_real_labels`), scored beside the others; for classifiers.
        split: which images, "test" for instance; for segmentation models, as are `window`, `stride` and `scales`
            (`volo.inference.segment.how_to_test`).
        flip: average the answers with those of the mirror images.
        object_value: for segmentation models of two classes: the value of the object in the masks, 1 or 255; None: that of
            the masks it learned from, and masks that seem to contradict it are refused.
        batch_size: images, or windows, at once; 0: 32 images, or 1 window.
        device: where the model is to run; None: where it is, and the CPU for one that is loaded here.
        on_bad_image: images that cannot be decoded: an error that names them all, or left out (`on_skipped` hears of
            each).
        on_note: hears what was understood of a segmentation data set.
        wrong: list so many wrong answers, surest first; for classifiers.
        on_wrong: is called with the images and this list.

    Returns a report of plain numbers, strings and lists: "model", "data" and "classes", how images were prepared, and the
    figures of `ClassificationMetrics.compute`, `SegmentationMetrics.compute` or `volo.inference.table.table_figures`; with
    `wrong`, "wrong" as well.
    Raises ValueError for options of the other task, data that does not fit, and answers that are not finite;
    FileNotFoundError.
    """
    loaded = model if isinstance(model, LoadedModel) else load(model, device=device or "cpu")
    device = loaded.device if device is None else torch.device(device)
    say = on_progress or (lambda what, done, total: None)

    def checking(done: int, total: int) -> None:
        say("checking images", done, total)

    preprocessing = dataclasses.replace(loaded.preprocessing, on_bad_image=on_bad_image)
    run: dict[str, Any] = {"num_classes": len(loaded.classes), "device": device, "amp": amp}
    described: dict[str, Any] = {"model": loaded.origin}
    if wrong < 0:
        raise ValueError(f"the number of wrong answers to list is 0 or more; given: {wrong}")
    answers: WrongAnswers | None = None
    source: ImageSource | None = None
    if loaded.task == "segment":
        if real is not None:
            raise ValueError("ReaL labels are for classifiers; segmentation models take window, stride and scales")
        if wrong:
            raise ValueError(f"wrong answers are listed for classifiers, and {loaded.origin} is a segmentation model")
        segment = loaded.segment
        # As of classes: of data without splits that is not that of the training everything is scored.
        own = preprocessing.path and Path(preprocessing.path).expanduser().resolve()
        is_new = not split and data is not None and Path(data).expanduser().resolve() != own
        if data is not None:  # another layout than that of the training, and classes in another order, are fine
            preprocessing = dataclasses.replace(preprocessing, path=str(data))
            segment = dataclasses.replace(segment, layout="auto", num_classes=0, object_value=-1)
        split = split or segment.val_split
        if object_value is not None:
            segment = dataclasses.replace(segment, object_value=object_value)
        default = HowToTest.of_file(loaded.model) or HowToTest.from_config(segment, preprocessing.img_size)
        how = how_to_test(default, window=window, stride=stride, scales=scales, flip=flip) or default
        masked, skipped = open_split(
            preprocessing,
            segment,
            split,
            known=(loaded.classes, loaded.colours),
            learned=loaded.object_value,
            draw=not is_new,
            on_progress=checking,
            on_note=on_note,
        )
        names, count = masked.classes.names, len(masked)
        described |= {"data": f"{'all' if masked.is_all else split} of {preprocessing.path}", "test": str(how)}
        score = partial(
            evaluate_segmentation,
            loaded.model,
            MaskEvalLoader(masked, preprocessing, segment, batch_size=1),
            PixelPipeline(preprocessing).to(device),
            how=how,
            batch_size=batch_size or 1,
            class_map=None if names == loaded.classes else match_classes(names, loaded.classes),
            **run,
        )
    else:
        if object_value is not None:
            raise ValueError(f"object_value is for the masks of segmentation models, which {loaded.origin} is not")
        if split or window is not None or stride is not None or scales:
            raise ValueError(
                f"split, window, stride and scales are for segmentation models, which {loaded.origin} is not"
            )
        described |= {"img_size": preprocessing.img_size, "crop_pct": preprocessing.crop_pct, "flip": flip}
    if loaded.task == "table":
        if real is not None:
            raise ValueError("ReaL labels are for classifiers of ImageNet")
        if wrong:
            raise ValueError(
                f"wrong answers are listed for classifiers, and {loaded.origin} is a model of task 'table'"
            )
        rows, skipped, what = _open_rows(data, preprocessing, loaded, checking)
        count = len(rows)
        described["data"] = what
        score = partial(
            evaluate_table,
            MirrorMean(loaded.model) if flip else loaded.model,
            EvalLoader(rows, preprocessing, batch_size=batch_size or 32),
            PixelPipeline(preprocessing).to(device),
            targets=loaded.targets,
            device=device,
            amp=amp,
            number_loss=loaded.number_loss,
        )
    elif loaded.task == "classify":
        labelled = open_labelled(data, preprocessing, loaded.classes, loaded.wnids, on_progress=checking)
        source, skipped, count = labelled.source, labelled.skipped, len(labelled.source)
        answers = WrongAnswers(wrong) if wrong else None
        described["data"] = labelled.what
        score = partial(
            evaluate_classifier,
            MirrorAveraged(loaded.model) if flip else loaded.model,
            EvalLoader(source, preprocessing, batch_size=batch_size or 32),
            PixelPipeline(preprocessing).to(device),
            class_map=labelled.class_map,
            label_sets=None if real is None else read_real_labels(real, source.names, len(loaded.classes)),
            on_logits=answers.add if answers is not None else None,
            **run,
        )
    for bad in skipped if on_skipped else ():
        on_skipped(bad)  # type: ignore[misc]
    figures = score(on_batch=lambda done: say("evaluating", done, count))
    if answers is not None and source is not None:
        listed = answers.listed(source, loaded.classes)
        figures["wrong"] = [answer.to_dict() for answer in listed]
        if on_wrong is not None:
            on_wrong(source, listed)
    return {**described, "classes": list(loaded.classes), **figures}


def _open_rows(
    data: str | Path | None, config: DataConfig, loaded: LoadedModel[Any], on_progress: Progress
) -> tuple[FolderSource, list[BadImage], str]:
    """Images of a table to score a model of task "table" on, those left out, and what part of which table that is."""
    given = config.path if data is None else str(data)
    if data is None and not given:
        raise ValueError("this model comes without images; give a table with --data")
    if data is None or Path(given).expanduser().resolve() == Path(config.path).expanduser().resolve():
        splits = open_targets(config, loaded.targets, on_progress)
        return splits.val, splits.skipped, f"held-out part of {given}"
    config = dataclasses.replace(
        config, path=given, kind="auto", splits=config.splits if config.splits == "none" else "auto"
    )
    source, skipped = open_all_table(config, loaded.targets, on_progress)
    return source, skipped, given
