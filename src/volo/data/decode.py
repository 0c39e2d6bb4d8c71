"""Image files of every kind to RGB: one function, and one error that names the file and what is wrong with it."""

from __future__ import annotations

import errno
import io
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 178_956_970
"""Images above this (Pillow's own limit) are refused: half a gigabyte decoded, more likely an attack than a photo."""

PAUSES = (0.1, 0.4, 1.5)
"""Seconds between tries to read a file again."""

# What a network disk says when it is slow or has been away for a moment.
_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "ENOTCONN", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN",
        "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EREMOTEIO", "ENOLINK",
    )
    if hasattr(errno, name)
}  # fmt: skip

# What Pillow raises on damaged files. MemoryError is not among them: that is not the image's fault.
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

# Files that often lie among images under an image's name, by how they begin: a better reason than "unknown format".
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
    """An image cannot be decoded; `name` and `reason` say which and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(source: str | Path | bytes, name: str | None = None) -> Tensor:
    """An image file, or its bytes, as uint8 [3, H, W] RGB (a view of [H, W, 3] memory, the faster order for resizing).

    The content decides, not the ending. Grey and palette images become RGB, transparent parts lie on white, CMYK is
    converted, 16 bits are scaled to 8, EXIF orientation is applied, of an animation the first frame is taken. Colour
    profiles are not applied. Raises BadImageError (a ValueError) with `name`, or the path, and the reason: missing,
    empty, no image, truncated, above MAX_PIXELS, floating-point or 32-bit values without an agreed range.
    """
    if isinstance(source, bytes):
        data, name = source, name or "image"
    else:
        name = name or str(source)
        data = read_file(source, name)
    return decode_oriented(data, name)[0]


def decode_oriented(data: bytes, name: str) -> tuple[Tensor, int]:
    """`decode_image`, and the EXIF orientation that was applied (1: none)."""
    with _opened(data, name) as image:
        pixels = _rgb(image, name)
        orientation = _orientation(image)
    return torch.from_numpy(_turned(pixels, orientation)).permute(2, 0, 1), orientation


def image_size(path: Path, name: str) -> tuple[int, int]:
    """Height and width that `decode_image` would give, from the header alone. Raises BadImageError."""
    data = read_file(path, name)
    with naming(name, data), Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        return (width, height) if _orientation(image) > 4 else (height, width)


class DecodedMask(NamedTuple):
    """What `decode_mask` gives."""

    values: np.ndarray
    """uint8 [H, W]."""
    orientation: int
    """The EXIF orientation that was applied, as to any image (1: none)."""
    kind: str
    """What the values were: "grey" levels, "palette" indices, "grey in RGB", or "colours", whose classes they are then."""


def decode_mask(
    data: bytes, name: str, *, colours: Mapping[int, int] | None = None, grey_rgb: bool = False
) -> DecodedMask:
    """A mask file's values.

    Values are grey levels or palette indices as they are stored: those of 1, 2 and 4 bits are not scaled. Of RGB masks
    they are what `colours` has for red << 16 | green << 8 | blue; with `grey_rgb` grey levels where all three are equal.
    Raises BadImageError, for other colours and for values above 255 too.
    """
    with _opened(data, name) as image:
        orientation = _orientation(image)
        if image.mode in ("RGB", "RGBA"):
            values, kind = _of_colours(np.asarray(image), image.mode, name, colours, grey_rgb)
            return DecodedMask(_turned(values, orientation), orientation, kind)
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise BadImageError(
                name, f"a mask has one channel of class numbers, this is {image.mode}; turn colours into numbers first"
            )
        kind = "palette" if image.mode == "P" else "grey"
        values = np.array(image)
        if image.mode == "L" and (top := _stored_maximum(image, data)) != 255:
            values = ((values.astype(np.uint16) * top + 127) // 255).astype(np.uint8)
    if values.dtype != np.uint8:
        if values.min() < 0 or values.max() > 255:
            raise BadImageError(name, f"values from {values.min()} to {values.max()}; masks hold 0 to 255")
        values = values.astype(np.uint8)
    return DecodedMask(_turned(values, orientation), orientation, kind)


def _of_colours(
    pixels: np.ndarray, mode: str, name: str, colours: Mapping[int, int] | None, grey_rgb: bool
) -> tuple[np.ndarray, str]:
    """Values uint8 [H, W] of a mask [H, W, 3 or 4], and what they were."""
    if mode == "RGBA" and pixels[..., 3].min() < 255:
        raise BadImageError(
            name,
            "a mask has one channel of class numbers, this is RGBA with transparent pixels; save it as RGB or grey",
        )
    if grey_rgb and (pixels[..., :1] == pixels[..., 1:3]).all():
        return np.ascontiguousarray(pixels[..., 0]), "grey in RGB"
    packed = pixels[..., 0].astype(np.int32) << 16 | pixels[..., 1].astype(np.int32) << 8 | pixels[..., 2]
    codes = np.array(sorted(colours or {}), np.int32)
    places = np.searchsorted(codes, packed).clip(max=max(0, len(codes) - 1))
    strange = codes[places] != packed if len(codes) else np.ones(packed.shape, bool)
    if strange.any():
        found, counts = np.unique(packed[strange], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        shown = ", ".join(f"#{found[k]:06x} ({counts[k]:,} pixels)" for k in order[:8])
        more = f" and {len(found) - 8:,} others" if len(found) > 8 else ""
        which = "colours that classes.csv does not name" if len(codes) else "the colours"
        raise BadImageError(
            name,
            f"a mask has one channel of class numbers, this is {mode}, with {which} {shown}{more}; a classes.csv with "
            "index,name,r,g,b beside the images says which class each colour is, every colour once",
        )
    return np.array([colours[int(code)] for code in codes], np.uint8)[places], "colours"  # type: ignore[index]


def _stored_maximum(image: Image.Image, data: bytes) -> int:
    """Of a grey image: the value in the file that Pillow, which scales few bits to eight, gives as 255."""
    bits = 8
    if image.format == "PNG":
        bits = data[24]
    elif image.format == "TIFF":
        bits = int(image.tag_v2.get(258, (8,))[0])  # type: ignore[attr-defined]
    elif image.format == "PPM" and (match := _PGM_HEADER.match(data)):
        return min(int(match[1]), 255)
    return (1 << bits) - 1 if bits < 8 else 255


_PGM_HEADER = re.compile(rb"P[25]" + 2 * rb"(?:\s|#[^\n]*\n)+\d+" + rb"(?:\s|#[^\n]*\n)+(\d+)")


def read_file(path: str | Path, name: str) -> bytes:
    """Raises BadImageError for a file that is not there or cannot be read."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    return reading(read, name)


