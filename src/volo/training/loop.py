"""Train: one recipe in, one run folder out. What is trained, and on what, is a `Workload`; this is the loop.

Everything random is a function of (seed, step) or (seed, epoch, image), never of what happened before in the process. A
checkpoint therefore needs no generator states, and a run that was cut off continues bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from volo import __version__
from volo.config import Recipe
from volo.data import keyed
from volo.data.files import FolderLock
from volo.data.transforms import height_width
from volo.distributed import (
    ShardedModel,
    Vote,
    World,
    agree_on_start,
    gather_full,
    gradient_sync,
    join_world,
    load_optimizer_into,
    load_weights_into,
    main_first,
    main_only,
    mean_over_ranks,
    own_parts,
    prepare_batch_norm,
    replicate,
    shard,
    share_buffers,
)
from volo.inference.evaluate import AMP_DTYPES
from volo.models.checkpoint import FORMAT, save_checkpoint
from volo.models.fuse import use_training_kernels
from volo.models.volo import VOLO
from volo.training import run_folder
from volo.training.clock import Mark
from volo.training.linear_probe import check_probe, fit_head
from volo.training.optim import LearningRate, WeightAverage, create_optimizer, set_learning_rate
from volo.training.report import NullReporter, Reporter, RunInfo, RunLog, StepReport, TrainResult, write_summary
from volo.training.settings import Interrupted, StopSignals, torch_settings
from volo.training.workloads.classification import Classification
from volo.training.workloads.segmentation import Segmentation
from volo.training.workloads.table import Table
from volo.training.workloads.token_labeling import TokenLabeling
from volo.training.workloads.workload import OpenWorkload, Workload

WORKLOADS: dict[str, OpenWorkload] = {
    "classify": Classification,
    "token_label": TokenLabeling,
    "segment": Segmentation,
    "table": Table,
}
"""Who opens the workload of a recipe, by its `task`."""
NOTICEABLE = 0.01
"""Of a random start, a share in the averaged weights that costs accuracy."""


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
    workload: OpenWorkload | None = None,
) -> TrainResult:
    """Run `recipe` and leave its results in the folder `out` (`volo.training.run_folder`). Label maps that it names are
    there already: see `volo.training.pipeline`.

    The first Ctrl-C or SIGTERM ends the run after the current step, or a wait for data within seconds, with a checkpoint
    and status "interrupted"; the second ends it at once. When a step fails, or the data for it, the last whole step is
    saved first. Under torchrun every process calls this; the first one writes and reports.

    Args:
        resume: continue from `out`/last.pt; where there is none yet, start from the beginning.
        overwrite: replace a run that is already in `out`.
        kept: the recipe that the folder keeps, where it differs from `recipe` in places of files.
        workload: opens what is trained, in place of the workload of `recipe.task`: a network that is no VOLO, for example.
            What it leaves in `out` is for it alone to read: the rest of the library knows the models of `WORKLOADS`.

    Raises:
        FileExistsError: `out` holds a run, and neither `resume` nor `overwrite` is set, or files of somebody else that a
            run would replace.
        ValueError: the recipe contradicts itself, the data, the machine or (with `resume`) the run in `out`; another
            process trains there.
        NonFiniteLossError: training diverged; last.pt is from before.
        OSError: a file cannot be written (disk full); the checkpoints on the disk are whole.
    """
    out = Path(out)
    reporter = reporter or NullReporter()
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join_world(recipe.train.device))
        stack.enter_context(torch_settings(recipe.train, world.device))
        if not world.is_main:
            reporter = NullReporter()
        main_only(world, lambda: stack.enter_context(FolderLock(out, "training")) is None)
        # Nobody writes before all have looked.
        checkpoint = agree_on_start(run_folder.look_into(out, recipe, resume, overwrite), world)
        opened = open_workload(recipe, world, reporter, workload)
        run = Run(kept or recipe, out, opened, world, reporter, checkpoint)
        del checkpoint
        return run.run(fresh=not resume)


def open_workload(recipe: Recipe, world: World, reporter: Reporter, opened_by: OpenWorkload | None = None) -> Workload:
    if recipe.model.probe:
        check_probe(recipe)
    opened_by = opened_by or WORKLOADS[recipe.task]
    workload = opened_by(recipe, world, lambda done, total: reporter.on_progress("checking images", done, total))
    for note in workload.notes:
        reporter.on_message(note)
    return workload


class Run:
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
            if recipe.model.probe:
                reporter.on_message(fit_head(recipe, cast(VOLO, model), workload, world, reporter))
        else:
            model = workload.restore_model(checkpoint["model_config"])
        self.model_config = workload.model_config(model)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        task = prepare_batch_norm(workload.create_task(model), config, world)
        task.to(world.device)
        if world.device.type == "cpu":
            use_training_kernels(task)
        self.is_sharded = config.parallel == "fsdp" and world.size > 1
        if config.channels_last and not self.is_sharded:  # shards are flat; the images alone make convolutions follow
            task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = None
        if recipe.optim.ema_decay:
            self.ema = WeightAverage(task, recipe.optim.ema_decay, recipe.optim.ema_warmup)
            kept = 0.0 if recipe.optim.ema_warmup else self.ema.share_of_start(self.rate.total_steps)
            if checkpoint is None and not recipe.model.weights and kept > NOTICEABLE:
                reporter.on_message(
                    f"the averaged weights, which are evaluated and exported, keep {100 * kept:.0f} % of the random start after "
                    f"{self.rate.total_steps:,} steps: let them forget it with --optim.ema_warmup true"
                )
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
        self.evaluated_step = -1 if recipe.model.probe else 0  # a probe is worth an evaluation before the first step
        self.saved_step = -1
        self.metrics: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.confusion: Tensor | None = None
        self.earlier_seconds = 0.0
        self.metrics_bytes = 0
        if checkpoint is not None:
            self._restore(checkpoint)

        self.started = time.monotonic()
        self.mark = Mark(world.device)
        # Several processes go on together for as long as they can.
        self.signals = StopSignals(patience=3.0 if world.size == 1 else 15.0)
        self.pending: deque[_PendingStep] = deque()
        self.log: RunLog | None = None
        self.last_lr = 0.0
        self.step_seconds = 0.0
        self.timed_steps = 0

    def run(self, fresh: bool) -> TrainResult:
        info = RunInfo(
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
            self.step,
            self.workload.score,
        )
        if self.world.is_main:
            run_folder.prepare(self.out, self.recipe, is_fresh=fresh, is_first_step=self.saved_step < 0)
            run_folder.list_held_out(self.out, self.workload.held_out())
            self.log = RunLog(self.out, self.metrics_bytes, self.step, self.config.tensorboard)
        self.reporter.on_start(info)
        try:
            with self.signals:
                signal_number = self._loop()
            result = self._result(signal_number)
            if self.world.is_main:
                write_summary(info, result)
        finally:
            if self.log is not None:
                self.log.close()
        self.reporter.on_end(result)
        return result

    def _loop(self) -> int:
        """Steps, evaluations and saves until the end (returns 0) or a signal (returns its number)."""
        vote, saved_at = Vote(self.world), time.monotonic()
        self.mark = Mark(self.world.device)
        with contextlib.closing(self.workload.batches(self.step, self.rate.total_steps)) as batches:  # type: ignore[type-var]
            while True:
                self._write_steps()
                if self._is_evaluation_due() and self._evaluate():
                    saved_at = time.monotonic()
                done = self.step >= self.rate.total_steps
                save_due = self.world.is_main and time.monotonic() - saved_at >= 60 * self.config.checkpoint_minutes
                if save_due:
                    saved_at = time.monotonic()
                signal_number, save = vote(self.signals.received, save_due)
                if (done or signal_number or save) and self.saved_step != self.step:
                    self._save()
                    saved_at = time.monotonic()
                if done or signal_number:
                    vote.close()
                    return 0 if done and not self._is_evaluation_due() else signal_number
                try:
                    self.train_step(batches)
                except Interrupted:
                    return self.signals.received

    @contextlib.contextmanager
    def _saving_first(self) -> Iterator[None]:
        """What fails inside (data that cannot be read, memory, another process that is gone) ends the run; the last whole
        step is saved before. The weights must be those of that step."""
        try:
            yield
        except Exception as error:
            # Shards of the weights lie with processes that may be gone.
            if self.log is not None and not self.is_sharded and self.step not in (0, self.saved_step):
                self._save()
            if self.signals.received:  # the wait was given up, or another process has gone before this one
                raise Interrupted from error
            if self.saved_step > 0:
                error.add_note(f"Step {self.saved_step:,} is saved in {self.out / 'last.pt'}: go on with --resume")
            raise

    # A step

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        self.last_lr = self.rate.at(self.step)
        set_learning_rate(self.optimizer, self.last_lr)
        with self._saving_first():
            values = self._gradients(batches)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        values = _to_host(values)
        start, self.mark = self.mark, Mark(self.world.device)
        self.pending.append(_PendingStep(self.step, self.last_lr, values, start, self.mark, self._seconds()))

    def _gradients(self, batches: Iterator[dict[str, Tensor]]) -> Tensor:
        """Forward and backward passes of a step; [loss, gradient norm]. The model is left as it was if one fails."""
        config, device = self.config, self.world.device
        sums = torch.zeros(2, device=device)  # loss and weight of all micro batches
        weight: Tensor | None = None
        statistics = [buffer.clone() for buffer in self.task.buffers()]
        try:
            for micro in range(config.accumulation):
                with self.signals.waiting():
                    batch = next(batches)
                # After the batch is there: transforms that run in this process may draw from the same generator.
                _seed(int(keyed.key(keyed.STEP, config.seed, self.step, micro, self.world.rank)[0]), device)
                with torch.no_grad():
                    batch = self.workload.prepare(batch)
                if config.channels_last:
                    batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
                with gradient_sync(self.wrapped, enabled=micro == config.accumulation - 1):
                    with torch.autocast(device.type, AMP_DTYPES[config.amp], enabled=config.amp != "off"):
                        result = self.wrapped(batch)
                    weight = result.get("weight")
                    loss = result["loss"] if weight is None else result["loss"] * weight
                    self.scaler.scale(loss / config.accumulation).backward()
                sums += torch.stack([loss.detach(), torch.ones_like(loss) if weight is None else weight])
        except Exception:
            with torch.no_grad():
                for buffer, before in zip(self.task.buffers(), statistics):
                    buffer.copy_(before)
            raise
        loss, total = mean_over_ranks(sums / config.accumulation, self.world)
        if weight is not None:
            # Only now is it known how much counts in the whole batch.
            total = total.clamp(min=torch.finfo(total.dtype).tiny)
            loss = loss / total
            for gradient in own_parts(p.grad for p in self.task.parameters() if p.grad is not None):
                gradient /= total
        norm = torch.zeros_like(loss)
        if self.recipe.optim.clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.task.parameters(), self.recipe.optim.clip_grad)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return torch.stack([loss, norm])

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
        if not self.workload.num_val or self.step == self.evaluated_step:
            return False
        if self.step == 0:
            return self.recipe.model.probe
        if self.step >= self.rate.total_steps:
            return True
        every = self.config.eval_steps or self.config.eval_every * self.workload.steps_per_epoch
        if every <= 0:
            return False
        every = max(every, 1.0)
        return self.step == round(round(self.step / every) * every)

    def _evaluate(self) -> bool:
        """Score the held-out images and save; False if a signal cut it short: it is made up for after a restart."""
        self._write_steps(wait=True)
        scored = self.averaged_task or self.task
        share_buffers(scored, self.world)

        def on_batch(done: int) -> None:
            self.reporter.on_progress("evaluating", done * self.world.size, self.workload.num_val)
            if self.signals.received and self.world.size == 1:
                raise Interrupted

        num_not_finite = torch.zeros((), device=self.world.device)

        def on_outputs(model: nn.Module, inputs: Any, outputs: Tensor) -> None:
            num_not_finite.add_(~outputs.isfinite().all())

        model = scored.get_submodule("model")
        if self.is_sharded:
            blank = torch.zeros(1, 3, *height_width(self.recipe.data.img_size), device=self.world.device)
            model = ShardedModel(scored, blank)
        watching = model.register_forward_hook(on_outputs)
        try:
            # Several processes stay together: one may not leave the evaluation alone.
            with self._saving_first(), self.signals.waiting(self.world.size == 1):
                metrics = self.workload.evaluate(model, on_batch)
        except Interrupted:
            return False
        finally:
            watching.remove()
            self.mark = Mark(self.world.device)
        confusion = torch.tensor(metrics.pop("confusion"), dtype=torch.int64)
        self.metrics = {"step": self.step, "epoch": self._epoch(self.step), **metrics}
        self.evaluated_step = self.step
        score = self.workload.score
        is_finite = not mean_over_ranks(num_not_finite, self.world).item()
        if not is_finite:
            self.reporter.on_message(
                f"the evaluation after step {self.step:,} met outputs that are NaN or infinite: its figures mean little, and it is not taken for "
                f"the best one"
            )
        is_best = is_finite and self.metrics[score] > self.best.get(score, -math.inf)
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
            self.saved_step = (
                self.step
            )  # as the first one will have it: whether to save again is every process's to know
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
                "images": self.images,
                "world_size": self.world.size,
            },
            "volo_version": __version__,
            "torch_version": str(torch.__version__),
        }
        # best.pt first: a last.pt that speaks of a best evaluation implies the file.
        if is_best:
            save_checkpoint(self.out / "best.pt", {**checkpoint, "optimizer": None, "scaler": None})
        save_checkpoint(self.out / "last.pt", checkpoint)
        self.saved_step = self.step
        self.reporter.on_checkpoint(self.out / "last.pt", self.step)
        self.mark = Mark(self.world.device)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        history = checkpoint["history"]
        if list(self.workload.classes) != checkpoint["classes"]:
            raise ValueError(
                f"the run in {self.out} was begun with {len(checkpoint['classes'])} classes, and the data now has {len(self.workload.classes)}, or "
                "other class names. Give it the same data, or start a new run"
            )
        run_folder.require_same_images(self.out, history.get("images", {}), self.images)
        load_weights_into(self.model, checkpoint["model"])
        if self.averaged_model is not None:
            load_weights_into(self.averaged_model, checkpoint["ema"])
        load_optimizer_into(self.optimizer, checkpoint["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step = self.saved_step = checkpoint["step"]
        self.metrics, self.best, self.confusion = checkpoint["metrics"], checkpoint["best"], checkpoint["confusion"]
        self.evaluated_step = history["evaluated_step"]
        self.metrics_bytes = history["metrics_bytes"]
        self.earlier_seconds = history["seconds"]
        if history["world_size"] != self.world.size:
            self.reporter.on_message(
                f"continued with {self.world.size} processes instead of {history['world_size']}: the same images in the same steps, but "
                "other random draws for dropout and mixing"
            )

    # Small things

    @cached_property
    def images(self) -> dict[str, Any]:
        return self.workload.list_images()

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


@dataclass
class _PendingStep:
    """A step the host has finished while the device may still be at it."""

    step: int
    lr: float
    values: Tensor
    """Loss and gradient norm, on the host once `end` is reached."""
    start: Mark
    end: Mark
    at_seconds: float


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
