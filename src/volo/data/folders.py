"""Image folders: one folder of image files for every class."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from volo.config import DataConfig
from volo.data.classes import match_classes
from volo.data.decode import BadImage, decode_image
from volo.data.files import cache_folder, write_atomically
from volo.data.sources import (
    LAYOUTS,
    DataSplits,
    FolderSource,
    ImageSource,
    Names,
    PixelCache,
    Progress,
    Share,
    cache_budget,
    check_all,
    raise_bad,
    split_by_seed,
)
from volo.data.splits import IMAGE_FOLDERS, MASK_FOLDERS, WAY_OUT, Parts, inside, split_folders
from volo.data.walk import IMAGE_ENDINGS, contents_of, is_image_name, spelled, walk

REMEMBERED_FROM = 50_000
"""In a folder of so many images what decoding them found is kept in the cache: it takes minutes."""


def open_folders(
    path: Path, config: DataConfig, on_progress: Progress | None = None, share: Share = Share()
) -> DataSplits:
    """Training and held-out images of an image folder; see `volo.data.images.open_data`. Raises ValueError."""
    if not config.path or not path.is_dir():
        raise ValueError(f"data.path is {config.path or 'empty'}, but data.kind 'folder' needs a folder.\n{LAYOUTS}")
    parts = split_folders(path, config.splits)
    if parts.val and not parts.train:
        raise ValueError(
            f"{path} has {parts.val[0]}/ but no train/: it holds {contents_of(path)}. {WAY_OUT}.\n{LAYOUTS}"
        )
    scans = [_scan(inside(path / name)) for name in (*parts.train, *parts.val)] or [_scan(path)]
    train = scans[0]
    if empty := [name for name, files in train.files.items() if not files]:
        raise ValueError(
            f"no images in {len(empty)} class folders of {train.root}: {', '.join(empty)}. Fill or remove them."
        )
    classes = tuple(train.files)
    if len(classes) < 2:
        raise ValueError(
            f"{train.root} has one class folder only, {classes[0]}; classification needs at least two.\n{LAYOUTS}"
        )
    if config.splits == "auto":
        _refuse_masks(train.root, classes, parts)
    for scan in scans[1:]:
        _require_known(scan, classes)
    source, skipped = _check(scans, path, classes, config, on_progress, share)
    notes = [_ignored_note(scan) for scan in scans if scan.ignored]
    if parts.ignored:
        notes.append(f"ignored in {path}: {', '.join(name + '/' for name in parts.ignored[:8])}")
    train_source: ImageSource
    val_source: ImageSource
    if len(scans) == 1:
        train_source, val_source = split_by_seed(source, config)
    else:
        skipped_names = {bad.name for bad in skipped}
        in_train = sum(name not in skipped_names for name in train.names(path))
        train_source, val_source = source.select(range(in_train)), source.select(range(in_train, len(source)))
    counts = torch.bincount(train_source.targets, minlength=len(classes)).tolist()
    if without := [name for name, count in zip(classes, counts) if not count]:
        raise ValueError(f"no image that can be decoded in {len(without)} classes: {', '.join(without)}")
    ignored = [name for scan in scans for name in scan.ignored_names(path)]
    what = f"{parts.train[0]}/ and {parts.val[0]}/" if parts.val else ""
    return DataSplits(train_source, val_source, classes, skipped, notes, ignored, what)


def _refuse_masks(root: Path, classes: Sequence[str], parts: Parts) -> None:
    """Raises ValueError where the classes would be images and their masks: told apart without fail, and of no use."""
    names = [name.lower() for name in classes]
    if len(names) == 2 and any(n in IMAGE_FOLDERS for n in names) and any(n in MASK_FOLDERS for n in names):
        way_out = ",".join([*parts.train, *parts.val]) if parts.val else "none"
        raise ValueError(
            f"{root} has {' and '.join(f'{name}/' for name in classes)}, as images with a class for every pixel lie: train a "
            f"segmentation model on them (volo train photos_masks). If these are two classes, say --data.splits {way_out}"
        )


def open_folder(
    path: str | Path, classes: Sequence[str], config: DataConfig, *, on_progress: Progress | None = None
) -> tuple[FolderSource, list[BadImage]]:
    """Images in class folders as a `FolderSource` with the given classes (evaluation), and the files left out.

    Folders are named like the classes, or by class number as in ImageNet-V2 ("0" to "999", where no class is called by a
    number); classes without a folder are fine. Raises ValueError as `open_data` does.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; it should hold a folder of images for every class")
    scan = _scan(path)
    classes = tuple(map(spelled, classes))
    try:
        chosen = match_classes(tuple(scan.files), classes)
    except ValueError:
        _require_known(scan, classes)
        raise
    renamed = {classes[i]: files for i, files in zip(chosen, scan.files.values())}
    return _check([replace(scan, files=renamed)], path, classes, config, on_progress, Share())


