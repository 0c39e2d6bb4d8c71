"""What lies where in a tar shard: an index made once, header by header, and reads at known places."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from volo.data.decode import BadImage, BadImageError, decode_image, reading
from volo.data.files import cache_folder, write_atomically
from volo.data.sources import Progress, Share, in_parallel
from volo.data.walk import IMAGE_ENDINGS

INDEX_FORMAT = 2
INDEX_ENDING = ".volo-index"

MAX_OPEN_SHARDS = 64
"""A process keeps no more shards open than this; the system allows about a thousand files."""

HEADERS_AT_ONCE = 10_000


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

        def read() -> bytes:
            file, parts, missing = self._file(shard), [], size
            while missing:
                part = os.pread(file.descriptor, missing, offset + size - missing)
                if not part:
                    raise BadImageError(name, f"{self.paths[shard]} is shorter than when it was indexed")
                parts.append(part)
                missing -= len(part)
            return b"".join(parts)

        try:
            return reading(read, str(self.paths[shard]))
        except BadImageError as error:
            if error.name == name:
                raise
            raise BadImageError(name, str(error)) from None

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None:
                file = _OpenFile(self.paths[shard])
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


@dataclass(frozen=True)
class ShardIndex:
    """What lies where in a shard, in the shard's order."""

    names: np.ndarray
    """bytes [n]: member path of the image, or "name" of its JSON."""
    offsets: np.ndarray
    """int64 [n]: first byte of the image file in the shard."""
    sizes: np.ndarray
    """int64 [n]: its bytes."""
    labels: np.ndarray
    """int64 [n]: class number; -1: only a name is given."""
    classes: np.ndarray
    """bytes [n]: class name; empty: only a number is given."""
    pixels: np.ndarray
    """int64 [n]: height x width; 0 before the image was tried."""
    bad: list[BadImage] = field(default_factory=list)
    """What cannot be used; its name is empty where that is the shard itself."""
    ignored: list[str] = field(default_factory=list)
    """Up to 5 members that are neither images nor labels."""
    num_ignored: int = 0
    tried: bool = False
    """Every image has been decoded once."""

    def __len__(self) -> int:
        return len(self.names)

    def notes(self, path: Path) -> list[str]:
        if not self.num_ignored:
            return []
        shown = ", ".join(self.ignored) + (", ..." if self.num_ignored > len(self.ignored) else "")
        return [f"ignored {self.num_ignored} members of {path} that are neither images nor labels: {shown}"]

    def without(self, unusable: dict[int, str]) -> ShardIndex:
        """Images by their number, with the reason, become `bad`."""
        kept = np.array([i not in unusable for i in range(len(self))], bool)
        bad = [BadImage(os.fsdecode(self.names[i]), reason) for i, reason in unusable.items()]
        return replace(
            self,
            **{name: getattr(self, name)[kept] for name in _ARRAYS},
            bad=[*self.bad, *bad],
        )


_ARRAYS = ("names", "offsets", "sizes", "labels", "classes", "pixels")


def tried_indexes(paths: Sequence[Path], check: bool, share: Share, on_progress: Progress | None) -> list[ShardIndex]:
    """The indexes of shards, whose images have all been tried where `check` says so, shared out over processes. They are
    kept, so that the next start is quick. Raises ValueError for a shard that cannot be opened."""
    done = 0
    indexes: dict[int, ShardIndex] = {}
    for i in range(share.rank, len(paths), share.size):
        indexes[i] = load_index(paths[i]) or build_index(paths[i])
        if on_progress and not indexes[i].tried:
            on_progress(min(len(paths), i + share.size), len(paths))
    total = share.size * sum(len(index) for index in indexes.values() if not index.tried)

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(min(total, done * share.size), total)

    for i, index in indexes.items():
        if check and not index.tried:
            indexes[i] = _tried(paths[i], index, advance)
        if indexes[i] is not index or not load_index(paths[i]):
            save_index(paths[i], indexes[i])
    # Those of the others are where they have put them, unless there is no place for an index at all.
    share.gather(None)
    return [indexes.get(i) or load_index(path) or build_index(path) for i, path in enumerate(paths)]


def _tried(path: Path, index: ShardIndex, advance: Callable[[], None]) -> ShardIndex:
    files = ShardFiles([path])

    def attempt(i: int) -> int | str:
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
        advance()
    return replace(index, pixels=pixels, tried=True).without(unusable)


def build_index(path: Path) -> ShardIndex:
    """Go through a tar file header by header. Whatever is wrong with it or with an image ends up in `bad`."""
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
    # A stray .json may be anything; a class number is the label of an image that has gone.
    bad += [BadImage(f"{key}.cls", "its image is not in the shard") for key, label in labels.items() if label.has_cls]
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
    count, end = 0, 0
    try:
        for member in _headers(file):
            end = member.offset_data + (
                -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if member.isreg() else 0
            )
            if member.issparse():
                end = file.tell()
            if member.isdir():
                continue
            if member.offset_data + member.size > size and member.isreg() and not member.issparse():
                break
            count += 1
            yield member
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


def _headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """All members. The file is opened anew from time to time, for a TarFile keeps every header that it has read: gigabytes
    for a large file."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        start = None
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for number, member in enumerate(tar):
                if number == HEADERS_AT_ONCE:
                    start = member.offset
                    break
                yield member


_REPACK = "fetch or pack it again"


def _is_compressed(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


class _Label:
    """What KEY.cls and KEY.json say about an image."""

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
                self.problem = f"its label (.cls) is {text[:30]!r}, which is not a valid class index"
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
            self.problem = f'the "label" of its JSON is {label!r}, which is not a valid class index'
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
