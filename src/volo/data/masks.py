"""Images with a class for every pixel: what lies in a folder, which values its masks may hold, and what is wrong.

Inside, masks are uint8 [1, H, W] with classes 0..K-1 and `IGNORE` for void, whatever the files hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from volo.config import DataConfig, SegmentConfig, read_text
from volo.data.decode import BadImage, BadImageError, decode_mask, decode_oriented, image_size, read_file
from volo.data.mask_values import CITYSCAPES as CITYSCAPES
from volo.data.mask_values import (
    IGNORE,
    ClassList,
    Declared,
    NamesAndColours,
    Seen,
    cityscapes_classes,
    class_list,
    has_object,
    is_cityscapes,
    read_declared,
    refuse_nothing_said,
    require_same_meaning,
    understand,
)
from volo.data.mask_values import palette as palette
from volo.data.sources import Names, PixelCache, Progress, Share, available_cores, cache_budget, check_all, raise_bad
from volo.data.splits import IMAGE_FOLDERS, MASK_FOLDERS, TRAIN, VAL, held_out, role
from volo.data.walk import contents_of, is_image_name, list_folder, spelled, walk

LAYOUTS = """\
data.path can be, for task "segment",
  a folder with images/ and annotations/, each with train/ (or training/) and val/ (or validation/): a mask has the name
  of its image (01.png), or one like 01_mask.png, and is a PNG. TRAIN.txt or VAL.txt beside them may name the images; with
  such lists images/ may be flat;
  a folder with images/ and masks/ and no folders in images/: data.val_fraction of the images is held out;
  Cityscapes as it is unpacked: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png.
