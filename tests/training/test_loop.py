from __future__ import annotations

import json
import math
import resource
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from volo.config import load_recipe
from volo.data import keyed
from volo.data.images import open_data
from volo.data.loader import EvalLoader
from volo.data.transforms import PixelPipeline
from volo.distributed import World, join_world, prepare_batch_norm
from volo.inference.evaluate import evaluate
from volo.inference.model_source import load
from volo.models.checkpoint import load_checkpoint
from volo.models.volo import VOLO
from volo.tasks.classify import ClassifyTask
from volo.training import loop
from volo.training.loop import NonFiniteLossError, train
from volo.training.report import NullReporter
from volo.training.workloads.classification import Classification, build_model

SHORT = {"schedule.epochs": 0.5, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}


class Recorder(NullReporter):
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def on_start(self, run) -> None:
        self.events.append(("start", run))

    def on_step(self, report) -> None:
        self.events.append(("step", report))

    def on_eval(self, metrics, is_best) -> None:
        self.events.append(("eval", metrics, is_best))

    def on_checkpoint(self, path, step) -> None:
        self.events.append(("checkpoint", step))

    def on_message(self, text) -> None:
        self.events.append(("message", text))

    def on_end(self, result) -> None:
        self.events.append(("end", result))

    def of(self, kind: str) -> list[tuple]:
        return [event for event in self.events if event[0] == kind]


