"""Training with token labels: the annotator first, maps that stay with their images, a live annotator, no annotator."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from volo.cli.main import main
from volo.config import Recipe, load_recipe, recipe_to_toml
from volo.data.label_maps import INDEX, LabelMaps
from volo.distributed import World
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train as train_alone
from volo.training.pipeline import train
from volo.training.plan import plan_training
from volo.training.report import NullReporter
from volo.training.workloads import token_labeling
from volo.training.workloads.on_device import on_device
from volo.training.workloads.token_labeling import TokenLabeling, doubts

SHORT = {"schedule.epochs": 0.5, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}
HERE = World(0, 1, torch.device("cpu"))


class Messages(NullReporter):
    """What was said, and a signal to this process after so many steps of a run into `folder`."""

    def __init__(self, stop_after: int = 0, folder: str = "") -> None:
        self.said: list[str] = []
        self.stop_after, self.folder = stop_after, folder
        self.out = ""

    def on_message(self, text: str) -> None:
        self.said.append(text)

    def on_start(self, run) -> None:
        self.out = run.out.name

    def on_step(self, report) -> None:
        if report.step == self.stop_after and self.out == self.folder:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def annotated(tiny, tmp_path_factory):
    """(recipe, run folder, reporter) of a run that trained its annotator, drew maps and trained with them."""
    folder = tmp_path_factory.mktemp("annotated")
    its = tiny(SHORT | {"loss.token_weight": 0.5})
    (folder / "its.toml").write_text(recipe_to_toml(its))
    recipe = tiny(SHORT | {"annotator.recipe": str(folder / "its.toml")})
    recipe = dataclasses.replace(recipe, task="token_label")
    reporter = Messages()
    result = train(recipe, folder / "run", reporter=reporter)
    assert result.status == "completed"
    return recipe, folder / "run", reporter


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "last.pt")["model"]


def test_one_run_trains_the_annotator_draws_the_maps_and_trains(annotated) -> None:
    _, out, reporter = annotated
    assert json.loads((out / "annotator" / "summary.json").read_text())["status"] == "completed"
    maps = LabelMaps.open(out / "label_maps")
    assert len(maps) == json.loads((out / "summary.json").read_text())["num_train"]
    assert maps.grid == (2, 2)
    assert [text.split()[0] for text in reporter.said if text.startswith(("first", "then"))] == ["first", "then"]
    stored = load_recipe(out / "recipe.toml")
    assert (stored.task, stored.token_label.maps, stored.annotator.model) == ("token_label", "", "")


def test_what_is_there_is_not_done_again(annotated, tmp_path) -> None:
    recipe, out, _ = annotated
    before = (out / "annotator" / "last.pt").stat().st_mtime_ns
    reporter = Messages()
    assert train(recipe, out, resume=True, reporter=reporter).status == "completed"
    assert (out / "annotator" / "last.pt").stat().st_mtime_ns == before
    assert not any(text.startswith(("first", "then")) for text in reporter.said)
    labels = dataclasses.replace(recipe.token_label, maps=str(out / "label_maps"))
    assert train(dataclasses.replace(recipe, token_label=labels), tmp_path / "other").status == "completed"
    assert not (tmp_path / "other" / "annotator").exists()
    a, b = weights_of(out), weights_of(tmp_path / "other")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("folder", ["annotator", "run"])
def test_cut_off_anywhere_and_moved_it_goes_on_and_ends_bit_for_bit_the_same(
    annotated, tmp_path, monkeypatch, folder
) -> None:
    """In another working directory too, from which the annotator's recipe is not found."""
    recipe, whole, _ = annotated
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    shutil.copy(recipe.annotator.recipe, here / "its.toml")
    recipe = dataclasses.replace(recipe, annotator=dataclasses.replace(recipe.annotator, recipe="its.toml"))
    monkeypatch.chdir(here)
    stopped = train(recipe, "run", reporter=Messages(stop_after=2, folder=folder))
    assert stopped.status == "interrupted"
    assert stopped.out.name == folder
    monkeypatch.chdir(there)
    (here / "run").rename(there / "moved")
    assert train(load_recipe("moved/recipe.toml"), "moved", resume=True).status == "completed"
    a, b = weights_of(whole), weights_of(there / "moved")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_whose_recipe_names_its_own_folder_goes_on(annotated, tmp_path) -> None:
    """Runs once wrote down where their annotator and maps lay."""
    recipe, whole, _ = annotated
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    named = dataclasses.replace(
        recipe,
        annotator=dataclasses.replace(recipe.annotator, model=str(out / "annotator")),
        token_label=dataclasses.replace(recipe.token_label, maps=str(out / "label_maps")),
    )
    for with_maps in (True, False):
        reporter = Messages()
        assert train(named, out, resume=True, reporter=reporter).status == "completed"
        assert any(text.startswith("then") for text in reporter.said) is not with_maps
        shutil.rmtree(out / "label_maps")


