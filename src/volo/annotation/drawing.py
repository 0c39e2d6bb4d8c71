"""Draw the label maps of a data set with any classifier; check a store of them; take over those of the original tool.

The pictures are cut into shards of `shard_size`, in the order of the data, and shards into batches. Both depend on the
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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from volo import __version__
from volo.annotation.annotator import Annotator, Drawing, draw_label_maps, load_timm_classifier, weights_digest
from volo.annotation.original_maps import OriginalMapError, find_original_map, read_original_map
from volo.config import DataConfig, Size
from volo.data.decode import BadImage, BadImageError
from volo.data.files import FolderLock, write_atomically
from volo.data.imagenet import imagenet_classes
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
from volo.data.loader import ListedLoader
from volo.data.map_codec import ENCODINGS, Encoding
from volo.data.sources import DataSplits, ImageSource
from volo.data.transforms import PixelPipeline, eval_transform, height_width, squash_transform
from volo.distributed import World, main_only
from volo.inference.evaluate import AMP_DTYPES, match_classes
from volo.inference.model_source import load
from volo.models.hub import PRETRAINED

PLAN = "plan.bin"
"""Which picture goes where: lies in a store until it is complete."""

WORK = "generating label maps"
"""What the lock of a store says."""

Part = Literal["train", "val", "all"]
OnProgress = Callable[[str, int, int], None]
"""`on_progress(what, done, total)`."""


@dataclass(frozen=True)
class AnnotateConfig:
    """Which pictures, and what is kept of what the annotator says."""

    data: str | None = ""
    """As `DataConfig.path`; None: the pictures that the annotator was trained on."""
    part: Part = "train"
    val_fraction: float = 0.1
    """As in `DataConfig`, with `split_seed`: which pictures are whose part where the data has no split of its own."""
    split_seed: int = 0
    top: int = 5
    """Guesses kept for each position."""
    encoding: Encoding = "exact"
    flip: bool = False
    """Average with the mirrored picture."""
    amp: str = "off"
    batch_size: int = 64
    shard_size: int = 2048
    """Pictures in a file."""
    num_workers: int = -1
    """Processes that decode; -1 chooses."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be decoded: no store without them, or one that names them."""


@dataclass(frozen=True)
class OpenedAnnotator:
    """A classifier that draws label maps, and how it sees pictures."""

    model: Annotator
    classes: tuple[str, ...] | None
    """None: unknown; they are the data's where there are equally many."""
    wnids: tuple[str, ...]
    """WordNet ids where the classes are ImageNet's."""
    data: DataConfig
    described: dict[str, Any]
    """For the store: model, weights, img_size, crop, ..."""


