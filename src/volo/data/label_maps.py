"""Label maps of a data set in one folder: a few packed files, read by the picture's name.

A label map says what an annotator sees at each position of a picture: the logits and classes of its `top` best guesses
on a grid of h x w positions. `volo annotate` draws them; token labeling trains with them.

    store/index.bin         everything but the maps themselves; it is written last, so a store that has it is complete
    store/maps-00000.bin    the maps of some thousand pictures in a row

Both are containers: 8 bytes that say what it is, the length of a JSON header (8 bytes), the header, arrays at multiples
of 64 bytes, and the CRC-32 of all that (4 bytes). Numbers are little-endian. Pictures go by the name that `ImageSource`
gives them, a path relative to the data, so that both can be moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from volo.data.files import write_atomically
from volo.data.map_codec import decode_map, encode_map
from volo.data.transforms import height_width

FORMAT = 1
INDEX = "index.bin"

_MAGIC = b"VOLOMAPS"
_ALIGNMENT = 64


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"maps-{number:05}.bin"


class NoLabelMapError(KeyError, ValueError):
    """A store has no map for a picture."""

    def __str__(self) -> str:
        return str(self.args[0])


class LabelMaps:
    """The maps of a store, memory-mapped: `maps[name] -> (scores, classes)`.

    Cheap to pickle and to fork into worker processes, which share the memory; safe to read from several threads.
    """

    top: int
    """Guesses kept for each position."""
    grid: tuple[int, int]
    """Rows and columns of positions, the same for every picture."""
    num_classes: int
    classes: tuple[str, ...]
    """Names of the annotator's classes."""
    encoding: str
    """"exact": scores are float16, as drawn; "compact": float32, off by `COMPACT_STEP` / 2 at most."""
    annotator: dict[str, Any]
    """How the maps were drawn: model, weights, img_size, crop, flip, amp, date, versions, ..."""
    agreement: dict[str, float] | None
    """Share of the pictures ("top1", by the mean over positions) and of the positions ("positions") whose best guess is
    the picture's label; None where the annotator's classes are not those of the data."""
    skipped: dict[str, str]
    """Pictures without a map because they could not be decoded, and why."""

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        """`verify=False` trusts the index, which has been read before."""
        self.path = Path(path)
        index = self.path / INDEX
        if not index.is_file():
            begun = self.path.is_dir() and any(self.path.glob("maps-*"))
            raise FileNotFoundError(
                f"the label maps in {self.path} are not finished; go on with volo annotate ... --resume"
                if begun
                else f"no label maps at {self.path}: there is no {INDEX}. They are drawn by volo annotate ... --out {self.path}"
            )
        header, arrays = read_container(index, "index", verify=verify)
        if header["format"] != FORMAT:
            raise ValueError(f"{index} has format {header['format']}; this version of volo reads format {FORMAT}")
        self.top, self.num_classes = header["top"], header["num_classes"]
        self.grid = (header["grid"][0], header["grid"][1])
        self.classes, self.encoding = tuple(header["classes"]), header["encoding"]
        self.annotator, self.agreement = header["annotator"], header["agreement"]
        self.skipped = dict(header["skipped"])
        self.shards = [Shard(*shard) for shard in header["shards"]]
        self._first = list(accumulate((shard.count for shard in self.shards), initial=0))
        self._keys, self._order = arrays["keys"], arrays["order"]
        self._starts, self._lengths = arrays["starts"], arrays["lengths"]
        self._checksums, self._fingerprints = arrays["checksums"], arrays["fingerprints"]
        self._names = _PackedNames(arrays["name_ends"], arrays["names"])
        self._mapped: dict[int, memoryview] = {}

    @classmethod
    def open(cls, path: str | Path) -> LabelMaps:
        """Raises FileNotFoundError where there is no complete store, ValueError where its index is damaged."""
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path,)

    @property
    def names(self) -> Sequence[str]:
        """Of the pictures that have a map, in the order of the data."""
        return self._names

    @property
    def is_whole_picture(self) -> bool:
        """The grid covers the whole picture, whatever its shape."""
        return self.annotator["crop"] == "squash"

    def box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) of what the map shows of a picture of that size, as fractions of the picture: 0, 0,
        1, 1 unless the annotator saw a centre crop; beyond that where the crop was padded.
        """
        if self.is_whole_picture:
            return 0.0, 0.0, 1.0, 1.0
        crop_h, crop_w = height_width(self.annotator["img_size"])
        scale = max(crop_h / height, crop_w / width) / self.annotator["crop"]
        visible = crop_h / (height * scale), crop_w / (width * scale)
        return (1 - visible[0]) / 2, (1 - visible[1]) / 2, (1 + visible[0]) / 2, (1 + visible[1]) / 2

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(os.fsencode(name)) >= 0

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """scores [top, h, w], raw logits falling along the first axis, float16 or float32; classes int64 [top, h, w].

        Raises NoLabelMapError (a KeyError and a ValueError) where there is none, ValueError where it is damaged.
        """
        scores, classes = self._decode(name)
        return torch.from_numpy(scores), torch.from_numpy(classes)

    def read_batch(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """scores [B, top, h, w] and classes int64 [B, top, h, w] of several pictures. Raises as `maps[name]` does."""
        decoded = [self._decode(name) for name in names]
        if not decoded:
            dtype = torch.float16 if self.encoding == "exact" else torch.float32
            empty = torch.empty(0, self.top, *self.grid, dtype=torch.int64)
            return empty.to(dtype), empty
        return tuple(torch.from_numpy(np.stack(parts)) for parts in zip(*decoded))  # type: ignore[return-value]

    def fingerprint(self, name: str) -> int:
        """CRC-32 of the picture when its map was drawn, as `ImageSource.fingerprint` gives it."""
        return int(self._fingerprints[self._position(name)])

    def _decode(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        position = self._position(name)
        number = bisect_right(self._first, position) - 1
        start, length = int(self._starts[position]), int(self._lengths[position])
        record = self._shard(number)[start : start + length]
        if len(record) != length or checksum(os.fsencode(name), record) != self._checksums[position]:
            raise ValueError(
                f"the label map of {name} in {shard_path(self.path, number)} is damaged (its checksum is wrong). "
                "volo annotate ... --resume draws damaged ones again"
            )
        return decode_map(record, (self.top, *self.grid), self.encoding)

    def _position(self, name: str) -> int:
        position = self._find(os.fsencode(name))
        if position < 0:
            reason = self.skipped.get(name)
            raise NoLabelMapError(
                f"{self.path} has no label map for {name}"
                + (
                    f", which could not be decoded: {reason}"
                    if reason
                    else f"; it has {len(self)}, such as {self._names[0]}"
                    if len(self)
                    else "; it is empty"
                )
            )
        return position

    def _find(self, name: bytes) -> int:
        key = _key(name)
        i = int(self._keys.searchsorted(key))
        while i < len(self._keys) and self._keys[i] == key:
            position = int(self._order[i])
            if self._names.encoded(position) == name:
                return position
            i += 1
        return -1

    def _shard(self, number: int) -> memoryview:
        mapped = self._mapped.get(number)
        if mapped is None:
            path, shard = shard_path(self.path, number), self.shards[number]
            size = path.stat().st_size if path.is_file() else -1
            mapped = map_file(path) if size == shard.bytes else memoryview(b"")
            if mapped[-4:] != shard.checksum.to_bytes(4, "little"):
                raise ValueError(
                    f"{path} is {'missing' if size < 0 else 'not the file that the index was made for'}; "
                    "volo annotate ... --resume draws its maps again"
                )
            self._mapped[number] = mapped
        return mapped


def _reopen(path: Path) -> LabelMaps:
    return LabelMaps(path, verify=False)


@dataclass(frozen=True)
class Shard:
    """What the index knows of a file of maps."""

    count: int
    bytes: int
    checksum: int


@dataclass
class Block:
    """Maps of pictures in a row, and what became of the others: a batch, or a whole shard."""

    names: list[bytes] = field(default_factory=list)
    records: list[bytes | memoryview] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Names of pictures that cannot be decoded, and why."""
    tally: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """Pictures with a label the annotator knows, those it is right about; positions of these pictures, right ones."""

    def add(self, name: str, scores: np.ndarray, classes: np.ndarray, encoding: Any, fingerprint: int) -> None:
        """Append a map. Raises ValueError, with the name, for one that cannot be stored."""
        encoded = os.fsencode(name)
        try:
            record = encode_map(scores, classes, encoding)
        except ValueError as error:
            raise ValueError(f"the label map of {name} cannot be stored: {error}") from error
        self.names.append(encoded)
        self.records.append(record)
        self.checksums.append(checksum(encoded, record))
        self.fingerprints.append(fingerprint)

    def extend(self, other: Block) -> None:
        self.names += other.names
        self.records += other.records
        self.checksums += other.checksums
        self.fingerprints += other.fingerprints
        self.skipped += other.skipped
        self.tally = [a + b for a, b in zip(self.tally, other.tally)]

    def to_bytes(self, kind: str) -> bytes:
        header = {"skipped": self.skipped, "tally": self.tally}
        arrays = {
            "lengths": np.array([len(record) for record in self.records], "<u4"),
            "checksums": np.array(self.checksums, "<u4"),
            "fingerprints": np.array(self.fingerprints, "<u4"),
            "name_ends": np.cumsum([len(name) for name in self.names], dtype="<u4"),
            "names": np.frombuffer(b"".join(self.names), np.uint8),
            "records": np.frombuffer(b"".join(self.records), np.uint8),
        }
        return pack_container(kind, header, arrays)

    @classmethod
    def from_bytes(cls, buffer: memoryview, kind: str, origin: str) -> Block:
        """Raises ValueError for bytes that are not a whole block."""
        header, arrays = parse_container(buffer, kind, origin)
        names = _PackedNames(arrays["name_ends"], arrays["names"])
        ends = np.cumsum(arrays["lengths"], dtype=np.int64).tolist()
        records = arrays["records"].data
        return cls(
            [names.encoded(i) for i in range(len(names))],
            [records[start:end] for start, end in zip([0, *ends], ends)],
            arrays["checksums"].tolist(),
            arrays["fingerprints"].tolist(),
            [(name, reason) for name, reason in header["skipped"]],
            header["tally"],
        )