Names of classes come from classes.csv (index,name,r,g,b), classes.txt (a name a line) or objectInfo150.txt (ADE20K). With
none of them, masks of 0 and 255 alone, or 0 and 1 alone, are of background and object."""

_MASK_ENDINGS = frozenset((".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm", ".webp"))


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
    is_all: bool = False
    """The folder has no splits, and all its images are here."""

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
    is_drawn: bool = False
    """The folder has no splits: which images are held out was drawn by data.split_seed."""
    renamed: list[str] = field(default_factory=list)
    """Those of `masks` whose names are more than that of the image."""


def open_segmentation(
    data: DataConfig, segment: SegmentConfig, *, on_progress: Progress | None = None, share: Share = Share()
) -> SegmentationSplits:
    """Open training and held-out images with their masks; every pair is decoded and checked before this returns, in all
    processes of `share` together.

    `on_progress(done, total)` is called meanwhile. Raises ValueError for anything that a run would stumble over later:
    a layout that is not understood, an image without its mask, a mask of another shape or with values out of range, files
    that cannot be decoded, masks with fewer than two classes. All of them are named, unless `data.on_bad_image` is "skip".
    """
    root, declared = _open_root(data, segment)
    parts = [find_pairs(root, segment, split, data) for split in (segment.train_split, segment.val_split)]
    if parts[0].is_drawn:  # both looked at the same folder
        parts[1] = dataclasses.replace(parts[1], bad=[], notes=[])
    checked = _check(root, parts, declared, segment, data, on_progress, share)
    train, val = checked.parts
    classes, counts = checked.classes, checked.counts
    for pictures, split in ((train, segment.train_split), (val, segment.val_split)):
        if not len(pictures):
            raise ValueError(f"no usable images in the split {split!r} of {root}.\n{LAYOUTS}")
    if data.check == "full":
        _require_classes(checked.values, counts, classes, root)
    elif segment.class_weights != "none":
        raise ValueError(
            f"segment.class_weights {segment.class_weights!r} are computed from the masks, which data.check 'off' does not read; "
            "set it to full, or the weights to none"
        )
    how = (
        f", chosen by split_seed {data.split_seed} among the files of {parts[0].what}"
        if parts[0].is_drawn
        else f", of {parts[1].what}"
    )
    of = "" if parts[0].is_drawn else f" of {parts[0].what}"
    understood = [
        f"{len(classes)} classes (share of the training pixels): "
        + ", ".join(f"{name} {share:.1%}" for name, share in zip(classes.names[:30], counts / max(1, counts.sum()))),
        f"{len(train):,} training images{of} and {len(val):,} held out{how}",
    ]
    notes = checked.notes
    absent = [name for name, count in zip(classes.names, counts.tolist()) if not count]
    if absent and data.check == "full":
        notes.append(f"{len(absent)} of {len(classes)} classes have no training pixels: {', '.join(absent[:20])}")
    return SegmentationSplits(train, val, classes, counts, checked.bad, list(dict.fromkeys(understood + notes)))


def _require_classes(values: np.ndarray, counts: np.ndarray, classes: ClassList, root: Path) -> None:
    """Raise ValueError where the masks have fewer than two classes, for there is nothing to learn from them then."""
    if (counts > 0).sum() >= 2:
        return
    found = np.flatnonzero(values)
    shown = (
        ", ".join(f"{value} ({values[value] / values.sum():.1%} of the pixels)" for value in found[:8])
        or "of one colour"
    )
    only = next((f"only the class {classes.names[k]!r}" for k in np.flatnonzero(counts)), "none of the classes")
    void = [int(value) for value in found if classes.meaning[value] == IGNORE]
    number = (
        (
            f"set segment.object_value to {void[-1]} where there are two classes, or write its number into the masks in its place "
            "(black and white masks: 1 for white, e.g. with Pillow, mask.point(lambda v: v // 255))"
        )
        if void
        else ""
    )
    advice = (
        f"{', '.join(map(str, void))} means void, pixels that do not count. If it is a class, {number}"
        if void
        else "Masks hold the number of a class at every pixel"
    )
    raise ValueError(f"the training masks of {root} hold the values {shown}: there is {only} to learn. {advice}")


def open_split(
    data: DataConfig,
    segment: SegmentConfig,
    split: str,
    *,
    known: NamesAndColours | None = None,
    learned: int = -1,
    draw: bool = True,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[MaskedPictures, list[BadImage]]:
    """One split, checked as `open_segmentation` does, and what was left out. Raises ValueError.

    Args:
        known: the classes where no file beside the images names them.
        learned: value of the object in the masks that the model learned from. It holds here too unless
            `segment.object_value` says another; masks that seem to contradict it are refused.
        draw: of a folder without splits, the part that was drawn for training or held out; False: all of it.
        on_note: hears what was understood.
    """
    root, declared = _open_root(data, segment, known)
    data = dataclasses.replace(data, cache="none")
    pairs = find_pairs(root, segment, split, data, draw=draw)
    checked = _check(root, [pairs], declared, segment, data, on_progress, Share(), learned)
    (pictures,) = checked.parts
    if not len(pictures):
        raise ValueError(f"no usable images in the split {split!r} of {root}.\n{LAYOUTS}")
    drawn = []
    if pairs.is_drawn:
        how = f"chosen by split_seed {data.split_seed} among its files" if draw else "all that are there"
        drawn = [f"{len(pictures):,} images of {pairs.what}, {how}"]
        pictures = dataclasses.replace(pictures, is_all=not draw)
    for note in dict.fromkeys(drawn + checked.notes) if on_note else ():
        on_note(note)  # type: ignore[misc]
    return pictures, checked.bad


def _open_root(
    data: DataConfig, segment: SegmentConfig, known: NamesAndColours | None = None
) -> tuple[Path, Declared | ClassList]:
    """The folder, and what is known of its classes before masks are looked at. Raises ValueError."""
    root = Path(data.path).expanduser()
    if not data.path or not root.is_dir():
        raise ValueError(f"data.path is {data.path or 'empty'}, which is no folder.\n{LAYOUTS}")
    if is_cityscapes(root, segment):
        return root, cityscapes_classes(segment)
    declared = read_declared(root, segment, known)
    class_list(declared, segment)  # settings that make no sense are refused at once
    return root, declared


def open_classes(
    data: DataConfig, segment: SegmentConfig, known: NamesAndColours | None = None
) -> tuple[Path, ClassList]:
    """The folder, and its classes, which are `known` where nothing there names them, without a look at the masks: the
    object is 1 unless `segment.object_value` says another. Raises ValueError."""
    root, declared = _open_root(data, segment, known)
    if isinstance(declared, ClassList):
        return root, declared
    if not declared.names:
        raise refuse_nothing_said(root)
    value = max(1, segment.object_value) if has_object(declared, segment) else -1
    return root, class_list(declared, segment, value)


# What lies there


def find_pairs(
    root: Path, segment: SegmentConfig, split: str, data: DataConfig = DataConfig(), *, draw: bool = True
) -> Pairs:
    """Images of a split and their masks. Raises ValueError where the split is not there.

    Of a folder without splits those are taken that `data.val_fraction` and `data.split_seed` draw, as of classes; or all with `draw` False.
    """
    if is_cityscapes(root, segment):
        return _find_cityscapes(root, split)
    folders = list_folder(root)[0]
    images, masks = (
        next((root / name for wanted in kind for name in folders if name.lower() == wanted), None)
        for kind in (IMAGE_FOLDERS, MASK_FOLDERS)
    )
    if images is None or masks is None:
        raise ValueError(f"{root} has no images/ and annotations/: it holds {contents_of(root)}.\n{LAYOUTS}")
    folder = _of_split(list_folder(images)[0], split, images)
    lists = [name for name in list_folder(root)[1] if name.lower().endswith(".txt")]
    listing = _of_split([name[:-4] for name in lists], split, root)
    is_drawn = folder is None and listing is None and _is_one_set(images, masks, lists, segment, split)
    if folder is None and listing is None and not is_drawn:
        raise ValueError(
            f"{root} has no split {split!r}: neither {images.name}/{split}/ (or a folder of that meaning) nor {split}.txt; "
            f"{images.name}/ holds {contents_of(images)}. Name the splits with --segment.train_split and --segment.val_split.\n{LAYOUTS}"
        )
    mask_folder = _of_split(list_folder(masks)[0], split, masks) if folder else None
    image_root, mask_root = images / (folder or ""), masks / (mask_folder or "")
    pictures = _by_stem(image_root, is_image_name)
    drawn = _by_stem(mask_root, lambda name: is_image_name(name) and Path(name).suffix.lower() in _MASK_ENDINGS)
    mask_of = match_names(pictures, drawn, mask_root)

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
            elif stem in mask_of:
                pairs[relative(pictures[stem])] = relative(drawn[mask_of[stem]])
            else:
                lonely.append(stem)
    else:
        pairs = {relative(path): relative(drawn[mask_of[stem]]) for stem, path in pictures.items() if stem in mask_of}
        lonely = [stem for stem in pictures if stem not in mask_of]
        if unused := sorted(drawn.keys() - set(mask_of.values())):
            notes.append(f"{len(unused)} masks in {mask_root} have no image: {', '.join(unused[:5])}")
    if lonely:
        others = [name for _, names in walk(mask_root) for name in names]
        bad += [
            BadImage(relative(pictures[stem]), _why_no_mask(stem, others, f"{relative(mask_root)}/")) for stem in lonely
        ]
    what = f"{listing}.txt" if listing else f"{relative(image_root)}/"
    if is_drawn and draw:
        pairs = _drawn_part(pairs, data, of_training=role(split) == TRAIN, where=images)
    more = {relative(drawn[its]) for stem, its in mask_of.items() if its != stem}
    renamed = [mask for mask in pairs.values() if mask in more]
    return Pairs(list(pairs), list(pairs.values()), bad, notes, what, is_drawn, renamed)


def _is_one_set(images: Path, masks: Path, lists: Sequence[str], segment: SegmentConfig, split: str) -> bool:
    """Whether nothing there speaks of splits, and the one that is wanted is one of the two that can be drawn."""
    folders = list_folder(images)[0] + [name for name in list_folder(masks)[0] if role(name)]
    return (
        not folders
        and not any(role(name[:-4]) for name in lists)
        and split in (segment.train_split, segment.val_split)
        and role(split) in (TRAIN, VAL)
    )


def _drawn_part(pairs: dict[str, str], data: DataConfig, of_training: bool, where: Path) -> dict[str, str]:
    """The images to learn from, or the others."""
    names = sorted(pairs)
    train, val = held_out(names, [0] * len(names), data.val_fraction, data.split_seed)
    if names and not val:
        raise ValueError(
            f"{where} has 1 image with a mask: none can be held out. Add images, or split folders train/ and val/"
        )
    return {names[i]: pairs[names[i]] for i in (train if of_training else val)}


_MASK_WORDS = "masks?|labels?|seg|segmentations?|gt|ground_?truth|annotations?|annot"
_ENDS_WITH_WORD = re.compile(rf"(.+?)[ _.-]+(?:{_MASK_WORDS})", re.IGNORECASE)
_BEGINS_WITH_WORD = re.compile(rf"(.*/)?(?:{_MASK_WORDS})[ _.-]+([^/]+)", re.IGNORECASE)


def match_names(pictures: Iterable[str], drawn: Iterable[str], where: Path) -> dict[str, str]:
    """Image -> its mask, both by their names without ending: the mask of the same name; else the one that says besides that
    it is a mask (01_mask, 01-label, mask_01). Raises ValueError where it may be either of two."""
    images, masks = dict.fromkeys(pictures), list(drawn)
    found = {name: name for name in masks if name in images}
    others: dict[str, list[str]] = {}
    for mask in masks:
        if mask in images:
            continue
        end, begin = _ENDS_WITH_WORD.fullmatch(mask), _BEGINS_WITH_WORD.fullmatch(mask)
        named = [end[1]] if end else []
        named += [(begin[1] or "") + begin[2]] if begin else []
        fitting = [name for name in dict.fromkeys(named) if name in images and name not in found]
        if len(fitting) > 1:
            raise ValueError(f"{where / mask} may be the mask of {' or of '.join(fitting)}; name it like its image")
        for name in fitting:
            others.setdefault(name, []).append(mask)
    for name, its in others.items():
        if len(its) > 1:
            raise ValueError(
                f"{where} has {' and '.join(its)}, which may all be the mask of {name}; keep one, or name it {name}.png"
            )
        found[name] = its[0]
    return found


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

    Both are turned as their own EXIF orientation says, as every viewer shows them; a mask of another size but the same
    proportions is resized to that of the image, to the nearest pixel.
    """
    image, values, about = _read_pair(root, name, mask_name, classes.coded)
    if about.kind != "colours":
        if wrong := _out_of_range(about.counts, classes):
            raise BadImageError(mask_name, wrong)
        values = classes.meaning.astype(np.uint8)[values]
    return image, torch.from_numpy(values)[None]