def open_annotator(
    name: str,
    *,
    weights: str | Path | None = None,
    img_size: Size | None = None,
    crop: float | Literal["squash"] = "squash",
    device: torch.device | str = "cpu",
) -> OpenedAnnotator:
    """An annotator in eval mode.

    Args:
        name: a run folder or checkpoint of `volo train`, a pretrained tag ("volo_d1.224"), or a model of timm.
        weights: for a model of timm, a weight file in place of its published weights.
        img_size: another size than the one it was made for. Each position of the map then stands for as many pixels as
            before: larger pictures give finer maps.
        crop: "squash": the whole picture is scaled to img_size, whatever its shape, so that a position of the map is a
            fraction of the picture; or crop_pct of a centre crop, whose map shows the centre only.

    Raises ValueError, FileNotFoundError for names and files that nothing stands behind.
    """
    check_crop(crop)
    if Path(name).exists() or name in PRETRAINED or f"{name}.224" in PRETRAINED:
        if weights is not None:
            raise ValueError(f"{name} has weights of its own; a weight file beside it is for models of timm")
        ours = load(name, task="classify", img_size=img_size, device=device)
        annotator, classes, wnids = Annotator(ours.model), ours.classes, ours.wnids
        data = dataclasses.replace(
            ours.preprocessing, interpolation="bicubic" if ours.wnids else ours.preprocessing.interpolation
        )
        origin = Path(name).resolve().name if Path(name).exists() else "published"
    else:
        theirs = load_timm_classifier(name, weights, img_size=img_size)
        annotator, wnids = Annotator(theirs.model.to(device)), ()
        named: tuple[str, ...] | None = None
        if annotator.num_classes == 1000:
            wnids, named = imagenet_classes()
        classes = named  # type: ignore[assignment]
        mode: Any = "bilinear" if theirs.interpolation == "bilinear" else "bicubic"
        data = DataConfig(img_size=theirs.img_size, mean=theirs.mean, std=theirs.std, interpolation=mode)
        origin = Path(weights).name if weights else "published"
    if crop != "squash":
        data = dataclasses.replace(data, crop_pct=float(crop))
    described = {
        "model": name if not Path(name).exists() else Path(name).resolve().name,
        "weights": origin,
        "weights_digest": weights_digest(annotator.classifier),
        "img_size": list(height_width(data.img_size)),
        "crop": crop if crop == "squash" else float(crop),
        "interpolation": "bilinear" if data.interpolation == "bilinear" else "bicubic",
        "mean": list(data.mean),
        "std": list(data.std),
    }
    return OpenedAnnotator(annotator.eval(), classes, tuple(wnids), data, described)


def check_crop(crop: float | Literal["squash"]) -> None:
    """Raises ValueError for a crop that `open_annotator` does not take."""
    if crop != "squash" and not 0 < crop <= 4:
        raise ValueError(f"crop is squash, or a share above 0 and at most 4 such as 0.96; given: {crop}")


