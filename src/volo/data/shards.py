"""Pictures in tar shards, as WebDataset packs them: members KEY.jpg and KEY.cls (or KEY.json), read in any order.

A shard is gone through once, header by header (nothing is unpacked), and what lies where is kept in a small index file
beside it, or in the cache where its folder cannot be written to. A picture is then one read at a known place, so that
shards serve like a folder: any order, any share of it for a process, any step to resume from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from volo.config import DataConfig, nearest
from volo.data.decode import BadImage, BadImageError, decode_image
from volo.data.files import cache_folder, write_atomically
from volo.data.folders import IMAGE_ENDINGS
from volo.data.sources import (
    LAYOUTS,
    VAL_FOLDERS,
    DataSplits,
    ImageSource,
    Names,
    PixelCache,
    Progress,
    cache_budget,
    in_parallel,
    raise_bad,
    split_by_seed,
)

INDEX_FORMAT = 2
INDEX_ENDING = ".volo-index"

MAX_OPEN_SHARDS = 64
"""A process keeps no more shards open than this; the system allows about a thousand files."""

MAX_UNLISTED_CLASSES = 1_000_000
"""A class number above this without a classes.txt is a mistake, and would make a list of so many classes."""

_PART = re.compile(r"(?:.*[-_.])?(train|training|val|validation|valid|test)[-_.]?\d*\.tar", re.IGNORECASE)


# The source


@dataclass(frozen=True, eq=False)
class TarSource:
    """Picture files inside tar shards, decoded when asked for, unless `cache` holds the pixels.

    `names` are the members' paths, or what KEY.json calls "name" (`volo pack` writes there what the picture was called
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
        """The picture file as it is. Raises BadImageError."""
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


class ShardFiles:
    """Reads pieces of files without a file position, so that threads and forked workers may share what is open."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardFiles, (self.paths,)

    def read(self, shard: int, offset: int, size: int, name: str) -> bytes:
        """`size` bytes from `offset` of a shard. Raises BadImageError with `name` where they are not there."""
        file = self._file(shard, name)
        parts, missing = [], size
        while missing:
            part = os.pread(file.descriptor, missing, offset + size - missing)
            if not part:
                raise BadImageError(name, f"{self.paths[shard]} is shorter than when it was indexed")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _file(self, shard: int, name: str) -> _OpenFile:
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None:
                try:
                    file = _OpenFile(self.paths[shard])
                except (FileNotFoundError, PermissionError) as error:
                    raise BadImageError(name, f"{self.paths[shard]}: {(error.strerror or '').lower()}") from None
            self._open[shard] = file
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return file


class _OpenFile:
    """A descriptor that is closed with the last reference: another thread may still read what has been put aside."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# Opening


def open_shards(config: DataConfig, on_progress: Progress | None = None) -> DataSplits:
    """Training and held-out pictures of tar shards; see `volo.data.images.open_data`. Raises ValueError."""
    found = find_shards(config.path)
    if not found.train:
        raise ValueError(
            f"data.path is {config.path}: there are shards of {found.val_name} but none of train. "
            "`volo evaluate` takes such a folder; a training needs train-*.tar as well"
        )
    parts, classes, skipped, notes = _open([found.train, found.val], found.folder, config, on_progress)
    train, val = parts
    train_source: ImageSource
    val_source: ImageSource
    train_source, val_source = (train, val) if found.val else split_by_seed(train, config)
    for source, what in ((train_source, "training"), (val_source, "held-out")):
        counts = torch.bincount(source.targets, minlength=len(classes)).tolist()
        without = [name for name, count in zip(classes, counts) if not count]
        if len(without) == len(classes):
            raise ValueError(f"no {what} picture in {config.path} can be used")
        if without:
            shown = ", ".join(without[:20]) + (", ..." if len(without) > 20 else "")
            notes.append(f"{len(without)} classes have no {what} pictures: {shown}")
    return DataSplits(train_source, val_source, classes, skipped, found.notes + notes)


def open_all_shards(
    path: str | Path, config: DataConfig, *, on_progress: Progress | None = None
) -> tuple[TarSource, list[BadImage]]:
    """All pictures of tar shards in one source (evaluation), and what was left out: of a folder with train-*.tar and
    val-*.tar those of val, of anything else everything. Raises ValueError as `open_data` does.
    """
    found = find_shards(str(path))
    (source,), _, skipped, _ = _open([found.val or found.train], found.folder, config, on_progress)
    return source, skipped


