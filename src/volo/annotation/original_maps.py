"""Label maps as the original tool of token labeling stores them, a file CLASS/NAME.pt for each image: read and imported."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from volo.annotation.annotator import check_view
from volo.annotation.store import OnProgress, Part, open_part, open_writer, silent
from volo.config import DataConfig, Size
from volo.data.decode import BadImage, BadImageError
from volo.data.label_maps import Block
from volo.data.map_codec import Encoding
from volo.data.transforms import height_width
from volo.distributed import World

FIRST_INEXACT = 2049
"""float16 has 11 bits: from here on it cannot tell neighbouring whole numbers apart."""


class OriginalMapError(ValueError):
    """A file that is missing or holds no label map; the message says which and why."""


def find_original_map(folder: Path, name: str) -> Path | None:
    """The file for an image called `name`, or None.

    The original drops all but the last folder of a path, and everything from the first dot on; a file that keeps more of
    the name is preferred, since it cannot belong to another image.
    """
    picture = PurePosixPath(name)
    last = PurePosixPath(*picture.parts[-2:])
    for candidate in (picture, last):
        for stem in (candidate.with_suffix(""), candidate.with_name(candidate.name.split(".")[0] or candidate.name)):
            path = folder / f"{stem}.pt"
            if path.is_file():
                return path
    return None


def read_original_map(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [top, h, w] (float16 or float32), falling, and classes int64 [top, h, w]; no code in the file is run.

    Raises OriginalMapError for a file that is no tensor [2, top, h, w] of scores and class indices, for classes beyond
    `num_classes`, and for classes that float16 has blurred.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise OriginalMapError(
            f"{path} is damaged, or holds more than tensors; it is not opened, because such a file can run code"
        ) from error
    except Exception as error:  # damage may look like anything to the unpickler
        raise OriginalMapError(f"{path} is damaged or cut off ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, Tensor) or content.dim() != 4 or content.shape[0] != 2 or not content.numel():
        found = f"a tensor {list(content.shape)}" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        raise OriginalMapError(f"{path} holds {found}; a label map of the original is a tensor [2, top, h, w]")
    scores, indices = content[0].detach(), content[1].double()
    if not (torch.isfinite(content).all() and (indices == indices.round()).all() and indices.min() >= 0):
        raise OriginalMapError(f"{path} holds numbers that are no logits and class indices")
    largest = int(indices.max())
    # 2049 rounds to 2048, which is therefore one class only where there is no class 2049.
    is_blurred = largest >= FIRST_INEXACT or (largest == FIRST_INEXACT - 1 and num_classes > FIRST_INEXACT)
    if content.dtype == torch.float16 and is_blurred:
        raise OriginalMapError(
            f"{path} has the class index {largest}, stored as float16, which is exact only to 2048: above, 2049 became 2048, "
            "from 4096 on only multiples of 4 are left, and so on. Which class was meant is lost, here and in every file of "
            "that annotator. Generate the maps anew: volo annotate stores whole numbers"
        )
    if largest >= num_classes:
        raise OriginalMapError(f"{path} has the class index {largest}, but the data has {num_classes} classes")
    ranked = scores.float().sort(dim=0, descending=True, stable=True)
    kept = ranked.values.to(torch.float16) if content.dtype == torch.float16 else ranked.values
    return kept.numpy(), indices.long().gather(0, ranked.indices).numpy()


def import_original(
    folder: str | Path,
    data: DataConfig,
    out: str | Path,
    *,
    part: Part = "train",
    encoding: Encoding = "exact",
    crop: float | Literal["squash"] = 1.0,
    img_size: Size = 0,
    batch_size: int = 64,
    shard_size: int = 2048,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Pack the original's label maps (a file CLASS/NAME.pt for each image of `data`) into a store.

    crop: what part of an image a map is of: crop_pct of a centre crop, or "squash" for the whole image. The original's
        are of the centre square (--img-size 576 --crop-pct 1.0 in its instructions).
    img_size: what the annotator saw; 0: 32 pixels for each position.

    Raises ValueError as `volo.annotation.generate.annotate` does; missing and unusable files are named, all of them, and
    with `data.on_bad_image` "skip" left out. Files that belong to no image are reported as "unused".
    """
    folder, say = Path(folder), on_progress or silent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; the original's label maps are CLASS/NAME.pt below one")
    check_view(crop, img_size)
    splits, sources = open_part(data, part, say)
    found = [[find_original_map(folder, name) for name in source.names] for source in sources]
    there = [path for paths in found for path in paths if path is not None]
    if not there:
        raise ValueError(
            f"no label map in {folder} belongs to an image of {data.path}: {sources[0].names[0]} would have "
            f"{Path(sources[0].names[0]).with_suffix('.pt')}"
        )
    num_classes = len(splits.classes)
    shape = _first_shape(there, num_classes)
    header = {
        "top": shape[0],
        "grid": list(shape[1:]),
        "num_classes": num_classes,
        "classes": list(splits.classes),
        "encoding": encoding,
        "annotator": {
            "model": "imported from the original's files",
            "weights": folder.resolve().name,
            "img_size": list(height_width(img_size or (32 * shape[1], 32 * shape[2]))),
            "crop": crop if crop == "squash" else float(crop),
            "flip": None,
        },
    }

    def read(path: Path | None, name: str) -> tuple[np.ndarray, np.ndarray] | BadImage:
        if path is None:
            return BadImage(name, f"no label map in {folder}")
        try:
            scores, classes = read_original_map(path, num_classes)
        except OriginalMapError as error:
            return BadImage(name, str(error))
        if scores.shape != shape:
            return BadImage(name, f"{path} holds {scores.shape}, where the first map that can be read has {shape}")
        return scores, classes

    world = World(0, 1, torch.device("cpu"))
    options: dict[str, Any] = {"shard_size": shard_size, "resume": resume, "overwrite": overwrite, "say": say}
    with (
        open_writer(out, header, sources, splits, data=data, part=part, world=world, **options) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        start, done, total = time.perf_counter(), 0, sum(map(len, sources))
        for number, source in enumerate(sources):
            for batch in writer.batches(number, source, batch_size):
                block, bad, kept = Block(), list(batch.gone), batch.indices.tolist()
                names = [source.names[i] for i in kept]
                for i, name, result in zip(kept, names, pool.map(read, [found[number][i] for i in kept], names)):
                    if isinstance(result, BadImage):
                        bad.append(result)
                        continue
                    scores, best = result
                    try:
                        block.add(name, scores, best, encoding, source.fingerprint(i))
                    except BadImageError as error:
                        bad.append(BadImage(error.name, error.reason))
                        continue
                    except ValueError as error:
                        bad.append(BadImage(name, str(error)))
                        continue
                    label = int(source.targets[i])
                    means = np.bincount(best.ravel(), scores.ravel(), minlength=num_classes)
                    own = [1, int(means.argmax() == label), best[0].size, int((best[0] == label).sum())]
                    block.tally = [a + b for a, b in zip(block.tally, own)]
                block.skipped = [(item.name, item.reason) for item in bad]
                if writer.accepts(batch, bad):
                    writer.append(batch, block)
                done += batch.size
                say("importing", done, total)
        report = writer.finish(time.perf_counter() - start)
    used = {path for paths in found for path in paths}
    return report | {"unused": sorted(str(p.relative_to(folder)) for p in folder.rglob("*.pt") if p not in used)}


def _first_shape(paths: Sequence[Path], num_classes: int) -> tuple[int, ...]:
    """Of the first of the original's maps that can be read. Raises ValueError, naming them all, where none can."""
    errors = []
    for path in paths:
        try:
            return read_original_map(path, num_classes)[0].shape
        except OriginalMapError as error:
            errors.append(f"  {error}")
    raise ValueError("\n".join([f"none of the {len(errors)} label maps can be used:", *errors]))