@dataclass(frozen=True)
class _Scan:
    root: Path
    files: dict[str, list[str]]
    """Class folder -> image files, as paths relative to `root` with forward slashes; both sorted."""
    ignored: list[str]
    """Files that are no images by their ending, or lie in no class folder."""

    def names(self, base: Path) -> list[str]:
        """All images, relative to `base`, class by class."""
        return [self._below(base) + file for files in self.files.values() for file in files]

    def ignored_names(self, base: Path) -> list[str]:
        return [self._below(base) + file for file in self.ignored]

    def _below(self, base: Path) -> str:
        return "" if self.root == base else f"{self.root.relative_to(base).as_posix()}/"


def _scan(root: Path) -> _Scan:
    """Raises ValueError if there are no class folders, or no images in them, and for folders that cannot be listed."""
    files: dict[str, list[str]] = {}
    ignored = []
    for folder, names in walk(root):
        class_name = spelled(folder.partition("/")[0])
        if class_name:
            files.setdefault(class_name, [])
        for name in names:
            if class_name and is_image_name(name):
                files[class_name].append(name)
            else:
                ignored.append(name)
    if not files:
        raise ValueError(f"{root} has no class folders: it holds {contents_of(root)}.\n{LAYOUTS}")
    if not any(files.values()):
        raise ValueError(
            f"no images in the folders of {root} ({', '.join(list(files)[:8])}); "
            f"they end in {' '.join(sorted(IMAGE_ENDINGS))}"
        )
    return _Scan(root, {name: sorted(files[name]) for name in sorted(files)}, sorted(ignored))


def _require_known(scan: _Scan, classes: Sequence[str]) -> None:
    if unknown := [name for name in scan.files if name not in set(classes)]:
        raise ValueError(
            f"{len(unknown)} class folders in {scan.root} are unknown: {', '.join(unknown)}. "
            f"The {len(classes)} classes are {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}; "
            "rename or remove folders."
        )


def _ignored_note(scan: _Scan) -> str:
    shown = ", ".join(scan.ignored[:5]) + (", ..." if len(scan.ignored) > 5 else "")
    return f"ignored {len(scan.ignored)} files in {scan.root} that are not images or are not in a class folder: {shown}"


def _check(
    scans: list[_Scan],
    root: Path,
    classes: tuple[str, ...],
    config: DataConfig,
    on_progress: Progress | None,
    share: Share,
) -> tuple[FolderSource, list[BadImage]]:
    """All images of `scans`, one after the other, tried as `config.check` says; kept decoded if they fit into memory."""
    number = {name: i for i, name in enumerate(classes)}
    names = [name for scan in scans for name in scan.names(root)]
    targets = [number[c] for scan in scans for c, files in scan.files.items() for _ in files]
    folders = [scan.root for scan in scans]
    return open_files(root, names, torch.tensor(targets), classes, config, on_progress, share, folders)


def open_files(
    root: Path,
    names: Sequence[str],
    targets: Tensor,
    classes: tuple[str, ...],
    config: DataConfig,
    on_progress: Progress | None,
    share: Share,
    places: Sequence[Path],
) -> tuple[FolderSource, list[BadImage]]:
    """Image files called `names` below `root`, tried as `config.check` says; kept decoded if they fit into memory.

    Returns the source of those that can be decoded, with their `targets` ([N] or [N, T]), and the others. `places`, the
    folders (or the table) that they are listed by, tell data sets apart in the cache. Raises ValueError.
    """
    pictures: list[Tensor] | None = None
    bad: list[BadImage] = []
    if config.check == "full" or config.cache == "ram":
        tried = None
        known: list[BadImage] | None = None
        if len(names) >= REMEMBERED_FROM and config.cache != "ram":
            if share.rank == 0:
                tried = _Tried(places, root, names)
                known = tried.read()
            known = share.gather(known)[0]
        if known is not None:
            bad = known
        else:
            budget = {"auto": cache_budget(), "ram": math.inf, "none": 0.0}[config.cache]

            def attempt(i: int) -> tuple[None, tuple[Tensor]]:
                return None, (decode_image(root / names[i], names[i]),)

            results, kept = check_all(attempt, len(names), budget, share, on_progress)
            bad = [result for result in results if result is not None]
            pictures = None if kept is None else [pixels[0] for pixels in kept]
            if tried is not None:
                tried.write(bad)
    if config.on_bad_image == "error":
        raise_bad(bad, len(names), root)
    left_out = {item.name for item in bad}
    good = [i for i, name in enumerate(names) if name not in left_out]
    cache = None
    if pictures is not None:
        cache = PixelCache.of(pictures)
    return FolderSource(root, targets[good], Names(names[i] for i in good), classes, cache), bad


class _Tried:
    """What decoding the images of a large folder found, kept until a name, a size or a time of change is another."""

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
        """The images that cannot be used; None where that is not known."""
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