class ShardWriter:
    """Collects the maps of one shard, batch by batch, and publishes them in one step.

    What was appended is also in a journal beside the shard, so that a killed process loses no more than what it had not
    appended yet. The journal is not forced to the disk: a power cut may take the shard under way, finished ones stay. The
    bytes of a shard depend on its maps alone.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = shard_path(folder, number)
        self.journal = self.path.with_suffix(".part")
        self.block, self.num_batches = Block(), 0
        good = 0
        if self.journal.is_file():
            content = memoryview(self.journal.read_bytes())
            while good + 8 <= len(content):
                end = good + 8 + int.from_bytes(content[good : good + 8], "little")
                try:
                    batch = Block.from_bytes(content[good + 8 : end], "batch", str(self.journal))
                except ValueError:
                    break  # the last thing a killed process wrote
                self.block.extend(batch)
                self.num_batches += 1
                good = end
        self._file = self.journal.open("r+b" if good else "wb")
        self._file.truncate(good)
        self._file.seek(good)

    def append(self, batch: Block) -> None:
        """Raises OSError for a full disk."""
        content = batch.to_bytes("batch")
        self._file.write(len(content).to_bytes(8, "little") + content)
        self._file.flush()
        self.block.extend(batch)
        self.num_batches += 1

    def finish(self) -> None:
        """Write the shard. Raises OSError for a full disk; the journal then keeps what there is."""
        content = self.block.to_bytes("shard")
        write_atomically(self.path, lambda file: file.write(content))
        self._file.close()
        self.journal.unlink()

    def close(self) -> None:
        """Stop here; a writer for the same shard goes on later."""
        self._file.close()


def read_shard(folder: Path, number: int) -> Block:
    """A finished shard. Raises FileNotFoundError, and ValueError where a byte is not as it was written."""
    path = shard_path(folder, number)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return Block.from_bytes(map_file(path), "shard", str(path))


def write_index(
    folder: Path, header: Mapping[str, Any], num_shards: int, skipped: Iterable[tuple[str, str]] = ()
) -> None:
    """Make the store complete, after reading every shard back and checking it.

    Args:
        folder: where `num_shards` shards lie.
        header: top, grid, num_classes, classes, encoding, annotator: see `LabelMaps`.
        skipped: pictures that are in no shard, and why.

    Raises ValueError or FileNotFoundError for a shard that is missing or damaged, ValueError for a name that occurs twice.
    """
    shards, left_out, tally = [], list(skipped), [0, 0, 0, 0]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("starts", "lengths", "checksums", "fingerprints")}
    names: list[bytes] = []
    for number in range(num_shards):
        path = shard_path(folder, number)
        buffer = map_file(path)
        shard_header, arrays = parse_container(buffer, "shard", str(path))
        packed = _PackedNames(arrays["name_ends"], arrays["names"])
        names += [packed.encoded(i) for i in range(len(packed))]
        ends = np.cumsum(arrays["lengths"], dtype=np.int64)
        first = len(buffer) - 4 - (int(ends[-1]) if len(ends) else 0)  # records are the last array
        columns["starts"].append(first + ends - arrays["lengths"])
        for column in ("lengths", "checksums", "fingerprints"):
            columns[column].append(arrays[column])
        left_out += [tuple(entry) for entry in shard_header["skipped"]]
        tally = [a + b for a, b in zip(tally, shard_header["tally"])]
        shards.append((len(packed), len(buffer), int.from_bytes(buffer[-4:], "little")))
    keys = np.array([_key(name) for name in names], "<u8")
    order = np.argsort(keys, kind="stable").astype("<u4")
    if len(set(names)) < len(names):
        twice = sorted(names)
        double = next(a for a, b in zip(twice, twice[1:]) if a == b)
        raise ValueError(f"two pictures are called {os.fsdecode(double)}; maps are found by name")
    widths = {"starts": "<u8", "lengths": "<u4", "checksums": "<u4", "fingerprints": "<u4"}
    arrays = {
        "keys": keys[order],
        "order": order,
        **{column: np.concatenate([np.empty(0, widths[column]), *parts]).astype(widths[column]) for column, parts in columns.items()},
        "name_ends": np.cumsum([len(name) for name in names], dtype="<u8"),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }  # fmt: skip
    pictures, right, positions, right_positions = tally
    agreement = {"top1": right / pictures, "positions": right_positions / positions} if pictures else None
    content = pack_container(
        "index",
        {**header, "format": FORMAT, "shards": shards, "skipped": left_out, "agreement": agreement},
        arrays,
    )
    write_atomically(folder / INDEX, lambda file: file.write(content))


def checksum(name: bytes, record: bytes | memoryview) -> int:
    """CRC-32 of a record and the name it belongs to: a map under another picture's name is found out too."""
    return zlib.crc32(record, zlib.crc32(name))


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped into memory; no file descriptor stays open."""
    size = path.stat().st_size
    if not size:
        return memoryview(b"")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().data


def pack_container(kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a container; the same content gives the same bytes."""
    listed, offset = [], 0
    for name, array in arrays.items():
        offset += -offset % _ALIGNMENT
        listed.append((name, array.dtype.str, len(array), offset))
        offset += array.nbytes
    text = json.dumps({"kind": kind, "arrays": listed, **header}, sort_keys=True).encode()
    text += b" " * (-(len(_MAGIC) + 8 + len(text)) % _ALIGNMENT)
    parts = [_MAGIC, len(text).to_bytes(8, "little"), text]
    written = 0
    for (_, _, _, start), array in zip(listed, arrays.values()):
        parts += [bytes(start - written), array.tobytes()]
        written = start + array.nbytes
    content = b"".join(parts)
    return content + zlib.crc32(content).to_bytes(4, "little")


