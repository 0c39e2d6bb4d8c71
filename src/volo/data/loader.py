"""Batches: the same pictures, in the same order, cropped in the same way, whatever the number of processes and workers.

The order of an epoch follows from (seed, epoch), the augmentation of a picture from (seed, epoch, index); see
`volo.data.keyed`. A resumed run therefore starts at any step without replaying the steps before it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from volo.config import AugmentConfig, DataConfig, Size
from volo.data import keyed
from volo.data.decode import BadImage, BadImageError
from volo.data.sources import ArraySource, ImageSource, available_cores
from volo.data.token_labels import MIRRORED, LabelMapReader, PictureFrame, compose, stack_frames
from volo.data.transforms import check_augment, eval_transform, fit_transform, height_width, train_transform

Batch = dict[str, Tensor]
"""image uint8 [b, 3, H, W], target int64 [b], index int64 [b] (the picture's number in its source); with label maps
also frame, map_scores, map_classes and map_box (see `resample_label_maps`)."""

Pictures = Callable[[int, np.ndarray], Batch]
"""(epoch, indices int64 [b]) -> the part of a batch that is made from the pictures: image; if asked for also frame, and
size, int64 [b, 2], the height and width of the originals."""


class TrainLoader:
    """Endless shuffled, augmented batches of a source, addressed by step.

    The global batch of step t is `batch_size` pictures of epoch t // steps_per_epoch; pictures that do not fill a last
    batch wait for another epoch's order. It is cut into accumulation x world_size micro batches; micro batch m of rank
    r is the slice number m * world_size + r.
    """

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        pin_memory: bool = False,
        label_maps: LabelMapReader | None = None,
        crop_order: str = "corrected",
        small_size: Size = 0,
        small_epochs: int = 0,
    ) -> None:
        """`num_workers` None: `data.num_workers`. With `label_maps` batches carry those of their pictures, and frames in
        `crop_order` (see `PictureFrame`). Pictures of the first `small_epochs` are shrunk to `small_size`. Raises
        ValueError where batches cannot be formed."""
        self.micro_batch_size = micro_batch_size(len(source), batch_size, accumulation, world_size)
        check_augment(data, augment)
        self.source, self.batch_size, self.accumulation, self.seed = source, batch_size, accumulation, seed
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self.steps_per_epoch = len(source) // batch_size
        plain = augment.crop in ("pad", "none") and not augment.rand_augment and not augment.color_jitter
        self.is_vectorised = plain and isinstance(source, ArraySource)
        frames = crop_order if label_maps is not None else ""
        self.pictures: Pictures
        if self.is_vectorised:
            self.pictures = ShiftAndFlip(source.images, data, augment, seed, frames)  # type: ignore[attr-defined]
        else:
            size = height_width(data.img_size)
            transform = train_transform(data, augment, crop_last=frames == "original")
            self.pictures = OneByOne(source, size, transform, seed, frames)
        if label_maps is not None:
            self.pictures = WithLabelMaps(self.pictures, source.names, label_maps)
        if small_size or small_epochs:
            self.pictures = SmallAtFirst(self.pictures, data, small_size, small_epochs)
        workers = data.num_workers if num_workers is None else num_workers
        self.num_workers = workers if workers >= 0 else 0 if self.is_vectorised else default_workers()

    def batches(self, start_step: int, stop_step: int, most: int | None = None) -> Iterator[Batch]:
        """Micro batches of steps start_step..stop_step-1, `accumulation` for each step, and of each the first `most`
        pictures alone. Raises BadImageError."""
        requests = self._requests(start_step, stop_step, most)
        return _run(self.source, self.pictures, requests, self.num_workers, self.pin_memory)

    def _requests(self, start_step: int, stop_step: int, most: int | None) -> Iterator[tuple[int, np.ndarray]]:
        return training_requests(
            range(start_step, stop_step),
            len(self.source),
            self.batch_size,
            accumulation=self.accumulation,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            most=most,
        )


def micro_batch_size(count: int, batch_size: int, accumulation: int, world_size: int) -> int:
    """Pictures in one process's micro batch. Raises ValueError where `count` pictures do not make such batches."""
    slices = accumulation * world_size
    if batch_size < 1 or batch_size % slices:
        raise ValueError(
            f"train.batch_size is {batch_size}, which does not divide by {accumulation} accumulated micro batches "
            f"x {world_size} processes; the next one that does is {max(1, -(-batch_size // slices)) * slices}"
        )
    if count < batch_size:
        largest = count // slices * slices
        raise ValueError(
            f"train.batch_size is {batch_size}, but there are only {count} training pictures; "
            + (f"it can be {largest} at most" if largest else f"{slices} are needed at the least")
        )
    return batch_size // slices


def training_requests(
    steps: range,
    count: int,
    batch_size: int,
    *,
    accumulation: int,
    seed: int,
    rank: int,
    world_size: int,
    most: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, indices of the pictures, the first `most` of them) of every micro batch that a process takes in `steps`;
    see `TrainLoader`."""
    size, steps_per_epoch = batch_size // (accumulation * world_size), count // batch_size
    order, order_epoch = np.empty(0, np.int64), -1
    for step in steps:
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            order, order_epoch = keyed.permutation(count, keyed.ORDER, seed, epoch), epoch
        for micro in range(accumulation):
            start = position * batch_size + (micro * world_size + rank) * size
            yield epoch, order[start : start + size][:most]


class EvalLoader:
    """Every picture once, in the order of the source, as `eval_transform` shows it; the last batch may be short.

    With several processes each takes a contiguous share, in equally many batches (unless of one picture).
    """

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        *,
        batch_size: int,
        num_workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the evaluation batch size is {batch_size}; it is at least 1")
        self.source, self.batch_size, self.rank, self.world_size, self.pin_memory = (
            source,
            batch_size,
            rank,
            world_size,
            pin_memory,
        )
        transform = eval_transform(data)
        self.pictures: Pictures
        if isinstance(source, ArraySource):
            self.pictures = Whole(source.images, transform)
        else:
            self.pictures = OneByOne(source, height_width(data.img_size), transform, seed=None)
        workers = data.num_workers if num_workers is None else num_workers
        self.num_workers = workers if workers >= 0 else 0 if isinstance(source, ArraySource) else default_workers()

    def __len__(self) -> int:
        """Batches of this process."""
        return sum(1 for _ in self._requests())

    def __iter__(self) -> Iterator[Batch]:
        return _run(self.source, self.pictures, self._requests(), min(self.num_workers, len(self)), self.pin_memory)

    def _requests(self) -> Iterator[tuple[int, np.ndarray]]:
        start, stop = (len(self.source) * r // self.world_size for r in (self.rank, self.rank + 1))
        largest_share = -(-len(self.source) // self.world_size)
        count = -(-largest_share // self.batch_size)
        # Shares differ by one picture at most. One that would fill a batch less takes a picture from the batch before.
        bounds = [max(0, min(i * self.batch_size, stop - start - (count - i))) for i in range(count + 1)]
        for low, high in zip(bounds, bounds[1:]):
            if high > low:
                yield 0, np.arange(start + low, start + high)


class ListedLoader:
    """Pictures in given batches, for drawing label maps: those that cannot be decoded are left out and handed over.

    Yields (batch, bad) for each of `requests` (int64 arrays of numbers in the source): a `Batch` without the bad
    pictures, which may be empty, with their `fingerprint` (int64 [b]); and the bad ones.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Tensor], Tensor],
        requests: Iterable[np.ndarray],
        *,
        num_workers: int = -1,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.requests, self.pin_memory = _Listed(source, transform), requests, pin_memory
        self.num_workers = (
            num_workers if num_workers >= 0 else 0 if isinstance(source, ArraySource) else default_workers()
        )

    def __iter__(self) -> Iterator[tuple[Batch, list[BadImage]]]:
        return _answers(self.dataset, self.requests, self.num_workers, self.pin_memory)


