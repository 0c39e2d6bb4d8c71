"""Tar shards made of any data that `open_data` reads: the same bytes every time, and never half a shard."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from volo.config import DataConfig, read_text
from volo.data.decode import BadImage, decode_image
from volo.data.files import FolderLock, write_atomically
from volo.data.images import open_data
from volo.data.shard_index import build_index, index_paths, save_index
from volo.data.shards import TarSource
from volo.data.sources import FolderSource, ImageSource, Progress, in_parallel
from volo.data.walk import IMAGE_ENDINGS

FORMAT = 1

SHRUNK_QUALITY = 95
"""JPEG quality of images that are made smaller, where none is asked for."""

_UNITS = {"B": 1} | {f"{u}B": 1000**i for i, u in enumerate("KMGT", 1)} | {f"{u}iB": 1024**i for i, u in enumerate("KMGT", 1)}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """What `pack` has made."""

    out: Path
    classes: tuple[str, ...]
    num_train: int
    num_val: int
    shards: list[Path]
    num_bytes: int
    num_done_before: int
    """Shards that an earlier, interrupted call had left."""
    skipped: list[BadImage]
    notes: list[str]
    seconds: float


def pack(
    config: DataConfig,
    out: str | Path,
    *,
    shard_bytes: int = 256_000_000,
    shorter_side: int = 0,
    quality: int = 0,
    overwrite: bool = False,
    on_checked: Progress | None = None,
    on_packed: Progress | None = None,
) -> Packed:
    """Write the data of `config` as train-000000.tar, ..., val-000000.tar, ... and classes.txt into the folder `out`.

    Images keep their order and their bytes, and their names (`ImageSource.names`): in KEY.json where the member has to
    be called otherwise. A run on the shards is therefore the run on the data, and label maps find their images. An
    interrupted call is continued by the same call, and ends with the same bytes as one that was not interrupted.

    Args:
        shard_bytes: a shard is no larger than this, unless a single image is.
        shorter_side: images whose shorter side has more pixels than this are scaled down to it, and become JPEG; 0: none.
        quality: 1 to 100: every image becomes a JPEG of this quality; 0: only those that are scaled down do, with 95.
            Images that are arrays (npz, CIFAR, the digits) become PNG, without loss.
        overwrite: replace shards that are in `out`.

    Raises:
        ValueError: as `open_data`; values that make no sense; `out` holds the shards of other data or settings.
        ValueError: another process is packing into `out`.
        FileExistsError: `out` holds tar files or a classes.txt that are not ours.
        OSError: a file cannot be written.
    """
    out = Path(out).expanduser()
    if shard_bytes < 10_000:
        raise ValueError(f"the shard size is {shard_bytes} bytes; it is 10 KB at least, and usually 256 MB")
    if shorter_side < 0 or not 0 <= quality <= 100:
        raise ValueError(
            f"shorter side {shorter_side}, quality {quality}: these are pixels, and 1 to 100 (0: as it is)"
        )
    data_path = Path(config.path).expanduser()
    if config.path and data_path.is_dir() and out.resolve().is_relative_to(data_path.resolve()):
        raise ValueError(f"{out} lies in the data itself ({data_path}), and would be taken for a part of it")
    with FolderLock(out, "packing"):
        _refuse_strangers(out, overwrite)
        return _pack(config, out, shard_bytes, _Encoder(shorter_side, quality), overwrite, on_checked, on_packed)


def _pack(
    config: DataConfig,
    out: Path,
    shard_bytes: int,
    encode: _Encoder,
    overwrite: bool,
    on_checked: Progress | None,
    on_packed: Progress | None,
) -> Packed:
    started = time.monotonic()
    splits = open_data(replace(config, cache="none"), on_progress=on_checked)
    unfit = [name for name in splits.classes if not name or name != name.strip() or len(name.splitlines()) != 1]
    if unfit:
        raise ValueError(f"classes.txt has a class a line, and cannot hold {unfit[0]!r}; rename that class")
    settings = {
        "format": FORMAT,
        "shard_bytes": shard_bytes,
        "shorter_side": encode.shorter_side,
        "quality": encode.quality,
        "classes": len(splits.classes),
        "pictures": {name: _fingerprint(part) for name, part in (("train", splits.train), ("val", splits.val))},
    }
    done = _look_into(out, settings, overwrite)
    num_done_before = len(done)
    _write_manifest(out, settings, done)
    write_atomically(
        out / "classes.txt", lambda file: file.write("".join(f"{name}\n" for name in splits.classes).encode())
    )
    total = len(splits.train) + len(splits.val)
    for name, part in (("train", splits.train), ("val", splits.val)):
        keys = member_keys(part.names)
        first = sum(shard["pictures"] for shard in done if shard["file"].startswith(f"{name}-"))
        before = 0 if name == "train" else len(splits.train)
        records = _Peekable(_records(part, keys, first, encode))
        while records.has_more():
            number = sum(shard["file"].startswith(f"{name}-") for shard in done)
            path = out / f"{name}-{number:06}.tar"

            def advance(count: int, offset: int = before + first) -> None:
                if on_packed:
                    on_packed(offset + count, total)

            count = _write_shard(path, records, shard_bytes, advance)
            _check(path, count)
            first += count
            done.append({"file": path.name, "pictures": count, "bytes": path.stat().st_size})
            _write_manifest(out, settings, done)
    return Packed(
        out,
        splits.classes,
        len(splits.train),
        len(splits.val),
        [out / shard["file"] for shard in done],
        sum(shard["bytes"] for shard in done),
        num_done_before,
        splits.skipped,
        splits.notes,
        time.monotonic() - started,
    )


def parse_size(text: str) -> int:
    """Bytes of "256MB" (millions), "1GiB" (2^30) or a plain number. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or (match[2] or "b").lower() not in units:
        raise ValueError(f"a size is a number with one of {', '.join(_UNITS)}, or none; given: {text!r}")
    return int(float(match[1]) * units[(match[2] or "b").lower()])


