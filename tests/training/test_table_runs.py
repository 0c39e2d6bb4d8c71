"""Runs on tables: a class, several labels, numbers, several outputs; from the command line, too."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from volo.cli.main import main
from volo.config import Recipe, load_recipe, recipe_to_toml
from volo.deploy.export import export
from volo.inference.model_source import load
from volo.inference.predictor import predict
from volo.inference.score import evaluate
from volo.inference.sharing import save_pretrained
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter, StepReport

LABELS = {
    "number": {"data.label_columns": ("age",)},
    "labels": {"data.label_columns": ("tags",)},
    "mixed": {"data.label_columns": ("age", "gender")},
}
CHANCE = {"number": 0.0, "labels": 0.45, "mixed": 0.2}
"""Scores of a model that says the same of every image: R2 0; the share of a label; a third of the classes, and R2 0."""


@pytest.fixture(scope="module")
def table(make_table: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_table(tmp_path_factory.mktemp("table"))


def recipe_of(tiny: Callable[..., Recipe], table: Path, kind: str, **changes) -> Recipe:
    values = {
        "data.kind": "auto",
        "data.path": str(table),
        "data.crop_pct": 1.0,
        "data.val_fraction": 0.3,
        "augment.crop": "none",
        "augment.mix_token": 0.0,
        "augment.erase_prob": 0.0,
        "model.drop_path_rate": 0.0,
        "loss.label_smoothing": 0.0,
        "optim.lr": 4e-3,
        "optim.ema_decay": 0.9,
        "train.batch_size": 24,
        "train.eval_every": 5.0,
        "schedule.epochs": 20,
        "schedule.warmup_epochs": 1,
        "schedule.cooldown_epochs": 0,
    }
    return dataclasses.replace(tiny(values | LABELS[kind] | changes), task="table")


class StopAt(NullReporter):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module", params=list(LABELS))
def finished(request, tiny, table, tmp_path_factory):
    recipe = recipe_of(tiny, table, request.param)
    return request.param, train(recipe, tmp_path_factory.mktemp(request.param) / "run")


def test_learns_more_than_chance_and_is_loaded_again(finished, table) -> None:
    kind, result = finished
    assert result.status == "completed"
    assert result.score == {"number": "r2", "labels": "map", "mixed": "score"}[kind]
    assert result.best[result.score] > CHANCE[kind] + 0.5 * (1 - CHANCE[kind])
    loaded = load(result.out)
    assert loaded.task == "table"
    assert loaded.classes == result.classes
    again = evaluate(loaded)
    for name in ("count", result.score, "loss"):
        assert again[name] == pytest.approx(result.best[name], rel=1e-4), name
    assert again["outputs"].keys() == result.best["outputs"].keys()
    summary = json.loads((result.out / "summary.json").read_text())
    assert summary["best"][result.score] == pytest.approx(result.best[result.score])
    everything = evaluate(loaded, shutil.copy(table, table.with_name("other.csv")))
    assert everything["count"] == 120


def test_predictions_are_in_the_units_of_the_table(finished, table) -> None:
    _, result = finished
    rows = {row["path"]: row for row in csv.DictReader(io.StringIO(table.read_text()))}
    names = [row["image"] for row in csv.DictReader(io.StringIO((result.out / "held_out.csv").read_text()))]
    answers = list(predict(str(result.out), [table.parent / name for name in names]))
    assert not any(answer.error for answer in answers)
    outputs = [{its.output: its for its in answer.outputs} for answer in answers]
    if "age" in outputs[0]:
        errors = [abs(o["age"].number - float(rows[name]["age"])) for name, o in zip(names, outputs)]
        figures = result.best["outputs"]["age"]
        assert sum(errors) / len(errors) == pytest.approx(figures["mae"], rel=1e-4)
        assert figures["mae"] < 10  # it is 15 for a model that always says 50
    if "gender" in outputs[0]:
        right = [o["gender"].labels[0][0] == rows[name]["gender"] for name, o in zip(names, outputs)]
        assert sum(right) / len(right) == pytest.approx(result.best["top1"])
    if "tags" in outputs[0]:
        assert all(p >= 0.5 for o in outputs for _, p in o["tags"].labels)


def test_numbers_are_kept_standardised_in_the_checkpoint(finished, table) -> None:
    kind, result = finished
    if kind == "labels":
        pytest.skip("no numbers")
    held = {row["image"] for row in csv.DictReader(io.StringIO((result.out / "held_out.csv").read_text()))}
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    ages = torch.tensor([float(row["age"]) for row in rows if row["path"] not in held], dtype=torch.float64)
    age = load_checkpoint(result.out / "best.pt")["extras"]["targets"][0]
    assert age["mean"] == pytest.approx(float(ages.mean()))
    assert age["std"] == pytest.approx(float(ages.std(correction=0)))


def test_resume_is_bit_for_bit_where_the_data_has_moved(tiny, table, tmp_path) -> None:
    short = {"schedule.epochs": 4, "train.eval_every": 1.0, "augment.crop": "pad", "augment.erase_prob": 0.3}
    recipe = recipe_of(tiny, table, "mixed", **short)
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "cut", reporter=StopAt(5))
    assert load_checkpoint(tmp_path / "cut/last.pt")["step"] == 5
    moved = tmp_path / "elsewhere"
    shutil.copytree(table.parent, moved / "images")
    shutil.copy(table, moved / "renamed.csv")
    now = dataclasses.replace(recipe.data, path=str(moved / "renamed.csv"), root=str(moved / "images"))
    result = train(dataclasses.replace(recipe, data=now), tmp_path / "cut", resume=True)
    assert result.step == whole.step
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
        assert a["metrics"] == b["metrics"]
        assert a["extras"] == b["extras"]
        for part in ("model", "ema"):
            assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert evaluate(str(tmp_path / "cut"))["loss"] == pytest.approx(result.best["loss"])


def test_resume_with_other_numbers_is_refused(tiny, table, tmp_path) -> None:
    images = shutil.copytree(table.parent, tmp_path / "images")
    recipe = recipe_of(tiny, images / "labels.csv", "number", **{"schedule.epochs": 2})
    train(recipe, tmp_path / "run", reporter=StopAt(2))
    text = (images / "labels.csv").read_text().splitlines()
    first, age, *rest = text[1].split(",")
    text[1] = ",".join([first, f"{float(age) + 0.001:.3f}", *rest])
    (images / "labels.csv").write_text("\n".join(text))
    with pytest.raises(ValueError, match="other labels for the (training|held-out) images"):
        train(recipe, tmp_path / "run", resume=True)


def test_rotated_by_exif_is_the_same_run(tiny, make_table, tmp_path) -> None:
    """Files stored on their side, with a tag that says so, give the weights of the files that stand."""
    results = []
    for name in ("standing", "lying"):
        table = make_table(tmp_path / name, count=40)
        for path in sorted(table.parent.glob("*.png")):
            image = Image.open(path)
            image.load()
            if name == "lying":
                exif = Image.Exif()
                exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
                image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        recipe = recipe_of(tiny, table, "mixed", **{"schedule.epochs": 2})
        train(recipe, tmp_path / f"run_{name}")
        results.append(load_checkpoint(tmp_path / f"run_{name}/last.pt"))
    a, b = results
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert a["metrics"] == b["metrics"]


def test_two_processes_and_an_odd_number_of_held_out_images(tiny, make_table, start_run, tmp_path) -> None:
    table = make_table(tmp_path / "table", count=53)
    short = {"schedule.epochs": 2, "train.batch_size": 8, "optim.ema_decay": 0.0, "train.eval_batch_size": 4}
    short |= {"train.batch_norm": "frozen"}
    recipe = recipe_of(tiny, table, "mixed", **short)
    one = train(recipe, tmp_path / "one")
    assert one.best["count"] % 2 == 1
    done = start_run(recipe, tmp_path / "two", processes=2)
    assert done.wait(240) == 0, done.communicate()[1]
    a, b = (load_checkpoint(tmp_path / run / "last.pt") for run in ("one", "two"))
    for key in a["model"]:
        torch.testing.assert_close(a["model"][key], b["model"][key], rtol=1e-3, atol=1e-4)
    assert b["metrics"]["count"] == one.best["count"]
    assert b["metrics"]["loss"] == pytest.approx(a["metrics"]["loss"], rel=1e-3)
    assert b["metrics"]["outputs"]["age"]["mae"] == pytest.approx(a["metrics"]["outputs"]["age"]["mae"], rel=1e-3)


def test_command_line_from_end_to_end(tiny, table, tmp_path, capsys) -> None:
    for kind, columns in (("mixed", ["age", "gender"]), ("labels", ["tags"])):
        recipe = dataclasses.replace(recipe_of(tiny, table, kind, **{"schedule.epochs": 3}))
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path="", label_columns=()))
        (tmp_path / "r.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
        out = tmp_path / kind
        words = ["--data", str(table), "--data.label_columns", *columns, "--out", str(out)]
        assert main(["train", str(tmp_path / "r.toml"), *words]) == 0
        said = capsys.readouterr().out
        assert ("best score" if kind == "mixed" else "best mAP") in said
        assert "volo predict" in said
        assert load_recipe(out / "recipe.toml").data.label_columns == tuple(columns)
        assert (out / "curves.png").exists()
        assert main(["evaluate", str(out), "--json", "--device", "cpu"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["outputs"].keys() == set(columns)
        assert main(["evaluate", str(out), "--data", str(table), "--flip", "--out", str(tmp_path / f"{kind}_r")]) == 0
        said = capsys.readouterr().out
        assert ("R²" in said and "gender: accuracy" in said) if kind == "mixed" else "average precision" in said
        pictures = [str(table.parent / "000.png"), str(table.parent / "001.png")]
        for form in ("table", "json", "csv"):
            assert main(["predict", str(out), *pictures, "--format", form, "--threshold", "0.3"]) == 0
            said = capsys.readouterr().out
            if form == "json":
                answers = json.loads(said)
                assert [set(answer["outputs"]) for answer in answers] == [set(columns)] * 2
            elif form == "csv":
                rows = list(csv.DictReader(io.StringIO(said)))
                assert {row["output"] for row in rows} == set(columns)
            else:
                assert all(column in said for column in columns)


def test_an_exported_file_is_judged_by_the_loss_it_learned_by(tiny, table, tmp_path) -> None:
    """The file has no recipe; what it says must be what the run says, not the loss that is the default."""
    changes = {"table.number_loss": "mse", "schedule.epochs": 2, "optim.lr": 1e-5}
    result = train(recipe_of(tiny, table, "number", **changes), tmp_path / "run")
    file = export(str(result.out), tmp_path / "age.pt2", format="torch").path
    other = shutil.copy(table, table.with_name("other_loss.csv"))
    expected = evaluate(str(result.out), other)
    assert evaluate(str(file), other)["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    std = load(result.out).targets.outputs[0].std
    assert expected["loss"] == pytest.approx((expected["rmse"] / std) ** 2, rel=1e-3)  # Huber's is half of it at most


def test_a_class_column_goes_through_the_ordinary_classifier(tiny, table, tmp_path, capsys) -> None:
    recipe = dataclasses.replace(
        recipe_of(tiny, table, "mixed", **{"data.label_columns": ("gender",), "augment.mix_token": 1.0}),
        task="classify",
    )
    result = train(recipe, tmp_path / "run")
    assert result.score == "top1"
    assert result.best["top1"] > 0.6
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(result.best["top1"])
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--data", str(table), "--device", "cpu"]) == 0


REFUSED = {
    "mixing": ({"augment.mixup": 0.5}, "augment.mixup has no effect in task 'table'"),
    "probe": ({"model.probe": True}, "leave it out for task 'table'"),
    "channels": ({"model.options": {"in_chans": 4}}, "in_chans is 4"),
    "kind": ({"data.kind": "digits"}, "data.kind is 'digits'"),
    "folder": ({"data.path": "/tmp"}, "labels from a table need a file"),
    "weights": ({"table.weights": (1.0,)}, "for each of the outputs.*age, gender"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_trained(tiny, table, tmp_path, name) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        train(recipe_of(tiny, table, "mixed", **changes), tmp_path / "run")
    assert not (tmp_path / "run/last.pt").exists()


def test_commands_that_are_for_classes_say_so(finished) -> None:
    _, result = finished
    with pytest.raises(ValueError, match="a model of task 'table'.*volo predict"):
        load(result.out, task="classify")
    with pytest.raises(ValueError, match="a model of task 'table'"):
        load(result.out, task="segment")


def test_first_evaluation_is_the_best_so_far_however_bad(tiny, table, tmp_path) -> None:
    """R2 has no lower end: a diverging start must not leave a run without best.pt."""
    recipe = recipe_of(tiny, table, "number", **{"schedule.epochs": 1, "optim.lr": 0.5, "optim.name": "sgd"})
    result = train(recipe, tmp_path / "run")
    assert (result.out / "best.pt").exists()
    assert result.best["r2"] <= 1


def test_an_exported_or_shared_model_says_the_same(finished, table, tmp_path) -> None:
    kind, result = finished
    loaded = load(result.out)
    picture = table.parent / "000.png"
    (expected,) = predict(loaded, [picture], threshold=0.0)
    save_pretrained(loaded, tmp_path / "shared")
    assert load(tmp_path / "shared").targets == loaded.targets
    (shared,) = predict(str(tmp_path / "shared"), [picture], threshold=0.0)
    assert shared.outputs == expected.outputs
    if kind == "mixed":
        pytest.importorskip("onnxruntime")
        export(result.out, tmp_path / "model.onnx")
        (exported,) = predict(str(tmp_path / "model.onnx"), [picture])
        assert exported.outputs[0].number == pytest.approx(expected.outputs[0].number, rel=1e-4)
        assert exported.outputs[1].labels[0][0] == expected.outputs[1].labels[0][0]
        with pytest.raises(ValueError, match="preprocessing goes into the files of classifiers"):
            export(result.out, tmp_path / "pixels.onnx", with_preprocessing=True)


def test_a_table_is_what_its_model_is_exported_with(finished, table, tmp_path) -> None:
    """The images of its rows are compared, and calibrate and judge int8; answers are those of its outputs."""
    pytest.importorskip("onnxruntime")
    kind, result = finished
    if kind == "number":
        return
    count = len(table.read_text().splitlines()) - 1
    values = export(result.out, tmp_path / "plain.pt2", format="torch", data=table).values
    assert values["compared_on"] == "60 images" and {row["top1_agreement"] for row in values["compared"]} == {1.0}
    moved = tmp_path / "moved"
    shutil.copytree(table.parent, moved)
    told = export(result.out, tmp_path / "x.onnx", dtype="int8", data=moved / "labels.csv", max_drop=20).values["int8"]
    assert told["calibrated_on"] == f"{count // 4} images of {moved / 'labels.csv'}"


def test_its_vectors_judge_other_tables_and_its_own_is_refused(finished, table, capsys) -> None:
    """The columns it learned are no columns of the data set that it looks over."""
    _, result = finished
    with table.open(newline="") as file:
        rows = [(row["path"], row["gender"]) for row in csv.DictReader(file)]
    plain = table.with_name("plain.csv")
    plain.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    assert main(["embed", str(result.out), "--data", str(plain), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == len(rows)
    for data in ([], ["--data", str(table)]):
        assert main(["embed", str(result.out), *data, "--check"]) == 2
        told = capsys.readouterr().err
        assert "one class" in told and "--data" in told and "label_columns" not in told


def test_weights_of_a_classifier_are_a_start(tiny, table, tmp_path) -> None:
    """Other heads are new, everything below them is kept."""
    columns = {"data.label_columns": ("gender",), "schedule.epochs": 1}
    first = train(
        dataclasses.replace(recipe_of(tiny, table, "mixed", **columns), task="classify"), tmp_path / "classes"
    )
    slow = {"optim.lr": 1e-9, "schedule.min_lr": 0.0, "schedule.warmup_lr": 0.0, "schedule.epochs": 1}
    recipe = recipe_of(tiny, table, "mixed", **slow, **{"model.weights": str(first.out)})
    train(recipe, tmp_path / "table")
    a, b = (load_checkpoint(out / "last.pt") for out in (first.out, tmp_path / "table"))
    key = "patch_embed.proj.weight"
    start = (a["ema"] or a["model"])[key]
    torch.testing.assert_close(b["model"][key], start, rtol=0, atol=1e-4)
    assert b["model"]["head.weight"].shape[0] == 4
    assert a["model"]["head.weight"].shape[0] == 3