def annotate(
    annotator: OpenedAnnotator,
    config: AnnotateConfig,
    out: str | Path,
    *,
    world: World,
    resume: bool = False,
    overwrite: bool = False,
    sources: Sequence[ImageSource] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Draw the maps of every picture into `out`; all processes of `world` call this.

    `sources`: these pictures, and not what lies at `config.data`.

    Returns what the first process reports: pictures, skipped and ignored files, agreement with the labels, bytes, speed.
    Raises ValueError for settings that make no sense, for a folder that holds something else, for another annotator or
    other data than those `out` was begun with, and, naming them all at the end, for pictures that cannot be decoded.
    """
    _check_config(annotator, config)
    device = world.device
    say = on_progress or (lambda what, done, total: None)
    if sources is None:
        splits, sources = open_sources(annotator.data, config, say)
    else:
        splits = DataSplits(sources[0], sources[-1], tuple(sources[0].classes))
    classes, label_map = _shared_classes(annotator, splits.classes)
    header = {
        "top": config.top,
        "grid": list(_grid(annotator, device)),
        "num_classes": annotator.model.num_classes,
        "classes": list(classes),
        "encoding": config.encoding,
        "annotator": {
            **annotator.described,
            "flip": config.flip,
            "amp": config.amp,
            "batch_size": config.batch_size,
            "device": device.type,
            **_part(config),
            **_provenance(),
        },
    }
    wanted = _Plan.of(header, sources, splits, config)
    with contextlib.ExitStack() as stack:
        main_only(world, lambda: bool(stack.enter_context(FolderLock(out, WORK))))
        plan = main_only(world, lambda: _prepare_folder(Path(out), wanted, resume, overwrite, say))
        drawn, seconds = 0, 0.0
        failed: list[BadImage] = []
        if plan is not None:
            transform = (
                squash_transform(annotator.data)
                if annotator.described["crop"] == "squash"
                else eval_transform(annotator.data)
            )
            pen = _Pen(annotator, config, device, label_map)
            for part, source in enumerate(sources):
                schedule = plan.schedule(Path(out), part, config.batch_size, world)
                positions = plan.locate(source.names, part)
                loader = ListedLoader(
                    source,
                    transform,
                    [positions[b.start : b.stop][positions[b.start : b.stop] >= 0] for b in schedule],
                    num_workers=config.num_workers,
                    pin_memory=device.type == "cuda",
                )
                start = time.perf_counter()
                bad, count = pen.draw(Path(out), plan, part, schedule, positions, source, loader, splits, say)
                seconds += time.perf_counter() - start
                failed += bad
                drawn += count
            _raise_failed(failed, plan, config, world)
        return _finish(Path(out), plan, splits, world, drawn, seconds, say)


class _Pen:
    """Runs the annotator over batches while another thread encodes and stores those before."""

    MOST_WAITING = 4
    """Batches on their way to the disk; with more the annotator waits."""

    def __init__(
        self, annotator: OpenedAnnotator, config: AnnotateConfig, device: torch.device, label_map: Tensor | None
    ) -> None:
        self.annotator, self.config, self.device, self.label_map = annotator, config, device, label_map
        self.pixels = PixelPipeline(annotator.data).to(device).eval()
        self.shards = _OpenShard()

    def draw(
        self,
        out: Path,
        plan: _Plan,
        part: int,
        schedule: Sequence[_Batch],
        positions: np.ndarray,
        source: ImageSource,
        loader: ListedLoader,
        splits: DataSplits,
        say: OnProgress,
    ) -> tuple[list[BadImage], int]:
        """Pictures that cannot be decoded, and how many maps were drawn."""
        failed: list[BadImage] = []
        given_up: set[int] = set()
        total, seen, drawn = sum(b.stop - b.start for b in schedule), 0, 0
        waiting: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as storing:
            try:
                for request, (batch, bad) in zip(schedule, loader):
                    bad = plan.gone(part, request, positions, splits) + bad
                    seen += request.stop - request.start
                    if bad and self.config.on_bad_image == "error":
                        # The rest of the shard is still looked at, so that all that is bad is named at once.
                        failed += bad
                        given_up.add(request.shard)
                    elif request.shard not in given_up:
                        failed += bad
                        drawing = self._look(batch["image"]) if len(batch["index"]) else None
                        drawn += len(batch["index"])
                        waiting.append(storing.submit(self._store, out, request, source, batch, drawing, bad))
                    if len(waiting) > self.MOST_WAITING:
                        waiting.popleft().result()
                    say("annotating", seen, total)
                while waiting:
                    waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
                storing.submit(self.shards.close).result()
        return failed, drawn

    def _look(self, images: Tensor) -> Drawing:
        amp = self.config.amp
        with torch.inference_mode(), torch.autocast(self.device.type, AMP_DTYPES[amp], enabled=amp != "off"):
            pixels = self.pixels(images.to(self.device, non_blocking=True))
            return draw_label_maps(self.annotator.model, pixels, top=self.config.top, flip=self.config.flip)

    def _store(
        self,
        out: Path,
        request: _Batch,
        source: ImageSource,
        batch: dict[str, Tensor],
        drawing: Drawing | None,
        bad: list[BadImage],
    ) -> None:
        block = Block(skipped=[(item.name, item.reason) for item in bad])
        if drawing is not None:
            scores, classes = drawing.scores.cpu().numpy(), drawing.classes.cpu().numpy()
            for i, (index, fingerprint) in enumerate(zip(batch["index"].tolist(), batch["fingerprint"].tolist())):
                block.add(source.names[index], scores[i], classes[i], self.config.encoding, fingerprint)
            if self.label_map is not None:
                label = self.label_map[batch["target"]]
                right = drawing.mean_logits.argmax(dim=1).cpu() == label
                at_position = torch.from_numpy(classes[:, 0]) == label[:, None, None]
                block.tally = [len(label), int(right.sum()), at_position.numel(), int(at_position.sum())]
        self.shards.append(out, request, block)


class _OpenShard:
    """The shard under way: batches come in their order, so one is open at a time."""

    def __init__(self) -> None:
        self.number = -1
        self.writer: ShardWriter | None = None

    def append(self, out: Path, batch: _Batch, block: Block) -> None:
        if self.writer is None or self.number != batch.shard:
            self.close()
            self.number, self.writer = batch.shard, ShardWriter(out, batch.shard)
        self.writer.append(block)
        if batch.is_last:
            self.writer.finish()
            self.writer = None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None


def import_original(
    folder: str | Path,
    config: AnnotateConfig,
    out: str | Path,
    *,
    crop: float | Literal["squash"] = 1.0,
    img_size: Size | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Pack the original's label maps (a file CLASS/NAME.pt for each picture of `config.data`) into a store.

    crop: what part of a picture a map is of: crop_pct of a centre crop, or "squash" for the whole picture. The original's
        are of the centre square (--img-size 576 --crop-pct 1.0 in its instructions).
    img_size: what the annotator saw; None: 32 pixels for each position.

    Raises ValueError as `annotate` does; missing and unusable files are named, all of them, and with
    `on_bad_image="skip"` left out. Files that belong to no picture are reported as "unused".
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; the original's label maps are CLASS/NAME.pt below one")
    check_crop(crop)
    say = on_progress or (lambda what, done, total: None)
    world = World(0, 1, torch.device("cpu"))
    splits, sources = open_sources(DataConfig(), config, say)
    found = [[find_original_map(folder, name) for name in source.names] for source in sources]
    there = [path for paths in found for path in paths if path is not None]
    if not there:
        raise ValueError(
            f"no label map in {folder} belongs to a picture of {config.data}: {sources[0].names[0]} would have "
            f"{Path(sources[0].names[0]).with_suffix('.pt')}"
        )
    shape = _first_shape(there, len(splits.classes))
    size = height_width(img_size or (32 * shape[1], 32 * shape[2]))
    described: dict[str, Any] = {"model": "imported from the original's files", "weights": folder.resolve().name}
    described |= {"img_size": list(size), "crop": crop if crop == "squash" else float(crop)}
    header = {
        "top": shape[0],
        "grid": list(shape[1:]),
        "num_classes": len(splits.classes),
        "classes": list(splits.classes),
        "encoding": config.encoding,
        "annotator": {**described, "flip": None, **_part(config), **_provenance()},
    }
    with FolderLock(out, WORK):
        plan = _prepare_folder(out, _Plan.of(header, sources, splits, config), resume, overwrite, say)
        drawn, start = 0, time.perf_counter()
        failed: list[BadImage] = []

        def read(path: Path | None, name: str) -> tuple[np.ndarray, np.ndarray] | BadImage:
            if path is None:
                return BadImage(name, f"no label map in {folder}")
            try:
                scores, classes = read_original_map(path, len(splits.classes))
            except OriginalMapError as error:
                return BadImage(name, str(error))
            if scores.shape != shape:
                return BadImage(name, f"{path} holds {scores.shape}, where the first map that can be read has {shape}")
            return scores, classes

        if plan is not None:
            done, shards = 0, _OpenShard()
            with ThreadPoolExecutor(4) as pool, contextlib.closing(shards):
                for part, source in enumerate(sources):
                    positions, given_up = plan.locate(source.names, part), set[int]()
                    for request in plan.schedule(out, part, config.batch_size, world):
                        block, bad = Block(), plan.gone(part, request, positions, splits)
                        kept = [int(i) for i in positions[request.start : request.stop] if i >= 0]
                        names = [source.names[i] for i in kept]
                        for i, name, result in zip(kept, names, pool.map(read, [found[part][i] for i in kept], names)):
                            if isinstance(result, BadImage):
                                bad.append(result)
                                continue
                            try:
                                block.add(name, *result, config.encoding, source.fingerprint(i))
                            except BadImageError as error:
                                bad.append(BadImage(error.name, error.reason))
                                continue
                            except ValueError as error:
                                bad.append(BadImage(name, str(error)))
                                continue
                            label, (scores, best) = int(source.targets[i]), result
                            means = np.bincount(best.ravel(), scores.ravel(), minlength=len(splits.classes))
                            own = [1, int(means.argmax() == label), best[0].size, int((best[0] == label).sum())]
                            block.tally = [a + b for a, b in zip(block.tally, own)]
                        failed += bad
                        block.skipped = [(item.name, item.reason) for item in bad]
                        if bad and config.on_bad_image == "error":
                            given_up.add(request.shard)
                        if request.shard not in given_up:
                            shards.append(out, request, block)
                            drawn += len(block.names)
                        done += request.stop - request.start
                        say("importing", done, len(plan.names))
            _raise_failed(failed, plan, config, world)
        report = _finish(out, plan, splits, world, drawn, time.perf_counter() - start, say)
    used = {path for paths in found for path in paths}
    return report | {"unused": sorted(str(p.relative_to(folder)) for p in folder.rglob("*.pt") if p not in used)}


def _first_shape(paths: Sequence[Path], num_classes: int) -> tuple[int, ...]:
    """Of the first of the original's maps that can be read. Raises ValueError, naming them all, where none can."""
    errors = []
    for path in paths:
        try:
            return read_original_map(path, num_classes)[0].shape
        except OriginalMapError as error:
            errors.append(f"  {error}")
    raise ValueError("\n".join([f"none of the {len(errors)} label maps can be used:", *errors]))


@dataclass(frozen=True)
class Problem:
    """Something wrong with a store, or between it and the pictures."""

    kind: Literal["missing", "extra", "corrupt", "mismatched", "unreadable"]
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: {self.what}"


def check_store(
    path: str | Path, data: str, *, with_pictures: bool = True, on_progress: OnProgress | None = None
) -> list[Problem]:
    """Everything that is wrong with a store and its pictures; every map is read and looked at.

    missing: a picture without a map. extra: a map without a picture. corrupt: bytes that are not as they were written.
    mismatched: a map that is none of this store's kind, or whose picture has changed since (`with_pictures`).
    unreadable: a picture with a map that cannot be decoded any more.
    Raises FileNotFoundError where there is no store, ValueError for data that cannot be opened.
    """
    say = on_progress or (lambda what, done, total: None)
    path = Path(path)
    try:
        maps = LabelMaps.open(path)
    except ValueError as error:
        return [
            Problem("corrupt", INDEX, f"{error}; how the maps were drawn is lost with it: --overwrite draws them anew")
        ]
    problems = [
        Problem("corrupt", shard_path(path, number).name, f"{error}; --resume draws its maps again")
        for number, _, error in _damaged(path, [(s.bytes, s.checksum) for s in maps.shards], say)
    ]
    for i, name in enumerate(maps.names):
        try:
            scores, classes = maps[name]
        except ValueError as error:
            problems.append(Problem("corrupt", name, str(error)))
        else:
            if not torch.isfinite(scores).all() or (scores.diff(dim=0) > 0).any():
                problems.append(Problem("mismatched", name, "its logits do not fall from rank to rank"))
            if classes.min() < 0 or classes.max() >= maps.num_classes:
                problems.append(
                    Problem("mismatched", name, f"it has classes beyond the {maps.num_classes} of the store")
                )
        say("checking maps", i + 1, len(maps))
    drawn = maps.annotator
    config = AnnotateConfig(
        data=data,
        part=drawn["part"],
        val_fraction=drawn["val_fraction"],
        split_seed=drawn["split_seed"],
        on_bad_image="skip",
    )
    # The handwritten digits are enlarged to the size that is asked for.
    size = tuple(drawn["img_size"]) if drawn["img_size"] else DataConfig().img_size
    splits, sources = open_sources(DataConfig(img_size=size), config, say)
    unreadable = {bad.name: bad.reason for bad in splits.skipped}
    left = set(maps.names)
    for source in sources:
        for i, name in enumerate(source.names):
            if name not in left:
                reason = maps.skipped.get(name)
                why = f"it could not be decoded when the maps were drawn: {reason}" if reason else "it has no map"
                problems.append(Problem("missing", name, why))
                continue
            left.discard(name)
            if with_pictures:
                try:
                    if source.fingerprint(i) != maps.fingerprint(name):
                        problems.append(Problem("mismatched", name, "the picture has changed since its map was drawn"))
                except BadImageError as error:
                    problems.append(Problem("unreadable", name, error.reason))
                say("comparing pictures", i + 1, len(source))
    for name in sorted(left):
        if name in unreadable:
            problems.append(Problem("unreadable", name, unreadable[name]))
        else:
            problems.append(Problem("extra", name, f"there is no such picture in {data or 'the data'}"))
    return problems


# What is where: plans, shards, batches


@dataclass(frozen=True)
class _Batch:
    """Pictures start..stop-1 of a part."""

    shard: int
    start: int
    stop: int
    is_last: bool
    """Of its shard."""


@dataclass(frozen=True)
class _Plan:
    header: dict[str, Any]
    """What the index will say."""
    names: list[str]
    sizes: list[int]
    """Pictures of each part of the data; no shard has pictures of two."""
    skipped: list[tuple[str, str]]
    """Pictures that could not be decoded at the start, and why."""
    shard_size: int

    @classmethod
    def of(
        cls, header: dict[str, Any], sources: Sequence[ImageSource], splits: DataSplits, config: AnnotateConfig
    ) -> _Plan:
        names = [name for source in sources for name in source.names]
        skipped = [(bad.name, bad.reason) for bad in splits.skipped]
        plan = cls(header, names, [len(source) for source in sources], skipped, config.shard_size)
        return dataclasses.replace(plan, header={**header, "shard_size": config.shard_size, "plan": plan.digest()})

    def digest(self) -> str:
        content = [self.sizes, self.shard_size, *self.names]
        return hashlib.blake2b("\0".join(map(str, content)).encode(errors="surrogateescape"), digest_size=8).hexdigest()

    @property
    def num_shards(self) -> int:
        return sum(-(-size // self.shard_size) for size in self.sizes)

    def schedule(self, out: Path, part: int, batch_size: int, world: World) -> list[_Batch]:
        """What is left to do for this process."""
        first = sum(-(-size // self.shard_size) for size in self.sizes[:part])
        batches = []
        for number, start in enumerate(range(0, self.sizes[part], self.shard_size), first):
            if number % world.size != world.rank or shard_path(out, number).is_file():
                continue
            stop = min(start + self.shard_size, self.sizes[part])
            begun = ShardWriter(out, number) if shard_path(out, number).with_suffix(".part").is_file() else None
            done = begun.num_batches if begun else 0
            if begun is not None:
                begun.close()
                if start + done * batch_size >= stop:  # killed between its last batch and its end
                    begun.finish()
            for low in range(start + done * batch_size, stop, batch_size):
                high = min(low + batch_size, stop)
                batches.append(_Batch(number, low, high, high == stop))
        return batches

    def locate(self, names: Sequence[str], part: int) -> np.ndarray:
        """Where each picture of a part now is in a source with those names; -1: gone."""
        first = sum(self.sizes[:part])
        planned, now = self.names[first : first + self.sizes[part]], list(names)
        if planned == now:
            return np.arange(len(now))
        index = {name: i for i, name in enumerate(now)}
        return np.array([index.get(name, -1) for name in planned], np.int64)

    def gone(self, part: int, batch: _Batch, positions: np.ndarray, splits: DataSplits) -> list[BadImage]:
        """Pictures of a batch that are no longer among those of the data."""
        first, missing = sum(self.sizes[:part]), np.flatnonzero(positions[batch.start : batch.stop] < 0) + batch.start
        if not len(missing):
            return []
        reasons = {bad.name: bad.reason for bad in splits.skipped}
        names = [self.names[first + i] for i in missing.tolist()]
        return [BadImage(name, reasons.get(name, "gone since the annotation began")) for name in names]

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


def _prepare_folder(out: Path, plan: _Plan, resume: bool, overwrite: bool, say: OnProgress) -> _Plan | None:
    """Make the folder ready; the plan that all processes follow, None where all is done already."""
    out.mkdir(parents=True, exist_ok=True)
    content = [path for path in out.iterdir() if path.name != FolderLock.NAME]
    # With what a killed process left half written.
    ours = [p for p in content if p.name in (INDEX, PLAN) or p.match("maps-*") or p.match(".*.tmp")]
    if strange := [p.name for p in content if p not in ours]:
        raise ValueError(
            f"{out} holds other things ({', '.join(sorted(strange)[:5])}); label maps get a folder of their own"
        )
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
            # Without index and plan nothing says which settings the shards were drawn with.
            raise ValueError(
                f"the index in {out} is damaged or missing, and with it how the maps were drawn; --overwrite draws them anew"
            ) from None
        begun = dataclasses.replace(plan, header={key: header[key] for key in plan.header})
        _require_same(out, begun, plan)
        sizes = [(shard[1], shard[2]) for shard in header["shards"]]
    damaged = [number for number, exists, _ in _damaged(out, sizes, say) if exists or sizes[number] is not None]
    if (out / INDEX).is_file() and not damaged:
        return None
    begun.write(out)
    (out / INDEX).unlink(missing_ok=True)
    for number in damaged:
        shard_path(out, number).unlink(missing_ok=True)
    return begun


def _damaged(out: Path, known: Sequence[tuple[int, int] | None], say: OnProgress) -> Iterator[tuple[int, bool, str]]:
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
    """Raise ValueError where a store was begun with other settings or pictures. Dates and versions may differ."""

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
            f"the pictures are not those that {out} was begun with{listed}. volo annotate --check names the differences of "
            "a finished store; --overwrite starts anew"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Parts of both ways to make a store


def _check_config(annotator: OpenedAnnotator, config: AnnotateConfig) -> None:
    K = annotator.model.num_classes
    if not 1 <= config.top <= K:
        raise ValueError(f"--top is {config.top}; the annotator has {K} classes, so it is from 1 to {K}")
    if config.batch_size < 1 or config.shard_size < 1:
        raise ValueError(f"batch and shard size are at least 1; given: {config.batch_size}, {config.shard_size}")
    if config.encoding not in ENCODINGS or config.amp not in AMP_DTYPES:
        raise ValueError(
            f"encoding is one of {', '.join(ENCODINGS)} and amp one of {', '.join(AMP_DTYPES)}; given: {config.encoding}, {config.amp}"
        )


def open_sources(
    data: DataConfig, config: AnnotateConfig, on_progress: OnProgress | None = None
) -> tuple[DataSplits, list[ImageSource]]:
    """What lies at `config.data`, and the parts of it that are to be drawn. Raises ValueError as `open_data` does."""
    say = on_progress or (lambda what, done, total: None)
    given = dataclasses.replace(
        data, val_fraction=config.val_fraction, split_seed=config.split_seed, on_bad_image=config.on_bad_image
    )
    if config.data is not None:
        given = dataclasses.replace(given, path=config.data, kind="auto")
    splits = open_data(given, on_progress=lambda done, total: say("checking pictures", done, total))
    parts = {"train": [splits.train], "val": [splits.val], "all": [splits.train, splits.val]}
    if config.part not in parts:
        raise ValueError(f"part is one of {', '.join(parts)}; given: {config.part!r}")
    return splits, parts[config.part]


def _shared_classes(annotator: OpenedAnnotator, data: Sequence[str]) -> tuple[tuple[str, ...], Tensor | None]:
    """Names of the annotator's classes, in the words of the data if possible, and its class for each class of the data
    (None: it knows others)."""
    classes = annotator.classes
    if annotator.wnids and set(data) <= set(annotator.wnids):
        classes = annotator.wnids
    elif classes is None and annotator.model.num_classes == len(data):
        classes = tuple(data)
    elif classes is None:
        return tuple(map(str, range(annotator.model.num_classes))), None
    try:
        return classes, torch.tensor(match_classes(data, classes))
    except ValueError:
        return classes, None


def _grid(annotator: OpenedAnnotator, device: torch.device) -> tuple[int, int]:
    size = height_width(annotator.data.img_size)
    with torch.inference_mode():
        return tuple(annotator.model.features(torch.zeros(1, 3, *size, device=device))[0].shape[1:3])  # type: ignore[return-value]


def _part(config: AnnotateConfig) -> dict[str, Any]:
    return {"part": config.part, "val_fraction": config.val_fraction, "split_seed": config.split_seed}


def _provenance() -> dict[str, Any]:
    versions = {"volo": __version__, "torch": str(torch.__version__), "timm": importlib.metadata.version("timm")}
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "versions": versions}


def _raise_failed(failed: list[BadImage], plan: _Plan, config: AnnotateConfig, world: World) -> None:
    """With on_bad_image "error" all processes stop here if any of them has met a bad picture."""
    if config.on_bad_image != "error":
        return
    everywhere: list[list[BadImage]] = [failed]
    if world.size > 1:
        everywhere = [[] for _ in range(world.size)]
        dist.all_gather_object(everywhere, failed)
    bad = [item for part in everywhere for item in part]
    if bad and not world.is_main:
        raise ValueError("stopped, for the reason the first process gives")
    if bad:
        listed = "\n".join(f"  {item}" for item in sorted(bad, key=lambda item: item.name))
        raise ValueError(
            f"{len(bad)} of {len(plan.names)} pictures cannot be used:\n{listed}\n"
            "All others in finished files are kept: repair the pictures and go on with --resume, or leave them out with "
            "--on-bad-image skip --resume"
        )


def _finish(
    out: Path, plan: _Plan | None, splits: DataSplits, world: World, drawn: int, seconds: float, say: OnProgress
) -> dict[str, Any]:
    """Write the index after reading everything back; what there is to report. Nobody returns before the index is there."""
    rate = torch.tensor([float(drawn), seconds])
    if world.size > 1:
        totals = [torch.zeros(2) for _ in range(world.size)]
        dist.all_gather(totals, rate)
        rate = torch.stack([torch.stack(totals)[:, 0].sum(), torch.stack(totals)[:, 1].max()])
    drawn, seconds = int(rate[0]), float(rate[1])
    return main_only(world, lambda: _publish(out, plan, splits, drawn, seconds, say))


def _publish(
    out: Path, plan: _Plan | None, splits: DataSplits, drawn: int, seconds: float, say: OnProgress
) -> dict[str, Any]:
    if plan is not None:
        say("checking files", 0, 1)
        write_index(out, plan.header, plan.num_shards, plan.skipped)
        (out / PLAN).unlink()
    maps = LabelMaps.open(out)
    if plan is not None:
        lost = set(plan.names) - set(maps.names) - set(maps.skipped)
        if lost:
            raise ValueError(
                f"{len(lost)} pictures have no map: {', '.join(sorted(lost))}; start anew with --overwrite"
            )
    size = sum(p.stat().st_size for p in out.iterdir() if p.name != FolderLock.NAME)
    return {
        "out": str(out),
        "pictures": len(maps),
        "drawn": drawn,
        "skipped": maps.skipped,
        "ignored": splits.ignored,
        "notes": splits.notes,
        "agreement": maps.agreement,
        "top": maps.top,
        "grid": list(maps.grid),
        "num_classes": maps.num_classes,
        "encoding": maps.encoding,
        "annotator": maps.annotator,
        "bytes": size,
        "bytes_per_picture": size / max(1, len(maps)),
        "seconds": seconds,
        "pictures_per_second": drawn / seconds if drawn else 0.0,
    }