class _About(NamedTuple):
    """What the check keeps of a pair."""

    size: tuple[int, int]
    """Height and width of the image."""
    counts: np.ndarray
    """int64 [256]: pixels of each value in the mask as it is used (of each class, if it holds colours)."""
    kind: str
    """As in `DecodedMask`."""
    differs: bool
    """The image alone has an EXIF orientation."""
    own_size: tuple[int, int]
    """Height and width of the mask as it is stored."""


def _read_pair(
    root: Path, name: str, mask_name: str, coded: dict[int, int] | None
) -> tuple[Tensor, np.ndarray, _About]:
    """Image uint8 [3, H, W], and mask uint8 [H, W]: values as stored, or classes where it holds colours."""
    image, turned = decode_oriented(read_file(root / name, name), name)
    values, mask_turned, kind = decode_mask(
        read_file(root / mask_name, mask_name), mask_name, colours=coded, grey_rgb=coded is None
    )
    H, W = image.shape[1:]
    h, w = values.shape
    if (h, w) != (H, W):
        if not same_proportions((h, w), (H, W)):
            exif = (
                f". The image has EXIF orientation {turned} and the mask {mask_turned}: draw the mask over the image as viewers "
                "show it, or write the rotation into the pixels of both"
                if turned != mask_turned and ((w, h) == (H, W) or same_proportions((w, h), (H, W)))
                else ""
            )
            raise BadImageError(mask_name, f"the mask has {w} x {h} pixels and its image {W} x {H}{exif}")
        values = resize_nearest(values, (H, W))
    counts = np.bincount(values.ravel(), minlength=256)
    return image, values, _About((H, W), counts, kind, turned != 1 and mask_turned == 1, (h, w))


