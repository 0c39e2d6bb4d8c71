"""A store of label maps while it is being filled: what goes where, what is there, what is left to do.

The images are cut into shards of `shard_size`, in the order of the data, and shards into batches. Both depend on the
data and the settings alone, and each process takes every n-th shard: so the store is the same, byte for byte, whatever
the number of processes and however often it was stopped and resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from volo import __version__
from volo.config import DataConfig
from volo.data.decode import BadImage
from volo.data.files import FolderLock, write_atomically
from volo.data.images import open_data
from volo.data.label_maps import (
    INDEX,
    Block,
    LabelMaps,
    ShardWriter,
    map_file,
    pack_container,
    read_container,
    read_shard,
    shard_path,
    write_index,
)
from volo.data.sources import DataSplits, ImageSource
from volo.distributed import World, gather_from_all, main_only

PLAN = "plan.bin"
"""Which image goes where: lies in a store until it is complete."""

Part = Literal["train", "val", "all"]
OnProgress = Callable[[str, int, int], None]
"""`on_progress(what, done, total)`."""


def silent(what: str, done: int, total: int) -> None:
    """An `OnProgress` that says nothing."""


def open_part(data: DataConfig, part: Part, say: OnProgress = silent) -> tuple[DataSplits, list[ImageSource]]:
    """What lies at `data.path`, and those of its images that get label maps. Raises ValueError as `open_data` does."""
    splits = open_data(data, on_progress=lambda done, total: say("checking images", done, total))
    parts: dict[str, list[ImageSource]] = {
        "train": [splits.train],
        "val": [splits.val],
        "all": [splits.train, splits.val],
    }
    if part not in parts:
        raise ValueError(f"part is one of {', '.join(parts)}; given: {part!r}")
    return splits, parts[part]


@dataclass(frozen=True)
class Batch:
    """Images of one shard that are looked at together."""

    shard: int
    size: int
    """With those that are gone."""
    indices: np.ndarray
    """Of those that are there, in their source: int64."""
    gone: list[BadImage]
    is_last: bool
    """Of its shard."""


@dataclass(frozen=True)
class _Plan:
    header: dict[str, Any]
    """What the index will say."""
    names: list[str]
    sizes: list[int]
    """Images of each source; no shard has images of two."""
    skipped: list[tuple[str, str]]
    """Images that could not be decoded at the start, and why."""
    shard_size: int

    @classmethod
    def of(cls, header: dict[str, Any], sources: Sequence[ImageSource], splits: DataSplits, shard_size: int) -> _Plan:
        names = [name for source in sources for name in source.names]
        skipped = [(bad.name, bad.reason) for bad in splits.skipped]
        plan = cls(header, names, [len(source) for source in sources], skipped, shard_size)
        return dataclasses.replace(plan, header={**header, "shard_size": shard_size, "plan": plan.digest()})

    def digest(self) -> str:
        content = [self.sizes, self.shard_size, *self.names]
        return hashlib.blake2b("\0".join(map(str, content)).encode(errors="surrogateescape"), digest_size=8).hexdigest()

    def first_shard(self, source: int) -> int:
        return sum(-(-size // self.shard_size) for size in self.sizes[:source])

    @property
    def num_shards(self) -> int:
        return self.first_shard(len(self.sizes))

    def write(self, out: Path) -> None:
        encoded = [os.fsencode(name) for name in self.names]
        arrays = {
            "ends": np.cumsum([len(name) for name in encoded], dtype="<u8"),
            "names": np.frombuffer(b"".join(encoded), np.uint8),
        }
        rest = {"index": self.header, "sizes": self.sizes, "skipped": self.skipped, "shard_size": self.shard_size}
        content = pack_container("plan", rest, arrays)
        write_atomically(out / PLAN, lambda file: file.write(content))

    @classmethod
    def read(cls, out: Path) -> _Plan:
        header, arrays = read_container(out / PLAN, "plan")
        ends, content = arrays["ends"].tolist(), arrays["names"].tobytes()
        names = [os.fsdecode(content[start:end]) for start, end in zip([0, *ends], ends)]
        skipped = [(name, reason) for name, reason in header["skipped"]]
        return cls(header["index"], names, header["sizes"], skipped, header["shard_size"])


def clear(out: str | Path) -> None:
    """Remove the label maps in `out`. Raises ValueError where anything else lies there, or another process is at work."""
    with FolderLock(out, "removing label maps"):
        for path in _files_of(Path(out)):
            path.unlink()


def _files_of(out: Path) -> list[Path]:
    """The files of the store in `out`, with what a killed process left half written. Raises ValueError where anything else
    lies there."""
    content = [path for path in out.iterdir() if path.name != FolderLock.NAME]
    ours = [p for p in content if p.name in (INDEX, PLAN) or p.match("maps-*") or p.match(".*.tmp")]
    if strange := [p.name for p in content if p not in ours]:
        raise ValueError(
            f"{out} holds other things ({', '.join(sorted(strange)[:5])}); label maps get a folder of their own"
        )
    return ours


def _prepare_folder(out: Path, plan: _Plan, resume: bool, overwrite: bool, say: OnProgress) -> _Plan | None:
    """Make the folder ready; the plan that all processes follow, None where all is done already."""
    ours = _files_of(out)
    maps_there = [p for p in ours if p.name != PLAN and p.suffix != ".tmp"]
    if maps_there and not (resume or overwrite):
        state = "holds label maps" if (out / INDEX).is_file() else "holds label maps that were begun"
        raise ValueError(f"{out} {state}; --resume goes on with them, --overwrite begins anew, or choose another --out")
    if not resume or not maps_there:
        for path in ours:
            path.unlink()
        plan.write(out)
        return plan
    for path in ours:
        if path.name.endswith(".tmp"):
            path.unlink()
    if (out / PLAN).is_file():
        begun = _Plan.read(out)
        _require_same(out, begun, plan)
        sizes: Sequence[tuple[int, int] | None] = [None] * begun.num_shards
        (out / INDEX).unlink(missing_ok=True)
    else:
        try:
            header, _ = read_container(out / INDEX, "index")
        except (ValueError, FileNotFoundError):
            # Without index and plan nothing says which settings the shards were generated with.
            raise ValueError(
                f"the index in {out} is damaged or missing, and with it how the maps were generated; --overwrite generates them anew"
            ) from None
        begun = dataclasses.replace(plan, header={key: header[key] for key in plan.header})
        _require_same(out, begun, plan)
        sizes = [(shard[1], shard[2]) for shard in header["shards"]]
    damaged = [number for number, exists, _ in damaged_shards(out, sizes, say) if exists or sizes[number] is not None]
    if (out / INDEX).is_file() and not damaged:
        return None
    begun.write(out)
    (out / INDEX).unlink(missing_ok=True)
    for number in damaged:
        shard_path(out, number).unlink(missing_ok=True)
    return begun


def damaged_shards(
    out: Path, known: Sequence[tuple[int, int] | None], say: OnProgress
) -> Iterator[tuple[int, bool, str]]:
    """(number, whether there is a file, what is wrong) of shards that are not as they should be; `known`: size and
    checksum where an index has them."""
    for number, identity in enumerate(known):
        path = shard_path(out, number)
        try:
            read_shard(out, number)
            content = path.stat().st_size, int.from_bytes(map_file(path)[-4:], "little")
            if identity is not None and content != identity:
                yield number, True, f"{path.name} is another file than the index was made for"
        except (ValueError, FileNotFoundError) as error:
            yield number, path.is_file(), str(error)
        say("checking files", number + 1, len(known))


def _require_same(out: Path, begun: _Plan, plan: _Plan) -> None:
    """Raise ValueError where a store was begun with other settings or images. Dates and versions may differ."""

    def settings(header: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in header.items() if key not in ("annotator", "plan")}
        return own | {k: v for k, v in header["annotator"].items() if k not in ("date", "versions")}

    before, now = settings(begun.header), settings(plan.header)
    differing = [
        f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}" for key in now if before.get(key) != now[key]
    ]
    if differing:
        raise ValueError(
            f"{out} was begun with other settings: {'; '.join(differing)}. Repeat the command it was begun with, or start anew with --overwrite"
        )
    new = sorted(set(plan.names) - set(begun.names))
    if new or begun.header["plan"] != begun.digest():
        listed = f": {len(new)} are new ({', '.join(new[:5])}{', ...' if len(new) > 5 else ''})" if new else ""
        raise ValueError(
            f"the images are not those that {out} was begun with{listed}. volo annotate --check names the differences of "
            "a finished store; --overwrite starts anew"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def open_writer(
    out: str | Path,
    header: dict[str, Any],
    sources: Sequence[ImageSource],
    splits: DataSplits,
    *,
    data: DataConfig,
    part: Part,
    world: World,
    shard_size: int,
    resume: bool,
    overwrite: bool,
    say: OnProgress,
) -> Iterator[StoreWriter]:
    """A writer of the store in `out`, whose folder is prepared and locked. All processes of `world` call this.

    Args:
        header: what the index will say of maps and annotator.
        sources: the images: `part` of `data`. `splits`: what else is known of them.

    Raises ValueError for a folder that holds something else, for label maps that are there and neither `resume` nor
    `overwrite` is set, and for a store that was begun with other settings or images.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is at least 1; given: {shard_size}")
    header["annotator"] |= {
        "part": part,
        "val_fraction": data.val_fraction,
        "split_seed": data.split_seed,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {
            "volo": __version__,
            "torch": str(torch.__version__),
            "timm": importlib.metadata.version("timm"),
        },
    }
    out, wanted = Path(out), _Plan.of(header, sources, splits, shard_size)
    with contextlib.ExitStack() as stack:
        lock = FolderLock(out, "generating label maps")
        main_only(world, lambda: stack.enter_context(lock) is None)
        plan = main_only(world, lambda: _prepare_folder(out, wanted, resume, overwrite, say))
        writer = StoreWriter(out, plan, splits, world, data.on_bad_image == "skip", say)
        stack.callback(writer.close)
        yield writer


