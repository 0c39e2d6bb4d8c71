"""Pictures with a class for every pixel: what lies in a folder, which values its masks may hold, and what is wrong.

Inside, masks are uint8 [1, H, W] with classes 0..K-1 and `IGNORE` for void, whatever the files hold.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from volo.config import DataConfig, SegmentConfig
from volo.data.decode import BadImage, BadImageError, decode_image, naming, open_picture_file
from volo.data.folders import is_image_name
from volo.data.sources import (
    Names,
    PixelCache,
    Progress,
    available_cores,
    cache_budget,
    contents_of,
    in_parallel,
    raise_bad,
)

IGNORE = 255
"""Void: pixels that count neither in the loss nor in the score."""

LAYOUTS = """\
data.path can be, for task "segment",
  a folder with images/ and annotations/, each with train/ (or training/) and val/ (or validation/): a mask has the name
  of its picture, in PNG. TRAIN.txt or VAL.txt beside them may name the pictures; with such lists images/ may be flat;
  Cityscapes as it is unpacked: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png.
Names of classes come from classes.csv (index,name,r,g,b), classes.txt (a name a line) or objectInfo150.txt (ADE20K)."""

Colour = tuple[int, int, int]
NamesAndColours = tuple[tuple[str, ...], tuple[Colour, ...]]

_ALIASES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
_IMAGE_FOLDERS, _MASK_FOLDERS = ("images", "imgs", "img"), ("annotations", "masks", "labels", "mask")
_MASK_ENDINGS = frozenset((".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".webp"))

# cityscapesscripts/helpers/labels.py: name, id in the files, colour, of the 19 classes that are scored.
CITYSCAPES: tuple[tuple[str, int, Colour], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
_CITYSCAPES_IDS = 34


@dataclass(frozen=True)
class ClassList:
    """Names and display colours of the classes, and what the values in mask files mean."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    meaning: np.ndarray
    """int16 [256]: class of each value in a file, `IGNORE` for void, -1 for values that must not occur."""
    allowed: str
    """For people: which values may occur."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class MaskedPictures:
    """Pictures and their masks by number, named relative to `root`; decoded when asked for unless cached."""

    root: Path
    names: Sequence[str]
    masks: Sequence[str]
    sizes: np.ndarray
    """int64 [N, 2]: height and width."""
    classes: ClassList
    pixel_cache: PixelCache | None = None
    mask_cache: PixelCache | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """(picture uint8 [3, H, W], mask uint8 [1, H, W]), not to be written to. Raises BadImageError."""
        if self.pixel_cache is not None and self.mask_cache is not None:
            return self.pixel_cache[index], self.mask_cache[index]
        return load_pair(self.root, self.names[index], self.masks[index], self.classes)


@dataclass(frozen=True)
class SegmentationSplits:
    """What `open_segmentation` found."""

    train: MaskedPictures
    val: MaskedPictures
    classes: ClassList
    pixel_counts: np.ndarray
    """int64 [K]: pixels of each class in the training masks."""
    skipped: list[BadImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """Files of a split, matched by name: paths relative to the root, sorted, or in the order of its list."""

    names: list[str]
    masks: list[str]
    bad: list[BadImage]
    """Pictures without a mask, and names in a list without a picture."""
    notes: list[str]


def open_segmentation(
    data: DataConfig, segment: SegmentConfig, *, on_progress: Progress | None = None
) -> SegmentationSplits:
    """Open training and held-out pictures with their masks; every pair is decoded and checked before this returns.

    `on_progress(done, total)` is called meanwhile. Raises ValueError for anything that a run would stumble over later:
    a layout that is not understood, a picture without its mask, a mask of another size or with values out of range, files
    that cannot be decoded. All of them are named, unless `data.on_bad_image` is "skip".
    """
    root, classes = open_classes(data, segment)
    parts = [find_pairs(root, segment, split) for split in (segment.train_split, segment.val_split)]
    total = sum(len(pairs.names) for pairs in parts)
    opened, bad, counts = [], [], np.zeros(len(classes), np.int64)
    budget = {"auto": float(cache_budget()), "ram": math.inf, "none": 0.0}[data.cache]
    done = 0
    for part, pairs in enumerate(parts):
        bad += pairs.bad

        def progress(count: int, before: int = done) -> None:
            if on_progress:
                on_progress(before + count, total)

        pictures, wrong, pixels, budget = _check(root, pairs, classes, budget, progress)
        opened.append(pictures)
        bad += wrong
        done += len(pairs.names)
        if part == 0:
            counts = pixels
    total += sum(len(pairs.bad) for pairs in parts)
    if data.on_bad_image == "error":
        raise_bad(bad, total, root)
    for pictures, split in zip(opened, (segment.train_split, segment.val_split)):
        if not len(pictures):
            raise ValueError(f"no usable pictures in the split {split!r} of {root}.\n{LAYOUTS}")
    notes = [note for pairs in parts for note in pairs.notes]
    if absent := [name for name, count in zip(classes.names, counts.tolist()) if not count]:
        notes.append(f"{len(absent)} of {len(classes)} classes have no training pixels: {', '.join(absent[:20])}")
    return SegmentationSplits(opened[0], opened[1], classes, counts, bad, notes)


def open_split(
    data: DataConfig,
    segment: SegmentConfig,
    split: str,
    *,
    known: NamesAndColours | None = None,
    on_progress: Progress | None = None,
) -> tuple[MaskedPictures, list[BadImage]]:
    """One split, checked as `open_segmentation` does, and what was left out. Raises ValueError.

    `known`: the classes where no file beside the pictures names them.
    """
    root, classes = open_classes(data, segment, known)
    pairs = find_pairs(root, segment, split)
    pictures, wrong, _, _ = _check(
        root, pairs, classes, 0.0, lambda done: on_progress(done, len(pairs.names)) if on_progress else None
    )
    bad = pairs.bad + wrong
    if data.on_bad_image == "error":
        raise_bad(bad, len(pairs.names) + len(pairs.bad), root)
    if not len(pictures):
        raise ValueError(f"no usable pictures in the split {split!r} of {root}.\n{LAYOUTS}")
    return pictures, bad


# What lies there


def open_classes(
    data: DataConfig, segment: SegmentConfig, known: NamesAndColours | None = None
) -> tuple[Path, ClassList]:
    """The folder, and its classes, which are `known` where nothing there names them. Raises ValueError."""
    root = Path(data.path).expanduser()
    if not data.path or not root.is_dir():
        raise ValueError(f"data.path is {data.path or 'empty'}, which is no folder.\n{LAYOUTS}")
    if is_cityscapes(root, segment):
        if segment.num_classes not in (0, len(CITYSCAPES)):
            raise ValueError(f"Cityscapes has {len(CITYSCAPES)} classes; segment.num_classes is {segment.num_classes}")
        meaning = np.full(256, -1, np.int16)
        meaning[:_CITYSCAPES_IDS] = meaning[IGNORE] = IGNORE  # the licence plate, -1, is stored as 255
        for train_id, (_, label_id, _) in enumerate(CITYSCAPES):
            meaning[label_id] = train_id
        allowed = f"Cityscapes' label ids 0 to {_CITYSCAPES_IDS - 1}, and 255"
        return root, ClassList(tuple(c[0] for c in CITYSCAPES), tuple(c[2] for c in CITYSCAPES), meaning, allowed)
    names, colours = _read_classes(root, segment.num_classes, known)
    num_classes = len(names)
    first = 1 if segment.reduce_zero_label else 0
    if num_classes + first > IGNORE:
        raise ValueError(f"masks of 8 bits hold at most {IGNORE - first} classes besides void; given: {num_classes}")
    meaning = np.full(256, -1, np.int16)
    meaning[first : first + num_classes] = np.arange(num_classes)
    if not 0 <= segment.ignore_label <= 255:
        raise ValueError(f"segment.ignore_label is a value of 8 bits, 0 to 255; given: {segment.ignore_label}")
    void = sorted({IGNORE, segment.ignore_label} | ({0} if segment.reduce_zero_label else set()))
    meaning[void] = IGNORE
    allowed = f"{first} to {first + num_classes - 1}, and {', '.join(map(str, void))} for void"
    return root, ClassList(names, colours, meaning, allowed)


def is_cityscapes(root: Path, segment: SegmentConfig) -> bool:
    return segment.layout == "cityscapes" or (
        segment.layout == "auto" and (root / "leftImg8bit").is_dir() and not (root / "images").is_dir()
    )


def _read_classes(root: Path, num_classes: int, known: NamesAndColours | None) -> NamesAndColours:
    """From the file beside the pictures; else what is `known`, or numbers if that is `num_classes` alone."""
    names: list[str] = []
    colours: list[Colour] = []
    if (path := root / "classes.csv").is_file():
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        try:
            rows.sort(key=lambda row: int(row["index"]))
            names = [row["name"] for row in rows]
            if [int(row["index"]) for row in rows] != list(range(len(rows))):
                raise ValueError("index must count from 0")
            if rows and all(row.get(c) for row in rows for c in "rgb"):
                colours = [(int(row["r"]), int(row["g"]), int(row["b"])) for row in rows]
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is read as index,name[,r,g,b] with a header; {error}") from error
    elif (path := root / "classes.txt").is_file():
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif (path := root / "objectInfo150.txt").is_file():
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if names and num_classes and len(names) != num_classes:
        raise ValueError(f"segment.num_classes is {num_classes}, but {path} names {len(names)} classes")
    if not names and known is not None:
        return known
    if not names:
        if not num_classes:
            raise ValueError(
                f"{root} says nothing about classes (no classes.csv, classes.txt or objectInfo150.txt). Add one of these, "
                "or set segment.num_classes"
            )
        names = [str(i) for i in range(num_classes)]
    return tuple(names), tuple(colours or palette(len(names)))


def palette(count: int) -> list[Colour]:
    """Colours that differ, however many are needed: those of Pascal VOC, from the bits of the class number plus one."""
    colours = []
    for number in range(1, count + 1):
        r = g = b = 0
        for bit in range(8):
            r |= (number >> (3 * bit) & 1) << (7 - bit)
            g |= (number >> (3 * bit + 1) & 1) << (7 - bit)
            b |= (number >> (3 * bit + 2) & 1) << (7 - bit)
        colours.append((r, g, b))
    return colours


def find_pairs(root: Path, segment: SegmentConfig, split: str) -> Pairs:
    """Pictures of a split and their masks. Raises ValueError where the split is not there."""
    if is_cityscapes(root, segment):
        return _find_cityscapes(root, split)
    images = next((root / name for name in _IMAGE_FOLDERS if (root / name).is_dir()), None)
    masks = next((root / name for name in _MASK_FOLDERS if (root / name).is_dir()), None)
    if images is None or masks is None:
        raise ValueError(f"{root} has no images/ and annotations/: it holds {contents_of(root)}.\n{LAYOUTS}")
    aliases = _ALIASES.get(split, (split,))
    folder = next((name for name in aliases if (images / name).is_dir()), None)
    listing = next((root / f"{name}.txt" for name in aliases if (root / f"{name}.txt").is_file()), None)
    if folder is None and listing is None:
        raise ValueError(
            f"{root} has no split {split!r}: neither {images.name}/{' nor '.join(f'{a}/' for a in aliases)} nor {aliases[0]}.txt; "
            f"{images.name}/ holds {contents_of(images)}.\n{LAYOUTS}"
        )

    def relative(path: Path) -> str:
        return path.relative_to(root).as_posix()

    image_root = images / folder if folder else images
    mask_root = next((masks / name for name in aliases if (masks / name).is_dir()), masks) if folder else masks
    pictures, notes = _by_stem(image_root, is_image_name)
    drawn, more = _by_stem(mask_root, lambda name: is_image_name(name) and Path(name).suffix.lower() in _MASK_ENDINGS)
    stems, bad = sorted(pictures), []
    if listing is not None:
        stems, prefix = [], f"{folder}/" if folder else ""
        for line in filter(None, map(str.strip, listing.read_text(encoding="utf-8").splitlines())):
            # A name may hold spaces; or something follows it, the name of the mask or a score.
            named = [_stem(name).removeprefix(prefix) for name in (line, line.split()[0])]
            if stem := next((name for name in named if name in pictures), None):
                stems.append(stem)
            else:
                bad.append(BadImage(line, f"{listing.name} names it, but {relative(image_root)}/ has no such picture"))
        if len(set(stems)) != len(stems):
            raise ValueError(f"{listing} names a picture twice")
    elif lonely := sorted(drawn.keys() - pictures.keys()):
        notes.append(f"{len(lonely)} masks in {mask_root} have no picture: {', '.join(lonely[:5])}")
    matched = [stem for stem in stems if stem in drawn]
    bad += [_without_mask(relative(pictures[stem])) for stem in stems if stem not in drawn]
    return Pairs(
        [relative(pictures[stem]) for stem in matched],
        [relative(drawn[stem]) for stem in matched],
        bad,
        notes + more,
    )


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix() if is_image_name(name) else name


def _without_mask(name: str) -> BadImage:
    return BadImage(name, "there is no mask for it")


def _by_stem(folder: Path, wanted) -> tuple[dict[str, Path], list[str]]:  # type: ignore[no-untyped-def]
    """Files in `folder` and below by their path without ending. Raises ValueError where two have the same."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if not wanted(path.name) or not path.is_file():
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"two files in {folder} have the same name: {found[stem].name} and {path.name}")
        found[stem] = path
    return found, []


