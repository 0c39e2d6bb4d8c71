"""Where pictures come from: folders, npz files, CIFAR, the digits; all of them become an `ImageSource`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from volo.config import DataConfig
from volo.data.decode import BadImage, BadImageError, check_header, decode_image
from volo.data.transforms import height_width

__all__ = [
    "ArraySource",
    "BadImage",
    "BadImageError",
    "DataSplits",
    "FolderSource",
    "ImageSource",
    "decode_image",
    "is_image_name",
    "open_data",
    "open_folder",
]

Progress = Callable[[int, int], None]

IMAGE_ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .jp2 .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .tga .avif .heic .heif".split()
)
"""Files with these endings are taken for pictures; HEIC is among them so that it is named and not silently left out."""

MAX_DECODED_CHECKS = 200_000
"""Sets with more files than this have only their headers checked at the start: decoding a million files takes hours."""

_VAL_FOLDERS = ("val", "validation", "valid", "test")
_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"))

LAYOUTS = """data.path can be
  a folder with train/ and val/ (or validation/, valid/, test/), each with a folder of pictures for every class;
  a folder with a folder of pictures for every class: data.val_fraction of each class is held out;
  an npz folder: data_batch_*.npz, test_batch.npz (JPEG bytes, offsets, labels), classes.txt;
  train.npz with val.npz or test.npz, or a single .npz: arrays images (uint8 [N, H, W, 3] or [N, H, W]) and labels;
  a folder with torchvision's CIFAR files (data.kind "cifar10" or "cifar100" downloads them);
  empty: scikit-learn's handwritten digits."""


class ImageSource(Protocol):
    """Labelled pictures by number."""

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def targets(self) -> Tensor:
        """int64 [N]"""

    @property
    def names(self) -> Sequence[str]:
        """Relative path or "test/17": stable, for people."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tensor:
        """uint8 [3, H, W] RGB, not to be written to. Raises BadImageError."""


class Names(Sequence[str]):
    """Many short strings in one array: a list of a million would be copied into every worker, page by page."""

    def __init__(self, names: Iterable[str]) -> None:
        self._encoded = np.array([os.fsencode(name) for name in names] or [b""])[: None if names else 0]

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


@dataclass(frozen=True)
class ArraySource:
    """Pictures of one size, all in memory: images uint8 [N, 3, H, W]."""

    images: Tensor
    targets: Tensor
    names: Sequence[str]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Tensor:
        return self.images[index]

    def select(self, indices: Sequence[int]) -> ArraySource:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ArraySource(self.images[chosen], self.targets[chosen], [self.names[i] for i in indices], self.classes)


class PixelCache:
    """Decoded pictures of different sizes in one flat tensor, which worker processes share without copies."""

    def __init__(self, pixels: Tensor, shapes: np.ndarray, starts: np.ndarray) -> None:
        self.pixels, self.shapes, self.starts = pixels, shapes, starts

    @classmethod
    def of(cls, pictures: list[Tensor]) -> PixelCache:
        """From uint8 [3, H, W] pictures, which it takes out of the list so that memory is not needed twice."""
        shapes = np.array([p.shape[1:] for p in pictures], np.int64).reshape(-1, 2)
        ends = np.cumsum(shapes.prod(axis=1) * 3)
        cache = cls(
            torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8), shapes, ends - shapes.prod(axis=1) * 3
        )
        for i in reversed(range(len(pictures))):
            cache[i].copy_(pictures.pop())
        return cache

    def __getitem__(self, index: int) -> Tensor:
        height, width = self.shapes[index].tolist()
        start = int(self.starts[index])
        return self.pixels[start : start + 3 * height * width].view(height, width, 3).permute(2, 0, 1)

    def select(self, indices: Sequence[int]) -> PixelCache:
        return PixelCache(self.pixels, self.shapes[indices], self.starts[indices])


@dataclass(frozen=True)
class FolderSource:
    """Picture files of any size, named relative to `root`; decoded when asked for, unless `cache` holds the pixels."""

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
        name = self.names[index]
        return decode_image(self.root / name, name)

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
    """What a person should know: ignored files, classes without held-out pictures, checks that were shortened."""


def open_data(config: DataConfig, *, on_progress: Progress | None = None) -> DataSplits:
    """Open training and held-out pictures; every picture is tried before this returns.

    `on_progress(done, total)` is called while pictures are decoded. Raises ValueError for anything that a run would
    stumble over later: a layout that is not understood, classes that do not match, pictures that cannot be decoded
    (all of them are named, unless `on_bad_image` is "skip"), a failed download.
    """
    if not 0 < config.val_fraction < 1:
        raise ValueError(f"data.val_fraction is {config.val_fraction}; it is a share between 0 and 1")
    path = Path(config.path).expanduser()
    kind = _detect(config, path) if config.kind == "auto" else config.kind
    if kind == "digits":
        digits = _digits(config)
        return DataSplits(*_split(digits, config), digits.classes)
    if kind in ("cifar10", "cifar100") and not (config.path and any(path.glob("data_batch_*.npz"))):
        return _torchvision_cifar(kind, path if config.path else _cache_dir() / "data")
    if kind == "folder":
        return _open_folders(path, config, on_progress)
    return _open_npz(path, config, on_progress)


def open_folder(
    path: str | Path, classes: Sequence[str], config: DataConfig, *, on_progress: Progress | None = None
) -> tuple[FolderSource, list[BadImage]]:
    """Pictures in class folders as a `FolderSource` with the given classes (evaluation), and the files left out.

    Folders are named like the classes, or by class number as in ImageNet-V2 ("0" to "999"); classes without a folder are
    fine. Raises ValueError as `open_data` does.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; it should hold a folder of pictures for every class")
    scan = _scan(path)
    if not set(scan.files) <= set(classes) and all(c.isdecimal() and int(c) < len(classes) for c in scan.files):
        scan = _Scan(path, {classes[int(name)]: files for name, files in scan.files.items()}, scan.ignored)
    _require_known(scan, classes)
    return _check([scan], path, tuple(classes), config, on_progress)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture: a known ending, and not a hidden file."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_ENDINGS


