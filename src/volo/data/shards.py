"""Images in tar shards, as WebDataset packs them: members KEY.jpg and KEY.cls (or KEY.json), read in any order.

A shard is gone through once, header by header (nothing is unpacked), and what lies where is kept in a small index file
beside it, or in the cache where its folder cannot be written to. An image is then one read at a known place, so that
shards are read like a folder: any order, any share of it for a process, any step to resume from.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from volo.config import DataConfig, nearest
from volo.data.classes import agreed, read_class_list
from volo.data.decode import BadImage, decode_image
from volo.data.shard_index import ShardFiles, ShardIndex, tried_indexes
from volo.data.sources import (
    LAYOUTS,
    DataSplits,
    Names,
    PixelCache,
    Progress,
    Share,
    cache_budget,
    in_parallel,
    raise_bad,
    split_by_seed,
)
from volo.data.splits import WAY_OUT, Parts, role, split_files
from volo.data.walk import list_folder, spelled

MAX_UNLISTED_CLASSES = 1_000_000
"""A class number above this without a classes.txt is a mistake, and would make a list of so many classes."""


@dataclass(frozen=True, eq=False)
class TarSource:
    """Image files inside tar shards, decoded when asked for, unless `cache` holds the pixels.

    `names` are the members' paths, or what KEY.json calls "name" (`volo pack` writes there what the image was called
    before), unique over the source.
    """

    files: ShardFiles
    shard: np.ndarray
    """int32 [N]: number of the shard in `files`."""
    offsets: np.ndarray
    """int64 [N]: first byte in the shard."""
    sizes: np.ndarray
    """int64 [N]: bytes."""
    targets: Tensor
    names: Sequence[str]
    classes: tuple[str, ...]
    cache: PixelCache | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Tensor:
        if self.cache is not None:
            return self.cache[index]
        return decode_image(self.read(index), self.names[index])

    def read(self, index: int) -> bytes:
        """The image file as it is. Raises BadImageError."""
        return self.files.read(
            int(self.shard[index]), int(self.offsets[index]), int(self.sizes[index]), self.names[index]
        )

    def fingerprint(self, index: int) -> int:
        return zlib.crc32(self.read(index))

    def select(self, indices: Sequence[int]) -> TarSource:
        chosen = np.asarray(indices, np.int64)
        return TarSource(
            self.files,
            self.shard[chosen],
            self.offsets[chosen],
            self.sizes[chosen],
            self.targets[torch.from_numpy(chosen)],
            Names(self.names[i] for i in chosen.tolist()),
            self.classes,
            self.cache and self.cache.select(indices),
        )


def open_shards(config: DataConfig, on_progress: Progress | None = None, share: Share = Share()) -> DataSplits:
    """Training and held-out images of tar shards; see `volo.data.images.open_data`. Raises ValueError."""
    files, parts = find_shards(config.path, config.splits)
    if not parts.train:
        raise ValueError(
            f"data.path is {config.path}: there are held-out shards ({parts.val[0]}, ...) but none for training. "
            f"`volo evaluate` takes such data; a training needs train-*.tar as well. {WAY_OUT}"
        )
    groups = [[files[name] for name in names] for names in (parts.train, parts.val)]
    (train, val), classes, skipped, notes = _open(groups, config, on_progress, share)
    train_source, val_source = (train, val) if parts.val else split_by_seed(train, config)
    if parts.ignored:
        notes.insert(0, f"ignored {len(parts.ignored)} tar files of {config.path}: {_first(parts.ignored)}")
    what = f"{_first(parts.train)} and {_first(parts.val)}" if parts.val else ""
    return DataSplits(train_source, val_source, classes, skipped, notes, parts=what)


def open_all_shards(
    path: str | Path, config: DataConfig, *, on_progress: Progress | None = None
) -> tuple[TarSource, list[BadImage]]:
    """All images of tar shards in one source (evaluation), and what was left out: of shards for training and held-out
    ones the latter, of anything else everything. Raises ValueError as `open_data` does.
    """
    files, parts = find_shards(str(path), config.splits)
    chosen = [files[name] for name in parts.val or parts.train]
    (source,), _, skipped, _ = _open([chosen], config, on_progress, Share())
    return source, skipped


def is_shards(path: str | Path, splits: str = "auto") -> bool:
    """Whether `path` names tar shards: a .tar, a list in braces, or a folder of .tar files that is no image folder."""
    text = str(path)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        return text.lower().endswith((".tar", ".tar.gz", ".tgz")) or ("{" in text and not folder.exists())
    folders, tars = list_folder(folder)[0], _tars(folder)
    if any(role(name) and not any(tar.startswith(f"{name}/") for tar in tars) for name in folders):
        return False  # images that were unpacked from tar files which still lie beside them
    named = "auto" if splits == "none" else splits
    return bool(tars) and (not folders or "/" in tars[0] or bool(split_files(tars, named, text).train))


def find_shards(path: str, splits: str = "auto") -> tuple[dict[str, Path], Parts]:
    """The shards that `path` names (a folder, one .tar, or a list in braces) by their names, and which are held out.

    Raises ValueError where there are none, some of a list are missing, or a name may mean both.
    """
    if not path:
        raise ValueError(f"data.path is empty, but data.kind 'tar' needs tar shards.\n{LAYOUTS}")
    place = Path(path).expanduser()
    if place.is_dir():
        files = [place / name for name in _tars(place)]
        if not files:
            raise ValueError(f"data.path is {path}, a folder without .tar files{_compressed_there(place)}.\n{LAYOUTS}")
    else:
        files = [place] if place.exists() else [Path(name).expanduser() for name in expand_braces(path)]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(
                f"data.path is {path}: {len(missing)} of {len(files)} files are not there: {_first(map(str, missing))}"
            )
    common = os.path.commonpath([file.parent for file in files])
    named = {file.relative_to(common).as_posix(): file for file in files}
    parts = split_files(list(named), splits, path)
    return named, parts if parts.train or parts.val else Parts(list(named))


def _tars(folder: Path) -> list[str]:
    """Tar files in a folder, or else in its train/, val/ and the like."""
    folders, files = list_folder(folder)
    inside = [f"{sub}/{name}" for sub in folders if role(sub) for name in list_folder(folder / sub)[1]]
    return [n for n in files if n.lower().endswith(".tar")] or [n for n in inside if n.lower().endswith(".tar")]


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def expand_braces(text: str) -> list[str]:
    """What a shell makes of braces: "a-{08..10}.tar" -> a-08.tar, a-09.tar, a-10.tar; "{a,b}" -> a, b. ValueError."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"data.path is {text}: {{{match[1]}}} counts upwards, {{000..127}}")
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(first, last + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise ValueError(f"data.path is {text}: {match[0]} is neither a range such as {{000..127}} nor a list {{a,b}}")
    return [name for choice in choices for name in expand_braces(text[: match.start()] + choice + text[match.end() :])]


def _compressed_there(folder: Path) -> str:
    squeezed = sorted(file.name for pattern in ("*.tar.*", "*.tgz") for file in folder.glob(pattern))
    return f" (but with {squeezed[0]}: unpack it to a plain .tar first)" if squeezed else ""


def _open(
    groups: list[list[Path]], config: DataConfig, on_progress: Progress | None, share: Share
) -> tuple[list[TarSource], tuple[str, ...], list[BadImage], list[str]]:
    """A source for each group of shards, with classes that hold for all of them; what is left out; notes."""
    paths = [path for group in groups for path in group]
    indexes = tried_indexes(paths, config.check == "full", share, on_progress)
    count = sum(len(index) + sum(bool(b.name) for b in index.bad) for index in indexes)
    notes = [note for path, index in zip(paths, indexes) for note in index.notes(path)]
    bad = [
        BadImage(f"{path.name}: {b.name}" if b.name else path.name, b.reason)
        for path, index in zip(paths, indexes)
        for b in index.bad
    ]
    targets, classes, strangers = _classes(paths, indexes)
    usable = targets >= 0
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index) for index in indexes])
    names, offsets, sizes, pixels = (
        np.concatenate([getattr(index, name) for index in indexes]) for name in ("names", "offsets", "sizes", "pixels")
    )
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])[shard]
    bad += strangers
    for group in range(len(groups)):
        bad += _doubles(np.flatnonzero(group_of == group), names, shard, paths, usable)
    if config.on_bad_image == "error":
        raise_bad(bad, count, paths[0].parent)
    files = ShardFiles(paths)
    sources = []
    for group in range(len(groups)):
        kept = np.flatnonzero((group_of == group) & usable)
        sources.append(
            TarSource(
                files,
                shard[kept],
                offsets[kept],
                sizes[kept],
                torch.from_numpy(targets[kept]),
                Names(os.fsdecode(name) for name in names[kept].tolist()),
                classes,
            )
        )
    budget = {"auto": cache_budget(), "ram": math.inf, "none": 0}[config.cache]
    if 3 * int(pixels[usable].sum()) <= budget and (pixels[usable] > 0).all():
        total, done = sum(map(len, sources)), 0
        for i, source in enumerate(sources):
            pictures = []
            for picture in in_parallel(source.load, range(len(source))):
                pictures.append(picture)
                done += 1
                if on_progress:
                    on_progress(done, total)
            sources[i] = replace(source, cache=PixelCache.of(pictures))
    return sources, classes, bad, notes


