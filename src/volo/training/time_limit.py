"""How many epochs fit into so many minutes: speed is measured once, by a few steps of the run itself."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from volo.config import Recipe, recipe_from_dict
from volo.distributed import World, main_only
from volo.models.checkpoint import load_checkpoint
from volo.training.probe import Probe, probe
from volo.training.report import NullReporter, Reporter

EVALUATION_SHARE = 1 / 3
"""Time of an image in an evaluation, which has no backward pass, as a share of that in a training step."""
END_SECONDS = 4.0
"""For the last checkpoint and the figures."""
SPARE = 0.94
"""Share of the time that is planned for: speed changes while a machine gets warm or others use it."""


def fit_into_time(
    recipe: Recipe, out: Path, world: World, reporter: Reporter, *, started: float, resume: bool = False
) -> Recipe:
    """`recipe` with as many epochs as fit into `schedule.minutes` since `started` (of time.monotonic), at most its own.

    A run in `out` that is continued has its epochs already; they are taken over. All processes must call it.
    Raises ValueError as `train` does, and for a limit that is no time.
    """
    schedule = recipe.schedule
    if not schedule.minutes:
        return recipe
    check_limit(recipe)

    def chosen_before() -> float | None:
        if not resume or not (out / "last.pt").is_file():
            return None
        its = recipe_from_dict(load_checkpoint(out / "last.pt")["recipe"]).schedule
        if its.minutes != schedule.minutes:
            raise ValueError(
                f"the run in {out} was begun with schedule.minutes {its.minutes:g}, for which it chose {its.epochs:g} epochs; given: "
                f"{schedule.minutes:g}. Continue it as it is, or start another run with its weights (--model.weights {out})"
            )
        return its.epochs

    epochs = main_only(world, chosen_before)
    if epochs is None and schedule.epochs:
        with _said_later():
            measured = probe(recipe, most_pictures=None, reporter=_ProgressAlone(reporter))
        epochs = main_only(world, lambda: epochs_that_fit(recipe, measured, time.monotonic() - started))
        step = measured.seconds_a_step
        reporter.on_message(
            f"{epochs:g} epochs fit into {schedule.minutes:g} minutes at {recipe.train.batch_size / step:,.0f} images/s"
            + (f", of {schedule.epochs:g} at most" if epochs < schedule.epochs else ", all that the recipe asks for")
        )
    return with_epochs(recipe, epochs or 0.0)


@contextlib.contextmanager
def _said_later() -> Iterator[None]:
    """Keep quiet of what loading weights has to say: it is loaded again for the run."""
    logger = logging.getLogger("volo")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


class _ProgressAlone(NullReporter):
    """What is to be said of the data and the model the run itself will say."""

    def __init__(self, reporter: Reporter) -> None:
        self.on_progress = reporter.on_progress  # type: ignore[method-assign]


def check_limit(recipe: Recipe) -> None:
    """Raises ValueError for a limit that is no time, or that goes with nothing else."""
    schedule = recipe.schedule
    if schedule.minutes < 0 or not math.isfinite(schedule.minutes):
        raise ValueError(
            f"schedule.minutes is a number of minutes above 0, or 0 for no limit; given: {schedule.minutes}"
        )
    if schedule.steps:
        raise ValueError("schedule.minutes chooses epochs; with schedule.steps leave it at 0")


def with_epochs(recipe: Recipe, epochs: float) -> Recipe:
    """`recipe` with so many epochs; what was meant for a long run is cut to fit into a short one."""
    schedule = recipe.schedule
    small_epochs = min(schedule.small_epochs, int(epochs / 2))
    return dataclasses.replace(
        recipe,
        schedule=dataclasses.replace(
            schedule,
            epochs=epochs,
            warmup_epochs=min(schedule.warmup_epochs, epochs / 5),
            cooldown_epochs=min(schedule.cooldown_epochs, epochs / 10),
            small_epochs=small_epochs,
            small_size=schedule.small_size if small_epochs else 0,
        ),
    )


def epochs_that_fit(recipe: Recipe, measured: Probe, seconds_gone: float) -> float:
    """Whole epochs, or, where not one fits, the tenths of one, for `schedule.minutes` of which so many seconds are gone."""
    schedule, per_epoch = recipe.schedule, measured.workload.steps_per_epoch
    step = statistics.median(measured.step_seconds)
    if measured.workload.num_workers and measured.data_seconds:
        step = max(step, measured.data_seconds)
    evaluation = EVALUATION_SHARE * step * measured.workload.num_val / recipe.train.batch_size
    steps = recipe.train.eval_steps or recipe.train.eval_every * per_epoch
    every = max(steps, 1.0) / per_epoch if steps > 0 else math.inf
    # The run prepares once more what was prepared for the measurement.
    available = SPARE * (60 * schedule.minutes - seconds_gone - measured.prepare_seconds) - END_SECONDS - 2 * evaluation
    epochs = available / (step * per_epoch + evaluation / every)
    whole = math.floor(epochs) if epochs >= 1 else max(math.floor(10 * epochs) / 10, 0.0)
    least = 0.0 if recipe.model.probe else max(0.1, round(1 / per_epoch, 4))
    return min(schedule.epochs, max(float(whole), least))
