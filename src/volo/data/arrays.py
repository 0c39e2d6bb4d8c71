"""Images that fit into memory as arrays: npz files, CIFAR, the digits."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from volo.config import DataConfig
from volo.data.classes import agreed, read_class_list, unique
from volo.data.decode import BadImage, BadImageError, decode_image
from volo.data.files import cache_folder
from volo.data.sources import (
    LAYOUTS,
    ArraySource,
    DataSplits,
    Names,
    Progress,
    available_cores,
    local_processes,
    raise_bad,
    split_by_seed,
)
from volo.data.splits import Parts, split_files
from volo.data.transforms import height_width
from volo.data.walk import spelled
from volo.data.workers import run

CHUNK = 256
"""Images that are decoded at once."""


def open_digits(config: DataConfig) -> DataSplits:
    """scikit-learn's 1,797 handwritten digits, real scans of 8 x 8, enlarged to `img_size`. Raises ValueError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn, or set data.path") from error
    scans = load_digits()
    grey = torch.from_numpy((scans.images * (255 / 16)).round().astype(np.uint8))[
        :, None
    ]  # [1797, 1, 8, 8], from 0..16
    images = F.resize(grey, list(height_width(config.img_size)), InterpolationMode.BICUBIC, antialias=True)
    names = [f"digits/{i}" for i in range(len(grey))]
    source = ArraySource(images.repeat(1, 3, 1, 1), torch.from_numpy(scans.target).long(), names, tuple("0123456789"))
    return DataSplits(*split_by_seed(source, config), source.classes)


def open_torchvision_cifar(kind: str, root: Path | None) -> DataSplits:
    """ "cifar10" or "cifar100" as torchvision stores it below `root` (None: the cache folder), downloaded if need be.

    Raises ValueError where it is not there and no download is possible.
    """
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    root = root or cache_folder() / "data"
    try:
        root.mkdir(parents=True, exist_ok=True)
        parts = [dataset(str(root), train=is_train, download=True) for is_train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise ValueError(
            f"{kind} is not in {root} and cannot be downloaded ({error}). Unpack {dataset.url} there by hand, "
            "or point data.path to a folder that has it"
        ) from error
    classes = tuple(parts[0].classes)
    train, val = (
        ArraySource(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets, dtype=torch.int64),
            Names(f"{prefix}/{i}" for i in range(len(part))),
            classes,
        )
        for part, prefix in zip(parts, ("train", "test"))
    )
    return DataSplits(train, val, classes)


def open_npz(path: Path, config: DataConfig, on_progress: Progress | None = None) -> DataSplits:
    """Training and held-out images of an npz file or folder; see `volo.data.images.open_data`. Raises ValueError."""
    files = find_npz(path, config.splits) if config.path else Parts()
    if not files.train:
        raise ValueError(f"data.path is {config.path or 'empty'}: no training .npz was found there.\n{LAYOUTS}")
    (train, *held), skipped = _open_parts(path, files, [files.train, files.val], config, on_progress)
    train_source, val_source = (train, held[0]) if held else split_by_seed(train, config)
    notes = [f"ignored in {path}: {', '.join(files.ignored)}"] if files.ignored else []
    what = f"{', '.join(files.train)} and {', '.join(files.val)}" if held else ""
    return DataSplits(train_source, val_source, train.classes, skipped, notes, parts=what)


def open_all_npz(
    path: str | Path, config: DataConfig, *, on_progress: Progress | None = None
) -> tuple[ArraySource, list[BadImage]]:
    """All images of an npz file or folder in one source (evaluation), and what was left out: of a folder with held-out
    images those, of anything else everything. Raises ValueError as `open_data` does.
    """
    path = Path(path).expanduser()
    files = find_npz(path, config.splits)
    (source,), skipped = _open_parts(path, files, [files.val or files.train], config, on_progress)
    return source, skipped


def is_npz(path: Path, splits: str = "auto") -> bool:
    """Whether `path` is an npz file, or a folder with some that `open_npz` or `open_all_npz` take."""
    files = find_npz(path, splits) if path.is_dir() or path.suffix.lower() == ".npz" else Parts()
    return bool(files.train or files.val)