@dataclass(frozen=True)
class FoundShards:
    """Which tar files hold what."""

    folder: Path
    """Where they lie; classes.txt is looked for there."""
    train: list[Path]
    val: list[Path]
    """Empty: there are no held-out shards."""
    val_name: str = ""
    """What they are called, one of VAL_FOLDERS."""
    notes: list[str] = field(default_factory=list)


def is_shards(path: str | Path) -> bool:
    """Whether `path` names tar shards: a .tar, a list in braces, or a folder of .tar files that is no image folder."""
    text = str(path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        tars = list(folder.glob("*.tar"))
        folders = {child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")}
        if folders & {"train", *VAL_FOLDERS}:
            return False  # pictures that were unpacked from tar files which still lie beside them
        return bool(tars) and (not folders or any(_PART.fullmatch(tar.name) for tar in tars))
    return text.lower().endswith((".tar", ".tar.gz", ".tgz")) or ("{" in text and not folder.exists())


def find_shards(path: str) -> FoundShards:
    """The shards that `path` names: a folder, one .tar, or a list in braces. By their names they are train or held out.

    Raises ValueError where there are none, or some of a list are missing.
    """
    if not path:
        raise ValueError(f"data.path is empty, but data.kind 'tar' needs tar shards.\n{LAYOUTS}")
    place = Path(path).expanduser()
    if place.is_dir():
        files, folder = sorted(place.glob("*.tar")), place
        if not files:
            raise ValueError(f"data.path is {path}, a folder without .tar files{_compressed_there(place)}.\n{LAYOUTS}")
    else:
        files = [place] if place.exists() else [Path(name).expanduser() for name in expand_braces(path)]
        missing = [file for file in files if not file.is_file()]
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"data.path is {path}: {len(missing)} of {len(files)} files are not there: {shown}")
        folder = files[0].parent
    parts: dict[str, list[Path]] = {}
    for file in files:
        match = _PART.fullmatch(file.name)
        name = match[1].lower() if match else ""
        parts.setdefault("train" if name == "training" else name, []).append(file)
    val_name = next((name for name in VAL_FOLDERS if name in parts), "")
    if "train" in parts or val_name:
        used = [*parts.get("train", ()), *parts.get(val_name, ())]
        unused = [file.name for file in files if file not in used]
        shown = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        notes = [f"ignored {len(unused)} tar files in {folder}: {shown}"] if unused else []
        return FoundShards(folder, parts.get("train", []), parts.get(val_name, []) if val_name else [], val_name, notes)
    return FoundShards(folder, files, [])


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
    groups: list[list[Path]], folder: Path, config: DataConfig, on_progress: Progress | None
) -> tuple[list[TarSource], tuple[str, ...], list[BadImage], list[str]]:
    """A source for each group of shards, with classes that hold for all of them; what is left out; notes."""
    paths = [path for group in groups for path in group]
    indexes = _indexes(paths, on_progress)
    count = sum(len(index) + sum(bool(b.name) for b in index.bad) for index in indexes)
    indexes = _tried(paths, indexes, on_progress)
    notes = [note for path, index in zip(paths, indexes) for note in index.notes(path)]
    bad = [BadImage(f"{path.name}: {b.name}" if b.name else path.name, b.reason) for path, index in zip(paths, indexes) for b in index.bad]  # fmt: skip
    targets, classes, strangers = _classes(paths, indexes, folder)
    usable = targets >= 0
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index) for index in indexes])
    names = np.concatenate([index.names for index in indexes]) if indexes else np.empty(0, np.bytes_)
    doubles = []
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])[shard]
    for group in range(len(groups)):
        doubles += _doubles(np.flatnonzero(group_of == group), names, shard, paths, usable)
    bad += strangers + doubles
    if config.on_bad_image == "error":
        raise_bad(bad, count, folder)
    offsets, sizes, pixels = (
        np.concatenate([getattr(index, name) for index in indexes]) if indexes else np.empty(0, np.int64)
        for name in ("offsets", "sizes", "pixels")
    )
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
    if 3 * int(pixels[usable].sum()) <= budget:
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
    paths: Sequence[Path], indexes: Sequence[ShardIndex], folder: Path
) -> tuple[np.ndarray, tuple[str, ...], list[BadImage]]:
    """Targets int64 [N] over all shards (-1: unusable), class names, and the pictures whose label is out of place."""
    counts = [len(index) for index in indexes]
    labels = np.concatenate([index.labels for index in indexes]) if indexes else np.empty(0, np.int64)
    given = np.concatenate([index.classes for index in indexes]) if indexes else np.empty(0, np.bytes_)
    if not len(labels):
        held = next((index.ignored for index in indexes if index.ignored), [])
        reasons = "".join(f"\n  {path.name}: {b}" for path, index in zip(paths, indexes) for b in index.bad[:3])
        raise ValueError(
            f"no labelled pictures in the shards of {folder}"
            + (f"; they hold {', '.join(held[:5])}" if held else "")
            + f". A picture is KEY.jpg (png, webp, ...) beside KEY.cls (a class number) or KEY.json{reasons}"
        )
    listed = folder / "classes.txt"
    called, number = np.unique(given, return_inverse=True)
    texts = [name.decode("utf-8", "surrogateescape") for name in called.tolist()]
    is_called = given != b""
    if listed.is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(set(names)) < len(names):
            raise ValueError(f"{listed} names a class twice: {next(n for n in names if names.count(n) > 1)}")
    elif labels.max() >= MAX_UNLISTED_CLASSES:
        raise ValueError(f"a class of the shards in {folder} is {labels.max()}; so many need a classes.txt beside them")
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
            f"some pictures of the shards in {folder} have a class number and others only a class name: put a "
            "classes.txt beside the shards, a name on each line from class 0 on"
        )
    if len(names) < 2:
        raise ValueError(f"the shards in {folder} have one class only, {names[0]}; telling apart needs two")
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
            reason = f"its class {text!r} is not in {listed.name}{nearest(text, known)}"
        else:
            reason = f"its class is {labels[i]}, which is {names[labels[i]]!r}, but its JSON says {text!r}"
        strangers.append(BadImage(f"{path.name}: {name}", reason))
    return np.where(wrong, -1, targets), tuple(names), strangers


