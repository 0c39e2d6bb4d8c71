"""Every recipe that ships is complete: it loads, its head says where it comes from, and its model can be built."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from volo.config import DataConfig, find_recipe, list_recipes, load_recipe, recipe_from_dict, recipe_to_toml
from volo.data.images import open_data
from volo.data.pack import pack
from volo.models.hub import PRETRAINED
from volo.models.volo import DROP_PATH_RATES, VARIANTS
from volo.training.optim import LearningRate
from volo.training.workloads.classification import build_model
from volo.training.workloads.segmentation import build_segmenter, check_recipe

RECIPES = {path.stem: path for path in list_recipes()}
HEAD_FIELDS = ("paper", "command", "expected", "hardware", "reproduced")

every_recipe = pytest.mark.parametrize("name", RECIPES)


def head_of(path: Path) -> tuple[str, dict[str, str]]:
    """Title and fields of the comment a recipe starts with; a field may run over several lines."""
    lines = path.read_text(encoding="utf-8").split("\n")
    head = [line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    fields: dict[str, str] = {}
    name = ""
    for line in head:
        if match := re.match(r" ([a-z]+): +(\S.*)", line):
            name, fields[match[1]] = match[1], match[2]
        elif name:
            fields[name] += " " + line.strip()
    return head[0].strip(), fields


def test_published_runs_are_all_here() -> None:
    published = ["d1_224", "d2_224", "d3_224", "d4_224", "d5_224", "d1_384", "d2_384"]
    published += ["d3_448", "d4_448", "d5_448", "d5_512"]
    assert {f"imagenet_volo_{run}" for run in published} <= RECIPES.keys()


@every_recipe
def test_head_says_where_the_recipe_comes_from(name: str) -> None:
    title, fields = head_of(RECIPES[name])
    assert title
    assert [field for field in HEAD_FIELDS if not fields.get(field)] == []
    assert f"volo train {name}" in fields["command"]
    if "several scales" in fields["expected"]:
        assert f"volo evaluate runs/{name} --scales" in fields["command"], "how does one come to that score?"
    assert re.search(r"hour|minute", fields["hardware"]), "how long does it take?"
    assert re.match(r"\d{4}-\d\d-\d\d|not reproduced here", fields["reproduced"])


@every_recipe
def test_model_builds_and_runs_at_the_size_of_the_recipe(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    size = recipe.data.img_size
    without_weights = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, weights=""))
    height, width = (size, size) if isinstance(size, int) else size
    is_segmentation = recipe.task == "segment"
    with torch.device("meta"):
        model = (build_segmenter if is_segmentation else build_model)(without_weights, num_classes=7)
        logits = model(torch.empty(2, 3, height, width))
    assert logits.shape == ((2, 7, height, width) if is_segmentation else (2, 7))


@every_recipe
def test_recipe_survives_being_written_out(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES[name])
    assert recipe_from_dict(recipe.to_dict()) == recipe
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@every_recipe
def test_batch_divides_into_micro_batches(name: str) -> None:
    train = load_recipe(RECIPES[name]).train
    assert train.batch_size % train.accumulation == 0


# Learning rate at the recipe's batch, from the authors' commands (D1 to D3) and the paper's Table 2 (D4, D5).
@pytest.mark.parametrize(("variant", "lr"), [("d1", 1.6e-3), ("d2", 1e-3), ("d3", 1e-3), ("d4", 1e-3), ("d5", 8e-4)])
def test_training_from_scratch_follows_the_paper(variant: str, lr: float) -> None:
    recipe = load_recipe(f"imagenet_volo_{variant}_224")
    assert recipe.peak_lr == pytest.approx(lr)
    assert recipe.model.drop_path_rate == DROP_PATH_RATES[f"volo_{variant}"]
    assert recipe.model.weights == ""
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, recipe.schedule.cooldown_epochs) == (300, 20, 10)


@pytest.mark.parametrize("name", [n for n in RECIPES if re.fullmatch(r"imagenet_volo_d\d_(?!224)\d+", n)])
def test_fine_tuning_starts_from_the_224_weights(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    assert recipe.model.weights == f"{recipe.model.name}.224"
    assert recipe.model.name in VARIANTS
    assert recipe.model.drop_path_rate == DROP_PATH_RATES[recipe.model.name]
    assert name.endswith(f"_{recipe.data.img_size}")
    assert (recipe.peak_lr, recipe.schedule.min_lr, recipe.optim.weight_decay) == (8e-6, 4e-6, 1e-8)
    smaller = dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, batch_size=recipe.train.batch_size // 8)
    )
    rates = LearningRate.from_recipe(smaller, steps_per_epoch=100)
    assert (rates.peak, rates.min_lr, rates.warmup_lr) == pytest.approx((1e-6, 0.5e-6, 0.125e-6))
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs) == (30, 5)


@pytest.mark.parametrize("name", [n for n in RECIPES if load_recipe(RECIPES[n]).task == "segment"])
def test_segmentation_recipes_say_nothing_without_effect(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    check_recipe(recipe)
    assert recipe.train.batch_size // recipe.train.accumulation >= 2, "UPerNet's pooling needs two images"


@pytest.mark.parametrize("data", ["ade20k", "cityscapes"])
@pytest.mark.parametrize("variant", ["d1", "d2", "d3", "d4", "d5"])
def test_segmentation_follows_the_nearest_known_recipe(data: str, variant: str) -> None:
    recipe = load_recipe(RECIPES[f"{data}_volo_{variant}"])
    assert recipe.model.name == f"upernet_volo_{variant}"
    assert recipe.model.weights in PRETRAINED and recipe.model.weights.startswith(f"volo_{variant}.")
    assert recipe.model.drop_path_rate == DROP_PATH_RATES[f"volo_{variant}"]
    assert (recipe.optim.name, recipe.peak_lr, recipe.optim.weight_decay) == ("adamw", 6e-5, 0.01)
    assert (recipe.schedule.steps, recipe.schedule.warmup_steps, recipe.schedule.decay) == (160_000, 1500, "linear")
    assert (recipe.segment.aux_weight, recipe.segment.test, recipe.train.batch_norm) == (0.4, "slide", "sync")
    assert recipe.segment.reduce_zero_label == (data == "ade20k")


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("imagenet_")])
def test_imagenet_may_lie_in_shards(name: str, tmp_path: Path) -> None:
    for i in range(8):
        path = tmp_path / "folder" / ("train", "val")[i // 4] / ("n01440764", "n01443537")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(path)
    pack(DataConfig(path=str(tmp_path / "folder")), tmp_path / "shards")
    data = load_recipe(name).data
    for place in ("folder", "shards"):
        splits = open_data(dataclasses.replace(data, path=str(tmp_path / place)))
        assert splits.classes == ("n01440764", "n01443537")
        assert (len(splits.train), len(splits.val)) == (4, 4)


OURS = "pictures64_nano_token_labels"
TOKEN_LABELS = [name for name, path in RECIPES.items() if load_recipe(path).task == "token_label"]


def test_the_papers_runs_have_token_labels() -> None:
    assert {n for n in RECIPES if re.fullmatch(r"imagenet_volo_d\d_\d+", n)} <= set(TOKEN_LABELS)
    assert load_recipe("imagenet_volo_d1_224_plain").task == "classify"
    assert {"cifar10_token_labels", "photos_token_labels"} <= set(TOKEN_LABELS)


def test_the_pretraining_of_nano_has_token_labels_of_its_own_kind() -> None:
    """MixToken costs a short training more than it gains, and the annotator is often wrong (its model card)."""
    recipe = load_recipe(OURS)
    assert (recipe.augment.mix_token, recipe.token_label.ground_truth) == (0.0, "only")
    assert not recipe.annotator.model and not recipe.annotator.recipe, "its label maps are given"


@pytest.mark.parametrize("name", [name for name in TOKEN_LABELS if name != OURS])
def test_token_labels_as_the_paper_has_them(name: str) -> None:
    recipe = load_recipe(RECIPES[name])
    labels = recipe.token_label
    assert (labels.cls_weight, labels.dense_weight, labels.crop_order) == (1.0, 0.5, "corrected")
    assert recipe.augment.mix_token == 1.0
    assert recipe.augment.mixup == recipe.augment.cutmix == 0
    assert labels.ground_truth == bool(recipe.model.weights), "fine-tuning mixes in the ground truth"
    if recipe.annotator.recipe:
        assert load_recipe(recipe.annotator.recipe).task == "classify"
    else:
        assert recipe.annotator.model


def test_a_recipe_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = RECIPES["imagenet_volo_d1_224"]
    for name in ("imagenet_volo_d1_224", "imagenet_volo_d1_224.toml", "recipes/imagenet_volo_d1_224.toml", shipped):
        assert find_recipe(name) == shipped
    own = tmp_path / "imagenet_volo_d1_224.toml"
    own.write_text("", encoding="utf-8")
    assert find_recipe("imagenet_volo_d1_224.toml") == Path("imagenet_volo_d1_224.toml"), (
        "a file that exists comes first"
    )


def test_an_unknown_recipe_names_the_nearest_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean 'imagenet_volo_d1_224'\?"):
        find_recipe("imagenet_volo_d1_242")
    (tmp_path / "mine.toml").write_text("", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"that folder holds mine\.toml"):
        find_recipe(tmp_path / "mina.toml")


def test_letters_of_any_alphabet_survive_toml(tmp_path: Path) -> None:
    recipe = recipe_from_dict({"data": {"path": "fotos/größe/写真/\U0001f33b"}})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
