"""How weights move: the optimizer, the learning rate as a function of the step, and the averaged weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from volo.config import OptimConfig, Recipe, nearest
from volo.distributed import own_parts


def create_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """One of timm's optimizers over the model's parameters.

    Biases, norms and `model.no_weight_decay()` are not decayed. With `layer_decay` below 1 the groups carry an "lr_scale"
    by the layer of `model.group_matcher()`. Muon takes matrices and convolutions; heads, embeddings, biases and norms
    go to its AdamW, as its author advises.

    Raises ValueError for an unknown name, and for optimizers that need more than one gradient a step.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known = list_optimizers()
    if config.name not in known:
        raise ValueError(
            f"unknown optimizer {config.name!r}{nearest(config.name, known) or '.'} Known: {', '.join(known)}"
        )
    info = get_optimizer_info(config.name)
    if info.second_order:
        raise ValueError(
            f"optimizer {config.name!r} needs second derivatives, which the training loop does not compute"
        )
    options: dict = {}
    if "muon" in config.name:
        _choose_muon_precision(next(model.parameters()).device)
        options |= {"fallback_list": ("head.*", "aux_head.*", "*.conv_seg.*"), "fallback_no_weight_decay": True}
    elif info.opt_class in (torch.optim.AdamW, torch.optim.Adam):
        # One kernel instead of a dozen for every parameter, felt with small models and most of all on a CPU.
        options["fused"] = True
    return create_optimizer_v2(
        model,
        opt=config.name,
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=config.layer_decay if config.layer_decay != 1.0 else None,
        **options,
    )


