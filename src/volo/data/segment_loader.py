"""Batches of pictures and masks, keyed like those of `volo.data.loader`: addressed by step, whatever the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from volo.config import DataConfig, SegmentConfig
from volo.data import keyed
from volo.data.decode import BadImageError
from volo.data.loader import Batch, default_workers, micro_batch_size, run_requests, training_requests
from volo.data.mask_transforms import scale_to, scaled_size, train_transform
from volo.data.masks import MaskedPictures


class SegmentTrainLoader:
    """Endless shuffled, augmented batches: image uint8 [b, 3, H, W], mask uint8 [b, H, W], index int64 [b].

    Order and micro batches are those of `volo.data.loader.TrainLoader`; what happens to a picture follows from (seed,
    epoch, picture).
    """

    def __init__(
        self,
        pictures: MaskedPictures,
        data: DataConfig,
        segment: SegmentConfig,
        *,
        hflip: float = 0.5,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """`num_workers` None: `data.num_workers`. Raises ValueError where batches cannot be formed."""
        self.micro_batch_size = micro_batch_size(len(pictures), batch_size, accumulation, world_size)
        self.pictures, self.batch_size, self.accumulation, self.seed = pictures, batch_size, accumulation, seed
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self.steps_per_epoch = len(pictures) // batch_size
        self.samples = _Augmented(pictures, train_transform(data, segment, hflip), seed)
        self.num_workers = _workers(data.num_workers if num_workers is None else num_workers)

    def batches(self, start_step: int, stop_step: int, most: int | None = None) -> Iterator[Batch]:
        """Micro batches of steps start_step..stop_step-1, `accumulation` for each step, and of each the first `most`
        pictures alone. Raises BadImageError."""
        requests = training_requests(
            range(start_step, stop_step),
            len(self.pictures),
            self.batch_size,
            accumulation=self.accumulation,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            most=most,
        )
        return run_requests(self.samples, requests, self.num_workers, self.pin_memory)


class SegmentEvalLoader:
    """Every picture once, in order: image uint8 [b, 3, h, w] scaled as `short_side` says, mask uint8 [b, H, W] as it is.

    Only neighbours of one size share a batch. With several processes each takes a contiguous share.
    """

    def __init__(
        self,
        pictures: MaskedPictures,
        data: DataConfig,
        segment: SegmentConfig,
        *,
        batch_size: int,
        num_workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the evaluation batch size is {batch_size}; it is at least 1")
        self.source, self.samples, self.pin_memory = pictures, _AsTheyAre(pictures, segment.short_side), pin_memory
        self.num_workers = _workers(data.num_workers if num_workers is None else num_workers)
        start, stop = (len(pictures) * r // world_size for r in (rank, rank + 1))
        self.requests: list[tuple[int, np.ndarray]] = []
        while start < stop:
            end = start + 1
            while end < min(stop, start + batch_size) and (pictures.sizes[end] == pictures.sizes[start]).all():
                end += 1
            self.requests.append((0, np.arange(start, end)))
            start = end

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        return run_requests(self.samples, iter(self.requests), min(self.num_workers, len(self)), self.pin_memory)


class _Augmented:
    def __init__(
        self, pictures: MaskedPictures, transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], seed: int
    ) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch | BadImageError:
        epoch, indices = request
        seeds = keyed.key(keyed.SCENE, self.seed, epoch, indices).tolist()
        images, masks = [], []
        with keyed.own_random_state():
            for seed, index in zip(seeds, indices.tolist()):
                keyed.seed_random_state(seed)
                try:
                    image, mask = self.transform(*self.pictures.load(index))
                except BadImageError as error:
                    return error  # as a value: raised in a worker it would arrive as a long traceback
                except Exception as error:
                    error.add_note(f"while preparing picture {self.pictures.names[index]}")
                    raise
                images.append(image)
                masks.append(mask[0])
        return {"image": torch.stack(images), "mask": torch.stack(masks), "index": torch.from_numpy(indices.copy())}


class _AsTheyAre:
    def __init__(self, pictures: MaskedPictures, short_side: int) -> None:
        self.pictures, self.short_side = pictures, short_side

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch | BadImageError:
        _, indices = request
        images, masks = [], []
        for index in indices.tolist():
            try:
                image, mask = self.pictures.load(index)
            except BadImageError as error:
                return error
            H, W = mask.shape[-2:]
            images.append(scale_to(image, scaled_size(H, W, self.short_side)))
            masks.append(mask[0])
        return {"image": torch.stack(images), "mask": torch.stack(masks), "index": torch.from_numpy(indices.copy())}


def _workers(number: int) -> int:
    return number if number >= 0 else default_workers()
