"""Class names: lists in files, and which class of one list is which of another. Names decide, never places."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from volo.config import nearest, read_text
from volo.data.walk import spelled


def read_class_list(path: Path) -> tuple[str, ...]:
    """Names of a classes.txt, one a line. Raises ValueError for a name that comes twice and for a file that is not UTF-8."""
    return unique((spelled(line.strip()) for line in read_text(path).splitlines() if line.strip()), path)


def unique(names: Iterable[str], where: Path) -> tuple[str, ...]:
    names = tuple(names)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1][:3]:
        raise ValueError(f"{where} names a class twice: {', '.join(twice)}")
    return names


def printable(name: str) -> str:
    """`name` without line breaks, tabs and escapes, which would break a table, or command the terminal: spelt out."""
    return "".join(c if unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in name)


def refuse_control_characters(names: Iterable[str]) -> None:
    """Raises ValueError for a class whose name cannot be shown in a line."""
    if strange := next((name for name in names if printable(name) != name), None):
        raise ValueError(
            f"the class {strange!r} has a control character in its name (a line break, a tab, an escape): give it another one"
        )


def agreed(lists: Sequence[tuple[Path, tuple[str, ...]]]) -> tuple[str, ...] | None:
    """The one class list of several files; None where there is none. Raises ValueError where two of them differ."""
    for path, names in lists[1:]:
        first_path, first = lists[0]
        if names != first:
            at = next((i for i, (a, b) in enumerate(zip(first, names)) if a != b), min(len(first), len(names)))
            a, b = (repr(its[at]) if at < len(its) else "missing" for its in (first, names))
            raise ValueError(
                f"the class lists of one data set differ: class {at} is {a} in {first_path} and {b} in {path}. Give all "
                "its files the same list, in the same order"
            )
    return lists[0][1] if lists else None


def match_classes(data_classes: Sequence[str], model_classes: Sequence[str]) -> list[int]:
    """The model's class for each class of the data: the one of the same name.

    Numbers are names like others where the model's own classes are numbers. Where all of its names are words, data whose
    classes are all numbers means places in its list, as ImageNet-V2 does. Raises ValueError for data with classes that
    the model does not know.
    """
    index = {spelled(name): i for i, name in enumerate(model_classes)}
    strange = next((name for name in data_classes if spelled(name) not in index), None)
    if strange is None:
        return [index[spelled(name)] for name in data_classes]
    numbered = any(name.isdecimal() for name in model_classes)
    if not numbered and all(name.isdecimal() and int(name) < len(model_classes) for name in data_classes):
        return [int(name) for name in data_classes]
    why = "; the model's own classes are numbers, so numbers are names" if numbered and strange.isdecimal() else ""
    raise ValueError(
        f"the data has the class {strange!r}, which the model does not know{nearest(strange, index) or why or '.'} "
        f"The data has {_some(data_classes)}; the model has {_some(model_classes)}. Give it data with classes of the "
        "same names" + ("" if numbered else " (or the numbers of the model's classes, from 0)")
    )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
