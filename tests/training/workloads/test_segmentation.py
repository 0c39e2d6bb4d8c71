"""Training a segmentation model: it learns, the same seed gives the same run, and a killed run ends as if it had not been."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from volo.config import Recipe, recipe_from_dict
from volo.data.loader import MaskEvalLoader
from volo.data.masks import open_split
from volo.data.transforms import PixelPipeline
from volo.inference.model_source import load
from volo.inference.score import evaluate
from volo.inference.segment_evaluate import HowToTest, evaluate_segmentation
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter


def street(scenes: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    values: dict[str, Any] = {
        "task": "segment",
        "model": {
            "name": "fpn_volo_nano",
            "drop_path_rate": 0.1,
            "options": {
                "depths": [1, 1],
                "embed_dims": [16, 32],
                "num_heads": [1, 2],
                "stem_dim": 8,
                "patch_size": 4,
                "channels": 16,
                "aux_channels": 8,
            },
        },
        "data": {"path": str(scenes), "img_size": [32, 40], "num_workers": 0},
        "segment": {"scale": [0.8, 1.25], "class_weights": "log"},
        "optim": {"lr": 5e-3, "ema_decay": 0.95, "layer_decay": 0.9},
        "schedule": {"steps": 12, "warmup_steps": 3, "decay": "linear", "min_lr": 0.0},
        "train": {"batch_size": 4, "threads": 1, "tensorboard": False, "device": "cpu", "eval_steps": 6},
    }
    for dotted, value in (overrides or {}).items():
        section, name = dotted.split(".", 1)
        values.setdefault(section, {})[name] = value
    return recipe_from_dict(values)


def metrics_lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def assert_same_run(out: Path, reference: Path) -> None:
    a, b = (load_checkpoint(folder / "last.pt") for folder in (out, reference))
    for part in ("model", "ema"):
        assert [k for k in a[part] if not torch.equal(a[part][k], b[part][k])] == []
    assert (a["step"], a["best"], a["metrics"]) == (b["step"], b["best"], b["metrics"])
    assert metrics_lines(out) == metrics_lines(reference)


class StopAt(NullReporter):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, report) -> None:
        if report.step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def lesions(scenes: Path, tmp_path: Path) -> Path:
    """images/ and masks/ of 0 and 255, no splits and no word about classes."""
    root = tmp_path / "lesions"
    for kind, name in (("images", "images"), ("annotations", "masks")):
        shutil.copytree(scenes / kind / "train", root / name)
    for path in (root / "masks").iterdir():
        Image.fromarray(np.where(np.array(Image.open(path)) == 2, 255, 0).astype(np.uint8)).save(path)
    return root


SHORT = {"schedule.steps": 4, "train.eval_steps": 4, "data.val_fraction": 0.3}


def rewrite(root: Path, function) -> None:
    for path in (root / "masks").iterdir():
        Image.fromarray(function(np.array(Image.open(path))).astype(np.uint8)).save(path)


class Listening(NullReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_message(self, text: str) -> None:
        self.said.append(text)


def test_what_masks_mean_stays_with_the_run(lesions: Path, tmp_path: Path) -> None:
    reporter = Listening()
    train(street(lesions, SHORT), tmp_path / "run", reporter=reporter)
    assert sum("255 is the object" in said for said in reporter.said) == 1
    assert sum("7 training images and 3 held out, chosen by split_seed 0" in said for said in reporter.said) == 1
    assert len(reporter.said) == len(set(reporter.said))
    loaded = load(tmp_path / "run")
    assert loaded.classes == ("background", "object") and loaded.object_value == 255
    plain = evaluate(loaded)
    assert plain["count"] == 3 and plain["miou"] == pytest.approx(loaded.metrics["miou"], abs=1e-6)
    assert evaluate(loaded, lesions)["miou"] == plain["miou"]
    other = evaluate(loaded, lesions.rename(tmp_path / "moved"))
    assert other["count"] == 10 and other["data"] == f"all of {tmp_path / 'moved'}", (
        "of other data everything is scored"
    )
    # The same masks, written otherwise.
    rewrite(tmp_path / "moved", lambda mask: mask // 255)
    with pytest.raises(ValueError, match="as if 1 were the object; the model learned from masks with 255"):
        evaluate(loaded, tmp_path / "moved")
    assert evaluate(loaded, tmp_path / "moved", object_value=1)["miou"] == other["miou"]


def test_void_is_no_object_of_a_model_that_learned_it_as_void(lesions: Path, tmp_path: Path) -> None:
    rewrite(lesions, lambda mask: np.maximum(mask // 255, 255 * (np.arange(len(mask)) < 3)[:, None]))
    (lesions / "classes.txt").write_text("lesion")
    train(street(lesions, SHORT), tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.object_value == 1
    rewrite(lesions, lambda mask: np.where(mask == 1, 255, 0))
    for model in (loaded, dataclasses.replace(loaded, extras={})):  # of a run before there was such a key
        with pytest.raises(
            ValueError, match="as if 255 were the object; the model learned .* 1 for the object and 255 for void"
        ):
            evaluate(model, lesions)
        with pytest.raises(ValueError, match="as if 255 were the object"):
            evaluate(model)
    assert evaluate(loaded, lesions, object_value=255)["count"] == 3


def test_a_run_is_not_continued_with_other_held_out_images(lesions: Path, tmp_path: Path) -> None:
    assert train(street(lesions, SHORT), tmp_path / "run", reporter=StopAt(2)).status == "interrupted"
    for kind in ("images", "masks"):
        shutil.copy(lesions / kind / "00.png", lesions / kind / "99.png")
    with pytest.raises(ValueError, match="begun with 7 training images; there are 8 now"):
        train(street(lesions, SHORT), tmp_path / "run", resume=True)
    for kind in ("images", "masks"):
        (lesions / kind / "99.png").unlink()
    assert train(street(lesions, SHORT), tmp_path / "run", resume=True).status == "completed"


@pytest.fixture(scope="module")
def reference(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    assert train(street(scenes), out).status == "completed"
    return out


def test_it_learns(scenes: Path, tmp_path: Path) -> None:
    recipe = street(scenes, {"schedule.steps": 60, "train.eval_steps": 60, "optim.ema_decay": 0.0})
    result = train(recipe, tmp_path / "run")
    losses = [line["loss"] for line in metrics_lines(tmp_path / "run") if line["kind"] == "step"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert result.best["miou"] > 0.6, result.best
    assert result.best["pixel_accuracy"] > 0.85


def test_what_a_run_leaves_behind(reference: Path, scenes: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["best"]["per_class_iou"].keys() == {"sky", "ground", "box"}
    assert summary["best"].keys() >= {"miou", "pixel_accuracy", "mean_class_accuracy", "boundary_iou", "loss", "step"}
    evaluations = [line for line in metrics_lines(reference) if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [6, 12]
    loaded = load(reference / "best.pt")
    assert loaded.classes == ("sky", "ground", "box")
    assert loaded.extras["colours"][2] == [220, 20, 60]
    with pytest.raises(ValueError, match="segmentation model.*volo segment"):
        load(reference / "best.pt", task="classify")
    # The weights on the disk score what the log says.
    recipe = loaded.recipe
    pictures, _ = open_split(recipe.data, recipe.segment, "val")
    figures = evaluate_segmentation(
        loaded.model,
        MaskEvalLoader(pictures, recipe.data, recipe.segment, batch_size=1),
        PixelPipeline(recipe.data),
        num_classes=3,
        device="cpu",
        how=HowToTest.from_config(recipe.segment, recipe.data.img_size),
    )
    assert figures["miou"] == pytest.approx(loaded.metrics["miou"], abs=1e-9)


def test_the_same_seed_gives_the_same_run_whatever_the_workers(scenes: Path, tmp_path: Path, reference: Path) -> None:
    train(street(scenes, {"data.num_workers": 2}), tmp_path / "run")
    assert_same_run(tmp_path / "run", reference)
    train(street(scenes, {"train.seed": 1, "schedule.steps": 3, "schedule.warmup_steps": 1}), tmp_path / "other")
    assert metrics_lines(tmp_path / "other")[0]["loss"] != metrics_lines(reference)[0]["loss"]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train.amp": "bf16", "train.accumulation": 2, "segment.ohem": 0.7, "segment.ohem_min_kept": 200},
        {"model.name": "upernet_volo_nano", "optim.name": "nmuon", "segment.test": "slide", "optim.layer_decay": 1.0},
    ],
    ids=["fpn", "bf16-ohem", "upernet-muon-slide"],
)
def test_resume_is_bit_for_bit(scenes: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    recipe = street(scenes, {"schedule.steps": 6, "train.eval_steps": 3} | overrides)
    train(recipe, tmp_path / "whole")
    assert train(recipe, tmp_path / "cut", reporter=StopAt(4)).status == "interrupted"
    assert train(recipe, tmp_path / "cut", resume=True).status == "completed"
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_killed_process_is_continued_bit_for_bit(scenes: Path, tmp_path: Path, reference: Path, start_run) -> None:
    out = tmp_path / "run"
    child = start_run(street(scenes, {"train.checkpoint_minutes": 0.0}), out)
    deadline = time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count('"step"') < 7:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    train(street(scenes), out, resume=True)
    assert_same_run(out, reference)


def test_two_processes_share_training_and_scoring(scenes: Path, tmp_path: Path, start_run) -> None:
    recipe = street(scenes, {"schedule.steps": 4, "train.eval_steps": 4})
    child = start_run(recipe, tmp_path / "run", processes=2)
    printed, errors = child.communicate(timeout=250)
    assert child.returncode == 0, errors
    assert printed.split() == ["completed", "4"] * 2
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["metrics"]["count"] == 5, "each held-out image once, whichever process scored it"
    assert int(last["confusion"].sum()) == sum(int((open_mask(scenes, i) != 255).sum()) for i in range(5))


def test_the_loss_is_the_mean_over_a_step_however_it_is_shared_out(scenes, make_scenes, tmp_path, start_run) -> None:
    """Void, class weights and hard pixels differ from image to image; one held-out image of two processes, and sharded."""
    data = make_scenes(tmp_path / "data", train=8, val=1)
    whole = {
        "data.path": str(data),
        "segment.ohem": 0.5,
        "segment.ohem_min_kept": 100,
        "segment.class_weights": "median",
        "augment.hflip": 0.0,
        "model.options": {**street(data).model.options, "dropout": 0.0},
        "model.drop_path_rate": 0.0,
        "optim.name": "sgd",
        "optim.lr": 0.05,
        "schedule.steps": 4,
        "schedule.warmup_steps": 0,
        "train.eval_steps": 4,
        "train.batch_size": 4,
    }
    parts = [whole, {**whole, "train.accumulation": 4}]
    child = start_run([street(data, part) for part in parts], tmp_path / "one", "--no-batch-norm")
    shared = [
        {**whole, "train.parallel": kind, "train.accumulation": 2, "train.channels_last": True}
        for kind in ("ddp", "fsdp")
    ]
    shared[1]["segment.test"] = "slide"
    children = [
        child,
        start_run([street(data, part) for part in shared], tmp_path / "two", "--no-batch-norm", processes=2),
    ]
    for child in children:
        _, errors = child.communicate(timeout=250)
        assert child.returncode == 0, errors
    reference = load_checkpoint(tmp_path / "one" / "0" / "last.pt")
    for other in ("one/1", "two/0", "two/1"):
        last = load_checkpoint(tmp_path / other / "last.pt")
        assert last["step"] == 4 and last["metrics"]["count"] == 1
        for name, value in reference["model"].items():
            torch.testing.assert_close(
                last["model"][name], value, rtol=1e-4, atol=3e-6, msg=lambda m, n=name, o=other: f"{o} {n}: {m}"
            )


def test_frozen_batch_norm_is_the_backbones(scenes: Path, tmp_path: Path) -> None:
    recipe = street(scenes, {"schedule.steps": 1, "schedule.warmup_steps": 0, "train.batch_norm": "frozen"})
    train(recipe, tmp_path / "run")
    weights = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    means = {name: value for name, value in weights.items() if name.endswith("running_mean")}
    assert {name.split(".")[0] for name in means} >= {"backbone", "decode_head", "auxiliary_head"}
    for name, value in means.items():
        assert (value == 0).all() == name.startswith("backbone."), name


def open_mask(scenes: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(scenes / "annotations" / "val" / f"{number:02}.png"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"augment.cutmix": 1.0}, r"augment\.cutmix has no effect in task 'segment'"),
        ({"loss.label_smoothing": 0.0}, r"loss\.label_smoothing has no effect"),
        (
            {"schedule.small_size": 32, "schedule.small_epochs": 1},
            r"schedule\.small_size, schedule\.small_epochs have no effect",
        ),
        ({"model.options": {"num_classes": 4}}, "follows from the data"),
        ({"model.name": "volo_nano"}, "unknown segmentation model 'volo_nano'; did you mean 'fpn_volo_nano'"),
        ({"segment.stride": 100, "segment.test": "slide"}, "the stride is from 1 to the window"),
    ],
)
def test_recipes_that_cannot_be_meant(scenes: Path, tmp_path: Path, overrides, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(street(scenes, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_starts_from_a_segmentation_run_and_from_a_classifier(
    scenes: Path, tmp_path: Path, reference: Path, tiny
) -> None:
    recipe = street(
        scenes,
        {
            "model.weights": str(reference / "best.pt"),
            "schedule.steps": 2,
            "schedule.warmup_steps": 0,
            "optim.lr": 1e-9,
        },
    )
    recipe = recipe_from_dict({**recipe.to_dict(), "optim": {**recipe.to_dict()["optim"], "ema_decay": 0.0}})
    result = train(recipe, tmp_path / "again")
    assert result.best["miou"] > 0.9 * load_checkpoint(reference / "best.pt")["best"]["miou"]
    train(
        tiny({"schedule.epochs": 0.2, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}), tmp_path / "c"
    )
    start = street(
        scenes, {"model.weights": str(tmp_path / "c" / "last.pt"), "schedule.steps": 1, "schedule.warmup_steps": 0}
    )
    assert train(start, tmp_path / "from_classifier").status == "completed"
