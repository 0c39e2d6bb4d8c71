"""What a source of labelled images is, two kinds of it, and what all readers of data share."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from volo.config import DataConfig
from volo.data.classes import refuse_control_characters
from volo.data.decode import BadImage, BadImageError, decode_image, read_file
from volo.data.splits import held_out

Progress = Callable[[int, int], None]
"""`on_progress(done, total)`, called while images are decoded."""

LAYOUTS = """\
data.path can be
  a folder with train/ and val/ (or training/, training_set/, *_train/, validation/, valid/, dev/, test/, ...), each with
  a folder of images for every class;
  a folder with a folder of images for every class: data.val_fraction of each class is held out;
  an npz folder: data_batch_*.npz, test_batch.npz (JPEG bytes, offsets, labels), classes.txt;
  train.npz with val.npz or test.npz, or a single .npz: arrays images (uint8 [N, H, W, 3] or [N, H, W]) and labels;
  a folder of tar shards, train-*.tar and val-*.tar, or tar files to be split by data.val_fraction: one, or a list in
  braces such as shards/train-{000000..000127}.tar; each holds KEY.jpg (png, webp, ...) and KEY.cls or KEY.json;
  a table (.csv, .tsv, .parquet) with a column of image paths, a label column and, if you like, a split column;
  a folder with torchvision's CIFAR files (data.kind "cifar10" or "cifar100" downloads them);
  empty with data.kind "digits": scikit-learn's handwritten digits."""


class ImageSource(Protocol):
    """Labelled images by number."""

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def targets(self) -> Tensor:
        """int64 [N]; of a table with other labels than one class float64 [N, T] (`volo.data.targets`)"""

    @property
    def names(self) -> Sequence[str]:
        """Relative path or "test/17": stable, for people."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tensor:
        """uint8 [3, H, W] RGB, not to be written to. Raises BadImageError."""

    def fingerprint(self, index: int) -> int:
        """CRC-32 by which an image that has changed can be told: of its file, or of its pixels where it has none.
        Raises BadImageError."""


class Names(Sequence[str]):
    """Many short strings in one array: a list of a million would be copied into every worker, page by page."""

    def __init__(self, names: Iterable[str]) -> None:
        self._encoded = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [os.fsdecode(name) for name in self._encoded[index]]
        return os.fsdecode(self._encoded[index])


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images of one size, all in memory: images uint8 [N, 3, H, W]."""

    images: Tensor
    targets: Tensor
    names: Sequence[str]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Tensor:
        return self.images[index]

    def fingerprint(self, index: int) -> int:
        return zlib.crc32(self.images[index].contiguous().numpy().data)

    def select(self, indices: Sequence[int]) -> ArraySource:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ArraySource(
            self.images[chosen], self.targets[chosen], Names(self.names[i] for i in indices), self.classes
        )


class PixelCache:
    """Decoded images (or masks) of different sizes in one flat tensor, which worker processes share without copies."""

    def __init__(self, pixels: Tensor, shapes: np.ndarray, starts: np.ndarray) -> None:
        self.pixels, self.shapes, self.starts = pixels, shapes, starts

    @classmethod
    def of(cls, pictures: list[Tensor]) -> PixelCache:
        """From uint8 [C, H, W] images, which it takes out of the list so that memory is not needed twice."""
        shapes = np.array([p.shape for p in pictures], np.int64).reshape(-1, 3)
        sizes = shapes.prod(axis=1)
        ends = np.cumsum(sizes)
        cache = cls(torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8), shapes, ends - sizes)
        for i in reversed(range(len(pictures))):
            cache[i].copy_(pictures.pop())
        return cache

    def __getitem__(self, index: int) -> Tensor:
        channels, height, width = self.shapes[index].tolist()
        start = int(self.starts[index])
        flat = self.pixels[start : start + channels * height * width]
        return flat.view(height, width, channels).permute(2, 0, 1)

    def select(self, indices: Sequence[int]) -> PixelCache:
        return PixelCache(self.pixels, self.shapes[indices], self.starts[indices])


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files of any size, named relative to `root`; decoded when asked for, unless `cache` holds the pixels."""

    root: Path
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
        name = self.names[index]
        return read_file(self.root / name, name)

    def fingerprint(self, index: int) -> int:
        return zlib.crc32(self.read(index))

    def select(self, indices: Sequence[int]) -> FolderSource:
        cache = self.cache and self.cache.select(indices)
        names = Names(self.names[i] for i in indices)
        return FolderSource(
            self.root, self.targets[torch.as_tensor(indices, dtype=torch.int64)], names, self.classes, cache
        )


@dataclass(frozen=True)
class DataSplits:
    """What `open_data` found."""

    train: ImageSource
    val: ImageSource
    classes: tuple[str, ...]
    skipped: list[BadImage] = field(default_factory=list)
    """Files left out because they cannot be decoded (only with data.on_bad_image "skip")."""
    notes: list[str] = field(default_factory=list)
    """What a person should know: ignored files, classes without held-out images."""
    ignored: list[str] = field(default_factory=list)
    """Files in the folders that are no images by their ending, or lie in no class folder; relative paths."""
    parts: str = ""
    """For people: which folders or files are for training and which are held out; empty: drawn by data.split_seed."""

    def understood(self, config: DataConfig) -> list[str]:
        """For people: what the names of folders, files and classes were taken for, and how many images there are of each."""
        counts = zip(
            *(torch.bincount(part.targets, minlength=len(self.classes)).tolist() for part in (self.train, self.val))
        )
        each = [f"{name} {train} + {val}" for name, (train, val) in zip(self.classes, counts)]
        more = f", ... ({len(each) - 20} more)" if len(each) > 20 else ""
        by_seed = f"{100 * config.val_fraction:g} % of each class held out by data.split_seed {config.split_seed}"
        return [
            f"{len(each)} classes (training + held-out images): {', '.join(each[:20])}{more}",
            f"{len(self.train):,} training images and {len(self.val):,} held out: {self.parts or by_seed}",
        ]

    def check_classes(self) -> list[str]:
        """Notes on classes without images in a part. Raises ValueError where there is nothing to learn from, or to score, and
        for names that cannot be shown."""
        refuse_control_characters(self.classes)
        notes = []
        for part, what in ((self.train, "training"), (self.val, "held-out")):
            counts = torch.bincount(part.targets, minlength=len(self.classes)).tolist()
            without = [name for name, count in zip(self.classes, counts) if not count]
            if len(without) == len(self.classes):
                raise ValueError(f"no {what} image can be used")
            if without:
                shown = ", ".join(without[:20]) + (", ..." if len(without) > 20 else "")
                notes.append(f"{len(without)} classes have no {what} images: {shown}")
        return notes


@dataclass(frozen=True)
class Share:
    """Which part of a common work this process does, and how it gets the others' results."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda mine: [mine]
    """What every process has, by rank; all of them call it."""