class OneByOne:
    """Pictures loaded and transformed one by one, each with its own seed (None: the transform draws nothing).

    `frames`: the crop order of the frames that move along; empty for none.
    """

    def __init__(
        self,
        source: ImageSource,
        size: tuple[int, int],
        transform: Callable[..., Any],
        seed: int | None,
        frames: str = "",
    ) -> None:
        self.source, self.size, self.transform, self.seed, self.frames = source, size, transform, seed, frames

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        images = torch.empty(len(indices), 3, *self.size, dtype=torch.uint8)
        frames: list[PictureFrame] = []
        sizes: list[tuple[int, int]] = []
        seeds = keyed.key(keyed.SAMPLE, self.seed, epoch, indices).tolist() if self.seed is not None else []
        with keyed.own_random_state():
            for i, index in enumerate(indices.tolist()):
                if seeds:
                    keyed.seed_random_state(seeds[i])
                try:
                    image = self.source.load(index)
                    if self.frames:
                        sizes.append((image.shape[1], image.shape[2]))
                        images[i], frame = self.transform(image, PictureFrame.whole(*sizes[-1], self.frames))
                        frames.append(frame)
                    else:
                        images[i] = self.transform(image)
                except BadImageError:
                    raise
                except Exception as error:
                    error.add_note(f"while preparing picture {self.source.names[index]}")
                    raise
        if not self.frames:
            return {"image": images}
        return {"image": images, "frame": stack_frames(frames), "size": torch.tensor(sizes)}


