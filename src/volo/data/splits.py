"""Which part of a data set is for training and which is held out: by the names of folders and files, or by a seed."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from volo.data.walk import contents_of, is_image_name, list_folder

TRAIN, VAL, TEST = "train", "val", "test"
HELD_OUT = (VAL, TEST)
"""Where held-out images are looked for, in this order."""
IMAGE_FOLDERS, MASK_FOLDERS = ("images", "imgs", "img"), ("annotations", "masks", "labels", "mask")
"""What the folders of images with a class for every pixel are called."""

_WORDS = {
    "train": TRAIN, "training": TRAIN, "trainset": TRAIN,
    "val": VAL, "valid": VAL, "validation": VAL, "validate": VAL, "valset": VAL, "dev": VAL, "devel": VAL, "eval": VAL,
    "evaluation": VAL, "holdout": VAL,
    "test": TEST, "testing": TEST, "testset": TEST,
}  # fmt: skip
_FILLERS = frozenset(
    ("set", "data", "dataset", "split", "images", "image", "imgs", "img", "pictures", "photos", "folder")
)

WAY_OUT = (
    'Say which is which with --data.splits: "none" where every folder is a class (or every file a part of one set), '
    '"TRAINING,HELD_OUT" with the two names'
)


def role(name: str) -> str | None:
    """TRAIN, VAL, TEST or None for the name of a folder: "Train", "training_set", "val2017", "seg_test", "dev"."""
    return _WORDS.get(_split_word(name)[1])


def _split_word(name: str) -> tuple[str, str]:
    """("seg", "test") of "seg_test_set": what comes before the last word that says something, and that word."""
    words = [
        word
        for word in re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
        if word not in _FILLERS
    ]
    return (" ".join(words[:-1]), words[-1]) if words else ("", "")


def role_of_file(name: str) -> str | None:
    """The same for a file, where the word may be anywhere: "imagenet_train-00000-of-00128.tar". Raises ValueError for a
    name that says both."""
    roles = {_WORDS[word] for word in re.findall(r"[a-z]+", name.lower()) if word in _WORDS}
    if TRAIN in roles and len(roles) > 1:
        raise ValueError(f"{name} may be of the training or held out. {WAY_OUT}")
    return next((r for r in (TRAIN, *HELD_OUT) if r in roles), None)


@dataclass(frozen=True)
class Parts:
    """Folders (or files) for training and held out; both empty: no name says anything, and all is one set."""

    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def split_files(names: Sequence[str], wanted: str, where: str) -> Parts:
    """The files of one data set by their names; `wanted` is `DataConfig.splits`. Raises ValueError."""
    if wanted == "none":
        return Parts()
    if wanted != "auto":
        train, val = ([n for n in names if fnmatch.fnmatch(n, w) or n.startswith(w)] for w in _two(wanted))
        train = [name for name in train if name not in val]
        if not train or not val:
            raise ValueError(
                f"data.splits is {wanted!r}, but {where} has {_some(names)}: {len(train)} and {len(val)} files fit"
            )
        return Parts(train, val, [name for name in names if name not in train and name not in val])
    by_role: dict[str | None, list[str]] = {}
    for name in names:
        by_role.setdefault(role_of_file(name), []).append(name)
    if set(by_role) <= {None}:
        return Parts()
    train, val = by_role.get(TRAIN, []), next((by_role[r] for r in HELD_OUT if r in by_role), [])
    return Parts(train, val, [name for name in names if name not in train and name not in val])


def split_folders(root: Path, wanted: str) -> Parts:
    """The folders for training and held out in `root`, one of each at most; `wanted` is `DataConfig.splits`.

    A folder is one of a split where its name says so and there are folders in it, those of the classes; a folder called
    "train" beside other classes which holds images itself is a class. Raises ValueError for what may be either.
    """
    folders = list_folder(root)[0]
    if wanted == "none":
        return Parts()
    if wanted != "auto":
        chosen = list(_two(wanted))
        if missing := [name for name in chosen if not (root / name).is_dir()]:
            raise ValueError(
                f"data.splits is {wanted!r}, but {root} has no {missing[0]}/: it holds {contents_of(root)}"
            )
        return Parts(chosen[:1], chosen[1:], [name for name in folders if name not in chosen])
    named = {name: r for name in folders if (r := role(name))}
    if not named:
        return Parts()
    holds_folders = {name for name in folders if list_folder(root / name)[0]}
    parts: dict[str, list[str]] = {}
    for name, its in named.items():
        if name in holds_folders:
            parts.setdefault(its, []).append(name)
    for its, names in parts.items():
        if len(names) > 1 and (its in (TRAIN, VAL) or VAL not in parts):
            raise ValueError(f"{root} has {_some(names, '/')}, which may all be {_called(its)}. {WAY_OUT}")
    if not parts:
        # Images lie in the folders themselves: "train" alone is a thing of which there are images.
        flat = [name for name in named if _split_word(name)[0] == ""]
        pairs = {_split_word(name)[0] for name, r in named.items() if r == TRAIN} & {
            _split_word(name)[0] for name, r in named.items() if r != TRAIN
        }
        if pairs or [name for name in flat if name.lower() != "train"] or len(folders) == len(named) == len(flat):
            raise ValueError(
                f"{root} has {_some(list(named), '/')} with no folders in them: it holds {contents_of(root)}. A split holds a "
                f"folder of images for every class. {WAY_OUT}"
            )
        return Parts()
    train, held = parts.get(TRAIN, []), next((parts[r] for r in HELD_OUT if r in parts), [])
    others = [name for name in folders if name not in named and _has_images(root / name)]
    if not (train and held) and others:
        raise ValueError(
            f"{root} has {_some([*train, *held], '/')}, which may be a split or a class beside {_some(others, '/')}. {WAY_OUT}"
        )
    chosen = [*train, *held]
    return Parts(train, held, [name for name in folders if name not in chosen])


def inside(folder: Path) -> Path:
    """The folder itself, or the one of the same name in it where there is nothing else (seg_train/seg_train/CLASS)."""
    folders, files = list_folder(folder)
    return folder / folders[0] if folders == [folder.name] and not files else folder


def _has_images(folder: Path) -> bool:
    folders, files = list_folder(folder)
    return any(map(is_image_name, files)) or any(
        is_image_name(f) for name in folders for f in list_folder(folder / name)[1]
    )


def _two(wanted: str) -> tuple[str, str]:
    names = [name.strip().rstrip("/") for name in wanted.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f'data.splits is {wanted!r}; it is "auto", "none", or two names: "TRAINING,HELD_OUT"')
    return names[0], names[1]


def _called(its: str) -> str:
    return "the training images" if its == TRAIN else "the held-out images"


def _some(names: Iterable[str], after: str = "") -> str:
    names = [name + after for name in names]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def held_out(names: Sequence[str], targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and held-out images: `fraction` of every class, in the order given.

    Which ones depends on the names and the seed alone. A class keeps at least one training image, and gives one away
    if it has two. Raises ValueError for a fraction that is none.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.val_fraction is {fraction}; it is a share between 0 and 1")
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for i, (name, target) in enumerate(zip(names, targets, strict=True)):
        rank = hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()
        by_class.setdefault(int(target), []).append((rank, i))
    val: set[int] = set()
    for ranked in by_class.values():
        count = min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)
        val.update(i for _, i in sorted(ranked)[:count])
    return [i for i in range(len(names)) if i not in val], sorted(val)
