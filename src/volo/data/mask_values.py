"""Classes of masks: their names and colours, and what the values in mask files mean, as far as that can be understood."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volo.config import SegmentConfig, read_text

IGNORE = 255
"""Void: pixels that count neither in the loss nor in the score."""

Colour = tuple[int, int, int]
NamesAndColours = tuple[tuple[str, ...], tuple[Colour, ...]]

BACKGROUND, OBJECT = "background", "object"

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
    object_value: int = -1
    """Of two classes: the value of the second, the object; -1: the values are the numbers of the classes, or not one each."""
    coded: dict[int, int] | None = None
    """Class of each colour (red << 16 | green << 8 | blue) in RGB masks, as classes.csv says; None: it does not."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Declared:
    """What settings and files beside the images say of the classes, before a mask has been looked at."""

    names: tuple[str, ...]
    """Empty: nothing is said."""
    colours: tuple[Colour, ...]
    coded: dict[int, int] | None = None
    is_counted: bool = False
    """The names are numbers, from segment.num_classes alone."""


@dataclass(frozen=True)
class Seen:
    """Which values occur in the masks that were looked at; RGB masks, whose colours are classes, are not among them."""

    has: np.ndarray
    """bool [N, 256]."""
    masks: Sequence[str]
    """Their N names."""
    is_sample: bool = False
    """There are other masks."""

    def values(self, segment: SegmentConfig) -> set[int]:
        """Those that occur, without a void of the user's own."""
        own = {segment.ignore_label} - {IGNORE}
        return set(map(int, np.flatnonzero(self.has.any(axis=0)))) - own

    def example(self, value: int, without: int) -> str:
        return self.masks[int(np.flatnonzero(self.has[:, value] & ~self.has[:, without])[0])]


def is_cityscapes(root: Path, segment: SegmentConfig) -> bool:
    return segment.layout == "cityscapes" or (
        segment.layout == "auto" and (root / "leftImg8bit").is_dir() and not (root / "images").is_dir()
    )


def cityscapes_classes(segment: SegmentConfig) -> ClassList:
    """Raises ValueError for another number of classes than 19."""
    if segment.num_classes not in (0, len(CITYSCAPES)):
        raise ValueError(f"Cityscapes has {len(CITYSCAPES)} classes; segment.num_classes is {segment.num_classes}")
    meaning = np.full(256, -1, np.int16)
    meaning[:_CITYSCAPES_IDS] = meaning[IGNORE] = IGNORE  # the licence plate, -1, is stored as 255
    for train_id, (_, label_id, _) in enumerate(CITYSCAPES):
        meaning[label_id] = train_id
    allowed = f"Cityscapes' label ids 0 to {_CITYSCAPES_IDS - 1}, and 255"
    return ClassList(tuple(c[0] for c in CITYSCAPES), tuple(c[2] for c in CITYSCAPES), meaning, allowed)


# What is said of the classes