def find_npz(path: Path, splits: str) -> Parts:
    """The files of each part. Raises ValueError for names that may mean both."""
    if not path.is_dir():
        return Parts([path.name] if path.is_file() else [])
    names = sorted(file.name for file in path.glob("*.npz"))
    if splits == "none" or not names:
        return Parts(names)
    parts = split_files(names, splits, str(path))
    batches = [name for name in parts.ignored or names if name.startswith("data_batch_")]
    if not parts.train and batches:  # CIFAR's
        return Parts(batches, parts.val, [name for name in parts.ignored if name not in batches])
    return parts


def _open_parts(
    path: Path, files: Parts, groups: list[list[str]], config: DataConfig, on_progress: Progress | None
) -> tuple[list[ArraySource], list[BadImage]]:
    """A source for each of `groups` with files, with the classes of all `files`, and what was left out."""
    folder = path if path.is_dir() else path.parent
    arrays = {name: _read_npz(folder / name) for name in (*files.train, *files.val)}
    groups = [group for group in groups if group]
    total, done = sum(len(arrays[name]["labels"]) for group in groups for name in group), 0
    opened: list[list[_NpzPictures]] = []
    for group in groups:
        opened.append([])
        for name in group:
            first = sum(pictures.count for pictures in opened[-1])
            prefix = "train/" if name in files.train else "test/"
            opened[-1].append(_decode_npz(arrays[name], prefix, first, done, total, on_progress))
            done += len(arrays[name]["labels"])
    skipped = [bad for pictures in opened for its in pictures for bad in its.bad]
    if config.on_bad_image == "error":
        raise_bad(skipped, total, path)
    classes = _npz_classes(path, {folder / name: its for name, its in arrays.items()})
    return [_join(pictures, classes, path) for pictures in opened], skipped


