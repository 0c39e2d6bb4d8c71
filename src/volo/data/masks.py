"""Images with a class for every pixel: what lies in a folder, which values its masks may hold, and what is wrong.

Inside, masks are uint8 [1, H, W] with classes 0..K-1 and `IGNORE` for void, whatever the files hold.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from volo.config import DataConfig, SegmentConfig, read_text
from volo.data.decode import BadImage, BadImageError, decode_mask, decode_oriented, image_size, read_file
from volo.data.sources import Names, PixelCache, Progress, Share, available_cores, cache_budget, check_all, raise_bad
from volo.data.splits import role
from volo.data.walk import contents_of, is_image_name, list_folder, spelled, walk

IGNORE = 255
"""Void: pixels that count neither in the loss nor in the score."""

LAYOUTS = """\
data.path can be, for task "segment",
  a folder with images/ and annotations/, each with train/ (or training/) and val/ (or validation/): a mask has the name
  of its image, in PNG. TRAIN.txt or VAL.txt beside them may name the images; with such lists images/ may be flat;
  Cityscapes as it is unpacked: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png.
Names of classes come from classes.csv (index,name,r,g,b), classes.txt (a name a line) or objectInfo150.txt (ADE20K)."""

Colour = tuple[int, int, int]
NamesAndColours = tuple[tuple[str, ...], tuple[Colour, ...]]

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
    """Images and their masks by number, named relative to `root`; decoded when asked for unless cached."""

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
        """(image uint8 [3, H, W], mask uint8 [1, H, W]), not to be written to. Raises BadImageError."""
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
    """Images without a mask, and names in a list without an image."""
    notes: list[str]
    what: str
    """For people: the folder or list of the split."""


def open_segmentation(
    data: DataConfig, segment: SegmentConfig, *, on_progress: Progress | None = None, share: Share = Share()
) -> SegmentationSplits:
    """Open training and held-out images with their masks; every pair is decoded and checked before this returns, in all
    processes of `share` together.

    `on_progress(done, total)` is called meanwhile. Raises ValueError for anything that a run would stumble over later:
    a layout that is not understood, an image without its mask, a mask of another size or with values out of range, files
    that cannot be decoded, masks with fewer than two classes. All of them are named, unless `data.on_bad_image` is "skip".
    """
    root, classes = open_classes(data, segment)
    parts = [find_pairs(root, segment, split) for split in (segment.train_split, segment.val_split)]
    (train, val), bad, values, notes = _check(root, parts, classes, data, on_progress, share)
    for pictures, split in ((train, segment.train_split), (val, segment.val_split)):
        if not len(pictures):
            raise ValueError(f"no usable images in the split {split!r} of {root}.\n{LAYOUTS}")
    counts = np.bincount(classes.meaning[classes.meaning >= 0], values[classes.meaning >= 0], 256)[: len(classes)]
    counts = counts.astype(np.int64)
    if data.check == "full":
        _require_classes(values, counts, classes, root)
    elif segment.class_weights != "none":
        raise ValueError(
            f"segment.class_weights {segment.class_weights!r} are computed from the masks, which data.check 'off' does not read; "
            "set it to full, or the weights to none"
        )
    understood = [
        f"{len(classes)} classes (share of the training pixels): "
        + ", ".join(f"{name} {share:.1%}" for name, share in zip(classes.names[:30], counts / max(1, counts.sum()))),
        f"{len(train):,} training images of {parts[0].what} and {len(val):,} held out, of {parts[1].what}",
    ]
    absent = [name for name, count in zip(classes.names, counts.tolist()) if not count]
    if absent and data.check == "full":
        notes.append(f"{len(absent)} of {len(classes)} classes have no training pixels: {', '.join(absent[:20])}")
    return SegmentationSplits(train, val, classes, counts, bad, understood + notes)


def _require_classes(values: np.ndarray, counts: np.ndarray, classes: ClassList, root: Path) -> None:
    """Raise ValueError where the masks have fewer than two classes, for there is nothing to learn from them then."""
    if (counts > 0).sum() >= 2:
        return
    found = np.flatnonzero(values)
    shown = ", ".join(f"{value} ({values[value] / values.sum():.1%} of the pixels)" for value in found[:8])
    only = next((f"only the class {classes.names[k]!r}" for k in np.flatnonzero(counts)), "none of the classes")
    void = [int(value) for value in found if classes.meaning[value] == IGNORE]
    advice = (
        f"{', '.join(map(str, void))} means void, pixels that do not count. If it is a class, write its number into the masks "
        f"in its place (black and white masks: 1 for white, e.g. with Pillow, mask.point(lambda v: v // 255))"
        if void
        else "Masks hold the number of a class at every pixel"
    )
    raise ValueError(f"the training masks of {root} hold the values {shown}: {only} is there to be learned. {advice}")


def open_split(
    data: DataConfig,
    segment: SegmentConfig,
    split: str,
    *,
    known: NamesAndColours | None = None,
    on_progress: Progress | None = None,
) -> tuple[MaskedPictures, list[BadImage]]:
    """One split, checked as `open_segmentation` does, and what was left out. Raises ValueError.

    `known`: the classes where no file beside the images names them.
    """
    root, classes = open_classes(data, segment, known)
    data = dataclasses.replace(data, cache="none")
    (pictures,), bad, _, _ = _check(root, [find_pairs(root, segment, split)], classes, data, on_progress, Share())
    if not len(pictures):
        raise ValueError(f"no usable images in the split {split!r} of {root}.\n{LAYOUTS}")
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
    """From the file beside the images; else what is `known`, or numbers if that is `num_classes` alone."""
    names: list[str] = []
    colours: list[Colour] = []
    if (path := root / "classes.csv").is_file():
        rows = list(csv.DictReader(read_text(path).splitlines()))
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
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    elif (path := root / "objectInfo150.txt").is_file():
        lines = read_text(path).splitlines()[1:]
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
    """Images of a split and their masks. Raises ValueError where the split is not there."""
    if is_cityscapes(root, segment):
        return _find_cityscapes(root, split)
    folders = list_folder(root)[0]
    images, masks = (
        next((root / name for wanted in kind for name in folders if name.lower() == wanted), None)
        for kind in (_IMAGE_FOLDERS, _MASK_FOLDERS)
    )
    if images is None or masks is None:
        raise ValueError(f"{root} has no images/ and annotations/: it holds {contents_of(root)}.\n{LAYOUTS}")
    folder = _of_split(list_folder(images)[0], split, images)
    lists = [name for name in list_folder(root)[1] if name.lower().endswith(".txt")]
    listing = _of_split([name[:-4] for name in lists], split, root)
    if folder is None and listing is None:
        raise ValueError(
            f"{root} has no split {split!r}: neither {images.name}/{split}/ (or a folder of that meaning) nor {split}.txt; "
            f"{images.name}/ holds {contents_of(images)}. Name the splits with --segment.train_split and --segment.val_split.\n{LAYOUTS}"
        )
    mask_folder = _of_split(list_folder(masks)[0], split, masks) if folder else None
    image_root, mask_root = images / (folder or ""), masks / (mask_folder or "")
    pictures = _by_stem(image_root, is_image_name)
    drawn = _by_stem(mask_root, lambda name: is_image_name(name) and Path(name).suffix.lower() in _MASK_ENDINGS)

    def relative(path: Path) -> str:
        return path.relative_to(root).as_posix()

    bad: list[BadImage] = []
    notes: list[str] = []
    pairs: dict[str, str] = {}
    lonely: list[str] = []
    if listing is not None:
        prefixes = (f"{relative(image_root)}/", f"{relative(images)}/", *([f"{folder}/"] if folder else []))
        for line in filter(None, map(str.strip, read_text(root / f"{listing}.txt").splitlines())):
            # A name may hold spaces; or something follows it, the name of the mask or a score.
            first, *rest = line.split()
            named = [stem for name in (line, first) for stem in _stems(name, prefixes)]
            stem = next((name for name in named if name in pictures), None)
            if stem is None:
                bad.append(BadImage(line, f"{listing}.txt names it, but {relative(image_root)}/ has no such image"))
            elif relative(pictures[stem]) in pairs or stem in lonely:
                raise ValueError(f"{root / listing}.txt names an image twice: {line}")
            elif len(rest) == 1 and is_image_name(rest[0]) and (root / rest[0]).is_file():
                pairs[relative(pictures[stem])] = Path(rest[0]).as_posix()
            elif stem in drawn:
                pairs[relative(pictures[stem])] = relative(drawn[stem])
            else:
                lonely.append(stem)
    else:
        pairs = {relative(path): relative(drawn[stem]) for stem, path in pictures.items() if stem in drawn}
        lonely = [stem for stem in pictures if stem not in drawn]
        if unused := sorted(drawn.keys() - pictures.keys()):
            notes.append(f"{len(unused)} masks in {mask_root} have no image: {', '.join(unused[:5])}")
    if lonely:
        others = [name for _, names in walk(mask_root) for name in names]
        bad += [
            BadImage(relative(pictures[stem]), _why_no_mask(stem, others, f"{relative(mask_root)}/")) for stem in lonely
        ]
    what = f"{listing}.txt" if listing else f"{relative(image_root)}/"
    return Pairs(list(pairs), list(pairs.values()), bad, notes, what)


def _of_split(names: list[str], split: str, where: Path) -> str | None:
    """Which of the folders (or lists) is that of a split: the one of its name, else the one that means the same."""
    if split in names:
        return split
    alike = [name for name in names if role(name) is not None and role(name) == role(split)]
    if len(alike) > 1:
        raise ValueError(
            f"{where} has {', '.join(alike)}, which may all be the split {split!r}; name it with --segment.train_split or "
            "--segment.val_split"
        )
    return alike[0] if alike else None


def _stems(name: str, prefixes: Sequence[str]) -> list[str]:
    """What an image in a list may be called: its path without ending, below its folder."""
    name = spelled(name.replace("\\", "/").removeprefix("./"))
    stem = name.rpartition(".")[0] if is_image_name(name) else name
    return [stem, *(stem.removeprefix(prefix) for prefix in prefixes if stem.startswith(prefix))]


def _why_no_mask(stem: str, others: list[str], folder: str) -> str:
    """The reason, by what lies where the mask should be."""
    reason = "there is no mask for it"
    same = next((name for name in others if spelled(name.rpartition(".")[0]) == stem), None)
    if same is not None:
        lossy = Path(same).suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif")
        why = "JPEG changes class numbers: save masks as PNG, from their source" if lossy else "masks are PNG files"
        return f"{reason}: {folder} has {same}, but {why}"
    last = stem.rpartition("/")[2].lower()
    near = [name for name in others if last in (part := Path(name).stem.lower()) and not _goes_on(part, last)]
    return (
        f"{reason}: {folder} has {near[0]}, but the name has to be {stem}.png"
        if near
        else f"{reason} ({folder}{stem}.png)"
    )


def _goes_on(name: str, part: str) -> bool:
    """Whether `part` in `name` is only a piece of a longer number or word, as 1 in 12 is."""
    at = name.index(part)
    around = name[at - 1 : at] + name[at + len(part) : at + len(part) + 1]
    return any(character.isalnum() for character in around)


def _by_stem(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Path]:
    """Files in `folder` and below by their path without ending, sorted. Raises ValueError where two have the same."""
    found: dict[str, Path] = {}
    for name in sorted(name for _, names in walk(folder) for name in names if wanted(name)):
        stem = spelled(name.rpartition(".")[0])
        if stem in found:
            raise ValueError(f"two files in {folder} have the same name: {found[stem].name} and {Path(name).name}")
        found[stem] = folder / name
    return found


def _find_cityscapes(root: Path, split: str) -> Pairs:
    pictures = root / "leftImg8bit" / split
    if not pictures.is_dir():
        there = contents_of(pictures.parent) if pictures.parent.is_dir() else "nothing"
        raise ValueError(f"{pictures.parent} has no {split}/: it holds {there}.\n{LAYOUTS}")
    names, masks, bad = [], [], []
    for path in sorted(
        pictures / name for _, files in walk(pictures) for name in files if name.endswith("_leftImg8bit.png")
    ):
        stem = path.name.removesuffix("_leftImg8bit.png")
        mask = root / "gtFine" / path.parent.relative_to(pictures.parent) / f"{stem}_gtFine_labelIds.png"
        name = path.relative_to(root).as_posix()
        if mask.is_file():
            names.append(name)
            masks.append(mask.relative_to(root).as_posix())
        else:
            bad.append(BadImage(name, f"there is no mask for it ({mask.relative_to(root).as_posix()})"))
    return Pairs(names, masks, bad, [], pictures.relative_to(root).as_posix())


# Files to tensors


def load_pair(root: Path, name: str, mask_name: str, classes: ClassList) -> tuple[Tensor, Tensor]:
    """(image uint8 [3, H, W], mask uint8 [1, H, W]) of two files. Raises BadImageError for what does not fit.

    Both are turned as their own EXIF orientation says, as every viewer shows them.
    """
    image, values, _ = _read_pair(root, name, mask_name, classes)
    return image, torch.from_numpy(classes.meaning[values].astype(np.uint8))[None]


def _read_pair(root: Path, name: str, mask_name: str, classes: ClassList) -> tuple[Tensor, np.ndarray, bool]:
    """Image, values of the mask, and whether the image alone has an EXIF orientation."""
    image, turned = decode_oriented(read_file(root / name, name), name)
    values, mask_turned = decode_mask(read_file(root / mask_name, mask_name), mask_name)
    H, W = image.shape[1:]
    if values.shape != (H, W):
        exif = (
            f". The image has EXIF orientation {turned} and the mask {mask_turned}: draw the mask over the image as viewers "
            "show it, or write the rotation into the pixels of both"
            if turned != mask_turned and values.shape == (W, H)
            else ""
        )
        raise BadImageError(
            mask_name, f"the mask has {values.shape[1]} x {values.shape[0]} pixels and its image {W} x {H}{exif}"
        )
    if (wrong := classes.meaning[values] < 0).any():
        strange, counts = np.unique(values[wrong], return_counts=True)
        shown = ", ".join(f"{value} ({count:,} pixels)" for value, count in zip(strange[:5], counts[:5]))
        raise BadImageError(mask_name, f"values out of range: {shown}; allowed are {classes.allowed}")
    return image, values, turned != 1 and mask_turned == 1


def _check(
    root: Path,
    parts: list[Pairs],
    classes: ClassList,
    data: DataConfig,
    on_progress: Progress | None,
    share: Share,
) -> tuple[list[MaskedPictures], list[BadImage], np.ndarray, list[str]]:
    """Decode the pairs of all parts: the good ones of each part, kept in memory if they fit; the bad ones; the number of
    pixels of each value in the masks of the first part; notes. Raises ValueError for bad ones unless they are skipped."""
    names = [name for pairs in parts for name in pairs.names]
    masks = [name for pairs in parts for name in pairs.masks]
    first = len(parts[0].names)

    def attempt(i: int) -> tuple[tuple[tuple[int, ...], np.ndarray, bool], tuple[Tensor, Tensor]]:
        image, values, differs = _read_pair(root, names[i], masks[i], classes)
        mask = torch.from_numpy(classes.meaning[values].astype(np.uint8))[None]
        return (tuple(values.shape), np.bincount(values.ravel(), minlength=256), differs), (image, mask)

    def look(i: int) -> tuple[tuple[tuple[int, ...], int, bool], tuple[()]]:
        return (image_size(root / names[i], names[i]), 0, False), ()

    bad = [item for pairs in parts for item in pairs.bad]
    total = len(names) + len(bad)
    budget = {"auto": float(cache_budget()), "ram": math.inf, "none": 0.0}[
        data.cache if data.check == "full" else "none"
    ]
    # Decoded images may be large: only a few wait for their turn.
    results, kept = check_all(
        attempt if data.check == "full" else look, len(names), budget, share, on_progress, 2 * available_cores()
    )
    good = [i for i, result in enumerate(results) if not isinstance(result, BadImage)]
    bad += [result for result in results if isinstance(result, BadImage)]
    if data.on_bad_image == "error":
        raise_bad(bad, total, root)
    values = sum((results[i][1] for i in good if i < first), np.zeros(256, np.int64))
    notes = [note for pairs in parts for note in pairs.notes]
    if differs := [names[i] for i in good if results[i][2]]:
        notes.append(
            f"{len(differs)} images have an EXIF orientation and their masks none, such as {differs[0]}: images are turned as "
            "viewers show them, masks stay as they are"
        )
    bounds = [0, first, len(names)] if len(parts) == 2 else [0, first]
    opened = []
    for low, high in zip(bounds, bounds[1:]):
        chosen = [i for i in good if low <= i < high]
        caches: tuple[PixelCache | None, PixelCache | None] = (None, None)
        if kept is not None:
            pixels, kept = kept[: len(chosen)], kept[len(chosen) :]
            caches = PixelCache.of([pair[0] for pair in pixels]), PixelCache.of([pair[1] for pair in pixels])
        sizes = np.array([results[i][0] for i in chosen], np.int64).reshape(-1, 2)
        its_names, its_masks = Names(names[i] for i in chosen), Names(masks[i] for i in chosen)
        opened.append(MaskedPictures(root, its_names, its_masks, sizes, classes, *caches))
    return opened, bad, values, notes