def _find_cityscapes(root: Path, split: str) -> Pairs:
    pictures = root / "leftImg8bit" / split
    if not pictures.is_dir():
        raise ValueError(
            f"{root / 'leftImg8bit'} has no {split}/: it holds {contents_of(root / 'leftImg8bit') if (root / 'leftImg8bit').is_dir() else 'nothing'}.\n{LAYOUTS}"
        )
    names, masks, bad = [], [], []
    for path in sorted(pictures.glob("*/*_leftImg8bit.png")):
        stem = path.name.removesuffix("_leftImg8bit.png")
        mask = root / "gtFine" / split / path.parent.name / f"{stem}_gtFine_labelIds.png"
        name = path.relative_to(root).as_posix()
        if mask.is_file():
            names.append(name)
            masks.append(mask.relative_to(root).as_posix())
        else:
            bad.append(_without_mask(name))
    return Pairs(names, masks, bad, [])


# Files to tensors


def load_pair(root: Path, name: str, mask_name: str, classes: ClassList) -> tuple[Tensor, Tensor]:
    """(picture uint8 [3, H, W], mask uint8 [1, H, W]) of two files. Raises BadImageError for what does not fit."""
    image = decode_image(root / name, name)
    values = decode_mask(root / mask_name, mask_name)
    if values.shape != image.shape[1:]:
        H, W = image.shape[1:]
        raise BadImageError(
            mask_name, f"the mask has {values.shape[1]} x {values.shape[0]} pixels and its picture {W} x {H}"
        )
    meant = classes.meaning[values]
    if (meant < 0).any():
        strange, counts = np.unique(values[meant < 0], return_counts=True)
        shown = ", ".join(f"{value} ({count:,} pixels)" for value, count in zip(strange[:5], counts[:5]))
        raise BadImageError(mask_name, f"values out of range: {shown}; allowed are {classes.allowed}")
    return image, torch.from_numpy(meant.astype(np.uint8))[None]