class StoreWriter:
    """Writes the shards of a store as their batches come, and then its index.

    plan: None where all is done already. skips: images that cannot be used are left out; else there is no store without
    them.
    """

    def __init__(
        self, out: Path, plan: _Plan | None, splits: DataSplits, world: World, skips: bool, say: OnProgress
    ) -> None:
        self.out, self.plan, self.splits, self.world, self.skips, self.say = out, plan, splits, world, skips, say
        self.failed: list[BadImage] = []
        self.written = 0
        """Maps of this process."""
        self._given_up: set[int] = set()
        self._shard: ShardWriter | None = None
        self._number = -1

    def batches(self, number: int, source: ImageSource, batch_size: int) -> list[Batch]:
        """What is left to do for this process of the source with that number, of which some images may be gone by now."""
        plan = self.plan
        if plan is None:
            return []
        first = sum(plan.sizes[:number])
        planned = plan.names[first : first + plan.sizes[number]]
        where = np.arange(len(planned))
        if planned != list(source.names):
            index = {name: i for i, name in enumerate(source.names)}
            where = np.array([index.get(name, -1) for name in planned], np.int64)
        reasons = {bad.name: bad.reason for bad in self.splits.skipped}
        batches = []
        for shard, start in enumerate(range(0, len(planned), plan.shard_size), plan.first_shard(number)):
            path = shard_path(self.out, shard)
            if shard % self.world.size != self.world.rank or path.is_file():
                continue
            stop = min(start + plan.shard_size, len(planned))
            begun = ShardWriter(self.out, shard) if path.with_suffix(".part").is_file() else None
            done = begun.num_batches if begun else 0
            if begun is not None:
                begun.close()
                if start + done * batch_size >= stop:  # killed between its last batch and its end
                    begun.finish()
            for low in range(start + done * batch_size, stop, batch_size):
                high = min(low + batch_size, stop)
                found = where[low:high]
                lost = [planned[low + i] for i in np.flatnonzero(found < 0)]
                gone = [BadImage(name, reasons.get(name, "gone since the annotation began")) for name in lost]
                batches.append(Batch(shard, high - low, found[found >= 0], gone, high == stop))
        return batches

    def accepts(self, batch: Batch, bad: list[BadImage]) -> bool:
        """Whether a batch with those bad images is to be written. The rest of a shard that is given up is still looked at,
        so that all that is bad is named at once."""
        self.failed += bad
        if bad and not self.skips:
            self._given_up.add(batch.shard)
        return batch.shard not in self._given_up

    def append(self, batch: Batch, block: Block) -> None:
        """Batches come in the order of `batches`, so one shard is open at a time."""
        if self._shard is None or self._number != batch.shard:
            self.close()
            self._number, self._shard = batch.shard, ShardWriter(self.out, batch.shard)
        self._shard.append(block)
        self.written += len(block.names)
        if batch.is_last:
            self._shard.finish()
            self._shard = None

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write the index after reading everything back; what there is to report. Nobody returns before the index is there.

        Raises ValueError, in all processes, if any of them has met a bad image that may not be left out.
        """
        plan = self.plan
        bad = [item for each in gather_from_all(self.failed, self.world) for item in each]
        if bad and not self.skips and plan is not None:
            if not self.world.is_main:
                raise ValueError("stopped, for the reason the first process gives")
            listed = "\n".join(f"  {item}" for item in sorted(bad, key=lambda item: item.name))
            raise ValueError(
                f"{len(bad)} of {len(plan.names)} images cannot be used:\n{listed}\n"
                "All others in finished files are kept: repair the images and go on with --resume, or leave them out with "
                "--on-bad-image skip --resume"
            )
        rates = gather_from_all((self.written, seconds), self.world)
        written, longest = sum(count for count, _ in rates), max(each for _, each in rates)
        return main_only(self.world, lambda: self._publish(written, longest))

    def _publish(self, written: int, seconds: float) -> dict[str, Any]:
        out, plan = self.out, self.plan
        if plan is not None:
            self.say("checking files", 0, 1)
            write_index(out, plan.header, plan.num_shards, plan.skipped)
            (out / PLAN).unlink()
        maps = LabelMaps.open(out)
        if plan is not None and (lost := set(plan.names) - set(maps.names) - set(maps.skipped)):
            raise ValueError(f"{len(lost)} images have no map: {', '.join(sorted(lost))}; start anew with --overwrite")
        size = sum(path.stat().st_size for path in _files_of(out))
        return {
            "out": str(out),
            "pictures": len(maps),
            "drawn": written,
            "skipped": maps.skipped,
            "ignored": self.splits.ignored,
            "notes": self.splits.notes,
            "agreement": maps.agreement,
            "top": maps.top,
            "grid": list(maps.grid),
            "num_classes": maps.num_classes,
            "encoding": maps.encoding,
            "annotator": maps.annotator,
            "bytes": size,
            "bytes_per_picture": size / max(1, len(maps)),
            "seconds": seconds,
            "pictures_per_second": written / seconds if written else 0.0,
        }

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard = None
