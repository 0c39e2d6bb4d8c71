"""Check a store of label maps against itself and against the images that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from volo.annotation.store import OnProgress, damaged_shards, open_part, silent
from volo.config import DataConfig
from volo.data.decode import BadImageError
from volo.data.label_maps import INDEX, LabelMaps, shard_path


@dataclass(frozen=True)
class Problem:
    """Something wrong with a store, or between it and the images."""

    kind: Literal["missing", "extra", "corrupt", "mismatched", "unreadable"]
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: {self.what}"


def check_store(
    path: str | Path, data: str, *, with_pictures: bool = True, on_progress: OnProgress | None = None
) -> list[Problem]:
    """Everything that is wrong with a store and its images; every map is read and looked at.

    missing: an image without a map. extra: a map without an image. corrupt: bytes that are not as they were written.
    mismatched: a map that is none of this store's kind, or whose image has changed since (`with_pictures`).
    unreadable: an image with a map that cannot be decoded any more.
    Raises FileNotFoundError where there is no store, ValueError for data that cannot be opened.
    """
    path, say = Path(path), on_progress or silent
    try:
        maps = LabelMaps.open(path)
    except ValueError as error:
        lost = "how the maps were generated is lost with it: --overwrite generates them anew"
        return [Problem("corrupt", INDEX, f"{error}; {lost}")]
    problems = [
        Problem("corrupt", shard_path(path, number).name, f"{error}; --resume generates its maps again")
        for number, _, error in damaged_shards(path, [(s.bytes, s.checksum) for s in maps.shards], say)
    ]
    for i, name in enumerate(maps.names):
        try:
            scores, classes = maps[name]
        except ValueError as error:
            problems.append(Problem("corrupt", name, str(error)))
        else:
            if not torch.isfinite(scores).all() or (scores.diff(dim=0) > 0).any():
                problems.append(Problem("mismatched", name, "its logits do not fall from rank to rank"))
            if classes.min() < 0 or classes.max() >= maps.num_classes:
                problems.append(
                    Problem("mismatched", name, f"it has classes beyond the {maps.num_classes} of the store")
                )
        say("checking maps", i + 1, len(maps))
    its = maps.annotator
    # The handwritten digits are enlarged to the size that is asked for.
    where = DataConfig(
        path=data,
        img_size=tuple(its["img_size"]) if its["img_size"] else DataConfig.img_size,
        val_fraction=its["val_fraction"],
        split_seed=its["split_seed"],
        on_bad_image="skip",
    )
    splits, sources = open_part(where, its["part"], say)
    unreadable = {bad.name: bad.reason for bad in splits.skipped}
    left = set(maps.names)
    for source in sources:
        for i, name in enumerate(source.names):
            if name not in left:
                reason = maps.skipped.get(name)
                why = f"it could not be decoded when the maps were generated: {reason}" if reason else "it has no map"
                problems.append(Problem("missing", name, why))
                continue
            left.discard(name)
            if with_pictures:
                try:
                    if source.fingerprint(i) != maps.fingerprint(name):
                        problems.append(
                            Problem("mismatched", name, "the image has changed since its map was generated")
                        )
                except BadImageError as error:
                    problems.append(Problem("unreadable", name, error.reason))
                say("comparing images", i + 1, len(source))
    for name in sorted(left):
        if name in unreadable:
            problems.append(Problem("unreadable", name, unreadable[name]))
        else:
            problems.append(Problem("extra", name, f"there is no such image in {data or 'the data'}"))
    return problems
