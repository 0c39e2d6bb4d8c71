"""What label maps cost: bytes an image, reading, writing, and generating them against the annotator's bare forward pass."""

from __future__ import annotations

import dataclasses
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from volo.annotation.annotator import Annotator, draw_label_maps, load_annotator
from volo.annotation.generate import annotate
from volo.annotation.store import Part, open_part
from volo.bench.timing import setting
from volo.config import AnnotatorConfig, DataConfig
from volo.data.label_maps import Block, LabelMaps, ShardWriter, write_index
from volo.data.map_codec import COMPACT_STEP, ENCODINGS, Encoding
from volo.data.sources import ImageSource
from volo.data.transforms import PixelPipeline, height_width, squash_transform
from volo.distributed import World
from volo.inference.evaluate import AMP_DTYPES
from volo.inference.model_source import LoadedModel

STORED = 4096
"""Maps that reading, writing and sizes are measured with, at most."""


def bench_labels(
    annotator: str,
    data: str,
    *,
    weights: str | Path | None = None,
    img_size: int | None = None,
    top: int = 5,
    batch_size: int = 64,
    pictures: int = 2048,
    part: Part = "train",
    rounds: int = 5,
    amp: Literal["off", "bf16", "fp16"] = "off",
    device: str = "cpu",
) -> dict[str, Any]:
    """Generates the maps of `images` images of `part`, in turns with forward passes over as many.

    Both run in one process. The bare forward is the classifier on ready, normalised batches on the device, with the same
    autocast. Generating is all of `annotate` between the first and the last map: loading, scaling, the head at each
    position, picking the best, encoding, writing.

    Returns a dict with a row for either (images a second: the median and all `rounds`), the `ratios` of the rounds, and
    for each encoding a row with bytes an image, index included, the bytes of the largest record, maps written and read a
    second by one process (read in random order by name, decoded), and how far compact ones are off: logits, and
    probabilities of the best `top` at most and in the mean.
    """
    where = torch.device(device)
    how = AnnotatorConfig(
        model=annotator, weights=str(weights or ""), img_size=img_size or 0, top=top, amp=amp, batch_size=batch_size
    )
    loaded, its_data = load_annotator(how, where), DataConfig(path=data)
    drawn_rates, bare_rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        sources = _first(dataclasses.replace(its_data, img_size=loaded.preprocessing.img_size), part, pictures)
        count = sum(map(len, sources))
        warm_up = [sources[0].select(range(min(4 * batch_size, len(sources[0]))))]  # type: ignore[attr-defined]
        for turn in range(rounds + 1):
            out = Path(folder) / f"store{turn}"
            chosen = sources if turn else warm_up
            report = annotate(loaded, how, its_data, out, world=World(0, 1, where), part=part, sources=chosen)
            bare = _bare_rate(loaded, sources[0], count if turn else len(warm_up[0]), batch_size, amp, where)
            if turn:
                drawn_rates.append(report["pictures_per_second"])
                bare_rates.append(bare)
        maps = LabelMaps.open(out)
        source = sources[0].select(range(min(STORED, len(sources[0]))))  # type: ignore[attr-defined]
        scores, classes = _logits(loaded, source, top, batch_size, where)
        rows: list[dict[str, Any]] = [
            {
                "candidate": "volo annotate",
                "pictures_per_second": statistics.median(drawn_rates),
                "rounds": drawn_rates,
            },
            {"candidate": "bare forward", "pictures_per_second": statistics.median(bare_rates), "rounds": bare_rates},
        ]
        ratios = [drawn / bare for drawn, bare in zip(drawn_rates, bare_rates)]
        rows += [
            _store_row(Path(folder) / encoding, encoding, list(source.names), scores, classes, maps.num_classes)
            for encoding in ENCODINGS
        ]
    return {
        "what": "label maps",
        "annotator": annotator,
        "data": Path(data).name,
        "img_size": list(height_width(loaded.preprocessing.img_size)),
        "grid": list(maps.grid),
        "top": top,
        "num_classes": maps.num_classes,
        "pictures": count,
        "part": part,
        "stored_pictures": len(source),
        "batch_size": batch_size,
        "amp": amp,
        "rounds": rounds,
        **setting(where),
        "of_bare_forward": statistics.median(ratios),
        "ratios": ratios,
        "rows": rows,
    }


def _first(data: DataConfig, part: Part, count: int) -> list[ImageSource]:
    """The first `count` images."""
    chosen: list[ImageSource] = []
    for source in open_part(data, part)[1]:
        chosen.append(source.select(range(min(count, len(source)))))  # type: ignore[attr-defined]
        count -= len(chosen[-1])
    return [source for source in chosen if len(source)]


def _bare_rate(
    loaded: LoadedModel[Any], source: ImageSource, count: int, batch_size: int, amp: str, device: torch.device
) -> float:
    transform, pixels = squash_transform(loaded.preprocessing), PixelPipeline(loaded.preprocessing).to(device).eval()
    images = torch.stack([transform(source.load(i)) for i in range(min(batch_size, len(source)))]).to(device)
    ready, seconds, done = pixels(images), 0.0, 0
    while done < count:
        batch = ready[: count - done]
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            loaded.model(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - start
        done += len(batch)
    return done / seconds


def _logits(
    loaded: LoadedModel[Any], source: ImageSource, top: int, batch_size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, top, h, w] and their classes, as generated."""
    transform, pixels = squash_transform(loaded.preprocessing), PixelPipeline(loaded.preprocessing).to(device).eval()
    scores, classes = [], []
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        images = torch.stack([transform(source.load(i)) for i in range(start, stop)])
        drawing = draw_label_maps(Annotator(loaded.model), pixels(images.to(device)), top=top)
        scores.append(drawing.scores.cpu().numpy())
        classes.append(drawing.classes.cpu().numpy())
    return np.concatenate(scores), np.concatenate(classes)


def _store_row(
    folder: Path, encoding: Encoding, names: list[str], scores: np.ndarray, classes: np.ndarray, num_classes: int
) -> dict[str, Any]:
    folder.mkdir()
    start = time.perf_counter()
    writer, largest = ShardWriter(folder, 0), 0
    for low in range(0, len(names), 64):
        block = Block()
        for i in range(low, min(low + 64, len(names))):
            block.add(names[i], scores[i], classes[i], encoding, 0)
        writer.append(block)
        largest = max(largest, *map(len, block.records))
    writer.finish()
    header = {"top": scores.shape[1], "grid": scores.shape[2:], "num_classes": num_classes, "classes": []}
    write_index(folder, {**header, "encoding": encoding, "annotator": {"crop": "squash"}}, 1)
    written = len(names) / (time.perf_counter() - start)
    maps, order = LabelMaps.open(folder), list(names)
    random.Random(0).shuffle(order)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for name in order:
            maps[name]
        rates.append(len(order) / (time.perf_counter() - start))
    read = maps.read_batch(names)[0].float()
    truth = torch.from_numpy(scores)
    error = (read.softmax(dim=1) - truth.softmax(dim=1)).abs()
    return {
        "candidate": encoding,
        "bytes_per_picture": sum(path.stat().st_size for path in folder.iterdir()) / len(names),
        "largest_record": largest,
        "written_per_second": written,
        "read_per_second": statistics.median(rates),
        "largest_logit_error": float((read - truth).abs().max()),
        "logit_error_bound": COMPACT_STEP / 2 if encoding == "compact" else None,
        "largest_probability_error": float(error.max()),
        "mean_probability_error": float(error.mean()),
    }