def reading(read: Callable[[], bytes], name: str) -> bytes:
    """`read()`, tried again where a disk or its network has a moment of weakness; an OSError is then a BadImageError."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if pause is not None and error.errno in _PASSING:
                time.sleep(pause)
            # Too many open files or no memory: the machine's trouble, and no reason to leave an image out.
            elif error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            else:
                raise BadImageError(name, (error.strerror or "cannot be read").lower()) from None
    raise AssertionError


@contextmanager
def naming(name: str, data: bytes) -> Iterator[None]:
    """Everything Pillow raises on a bad image becomes a BadImageError; `data` is the file, or its beginning."""
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
        if str(error).startswith("conversion from"):  # of a mode such as LAB
            raise BadImageError(name, f"{error}; save it as RGB or grey") from None
        raise BadImageError(name, f"damaged ({error or type(error).__name__})") from error


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image in `data`, loaded; whatever goes wrong is a BadImageError."""
    with naming(name, data):
        try:
            image = _loaded(data, name)
        except ValueError as error:
            # Pillow gives a PNG up for texts and colour profiles above a megabyte, which nobody here needs.
            plain = _without_texts(data)
            if isinstance(error, BadImageError) or len(plain) == len(data):
                raise
            image = _loaded(plain, name)
        with image:
            yield image


def _loaded(data: bytes, name: str) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(name, f"{width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down first")
    image.load()
    return image


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, anything else as it is. EXIF stays, in whatever chunk it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind, text = data[start + 4 : start + 8], data[start + 8 : start + 40]
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or text.lower().startswith(b"raw profile type exif"):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, ...] as it is looked at, for pixels stored with an EXIF orientation."""
    transpose, flip_rows, flip_columns = _ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _what_is(data: bytes) -> str:
    start = data[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for magic, what in _LOOK_ALIKES:
        if start.startswith(magic):
            return f"not an image but {what}"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "a HEIC image, which Pillow cannot read; convert it to JPEG or PNG"
    if not data.strip(b"\0"):
        return "not an image: it holds zeros only, perhaps a broken download"
    return f"not an image in a format that Pillow knows (it begins with {data[:8]!r})"


def _orientation(image: Image.Image) -> int:
    # Rotation is a comfort: pixels with a broken EXIF block are still good pixels. TIFF is already rotated when loaded.
    try:
        return int(image.getexif().get(0x0112, 1))
    except _DECODE_ERRORS:
        return 1


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """Loaded image of any mode as uint8 [H, W, 3]."""
    if image.mode.startswith("I") or image.mode == "F":
        is_16_bit = image.mode != "I" or image.format in ("PNG", "PPM")
        return np.repeat(_eight_bits(np.asarray(image), image.mode, is_16_bit, name)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # "La" and "RGBa" (premultiplied) convert only to their plain counterparts.
        plain = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode]) if image.mode in ("La", "RGBa") else image
        rgba = plain.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _eight_bits(values: np.ndarray, mode: str, is_16_bit: bool, name: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if mode == "F":
        if low >= 0 and high <= 1:
            return (values * 255).round().astype(np.uint8)
        if low >= 0 and high <= 255:
            return values.round().astype(np.uint8)
    elif is_16_bit and low >= 0 and high <= 65535:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    raise BadImageError(
        name, f"32-bit values from {low} to {high}: the range that is black to white is unknown; save with 8 or 16 bits"
    )