LEAST_SIDE = 4
"""Pixels: of smaller masks the proportions say nothing."""


def same_proportions(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether one is the other scaled by one factor, its height and width both rounded in the same way (down, up or to the
    nearest), to the pixels of the smaller one."""
    (h, w), (H, W) = sorted((mask, image), key=lambda size: size[0] * size[1])
    if min(h, w) < LEAST_SIDE or (h == H) != (w == W) or h > H or w > W:
        return False
    # In halves of a pixel: a factor s has to exist with h + low <= s H <= h + high and w + low <= s W <= w + high.
    return any(
        (2 * h + low) * W <= (2 * w + high) * H and (2 * w + low) * H <= (2 * h + high) * W
        for low, high in ((-2, 0), (-1, 1), (0, 2))
    )


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> [*size]: of each pixel the value under its centre."""
    rows, columns = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, values.shape))
    return values[rows[:, None], columns]


def _out_of_range(counts: np.ndarray, classes: ClassList) -> str:
    """The reason why a mask with so many pixels of each value cannot be used; empty: it can."""
    strange = np.flatnonzero((counts > 0) & (classes.meaning < 0))
    shown = ", ".join(f"{value} ({counts[value]:,} pixels)" for value in strange[:5])
    return f"values out of range: {shown}; allowed are {classes.allowed}" if len(strange) else ""