@pytest.mark.timeout(600)
def test_two_processes_draw_maps_and_train_with_them(annotated, tmp_path, start_run) -> None:
    """The first one writes the index. Where it cannot, the other does not wait for ever; where it is late, it does wait."""
    recipe, alone, _ = annotated
    out = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # Without torchrun, which would end the second process as soon as the first has failed.
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [start_run(recipe, out, "--full-disk", RANK=rank, **world) for rank in range(2)]
    errors = [child.communicate(timeout=250)[1] for child in children]
    assert [child.returncode for child in children] == [1, 1], errors
    assert os.strerror(errno.ENOSPC) in errors[0]
    assert "stopped, for the reason the first process gives" in errors[1]

    child = start_run(recipe, out, "--resume", "--late-index", processes=2)
    printed, errors = child.communicate(timeout=250)
    assert child.returncode == 0, errors
    steps = json.loads((alone / "summary.json").read_text())["total_steps"]
    assert printed.count(f"completed {steps}") == 2
    assert list(LabelMaps.open(out / "label_maps").names) == list(LabelMaps.open(alone / "label_maps").names)


def test_the_maps_matter(annotated, tmp_path) -> None:
    recipe, out, _ = annotated
    own = dataclasses.replace(recipe, token_label=dataclasses.replace(recipe.token_label, source="own"))
    train(own, tmp_path / "own")
    assert not (tmp_path / "own" / "annotator").exists(), "nobody is needed"
    assert not torch.equal(weights_of(out)["aux_head.weight"], weights_of(tmp_path / "own")["aux_head.weight"])


@pytest.mark.parametrize("source", ["maps", "live"])
def test_small_pictures_of_the_first_epochs_have_smaller_grids(annotated, tmp_path, source) -> None:
    recipe, out, _ = annotated
    labels = dataclasses.replace(
        recipe.token_label, source=source, maps=str(out / "label_maps") if source == "maps" else ""
    )
    schedule = dataclasses.replace(recipe.schedule, small_size=8, small_epochs=1)
    annotator = dataclasses.replace(recipe.annotator, recipe="", model=str(out / "annotator"))
    small = dataclasses.replace(recipe, token_label=labels, schedule=schedule, annotator=annotator)
    assert train(small, tmp_path / "run").status == "completed"
    odd = dataclasses.replace(small, schedule=dataclasses.replace(schedule, small_size=12))
    with pytest.raises(ValueError, match=r"schedule\.small_size is 12 x 12; .* multiples of 8"):
        train(odd, tmp_path / "odd")


def test_images_and_maps_on_the_device(annotated, tmp_path) -> None:
    """The same maps for the same frames, whoever cuts the images out; and it trains."""
    recipe, out, _ = annotated
    recipe = dataclasses.replace(
        recipe,
        augment=dataclasses.replace(recipe.augment, crop="resized", scale=(1.0, 1.0), ratio=(1.0, 1.0), erase_prob=0.0),
        token_label=dataclasses.replace(recipe.token_label, maps=str(out / "label_maps")),
    )
    annotations = []
    for opened_by in (TokenLabeling, on_device):
        workload = opened_by(recipe, HERE, lambda done, total: None)
        workload.create_task(workload.create_model())
        annotations.append(workload.prepare(next(workload.batches(0, 1)))["token_annotation"])
    assert annotations[0].std() > 1e-3
    torch.testing.assert_close(*annotations, atol=1e-5, rtol=1e-5)
    assert train_alone(recipe, tmp_path / "run", workload=on_device).status == "completed"