def read_declared(root: Path, segment: SegmentConfig, known: NamesAndColours | None = None) -> Declared:
    """From the file beside the images; else what is `known`, or numbers if that is `segment.num_classes` alone; else
    nothing. One name is that of the object, beside a background. Raises ValueError."""
    num_classes = segment.num_classes
    names: list[str] = []
    colours: list[Colour] = []
    if (path := root / "classes.csv").is_file():
        rows = list(csv.DictReader(read_text(path).splitlines()))
        try:
            rows.sort(key=lambda row: int(row["index"]))
            names = [row["name"] for row in rows]
            numbers = [int(row["index"]) for row in rows]
            if numbers != list(range(len(rows))) and numbers != [1]:
                raise ValueError("index must count from 0")
            if rows and all(row.get(c) for row in rows for c in "rgb"):
                colours = [(int(row["r"]), int(row["g"]), int(row["b"])) for row in rows]
                if bad := next((c for c in colours if not 0 <= min(c) <= max(c) <= 255), None):
                    raise ValueError(f"r, g and b are 0 to 255, not {bad}")
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is read as index,name[,r,g,b] with a header; {error}") from error
    elif (path := root / "classes.txt").is_file():
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    elif (path := root / "objectInfo150.txt").is_file():
        lines = read_text(path).splitlines()[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if len(names) == 1:
        if is_background(names[0]):
            raise ValueError(f"{path} names the background alone; name the object too, the class of the other pixels")
        if segment.reduce_zero_label:
            raise ValueError(
                f"{path} names one class, {names[0]!r}, beside the background, and segment.reduce_zero_label makes the background "
                "void: nothing is left to tell apart. Name two classes or more, or set segment.reduce_zero_label to false"
            )
        names, colours = [BACKGROUND, *names], [(0, 0, 0), *colours] if colours else []
    if names and num_classes and len(names) != num_classes:
        raise ValueError(
            f"segment.num_classes is {num_classes}, but {path} names {len(names)} classes ({', '.join(names[:8])})"
        )
    if names:
        coded = {r << 16 | g << 8 | b: number for number, (r, g, b) in enumerate(colours)}
        is_a_code = bool(colours) and len(coded) == len(colours)
        return Declared(tuple(names), tuple(colours or default_colours(names)), coded if is_a_code else None)
    if known is not None:
        return Declared(*known)
    if num_classes == 1:
        raise ValueError("segment.num_classes is 1; it counts the background too: 2 for one kind of object")
    numbered = tuple(map(str, range(num_classes)))
    return Declared(numbered, tuple(default_colours(numbered)), is_counted=True)


def refuse_nothing_said(root: Path, values: Sequence[int] = (), first: int = 0) -> ValueError:
    """The error for masks whose classes nothing names."""
    shown = ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
    classes = [value for value in values if value != IGNORE]
    found = f"The masks hold the values {shown}. " if values else ""
    number = f" = {max(2, max(classes) + 1 - first)}" if classes else ""
    return ValueError(
        f"{root} says nothing about classes (no classes.csv, classes.txt or objectInfo150.txt). {found}Add one of these, "
        f"or set segment.num_classes{number}" + (f" (then {IGNORE} is void)" if IGNORE in values else "")
    )


def is_background(name: str) -> bool:
    return name.strip().lower().strip("_") in (BACKGROUND, "bg", "bkg")


# What the values mean


def class_list(declared: Declared, segment: SegmentConfig, object_value: int = -1) -> ClassList:
    """With `object_value` for the second of two classes; -1: the values are the numbers of the classes. Raises ValueError."""
    num_classes = len(declared.names)
    first = 1 if segment.reduce_zero_label else 0
    if num_classes + first > IGNORE:
        raise ValueError(f"masks of 8 bits hold at most {IGNORE - first} classes besides void; given: {num_classes}")
    if not 0 <= segment.ignore_label <= 255:
        raise ValueError(f"segment.ignore_label is a value of 8 bits, 0 to 255; given: {segment.ignore_label}")
    meaning = np.full(256, -1, np.int16)
    void = {IGNORE, segment.ignore_label} | ({0} if segment.reduce_zero_label else set())
    if object_value == -1:
        meaning[first : first + num_classes] = np.arange(num_classes)
        allowed = f"{first} to {first + num_classes - 1}"
    else:
        void -= {object_value}
        meaning[[0, object_value]] = 0, 1
        allowed = "0 to 1" if object_value == 1 else f"0, and {object_value} for the object"
    meaning[sorted(void)] = IGNORE
    if void:
        allowed += f", and {', '.join(map(str, sorted(void)))} for void"
    return ClassList(declared.names, declared.colours, meaning, allowed, object_value, declared.coded)


def has_object(declared: Declared, segment: SegmentConfig) -> bool:
    """Whether there are two classes, one of which is the object, whose value may be another than 1."""
    return len(declared.names) == 2 and not segment.reduce_zero_label and segment.ignore_label not in (0, 1)


def understand(declared: Declared, segment: SegmentConfig, seen: Seen, root: Path) -> tuple[ClassList, list[str]]:
    """The classes, and what was understood, for people. Raises ValueError for values that may mean one thing or another."""
    found = seen.values(segment)
    if not declared.names:
        if found not in ({0, 1}, {0, IGNORE}) or segment.reduce_zero_label:
            raise refuse_nothing_said(root, sorted(found), int(segment.reduce_zero_label))
        names = (BACKGROUND, OBJECT)
        declared = dataclasses.replace(declared, names=names, colours=tuple(default_colours(names)))
    given = segment.object_value
    if given != -1 and not 1 <= given <= 255:
        raise ValueError(
            f"segment.object_value is {given}; it is the value of the object in masks, 1 to 255, or -1: understood from the masks"
        )
    if not has_object(declared, segment):
        if given != -1:
            raise ValueError(
                f"segment.object_value is {given}, which is for masks of two classes, the background and an object; these have "
                f"{len(declared.names)}, with reduce_zero_label {segment.reduce_zero_label} and ignore_label {segment.ignore_label}"
            )
        return class_list(declared, segment), []
    if given != -1:
        if given == segment.ignore_label != IGNORE:
            raise ValueError(f"segment.object_value and segment.ignore_label are both {given}: the object or void?")
        return class_list(declared, segment, given), []
    of = f" ({len(seen.masks)} of them were looked at)" if seen.is_sample else ""
    if found == {0, IGNORE}:
        if declared.is_counted:
            names = (BACKGROUND, OBJECT)
            declared = dataclasses.replace(declared, names=names, colours=tuple(default_colours(names)))
        said = f"{IGNORE} is the object, since masks hold 0 and {IGNORE} alone{of}"
        classes = class_list(declared, segment, IGNORE)
        return _with_reading(classes, f"{said}; {SAY}"), [f"{said}: {_pair(classes, IGNORE)}"]
    classes = class_list(declared, segment, 1)
    if found == {0, 1}:
        said = f"1 is the object, since masks hold 0 and 1 alone{of}"
        if seen.is_sample:  # void may still come, but it may as well be the object, of other masks
            classes.meaning[IGNORE] = -1
            classes = dataclasses.replace(classes, allowed="0 to 1")
        return _with_reading(classes, f"{said}; {SAY}"), [f"{said}: {_pair(classes, 1)}"]
    if {1, IGNORE} <= found:
        if not (seen.has[:, 1] & seen.has[:, IGNORE]).any():
            raise ValueError(
                f"masks of {root} contradict one another: {seen.example(1, IGNORE)} holds 1, which is the object then, and "
                f"{seen.example(IGNORE, 1)} holds {IGNORE} and no 1: the object or void? Say which with segment.object_value: 1 "
                f"({IGNORE} is void), or {IGNORE} (and repair the masks that hold 1)"
            )
        if found <= {0, 1, IGNORE}:
            return classes, [f"1 is the object and {IGNORE} void, since masks hold both{of}: {_pair(classes, 1)}"]
    elif len(others := sorted(found - {0, 1, IGNORE})) == 1 and 1 not in found:
        return _with_reading(classes, f"if {others[0]} is the object, set segment.object_value to {others[0]}"), []
    return classes, []


SAY = "segment.object_value would say it"


def _with_reading(classes: ClassList, said: str) -> ClassList:
    return dataclasses.replace(classes, allowed=f"{classes.allowed} ({said})")


def _pair(classes: ClassList, value: int) -> str:
    return f"0 {classes.names[0]}, {value} {classes.names[1]}"


def require_same_meaning(classes: ClassList, segment: SegmentConfig, seen: Seen, root: Path) -> None:
    """Raise ValueError where the masks seem to have another value for the object than those that the model learned from."""
    value, found = classes.object_value, seen.values(segment)
    if value == -1 or value in found:
        return
    if other := next((v for v in (1, IGNORE) if v != value and v in found), None):
        void = f" and {IGNORE} for void" if value != IGNORE else ""
        raise ValueError(
            f"the masks of {root} hold {' and '.join(map(str, sorted(found)))}, as if {other} were the object; the model learned "
            f"from masks with {value} for the object{void}. Say what these masks hold: --object-value {other} (segment.object_value) "
            f"for {other} as the object, --object-value {value} for masks of the model's kind"
        )


# Colours


def default_colours(names: Sequence[str]) -> list[Colour]:
    """For classes that have none: up to eight by Okabe and Ito, which colour-blind people tell apart, black for the
    background; more as `palette` has them."""
    if len(names) > len(OKABE_ITO):
        return palette(len(names))
    if names and is_background(names[0]):
        return [OKABE_ITO[-1], *OKABE_ITO[: len(names) - 1]]
    return list(OKABE_ITO[: len(names)])


# Color Universal Design, https://jfly.uni-koeln.de/color/
OKABE_ITO: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167), (0, 0, 0),
)  # fmt: skip


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