def lines_of(out, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """(recipe, reporter, result) of a run that learns something."""
    overrides = {"schedule.epochs": 6, "optim.lr": 6e-3, "augment.mix_token": 0.0, "augment.erase_prob": 0.0}
    recipe, recorder = tiny(overrides | {"train.batch_size": 64, "train.eval_every": 2.0}), Recorder()
    result = train(recipe, tmp_path_factory.mktemp("finished") / "run", reporter=recorder)
    return recipe, recorder, result


def test_training_learns_the_digits(finished) -> None:
    _, _, result = finished
    assert result.status == "completed"
    assert result.best["top1"] > 0.85
    losses = [line["loss"] for line in lines_of(result.out, "step")]
    assert losses[0] == pytest.approx(math.log(10), rel=0.1)
    assert sum(losses[-10:]) / 10 < 1.1


def test_log_has_a_line_for_every_step_and_evaluation(finished) -> None:
    recipe, recorder, result = finished
    steps, evaluations = lines_of(result.out, "step"), lines_of(result.out, "eval")
    assert [line["step"] for line in steps] == list(range(1, result.total_steps + 1))
    assert steps[0].keys() == {
        "kind",
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "seconds",
    }
    per_epoch = recorder.of("start")[0][1].steps_per_epoch
    assert [line["step"] for line in evaluations] == [2 * per_epoch, 4 * per_epoch, 6 * per_epoch, result.total_steps]
    assert [line["epoch"] for line in evaluations[:3]] == [2.0, 4.0, 6.0]
    assert max(line["lr"] for line in steps) == pytest.approx(recipe.peak_lr)
    assert [line["seconds"] for line in steps] == sorted(line["seconds"] for line in steps)


def test_reporter_hears_of_everything(finished) -> None:
    _, recorder, result = finished
    assert next(kind for kind, *_ in recorder.events if kind != "message") == "start"  # after notes on the data
    assert recorder.events[-1] == ("end", result)
    assert len(recorder.of("step")) == result.total_steps
    evaluations = recorder.of("eval")
    best = max(evaluations, key=lambda event: event[1]["top1"])[1]
    assert result.best == best
    assert evaluations[-1][1] == result.metrics
    assert {event[1] for event in recorder.of("checkpoint")} >= {event[1]["step"] for event in evaluations}


def test_best_checkpoint_scores_what_was_reported(finished) -> None:
    _, _, result = finished
    loaded = load(result.out / "best.pt")
    assert loaded.step == result.best["step"]
    assert loaded.classes == result.classes
    splits = open_data(loaded.recipe.data)
    loader = EvalLoader(splits.val, loaded.recipe.data, batch_size=50)
    metrics = evaluate(loaded.model, loader, PixelPipeline(loaded.recipe.data), num_classes=10, device="cpu")
    assert metrics["top1"] == result.best["top1"]
    assert metrics["confusion"] == result.confusion
    assert sum(sum(row) for row in result.confusion) == len(splits.val)


def test_run_folder_tells_the_whole_story(finished) -> None:
    recipe, _, result = finished
    assert load_recipe(result.out / "recipe.toml") == recipe
    summary = json.loads((result.out / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["best"]["top1"] == result.best["top1"]
    assert list(summary["best"]["per_class_accuracy"]) == list(result.classes)
    assert summary["versions"]["torch"] == str(torch.__version__)
    assert summary["images_per_second"] > 0
    assert "optimizer" in load_checkpoint(result.out / "last.pt")
    assert load_checkpoint(result.out / "best.pt")["optimizer"] is None


def test_tensorboard_gets_the_figures(tiny, tmp_path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny(SHORT | {"train.tensorboard": True}), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert logged == [(line["step"], pytest.approx(line["loss"])) for line in lines_of(tmp_path / "run", "step")]
    assert events.Tags()["scalars"].count("val/top1") == 1


def test_same_seed_same_weights_other_seed_other_weights(tiny, tmp_path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny(SHORT | {"train.seed": seed, "train.threads": 2}), tmp_path / name)
    a, b, c = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_global_generator_of_the_loader_does_not_matter(tiny, tmp_path) -> None:
    """Transforms that run in this process or in a worker leave the same weights."""
    photo = {"augment.crop": "resized", "augment.rand_augment": "rand-m9-mstd0.5-inc1", "augment.erase_prob": 0.5}
    for workers in (0, 2):
        train(tiny(SHORT | photo | {"data.num_workers": workers}), tmp_path / str(workers))
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in "02")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_accumulation_is_the_same_step_in_less_memory(tiny, tmp_path) -> None:
    same = SHORT | {"train.batch_norm": "frozen", "augment.mix_token": 0.0, "augment.erase_prob": 0.0}
    same |= {"model.drop_path_rate": 0.0, "optim.name": "sgd", "optim.lr": 0.1}
    for parts in (1, 4):
        train(tiny(same | {"train.accumulation": parts}), tmp_path / str(parts))
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in "14")
    start = build_model(tiny(same), 10).state_dict()
    assert max((a[k] - start[k]).abs().max() for k in a) > 1e-3
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)


def test_a_run_may_be_counted_in_steps(tiny, tmp_path) -> None:
    recorder = Recorder()
    recipe = tiny({"schedule.steps": 7, "schedule.warmup_steps": 2, "schedule.decay": "linear", "train.eval_steps": 3})
    result = train(recipe, tmp_path / "run", reporter=recorder)
    assert result.step == result.total_steps == 7
    assert [event[1]["step"] for event in recorder.of("eval")] == [3, 6, 7]


def test_the_first_epochs_train_on_small_pictures_and_tests_are_large(tiny, tmp_path, monkeypatch) -> None:
    sides: list[tuple[bool, int]] = []
    embed = VOLO.forward_embed
    monkeypatch.setattr(
        VOLO, "forward_embed", lambda self, x: sides.append((self.training, x.shape[-1])) or embed(self, x)
    )
    schedule = {"schedule.epochs": 2, "schedule.cooldown_epochs": 0}
    train(tiny(schedule | {"schedule.small_size": 8, "schedule.small_epochs": 1}), tmp_path / "run")
    training = [side for is_training, side in sides if is_training]
    assert training == [8] * (len(training) // 2) + [16] * (len(training) // 2)
    assert {side for is_training, side in sides if not is_training} == {16}


def test_frozen_batch_norm_keeps_its_statistics(tiny, tmp_path) -> None:
    train(tiny(SHORT | {"train.batch_norm": "frozen"}), tmp_path / "frozen")
    train(tiny(SHORT), tmp_path / "moving")
    frozen, moving = (load_checkpoint(tmp_path / n / "last.pt")["model"] for n in ("frozen", "moving"))
    assert (frozen["patch_embed.conv.1.running_mean"] == 0).all()
    assert (moving["patch_embed.conv.1.running_mean"] != 0).any()


def test_synchronised_batch_norm_on_a_cpu_points_to_frozen(tiny) -> None:
    recipe = tiny({"train.batch_norm": "sync"})
    with pytest.raises(ValueError, match="batch_norm frozen"):
        prepare_batch_norm(torch.nn.BatchNorm2d(3), recipe.train, World(0, 2, torch.device("cpu")))


def test_diverging_run_stops_and_keeps_a_good_checkpoint(tiny, tmp_path) -> None:
    recipe = tiny({"optim.lr": 1e30, "optim.clip_grad": 0.0, "train.checkpoint_minutes": 0.0})
    with pytest.raises(
        NonFiniteLossError, match=r"at step \d+, where the learning rate was .*--optim\.lr.*last\.pt"
    ) as raised:
        train(recipe, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["step"] < raised.value.step <= 4
    assert all(t.isfinite().all() for part in ("model", "ema") for t in checkpoint[part].values())
    assert max(line["step"] for line in lines_of(tmp_path / "run", "step")) < raised.value.step + 1


def test_weights_are_checked_before_they_are_saved(tiny, tmp_path) -> None:
    """The loss of the only step is fine, its update is not."""
    one_step = {"schedule.epochs": 0.08, "schedule.warmup_epochs": 0.0, "schedule.cooldown_epochs": 0.0}
    with pytest.raises(NonFiniteLossError, match=r"weights became NaN.*No checkpoint had been written yet"):
        train(
            tiny(one_step | {"optim.lr": 1e38, "optim.weight_decay": 1e10, "train.eval_every": 0.0}), tmp_path / "run"
        )
    assert len(lines_of(tmp_path / "run", "step")) == 1
    assert not (tmp_path / "run" / "last.pt").exists()


class FileLimitAt(NullReporter):
    """Lets no file grow beyond a size from a step on, as a disk that runs full."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step(self, report) -> None:
        if report.step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("size", "message"), [(300_000, r"last\.pt is unchanged.*--resume"), (2_000, r"--resume.*jsonl")]
)
def test_full_disk_is_reported_and_the_run_continues_later(tiny, tmp_path, size, message) -> None:
    recipe, out = tiny(), tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=message):
            train(recipe, out, reporter=FileLimitAt(20, size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(out / "last.pt")["step"] == 12
    assert list(out.glob("*.tmp")) == []
    assert train(recipe, out, resume=True).status == "completed"
    train(recipe, tmp_path / "whole")
    a, b = (load_checkpoint(folder / "last.pt")["model"] for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_fine_tuning_to_other_classes_and_another_size(tiny, finished, tmp_path) -> None:
    from PIL import Image

    for split, count in (("train", 12), ("val", 4)):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200)), ("green", (30, 200, 30))):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), tuple(c + i for c in colour)).save(
                    tmp_path / "data" / split / name / f"{i}.png"
                )
    _, _, earlier = finished
    overrides = {
        "model.weights": str(earlier.out / "best.pt"),
        "data.kind": "folder",
        "data.path": str(tmp_path / "data"),
        "data.img_size": 32,
        "train.batch_size": 12,
        "train.batch_norm": "frozen",
        "augment.erase_prob": 0.0,
        "augment.mix_token": 0.0,
        "schedule.epochs": 10,
        "schedule.warmup_epochs": 0.0,
    }
    result = train(tiny(overrides), tmp_path / "run")
    loaded = load(tmp_path / "run" / "best.pt")
    assert loaded.classes == ("blue", "green", "red")
    assert loaded.model.config.img_size == (32, 32)
    assert loaded.model.head.out_features == 3
    assert result.best["top1"] == 1.0
    start = build_model(tiny(overrides), 3).state_dict()
    source = load(earlier.out / "best.pt").model.state_dict()
    assert torch.equal(start["network.0.0.attn.v.weight"], source["network.0.0.attn.v.weight"])
    assert start["pos_embed"].shape[1:3] == (4, 4)


def test_outputs_that_are_not_finite_are_said_and_never_the_best(tiny, tmp_path, monkeypatch) -> None:
    """Where the argmax of NaN is the first class, and a tenth of the images is of it."""
    forward = VOLO.forward
    monkeypatch.setattr(VOLO, "forward", lambda self, x: forward(self, x) * (1.0 if self.training else math.nan))
    heard = Heard()
    result = train(tiny(SHORT | {"train.tensorboard": True}), tmp_path / "run", reporter=heard)
    assert result.best == {}
    assert not (tmp_path / "run" / "best.pt").exists()
    assert len([m for m in heard.messages if "after step 6 met outputs that are NaN or infinite" in m]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=refuse)["loss"] is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=refuse)
    assert summary["final"]["loss"] is None


def test_dropout_and_mixing_draw_other_numbers_than_the_images(tiny, tmp_path, monkeypatch) -> None:
    """With a seed that is also the number of a stream."""
    seeds: list[int] = []
    monkeypatch.setattr(loop, "_seed", lambda value, device: seeds.append(value))
    for seed in range(1, 5):
        train(tiny(SHORT | {"train.seed": seed, "train.eval_every": 0.0}), tmp_path / str(seed))
    images = {
        int(k)
        for stream in (keyed.ORDER, keyed.SAMPLE, keyed.CROP, keyed.SCENE)
        for seed in range(1, 5)
        for epoch in range(3)
        for k in keyed.key(stream, seed, epoch, np.arange(200))
    }
    assert len(seeds) == len(set(seeds)) > 20
    assert images.isdisjoint(seeds)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.batch_size": 100_000}, "training images"),
        ({"train.device": "cuda:99"}, "GPU"),
        ({"train.device": "toaster"}, "toaster"),
        ({"train.parallel": "fsdp", "train.amp": "fp16"}, "fsdp"),
        ({"model.options": {"num_classes": 3}}, "num_classes"),
        ({"schedule.small_size": 20, "schedule.small_epochs": 1}, r"small_size is from 1 to data\.img_size"),
        ({"model.name": "volo_nanno"}, "did you mean 'volo_nano'"),
        ({"optim.ema_decay": 1.5}, "ema_decay"),
    ],
)
def test_contradictions_are_named_before_anything_is_written(tiny, tmp_path, overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_world_of_one() -> None:
    with join_world("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert world.is_main


def test_stored_recipe_is_toml(finished) -> None:
    _, _, result = finished
    assert tomllib.loads((result.out / "recipe.toml").read_text())["train"]["batch_size"] == 64


@pytest.mark.slow
def test_compiled_training_learns_the_same(tiny, tmp_path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        train(tiny({"train.compile": compiled, "train.eval_every": 0.0}), tmp_path / name)
    eager, compiled = ([line["loss"] for line in lines_of(tmp_path / name, "step")] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=2e-2)


def test_what_the_data_has_to_say_is_passed_on(tiny, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 20), (16 * i, 0, 255)).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "a" / "cut.png").write_bytes(b"")
    (tmp_path / "data" / "b" / "notes.doc").write_bytes(b"not an image")
    heard = Heard()
    recipe = tiny(
        {
            "data.kind": "folder",
            "data.path": str(tmp_path / "data"),
            "data.on_bad_image": "skip",
            "train.batch_size": 4,
            "schedule.epochs": 1,
        }
    )
    train(recipe, tmp_path / "run", reporter=heard)
    assert any("cut.png" in message for message in heard.messages)
    assert any("notes.doc" in message for message in heard.messages)


class Heard(NullReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize("warmup", [True, False])
def test_a_random_start_that_the_average_keeps_is_said(tiny, tmp_path, warmup: bool) -> None:
    heard = Heard()
    options = {"optim.ema_decay": 0.9, "optim.ema_warmup": warmup, "schedule.epochs": 2}
    train(tiny(options), tmp_path / "run", reporter=heard)
    said = [text for text in heard.messages if "random start" in text]
    assert bool(said) != warmup and all("--optim.ema_warmup true" in text for text in said)


class Averages(nn.Module):
    """No VOLO: layers on an image of 8 x 8 px."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 64), nn.GELU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class AveragesOfDigits(Classification):
    def create_model(self) -> nn.Module:
        torch.manual_seed(self.recipe.train.seed)
        return Averages()

    def restore_model(self, config: dict) -> nn.Module:
        return Averages()

    def model_config(self, model: nn.Module) -> dict:
        return {"averages": 8}

    def create_task(self, model: nn.Module) -> nn.Module:
        return ClassifyTask(model, self.recipe.loss, self.recipe.augment)


def test_a_network_of_ones_own_is_trained_and_continued(tiny, tmp_path) -> None:
    plain = {"augment.mix_token": 0.0, "loss.token_weight": 0.0, "schedule.epochs": 2, "train.eval_every": 1.0}
    recipe = tiny(plain)
    whole = train(recipe, tmp_path / "run", workload=AveragesOfDigits)
    assert whole.metrics["top1"] > 0.5
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")  # of the first epoch or the second
    assert checkpoint["model_config"] == {"averages": 8}

    class Stopped(NullReporter):
        def on_eval(self, metrics, is_best) -> None:
            if metrics["epoch"] == 1.0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", reporter=Stopped(), workload=AveragesOfDigits)
    continued = train(recipe, tmp_path / "cut", resume=True, workload=AveragesOfDigits)
    assert continued.metrics == whole.metrics
