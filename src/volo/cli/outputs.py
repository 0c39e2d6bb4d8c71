"""Files that a command writes where the user says: tried before the work begins, never put in the place of what is not
an earlier result of that command; and what is drawn at the end, without which the result stands."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from volo.cli.console import note


def claim(path: Path, is_ours: Callable[[Path], bool], *, overwrite: bool = False, option: str = "--out") -> None:
    """Make sure that `path` can be written later: its folder is made and tried.

    `is_ours` says of a file that is there whether it is an earlier result of the same kind. Raises ValueError and OSError.
    """
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; give the name of a file")
    if path.exists() and not overwrite and not is_ours(path):
        raise ValueError(
            f"{path} already exists and is not an earlier result of this command: choose another {option}, or replace the "
            "file with --overwrite"
        )
    try_folder(path.parent, option)


def try_folder(folder: Path, option: str = "--out") -> None:
    """Make `folder` and a file in it, which is gone at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{option}: {folder} cannot be a folder, since there is a file of that name") from None
    with tempfile.TemporaryFile(dir=folder):
        pass


def begins_with(*beginnings: str) -> Callable[[Path], bool]:
    """Whether a file begins with one of these texts."""

    def test(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(200).startswith(tuple(text.encode() for text in beginnings))

    return test


def is_figure(title: str) -> Callable[[Path], bool]:
    """Whether a file is a figure of `volo.explain.plots` with this title."""

    def test(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(2048)
        return b"tEXtSoftware\0volo" in head and b"tEXtTitle\0" + title.encode() in head

    return test


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is told, and no more: the result is there."""
    try:
        yield
    except ModuleNotFoundError as error:
        note(f"{what} was not drawn: it needs {error.name} (pip install {error.name})")
    except Exception as error:  # noqa: BLE001
        note(f"{what} was not drawn: {error or type(error).__name__}")