# The index of a shard


@dataclass(frozen=True)
class ShardIndex:
    """What lies where in a shard, in the shard's order."""

    names: np.ndarray
    """bytes [n]: member path of the picture, or "name" of its JSON."""
    offsets: np.ndarray
    """int64 [n]: first byte of the picture file in the shard."""
    sizes: np.ndarray
    """int64 [n]: its bytes."""
    labels: np.ndarray
    """int64 [n]: class number; -1: only a name is given."""
    classes: np.ndarray
    """bytes [n]: class name; empty: only a number is given."""
    pixels: np.ndarray
    """int64 [n]: height x width; 0 before the picture was tried."""
    bad: list[BadImage] = field(default_factory=list)
    """What cannot be used; its name is empty where that is the shard itself."""
    ignored: list[str] = field(default_factory=list)
    """Up to 5 members that are neither pictures nor labels."""
    num_ignored: int = 0
    tried: bool = False
    """Every picture has been decoded once."""

    def __len__(self) -> int:
        return len(self.names)

    def notes(self, path: Path) -> list[str]:
        if not self.num_ignored:
            return []
        shown = ", ".join(self.ignored) + (", ..." if self.num_ignored > len(self.ignored) else "")
        return [f"ignored {self.num_ignored} members of {path} that are neither pictures nor labels: {shown}"]

    def without(self, unusable: dict[int, str]) -> ShardIndex:
        """Pictures by their number, with the reason, become `bad`."""
        kept = np.array([i not in unusable for i in range(len(self))], bool)
        bad = [BadImage(os.fsdecode(self.names[i]), reason) for i, reason in unusable.items()]
        return replace(
            self,
            **{name: getattr(self, name)[kept] for name in _ARRAYS},
            bad=[*self.bad, *bad],
        )


_ARRAYS = ("names", "offsets", "sizes", "labels", "classes", "pixels")


def _indexes(paths: Sequence[Path], on_progress: Progress | None) -> list[ShardIndex]:
    indexes: list[ShardIndex] = []
    for i, path in enumerate(paths):
        index = load_index(path)
        if index is None:
            index = build_index(path)
            if on_progress:
                on_progress(i + 1, len(paths))
        indexes.append(index)
    return indexes