def member_keys(names: Sequence[str]) -> list[str]:
    """A key for each image: its name without the ending, made unique, and with "_" for dots, which end a key."""
    taken: set[str] = set()
    keys = []
    for name in names:
        path = PurePosixPath(name)
        last = path.stem if path.suffix.lower() in IMAGE_ENDINGS else path.name
        stem = str(path.with_name(last.replace(".", "_")))
        key, count = stem, 0
        while key in taken:
            count += 1
            key = f"{stem}_{count}"
        taken.add(key)
        keys.append(key)
    return keys


class _Encoder:
    """An image of a source as (ending, file): as it is, or made smaller."""

    def __init__(self, shorter_side: int, quality: int) -> None:
        self.shorter_side, self.quality = shorter_side, quality

    def __call__(self, source: ImageSource, index: int) -> tuple[str, bytes]:
        name = source.names[index]
        if not isinstance(source, FolderSource | TarSource):
            picture = source.load(index)
            shrunk = self._shrunk(picture)
            return _encode(picture if shrunk is None else shrunk, self.quality)
        data = source.read(index)
        if self.shorter_side or self.quality:
            picture = decode_image(data, name)
            shrunk = self._shrunk(picture)
            if shrunk is not None or self.quality:
                return _encode(picture if shrunk is None else shrunk, self.quality or SHRUNK_QUALITY)
        ending = PurePosixPath(name).suffix.lower()
        return (ending if ending in IMAGE_ENDINGS else _ending_of(data)), data

    def _shrunk(self, picture: torch.Tensor) -> torch.Tensor | None:
        H, W = picture.shape[1:]
        if not 0 < self.shorter_side < min(H, W):
            return None
        scale = self.shorter_side / min(H, W)
        size = [max(self.shorter_side, round(side * scale)) for side in (H, W)]
        return F.resize(picture, size, InterpolationMode.BICUBIC, antialias=True)


def _encode(picture: torch.Tensor, quality: int) -> tuple[str, bytes]:
    """JPEG of that quality, or PNG where it is 0."""
    file = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    if quality:
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "PNG")
    return (".jpg" if quality else ".png"), file.getvalue()


