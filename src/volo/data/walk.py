"""Which files and folders of a data set count: one walker for training, evaluation, prediction and masks."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePath

IMAGE_ENDINGS = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
        ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif", ".heic", ".heif",
    }
)  # fmt: skip
"""Files with these endings are taken for images; HEIC is among them so that it is named and not silently left out."""

_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"))
_SYSTEM_FOLDERS = frozenset(
    (
        "__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler",
        "system volume information", "lost+found", "network trash folder", "temporary items", "__pycache__",
    )
)  # fmt: skip


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: a known ending, and not a hidden file."""
    path = PurePath(name)
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_ENDINGS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is nobody's data: hidden, or kept by the system, a disk server or an archiver."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES | _SYSTEM_FOLDERS


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to `root`, its files) of `root` and every folder below, sorted, with "/" between names; "" is `root`.

    Links to folders are followed, but not in circles; hidden and system folders and files are passed over, and so is
    what is neither file nor folder (a pipe would be waited for). Raises ValueError for a folder that cannot be listed.
    """
    waiting: list[tuple[str, frozenset[str]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(root / folder)
        if real in above:
            continue
        folders, files = list_folder(root / folder)
        below = f"{folder}/" if folder else ""
        waiting += [(below + name, above | {real}) for name in reversed(folders)]
        yield folder, [below + name for name in files]


def list_folder(path: Path) -> tuple[list[str], list[str]]:
    """Folders and files in a folder as `walk` sees them, sorted. Raises ValueError where it cannot be listed."""
    folders, files = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                # Only a link has to be looked at; a broken one is a file, which is named when it is opened.
                linked = Path(entry) if entry.is_symlink() else None
                if linked.is_dir() if linked else entry.is_dir():
                    folders.append(entry.name)
                elif linked.is_file() or not linked.exists() if linked else entry.is_file():
                    files.append(entry.name)
    except OSError as error:
        raise ValueError(
            f"the folder {path} cannot be listed: {(error.strerror or str(error)).lower()}. Make it readable, or move it away"
        ) from None
    return sorted(folders), sorted(files)


def images_below(root: Path) -> list[Path]:
    """All images in a folder and the folders below, as `walk` finds them, sorted. Raises ValueError as `walk` does."""
    return sorted(root / name for _, names in walk(root) for name in names if is_image_name(name))


def contents_of(path: Path) -> str:
    """For messages: the first things that lie in a folder."""
    folders, files = list_folder(path)
    children = sorted([name + "/" for name in folders] + files)
    return (
        f"{', '.join(children[:8])} and {len(children) - 8} more"
        if len(children) > 8
        else ", ".join(children) or "nothing"
    )


def spelled(name: str) -> str:
    """`name` by which two spellings of the same letters are one (macOS writes an accent as a character of its own)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
