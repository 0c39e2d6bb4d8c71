"""What every command says, and how: bars, notes, figures for people."""

from __future__ import annotations

import contextlib
import os
import time
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

LIVE_SECONDS = 0.25
"""A terminal is redrawn no more often than this: drawing takes milliseconds that the training could use."""
LINE_SECONDS = 30.0
"""A log file gets a line no more often than this."""


NARROWEST = 40
"""Columns that tables are laid out for at least, whatever COLUMNS says."""


def results(json: bool = False, *, lasting: bool = False) -> Console:
    """Where a command prints its result; with --json standard output is left to that. `lasting`: see `Lasting`."""
    console = Console(stderr=json)
    if lasting:
        console.file = cast(IO[str], Lasting(console.file))
    console.width = max(console.width, NARROWEST)
    return console


class Lasting:
    """A stream whose end (a terminal that was closed, a pipe without a reader) does not end the work it tells of."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def print_row(console: Console, row: Text) -> None:
    """A row of a table without an end: cut to the width of a terminal, whole in a file."""
    if console.is_terminal:
        console.print(row, no_wrap=True, overflow="ellipsis", crop=True)
    else:
        console.print(row, soft_wrap=True)


def note(text: object, style: str = "yellow") -> None:
    """A line on standard error, word for word."""
    Console(stderr=True).print(str(text), style=style, soft_wrap=True, markup=False, highlight=False)


def process_rank() -> int | None:
    """This process's number among those that torchrun started; None for one that is alone, whatever RANK says."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and size.isdecimal() and int(size) > 1 else None


def is_main_process() -> bool:
    """This process reports."""
    return not process_rank()


def complain(message: str) -> None:
    """Why the command ends."""
    rank = process_rank()
    who = "volo" if rank is None else f"volo (process {rank})"
    Console(stderr=True).print(Text.assemble((f"{who}: ", "bold red"), (message, "red")), soft_wrap=True)


class Bar:
    """One line that is redrawn in a terminal, or a plain line once in a while anywhere else.

    Nothing runs beside the caller: it draws when it is told something. Use as a context manager.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._drawn = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    def show(self, what: str, done: int, total: int, figures: str = "") -> None:
        now = time.monotonic()
        if now - self._drawn < (LIVE_SECONDS if self.console.is_terminal else LINE_SECONDS):
            return
        self._drawn = now
        if not self.console.is_terminal:
            self.console.print(Text(f"{what}: {done:,} of {total:,}  {figures}".rstrip()))
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[figures]}", style="dim"),
                console=self.console,
                auto_refresh=False,
                transient=True,
                expand=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(what, figures=figures)
        self._progress.update(self._task, description=what, completed=done, total=total, figures=figures, refresh=True)

    def clear(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def megabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count:,} bytes"


def duration(seconds: float) -> str:
    """H:MM:SS, without hours that are not there."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