def test_without_annotator_it_is_plain_training_with_token_weight(tiny, tmp_path) -> None:
    plain = tiny(SHORT | {"loss.token_weight": 0.5})
    own = tiny(SHORT | {"token_label.source": "own"})
    train(plain, tmp_path / "plain")
    train(dataclasses.replace(own, task="token_label"), tmp_path / "own")
    a, b = weights_of(tmp_path / "plain"), weights_of(tmp_path / "own")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_live_annotator_looks_on_and_is_not_saved(annotated, tmp_path) -> None:
    recipe, out, _ = annotated
    live = dataclasses.replace(
        recipe,
        token_label=dataclasses.replace(recipe.token_label, source="live"),
        annotator=dataclasses.replace(recipe.annotator, model=str(out / "annotator"), flip=True),
    )
    before = (out / "annotator" / "best.pt").read_bytes()
    assert train(live, tmp_path / "live").status == "completed"
    checkpoint = load_checkpoint(tmp_path / "live" / "last.pt")
    for part in ("model", "ema"):
        assert checkpoint[part].keys() == load_checkpoint(out / "last.pt")[part].keys()
    assert not (tmp_path / "live" / "label_maps").exists()
    assert (out / "annotator" / "best.pt").read_bytes() == before
    nobody = dataclasses.replace(live, annotator=dataclasses.replace(live.annotator, model="", recipe=""))
    with pytest.raises(ValueError, match=r"--annotator\.model"):
        train(nobody, tmp_path / "nobody")


def test_a_live_annotator_says_what_its_maps_say(annotated, tiny, tmp_path) -> None:
    """Where nothing is cropped, and all classes are kept, both ways lead to the same logits."""
    recipe, out, _ = annotated
    still = dataclasses.replace(recipe.augment, crop="none", hflip=0.0, erase_prob=0.5)
    recipe = dataclasses.replace(
        recipe,
        augment=still,
        annotator=dataclasses.replace(recipe.annotator, model=str(out / "annotator"), recipe="", top=10),
        token_label=dataclasses.replace(recipe.token_label, maps=str(tmp_path / "maps")),
    )
    train(recipe, tmp_path / "run")  # draws the maps
    live = dataclasses.replace(recipe, token_label=dataclasses.replace(recipe.token_label, source="live"))
    answers = []
    for each in (recipe, live):
        workload = TokenLabeling(each, HERE)
        workload.create_task(workload.create_model())
        batch = next(iter(workload.batches(0, 1)))
        answers.append(workload.prepare(batch))
    by_maps, by_looking = answers
    for name in ("class_annotation", "token_annotation"):
        assert by_maps[name].std() > 1e-3
        torch.testing.assert_close(by_maps[name], by_looking[name], atol=2e-3, rtol=2e-3)


