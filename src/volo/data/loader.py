"""Batches: the same images, in the same order, cropped in the same way, whatever the number of processes and workers.

The order of an epoch follows from (seed, epoch), the augmentation of an image from (seed, epoch, index); see
`volo.data.keyed`. A resumed run therefore starts at any step without replaying the steps before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from volo.config import AugmentConfig, DataConfig, SegmentConfig, Size
from volo.data import keyed, mask_transforms
from volo.data.decode import BadImage, BadImageError
from volo.data.mask_transforms import scale_to, scaled_size
from volo.data.masks import MaskedPictures
from volo.data.on_device import CropOnDevice, DeviceSource, MapsOnDevice
from volo.data.samples import Batch, OneByOne, Samples, ShiftAndFlip, SmallAtFirst, Whole, WithLabelMaps, WithTargets
from volo.data.sources import ArraySource, ImageSource, available_cores, local_processes
from volo.data.token_labels import LabelMapReader, PictureFrame
from volo.data.transforms import check_augment, eval_transform, train_transform
from volo.data.workers import run

Request = tuple[int, np.ndarray]
"""An epoch, and the numbers of the images of a batch."""


@dataclass(frozen=True)
class BatchPlan:
    """Which images are in which batch of which process.

    The global batch of training step t is `batch_size` images of epoch t // steps_per_epoch; images that do not fill a last
    batch wait for another epoch's order. It is cut into accumulation x world_size micro batches; micro batch m of rank
    r is the slice number m * world_size + r. For an evaluation each rank takes a contiguous share of the images, and
    `batch_size` is that of a process.
    """

    count: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def micro_batch_size(self) -> int:
        """Images in one process's micro batch. Raises ValueError where the images do not make such batches."""
        slices = self.accumulation * self.world_size
        if self.batch_size < 1 or self.batch_size % slices:
            raise ValueError(
                f"train.batch_size is {self.batch_size}, which does not divide by {self.accumulation} accumulated micro batches "
                f"x {self.world_size} processes; the next one that does is {max(1, -(-self.batch_size // slices)) * slices}"
            )
        if self.count < self.batch_size:
            largest = self.count // slices * slices
            raise ValueError(
                f"train.batch_size is {self.batch_size}, but there are only {self.count} training images; "
                + (f"it can be {largest} at most" if largest else f"{slices} are needed at the least")
            )
        return self.batch_size // slices

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    def training(self, steps: range, most: int | None = None) -> Iterator[Request]:
        """Every micro batch of this process in `steps`, the first `most` images of each."""
        size = self.micro_batch_size
        order, order_epoch = np.empty(0, np.int64), -1
        for step in steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = keyed.permutation(self.count, keyed.ORDER, self.seed, epoch), epoch
            for micro in range(self.accumulation):
                start = position * self.batch_size + (micro * self.world_size + self.rank) * size
                yield epoch, order[start : start + size][:most]

    def evaluation(self, sizes: np.ndarray | None = None) -> list[Request]:
        """Every image of this process's share once, in order; as many batches as in other processes (unless of one image).

        sizes: [count, 2]; only neighbours of one size then share a batch, and processes differ in their number.
        """
        if self.batch_size < 1:
            raise ValueError(f"the evaluation batch size is {self.batch_size}; it is at least 1")
        start, stop = (self.count * r // self.world_size for r in (self.rank, self.rank + 1))
        if sizes is not None:
            bounds = [start] if start < stop else []
            for i in range(start + 1, stop):
                if i - bounds[-1] == self.batch_size or (sizes[i] != sizes[i - 1]).any():
                    bounds.append(i)
            bounds.append(stop)
        else:
            largest_share = -(-self.count // self.world_size)
            count = -(-largest_share // self.batch_size)
            # Shares differ by one image at most. One that would fill a batch less takes an image from the batch before.
            bounds = [start + max(0, min(i * self.batch_size, stop - start - (count - i))) for i in range(count + 1)]
        return [(0, np.arange(low, high)) for low, high in zip(bounds, bounds[1:]) if high > low]


class _Loader:
    """Batches of `samples` as a plan says, made by workers."""

    def __init__(
        self,
        samples: Samples,
        plan: BatchPlan,
        data: DataConfig,
        num_workers: int | None,
        pin_memory: bool,
        none: bool = False,
    ) -> None:
        """`num_workers` None: `data.num_workers`, of which -1 becomes 0 where the batches cost nothing (`none`)."""
        workers = data.num_workers if num_workers is None else num_workers
        self.num_workers = workers if workers >= 0 else 0 if none else default_workers()
        self.samples, self.plan, self.pin_memory, self.timeout = samples, plan, pin_memory, data.timeout
        self.left_out: dict[str, str] = {}
        """Images that could not be read, and why."""

    def _run(self, requests: Iterable[Request], num_workers: int) -> Iterator[Batch]:
        options = {"num_workers": num_workers, "pin_memory": self.pin_memory, "timeout": self.timeout}
        with closing(run(_Answers(self.samples), requests, **options)) as batches:  # type: ignore[arg-type]
            for batch in batches:
                if isinstance(batch, BadImageError):
                    raise BadImageError(batch.name, f"{batch.reason}. At the start it was readable")
                for bad in batch.pop("bad", ()):
                    if bad.name not in self.left_out:
                        self.left_out[bad.name] = bad.reason
                        warnings.warn(f"left out: {bad}", stacklevel=2)
                yield batch


@dataclass(frozen=True)
class _Answers:
    samples: Samples

    def __call__(self, request: Request) -> Batch | BadImageError:
        try:
            return self.samples(*request)
        except BadImageError as error:
            return error


class _TrainLoader(_Loader):
    @property
    def micro_batch_size(self) -> int:
        return self.plan.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def batches(self, start_step: int, stop_step: int, most: int | None = None) -> Iterator[Batch]:
        """Micro batches of steps start_step..stop_step-1, `accumulation` for each step, and of each the first `most`
        images alone. Raises BadImageError, and OSError where workers end or wait too long."""
        return self._run(self.plan.training(range(start_step, stop_step), most), self.num_workers)


class _EvalLoader(_Loader):
    requests: list[Request]

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self.requests, min(self.num_workers, len(self)))


class TrainLoader(_TrainLoader):
    """Endless shuffled, augmented batches of a source, addressed by step: image uint8 [b, 3, H, W], target int64 [b], index
    int64 [b]; with label maps also frame, map_scores, map_classes and map_box (see `resample_label_maps`). Of a
    `DeviceSource` images and label maps are on its device; everything else is on the host."""

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        num_workers: int | None = None,
        pin_memory: bool = False,
        label_maps: LabelMapReader | None = None,
        crop_order: str = "corrected",
        small_size: Size = 0,
        small_epochs: int = 0,
        **plan: int,
    ) -> None:
        """`plan`: the other fields of `BatchPlan`. With `label_maps` batches carry those of their images, and frames in
        `crop_order` (see `PictureFrame`). Images of the first `small_epochs` are shrunk to `small_size`. Raises ValueError
        where batches cannot be formed."""
        self.source = source
        batch_plan = BatchPlan(len(source), **plan)
        batch_plan.micro_batch_size  # noqa: B018  # raises
        check_augment(data, augment)
        plain = augment.crop in ("pad", "none") and not augment.rand_augment and not augment.color_jitter
        is_on_device = isinstance(source, DeviceSource)
        self.is_vectorised = is_on_device or (plain and isinstance(source, ArraySource))
        frames = crop_order if label_maps is not None else ""
        samples: Samples
        if is_on_device:
            if frames == "original":
                raise ValueError(
                    "images on the device are cropped once, before anything else: set token_label.crop_order to 'corrected'"
                )
            samples = CropOnDevice(source.images, data, augment, batch_plan.seed, bool(frames))  # type: ignore[attr-defined]
            num_workers, pin_memory = 0, False
        elif self.is_vectorised:
            samples = ShiftAndFlip(source.images, data, augment, batch_plan.seed, frames)  # type: ignore[attr-defined]
        else:
            prepare = _Prepare(train_transform(data, augment, crop_last=frames == "original"), frames)
            instead = "next" if data.on_bad_image == "skip" else ""
            samples = OneByOne(source.load, source.names, prepare, seed=batch_plan.seed, instead=instead)
        if label_maps is not None and isinstance(samples, CropOnDevice):
            samples = MapsOnDevice(samples, source.names, label_maps)
        elif label_maps is not None:
            samples = WithLabelMaps(samples, source.names, label_maps)
        if small_size or small_epochs:
            samples = SmallAtFirst(samples, data, small_size, small_epochs)
        super().__init__(
            WithTargets(samples, source.targets), batch_plan, data, num_workers, pin_memory, self.is_vectorised
        )


class EvalLoader(_EvalLoader):
    """Every image once, in the order of the source, as `eval_transform` shows it; the last batch may be short.

    With several processes each takes a contiguous share, in equally many batches (unless of one image).
    """

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        *,
        num_workers: int | None = None,
        pin_memory: bool = False,
        **plan: int,
    ) -> None:
        self.source = source
        transform, is_array = eval_transform(data), isinstance(source, ArraySource)
        samples: Samples
        if is_array:
            samples = Whole(source.images, transform)  # type: ignore[attr-defined]
            if isinstance(source, DeviceSource):
                num_workers, pin_memory = 0, False
        else:
            instead = "none" if data.on_bad_image == "skip" else ""
            samples = OneByOne(source.load, source.names, _Prepare(transform), instead=instead)
        batch_plan = BatchPlan(len(source), **plan)
        self.requests = batch_plan.evaluation()
        super().__init__(WithTargets(samples, source.targets), batch_plan, data, num_workers, pin_memory, is_array)


