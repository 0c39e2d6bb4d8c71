"""What a few steps of a recipe cost: taken on this machine, with its data, and nothing is left of them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from volo.config import Recipe, TrainConfig
from volo.distributed import World, join_world, least_over_ranks, own_parts
from volo.training.clock import Mark
from volo.training.loop import Run, open_workload
from volo.training.memory import free_bytes, is_out_of_memory
from volo.training.optim import LearningRate
from volo.training.report import NullReporter, Reporter
from volo.training.settings import torch_settings
from volo.training.workloads.workload import Workload


@dataclass(frozen=True)
class Probe:
    """What a few steps of a recipe cost on this machine, of which nothing is left."""

    workload: Workload
    world_size: int
    device: torch.device
    num_parameters: int
    total_steps: int
    pictures: int
    """In each micro batch that was tried; 0: memory is too small even for the fewest. Where they are fewer than the recipe's,
    times and activations are scaled up to it."""
    step_seconds: list[float]
    """Of whole steps after the first. Data is included where this process makes the batches itself."""
    data_seconds: float | None
    """That making the batches of a step takes, with nothing else going on; None: not measured."""
    state_bytes: dict[str, int]
    """On the device all the time: weights, gradients, optimizer, average; what was not measured is left out."""
    activation_bytes: int
    """Kept from the forward to the backward pass of a micro batch, on the device."""
    prepare_seconds: float
    """That opening the data and making the model have taken."""
    peak_bytes: int | None
    """Most that torch has allocated on a GPU while trying; None on a CPU."""

    @property
    def seconds_a_step(self) -> float:
        """The median step, or its data where that takes longer: prefetched batches hide it from the first steps."""
        return max(statistics.median(self.step_seconds), self.data_seconds or 0.0)


FEWEST_PICTURES = 2
"""In a probe's micro batch: BatchNorm has to tell at least two values apart."""
PREFETCHED = 2
"""Batches that each worker of a DataLoader makes before they are asked for."""
DATA_SECONDS, DATA_ROUNDS = 3.0, 4
"""The making of batches is watched for so long, or until every worker has made so many."""