@dataclass(frozen=True)
class _Checked:
    parts: list[MaskedPictures]
    bad: list[BadImage]
    classes: ClassList
    values: np.ndarray
    """int64 [256]: pixels of each value in the masks of the first part, but for RGB masks."""
    counts: np.ndarray
    """int64 [K]: pixels of each class in all masks of the first part."""
    notes: list[str]


def _check(
    root: Path,
    parts: list[Pairs],
    declared: Declared | ClassList,
    segment: SegmentConfig,
    data: DataConfig,
    on_progress: Progress | None,
    share: Share,
    learned: int = -1,
) -> _Checked:
    """Decode the pairs of all parts, and understand from all masks together what their values mean: the good pairs of each
    part, kept in memory if they fit, the bad ones, and notes. Raises ValueError for bad ones unless they are skipped."""
    names = [name for pairs in parts for name in pairs.names]
    masks = [name for pairs in parts for name in pairs.masks]
    first = len(parts[0].names)
    is_full = data.check == "full"

    def attempt(i: int) -> tuple[_About, tuple[Tensor, Tensor]]:
        image, values, about = _read_pair(root, names[i], masks[i], declared.coded)
        return about, (image, torch.from_numpy(values)[None])

    nothing = np.zeros(256, np.int64)

    def look(i: int) -> tuple[_About, tuple[()]]:
        size = image_size(root / names[i], names[i])
        return _About(size, nothing, "grey", False, size), ()

    bad = [item for pairs in parts for item in pairs.bad]
    total = len(names) + len(bad)
    budget = {"auto": float(cache_budget()), "ram": math.inf, "none": 0.0}[data.cache if is_full else "none"]
    # Decoded images may be large: only a few wait for their turn.
    results, kept = check_all(
        attempt if is_full else look, len(names), budget, share, on_progress, 2 * available_cores()
    )
    good = [i for i, result in enumerate(results) if not isinstance(result, BadImage)]
    looked = {i: results[i] for i in good} if is_full else _sample(root, names, masks, first, declared.coded)
    if declared.names or looked or not (bad or len(good) < len(names)):
        classes, notes = _understand(root, declared, segment, masks, looked, learned, is_sample=not is_full)
        wrong = {i: _out_of_range(results[i].counts, classes) for i in good if results[i].kind != "colours"}
        for i in good:
            if reason := wrong.get(i):
                results[i] = BadImage(masks[i], reason)
    bad += [result for result in results if isinstance(result, BadImage)]
    if data.on_bad_image == "error" or not (declared.names or looked):
        raise_bad(bad, total, root)
    if kept is not None:
        meaning = classes.meaning.astype(np.uint8)
        for place, i in enumerate(good):
            image, values = kept[place]
            if isinstance(results[i], BadImage) or results[i].kind == "colours":
                continue
            present = np.flatnonzero(results[i].counts)
            if (meaning[present] != present).any():
                kept[place] = image, torch.from_numpy(meaning[values.numpy()])
        kept = [pair for i, pair in zip(good, kept) if not isinstance(results[i], BadImage)]
    good = [i for i in good if not isinstance(results[i], BadImage)]
    notes += _notes(parts, [(names[i], masks[i], results[i]) for i in good])
    totals, counts = nothing.copy(), nothing.copy()
    for i in (i for i in good if i < first):
        if results[i].kind == "colours":
            counts += results[i].counts
        else:
            totals += results[i].counts
    used = classes.meaning >= 0
    counts += np.bincount(classes.meaning[used], totals[used], 256).astype(np.int64)
    bounds = [0, first, len(names)] if len(parts) == 2 else [0, first]
    opened = []
    for low, high in zip(bounds, bounds[1:]):
        chosen = [i for i in good if low <= i < high]
        caches: tuple[PixelCache | None, PixelCache | None] = (None, None)
        if kept is not None:
            pixels, kept = kept[: len(chosen)], kept[len(chosen) :]
            caches = PixelCache.of([pair[0] for pair in pixels]), PixelCache.of([pair[1] for pair in pixels])
        sizes = np.array([results[i].size for i in chosen], np.int64).reshape(-1, 2)
        its_names, its_masks = Names(names[i] for i in chosen), Names(masks[i] for i in chosen)
        opened.append(MaskedPictures(root, its_names, its_masks, sizes, classes, *caches))
    return _Checked(opened, bad, classes, totals, counts[: len(classes)], notes)