def test_a_model_of_timm_with_weights_crop_and_encoding(annotated, tiny, tmp_path) -> None:
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save(weights, tmp_path / "its.pt")
    wanted = {"model": "test_resnet", "weights": str(tmp_path / "its.pt"), "img_size": 64}
    wanted |= {"crop": 0.875, "encoding": "compact"}
    recipe = tiny(SHORT | {f"annotator.{key}": value for key, value in wanted.items()})
    recipe = dataclasses.replace(recipe, task="token_label")
    train(recipe, tmp_path / "run")
    maps = LabelMaps.open(tmp_path / "run" / "label_maps")
    assert (maps.annotator["weights"], maps.annotator["crop"], maps.encoding) == ("its.pt", 0.875, "compact")

    def with_annotator(source: str, **changes) -> Recipe:
        labels = dataclasses.replace(recipe.token_label, source=source)
        return dataclasses.replace(
            recipe, token_label=labels, annotator=dataclasses.replace(recipe.annotator, **changes)
        )

    (tmp_path / "its.pt").rename(tmp_path / "moved.pt")
    moved = str(tmp_path / "moved.pt")
    assert train(with_annotator("maps", weights=moved), tmp_path / "run", resume=True).status == "completed"
    live = TokenLabeling(with_annotator("live", weights=moved, crop="squash"), HERE).annotator.model.classifier
    assert all(torch.equal(live.state_dict()[key], weights[key]) for key in weights)
    its = annotated[0].annotator.recipe
    for changed, words in (
        (with_annotator("live", model="", recipe=its), r"annotator\.crop is 0\.875"),
        (with_annotator("maps", crop=5.0), "crop is squash, or a share"),
        (with_annotator("maps", model="", recipe=its, weights=moved), r"annotator\.weights are for a model of timm"),
    ):
        with pytest.raises(ValueError, match=words):
            train(changed, tmp_path / "none")
        assert not (tmp_path / "none").exists()


def test_maps_that_do_not_fit_are_refused(annotated, tiny, tmp_path) -> None:
    recipe, out, _ = annotated
    no_annotator = dataclasses.replace(recipe, annotator=type(recipe.annotator)())
    with pytest.raises(ValueError, match=r"volo annotate.*--token_label\.maps"):
        train(no_annotator, tmp_path / "a")
    with_maps = dataclasses.replace(recipe.token_label, maps=str(out / "label_maps"))
    no_annotator = dataclasses.replace(no_annotator, token_label=with_maps)
    other_split = dataclasses.replace(no_annotator.data, split_seed=1)
    with pytest.raises(ValueError, match=r"training images have no label map in .*digits/\d+.*split_seed"):
        train(dataclasses.replace(no_annotator, data=other_split), tmp_path / "b")
    images = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.arange(300) % 3, classes=np.array(["cat", "dog", "hen"]))
    others = dataclasses.replace(no_annotator.data, kind="npz", path=str(tmp_path / "p.npz"))
    with pytest.raises(ValueError, match="are of other classes"):
        train(dataclasses.replace(no_annotator, data=others), tmp_path / "c")
    odd = dataclasses.replace(no_annotator.data, img_size=(16, 20))
    padded = dataclasses.replace(no_annotator.model, options={**no_annotator.model.options, "pad_input": True})
    with pytest.raises(ValueError, match="multiples of 8"):
        train(dataclasses.replace(no_annotator, data=odd, model=padded), tmp_path / "d")