def _tried(paths: Sequence[Path], indexes: Sequence[ShardIndex], on_progress: Progress | None) -> list[ShardIndex]:
    """Indexes whose pictures have been tried, and their files, so that the next start is quick."""
    total, done = sum(len(index) for index in indexes if not index.tried), 0
    tried = []
    for path, index in zip(paths, indexes):
        if not index.tried:
            files = ShardFiles([path])

            def attempt(i: int, index: ShardIndex = index, files: ShardFiles = files) -> int | str:
                try:
                    name, offset, size = os.fsdecode(index.names[i]), int(index.offsets[i]), int(index.sizes[i])
                    return math.prod(decode_image(files.read(0, offset, size, name), name).shape[1:])
                except BadImageError as error:
                    return error.reason

            pixels, unusable = index.pixels.copy(), {}
            for i, result in enumerate(in_parallel(attempt, range(len(index)))):
                if isinstance(result, str):
                    unusable[i] = result
                else:
                    pixels[i] = result
                done += 1
                if on_progress:
                    on_progress(done, total)
            index = replace(index, pixels=pixels, tried=True).without(unusable)
            save_index(path, index)
        tried.append(index)
    return tried


def build_index(path: Path) -> ShardIndex:
    """Go through a tar file header by header. Whatever is wrong with it or with a picture ends up in `bad`."""
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, _Label] = {}
    doubled: set[str] = set()
    bad: list[BadImage] = []
    ignored: list[str] = []
    num_ignored = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        for member in _members(file, size, bad):
            name = member.name.removeprefix("./")
            key, ending = split_member(name)
            is_picture = f".{ending}" in IMAGE_ENDINGS
            if not key or not member.isreg() or member.issparse() or not (is_picture or ending in ("cls", "json")):
                num_ignored += 1
                ignored += [name] if len(ignored) < 5 else []
            elif is_picture:
                if key in pictures:
                    other = pictures[key][0]
                    is_same = name == other
                    bad.append(BadImage(name, "twice in the shard" if is_same else f"its key is that of {other} too"))
                    doubled.add(key)
                else:
                    pictures[key] = (name, member.offset_data, member.size)
            else:
                labels.setdefault(key, _Label()).take(
                    ending, os.pread(file.fileno(), min(member.size, _Label.MAX_BYTES + 1), member.offset_data)
                )
    names, classes = [], []
    numbers: list[tuple[int, int, int]] = []
    for key, (name, offset, length) in pictures.items():
        label = labels.pop(key, None)
        if label is None or label.problem or (label.number < 0 and not label.name):
            reason = (label and label.problem) or f"has no label: neither {key}.cls nor a label in {key}.json"
            bad.append(BadImage(name, reason))
            continue
        names.append(os.fsencode(label.picture_name or name))
        classes.append(label.name.encode("utf-8", "surrogateescape"))
        numbers.append((offset, length, label.number))
    # A stray .json may be anything; a class number is the label of a picture that has gone.
    bad += [BadImage(f"{key}.cls", "its picture is not in the shard") for key, label in labels.items() if label.has_cls]
    offsets, sizes, targets = np.array(numbers, np.int64).reshape(-1, 3).T.copy()
    return ShardIndex(
        np.array(names, np.bytes_),
        offsets,
        sizes,
        targets,
        np.array(classes, np.bytes_),
        np.zeros(len(names), np.int64),
        bad,
        ignored,
        num_ignored,
    )


def split_member(path: str) -> tuple[str, str]:
    """("a/b", "jpg") of "a/b.JPG", as WebDataset does it: the key ends at the first dot of the last part. An empty key:
    the member does not count."""
    folder, slash, last = path.rpartition("/")
    stem, _, ending = last.partition(".")
    return (folder + slash + stem if stem else "", ending.lower())


def _members(file: BinaryIO, size: int, bad: list[BadImage]) -> Iterator[tarfile.TarInfo]:
    """Members of a tar that are all there, folders left out; a complaint goes to `bad` where it is damaged or cut off.

    tarfile alone takes the first unreadable header, and the end of a file that was cut off between members, for the end.
    """
    count = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all: gigabytes for a large file
                if member.isdir():
                    continue
                if member.offset_data + member.size > size and member.isreg():
                    break
                count += 1
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        if not count:
            what = "it is compressed, unpack it first" if _is_compressed(file) else str(error)
            bad.append(BadImage("", f"not a readable tar file ({what or 'it is empty'})"))
        else:
            bad.append(BadImage("", f"cut off or damaged after {count} members ({error}); {_REPACK}"))
        return
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or end >= size:
        bad.append(BadImage("", f"cut off after {count} members: the end mark of a tar file is missing; {_REPACK}"))
    elif block.strip(b"\0"):
        bad.append(BadImage("", f"damaged at byte {end:,}, after {count} members: no header is there; {_REPACK}"))
    else:
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                reason = (
                    "data follows its end mark, as when tar files are joined by cat; pack it again, or keep them apart"
                )
                bad.append(BadImage("", reason))
                return


