"""Runs that begin with a linear probe: what it starts from, what it leaves, and where it meets other options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import volo
from volo.config import Recipe
from volo.models.checkpoint import load_checkpoint
from volo.training.loop import train
from volo.training.report import NullReporter


class Messages(NullReporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def start(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights others begin with: the ten digits, in one epoch."""
    out = tmp_path_factory.mktemp("start")
    train(tiny({"schedule.epochs": 1}), out)
    return out


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path / "cache"))


def probed(tiny: Callable[..., Recipe], start: Path, **changes: object) -> Recipe:
    recipe = tiny(
        {"model.weights": str(start), "model.probe": True, "schedule.epochs": 0, "schedule.warmup_epochs": 0}
        | {"schedule.cooldown_epochs": 0}
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    options = recipe.model.options | {"pool": "concat"}
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options=options))


def test_a_probe_alone(tiny: Callable[..., Recipe], start: Path, tmp_path: Path) -> None:
    told = Messages()
    result = train(probed(tiny, start), tmp_path / "run", reporter=told)
    assert (result.status, result.step, result.total_steps) == ("completed", 0, 0)
    before = load_checkpoint(start / "best.pt")
    after = load_checkpoint(tmp_path / "run/best.pt")
    assert result.best["top1"] > before["metrics"]["top1"] + 0.1, "frozen features tell more than the head of one epoch"
    for name, tensor in (before["ema"] or before["model"]).items():
        assert "head" in name or torch.equal(after["model"][name], tensor), f"{name} is not frozen"
    assert after["model"]["head.weight"].shape == (10, 96) and not after["model"]["aux_head.weight"].any()
    (text,) = [text for text in told.texts if "cross-validation" in text]
    assert "96 features of" in text
    loaded = volo.load(tmp_path / "run")
    assert loaded.metrics["top1"] == result.best["top1"]
    again = train(probed(tiny, start), tmp_path / "run", resume=True)
    assert again.status == "completed" and again.best == result.best


def test_fine_tuning_begins_where_the_probe_ends(tiny: Callable[..., Recipe], start: Path, tmp_path: Path) -> None:
    alone = train(probed(tiny, start), tmp_path / "alone")
    recipe = probed(tiny, start, schedule__epochs=2, optim__lr=1e-3)
    result = train(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert evaluations[0]["step"] == 0 and evaluations[0]["top1"] == alone.best["top1"]
    assert len(evaluations) == 3 and result.best["top1"] >= alone.best["top1"]


def test_resumed_bit_for_bit(tiny: Callable[..., Recipe], start: Path, tmp_path: Path) -> None:
    """A run that is cut off after the probe, whose features are gone, is the same run."""

    class CutOff(Exception):
        pass

    class StopAfterStep(NullReporter):
        def on_checkpoint(self, path: Path, step: int) -> None:
            if step > 0:
                raise CutOff

    recipe = probed(tiny, start, schedule__epochs=2)
    train(recipe, tmp_path / "whole")
    with pytest.raises(CutOff):
        train(recipe, tmp_path / "cut", reporter=StopAfterStep())
    for path in (tmp_path / "cache/features").iterdir():
        path.unlink()
    train(recipe, tmp_path / "cut", resume=True)
    whole, cut = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut["model"][name]) for name, tensor in whole["model"].items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_begin_with_the_same_probe(
    parallel: str, tiny: Callable[..., Recipe], start: Path, tmp_path: Path, start_run: Callable
) -> None:
    recipe = probed(tiny, start, schedule__epochs=0.2, train__parallel=parallel, train__channels_last=True)
    train(probed(tiny, start), tmp_path / "one")
    done = start_run(recipe, tmp_path / "two", processes=2)
    assert done.wait(240) == 0, done.communicate()[1]
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    first = next(line for line in map(json.loads, lines) if line["kind"] == "eval")
    assert first["top1"] == load_checkpoint(tmp_path / "one/best.pt")["metrics"]["top1"]


def test_few_images_make_smaller_batches(tiny: Callable[..., Recipe], start: Path, tmp_path: Path) -> None:
    recipe = probed(tiny, start, schedule__epochs=1, train__batch_size=5000)
    told = Messages()
    assert train(recipe, tmp_path / "run", reporter=told).step == 1
    assert any("there are only" in text for text in told.texts)


def test_refused_where_it_makes_no_sense(tiny: Callable[..., Recipe], start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.weights is empty"):
        train(tiny({"model.probe": True}), tmp_path / "a")
    with pytest.raises(ValueError, match="head of a classifier"):
        train(dataclasses.replace(probed(tiny, start), task="segment"), tmp_path / "b")
    with pytest.raises(ValueError, match="epochs > 0"):
        train(tiny({"schedule.epochs": 0, "schedule.warmup_epochs": 0}), tmp_path / "c")
    assert not any((tmp_path / name / "last.pt").exists() for name in "abc")
