"""Runs on images that are smaller than what their recipe was made for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from volo.cli.main import main
from volo.config import Recipe, load_recipe, recipe_to_toml
from volo.distributed import World
from volo.inference.model_source import load
from volo.training.image_size import fit_to_images
from volo.training.pipeline import train
from volo.training.plan import plan_training
from volo.training.report import NullReporter

HERE = World(0, 1, torch.device("cpu"))


class Messages(NullReporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


def draw(folder: Path, height: int, width: int, count: int = 8) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (height, width, 3)) + 120 * (label == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{i}.png")
    return folder


def recipe_on(
    tiny: Callable[..., Recipe], path: Path, size: int = 128, factor: float = 2.0, **changes: object
) -> Recipe:
    values = {"data.kind": "auto", "data.path": str(path), "data.img_size": size, "data.max_upscale": factor}
    return tiny(values | {"train.batch_size": 8, "schedule.epochs": 1} | changes)


@pytest.mark.parametrize(
    "height, width, size, factor, chosen",
    [
        (8, 9, 128, 2.0, 64),  # no smaller than that
        (50, 32, 128, 2.0, 64),
        (32, 70, 128, 3.0, 96),
        (33, 50, 128, 2.0, 96),  # 66 pixels, to the next multiple of 32
        (50, 60, 128, 2.0, 128),
        (32, 32, 128, 0.0, 128),  # off
        (32, 32, 48, 2.0, 48),  # never larger
        (300, 200, 128, 1.0, 128),
    ],
)
def test_small_images_make_small_runs(
    height: int, width: int, size: int, factor: float, chosen: int, tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    told = Messages()
    recipe = recipe_on(tiny, draw(tmp_path / "data", height, width, 3), size, factor)
    fitted = fit_to_images(recipe, HERE, told)
    assert fitted.data.img_size == chosen
    assert dataclasses.replace(fitted.data, img_size=size) == recipe.data
    assert len(told.texts) == (chosen != size)
    if told.texts:
        assert f"images of {chosen} in place of {size} pixels" in told.texts[0]
        assert f"these have {min(height, width)} " in told.texts[0]
    assert fit_to_images(fitted, HERE, told) == fitted, "a run's own recipe stays as it is"


def test_the_run_keeps_its_size_and_goes_on_with_it(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_on(tiny, draw(tmp_path / "data", 20, 28), **{"schedule.epochs": 2})
    result = train(recipe, tmp_path / "run")
    assert load_recipe(tmp_path / "run/recipe.toml").data.img_size == 64
    assert load(result.out).preprocessing.img_size == 64
    for same in (recipe, load_recipe(tmp_path / "run/recipe.toml")):
        assert train(same, tmp_path / "run", resume=True).total_steps == result.total_steps
    larger = dataclasses.replace(recipe.data, img_size=96, max_upscale=0.0)
    with pytest.raises(ValueError, match="img_size: 64 -> 96"):
        train(dataclasses.replace(recipe, data=larger), tmp_path / "run", resume=True)


def test_images_that_cannot_be_read_are_left_to_the_check(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = draw(tmp_path / "data", 20, 28)
    (folder / "train/a/0.png").write_bytes(b"no image")
    recipe = recipe_on(tiny, folder)
    assert fit_to_images(recipe, HERE, NullReporter()).data.img_size == 64
    with pytest.raises(ValueError, match=r"train/a/0\.png"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run/last.pt").exists()
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    assert fit_to_images(recipe, HERE, NullReporter()) == recipe


def test_tables_too(tiny: Callable[..., Recipe], make_table: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_on(tiny, make_table(tmp_path, 20), **{"data.label_columns": ("age",)})
    side = min(Image.open(next(tmp_path.rglob("*.png"))).size)
    assert 2 * side <= 64, "the table's images are small"
    assert fit_to_images(dataclasses.replace(recipe, task="table"), HERE, NullReporter()).data.img_size == 64


def test_a_plan_is_that_of_the_run(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    plan = plan_training(recipe_on(tiny, draw(tmp_path / "data", 20, 28)), tmp_path / "run", steps=1)
    assert plan["img_size"] == [64, 64]


@pytest.mark.parametrize("factor", [0.5, -1.0])
def test_a_factor_that_is_none(factor: float, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.max_upscale is a factor of at least 1"):
        train(recipe_on(tiny, draw(tmp_path / "data", 20, 28, 2), factor=factor), tmp_path / "run")


def test_who_names_a_size_gets_it(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_on(tiny, draw(tmp_path / "data", 20, 28))
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    words = ["train", str(tmp_path / "r.toml"), "--out"]
    assert main([*words, str(tmp_path / "fitted")]) == 0
    assert "images of 64 in place of 128 pixels" in "".join(capsys.readouterr())
    assert main([*words, str(tmp_path / "named"), "--data.img_size", "96", "--quiet"]) == 0
    sizes = [load_recipe(tmp_path / name / "recipe.toml").data.img_size for name in ("fitted", "named")]
    assert sizes == [64, 96]