def held_out(names: Sequence[str], targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and held-out pictures: `fraction` of every class, in the order given.

    Which ones depends on the names and the seed alone. A class keeps at least one training picture, and gives one away
    if it has two.
    """
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for i, (name, target) in enumerate(zip(names, targets, strict=True)):
        rank = hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()
        by_class.setdefault(int(target), []).append((rank, i))
    val: set[int] = set()
    for ranked in by_class.values():
        count = min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)
        val.update(i for _, i in sorted(ranked)[:count])
    return [i for i in range(len(names)) if i not in val], sorted(val)


def _split(source: ArraySource | FolderSource, config: DataConfig) -> tuple[ImageSource, ImageSource]:
    train, val = held_out(source.names, source.targets.tolist(), config.val_fraction, config.split_seed)
    if not val:
        raise ValueError(f"{len(train)} pictures, one a class: none can be held out. Add pictures, or a val/ folder.")
    return source.select(train), source.select(val)


# Detection


def _detect(config: DataConfig, path: Path) -> str:
    if not config.path:
        return "digits"
    if path.is_file() and path.suffix.lower() == ".npz":
        return "npz"
    if not path.exists():
        raise ValueError(f"data.path is {config.path}, which does not exist.\n{LAYOUTS}")
    if not path.is_dir():
        raise ValueError(f"data.path is {config.path}, a file that is not .npz.\n{LAYOUTS}")
    if any(path.glob("data_batch_*.npz")) or (path / "train.npz").is_file():
        return "npz"
    for kind, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        if (path / folder).is_dir():
            return kind
    if any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir()):
        return "folder"
    raise ValueError(f"data.path is {config.path}, which holds {_contents(path)}.\n{LAYOUTS}")


def _contents(path: Path) -> str:
    children = sorted(path.iterdir())
    shown = ", ".join(child.name + ("/" if child.is_dir() else "") for child in children[:8])
    return f"{shown} and {len(children) - 8} more" if len(children) > 8 else shown or "nothing"


def _cache_dir() -> Path:
    return Path(os.environ.get("VOLO_CACHE") or Path.home() / ".cache" / "volo")


# Folders


@dataclass(frozen=True)
class _Scan:
    root: Path
    files: dict[str, list[str]]
    """Class folder -> picture files, as paths relative to `root` with forward slashes; both sorted."""
    ignored: list[str]
    """Files that are no pictures by their ending, or lie in no class folder."""


def _scan(root: Path) -> _Scan:
    """Raises ValueError if there are no class folders, or no pictures in them."""
    files: dict[str, list[str]] = {}
    ignored = []
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        # Links may lead in circles.
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        relative = Path(os.path.relpath(folder, root))
        parts = relative.parts
        if parts:
            files.setdefault(parts[0], [])
        for name in names:
            if name.startswith(".") or name.lower() in _SYSTEM_FILES:
                continue
            if parts and is_image_name(name):
                files[parts[0]].append((relative / name).as_posix())
            else:
                ignored.append((relative / name).as_posix())
    if not files:
        raise ValueError(f"{root} has no class folders: it holds {_contents(root)}.\n{LAYOUTS}")
    if not any(files.values()):
        raise ValueError(
            f"no pictures in the folders of {root} ({', '.join(list(files)[:8])}); pictures end in {' '.join(sorted(IMAGE_ENDINGS))}"
        )
    return _Scan(root, {name: sorted(files[name]) for name in sorted(files)}, sorted(ignored))


def _require_known(scan: _Scan, classes: Sequence[str]) -> None:
    unknown = [name for name in scan.files if name not in set(classes)]
    if unknown:
        raise ValueError(
            f"{len(unknown)} class folders in {scan.root} are unknown: {', '.join(unknown)}. "
            f"The {len(classes)} classes are {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}; rename or remove folders."
        )


def _open_folders(path: Path, config: DataConfig, on_progress: Progress | None) -> DataSplits:
    if not path.is_dir():
        raise ValueError(f"data.path is {config.path or 'empty'}, but data.kind 'folder' needs a folder.\n{LAYOUTS}")
    has_train = (path / "train").is_dir()
    val_root = next((path / name for name in _VAL_FOLDERS if (path / name).is_dir()), None)
    if not has_train and val_root is not None and any(child.is_dir() for child in val_root.iterdir()):
        raise ValueError(f"{path} has {val_root.name}/ but no train/: it holds {_contents(path)}.\n{LAYOUTS}")
    train = _scan(path / "train" if has_train else path)
    val = _scan(val_root) if has_train and val_root else None
    empty = [name for name, files in train.files.items() if not files]
    if empty:
        raise ValueError(
            f"no pictures in {len(empty)} class folders of {train.root}: {', '.join(empty)}. Fill or remove them."
        )
    classes = tuple(train.files)
    if len(classes) < 2:
        raise ValueError(f"{train.root} has one class folder only, {classes[0]}; telling apart needs two.\n{LAYOUTS}")
    if val is not None:
        _require_known(val, classes)
    scans = [train] if val is None else [train, val]

    source, skipped = _check(scans, path, classes, config, on_progress)
    notes = [_ignored_note(scan) for scan in scans if scan.ignored]
    if len(source) + len(skipped) > MAX_DECODED_CHECKS:
        notes.append(
            f"more than {MAX_DECODED_CHECKS:,} pictures: only their headers were checked, a truncated one is found when it is read"
        )
    train_source: ImageSource
    val_source: ImageSource
    if val is None:
        train_source, val_source = _split(source, config)
    else:
        skipped_names = {bad.name for bad in skipped}
        in_train = sum(f"train/{name}" not in skipped_names for files in train.files.values() for name in files)
        train_source, val_source = source.select(range(in_train)), source.select(range(in_train, len(source)))
    for part, what in ((train_source, "training"), (val_source, "held-out")):
        counts = torch.bincount(part.targets, minlength=len(classes))
        without = [name for name, count in zip(classes, counts.tolist()) if not count]
        if what == "training" and without:
            raise ValueError(f"no picture that can be decoded in {len(without)} classes: {', '.join(without)}")
        if len(without) == len(classes):
            raise ValueError(f"no {what} picture can be decoded")
        if without:
            notes.append(f"{len(without)} classes have no {what} pictures: {', '.join(without)}")
    return DataSplits(train_source, val_source, classes, skipped, notes)


def _ignored_note(scan: _Scan) -> str:
    shown = ", ".join(scan.ignored[:5]) + (", ..." if len(scan.ignored) > 5 else "")
    return f"ignored {len(scan.ignored)} files in {scan.root} that are no pictures or lie in no class folder: {shown}"


def _check(
    scans: list[_Scan], root: Path, classes: tuple[str, ...], config: DataConfig, on_progress: Progress | None
) -> tuple[FolderSource, list[BadImage]]:
    """All pictures of `scans`, one after the other, tried in parallel; kept decoded if they fit into memory."""
    number = {name: i for i, name in enumerate(classes)}
    names, targets = [], []
    for scan in scans:
        prefix = "" if scan.root == root else f"{scan.root.name}/"
        for class_name, files in scan.files.items():
            names += [prefix + file for file in files]
            targets += [number[class_name]] * len(files)

    budget = {"auto": _cache_budget(), "ram": float("inf"), "none": 0}[config.cache]
    pictures: list[Tensor] | None = [] if budget else None
    headers_only = len(names) > MAX_DECODED_CHECKS and config.cache != "ram"
    if headers_only:
        pictures = None
    good, bad, used = [], [], 0

    def attempt(name: str) -> Tensor | BadImageError | None:
        try:
            if headers_only:
                check_header(root / name, name)
                return None
            return decode_image(root / name, name)
        except BadImageError as error:
            return error

    workers = max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        # Chunks bound how many decoded pictures wait for each other.
        for start in range(0, len(names), 256):
            for i, result in enumerate(pool.map(attempt, names[start : start + 256]), start):
                if isinstance(result, BadImageError):
                    bad.append(BadImage(result.name, result.reason))
                else:
                    good.append(i)
                    if pictures is not None and result is not None:
                        used += result.numel()
                        if used > budget:
                            pictures = None
                        else:
                            pictures.append(result)
                if on_progress:
                    on_progress(i + 1, len(names))
    if config.on_bad_image == "error":
        _raise_bad(bad, len(names), root)
    cache = PixelCache.of(pictures) if pictures is not None else None
    chosen = torch.tensor([targets[i] for i in good], dtype=torch.int64)
    return FolderSource(root, chosen, Names(names[i] for i in good), classes, cache), bad


def _cache_budget() -> int:
    """Bytes of decoded pictures that "auto" keeps: 2 GB, but at most a quarter of free memory, shared by the node's processes."""
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        with open("/proc/meminfo", encoding="ascii") as file:
            free.append(1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        # A container's limit ("max", no number, where there is none).
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        free.append(int(limit) - int(used))
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min([2 << 30, *(f // 4 for f in free)]) // local_processes)


# Arrays


def _digits(config: DataConfig) -> ArraySource:
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
    return ArraySource(images.repeat(1, 3, 1, 1), torch.from_numpy(scans.target).long(), names, tuple("0123456789"))


def _torchvision_cifar(kind: str, root: Path) -> DataSplits:
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    try:
        root.mkdir(parents=True, exist_ok=True)
        parts = [dataset(str(root), train=is_train, download=True) for is_train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise ValueError(
            f"{kind} is not in {root} and cannot be downloaded ({error}). Put {dataset.url} there by hand and unpack it, "
            "or point data.path to a folder that has it"
        ) from error
    classes = tuple(parts[0].classes)
    train, val = (
        ArraySource(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets, dtype=torch.int64),
            _Numbered(prefix, len(part)),
            classes,
        )
        for part, prefix in zip(parts, ("train", "test"))
    )
    return DataSplits(train, val, classes)


class _Numbered(Sequence[str]):
    """ "train/0", "train/1", ... without a list of them."""

    def __init__(self, prefix: str, count: int) -> None:
        self.prefix, self.count = prefix, count

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = range(self.count)[index]
        return [f"{self.prefix}/{i}" for i in numbers] if isinstance(numbers, range) else f"{self.prefix}/{numbers}"


def _open_npz(path: Path, config: DataConfig, on_progress: Progress | None) -> DataSplits:
    if path.is_dir():
        train_files = sorted(path.glob("data_batch_*.npz")) or [file for file in [path / "train.npz"] if file.is_file()]
        val_files = [file for name in ("test_batch", *_VAL_FOLDERS) if (file := path / f"{name}.npz").is_file()][:1]
    else:
        train_files, val_files = [path] if config.path and path.is_file() else [], []
    if not train_files:
        raise ValueError(f"data.path is {config.path or 'empty'}: no training .npz was found there.\n{LAYOUTS}")
    files = [_read_npz(file) for file in (*train_files, *val_files)]
    total, done = sum(len(arrays["labels"]) for arrays in files), 0
    splits: dict[str, list[_NpzPictures]] = {"train": [], "test": []}
    for i, arrays in enumerate(files):
        prefix = "train" if i < len(train_files) else "test"
        first = sum(part.count for part in splits[prefix])
        splits[prefix].append(_decode_npz(arrays, f"{prefix}/", first, done, total, on_progress))
        done += len(arrays["labels"])
    skipped = [bad for parts in splits.values() for part in parts for bad in part.bad]
    if config.on_bad_image == "error":
        _raise_bad(skipped, total, path)
    classes = _npz_classes(path, files)
    train, *held = [_join(parts, classes, path) for parts in splits.values() if parts]
    train_source, val_source = (train, held[0]) if held else _split(train, config)
    return DataSplits(train_source, val_source, classes, skipped)


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
        raise ValueError(f"{file}: labels are {labels.dtype} {labels.shape}; needed are integers from 0, one a picture")
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
                "needed are uint8 [N, H, W, 3] or [N, H, W] with one label a picture"
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
    encoded, offsets = arrays["jpeg"], arrays["offsets"]
    kept: list[int] = []
    bad: list[BadImage] = []
    images = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    for i, name in enumerate(names):
        try:
            picture = decode_image(encoded[offsets[i] : offsets[i + 1]].tobytes(), name)
            if not kept:
                images = torch.empty(len(names), *picture.shape, dtype=torch.uint8)
            elif picture.shape != images.shape[1:]:
                sizes = [f"{shape[2]} x {shape[1]}" for shape in (picture.shape, images.shape[1:])]
                raise BadImageError(
                    name, f"{sizes[0]} pixels where the first picture has {sizes[1]}; folders take any size"
                )
            images[len(kept)] = picture
            kept.append(i)
        except BadImageError as error:
            bad.append(BadImage(error.name, error.reason))
        if on_progress and (i % 256 == 255 or i + 1 == len(names)):
            on_progress(done + i + 1, total)
    return _NpzPictures(images[: len(kept)], targets[kept], [names[i] for i in kept], bad)


def _join(parts: list[_NpzPictures], classes: tuple[str, ...], path: Path) -> ArraySource:
    sizes = sorted({tuple(part.images.shape[2:]) for part in parts if part.names})
    if len(sizes) != 1:
        raise ValueError(f"{path}: pictures need one size, but the files hold {sizes or 'none'} (height, width)")
    filled = [part for part in parts if part.names]
    images = filled[0].images if len(filled) == 1 else torch.cat([part.images for part in filled])
    return ArraySource(
        images, torch.cat([part.targets for part in filled]), Names(n for p in filled for n in p.names), classes
    )


def _npz_classes(path: Path, files: list[dict[str, np.ndarray]]) -> tuple[str, ...]:
    """From classes.txt, else the array `classes`, else the numbers up to the largest label."""
    count = max((int(arrays["labels"].max()) + 1 for arrays in files if len(arrays["labels"])), default=0)
    listed = (path if path.is_dir() else path.parent) / "classes.txt"
    if path.is_dir() and listed.is_file():
        classes = tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
    else:
        given = next((arrays["classes"] for arrays in files if "classes" in arrays), None)
        classes = tuple(map(str, given)) if given is not None else tuple(map(str, range(count)))
    if len(classes) < max(count, 2):
        raise ValueError(
            f"{path}: labels go up to {count - 1}, but there are {len(classes)} classes; at least two are needed"
        )
    return classes


def _raise_bad(bad: list[BadImage], total: int, where: Path) -> None:
    if bad:
        listed = "\n".join(f"  {item}" for item in bad)
        raise ValueError(
            f"{len(bad)} of {total} pictures in {where} cannot be used:\n{listed}\n"
            'Repair or remove them, or leave them out with data.on_bad_image "skip".'
        )