_REPACK = "fetch or pack it again"


def _is_compressed(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


class _Label:
    """What KEY.cls and KEY.json say about a picture."""

    MAX_BYTES = 1 << 20

    def __init__(self) -> None:
        self.number = -1
        self.name = ""
        self.picture_name = ""
        self.problem = ""
        self.has_cls = False

    def take(self, ending: str, content: bytes) -> None:
        if ending == "cls":
            self.has_cls = True
            text = content[:64].decode("utf-8", "replace").strip()
            if len(content) > 64 or not _is_number(text):
                self.problem = f"its label (.cls) is {text[:30]!r}, which is no class number"
            else:
                self._number(int(text))
            return
        if len(content) > self.MAX_BYTES:
            self.problem = f"its JSON is larger than {self.MAX_BYTES:,} bytes"
            return
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            self.problem = "its JSON cannot be read"
            return
        if not isinstance(values, dict):
            self.problem = "its JSON is no object {...}"
            return
        label, name, picture = (values.get(key) for key in ("label", "class", "name"))
        if isinstance(label, str) and not _is_number(label) and name is None:
            label, name = None, label
        if isinstance(label, str) and _is_number(label):
            label = int(label)
        if label is not None and not (type(label) is int and 0 <= label < 2**31):
            self.problem = f'the "label" of its JSON is {label!r}, which is no class number'
        elif name is not None and not (isinstance(name, str) and name):
            self.problem = f'the "class" of its JSON is {name!r}, which is no name'
        else:
            self.name = name or ""
            self.picture_name = picture if isinstance(picture, str) and not picture.endswith("/") else ""
            if label is not None:
                self._number(label)

    def _number(self, number: int) -> None:
        if self.number not in (-1, number):
            self.problem = f"its .cls and its JSON disagree: classes {self.number} and {number}"
        self.number = number


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def index_paths(path: Path) -> tuple[Path, Path]:
    """Where the index of a shard may lie: beside it, or in the cache."""
    absolute = os.fsencode(path.absolute())
    name = f"{hashlib.blake2b(absolute, digest_size=16).hexdigest()}{INDEX_ENDING}"
    return path.with_name(path.name + INDEX_ENDING), cache_folder() / "indexes" / name


def load_index(path: Path) -> ShardIndex | None:
    """The stored index of a shard, if there is one made of just this file, by its size and time of change."""
    for place in index_paths(path):
        # An index is only a shortcut: whatever is wrong with it, it is made anew.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            state = path.stat()
            with np.load(place, allow_pickle=False) as archive:
                about = json.loads(archive["about"].item())
                arrays = {name: archive[name] for name in _ARRAYS}
            made_of = (INDEX_FORMAT, state.st_size, state.st_mtime_ns)
            if (about["format"], about["size"], about["mtime_ns"]) != made_of:
                continue
            lengths = {len(array) for array in arrays.values()}
            offsets, sizes = arrays["offsets"], arrays["sizes"]
            if len(lengths) != 1 or (offsets < 0).any() or (sizes < 0).any() or (offsets + sizes > state.st_size).any():
                continue
            bad = [BadImage(name, reason) for name, reason in about["bad"]]
            return ShardIndex(**arrays, bad=bad, ignored=about["ignored"], num_ignored=about["num_ignored"], tried=about["tried"])  # fmt: skip
    return None


def save_index(path: Path, index: ShardIndex) -> None:
    """Keep an index beside its shard, or in the cache where that is not possible; where neither is, it is not kept."""
    state = path.stat()
    about = {
        "format": INDEX_FORMAT,
        "size": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "bad": [(b.name, b.reason) for b in index.bad],
        "ignored": index.ignored,
        "num_ignored": index.num_ignored,
        "tried": index.tried,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    for place in index_paths(path):
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, lambda file: np.savez(file, about=np.array(json.dumps(about)), **arrays))
            return
