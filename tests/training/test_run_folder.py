"""What a run may replace in its folder, and what keeps it from beginning or going on there."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from volo.config import Recipe, recipe_to_toml
from volo.data.files import FolderLock
from volo.inference.model_source import load
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter, StepReport
from volo.training.run_folder import look_into, require_same_images
from volo.training.workloads.workload import image_list

SHORT = {"schedule.epochs": 0.5, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A short run; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(tiny(SHORT), out).status == "completed"
    return out


def test_what_others_have_in_the_folder_stays(tiny, tmp_path) -> None:
    """Also with --overwrite, and in tensorboard/, where we write too."""
    pytest.importorskip("tensorboard")
    others = ("tensorboard/other_run/events.out.tfevents.1", "tensorboard/events.out.tfevents.1.host", "classes.txt")
    for name in (*others, "notes/last.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = content(tmp_path)
    recipe = tiny(SHORT | {"train.tensorboard": True})
    for overwrite in (False, True):
        train(recipe, tmp_path, overwrite=overwrite)
        (tmp_path / "curves.png").write_text("drawn by somebody")
    after = content(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after["curves.png"] == b"drawn by somebody"
    # The curves of the run that was replaced are gone, or TensorBoard would show both as one.
    assert len([name for name in after if name.endswith(".volo")]) == 1


@pytest.mark.parametrize("name", ["summary.json", "last.pt", "curves.png", "recipe.toml"])
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_files_no_run_has_written_are_not_replaced(tiny, tmp_path, name, flags) -> None:
    (tmp_path / name).write_text('# mine\nmodel.name = "volo_nano"\n')
    with pytest.raises(FileExistsError, match=rf"not a run of volo, but it holds {name}.*--out"):
        train(tiny(), tmp_path, **flags)
    assert list(content(tmp_path)) == [name]


def test_a_file_is_no_run_folder(tiny, tmp_path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        train(tiny(), tmp_path / "run")


def test_a_run_killed_at_once_may_begin_again(tiny, tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(tiny()))
    assert look_into(tmp_path, tiny(), resume=True, overwrite=False) is None
    with pytest.raises(FileExistsError, match="already holds a run"):
        look_into(tmp_path, tiny(), resume=False, overwrite=False)

    # By Python people give whole epochs as integers, and files keep them so.
    recipe = tiny()
    recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, epochs=3))
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    assert look_into(tmp_path, recipe, resume=True, overwrite=False) is None
    (tmp_path / "recipe.toml").write_text("# of mine\n" + recipe_to_toml(recipe))
    with pytest.raises(FileExistsError, match="not a run of volo"):
        look_into(tmp_path, recipe, resume=True, overwrite=False)


def test_resume_without_last_pt_keeps_the_best(tiny, finished, tmp_path) -> None:
    """As when a run folder was copied without its largest file."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "last.pt").unlink()
    before = content(out)
    with pytest.raises(
        ValueError, match=r"without last\.pt.*best\.pt and summary\.json.*--overwrite.*--model\.weights"
    ):
        train(tiny(SHORT), out, resume=True)
    assert content(out) == before
    train(tiny(SHORT), out, overwrite=True)
    assert load_checkpoint(out / "best.pt")["step"] == load_checkpoint(finished / "best.pt")["step"]


class LookIn(NullReporter):
    """Tries to train into the folder while a run is at it."""

    def __init__(self, recipe, out: Path) -> None:
        self.recipe, self.out, self.errors = recipe, out, list[str]()

    def on_step(self, report: StepReport) -> None:
        if report.step != 2:
            return
        start = multiprocessing.get_context("fork")
        answers = start.SimpleQueue()
        for flag in ("resume", "overwrite"):
            other = start.Process(target=try_to_train, args=(self.recipe, self.out, flag, answers))
            other.start()
            other.join()
            self.errors.append(answers.get())


def try_to_train(recipe, out: Path, flag: str, answers) -> None:
    try:
        train(recipe, out, **{flag: True})
    except ValueError as error:
        answers.put(str(error))
    else:
        answers.put("trained")


def test_one_process_a_run_folder(tiny, tmp_path, finished) -> None:
    others = LookIn(tiny(SHORT), tmp_path / "run")
    train(tiny(SHORT), tmp_path / "run", reporter=others)
    assert [f"pid {os.getpid()} on" in error and "is at work in" in error for error in others.errors] == [True, True]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert not (tmp_path / "run" / FolderLock.NAME).exists()


class StopAtTwo(NullReporter):
    def on_step(self, report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt


@pytest.fixture
def photos(tiny, tmp_path):
    """A recipe for a folder of a few images, a checkpoint of its second step, and that folder."""
    for part, count in (("train", 8), ("val", 2)):
        for label, name in enumerate("ab"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (200 * label, 10 * i, 0)).save(folder / f"{i}.png")

    def recipe(place: str = "photos"):
        data = {"data.kind": "folder", "data.path": str(tmp_path / place), "train.batch_size": 4}
        return tiny(data | {"schedule.epochs": 2, "train.checkpoint_minutes": 0.0, "augment.mix_token": 0.0})

    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "run", reporter=StopAtTwo())
    return recipe, tmp_path / "run", tmp_path / "photos"


def test_data_may_move(tiny, photos, tmp_path) -> None:
    recipe, out, folder = photos
    folder.rename(tmp_path / "elsewhere")
    assert train(recipe("elsewhere"), out, resume=True).status == "completed"
    # What is evaluated and drawn afterwards looks there too, though the weights may be from before the move.
    best = load_checkpoint(out / "best.pt") | {"recipe": recipe().to_dict()}
    torch.save(best, out / "best.pt")
    assert load(out, task="classify").preprocessing.path == str(tmp_path / "elsewhere")
    torch.save(best | {"recipe": tiny({"model.drop_path_rate": 0.0}).to_dict()}, tmp_path / "run" / "other.pt")
    assert load(out / "other.pt", task="classify").preprocessing.path == ""  # of another run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "train/a/3.png").rename(f / "train/a/33.png"),
            r"training images of other names.*train/a/3\.png",
        ),
        (lambda f: (f / "val/b/0.png").rename(f / "val/b/7.png"), "held-out images of other names"),
        (lambda f: (f / "train/a/3.png").unlink(), "16 training images; there are 15 now"),
    ],
)
def test_data_may_not_change(photos, change, message) -> None:
    """Neither may what it is called, with the same numbers of images: they would come in another order."""
    recipe, out, folder = photos
    before = (out / "last.pt").read_bytes()
    change(folder)
    with pytest.raises(ValueError, match=message):
        train(recipe(), out, resume=True)
    assert (out / "last.pt").read_bytes() == before


def test_labels_may_not_change(photos) -> None:
    """Those of arrays and shards are not in the names."""

    then = {"training": image_list(["0", "1"], torch.tensor([0, 1]))}
    require_same_images(Path("run"), then, {"training": image_list(["0", "1"], torch.tensor([0, 1]))})
    with pytest.raises(ValueError, match="other labels for the training images"):
        require_same_images(Path("run"), then, {"training": image_list(["0", "1"], torch.tensor([1, 1]))})


def test_a_run_lists_what_it_is_scored_on(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    result = train(tiny({"schedule.epochs": 0.1, "schedule.warmup_epochs": 0}), tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run/held_out.csv").open(encoding="utf-8")))
    assert len(rows) == result.metrics["count"] and {row["class"] for row in rows} == set(result.classes)
    counts = [sum(row["class"] == name for row in rows) for name in result.classes]
    assert counts == [sum(row) for row in result.confusion], "rows of the confusion are the truth"
