"""One label map as bytes and back: classes by a palette, logits as differences, everything deflated.

A map is small and far from random: an image knows some dozen to a few hundred of the classes, neighbouring positions
share them, and the logits of a position fall from rank to rank. So a record has four streams of whole numbers:

    palette   the classes that occur, ascending, as differences
    classes   for each rank and position its place in the palette
    first     the highest logit of each position
    falls     by how much each further logit lies below the one before it

"exact" keeps logits as float16, by numbers that rise with the value: high bytes in `first`, low bytes in `falls`.
"compact" rounds them to multiples of `COMPACT_STEP`.
"""

from __future__ import annotations

import zlib
from typing import Literal, get_args

import numpy as np

Encoding = Literal["exact", "compact"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)

COMPACT_STEP = 0.1
"""Distance of the logits that "compact" can tell apart: none is off by more than half of it.

A softmax over logits that are each off by at most e moves no probability by more than tanh(e) / 2, here 0.025 (where
the probability is 1/2; less elsewhere). Interpolation between positions averages logits, so the bound holds for crops.
"""

_WIDTHS = (np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4"))
_HUFFMAN = zlib.Z_HUFFMAN_ONLY
_RAW_DEFLATE = -15  # window bits; negative: no header and no checksum, which records have of their own
_MEMORY = 8  # zlib's default; 9 gives the same bytes, but takes a map of 8 x 8 ten times as long


def encode_map(scores: np.ndarray, classes: np.ndarray, encoding: Encoding) -> bytes:
    """A record.

    Args:
        scores: logits [top, h, w], float16 or float32, falling along the first axis, finite. "exact" rounds to float16.
        classes: class of each logit [top, h, w], integers from 0 below 2^32.
        encoding: "exact" or "compact".

    Raises ValueError for logits that are not finite (in float16, for "exact") or do not fall.
    """
    present = np.unique(classes) if classes.max() >= 1 << 16 else np.flatnonzero(np.bincount(classes.ravel()))
    indices = np.searchsorted(present, classes.ravel())
    palette = np.diff(present, prepend=0)
    if encoding == "exact":
        levels = _float16_levels(scores)
    else:
        if not np.isfinite(scores).all():
            raise ValueError("logits must be finite")
        levels = np.rint(scores.astype(np.float32) / np.float32(COMPACT_STEP)).astype(np.int64)
    falls = levels[:-1] - levels[1:]
    if falls.size and falls.min() < 0:
        raise ValueError("logits must fall along the first axis")
    if encoding == "exact":
        numbers = np.concatenate([levels[:1] & 0xFFFF, falls]).ravel()
        logits = (_pack(numbers >> 8, _HUFFMAN), _pack(numbers & 0xFF, _HUFFMAN))
    else:
        steps = np.diff(levels[0].ravel(), prepend=0)
        # 0, -1, 1, -2, 2, ... become 0, 1, 2, 3, 4, ...
        logits = (_pack(np.where(steps < 0, -2 * steps - 1, 2 * steps), _HUFFMAN), _pack(falls.ravel(), _HUFFMAN))
    return b"".join((_pack(palette), _pack(indices), *logits))


def decode_map(record: bytes | memoryview, shape: tuple[int, int, int], encoding: str) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `encode_map`: scores (float16 if "exact", else float32) and classes (int64), both of `shape`.

    Raises ValueError for bytes that are no record of that shape and encoding.
    """
    top, h, w = shape
    size = top * h * w
    try:
        palette, start = _unpack(record, 0)
        indices, start = _unpack(record, start)
        first, start = _unpack(record, start)
        falls, start = _unpack(record, start)
        classes = palette.cumsum(dtype=np.int64).take(indices)  # IndexError beyond the palette
        if encoding == "exact":
            numbers = first.astype(np.uint16)
            numbers <<= 8
            numbers |= falls
            levels = numbers.astype(np.int32).reshape(shape)
            levels[0] = levels[0].astype(np.uint16).view(np.int16).reshape(h, w)
            np.negative(levels[1:], out=levels[1:])
            np.cumsum(levels, axis=0, out=levels)
            scores = np.where(levels < 0, 0x7FFF - levels, levels).astype(np.uint16).view(np.float16)
        else:
            zigzag = first.astype(np.int32)
            steps = (zigzag >> 1) ^ -(zigzag & 1)
            levels = np.empty((top, h * w), np.int32)
            steps.cumsum(out=levels[0])
            np.negative(falls.reshape(top - 1, h * w), out=levels[1:], casting="unsafe", dtype=np.int32)
            np.cumsum(levels, axis=0, out=levels)
            scores = levels.reshape(shape).astype(np.float32) * np.float32(COMPACT_STEP)
        if start != len(record) or len(classes) != size:
            raise ValueError("lengths do not agree")
        return scores, classes.reshape(shape)
    except (zlib.error, ValueError, IndexError) as error:
        raise ValueError(f"not a label map of {top} x {h} x {w}: {error}") from error


def _float16_levels(scores: np.ndarray) -> np.ndarray:
    """Whole numbers that rise with the value and differ by 1 between neighbouring float16 numbers."""
    with np.errstate(over="ignore"):
        half = scores.astype(np.float16) + np.float16(0)  # -0 becomes 0
    if not np.isfinite(half).all():
        raise ValueError("logits must be finite and within the range of float16 (65,504)")
    bits = half.view(np.uint16).astype(np.int64)
    return np.where(bits >= 0x8000, 0x7FFF - bits, bits)


def _pack(numbers: np.ndarray, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """A stream: width of the numbers and whether it is deflated (1 byte), its length (3), low bytes first, by planes."""
    largest = int(numbers.max(initial=0))
    code = 0 if largest < 1 << 8 else 1 if largest < 1 << 16 else 2
    width = _WIDTHS[code].itemsize
    plain = numbers.astype(_WIDTHS[code]).view(np.uint8).reshape(-1, width).T.tobytes()
    deflater = zlib.compressobj(6, zlib.DEFLATED, _RAW_DEFLATE, _MEMORY, strategy)
    deflated = deflater.compress(plain) + deflater.flush()
    if len(deflated) < len(plain):
        return bytes((code | 4,)) + len(deflated).to_bytes(3, "little") + deflated
    return bytes((code,)) + len(plain).to_bytes(3, "little") + plain


def _unpack(record: bytes | memoryview, start: int) -> tuple[np.ndarray, int]:
    """The numbers of the stream at `start`, and where the next one begins."""
    code = record[start]
    end = start + 4 + int.from_bytes(record[start + 1 : start + 4], "little")
    plain = record[start + 4 : end]
    if code & 4:
        plain = zlib.decompress(plain, _RAW_DEFLATE)
    code &= 3
    if code == 0:
        return np.frombuffer(plain, np.uint8), end
    planes = np.frombuffer(plain, np.uint8).reshape(_WIDTHS[code].itemsize, -1)
    return np.ascontiguousarray(planes.T).view(_WIDTHS[code]).ravel(), end