class Whole:
    """Pictures of one size, transformed as a batch."""

    def __init__(self, images: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        return {"image": self.transform(self.images[torch.from_numpy(indices)]).contiguous()}


class ShiftAndFlip:
    """Pictures of one size, shifted by up to `augment.pad` pixels with a reflected border and flipped, as a batch.

    Does what `train_transform` does for "pad" and "none" crops, some hundred times faster for small pictures.
    """

    def __init__(self, images: Tensor, data: DataConfig, augment: AugmentConfig, seed: int, frames: str = "") -> None:
        self.images, self.seed, self.hflip, self.frames = images, seed, augment.hflip, frames
        self.pad = augment.pad if augment.crop == "pad" else 0
        self.fit = fit_transform(data)

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        images = self.fit(self.images[torch.from_numpy(indices)]).numpy()
        flipped = np.flatnonzero(keyed.uniform(keyed.key(keyed.CROP, self.seed, epoch, indices, 0)) < self.hflip)
        if self.frames == "original":
            images[flipped] = images[flipped, :, :, ::-1]
        down = right = np.full(len(indices), self.pad)
        if self.pad:
            down, right = (
                keyed.below(keyed.key(keyed.CROP, self.seed, epoch, indices, i), 2 * self.pad + 1) for i in (1, 2)
            )
            images = shift(images, self.pad, down, right)
        if self.frames != "original":
            images[flipped] = images[flipped, :, :, ::-1]
        batch = {"image": torch.from_numpy(images)}
        if self.frames:
            batch["frame"] = self._frames(down - self.pad, right - self.pad, flipped)
            batch["size"] = torch.tensor(self.images.shape[2:]).expand(len(indices), 2)
        return batch

    def _frames(self, down: np.ndarray, right: np.ndarray, flipped: np.ndarray) -> Tensor:
        """The frames of pictures that were shifted by so many pixels (int [B]), some of them flipped."""
        fitted = self.fit(PictureFrame.whole(self.images.shape[2], self.images.shape[3], self.frames))  # type: ignore[arg-type]
        H, W = fitted.canvas_size  # type: ignore[attr-defined]
        x, y = right / W, down / H
        if self.frames == "original":  # rows and columns exchanged; flipped before the shift
            x, y = y, x
        steps = torch.eye(3, dtype=torch.float64)[:2].repeat(len(down), 1, 1)
        steps[:, 0, 2], steps[:, 1, 2] = torch.from_numpy(x), torch.from_numpy(y)
        flip_first = self.frames == "original"
        steps[flipped] = compose(MIRRORED, steps[flipped]) if flip_first else compose(steps[flipped], MIRRORED)
        return compose(fitted.as_subclass(Tensor)[None], steps[:, None]).float()


class SmallAtFirst:
    """`pictures`, in the first epochs shrunk to `size`: progressive resizing (Tan and Le, arXiv 2104.00298, without the
    augmentation that grows along). Frames and label maps stay right, for they are shares of the picture's sides."""

    def __init__(self, pictures: Pictures, data: DataConfig, size: Size, epochs: int) -> None:
        self.pictures, self.size, self.epochs = pictures, list(height_width(size)), epochs
        full = height_width(data.img_size)
        if epochs < 1 or not all(1 <= small <= side for small, side in zip(self.size, full)):
            raise ValueError(
                f"schedule.small_size is from 1 to data.img_size ({data.img_size}) and schedule.small_epochs at least 1, or both "
                f"are 0; given: small_size={size}, small_epochs={epochs}"
            )

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        batch = self.pictures(epoch, indices)
        if epoch < self.epochs:
            batch["image"] = F.resize(batch["image"], self.size, antialias=True).contiguous()
        return batch


class WithLabelMaps:
    """`pictures` (with frames) and the label maps that belong to them."""

    def __init__(self, pictures: Pictures, names: Sequence[str], maps: LabelMapReader) -> None:
        self.pictures, self.names, self.maps = pictures, names, maps

    def __call__(self, epoch: int, indices: np.ndarray) -> Batch:
        batch = self.pictures(epoch, indices)
        boxes = [self.maps.box(height, width) for height, width in batch.pop("size").tolist()]
        scores, classes = self.maps.read_batch([self.names[i] for i in indices.tolist()])
        return {**batch, "map_scores": scores, "map_classes": classes, "map_box": torch.tensor(boxes)}


def shift(images: np.ndarray, pad: int, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Crop [B, C, H, W] at row `down`, column `right` (int [B], 0..2 pad) of pictures with `pad` mirrored pixels."""
    B, C, H, W = images.shape
    padded = np.empty((B, C, H + 2 * pad, W + 2 * pad), images.dtype)
    padded[:, :, pad:-pad, pad:-pad] = images
    padded[:, :, pad:-pad, :pad] = images[:, :, :, pad:0:-1]
    padded[:, :, pad:-pad, -pad:] = images[:, :, :, -2 : -2 - pad : -1]
    padded[:, :, :pad] = padded[:, :, 2 * pad : pad : -1]
    padded[:, :, -pad:] = padded[:, :, -2 - pad : -2 - 2 * pad : -1]
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (H, W), axis=(2, 3)
    )  # [B, C, 2 pad + 1, 2 pad + 1, H, W]
    return windows[np.arange(B), :, down, right]


def default_workers() -> int:
    """For data.num_workers = -1: this process's share of the cores where a GPU trains, else half of it."""
    cores = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, cores if torch.cuda.is_available() else cores // 2))


@dataclass(frozen=True)
class _Dataset:
    """For DataLoader: a request (epoch, indices) is one batch."""

    targets: Tensor
    pictures: Pictures

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch | BadImageError:
        epoch, indices = request
        index = torch.from_numpy(indices)
        try:
            return {**self.pictures(epoch, indices), "target": self.targets[index], "index": index.clone()}
        except BadImageError as error:
            # Handed over as a value: raised in a worker it would arrive as a long traceback.
            return error


@dataclass(frozen=True)
class _Listed:
    """For DataLoader: a request is the numbers of a batch."""

    source: ImageSource
    transform: Callable[[Tensor], Tensor]

    def __getitem__(self, indices: np.ndarray) -> tuple[Batch, list[BadImage]]:
        images: list[Tensor] = []
        kept: list[int] = []
        fingerprints: list[int] = []
        bad: list[BadImage] = []
        for index in indices.tolist():
            try:
                fingerprint = self.source.fingerprint(index)
                if not isinstance(self.source, ArraySource):
                    images.append(self.transform(self.source.load(index)))
            except BadImageError as error:
                bad.append(BadImage(error.name, error.reason))
                continue
            kept.append(index)
            fingerprints.append(fingerprint)
        index = torch.tensor(kept, dtype=torch.int64)
        if not kept:
            image = torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        elif isinstance(self.source, ArraySource):
            image = self.transform(self.source.images[index]).contiguous()
        else:
            image = torch.stack(images)
        batch = {"image": image, "target": self.source.targets[index], "index": index}
        return batch | {"fingerprint": torch.tensor(fingerprints, dtype=torch.int64)}, bad


def _run(
    source: ImageSource,
    pictures: Pictures,
    requests: Iterable[tuple[int, np.ndarray]],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    return run_requests(_Dataset(source.targets, pictures), requests, num_workers, pin_memory)


def run_requests(
    dataset: Any, requests: Iterable[tuple[int, np.ndarray]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The batch of each request, in order: `dataset[request]`. Raises BadImageError where that is one."""
    with closing(_answers(dataset, requests, num_workers, pin_memory)) as batches:
        for batch in batches:
            if isinstance(batch, BadImageError):
                reason = f"{batch.reason}. At the start it was readable"
                raise BadImageError(batch.name, reason)
            yield batch


def _answers(dataset: Any, requests: Iterable[Any], num_workers: int, pin_memory: bool) -> Generator[Any, None, None]:
    """`dataset[request]` for every request, in order, from `num_workers` processes (0: this one)."""
    options: dict[str, Any] = {}
    if num_workers:
        # Forked workers share the pictures in memory; elsewhere torch moves tensors into shared memory.
        context = "fork" if sys.platform == "linux" else None
        options = {"worker_init_fn": _WorkerStart(os.getpid()), "multiprocessing_context": context}
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        # Without one, DataLoader draws from the global generator, which belongs to the training step.
        generator=torch.Generator(),
        **options,
    )
    with _signals_held_back():
        answers = iter(loader)
    try:
        yield from answers
    finally:
        # Without this the workers live on as long as the traceback of an error that one of them had.
        if num_workers and hasattr(answers, "_shutdown_workers"):
            answers._shutdown_workers()


def _as_it_is(batch: Any) -> Any:
    return batch


# SIGTERM can be told apart by its sender where this call exists (not on macOS).
_HELD_BACK = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else {signal.SIGINT}


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started inside begin with Ctrl-C and SIGTERM blocked; to this process they come when the block ends.

    Both mean "save and stop", often to the whole process group. That is for the training process to do, which ends its
    workers afterwards: one that died before would make it fail in the middle of the last step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _WorkerStart:
    """A worker uses one thread, ends when the training process says so, and with it even when that is killed."""

    parent: int

    def __call__(self, worker: int) -> None:
        torch.set_num_threads(1)
        if signal.SIGTERM in _HELD_BACK:
            threading.Thread(target=self._end_when_told, daemon=True).start()
        if sys.platform == "linux":
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.parent:
                os._exit(1)

    def _end_when_told(self) -> None:
        # An exiting Python terminates its child processes and waits for them.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != self.parent:
            pass
        os._exit(0)