def decode_mask(path: Path, name: str) -> np.ndarray:
    """A mask file's values, uint8 [H, W]: grey levels or palette indices. Raises BadImageError."""
    with open_picture_file(path, name) as file:
        content = file.read()
    with naming(name, content), Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode not in ("L", "P", "1", "I;16", "I"):
            raise BadImageError(
                name, f"a mask has one channel of class numbers, this is {image.mode}; turn colours into numbers first"
            )
        values = np.asarray(image)
    if values.dtype != np.uint8:
        if values.min() < 0 or values.max() > 255:
            raise BadImageError(name, f"values from {values.min()} to {values.max()}; masks hold 0 to 255")
        values = values.astype(np.uint8)
    return values


def _check(
    root: Path, pairs: Pairs, classes: ClassList, budget: float, on_progress
) -> tuple[MaskedPictures, list[BadImage], np.ndarray, float]:  # type: ignore[no-untyped-def]
    """Decode all pairs in parallel: the good ones, kept in memory if `budget` bytes suffice; the bad ones; the number of
    pixels of each class; what is left of the budget."""

    def attempt(i: int) -> tuple[tuple[int, ...], np.ndarray, tuple[Tensor, Tensor] | None] | BadImage:
        """Height and width, pixels of each value, and the pair itself while pairs are kept."""
        try:
            image, mask = load_pair(root, pairs.names[i], pairs.masks[i], classes)
        except BadImageError as error:
            return BadImage(error.name, error.reason)
        values = np.bincount(mask.numpy().ravel(), minlength=256)
        return tuple(mask.shape[1:]), values, (image, mask) if kept is not None else None

    counts = np.zeros(256, np.int64)
    kept: tuple[list[Tensor], list[Tensor]] | None = ([], []) if budget else None
    good, sizes, bad = [], [], []
    # Decoded pictures may be large: only a few wait for their turn.
    for i, result in enumerate(in_parallel(attempt, range(len(pairs.names)), chunk=2 * available_cores())):
        on_progress(i + 1)
        if isinstance(result, BadImage):
            bad.append(result)
            continue
        size, values, pair = result
        good.append(i)
        sizes.append(size)
        counts += values
        if kept is not None and pair is not None:
            budget -= pair[0].numel() + pair[1].numel()
            if budget >= 0:
                kept[0].append(pair[0])
                kept[1].append(pair[1])
            else:
                kept, budget = None, 0.0
    caches = (None, None) if kept is None else tuple(PixelCache.of(part) for part in kept)
    pictures = MaskedPictures(
        root,
        Names(pairs.names[i] for i in good),
        Names(pairs.masks[i] for i in good),
        np.array(sizes, np.int64).reshape(-1, 2),
        classes,
        *caches,
    )
    return pictures, bad, counts[: len(classes)], budget
