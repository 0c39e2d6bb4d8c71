"""Plans: tried with few images, scaled up, printed whatever the memory, with all that takes time in them."""

from __future__ import annotations

import dataclasses
import gc
import io
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from volo.cli.plan import show_plan
from volo.config import Recipe, load_recipe, recipe_from_dict, recipe_to_toml
from volo.data import loader
from volo.tasks.classify import ClassifyTask
from volo.training import annotator_cost
from volo.training import probe as probing
from volo.training.annotator_cost import map_grid, num_parameters, outline_annotator
from volo.training.loop import train
from volo.training.memory import is_out_of_memory
from volo.training.plan import plan_training
from volo.training.probe import probe

SHORT = {"schedule.epochs": 0.5, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}


def shown(plan: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=300)
    show_plan(console, plan)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in every batch that a task has seen."""
    sizes: list[int] = []
    forward = ClassifyTask.forward

    def noted(task: ClassifyTask, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sizes.append(len(batch["image"]))
        return forward(task, batch)

    monkeypatch.setattr(ClassifyTask, "forward", noted)
    return sizes


def test_few_pictures_are_tried_and_what_they_cost_is_scaled(tiny, tmp_path: Path, batches: list[int]) -> None:
    recipe = tiny({"train.accumulation": 2})
    small = plan_training(recipe, tmp_path)
    assert set(batches) == {2, 16}
    assert (small["micro_batch_size"], small["probed_micro_batch_size"]) == (64, 16)
    whole = plan_training(recipe, tmp_path, most_pictures=64)
    assert max(batches) == whole["probed_micro_batch_size"] == 64
    a, b = small["memory_bytes"], whole["memory_bytes"]
    assert all(a[name] == b[name] for name in ("weights", "gradients", "optimizer", "average"))
    assert 0.8 < a["activations"] / b["activations"] < 1.25
    same = ("steps", "pictures", "steps_per_epoch", "peak_lr", "evaluations", "num_parameters")
    assert all(small[name] == whole[name] for name in same)
    assert "scaled up from 16 images to 64" in shown(small)
    assert "activations and time are scaled" not in shown(whole)
    assert "scaled up from one micro batch" in shown(whole)


def test_a_step_is_as_many_micro_batches_as_the_recipe_has(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward count for each image, the update once."""
    recipe, forward = tiny({"train.accumulation": 2, "optim.name": "sgd"}), ClassifyTask.forward

    def slow(task: ClassifyTask, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(0.005 * len(batch["image"]))
        return forward(task, batch)

    update = torch.optim.SGD.step

    def slow_update(self: torch.optim.SGD, *arguments: Any) -> Any:
        time.sleep(0.2)
        return update(self, *arguments)

    monkeypatch.setattr(ClassifyTask, "forward", slow)
    monkeypatch.setattr(torch.optim.SGD, "step", slow_update)
    tried = probe(recipe, steps=2, most_pictures=16)
    # 128 images at 5 ms, an update of 200 ms, and what the model itself takes; a scaled update would take 1.6 s alone.
    assert 0.84 < min(tried.step_seconds) < 2.2
    assert tried.total_steps == probe(recipe, steps=1).total_steps


def test_real_steps_where_nobody_says_otherwise(tiny, batches: list[int]) -> None:
    real = probe(tiny({"train.accumulation": 2}), steps=2)
    assert batches == [64] * 6
    assert (real.pictures, len(real.step_seconds)) == (64, 2)
    assert real.seconds_a_step >= statistics.median(real.step_seconds) > 0


def test_fewer_pictures_where_memory_is_short(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny({"data.img_size": 32})
    each = plan_training(recipe, tmp_path)["memory_bytes"]["activations"] / 128
    monkeypatch.setattr(probing, "free_bytes", lambda device: round(2 * 5 * each))
    assert plan_training(recipe, tmp_path)["probed_micro_batch_size"] == 4
    monkeypatch.setattr(probing, "free_bytes", lambda device: 0)
    plan = plan_training(recipe, tmp_path)
    assert (plan["probed_micro_batch_size"], plan["step_seconds"], plan["seconds"]["all"]) == (0, [], None)
    assert plan["memory_bytes"]["all"] > 2 * plan["memory_bytes"]["weights"]
    assert "could not be measured: activations and optimizer" in shown(plan)
    assert "not measured: memory is too small" in shown(plan)


def test_out_of_memory_halves_the_batch_and_leaves_nothing(tiny, tmp_path: Path, monkeypatch) -> None:
    forward, sizes = ClassifyTask.forward, []

    def greedy(task: ClassifyTask, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sizes.append(len(batch["image"]))
        answer = forward(task, batch)
        if len(batch["image"]) > 4:
            torch.empty(1 << 60)  # nobody has so much
        return answer

    def graphs() -> int:
        """Tensors that are alive and still know what they were computed from."""
        gc.collect()
        return sum(type(o) is torch.Tensor and o.grad_fn is not None for o in gc.get_objects())

    before = graphs()
    monkeypatch.setattr(ClassifyTask, "forward", greedy)
    plan = plan_training(tiny(), tmp_path)
    assert list(dict.fromkeys(sizes)) == [2, 16, 8, 4]
    assert plan["probed_micro_batch_size"] == 4
    assert plan["seconds"]["all"] > 0
    assert graphs() == before


def test_errors_that_say_that_memory_is_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))


def test_a_decoder_with_batch_norm_gets_two_pictures(scenes: Path, tmp_path: Path) -> None:
    options = {"depths": [1, 1], "embed_dims": [16, 32], "num_heads": [1, 2], "stem_dim": 8, "channels": 16}
    recipe = recipe_from_dict(
        {
            "task": "segment",
            "model": {"name": "upernet_volo_nano", "options": {**options, "aux_channels": 8}},
            "data": {"path": str(scenes), "img_size": [32, 40], "num_workers": 0},
            "schedule": {"steps": 12, "warmup_steps": 3, "min_lr": 0.0},
            "train": {"batch_size": 4, "threads": 1, "device": "cpu"},
        }
    )
    assert plan_training(recipe, tmp_path, most_pictures=1)["probed_micro_batch_size"] == 2


def test_a_slow_input_pipeline_is_not_hidden_by_batches_made_ahead(tiny, tmp_path: Path, monkeypatch) -> None:
    recipe = tiny({"data.num_workers": 2, "augment.rand_augment": "rand-m5"})
    forward = ClassifyTask.forward
    with monkeypatch.context() as patched:
        patched.setattr(ClassifyTask, "forward", lambda task, batch: time.sleep(0.2) or forward(task, batch))
        quick = plan_training(recipe, tmp_path)
    assert (quick["limit"], quick["num_workers"]) == ("steps", 2)
    assert quick["seconds"]["step"] == statistics.median(quick["step_seconds"]) > quick["data_seconds"]
    assert "the steps are the limit" in shown(quick)
    make = loader.OneByOne.__call__

    def slow(self: loader.OneByOne, epoch: int, indices: Any) -> Any:
        time.sleep(0.08 * len(indices))
        return make(self, epoch, indices)

    monkeypatch.setattr(loader.OneByOne, "__call__", slow)
    plan = plan_training(recipe, tmp_path, most_pictures=4)
    # 128 images at 80 ms from two processes.
    assert 4.5 < plan["data_seconds"] < 9
    assert plan["limit"] == "data"
    assert plan["seconds"]["step"] == plan["data_seconds"] > max(plan["step_seconds"])
    assert plan["seconds"]["training"] == plan["steps"] * plan["data_seconds"]
    assert "the images are the limit" in shown(plan)


# Annotators


@pytest.mark.parametrize(
    ("model", "img_size", "grid", "millions"),
    [
        ("dm_nfnet_f6.dm_in1k", 0, (18, 18), 438),  # of the ImageNet recipes: 576 px
        ("vit_base_patch16_224", 0, (14, 14), 87),
        ("convnext_tiny", 384, (12, 12), 29),
        ("volo_d1", 0, (14, 14), 27),
        ("volo_d5.512", 0, (32, 32), 296),
        ("volo_d1.224", 320, (20, 20), 27),
    ],
)
def test_an_annotator_is_known_by_its_name(model: str, img_size: int, grid: tuple[int, int], millions: int) -> None:
    recipe = load_recipe("imagenet_volo_d1_224", {"annotator.model": model, "annotator.img_size": img_size})
    outline = outline_annotator(recipe, 1000, is_there=True)
    assert outline is not None
    assert (map_grid(outline), outline.model.num_classes) == (grid, 1000)
    assert round(num_parameters(outline) / 1e6) == millions


def test_an_annotator_nobody_knows() -> None:
    recipe = load_recipe("imagenet_volo_d1_224", {"annotator.model": "volo_d9"})
    with pytest.raises(ValueError, match="no annotator 'volo_d9'"):
        outline_annotator(recipe, 1000, is_there=True)


def with_annotator(recipe: Recipe, source: str = "maps", /, **options: Any) -> Recipe:
    return dataclasses.replace(
        recipe,
        task="token_label",
        token_label=dataclasses.replace(recipe.token_label, source=source),
        annotator=dataclasses.replace(recipe.annotator, **options),
    )


@pytest.fixture(scope="module")
def its_run(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotator")
    recipe = tiny(SHORT | {"loss.token_weight": 0.5})
    (folder / "its.toml").write_text(recipe_to_toml(recipe))
    assert train(recipe, folder / "run").status == "completed"
    return folder


def test_drawing_the_maps_is_in_the_plan(tiny, its_run: Path, tmp_path: Path, monkeypatch) -> None:
    for annotator in (
        {"model": str(its_run / "run")},
        {"recipe": str(its_run / "its.toml")},
        {"model": "resnet10t", "img_size": 64},  # of timm; its weights are not asked for
    ):
        plan = plan_training(with_annotator(tiny(SHORT), **annotator), tmp_path)
        maps = plan["label_maps"]
        assert maps["grid"] == [2, 2]
        assert maps["bytes"] > plan["num_train"] * 2 * 2 * 5 * 2
        assert maps["seconds"] == plan["seconds"]["label_maps"] > 0
        parts = plan["seconds"]["training"] + plan["seconds"]["evaluations"] + maps["seconds"]
        if "annotator" in plan:
            parts += plan["annotator"]["seconds"]["all"]
        assert plan["seconds"]["all"] == pytest.approx(parts)
        assert "to generate them" in shown(plan)
    assert not (tmp_path / "annotator").exists()
    monkeypatch.setattr(annotator_cost, "MOST_PARAMETERS", 1000)
    plan = plan_training(with_annotator(tiny(SHORT), model=str(its_run / "run")), tmp_path)
    assert (plan["label_maps"]["grid"], plan["label_maps"]["seconds"]) == ([2, 2], None)
    assert "generating them is not counted: an annotator of" in shown(plan)


def test_no_more_classes_are_kept_than_there_are(tiny, its_run: Path, tmp_path: Path) -> None:
    five, ten, more = (
        plan_training(with_annotator(tiny(SHORT), model=str(its_run / "run"), top=top), tmp_path, steps=1)
        for top in (5, 10, 50)
    )
    recipe = with_annotator(tiny(SHORT), model=str(its_run / "run"), encoding="compact")
    assert plan_training(recipe, tmp_path, steps=1)["label_maps"]["bytes"] < five["label_maps"]["bytes"]
    assert five["label_maps"]["bytes"] < ten["label_maps"]["bytes"] == more["label_maps"]["bytes"]


def test_a_live_annotator_is_in_the_steps(tiny, its_run: Path, tmp_path: Path, monkeypatch) -> None:
    here = plan_training(with_annotator(tiny(SHORT), "live", model=str(its_run / "run")), tmp_path)
    assert here["live_annotator"]["is_in_steps"]
    assert here["seconds"]["step"] == statistics.median(here["step_seconds"])
    assert here["memory_bytes"]["annotator"] == 4 * here["num_parameters"]
    assert "it looks on in the steps" in shown(here)

    to_be_trained = with_annotator(tiny(SHORT), "live", recipe=str(its_run / "its.toml"))
    plan = plan_training(to_be_trained, tmp_path)
    added = plan["live_annotator"]["seconds_a_picture"] * plan["batch_size"]
    assert added > 0
    assert plan["seconds"]["step"] == pytest.approx(statistics.median(plan["step_seconds"]) + added)
    assert plan["seconds"]["all"] > plan["annotator"]["seconds"]["all"] > 0
    assert "on top of the steps" in shown(plan)
    monkeypatch.setattr(annotator_cost, "MOST_PARAMETERS", 1000)
    assert "its time is not counted: an annotator of" in shown(plan_training(to_be_trained, tmp_path, steps=1))


def test_a_live_annotator_that_a_run_has_trained(tiny, its_run: Path, tmp_path: Path) -> None:
    (tmp_path / "annotator").symlink_to(its_run / "run")
    plan = plan_training(with_annotator(tiny(SHORT), "live", recipe=str(its_run / "its.toml")), tmp_path, steps=1)
    assert "annotator" not in plan
    assert plan["live_annotator"]["is_in_steps"]
