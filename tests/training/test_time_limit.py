"""Runs that end in time, and go on as they were begun."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from volo.config import Recipe, load_recipe
from volo.training.pipeline import train
from volo.training.plan import plan_training
from volo.training.report import NullReporter
from volo.training.time_limit import fit_into_time, with_epochs


class Messages(NullReporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


def test_as_many_epochs_as_fit(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    told, started = Messages(), time.monotonic()
    recipe = tiny({"schedule.minutes": 0.25, "schedule.epochs": 500, "schedule.warmup_epochs": 100})
    result = train(recipe, tmp_path / "run", reporter=told)
    assert time.monotonic() - started < 45, "15 seconds were asked for, and the machine may be busy"
    kept = load_recipe(tmp_path / "run/recipe.toml").schedule
    assert 1 <= kept.epochs < 500 and kept.minutes == 0.25 and kept.warmup_epochs <= kept.epochs / 5
    assert result.status == "completed" and result.step > 0
    assert any(f"{kept.epochs:g} epochs fit into 0.25 minutes" in text for text in told.texts)
    # However fast the machine is now, the run stays what it is.
    again = train(recipe, tmp_path / "run", resume=True)
    assert again.total_steps == result.total_steps
    assert load_recipe(tmp_path / "run/recipe.toml").schedule == kept


def test_other_minutes_are_refused_before_anything_is_measured(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    train(tiny({"schedule.minutes": 60, "schedule.epochs": 1}), tmp_path / "run")
    told = Messages()
    with pytest.raises(ValueError, match=r"begun with schedule\.minutes 60, for which it chose 1 epochs; given: 30"):
        train(tiny({"schedule.minutes": 30, "schedule.epochs": 1}), tmp_path / "run", resume=True, reporter=told)
    assert told.texts == []


def test_a_limit_holds_for_runs_that_prepare_label_maps(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    """Their folder has a recipe before anything is measured."""
    first = tmp_path / "first"
    train(tiny({"schedule.epochs": 1}), first)
    recipe = tiny(
        {"schedule.minutes": 0.15, "schedule.epochs": 1000, "annotator.model": str(first), "token_label.source": "maps"}
    )
    result = train(dataclasses.replace(recipe, task="token_label"), tmp_path / "run")
    assert result.status == "completed" and load_recipe(tmp_path / "run/recipe.toml").schedule.epochs < 1000


def test_progressive_resizing_is_cut_with_the_run(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny({"schedule.small_size": 8, "schedule.small_epochs": 6})
    for epochs, size, small in ((1.0, 0, 0), (4.0, 8, 2), (100.0, 8, 6)):
        schedule = with_epochs(recipe, epochs).schedule
        assert (schedule.small_size, schedule.small_epochs) == (size, small)


def test_no_more_than_the_recipe_asks_for(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    result = train(tiny({"schedule.minutes": 60, "schedule.epochs": 1}), tmp_path / "run")
    plain = train(tiny({"schedule.epochs": 1}), tmp_path / "plain")
    assert load_recipe(tmp_path / "run/recipe.toml").schedule.epochs == 1
    assert abs(result.total_steps - plain.total_steps) <= 2  # the cool-down is cut to a tenth of the run


def test_an_existing_run_is_refused_before_anything_is_measured(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    train(tiny({"schedule.epochs": 1}), tmp_path / "run")
    told = Messages()
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(tiny({"schedule.minutes": 1}), tmp_path / "run", reporter=told)
    assert told.texts == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schedule.minutes": -1}, "above 0"), ({"schedule.minutes": 1, "schedule.steps": 5}, "leave it at 0")],
)
def test_limits_that_are_none(change: dict, message: str, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(change), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_nothing_changes(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny()
    assert fit_into_time(recipe, tmp_path, None, NullReporter(), started=0.0) is recipe  # type: ignore[arg-type]


def test_a_plan_says_what_would_fit(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    plan = plan_training(tiny({"schedule.minutes": 0.1, "schedule.epochs": 10_000}), tmp_path)
    assert 0 < plan["epochs"] < 5_000 and plan["seconds"]["all"] < 9
    with pytest.raises(ValueError, match="above 0"):
        plan_training(tiny({"schedule.minutes": -1}), tmp_path)