def test_a_plan_says_what_comes_and_writes_nothing(annotated, tmp_path) -> None:
    recipe, out, _ = annotated
    plan = plan_training(recipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = json.loads((out / "summary.json").read_text())
    assert plan["steps"] == done["total_steps"]
    assert plan["num_parameters"] == done["num_parameters"]
    assert plan["pictures"] == plan["steps"] * recipe.train.batch_size
    assert len(plan["step_seconds"]) == 3
    assert plan["seconds"]["all"] > plan["seconds"]["training"] > 0
    memory = plan["memory_bytes"]
    assert memory["gradients"] == 4 * plan["num_parameters"]
    assert 2 * memory["gradients"] <= memory["optimizer"] < 2.1 * memory["gradients"]
    assert memory["activations"] > memory["weights"] >= memory["gradients"]
    assert plan["annotator"]["task"] == "classify"
    drawn = plan_training(recipe, out)
    assert "annotator" not in drawn
    assert drawn["label_maps"]["is_there"]
    assert 0.5 < plan["label_maps"]["bytes"] / drawn["label_maps"]["bytes"] < 2
    assert plan["label_maps"]["grid"] == drawn["label_maps"]["grid"] == [2, 2]


def test_plan_on_the_command_line(annotated, tmp_path, capsys, monkeypatch) -> None:
    recipe, _, _ = annotated
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe))
    assert main(["train", "r.toml", "--plan", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["label_maps"]["is_there"] is False
    assert main(["train", "r.toml", "--plan", "--quiet"]) == 0
    shown = capsys.readouterr().out
    for word in ("first, the annotator", "learning rate", "memory", "label maps", "in all"):
        assert word in shown
    assert not (tmp_path / "runs").exists()


def test_maps_that_are_there_are_compared_with_the_annotator(annotated, tmp_path) -> None:
    recipe, whole, _ = annotated
    out = tmp_path / "run"
    for name in ("annotator", "label_maps"):
        shutil.copytree(whole / name, out / name)

    def changed(**changes) -> Recipe:
        return dataclasses.replace(recipe, annotator=dataclasses.replace(recipe.annotator, **changes))

    before = (out / "label_maps" / INDEX).read_bytes()
    for changes, words in (
        ({"top": 2}, "top is 5, not 2"),
        ({"flip": True}, "flip is False, not True"),
        ({"encoding": "compact"}, "encoding is exact, not compact"),
        ({"crop": 0.9}, "crop is squash, not 0.9"),
        ({"img_size": 32}, r"img_size is \[16, 16\], not \[32, 32\]"),
        ({"model": str(whole / "best.pt"), "recipe": ""}, "weights_digest is"),
    ):
        with pytest.raises(ValueError, match=rf"are not as \[annotator\] says: {words}.*--overwrite"):
            train(changed(**changes), out, resume=True)
    named = dataclasses.replace(
        changed(top=2), token_label=dataclasses.replace(recipe.token_label, maps=str(whole / "label_maps"))
    )
    with pytest.raises(ValueError, match="top is 5, not 2.*another folder"):
        train(named, tmp_path / "other", overwrite=True)
    assert not (tmp_path / "other").exists()
    assert (out / "label_maps" / INDEX).read_bytes() == before
    reporter = Messages()
    assert train(changed(top=2), out, overwrite=True, reporter=reporter).status == "completed"
    assert any("they are replaced" in text for text in reporter.said)
    assert LabelMaps.open(out / "label_maps").top == 2
    # Another recipe of the annotator: another annotator.
    its = Path(recipe.annotator.recipe)
    (tmp_path / "its.toml").write_text(its.read_text().replace("\nseed = 0", "\nseed = 1"))
    with pytest.raises(ValueError, match="started with another recipe"):
        train(changed(top=2, recipe=str(tmp_path / "its.toml")), out, resume=True)
    digest = LabelMaps.open(out / "label_maps").annotator["weights_digest"]
    train(changed(top=2, recipe=str(tmp_path / "its.toml")), out, overwrite=True)
    assert LabelMaps.open(out / "label_maps").annotator["weights_digest"] != digest


def test_the_loop_wants_label_maps_that_are_there(annotated, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"volo annotate.*--token_label\.maps"):
        train_alone(annotated[0], tmp_path / "run")


@pytest.mark.parametrize(
    ("agreement", "warns"),
    [
        (None, False),
        ({"top1": 0.9, "positions": 0.6}, False),
        ({"top1": 0.7, "positions": 0.6}, True),
        ({"top1": 0.9, "positions": 0.2}, True),
    ],
)
def test_an_annotator_that_knows_little_is_doubted(agreement: dict[str, float] | None, warns: bool) -> None:
    text = doubts(agreement)
    assert bool(text) == warns
    if agreement and warns:
        assert f"{100 * agreement['top1']:.1f} % of the images" in text
        assert f"{100 * agreement['positions']:.1f} % of the" in text


def test_the_doubt_is_said_before_the_training(annotated, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out, _ = annotated
    monkeypatch.setattr(token_labeling, "TEACHES", {"top1": 1.01, "positions": 0.5})
    labels = dataclasses.replace(recipe.token_label, maps=str(out / "label_maps"))
    workload = TokenLabeling(dataclasses.replace(recipe, token_label=labels), HERE)
    assert sum("plain labels" in note for note in workload.notes) == 1
