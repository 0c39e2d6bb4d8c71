"""Picture files of every kind to RGB: one function, and one error that names the file and what is wrong with it."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 178_956_970
"""Pictures above this (Pillow's own limit) are refused: half a gigabyte decoded, more likely an attack than a photo."""

# What Pillow raises on damaged files. MemoryError is not among them: that is not the picture's fault.
_DECODE_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
)

# Files that often lie among pictures under a picture's name, by how they begin: a better reason than "unknown format".
_LOOK_ALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<!doctype html", "an HTML page, perhaps an error page saved by a downloader"),
    (b"<html", "an HTML page, perhaps an error page saved by a downloader"),
    (b"<svg", "an SVG drawing; render it to PNG first"),
    (b"<?xml", "an XML file; if it is an SVG drawing render it to PNG first"),
    (b"%pdf", "a PDF document"),
    (b"pk\x03\x04", "a ZIP archive; unpack it first"),
)

# EXIF orientation -> (transpose first, flip rows, flip columns) of the stored [H, W, 3] array.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class BadImage:
    """A file that cannot be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class BadImageError(ValueError):
    """A picture cannot be decoded; `name` and `reason` say which and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(source: str | Path | bytes, name: str | None = None) -> Tensor:
    """A picture file, or its bytes, as uint8 [3, H, W] RGB (a view of [H, W, 3] memory, the faster order for resizing).

    The content decides, not the ending. Grey and palette pictures become RGB, transparent parts lie on white, CMYK is
    converted, 16 bits are scaled to 8, EXIF rotation is applied, of an animation the first frame is taken. Colour
    profiles are not applied. Raises BadImageError (a ValueError) with `name`, or the path, and the reason: missing,
    empty, no picture, truncated, above MAX_PIXELS, floating-point or 32-bit values without an agreed range.
    """
    if isinstance(source, bytes):
        data, name = source, name or "picture"
    else:
        name = name or str(source)
        data = read_file(source, name)
    with naming(name, data), Image.open(io.BytesIO(data)) as image:
        _check_size(image, name)
        image.load()
        pixels = _rgb(image, name)
        orientation = _orientation(image)
    transpose, flip_rows, flip_columns = _ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    if transpose or flip_rows or flip_columns:
        pixels = np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_file(path: str | Path, name: str) -> bytes:
    """Raises BadImageError for a file that is not there or cannot be read."""
    with open_picture_file(path, name) as file:
        return file.read()


def open_picture_file(path: str | Path, name: str) -> BinaryIO:
    """Open for reading; a file that is not there or may not be read is a BadImageError."""
    try:
        return open(path, "rb")
    except OSError as error:
        # Too many open files or no memory: the machine's trouble, and no reason to leave a picture out.
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise BadImageError(name, (error.strerror or "cannot be opened").lower()) from None


@contextmanager
def naming(name: str, data: bytes) -> Iterator[None]:
    """Everything Pillow raises on a bad picture becomes a BadImageError; `data` is the file, or its beginning."""
    if not data:
        raise BadImageError(name, "the file is empty (0 bytes)")
    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(name, _what_is(data)) from None
    except Image.DecompressionBombError:
        raise BadImageError(name, f"more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except _DECODE_ERRORS as error:
        raise BadImageError(name, f"damaged ({error or type(error).__name__})") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(name, f"{width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down first")


def _what_is(data: bytes) -> str:
    start = data[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for magic, what in _LOOK_ALIKES:
        if start.startswith(magic):
            return f"not a picture but {what}"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "a HEIC picture, which Pillow cannot read; convert it to JPEG or PNG"
    if not data.strip(b"\0"):
        return "not a picture: it holds zeros only, perhaps a broken download"
    return f"not a picture in a format that Pillow knows (it begins with {data[:8]!r})"


def _orientation(image: Image.Image) -> int:
    # Rotation is a comfort: pixels with a broken EXIF block are still good pixels. TIFF is already rotated when loaded.
    try:
        return int(image.getexif().get(0x0112, 1))
    except _DECODE_ERRORS:
        return 1


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """Loaded picture of any mode as uint8 [H, W, 3]."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image), image.mode, name)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # "La" and "RGBa" (premultiplied) convert only to their plain counterparts.
        plain = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]) if image.mode in ("La", "RGBa") else image
        rgba = plain.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _eight_bits(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if mode == "F":
        if low >= 0 and high <= 1:
            return (values * 255).round().astype(np.uint8)
        if low >= 0 and high <= 255:
            return values.round().astype(np.uint8)
    elif low >= 0 and high <= 65535:  # 16-bit grey arrives as "I;16" or, from some formats, as "I"
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    raise BadImageError(
        name, f"32-bit values from {low} to {high}: the range that is black to white is unknown; save with 8 or 16 bits"
    )