def _ending_of(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or "PNG"
    return {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}.get(kind, f".{kind.lower()}")


def _records(
    source: ImageSource, keys: Sequence[str], first: int, encode: Callable[[ImageSource, int], tuple[str, bytes]]
) -> Iterator[bytes]:
    """The members of one image after the other, as they lie in a tar file."""

    def record(index: int) -> bytes:
        ending, data = encode(source, index)
        key, name, label = keys[index], source.names[index], int(source.targets[index])
        members = [(key + ending, data), (f"{key}.cls", str(label).encode())]
        if key + ending != name:
            about = {"label": label, "class": source.classes[label], "name": name}
            members.append((f"{key}.json", json.dumps(about).encode()))
        return b"".join(_member(path, content) for path, content in members)

    yield from in_parallel(record, range(first, len(source)), chunk=64)


def _member(path: str, content: bytes) -> bytes:
    """Header and content, padded. No time, owner or rights of anybody: the same bytes everywhere."""
    info = tarfile.TarInfo(path)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return header + content + b"\0" * (-len(content) % tarfile.BLOCKSIZE)


class _Peekable:
    """An iterator whose next element can be looked at."""

    def __init__(self, records: Iterator[bytes]) -> None:
        self._records = records
        self._next = next(records, None)

    def has_more(self) -> bool:
        return self._next is not None

    def peek(self) -> bytes:
        assert self._next is not None
        return self._next

    def take(self) -> bytes:
        taken = self.peek()
        self._next = next(self._records, None)
        return taken


def _write_shard(path: Path, records: _Peekable, shard_bytes: int, on_picture: Callable[[int], None]) -> int:
    """Fill one shard, and return how many images it holds."""
    end = b"\0" * (2 * tarfile.BLOCKSIZE)
    count = 0

    def fill(file: BinaryIO) -> None:
        nonlocal count
        size = 0
        while records.has_more() and (not count or size + len(records.peek()) + len(end) <= shard_bytes):
            size += file.write(records.take())
            count += 1
            on_picture(count)
        file.write(end)

    write_atomically(path, fill)
    return count


def _check(path: Path, count: int) -> None:
    """Read back what was written; its index stays for whoever opens it."""
    index = build_index(path)
    if len(index) != count or index.bad:
        reasons = "; ".join(map(str, index.bad[:3]))
        raise OSError(f"{path} was written with {count} images but reads back with {len(index)}: {reasons}")
    save_index(path, index)


def _fingerprint(source: ImageSource) -> str:
    """Of names and classes, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, target in zip(source.names, source.targets.tolist()):
        digest.update(os.fsencode(f"{name}\0{source.classes[target]}\n"))
    return f"{len(source)} images, {digest.hexdigest()}"


def _refuse_strangers(out: Path, overwrite: bool) -> None:
    """Raise FileExistsError where files of the names that are to be written are not ours: there is no manifest."""
    there = sorted(file for name in ("train-*.tar", "val-*.tar", "classes.txt") for file in out.glob(name))
    if there and not overwrite and not (out / "pack.json").is_file():
        raise FileExistsError(
            f"{out} holds {', '.join(file.name for file in there[:3])}, which volo pack has not written; choose another --out, "
            "or replace them with --overwrite"
        )


def _look_into(out: Path, settings: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """The shards of an earlier call with the same settings that are whole; others are removed with `overwrite`."""
    manifest = out / "pack.json"
    there = sorted([*out.glob("train-*.tar"), *out.glob("val-*.tar")])
    if overwrite:
        for path in (manifest, *there, *(index_paths(shard)[0] for shard in there)):
            path.unlink(missing_ok=True)
        return []
    if not manifest.is_file():
        return []
    try:
        before = json.loads(read_text(manifest))
        shards = before.pop("shards")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{manifest} cannot be read ({error}); pack anew with --overwrite") from error
    if before != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise ValueError(
            f"{out} holds shards of other data or settings ({changed} changed); choose another --out, or replace them with "
            "--overwrite"
        )
    whole: list[dict[str, Any]] = []
    parts_cut: set[str] = set()
    for shard in shards:
        path, part = out / shard["file"], shard["file"].partition("-")[0]
        if part not in parts_cut and path.is_file() and path.stat().st_size == shard["bytes"]:
            whole.append(shard)
        else:
            parts_cut.add(part)
    return whole


def _write_manifest(out: Path, settings: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    text = json.dumps({**settings, "shards": sorted(shards, key=lambda shard: shard["file"])}, indent=1).encode()
    write_atomically(out / "pack.json", lambda file: file.write(text))