def probe(
    recipe: Recipe, *, steps: int = 3, most_pictures: int | None = None, reporter: Reporter | None = None
) -> Probe:
    """Open the data of `recipe` and take a few of its steps; nothing is written. Compilation is left out, for it may take
    longer than all the rest, and so are the small images of the first epochs, for which less time and memory are needed.

    most_pictures: steps of one micro batch a process with no more images than these, and fewer where memory is short.
    None: steps as they are.

    Raises ValueError as `train` does.
    """
    reporter = reporter or NullReporter()
    schedule = dataclasses.replace(recipe.schedule, small_size=0, small_epochs=0)
    recipe = dataclasses.replace(recipe, schedule=schedule, train=dataclasses.replace(recipe.train, compile=False))
    started = time.monotonic()
    with join_world(recipe.train.device) as world, torch_settings(recipe.train, world.device):
        reporter = reporter if world.is_main else NullReporter()
        workload = open_workload(recipe, world, reporter)
        if most_pictures is None:
            run = Run(recipe, Path(), workload, world, reporter, None)
            return _probe(run, steps, prepare_seconds=time.monotonic() - started)
        pictures = min(max(most_pictures, FEWEST_PICTURES), _micro_batch_size(recipe.train, world))
        while True:
            try:
                return _probe(Run(recipe, Path(), workload, world, reporter, None), steps, pictures)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if world.size > 1:  # the others are in the middle of a step, waiting for this one
                    raise ValueError(
                        f"memory is too small for {pictures} images in each of {world.size} processes; plan in one process, "
                        "which tries fewer"
                    ) from error
            # Only here is the error gone, and with it the tensors of its frames.
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
            if pictures <= FEWEST_PICTURES:
                return _not_measured(recipe, workload, world)
            pictures = max(FEWEST_PICTURES, pictures // 2)


def _not_measured(recipe: Recipe, workload: Workload, world: World) -> Probe:
    """What can be said of a recipe without taking a step."""
    model = workload.create_model()
    weights = _num_bytes([*model.parameters(), *model.buffers()])
    return Probe(
        workload=workload,
        world_size=world.size,
        device=world.device,
        num_parameters=sum(p.numel() for p in model.parameters()),
        total_steps=LearningRate.from_recipe(recipe, workload.steps_per_epoch).total_steps,
        pictures=0,
        step_seconds=[],
        data_seconds=None,
        state_bytes={
            "weights": weights,
            "gradients": _num_bytes(model.parameters()),
            "average": weights if recipe.optim.ema_decay else 0,
        },
        activation_bytes=0,
        prepare_seconds=0.0,
        peak_bytes=None,
    )


def _probe(run: Run, steps: int, most_pictures: int | None = None, prepare_seconds: float = 0.0) -> Probe:
    """Take `steps` steps after a first one, which warms up; nothing is logged or saved. See `probe`."""
    device, micro_batch = run.world.device, _micro_batch_size(run.config, run.world)
    weights = _num_bytes([*run.task.parameters(), *run.task.buffers()])
    pictures, share = micro_batch, 1.0
    if most_pictures is not None:
        pictures = _pictures_that_fit(run, most_pictures, weights)
        share = micro_batch / pictures * run.config.accumulation
        run.config = dataclasses.replace(run.config, accumulation=1)
    with contextlib.closing(run.workload.batches(0, sys.maxsize, pictures)) as batches:  # type: ignore[type-var]
        activations = _activation_bytes(run, batches)
        seconds = [_probe_step(run, batches, share) for _ in range(steps)]
        data_seconds = _data_seconds(run, batches) * run.config.accumulation * share
    states = [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return Probe(
        workload=run.workload,
        world_size=run.world.size,
        device=device,
        num_parameters=run.num_parameters,
        total_steps=run.rate.total_steps,
        pictures=pictures,
        step_seconds=seconds,
        data_seconds=data_seconds,
        state_bytes={
            "weights": weights,
            "gradients": _num_bytes([p for p in run.task.parameters() if p.requires_grad]),
            "optimizer": _num_bytes(states),
            "average": weights if run.ema is not None else 0,
        },
        activation_bytes=round(activations * micro_batch / pictures),
        prepare_seconds=prepare_seconds,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _pictures_that_fit(run: Run, most: int, weights: int) -> int:
    """`most`, or half of it, or half of that, ...: no more than memory holds, as far as a step with the fewest tells.

    Where a CPU's memory ends the system kills, and nothing is left to be caught.
    """
    device, few = run.world.device, min(FEWEST_PICTURES, most)
    free = free_bytes(device)
    if device.type == "cpu" and free is not None and 3 * weights > free:
        raise MemoryError("no room for gradients and optimizer")
    with contextlib.closing(run.workload.batches(0, sys.maxsize, few)) as batches:  # type: ignore[type-var]
        each = _activation_bytes(run, batches) / few
    free = free_bytes(device)
    # Twice: the backward pass, and whoever else is on the machine, need room as well.
    while most > few and free is not None and 2 * most * each > free:
        most = max(few, most // 2)
    return least_over_ranks(most, run.world)


def _activation_bytes(run: Run, batches: Iterator[dict[str, Tensor]]) -> int:
    """Take a step, and count what its first micro batch keeps for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in own_parts(run.task.parameters())}
    kept: dict[int, int] = {}
    micro_batches = 0

    def count(module: nn.Module, arguments: Any) -> None:
        nonlocal micro_batches
        micro_batches += 1

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if micro_batches == 1 and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # With its grad_fn an output would keep the graph alive that keeps it, if memory runs out before the end.
        return tensor.detach()

    run.mark = Mark(run.world.device)
    counting = run.task.register_forward_pre_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.train_step(batches)
    counting.remove()
    return sum(kept.values())


def _probe_step(run: Run, batches: Iterator[dict[str, Tensor]], share: float) -> float:
    """Seconds of a step with `share` times as many images as this one has; the update is the same for all of them."""
    device = run.world.device
    updates: list[Mark] = []
    if run.workload.num_workers:
        # Others make the images beside the steps; how long that takes is measured for itself.
        batches = iter([next(batches) for _ in range(run.config.accumulation)])
    run.mark = Mark(device)
    hook = run.optimizer.register_step_pre_hook(lambda *_: updates.append(Mark(device)))
    run.train_step(batches)
    hook.remove()
    done = run.pending[-1]
    done.end.wait()
    seconds = done.end.seconds_since(done.start)
    # With fp16 a step that overflows is left out.
    update = done.end.seconds_since(updates[0]) if updates else 0.0
    return (seconds - update) * share + update


def _data_seconds(run: Run, batches: Iterator[dict[str, Tensor]]) -> float:
    """Seconds for each of the next batches when only they are made, those that wait already not counted."""
    workers = run.workload.num_workers
    for _ in range(PREFETCHED * workers):
        next(batches)
    made, start = 0, time.perf_counter()
    while True:
        for _ in range(max(1, workers)):
            next(batches)
            made += 1
        seconds = time.perf_counter() - start
        if seconds > DATA_SECONDS or made >= DATA_ROUNDS * max(1, workers):
            return seconds / made


def _micro_batch_size(config: TrainConfig, world: World) -> int:
    return config.batch_size // config.accumulation // world.size


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in own_parts(tensors))