@dataclass(frozen=True)
class _NpzPictures:
    images: Tensor
    targets: Tensor
    names: list[str]
    bad: list[BadImage]

    @property
    def count(self) -> int:
        return len(self.names) + len(self.bad)


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    """Arrays of one file: labels int64 [N], and images uint8 [N, H, W, C] or jpeg and offsets. Raises ValueError."""
    try:
        # Pickled objects could run code: refused. Every array is unpacked once, not at each access.
        with np.load(file, allow_pickle=False) as archive:
            arrays = {
                name: archive[name]
                for name in ("images", "jpeg", "offsets", "labels", "classes")
                if name in archive.files
            }
            held = ", ".join(archive.files)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a readable .npz file: {error}") from error
    if "labels" not in arrays or not ("images" in arrays or {"jpeg", "offsets"} <= set(arrays)):
        raise ValueError(f"{file} holds the arrays {held}; needed are labels and images, or labels, jpeg and offsets")
    labels = arrays["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise ValueError(f"{file}: labels are {labels.dtype} {labels.shape}; needed are integers from 0, one an image")
    arrays["labels"] = labels.astype(np.int64)
    if "images" in arrays:
        images = arrays["images"]
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
            images = images.transpose(0, 2, 3, 1)
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3) or len(images) != len(labels):
            raise ValueError(
                f"{file}: images are {images.dtype} {arrays['images'].shape} for {len(labels)} labels; "
                "needed are uint8 [N, H, W, 3] or [N, H, W] with one label an image"
            )
        arrays["images"] = images
    else:
        offsets, size = arrays["offsets"], len(arrays["jpeg"])
        if len(offsets) != len(labels) + 1 or (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > size:
            raise ValueError(
                f"{file}: offsets must rise from 0 to at most {size} and be one more than the {len(labels)} labels"
            )
    return arrays


def _decode_npz(
    arrays: dict[str, np.ndarray], prefix: str, first: int, done: int, total: int, on_progress: Progress | None
) -> _NpzPictures:
    targets = torch.from_numpy(arrays["labels"])
    names = [f"{prefix}{first + i}" for i in range(len(targets))]
    if "images" in arrays:
        images = torch.from_numpy(np.ascontiguousarray(arrays["images"].transpose(0, 3, 1, 2)))
        if on_progress:
            on_progress(done + len(names), total)
        return _NpzPictures(images.expand(-1, 3, -1, -1).contiguous(), targets, names, [])
    decode = _Decode(arrays["jpeg"], arrays["offsets"], names)
    chunks = [range(start, min(start + CHUNK, len(names))) for start in range(0, len(names), CHUNK)]
    # Python's share of the work is too large for threads; a few thousand images are done before processes have started.
    num_workers = min(available_cores() // local_processes(), len(chunks) // 4)
    images = torch.empty(len(names), *decode.shape, dtype=torch.uint8)
    kept: list[int] = []
    bad: list[BadImage] = []
    with closing(run(decode, chunks, num_workers=num_workers if num_workers > 1 else 0)) as decoded:
        for chunk, (numbers, pictures, its_bad) in zip(chunks, decoded):
            images[len(kept) : len(kept) + len(numbers)] = pictures
            kept += numbers
            bad += its_bad
            if on_progress:
                on_progress(done + chunk.stop, total)
    return _NpzPictures(images[: len(kept)], targets[kept], [names[i] for i in kept], bad)


class _Decode:
    """Images of an npz file by their numbers: which of them are good, these as uint8 [n, 3, H, W], and the bad ones."""

    def __init__(self, encoded: np.ndarray, offsets: np.ndarray, names: list[str]) -> None:
        self.encoded, self.offsets, self.names = encoded, offsets, names
        self.shape: tuple[int, ...] = (3, 0, 0)
        """Of the first good image, and so of all."""
        for i in range(len(names)):
            with contextlib.suppress(BadImageError):
                self.shape = tuple(self._decode(i).shape)
                break

    def __call__(self, numbers: range) -> tuple[list[int], Tensor, list[BadImage]]:
        kept: list[int] = []
        bad: list[BadImage] = []
        images = torch.empty(len(numbers), *self.shape, dtype=torch.uint8)
        for i in numbers:
            try:
                picture = self._decode(i)
                if picture.shape != images.shape[1:]:
                    sizes = [f"{shape[2]} x {shape[1]}" for shape in (picture.shape, images.shape[1:])]
                    raise BadImageError(
                        self.names[i], f"{sizes[0]} pixels where the first image has {sizes[1]}; folders take any size"
                    )
            except BadImageError as error:
                bad.append(BadImage(error.name, error.reason))
                continue
            images[len(kept)] = picture
            kept.append(i)
        return kept, images[: len(kept)], bad

    def _decode(self, i: int) -> Tensor:
        return decode_image(self.encoded[self.offsets[i] : self.offsets[i + 1]].tobytes(), self.names[i])


def _join(parts: list[_NpzPictures], classes: tuple[str, ...], path: Path) -> ArraySource:
    sizes = sorted({tuple(part.images.shape[2:]) for part in parts if part.names})
    if len(sizes) != 1:
        raise ValueError(f"{path}: images need one size, but the files hold {sizes or 'none'} (height, width)")
    filled = [part for part in parts if part.names]
    images = filled[0].images if len(filled) == 1 else torch.cat([part.images for part in filled])
    return ArraySource(
        images, torch.cat([part.targets for part in filled]), Names(n for p in filled for n in p.names), classes
    )


def _npz_classes(path: Path, files: dict[Path, dict[str, np.ndarray]]) -> tuple[str, ...]:
    """From classes.txt and the arrays `classes`, which agree; else the numbers up to the largest label."""
    count = max((int(arrays["labels"].max()) + 1 for arrays in files.values() if len(arrays["labels"])), default=0)
    listed = path / "classes.txt"
    lists = [(listed, read_class_list(listed))] if path.is_dir() and listed.is_file() else []
    for file, arrays in files.items():
        if "classes" in arrays:
            lists.append((file, unique((spelled(str(name)) for name in arrays["classes"]), file)))
    classes = agreed(lists) or tuple(map(str, range(count)))
    if len(classes) < max(count, 2):
        raise ValueError(
            f"{path}: labels go up to {count - 1}, but there are {len(classes)} classes; at least two are needed"
        )
    return classes