SAMPLE = 64
"""So many training masks are looked at where data.check is "off"."""


def _sample(
    root: Path, names: list[str], masks: list[str], first: int, coded: dict[int, int] | None
) -> dict[int, _About]:
    looked = {}
    for i in sorted({(2 * k + 1) * first // (2 * SAMPLE) for k in range(SAMPLE)} if first else ()):
        with contextlib.suppress(BadImageError):  # named when it is loaded
            looked[i] = _read_pair(root, names[i], masks[i], coded)[2]
    return looked


def _understand(
    root: Path,
    declared: Declared | ClassList,
    segment: SegmentConfig,
    masks: list[str],
    looked: dict[int, _About],
    learned: int,
    is_sample: bool,
) -> tuple[ClassList, list[str]]:
    if isinstance(declared, ClassList):
        return declared, []
    of_values = [i for i, about in looked.items() if about.kind != "colours"]
    has = np.stack([looked[i].counts > 0 for i in of_values]) if of_values else np.zeros((0, 256), bool)
    seen = Seen(has, [masks[i] for i in of_values], is_sample)
    if learned == -1 or segment.object_value != -1 or not has_object(declared, segment):
        return understand(declared, segment, seen, root)
    classes = class_list(declared, segment, learned)
    require_same_meaning(classes, segment, seen, root)
    void = IGNORE in seen.values(segment) and learned != IGNORE
    return classes, [f"{learned} is the object and {IGNORE} void in these masks, as the model learned"] if void else []


def _notes(parts: list[Pairs], good: list[tuple[str, str, _About]]) -> list[str]:
    """What a person should know about the files, each sentence once."""
    notes = [note for pairs in parts for note in pairs.notes]
    if renamed := [mask for pairs in parts for mask in pairs.renamed]:
        notes.append(f"{len(renamed)} masks have names that extend their image's name, such as {renamed[0]}")
    if differs := [name for name, _, about in good if about.differs]:
        notes.append(
            f"{len(differs)} images have an EXIF orientation and their masks none, such as {differs[0]}: images are turned as "
            "viewers show them, masks stay as they are"
        )
    if resized := [(mask, about) for _, mask, about in good if about.own_size != about.size]:
        mask, about = resized[0]
        (h, w), (H, W) = about.own_size, about.size
        notes.append(
            f"{len(resized)} masks are of another size than their images and are resized to the nearest pixel, such as {mask}: "
            f"{w} x {h} to {W} x {H}"
        )
    for kind, said in (
        ("palette", "are palette images: their indices are the numbers of the classes, whatever the colours"),
        ("grey in RGB", "are RGB, but grey: their grey levels are the numbers of the classes"),
        ("colours", "are RGB: their colours are the classes, as classes.csv says"),
    ):
        if its := [mask for _, mask, about in good if about.kind == kind]:
            notes.append(f"{len(its)} masks, such as {its[0]}, {said}")
    return notes
