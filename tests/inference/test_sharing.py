"""Models that go to the hub and come back, against a server on the loopback."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from local_hub import serving
from safetensors.torch import save_file

import volo
from volo.config import DataConfig, Recipe, SegmentConfig
from volo.inference.model_source import LoadedModel, load
from volo.inference.sharing import from_pretrained, save_pretrained

TINY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8}


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def classifier() -> LoadedModel:
    model = volo.create_model("volo_nano", num_classes=3, patch_size=4, **TINY).eval()
    data = DataConfig(img_size=32, crop_pct=0.9, mean=(0.1, 0.2, 0.3), path="/home/someone/photos", kind="folder")
    return LoadedModel(
        model, "classify", ("ant", "bee", "猫"), data, "a test", recipe=Recipe(data=data), metrics={"top1": 0.5}, step=7
    )


def test_a_folder_holds_all_that_is_needed(classifier: LoadedModel, tmp_path: Path) -> None:
    folder = save_pretrained(classifier, tmp_path / "ants")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("library_name: volo", "pipeline_tag: image-classification", "ant, bee, 猫", "top-1 50.00 %", "# ants"):
        assert part in card
    assert "/home/someone" not in (folder / "config.json").read_text(encoding="utf-8")
    for loaded in (load(folder), from_pretrained(folder)):
        assert equal(loaded.model, classifier.model)
        assert not loaded.model.training
        assert loaded.classes == classifier.classes
        assert (loaded.preprocessing.crop_pct, loaded.preprocessing.mean) == (0.9, (0.1, 0.2, 0.3))
        assert (loaded.metrics, loaded.step) == ({"top1": 0.5}, 7)
    assert load(folder, img_size=64).preprocessing.img_size == 64
    with pytest.raises(ValueError, match="not empty"):
        save_pretrained(classifier, folder)


def test_names_of_somebody_else_do_not_command_the_terminal(classifier: LoadedModel, tmp_path: Path) -> None:
    names = ("ant\nbee", "\x1b[2Jbee", "猫")
    folder = save_pretrained(dataclasses.replace(classifier, classes=names), tmp_path / "ants")
    assert load(folder).classes == (r"ant\nbee", r"\x1b[2Jbee", "猫")


def test_segmentation_models_keep_their_colours(tmp_path: Path) -> None:
    model = volo.create_segmenter("fpn_volo_nano", 2, channels=16, **TINY).eval()
    recipe = Recipe(task="segment", data=DataConfig(img_size=64), segment=SegmentConfig(short_side=48))
    colours = {"colours": [[1, 2, 3], [4, 5, 6]]}
    given = LoadedModel(model, "segment", ("sky", "tree"), recipe.data, "a test", recipe=recipe, extras=colours)
    found = load(save_pretrained(given, tmp_path / "s"), task="segment")
    assert equal(found.model, model)
    assert found.colours == ((1, 2, 3), (4, 5, 6))
    assert found.segment.short_side == 48


PUSH = """
import sys, volo
print(volo.push_to_hub(sys.argv[1], "someone/thing", private=True))
loaded = volo.load("hf-hub:someone/thing")
assert loaded.classes == ("ant", "bee", "猫"), loaded.classes
assert volo.from_pretrained("someone/thing", revision="main").step == 7
theirs = volo.load("hf-hub:timm/volo_nano")
assert theirs.classes == ("a", "b", "c"), theirs.classes
assert theirs.preprocessing.crop_pct == 0.5 and theirs.preprocessing.mean == (0.5, 0.5, 0.5), theirs.preprocessing
try:
    volo.load("hf-hub:someone/nothing")
except OSError as error:
    print(error)
"""


def test_to_the_hub_and_back(classifier: LoadedModel, tmp_path: Path) -> None:
    folder = save_pretrained(classifier, tmp_path / "ants")
    save_file(volo.create_model("volo_nano", num_classes=3).state_dict(), tmp_path / "theirs.safetensors")
    described = {"pretrained_cfg": {"crop_pct": 0.5, "mean": [0.5] * 3, "std": [1, 1, 1], "label_names": list("abc")}}
    with serving() as hub:
        weights = (tmp_path / "theirs.safetensors").read_bytes()
        hub.offer("timm/volo_nano", config_json=json.dumps(described).encode(), model_safetensors=weights)
        env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret"}
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(folder)],
            capture_output=True,
            text=True,
            env=os.environ | env | {"no_proxy": "127.0.0.1"},
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.address}/someone/thing/commit/")
    assert "could not fetch config.json of someone/nothing" in done.stdout
    assert "Bearer hf_secret" in hub.tokens
    pushed = {path for path in hub.files if path.startswith("/someone/thing")}
    names = ("config.json", "model.safetensors", "README.md")
    assert pushed == {f"/someone/thing/resolve/main/{name}" for name in names}
    assert 'volo.load("hf-hub:someone/thing")' in hub.files["/someone/thing/resolve/main/README.md"].decode()
