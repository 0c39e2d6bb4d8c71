"""Files that are at every moment either the old one or the whole new one, and where what can be had again is kept."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, then rename it to `path`.

    Raises OSError with what to do next; `path` is then unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself
        finally:
            os.close(directory)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save reports a failed write as a RuntimeError about positions; the cause is in its context.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        kept = f"The old {path.name} is unchanged. " if path.exists() else ""
        raise OSError(
            cause.errno,
            f"{cause.strerror} ({free:.1f} MB free there). {kept}Make room or choose another folder; training and "
            "annotating then continue with --resume, packing without",
            str(path),
        ) from error


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where downloads are kept: `cache_dir`, else $VOLO_CACHE, else ~/.cache/volo."""
    return Path(cache_dir or os.environ.get("VOLO_CACHE") or "~/.cache/volo").expanduser()