def parse_container(
    buffer: memoryview, kind: str, origin: str, *, verify: bool = True
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays (views of `buffer`). Raises ValueError for other, damaged or cut bytes; `origin` is named."""
    if bytes(buffer[:8]) != _MAGIC:
        raise ValueError(f"{origin} is not a file of label maps, or its beginning is damaged")
    if verify and zlib.crc32(buffer[:-4]) != int.from_bytes(buffer[-4:], "little"):
        raise ValueError(f"{origin} is damaged or cut off: its checksum is wrong")
    first = 16 + int.from_bytes(buffer[8:16], "little")
    header = json.loads(bytes(buffer[16:first]))
    if header["kind"] != kind:
        raise ValueError(f"{origin} is a {header['kind']} of label maps where a {kind} is needed")
    arrays = {
        name: np.frombuffer(buffer, dtype, count, first + start) for name, dtype, count, start in header["arrays"]
    }
    return header, arrays


def read_container(path: Path, kind: str, *, verify: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`parse_container` of a file, mapped into memory."""
    return parse_container(map_file(path), kind, str(path), verify=verify)


class _PackedNames(Sequence[str]):
    """Many names in one array of bytes."""

    def __init__(self, ends: np.ndarray, content: np.ndarray) -> None:
        self._ends, self._content = ends, content.data

    def encoded(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return bytes(self._content[start : int(self._ends[index])])

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(self.encoded(i)) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        return os.fsdecode(self.encoded(index % len(self)))


def _key(name: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))