def _doubles(
    members: np.ndarray, names: np.ndarray, shard: np.ndarray, paths: Sequence[Path], usable: np.ndarray
) -> list[BadImage]:
    """Names that come twice within a part: the first one stays, `usable` of the others is set to False."""
    unique, first, inverse = np.unique(names[members], return_index=True, return_inverse=True)
    bad = []
    if len(unique) < len(members):
        for position in np.flatnonzero(first[inverse] != np.arange(len(members))).tolist():
            member, other = members[position], members[first[inverse[position]]]
            reason = f"in {paths[shard[other]].name} too; the names of a data set must differ"
            bad.append(BadImage(f"{paths[shard[member]].name}: {os.fsdecode(names[member])}", reason))
            usable[member] = False
    return bad


def _classes(
    paths: Sequence[Path], indexes: Sequence[ShardIndex]
) -> tuple[np.ndarray, tuple[str, ...], list[BadImage]]:
    """Targets int64 [N] over all shards (-1: unusable), class names, and the images whose label is out of place."""
    folder = paths[0].parent
    counts = [len(index) for index in indexes]
    labels, given = (np.concatenate([getattr(index, name) for index in indexes]) for name in ("labels", "classes"))
    if not len(labels):
        held = next((index.ignored for index in indexes if index.ignored), [])
        reasons = "".join(f"\n  {path.name}: {b}" for path, index in zip(paths, indexes) for b in index.bad[:3])
        raise ValueError(
            f"no labelled images in the shards of {folder}"
            + (f"; they hold {', '.join(held[:5])}" if held else "")
            + f". An image is KEY.jpg (png, webp, ...) beside KEY.cls (a class number) or KEY.json{reasons}"
        )
    lists = [
        path for folder in dict.fromkeys(path.parent for path in paths) if (path := folder / "classes.txt").is_file()
    ]
    listed = agreed([(path, read_class_list(path)) for path in lists])
    called, number = np.unique(given, return_inverse=True)
    texts = [spelled(name.decode("utf-8", "surrogateescape")) for name in called.tolist()]
    is_called = given != b""
    if listed is not None:
        names = list(listed)
    elif labels.max() >= MAX_UNLISTED_CLASSES:
        raise ValueError(
            f"the shards in {folder} have class numbers up to {labels.max()}; this many classes need a classes.txt next to them"
        )
    elif not is_called.any():
        names = [str(i) for i in range(int(labels.max()) + 1)]
    elif (labels < 0).all():
        names = sorted(texts)
    elif (labels[is_called] >= 0).all():
        # Some members say both: the number's name.
        by_number: dict[int, str] = {}
        for label, which in {*zip(labels[is_called].tolist(), number[is_called].tolist())}:
            if by_number.setdefault(label, texts[which]) != texts[which]:
                raise ValueError(
                    f"class {label} of the shards in {folder} is called {by_number[label]!r} and {texts[which]!r}; "
                    "say which it is with a classes.txt beside the shards"
                )
        names = [by_number.get(i, str(i)) for i in range(int(labels.max()) + 1)]
    else:
        raise ValueError(
            f"some images of the shards in {folder} have a class number and others only a class name: put a "
            "classes.txt beside the shards, a name on each line from class 0 on"
        )
    if len(names) < 2:
        raise ValueError(f"the shards in {folder} have one class only, {names[0]}; classification needs at least two")
    known = {name: i for i, name in enumerate(names)}
    by_name = np.array([known.get(text, -1) for text in texts], np.int64)[number]
    targets = np.where(labels >= 0, labels, by_name)
    wrong = (targets >= len(names)) | (targets < 0) | ((labels >= 0) & is_called & (by_name != labels))
    starts = np.cumsum([0, *counts])
    strangers = []
    for i in np.flatnonzero(wrong).tolist():
        shard = int(np.searchsorted(starts, i, side="right")) - 1
        path, name, text = paths[shard], os.fsdecode(indexes[shard].names[i - starts[shard]]), texts[number[i]]
        if labels[i] >= len(names):
            reason = f"its class is {labels[i]}, but there are {len(names)} classes, 0 to {len(names) - 1}"
        elif labels[i] < 0:
            reason = f"its class {text!r} is not in classes.txt{nearest(text, known)}"
        else:
            reason = f"its class is {labels[i]}, which is {names[labels[i]]!r}, but its JSON says {text!r}"
        strangers.append(BadImage(f"{path.name}: {name}", reason))
    return np.where(wrong, -1, targets), tuple(names), strangers