def _choose_muon_precision(device: torch.device) -> None:
    """Let timm's Muon orthogonalise in float32 where the processor cannot multiply bfloat16, its fixed choice, and would
    emulate it: 1.5 s a step for 1.4 M parameters on an AVX2 EPYC, where float32 takes 0.1 s."""
    import timm.optim.muon as muon

    function = muon.zeropower_via_newtonschulz
    original = function.func if isinstance(function, partial) else function
    can_multiply = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    is_emulated = device.type == "cpu" and not can_multiply()
    muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32) if is_emulated else original


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, half a cosine or a power from `peak` to `min_lr`, then `min_lr`: a pure function of the step.

    With `decay_start` 0 and `every` one epoch it is the CosineLRScheduler of timm 0.4.5 as the original's main.py drives it.
    """

    peak: float
    warmup_lr: float
    min_lr: float
    warmup_steps: int
    decay_end: int
    total_steps: int
    decay: str = "cosine"
    """"cosine", "linear" or "poly"."""
    power: float = 1.0
    """Of "poly"."""
    decay_start: int = 0
    """The step that the decay counts from; in a warm-up it does not show."""
    every: int = 1
    """Steps between changes."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, steps_per_epoch: int) -> LearningRate:
        """Raises ValueError where the schedule contradicts itself."""
        schedule = recipe.schedule
        if schedule.steps:
            if not 0 <= schedule.warmup_steps <= schedule.steps:
                raise ValueError(
                    f"the schedule needs warmup_steps from 0 to steps; given: steps={schedule.steps}, "
                    f"warmup_steps={schedule.warmup_steps}. Set --schedule.warmup_steps"
                )
            warmup_steps, decay_end, total_steps = schedule.warmup_steps, schedule.steps, schedule.steps
        else:
            if (
                not 0 <= schedule.warmup_epochs <= schedule.epochs
                or (schedule.epochs <= 0 and not recipe.model.probe)
                or schedule.epochs < 0
                or schedule.cooldown_epochs < 0
            ):
                raise ValueError(
                    f"the schedule needs epochs > 0, warmup_epochs from 0 to epochs and cooldown_epochs >= 0; given: epochs={schedule.epochs}, "
                    f"warmup_epochs={schedule.warmup_epochs}, cooldown_epochs={schedule.cooldown_epochs}. Set --schedule.warmup_epochs"
                )
            warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
            decay_end = max(1, round(schedule.epochs * steps_per_epoch))
            total_steps = max(1, round((schedule.epochs + schedule.cooldown_epochs) * steps_per_epoch))
            if total_steps == 1 and not schedule.epochs and not schedule.cooldown_epochs:  # the linear probe alone
                total_steps = 0
        if schedule.power <= 0 or (schedule.power != 1 and schedule.decay != "poly"):
            raise ValueError(
                f"schedule.power is above 0, and belongs to the decay 'poly'; given: power={schedule.power:g}, "
                f"decay={schedule.decay!r}"
            )
        min_lr, warmup_lr = schedule.min_lr * recipe.lr_scale, schedule.warmup_lr * recipe.lr_scale
        if min_lr > recipe.peak_lr:
            raise ValueError(
                f"the learning rate falls from its peak to min_lr, but the peak is {recipe.peak_lr:.3g} and min_lr {min_lr:.3g}: "
                "raise --optim.lr or lower --schedule.min_lr"
            )
        return cls(
            peak=recipe.peak_lr,
            warmup_lr=min(warmup_lr, recipe.peak_lr),
            min_lr=min_lr,
            warmup_steps=warmup_steps,
            decay_end=decay_end,
            total_steps=total_steps,
            decay=schedule.decay,
            power=schedule.power,
            decay_start=warmup_steps if schedule.decay_begins == "after_warmup" else 0,
            every=steps_per_epoch if schedule.changes == "every_epoch" else 1,
        )

    def at(self, step: int) -> float:
        """The learning rate of the step that follows `step` finished ones."""
        step -= step % self.every
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak - self.warmup_lr) * step / self.warmup_steps
        if step >= self.decay_end:
            return self.min_lr
        done = (step - self.decay_start) / (self.decay_end - self.decay_start)
        left = 0.5 * (1.0 + math.cos(math.pi * done)) if self.decay == "cosine" else (1.0 - done) ** self.power
        return self.min_lr + (self.peak - self.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its "lr_scale" (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class WeightAverage:
    """Exponential moving average of a module's parameters and floating-point buffers (BatchNorm's statistics).

    The rule and its warm-up are those of timm's ModelEmaV3 (decay 1 - (1 + step)^(-2/3) up to `decay`). That class cannot
    hold a model of sharded parameters and plain buffers, and walks the whole state dict in every step.

    Attributes:
        module: the averaged copy, in eval mode; its state dict is the whole state.
    """

    def __init__(self, source: nn.Module, decay: float, warmup: bool) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay is between 0 and 1 (0 turns the average off); given: {decay}")
        self.decay = decay
        self.warmup = warmup
        self.module = copy.deepcopy(source).eval().requires_grad_(False)
        self._source = source
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def decay_at(self, step: int) -> float:
        """Decay of the update after `step` finished steps, counted from 1; the first update copies the weights."""
        if step <= 1:
            return 0.0
        return min(self.decay, 1.0 - step ** (-2.0 / 3.0)) if self.warmup else self.decay

    def share_of_start(self, steps: int) -> float:
        """How much of the weights it began with, or rather of those after the first step, is left after `steps` steps."""
        share = 1.0
        for step in range(2, steps + 1):
            share *= self.decay_at(step)
            if share < 1e-9:
                return 0.0
        return share

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights that the source has after `step` steps."""
        if not self._pairs:  # only now, for both may have been sharded since they were made
            self._pairs = list(zip(*(own_parts([*m.parameters(), *m.buffers()]) for m in (self.module, self._source))))
        floats = [pair for pair in self._pairs if pair[0].is_floating_point()]
        average = get_ema_multi_avg_fn(self.decay_at(step))
        average([a for a, _ in floats], [b for _, b in floats], step)
        for a, b in self._pairs:
            if not a.is_floating_point():
                a.copy_(b)
