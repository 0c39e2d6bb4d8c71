"""Files that are at every moment either the old one or the whole new one, folders that one process at a time writes
into, and where what can be had again is kept."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, then rename it to `path`.

    The temporary name belongs to this call alone, so that processes which write the same file replace it one after the
    other, each with a whole one. Raises OSError with what to do next; `path` is then unchanged.
    """
    # The name is cut so that it is never longer than a file system allows; the rest of it cannot collide.
    temporary = path.with_name(f".{path.name[:60]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
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


def write_json(path: Path, value: Any) -> None:
    """Plain data as a JSON file, by `write_atomically`; NaN and infinity become null."""
    text = json.dumps(finite(value), indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def finite(value: Any) -> Any:
    """Plain data for JSON, which has neither NaN nor infinity: None in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value


_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
"""What file systems without locks answer."""
_held: set[FolderLock] = set()


class FolderLock:
    """While active, no other process that asks for the lock of `folder` gets it. The system releases it by itself when
    the process ends, however it ends.

    The folder is made where it is missing, and goes again if it is still empty at the end. What killed processes left
    half written in it is removed. On a file system without locks there is a warning, and no protection.

    Args:
        what: the work that is done, for the message that another process gets ("training").

    Raises:
        ValueError: another process holds the lock.
        OSError: the folder cannot be made or written to, or is a file.
    """

    NAME = ".volo-lock"

    def __init__(self, folder: str | Path, what: str) -> None:
        self.folder, self.what = Path(folder), what
        self._file: int | None = None
        self._made = False

    def __enter__(self) -> FolderLock:
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is a file where a folder is needed; choose another one")
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.NAME
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    os.close(file)
                    path.unlink(missing_ok=True)
                    warnings.warn(
                        f"the file system of {self.folder} has no locks ({error.strerror}): nothing keeps a second process from writing there",
                        stacklevel=2,
                    )
                    return self
                holder = os.read(file, 1000).decode(errors="replace")
                os.close(file)
                if not isinstance(error, BlockingIOError):
                    raise
                raise ValueError(
                    f"another process{holder and f' ({holder})'} is at work in {self.folder}: wait for it, or choose another folder"
                ) from None
            # The file may have gone with its last owner between our opening and locking it.
            try:
                if os.path.samestat(os.fstat(file), path.stat()):
                    break
            except FileNotFoundError:
                pass
            os.close(file)
        os.ftruncate(file, 0)
        os.write(file, f"pid {os.getpid()} on {socket.gethostname()}, {self.what}".encode())
        self._file = file
        _held.add(self)
        _remove_leftovers(self.folder)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            (self.folder / self.NAME).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
            _held.discard(self)
        if self._made:
            with contextlib.suppress(OSError):  # something lies in it
                self.folder.rmdir()

    @staticmethod
    def _forget_in_child() -> None:
        """A forked worker shares our open file, and with it the lock; it must not keep it when we die."""
        for lock in _held:
            if lock._file is not None:
                os.close(lock._file)
                lock._file = None
        _held.clear()


os.register_at_fork(after_in_child=FolderLock._forget_in_child)


def _remove_leftovers(folder: Path) -> None:
    """Remove what `write_atomically` could not finish in `folder` because its process was killed."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_alive(int(found["pid"])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def cache_folder() -> Path:
    """Where what can be had again is kept: $VOLO_CACHE, else ~/.cache/volo. Raises ValueError where there is no home."""
    try:
        return Path(os.environ.get("VOLO_CACHE") or "~/.cache/volo").expanduser()
    except RuntimeError:
        raise ValueError(
            "no home directory is known for this user: set VOLO_CACHE to a folder that can be written, or HOME"
        ) from None
