"""Train: one recipe in, one run folder out. What is trained, and on what, is a `Workload`; this is the loop.

A run folder holds recipe.toml, last.pt (all that is needed to continue), best.pt (the best evaluation's weights),
metrics.jsonl (a line for every step and every evaluation), summary.json and tensorboard/.

Everything random is a function of (seed, step) or (seed, epoch, picture), never of what happened before in the
process. A checkpoint therefore needs no generator states, and a run that was cut off continues bit for bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from volo import __version__
from volo.config import Recipe, TrainConfig, recipe_from_dict, recipe_to_toml
from volo.data.files import write_atomically
from volo.data.keyed import key
from volo.distributed import (
    Vote,
    World,
    agree_on_start,
    gather_full,
    gradient_sync,
    join_world,
    least_over_ranks,
    load_optimizer_into,
    load_weights_into,
    main_first,
    mean_over_ranks,
    prepare_batch_norm,
    replicate,
    shard,
    share_buffers,
)
from volo.inference.evaluate import AMP_DTYPES
from volo.models.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from volo.models.fuse import use_training_kernels
from volo.training.memory import free_bytes, is_out_of_memory
from volo.training.optim import LearningRate, WeightAverage, create_optimizer, set_learning_rate
from volo.training.report import NullReporter, Reporter, RunInfo, RunLog, StepReport, TrainResult
from volo.training.workloads.classification import Classification
from volo.training.workloads.segmentation import Segmentation
from volo.training.workloads.token_labeling import TokenLabeling
from volo.training.workloads.workload import OpenWorkload, Workload

WORKLOADS: dict[str, OpenWorkload] = {
    "classify": Classification,
    "token_label": TokenLabeling,
    "segment": Segmentation,
}
"""Who opens the workload of a recipe, by its `task`."""

# A run may be continued with other values of these: they change speed, place or reports, not what is computed (rounding
# aside). The data is checked by its classes and its number of pictures, so it may have moved.
CHANGEABLE = frozenset(
    {"data.path", "data.kind", "data.num_workers", "data.cache"}
    | {"token_label.maps", "annotator.model", "annotator.weights"}
    | {
        "train.device",
        "train.threads",
        "train.compile",
        "train.channels_last",
        "train.grad_checkpointing",
        "train.parallel",
    }
    | {"train.eval_every", "train.eval_steps", "train.eval_batch_size", "train.checkpoint_minutes", "train.tensorboard"}
)

RUN_FILES = (
    "recipe.toml",
    "last.pt",
    "best.pt",
    "metrics.jsonl",
    "summary.json",
    "curves.png",
    "confusion.png",
    "iou.png",
    "overlays.png",
)


class NonFiniteLossError(ArithmeticError):
    """The loss, the gradients or the weights became NaN or infinite. Attributes: step, lr."""

    def __init__(self, what: str, step: int, lr: float, advice: str) -> None:
        super().__init__(f"{what} at step {step}, where the learning rate was {lr:.3g}. {advice}")
        self.step = step
        self.lr = lr


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    kept: Recipe | None = None,
) -> TrainResult:
    """Run `recipe` and leave its results in the folder `out`. Label maps that it names are there already: see
    `volo.training.pipeline`.

    The first Ctrl-C or SIGTERM ends the run after the current step with a checkpoint and status "interrupted"; the
    second ends it at once. Under torchrun every process calls this; the first one writes and reports.

    Args:
        resume: continue from `out`/last.pt; where there is none yet, start from the beginning.
        overwrite: replace a run that is already in `out`.
        kept: the recipe that the folder keeps, where it differs from `recipe` in places of files.

    Raises:
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` is set.
        ValueError: the recipe contradicts itself, the data, the machine or (with `resume`) the run in `out`.
        NonFiniteLossError: training diverged; last.pt is from before.
        OSError: a file cannot be written (disk full); the checkpoints on the disk are whole.
    """
    out = Path(out)
    reporter = reporter or NullReporter()
    with join_world(recipe.train.device) as world, torch_settings(recipe.train, world.device):
        if not world.is_main:
            reporter = NullReporter()
        # Nobody writes before all have looked.
        checkpoint = agree_on_start(_look_into(out, recipe, resume, overwrite), world)
        run = _Run(kept or recipe, out, _open_workload(recipe, world, reporter), world, reporter, checkpoint)
        del checkpoint
        return run.run(fresh=not resume)


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
    longer than all the rest, and so are the small pictures of the first epochs, for which less time and memory are needed.

    most_pictures: steps of one micro batch a process with no more pictures than these, and fewer where memory is short.
    None: steps as they are.

    Raises ValueError as `train` does.
    """
    reporter = reporter or NullReporter()
    schedule = dataclasses.replace(recipe.schedule, small_size=0, small_epochs=0)
    recipe = dataclasses.replace(recipe, schedule=schedule, train=dataclasses.replace(recipe.train, compile=False))
    with join_world(recipe.train.device) as world, torch_settings(recipe.train, world.device):
        reporter = reporter if world.is_main else NullReporter()
        workload = _open_workload(recipe, world, reporter)
        if most_pictures is None:
            return _Run(recipe, Path(), workload, world, reporter, None).probe(steps)
        pictures = min(max(most_pictures, FEWEST_PICTURES), _micro_batch_size(recipe.train, world))
        while True:
            try:
                return _Run(recipe, Path(), workload, world, reporter, None).probe(steps, pictures)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if world.size > 1:  # the others are in the middle of a step, waiting for this one
                    raise ValueError(
                        f"memory is too small for {pictures} pictures in each of {world.size} processes; plan in one process, "
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
        peak_bytes=None,
    )


def _micro_batch_size(config: TrainConfig, world: World) -> int:
    return config.batch_size // config.accumulation // world.size


def _open_workload(recipe: Recipe, world: World, reporter: Reporter) -> Workload:
    workload = WORKLOADS[recipe.task](
        recipe, world, lambda done, total: reporter.on_progress("checking pictures", done, total)
    )
    for note in workload.notes:
        reporter.on_message(note)
    return workload


class _Run:
    """The state of a run and the four things that happen to it: a step, an evaluation, a save, a restore."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        workload: Workload,
        world: World,
        reporter: Reporter,
        checkpoint: dict[str, Any] | None,
    ) -> None:
        config = recipe.train
        self.recipe, self.config, self.out, self.world, self.reporter = recipe, config, out, world, reporter
        self.workload = workload
        if config.amp not in AMP_DTYPES:
            raise ValueError(f"train.amp is one of {', '.join(AMP_DTYPES)}; given: {config.amp!r}")
        if config.parallel == "fsdp" and config.amp == "fp16":
            raise ValueError("sharded training (parallel = 'fsdp') goes with amp 'bf16' or 'off', not with 'fp16'")

        self.rate = LearningRate.from_recipe(recipe, workload.steps_per_epoch)

        if checkpoint is None:
            with main_first(world):  # downloads once
                model = workload.create_model()
        else:
            model = workload.restore_model(checkpoint["model_config"])
        self.model_config = workload.model_config(model)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        task = prepare_batch_norm(workload.create_task(model), config, world)
        task.to(world.device)
        if world.device.type == "cpu":
            use_training_kernels(task)
        if config.channels_last:
            task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = None
        if recipe.optim.ema_decay:
            self.ema = WeightAverage(task, recipe.optim.ema_decay, recipe.optim.ema_warmup)
        self.is_sharded = config.parallel == "fsdp" and world.size > 1
        if self.is_sharded:
            shard(task, world)
            if self.ema is not None:
                shard(self.ema.module, world)
        if config.compile:
            task.compile()
        self.task = task
        self.model = task.get_submodule("model")
        self.averaged_task = None if self.ema is None else self.ema.module
        self.averaged_model = self.averaged_task and self.averaged_task.get_submodule("model")
        self.wrapped = replicate(task, config, world)
        self.optimizer = create_optimizer(self.model, recipe.optim, recipe.peak_lr)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
        self._training_mode()

        self.step = 0
        self.evaluated_step = 0
        self.metrics: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.confusion: Tensor | None = None
        self.earlier_seconds = 0.0
        self.metrics_bytes = 0
        if checkpoint is not None:
            self._restore(checkpoint)

        self.signals = _StopSignals()
        self.pending: deque[_PendingStep] = deque()
        self.log: RunLog | None = None
        self.last_lr = 0.0
        self.step_seconds = 0.0
        self.timed_steps = 0

    def run(self, fresh: bool) -> TrainResult:
        start_step = self.step
        self.started = time.monotonic()
        if self.world.is_main:
            self._open_folder(fresh)
        self.reporter.on_start(
            RunInfo(
                self.recipe,
                self.out,
                self.world.device,
                self.world.size,
                self.num_parameters,
                self.workload.classes,
                self.workload.num_train,
                self.workload.num_val,
                self.workload.steps_per_epoch,
                self.rate.total_steps,
                start_step,
                self.workload.score,
            )
        )
        try:
            with self.signals:
                signal_number = self._loop()
            result = self._result(signal_number)
            if self.world.is_main:
                self._write_summary(result)
        finally:
            if self.log is not None:
                self.log.close()
        self.reporter.on_end(result)
        return result

    def probe(self, steps: int, most_pictures: int | None = None) -> Probe:
        """Take `steps` steps after a first one, which warms up; nothing is logged or saved. See `volo.training.loop.probe`."""
        device, micro_batch = self.world.device, _micro_batch_size(self.config, self.world)
        weights = _num_bytes([*self.task.parameters(), *self.task.buffers()])
        self.started, pictures, share = time.monotonic(), micro_batch, 1.0
        if most_pictures is not None:
            pictures = self._pictures_that_fit(most_pictures, weights)
            share = micro_batch / pictures * self.config.accumulation
            self.config = dataclasses.replace(self.config, accumulation=1)
        with contextlib.closing(self.workload.batches(0, sys.maxsize, pictures)) as batches:  # type: ignore[type-var]
            activations = self._activation_bytes(batches)
            seconds = [self._probe_step(batches, share) for _ in range(steps)]
            data_seconds = self._data_seconds(batches) * self.config.accumulation * share
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return Probe(
            workload=self.workload,
            world_size=self.world.size,
            device=device,
            num_parameters=self.num_parameters,
            total_steps=self.rate.total_steps,
            pictures=pictures,
            step_seconds=seconds,
            data_seconds=data_seconds,
            state_bytes={
                "weights": weights,
                "gradients": _num_bytes([p for p in self.task.parameters() if p.requires_grad]),
                "optimizer": _num_bytes(states),
                "average": weights if self.ema is not None else 0,
            },
            activation_bytes=round(activations * micro_batch / pictures),
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    def _pictures_that_fit(self, most: int, weights: int) -> int:
        """`most`, or half of it, or half of that, ...: no more than memory holds, as far as a step with the fewest tells.

        Where a CPU's memory ends the system kills, and nothing is left to be caught.
        """
        device, few = self.world.device, min(FEWEST_PICTURES, most)
        free = free_bytes(device)
        if device.type == "cpu" and free is not None and 3 * weights > free:
            raise MemoryError("no room for gradients and optimizer")
        with contextlib.closing(self.workload.batches(0, sys.maxsize, few)) as batches:  # type: ignore[type-var]
            each = self._activation_bytes(batches) / few
        free = free_bytes(device)
        # Twice: the backward pass, and whoever else is on the machine, need room as well.
        while most > few and free is not None and 2 * most * each > free:
            most = max(few, most // 2)
        return least_over_ranks(most, self.world)

    def _activation_bytes(self, batches: Iterator[dict[str, Tensor]]) -> int:
        """Take a step, and count what its first micro batch keeps for the backward pass."""
        own = {p.untyped_storage().data_ptr() for p in _local(self.task.parameters())}
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

        self.mark = _Mark(self.world.device)
        counting = self.task.register_forward_pre_hook(count)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self._train_step(batches)
        counting.remove()
        return sum(kept.values())

    def _probe_step(self, batches: Iterator[dict[str, Tensor]], share: float) -> float:
        """Seconds of a step with `share` times as many pictures as this one has; the update is the same for all of them."""
        device = self.world.device
        updates: list[_Mark] = []
        if self.workload.num_workers:
            # Others make the pictures beside the steps; how long that takes is measured for itself.
            batches = iter([next(batches) for _ in range(self.config.accumulation)])
        self.mark = _Mark(device)
        hook = self.optimizer.register_step_pre_hook(lambda *_: updates.append(_Mark(device)))
        self._train_step(batches)
        hook.remove()
        done = self.pending[-1]
        done.end.wait()
        seconds = done.end.seconds_since(done.start)
        # With fp16 a step that overflows is left out.
        update = done.end.seconds_since(updates[0]) if updates else 0.0
        return (seconds - update) * share + update

    def _data_seconds(self, batches: Iterator[dict[str, Tensor]]) -> float:
        """Seconds for each of the next batches when only they are made, those that wait already not counted."""
        workers = self.workload.num_workers
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

    def _loop(self) -> int:
        """Steps, evaluations and saves until the end (returns 0) or a signal (returns its number)."""
        vote = Vote(self.world)
        saved_step, saved_at = self.step if self.metrics_bytes else -1, time.monotonic()
        self.mark = _Mark(self.world.device)
        with contextlib.closing(self.workload.batches(self.step, self.rate.total_steps)) as batches:  # type: ignore[type-var]
            while True:
                self._write_steps()
                if self._is_evaluation_due() and self._evaluate():
                    saved_step, saved_at = self.step, time.monotonic()
                done = self.step >= self.rate.total_steps
                save_due = self.world.is_main and time.monotonic() - saved_at >= 60 * self.config.checkpoint_minutes
                if save_due:
                    saved_at = time.monotonic()
                signal_number, save = vote(self.signals.received, save_due)
                if (done or signal_number or save) and saved_step != self.step:
                    self._save()
                    saved_step, saved_at = self.step, time.monotonic()
                if done or signal_number:
                    vote.close()
                    return 0 if done and not self._is_evaluation_due() else signal_number
                self._train_step(batches)

    # A step

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        config, device = self.config, self.world.device
        self.last_lr = self.rate.at(self.step)
        set_learning_rate(self.optimizer, self.last_lr)
        values = torch.zeros(2, device=device)  # loss, gradient norm
        for micro in range(config.accumulation):
            batch = next(batches)
            # After the batch is there: transforms that run in this process may draw from the same generator.
            _seed(int(key(config.seed, self.step, micro, self.world.rank)[0]), device)
            with torch.no_grad():
                batch = self.workload.prepare(batch)
            if config.channels_last:
                batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
            with gradient_sync(self.wrapped, enabled=micro == config.accumulation - 1):
                with torch.autocast(device.type, AMP_DTYPES[config.amp], enabled=config.amp != "off"):
                    loss = self.wrapped(batch)["loss"] / config.accumulation
                self.scaler.scale(loss).backward()
            values[0] += loss.detach()
        if self.recipe.optim.clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.task.parameters(), self.recipe.optim.clip_grad)
            values[1] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        values = _to_host(mean_over_ranks(values, self.world))
        start, self.mark = self.mark, _Mark(device)
        self.pending.append(_PendingStep(self.step, self.last_lr, values, start, self.mark, self._seconds()))

    def _write_steps(self, wait: bool = False) -> None:
        """Log the steps whose figures have arrived from the device: nothing waits for a GPU, unless `wait` is set."""
        while self.pending and (wait or len(self.pending) > 64 or self.pending[0].end.reached()):
            done = self.pending.popleft()
            done.end.wait()
            loss, norm = done.values.tolist()
            seconds = done.end.seconds_since(done.start)
            clips = bool(self.recipe.optim.clip_grad)
            if not math.isfinite(loss):
                raise self._diverged(f"the loss became {loss}", done.step, done.lr)
            if clips and not math.isfinite(norm) and not self.scaler.is_enabled():
                raise self._diverged(f"the gradient norm became {norm}", done.step, done.lr)
            self.step_seconds += seconds
            self.timed_steps += 1
            report = StepReport(
                step=done.step,
                epoch=self._epoch(done.step),
                loss=loss,
                lr=done.lr,
                grad_norm=norm if clips else None,
                images_per_second=self.config.batch_size / max(seconds, 1e-9),
                seconds=done.at_seconds,
            )
            if self.log is not None:
                self.log.write_step(report)
            self.reporter.on_step(report)

    def _diverged(self, what: str, step: int, lr: float) -> NonFiniteLossError:
        advice = "Try a lower learning rate (--optim.lr), a longer warm-up (--schedule.warmup_epochs) or clipped gradients (--optim.clip_grad 1)"
        if self.config.amp == "fp16":
            advice += ", or --train.amp bf16, which does not overflow"
        last = self.out / "last.pt"
        advice += f". {last} is from before it" if last.exists() else ". No checkpoint had been written yet"
        return NonFiniteLossError(what, step, lr, advice)

    # An evaluation

    def _is_evaluation_due(self) -> bool:
        if not self.workload.num_val or self.step in (0, self.evaluated_step):
            return False
        if self.step >= self.rate.total_steps:
            return True
        every = self.config.eval_steps or self.config.eval_every * self.workload.steps_per_epoch
        if every <= 0:
            return False
        every = max(every, 1.0)
        return self.step == round(round(self.step / every) * every)

    def _evaluate(self) -> bool:
        """Score the held-out pictures and save; False if a signal cut it short: it is made up for after a restart."""
        self._write_steps(wait=True)
        scored = self.averaged_task or self.task
        share_buffers(scored, self.world)

        def on_batch(done: int) -> None:
            self.reporter.on_progress("evaluating", done * self.world.size, self.workload.num_val)
            if self.signals.received and self.world.size == 1:
                raise _Interrupted

        try:
            model = _Outputs(scored) if self.is_sharded else scored.get_submodule("model")
            metrics = self.workload.evaluate(model, on_batch)
        except _Interrupted:
            return False
        finally:
            self.mark = _Mark(self.world.device)
        confusion = torch.tensor(metrics.pop("confusion"), dtype=torch.int64)
        self.metrics = {"step": self.step, "epoch": self._epoch(self.step), **metrics}
        self.evaluated_step = self.step
        score = self.workload.score
        is_best = self.metrics[score] > self.best.get(score, -1.0)
        if is_best:
            self.best, self.confusion = self.metrics, confusion
        if self.log is not None:
            self.log.write_evaluation(self.metrics, self._seconds())
        self._save(is_best)
        self.reporter.on_eval(self.metrics, is_best)
        return True

    # A save and a restore

    def _save(self, is_best: bool = False) -> None:
        self._write_steps(wait=True)
        weights = gather_full(self.model.state_dict(), self.world)
        averaged = self.averaged_model and gather_full(self.averaged_model.state_dict(), self.world)
        optimizer = gather_full(self.optimizer.state_dict(), self.world)
        if not self.world.is_main:
            return
        # The last update may have spoilt the weights though the loss before it was fine.
        if not all(bool(t.isfinite().all()) for t in weights.values() if t.is_floating_point()):
            raise self._diverged("weights became NaN or infinite", self.step, self.last_lr)
        assert self.log is not None
        checkpoint = {
            "format": FORMAT,
            "model": dict(weights),
            "ema": averaged and dict(averaged),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best": self.best,
            "recipe": self.recipe.to_dict(),
            "model_config": self.model_config,
            "classes": list(self.workload.classes),
            "extras": self.workload.extras,
            "metrics": self.metrics,
            "confusion": self.confusion,
            "history": {
                "evaluated_step": self.evaluated_step,
                "metrics_bytes": self.log.sync(),
                "seconds": self._seconds(),
                "num_train": self.workload.num_train,
                "num_val": self.workload.num_val,
                "world_size": self.world.size,
            },
            "volo_version": __version__,
            "torch_version": str(torch.__version__),
        }
        # best.pt first: a last.pt that speaks of a best evaluation implies the file.
        if is_best:
            save_checkpoint(self.out / "best.pt", {**checkpoint, "optimizer": None, "scaler": None})
        save_checkpoint(self.out / "last.pt", checkpoint)
        self.reporter.on_checkpoint(self.out / "last.pt", self.step)
        self.mark = _Mark(self.world.device)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        history = checkpoint["history"]
        now = (self.workload.num_train, self.workload.num_val, list(self.workload.classes))
        then = (history["num_train"], history["num_val"], checkpoint["classes"])
        if now != then:
            raise ValueError(
                f"the run in {self.out} was started with {then[0]} training and {then[1]} held-out pictures of {len(then[2])} classes, but the data "
                f"now has {now[0]}, {now[1]} and {len(now[2])} or other class names. Give it the same data, or start a new run"
            )
        load_weights_into(self.model, checkpoint["model"])
        if self.averaged_model is not None:
            load_weights_into(self.averaged_model, checkpoint["ema"])
        load_optimizer_into(self.optimizer, checkpoint["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step = checkpoint["step"]
        self.metrics, self.best, self.confusion = checkpoint["metrics"], checkpoint["best"], checkpoint["confusion"]
        self.evaluated_step = history["evaluated_step"]
        self.metrics_bytes = history["metrics_bytes"]
        self.earlier_seconds = history["seconds"]
        if history["world_size"] != self.world.size:
            self.reporter.on_message(
                f"continued with {self.world.size} processes instead of {history['world_size']}: the same pictures in the same steps, but "
                "other random draws for dropout and mixing"
            )

    # Small things

    def _training_mode(self) -> None:
        self.task.train()
        if self.config.batch_norm == "frozen":
            # Of a segmenter the backbone's, as mmsegmentation's norm_eval: neck and decoder start with statistics of nothing.
            for module in getattr(self.model, "backbone", self.model).modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _epoch(self, step: int) -> float:
        return round(step / self.workload.steps_per_epoch, 4)

    def _seconds(self) -> float:
        return round(self.earlier_seconds + time.monotonic() - self.started, 3)

    def _open_folder(self, fresh: bool) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in RUN_FILES:
                (self.out / name).unlink(missing_ok=True)
        if self.step == 0 and (self.out / "tensorboard").is_dir():
            shutil.rmtree(self.out / "tensorboard")
        text = recipe_to_toml(self.recipe).encode()
        write_atomically(self.out / "recipe.toml", lambda file: file.write(text))
        self.log = RunLog(self.out, self.metrics_bytes, self.step, self.config.tensorboard)

    def _result(self, signal_number: int) -> TrainResult:
        return TrainResult(
            status="interrupted" if signal_number else "completed",
            signal=signal_number,
            out=self.out,
            step=self.step,
            total_steps=self.rate.total_steps,
            classes=self.workload.classes,
            metrics=self.metrics,
            best=self.best,
            score=self.workload.score,
            confusion=[] if self.confusion is None else self.confusion.tolist(),
            seconds=self._seconds(),
            images_per_second=self.timed_steps * self.config.batch_size / max(self.step_seconds, 1e-9),
        )

    def _write_summary(self, result: TrainResult) -> None:
        def figures(metrics: dict[str, Any]) -> dict[str, Any]:
            return {
                name: dict(zip(self.workload.classes, value)) if name.startswith("per_class_") else value
                for name, value in metrics.items()
            }

        device = self.world.device
        summary = {
            "date": time.strftime("%Y-%m-%d"),
            "status": result.status,
            "step": result.step,
            "total_steps": result.total_steps,
            "epoch": self._epoch(result.step),
            "best": figures(result.best),
            "final": figures(result.metrics),
            "seconds": result.seconds,
            "images_per_second": round(result.images_per_second, 1),
            "model": self.recipe.model.name,
            "num_parameters": self.num_parameters,
            "num_classes": len(self.workload.classes),
            "num_train": self.workload.num_train,
            "num_val": self.workload.num_val,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "world_size": self.world.size,
            "versions": {
                "volo": __version__,
                "torch": str(torch.__version__),
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        }
        text = json.dumps(summary, indent=1).encode()
        write_atomically(self.out / "summary.json", lambda file: file.write(text))


class _Outputs(nn.Module):
    """The model in a sharded task: only the forward of the task itself gathers the shards."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, images: Tensor) -> Tensor:
        return self.task({"image": images})["output"]


class _Interrupted(Exception):
    """A signal came during an evaluation."""


class _StopSignals:
    """While active, the first SIGINT or SIGTERM is noted in `received`; the next one acts as it would without us."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self.__exit__()
            signal.raise_signal(number)
        self.received = number


class _Mark:
    """A point in the work of a device: when it was reached, without stopping the host for it."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: _Mark) -> float:
        if self._event is None:
            return self._time - earlier._time
        assert earlier._event is not None
        return earlier._event.elapsed_time(self._event) / 1e3


@dataclass
class _PendingStep:
    """A step the host has finished while the device may still be at it."""

    step: int
    lr: float
    values: Tensor
    """Loss and gradient norm, on the host once `end` is reached."""
    start: _Mark
    end: _Mark
    at_seconds: float


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds: of a sharded tensor its own part."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in _local(tensors))


def _to_host(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def _seed(value: int, device: torch.device) -> None:
    """torch.manual_seed for the generators in use; it asks every kind of device, which is felt with small models."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def _look_into(out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a run from the beginning."""
    if resume and overwrite:
        raise ValueError("a run is either continued (resume) or replaced (overwrite), not both")
    if not resume:
        if not overwrite and any((out / name).exists() for name in RUN_FILES):
            raise FileExistsError(
                f"{out} already holds a run: continue it with --resume, replace it with --overwrite, or choose another --out"
            )
        return None
    if not (out / "last.pt").exists():
        return None
    checkpoint = load_checkpoint(out / "last.pt")
    changed = _differences(recipe_from_dict(checkpoint["recipe"]).to_dict(), recipe.to_dict())
    if changed:
        lines = "; ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise ValueError(
            f"the run in {out} was started with another recipe ({lines}). Continue it with its own recipe ({out / 'recipe.toml'}), or start "
            "another run, which may begin with these weights (--model.weights)"
        )
    return checkpoint


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys whose change would make it another run, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        a, b, dotted = old.get(name), new.get(name), prefix + name
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, dotted + ".")
        elif a != b and dotted not in CHANGEABLE:
            found[dotted] = (a, b)
    return found


def _keep_freed_memory() -> None:
    """Let glibc keep freed activations for the next step instead of returning them to the system.

    By default every large tensor is mapped and zeroed anew, page by page, which costs small models up to a third of a
    step on a CPU. Elsewhere than on glibc there is no mallopt, and nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 64 * 2**20)


@contextlib.contextmanager
def torch_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """torch's global switches as the recipe wants them, and back."""
    threads = torch.get_num_threads()
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        _keep_freed_memory()
    if config.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    # A debugging aid that would write every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
