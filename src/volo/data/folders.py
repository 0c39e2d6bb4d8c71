"""Image folders: one folder of picture files for every class."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from torch import Tensor

from volo.config import DataConfig
from volo.data.decode import BadImage, BadImageError, decode_image
from volo.data.files import cache_folder, write_atomically
from volo.data.sources import (
    LAYOUTS,
    VAL_FOLDERS,
    DataSplits,
    FolderSource,
    ImageSource,
    Names,
    PixelCache,
    Progress,
    cache_budget,
    contents_of,
    in_parallel,
    raise_bad,
    split_by_seed,
)

IMAGE_ENDINGS = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
        ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif", ".heic", ".heif",
    }
)  # fmt: skip
"""Files with these endings are taken for pictures; HEIC is among them so that it is named and not silently left out."""

REMEMBERED_FROM = 50_000
"""In a folder of so many pictures what decoding them found is kept in the cache: it takes minutes."""

_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for a picture: a known ending, and not a hidden file."""
    path = PurePath(name)
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_ENDINGS


def open_folders(path: Path, config: DataConfig, on_progress: Progress | None = None) -> DataSplits:
    """Training and held-out pictures of an image folder; see `volo.data.images.open_data`. Raises ValueError."""
    if not config.path or not path.is_dir():
        raise ValueError(f"data.path is {config.path or 'empty'}, but data.kind 'folder' needs a folder.\n{LAYOUTS}")
    has_train = (path / "train").is_dir()
    val_root = next((path / name for name in VAL_FOLDERS if (path / name).is_dir()), None)
    if not has_train and val_root is not None and any(child.is_dir() for child in val_root.iterdir()):
        raise ValueError(f"{path} has {val_root.name}/ but no train/: it holds {contents_of(path)}.\n{LAYOUTS}")
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
    train_source: ImageSource
    val_source: ImageSource
    if val is None:
        train_source, val_source = split_by_seed(source, config)
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
    ignored = [_prefix(scan, path) + name for scan in scans for name in scan.ignored]
    return DataSplits(train_source, val_source, classes, skipped, notes, ignored)


def open_folder(
    path: str | Path, classes: Sequence[str], config: DataConfig, *, on_progress: Progress | None = None
) -> tuple[FolderSource, list[BadImage]]:
    """Pictures in class folders as a `FolderSource` with the given classes (evaluation), and the files left out.

    Folders are named like the classes, or by class number as in ImageNet-V2 ("0" to "999"); classes without a folder
    are fine. Raises ValueError as `open_data` does.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; it should hold a folder of pictures for every class")
    scan = _scan(path)
    if not set(scan.files) <= set(classes) and all(c.isdecimal() and int(c) < len(classes) for c in scan.files):
        scan = _Scan(path, {classes[int(name)]: files for name, files in scan.files.items()}, scan.ignored)
    _require_known(scan, classes)
    return _check([scan], path, tuple(classes), config, on_progress)


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
        raise ValueError(f"{root} has no class folders: it holds {contents_of(root)}.\n{LAYOUTS}")
    if not any(files.values()):
        raise ValueError(
            f"no pictures in the folders of {root} ({', '.join(list(files)[:8])}); "
            f"they end in {' '.join(sorted(IMAGE_ENDINGS))}"
        )
    return _Scan(root, {name: sorted(files[name]) for name in sorted(files)}, sorted(ignored))


def _prefix(scan: _Scan, root: Path) -> str:
    """What goes before the names of a scan, so that they are relative to `root`."""
    return "" if scan.root == root else f"{scan.root.name}/"


def _require_known(scan: _Scan, classes: Sequence[str]) -> None:
    known = set(classes)
    unknown = [name for name in scan.files if name not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} class folders in {scan.root} are unknown: {', '.join(unknown)}. "
            f"The {len(classes)} classes are {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}; "
            "rename or remove folders."
        )


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
        prefix = _prefix(scan, root)
        for class_name, files in scan.files.items():
            names += [prefix + file for file in files]
            targets += [number[class_name]] * len(files)

    tried = (
        _Tried([scan.root for scan in scans], root, names)
        if len(names) >= REMEMBERED_FROM and config.cache != "ram"
        else None
    )
    if tried is not None and (known := tried.read()) is not None:
        if config.on_bad_image == "error":
            raise_bad(known, len(names), root)
        left_out = {item.name for item in known}
        good = [i for i, name in enumerate(names) if name not in left_out]
        chosen = torch.tensor([targets[i] for i in good], dtype=torch.int64)
        return FolderSource(root, chosen, Names(names[i] for i in good), classes, None), known

    budget = {"auto": cache_budget(), "ram": math.inf, "none": 0.0}[config.cache]
    pictures: list[Tensor] | None = [] if budget else None
    good = []
    bad: list[BadImage] = []

    def attempt(name: str) -> Tensor | BadImage | None:
        try:
            picture = decode_image(root / name, name)
        except BadImageError as error:
            return BadImage(error.name, error.reason)
        return picture if pictures is not None else None

    for i, result in enumerate(in_parallel(attempt, names)):
        if isinstance(result, BadImage):
            bad.append(result)
        else:
            good.append(i)
            if pictures is not None and result is not None:
                pictures.append(result)
                budget -= result.numel()
                if budget < 0:
                    pictures = None
        if on_progress:
            on_progress(i + 1, len(names))
    if tried is not None:
        tried.write(bad)
    if config.on_bad_image == "error":
        raise_bad(bad, len(names), root)
    cache = PixelCache.of(pictures) if pictures is not None else None
    chosen = torch.tensor([targets[i] for i in good], dtype=torch.int64)
    return FolderSource(root, chosen, Names(names[i] for i in good), classes, cache), bad


class _Tried:
    """What decoding the pictures of a large folder found, kept until a name, a size or a time of change is another."""

    def __init__(self, folders: Sequence[Path], root: Path, names: Sequence[str]) -> None:
        where = hashlib.blake2b(b"\0".join(os.fsencode(f.resolve()) for f in folders), digest_size=12).hexdigest()
        self.path = cache_folder() / "tried" / f"{where}.json"
        listing = hashlib.blake2b(digest_size=16)
        for name in names:
            try:
                stat = (root / name).stat()
            except OSError:  # it is named when it is decoded
                listing.update(os.urandom(8))
                continue
            listing.update(os.fsencode(name) + f"\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
        self.listing = listing.hexdigest()

    def read(self) -> list[BadImage] | None:
        """The pictures that cannot be used; None where that is not known."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return [BadImage(*item) for item in content["bad"]] if content["listing"] == self.listing else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, bad: Sequence[BadImage]) -> None:
        text = json.dumps({"listing": self.listing, "bad": [[item.name, item.reason] for item in bad]})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(text.encode()))
        except OSError:  # a cache that cannot be written costs time, nothing else
            pass
