"""Generate the label maps of a data set with any classifier."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from volo.annotation.annotator import Annotator, Drawing, describe, draw_label_maps
from volo.annotation.store import Batch, OnProgress, Part, StoreWriter, open_part, open_writer, silent
from volo.config import AnnotatorConfig, DataConfig
from volo.data.decode import BadImage
from volo.data.label_maps import Block
from volo.data.loader import ListedLoader
from volo.data.map_codec import ENCODINGS, Encoding
from volo.data.sources import DataSplits, ImageSource
from volo.data.transforms import PixelPipeline, eval_transform, height_width, squash_transform
from volo.distributed import World
from volo.inference.evaluate import AMP_DTYPES, match_classes
from volo.inference.model_source import LoadedModel


def annotate(
    loaded: LoadedModel[Any],
    how: AnnotatorConfig,
    data: DataConfig,
    out: str | Path,
    *,
    world: World,
    part: Part = "train",
    shard_size: int = 2048,
    resume: bool = False,
    overwrite: bool = False,
    sources: Sequence[ImageSource] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Generate the label map of every image into `out`; all processes of `world` call this.

    Args:
        loaded: the annotator, as `load_annotator` loads it by `how`, on the device of `world`.
        data: where the images lie and how they are split and read; size and normalisation are the annotator's.
        part: which of them.
        shard_size: images in a file.
        sources: these images, and not what lies at `data.path`.

    Returns what the first process reports: images, skipped and ignored files, agreement with the labels, bytes, speed.
    Raises ValueError for settings that make no sense, for a folder that holds something else, for another annotator or
    other data than those `out` was begun with, and, naming them all at the end, for images that cannot be decoded.
    """
    annotator, say = Annotator(loaded.model), on_progress or silent
    _check(how, annotator.num_classes)
    its, device = loaded.preprocessing, world.device
    if sources is None:
        # The handwritten digits are enlarged to the size that is asked for.
        splits, sources = open_part(dataclasses.replace(data, img_size=its.img_size), part, say)
    else:
        splits = DataSplits(sources[0], sources[-1], tuple(sources[0].classes))
    classes, class_of = _shared_classes(loaded, annotator.num_classes, splits.classes)
    header = {
        "top": how.top,
        "grid": list(annotator.grid(*height_width(its.img_size))),
        "num_classes": annotator.num_classes,
        "classes": list(classes),
        "encoding": how.encoding,
        "annotator": {
            **describe(loaded, how),
            "flip": how.flip,
            "amp": how.amp,
            "batch_size": how.batch_size,
            "device": device.type,
        },
    }
    transform = squash_transform(its) if how.crop == "squash" else eval_transform(its)
    pixels, seconds = PixelPipeline(its).to(device).eval(), 0.0

    def look(images: Tensor) -> Drawing:
        with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[how.amp], enabled=how.amp != "off"):
            ready = pixels(images.to(device, non_blocking=True))
            return draw_label_maps(annotator, ready, top=how.top, flip=how.flip)

    options: dict[str, Any] = {"shard_size": shard_size, "resume": resume, "overwrite": overwrite, "say": say}
    with open_writer(out, header, sources, splits, data=data, part=part, world=world, **options) as writer:
        for number, source in enumerate(sources):
            if not (batches := writer.batches(number, source, how.batch_size)):
                continue
            start, seen, total = time.perf_counter(), 0, sum(batch.size for batch in batches)
            with _Storing(writer, source, how.encoding, class_of) as storing:
                loader = ListedLoader(
                    source,
                    transform,
                    [batch.indices for batch in batches],
                    num_workers=data.num_workers,
                    pin_memory=device.type == "cuda",
                )
                for batch, (read, bad) in zip(batches, loader):
                    bad = batch.gone + bad
                    if writer.accepts(batch, bad):
                        storing.put(batch, read, look(read["image"]) if len(read["index"]) else None, bad)
                    seen += batch.size
                    say("annotating", seen, total)
            seconds += time.perf_counter() - start
        return writer.finish(seconds)


class _Storing:
    """Another thread that encodes and stores batches while the annotator looks at the next ones; raises its errors."""

    MOST_WAITING = 4
    """Batches on their way to the disk; with more the annotator waits."""

    def __init__(self, writer: StoreWriter, source: ImageSource, encoding: Encoding, class_of: Tensor | None) -> None:
        self.writer, self.source, self.encoding, self.class_of = writer, source, encoding, class_of
        self.thread, self.waiting = ThreadPoolExecutor(1), deque[Future[None]]()

    def __enter__(self) -> _Storing:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            while self.waiting and kind is None:
                self.waiting.popleft().result()
        finally:
            self.thread.shutdown(cancel_futures=True)

    def put(self, *batch: Any) -> None:
        self.waiting.append(self.thread.submit(self._store, *batch))
        if len(self.waiting) > self.MOST_WAITING:
            self.waiting.popleft().result()

    def _store(self, batch: Batch, read: dict[str, Tensor], drawing: Drawing | None, bad: list[BadImage]) -> None:
        block = Block(skipped=[(item.name, item.reason) for item in bad])
        if drawing is not None:
            scores, classes = drawing.scores.cpu().numpy(), drawing.classes.cpu().numpy()
            for i, (index, fingerprint) in enumerate(zip(read["index"].tolist(), read["fingerprint"].tolist())):
                block.add(self.source.names[index], scores[i], classes[i], self.encoding, fingerprint)
            if self.class_of is not None:
                label = self.class_of[read["target"]]
                right = drawing.mean_logits.argmax(dim=1).cpu() == label
                at_position = torch.from_numpy(classes[:, 0]) == label[:, None, None]
                block.tally = [len(label), int(right.sum()), at_position.numel(), int(at_position.sum())]
        self.writer.append(batch, block)


def _check(how: AnnotatorConfig, num_classes: int) -> None:
    if not 1 <= how.top <= num_classes:
        raise ValueError(
            f"--top is {how.top}; the annotator has {num_classes} classes, so it is from 1 to {num_classes}"
        )
    if how.batch_size < 1:
        raise ValueError(f"the batch size is at least 1; given: {how.batch_size}")
    if how.encoding not in ENCODINGS or how.amp not in AMP_DTYPES:
        raise ValueError(
            f"encoding is one of {', '.join(ENCODINGS)} and amp one of {', '.join(AMP_DTYPES)}; given: {how.encoding}, {how.amp}"
        )


def _shared_classes(
    loaded: LoadedModel[Any], num_classes: int, data: Sequence[str]
) -> tuple[tuple[str, ...], Tensor | None]:
    """Names of the annotator's classes, in the words of the data if possible, and its class for each class of the data
    (None: it knows others)."""
    classes = loaded.classes
    if loaded.wnids and set(data) <= set(loaded.wnids):
        classes = loaded.wnids
    elif not classes and num_classes == len(data):
        classes = tuple(data)
    elif not classes:
        return tuple(map(str, range(num_classes))), None
    try:
        return classes, torch.tensor(match_classes(data, classes))
    except ValueError:
        return classes, None