class MaskTrainLoader(_TrainLoader):
    """Endless shuffled, augmented batches: image uint8 [b, 3, H, W], mask uint8 [b, H, W], index int64 [b]."""

    def __init__(
        self,
        pictures: MaskedPictures,
        data: DataConfig,
        segment: SegmentConfig,
        *,
        hflip: float = 0.5,
        num_workers: int | None = None,
        pin_memory: bool = False,
        **plan: int,
    ) -> None:
        """`plan`: the other fields of `BatchPlan`. Raises ValueError where batches cannot be formed."""
        batch_plan = BatchPlan(len(pictures), **plan)
        batch_plan.micro_batch_size  # noqa: B018  # raises
        transform = mask_transforms.train_transform(data, segment, hflip)

        def prepare(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            image, mask = transform(*pair)
            return {"image": image, "mask": mask[0]}

        instead = "next" if data.on_bad_image == "skip" else ""
        samples = OneByOne(
            pictures.load, pictures.names, prepare, stream=keyed.SCENE, seed=batch_plan.seed, instead=instead
        )
        super().__init__(samples, batch_plan, data, num_workers, pin_memory)


class MaskEvalLoader(_EvalLoader):
    """Every image once, in order: image uint8 [b, 3, h, w] scaled as `short_side` says, mask uint8 [b, H, W] as it is.

    Only neighbours of one size share a batch. With several processes each takes a contiguous share.
    """

    def __init__(
        self,
        pictures: MaskedPictures,
        data: DataConfig,
        segment: SegmentConfig,
        *,
        num_workers: int | None = None,
        pin_memory: bool = False,
        **plan: int,
    ) -> None:
        def prepare(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            image, mask = pair
            H, W = mask.shape[-2:]
            return {"image": scale_to(image, scaled_size(H, W, segment.short_side)), "mask": mask[0]}

        batch_plan = BatchPlan(len(pictures), **plan)
        self.source = pictures
        self.requests = batch_plan.evaluation(pictures.sizes)
        instead = "none" if data.on_bad_image == "skip" else ""
        super().__init__(
            OneByOne(pictures.load, pictures.names, prepare, instead=instead), batch_plan, data, num_workers, pin_memory
        )


class ListedLoader:
    """Images in given batches, for label maps: those that cannot be decoded are left out and handed over.

    Yields (batch, bad) for each of `requests` (int64 arrays of numbers in the source): a `Batch` without the bad
    images, which may be empty, with their `fingerprint` (int64 [b]); and the bad ones.
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
        is_array = isinstance(source, ArraySource)
        self.num_workers = num_workers if num_workers >= 0 else 0 if is_array else default_workers()

    def __iter__(self) -> Iterator[tuple[Batch, list[BadImage]]]:
        options = {"num_workers": self.num_workers, "timeout": DataConfig.timeout, "pin_memory": self.pin_memory}
        return run(self.dataset, self.requests, **options)  # type: ignore[arg-type]


class _Prepare:
    """An image, and where `frames` says in which crop order, its frame and the size of the original."""

    def __init__(self, transform: Callable[..., Any], frames: str = "") -> None:
        self.transform, self.frames = transform, frames

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        if not self.frames:
            return {"image": self.transform(image)}
        height, width = image.shape[1:]
        shown, frame = self.transform(image, PictureFrame.whole(height, width, self.frames))
        return {"image": shown, "frame": frame, "size": torch.tensor([height, width])}


def default_workers() -> int:
    """For data.num_workers = -1: this process's share of the cores where a GPU trains, else half of it."""
    cores = available_cores() // local_processes()
    return max(1, min(16, cores if torch.cuda.is_available() else cores // 2))


@dataclass(frozen=True)
class _Listed:
    """A request is the numbers of a batch."""

    source: ImageSource
    transform: Callable[[Tensor], Tensor]

    def __call__(self, indices: np.ndarray) -> tuple[Batch, list[BadImage]]:
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