class Selectable(ImageSource, Protocol):
    """A source of which a part can be taken."""

    def select(self, indices: Sequence[int]) -> ImageSource: ...


def split_by_seed(
    source: Selectable, config: DataConfig, strata: Sequence[int] | None = None
) -> tuple[ImageSource, ImageSource]:
    """Training and held-out part: `config.val_fraction` of each class, or of the images of each number in `strata`."""
    train, val = held_out(
        source.names, source.targets.tolist() if strata is None else strata, config.val_fraction, config.split_seed
    )
    if not val:
        raise ValueError(
            f"{len(train)} images, one a class: none can be held out. Add images, or a val/ folder (in a table a split column)."
        )
    return source.select(train), source.select(val)


def raise_bad(bad: list[BadImage], total: int, where: Path) -> None:
    """Raise ValueError that names every one of `bad`, if there are any."""
    if bad:
        listed = "\n".join(f"  {item}" for item in bad)
        raise ValueError(
            f"{len(bad)} of {total} images in {where} cannot be used:\n{listed}\n"
            "Repair or remove them, or leave them out: --on-bad-image skip (in recipes and Python, data.on_bad_image)."
        )


Item = TypeVar("Item")
Checked = tuple[Any, tuple[Tensor, ...]]
"""What is kept of an image, and its decoded pixels."""


def check_all(
    attempt: Callable[[int], Checked],
    count: int,
    budget: float,
    share: Share,
    on_progress: Progress | None = None,
    chunk: int = 256,
) -> tuple[list[Any], list[tuple[Tensor, ...]] | None]:
    """Try `count` images on all cores, and in all processes of `share`.

    Returns what `attempt` says of each, or the BadImage that it raised; and the pixels of the good ones if those of all
    are within `budget` bytes.
    """
    kept: list[tuple[Tensor, ...]] | None = [] if budget and share.size == 1 else None

    def one(i: int) -> Any:
        try:
            about, pixels = attempt(i)
        except BadImageError as error:
            return BadImage(error.name, error.reason), (), 0
        return about, pixels if kept is not None else (), sum(part.numel() for part in pixels)

    results, size = [], 0
    mine = range(share.rank, count, share.size)
    for done, (about, pixels, bytes_) in enumerate(in_parallel(one, mine, chunk), 1):
        results.append(about)
        size += bytes_
        if size > budget:
            kept = None
        if kept is not None and pixels:
            kept.append(pixels)
        if on_progress:
            on_progress(min(count, done * share.size), count)
    if share.size > 1:
        everywhere = share.gather((results, size))
        results = [None] * count
        for rank, (its, _) in enumerate(everywhere):
            results[rank :: share.size] = its
        if sum(size for _, size in everywhere) <= budget:
            good = [i for i, about in enumerate(results) if not isinstance(about, BadImage)]
            kept = [pixels for _, pixels in in_parallel(attempt, good, chunk)]
    return results, kept


def in_parallel(function: Callable[[Any], Item], items: Sequence[Any], chunk: int = 256) -> Iterator[Item]:
    """`function` of every item, in order, on all cores: for work without the interpreter lock, as Pillow's.

    No more than `chunk` results wait for a slow one, or for the caller.
    """
    with ThreadPoolExecutor(max(2, available_cores())) as pool:
        for start in range(0, len(items), chunk):
            yield from pool.map(function, items[start : start + chunk])


def cache_budget() -> int:
    """Bytes of decoded images that "auto" keeps: 2 GB or a quarter of free memory, shared by the node's processes."""
    free = free_memory()
    return max(0, min(2 << 30, 2 << 30 if free is None else free // 4) // local_processes())


def local_processes() -> int:
    """Processes of this run on this machine, as torchrun says it; what a batch system alone has set means nothing."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "") if os.environ.get("MASTER_ADDR") else ""
    return max(1, int(text)) if text.isdecimal() else 1


def free_memory() -> int | None:
    """Bytes of memory that this machine, or its container, has left; None where nothing tells."""
    free: list[int] = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        with open("/proc/meminfo", encoding="ascii") as file:
            free.append(1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        # A container's limit ("max", no number, where there is none).
        limit, used, stat = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
        # Files that were read are kept until the room is needed.
        kept = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
        free.append(int(limit) - int(used) + kept)
    return min(free, default=None)


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
