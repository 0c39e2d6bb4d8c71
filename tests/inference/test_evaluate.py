"""Evaluation: the figures of a loop written out by hand, whatever the data calls its classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from volo.config import DataConfig, ModelConfig, Recipe
from volo.data.images import open_data
from volo.data.loader import EvalLoader
from volo.data.transforms import PixelPipeline
from volo.inference.evaluate import MirrorAveraged, evaluate, match_classes, open_labelled, read_real_labels
from volo.training.workloads.classification import build_model

DIGITS = DataConfig(kind="digits", img_size=16, num_workers=0)
WNIDS = ("n01440764", "n01443537", "n01484850")
NAMES = ("tench", "goldfish", "great white shark")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    options = {"depths": [1, 1], "embed_dims": [16, 32], "num_heads": [1, 2], "stem_dim": 8, "patch_size": 4}
    return build_model(Recipe(data=DIGITS, model=ModelConfig(name="volo_nano", options=options)), 10)


@pytest.fixture(scope="module")
def loader() -> EvalLoader:
    return EvalLoader(open_data(DIGITS).val, DIGITS, batch_size=64)


def run(model: torch.nn.Module, loader: EvalLoader, **options) -> dict:
    return evaluate(model, loader, PixelPipeline(DIGITS), num_classes=10, device="cpu", **options)


def test_equals_a_loop_written_out(model: torch.nn.Module, loader: EvalLoader) -> None:
    model.train()
    model.patch_embed.eval()  # as with frozen BatchNorm: evaluation must not unfreeze it
    seen: list[int] = []
    got = run(model, loader, on_batch=seen.append)
    assert model.training
    assert not model.patch_embed.training
    assert seen[-1] == len(loader.source)

    model.eval()
    pixels = PixelPipeline(DIGITS).eval()
    with torch.no_grad():
        logits = torch.cat([model(pixels(batch["image"])) for batch in loader])
    target = loader.source.targets
    ranks = (logits > logits.gather(1, target[:, None])).sum(dim=1)
    assert got["count"] == len(target)
    assert got["top1"] == pytest.approx(float((ranks == 0).double().mean()))
    assert got["top5"] == pytest.approx(float((ranks < 5).double().mean()))
    assert got["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), rel=1e-5)


def test_an_answer_that_is_not_finite_names_the_image(model: torch.nn.Module, loader: EvalLoader) -> None:
    class Overflowing(torch.nn.Module):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            logits = model(images)
            if self.calls == 2:
                logits[5, 3] = -torch.inf  # of another class than the right one: the loss stays finite
            return logits

    name = loader.source.names[64 + 5]
    with pytest.raises(ValueError, match=f"{name}: the model's answer is not finite.*use amp off or bf16"):
        run(Overflowing(), loader, amp="fp16")


def test_mirror_images_are_averaged_as_probabilities(model: torch.nn.Module, loader: EvalLoader) -> None:
    model.eval()
    both = MirrorAveraged(model)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        wanted = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
        torch.testing.assert_close(both(images).exp(), wanted)
        torch.testing.assert_close(both(images.flip(3)), both(images))
    assert run(both, loader)["loss"] != run(model, loader)["loss"]


def test_classes_in_another_order_and_sets_of_labels(model: torch.nn.Module, loader: EvalLoader) -> None:
    plain = run(model, loader)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    label_sets = [[order[t]] if i % 2 else [] for i, t in enumerate(loader.source.targets.tolist())]
    mapped = run(model, loader, class_map=order, label_sets=label_sets)
    for i, row in enumerate(plain["confusion"]):
        assert mapped["confusion"][order[i]] == row
    assert mapped["real"]["count"] == len(loader.source) // 2


def test_bf16_is_near(model: torch.nn.Module, loader: EvalLoader) -> None:
    assert run(model, loader, amp="bf16")["loss"] == pytest.approx(run(model, loader)["loss"], rel=0.02)
    with pytest.raises(ValueError, match="amp is one of off, bf16, fp16; given: 'half'"):
        run(model, loader, amp="half")


def test_classes_are_matched_by_name_then_by_number() -> None:
    assert match_classes(("dog", "cat"), ("cat", "cow", "dog")) == [2, 0]
    assert match_classes(("10", "2"), tuple("abcdefghijk")) == [10, 2]
    with pytest.raises(ValueError, match=r"class 'kat', which the model does not know; did you mean 'cat'\?"):
        match_classes(("kat",), ("cat", "dog"))
    with pytest.raises(ValueError, match="'3', which the model does not know"):
        match_classes(("3",), ("cat", "dog"))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.mark.parametrize(
    ("folders", "targets"),
    [
        (("goldfish", "tench"), [1, 0]),  # sorted by folder, two of the three classes
        (("n01443537", "n01484850"), [1, 2]),
        (("0", "2"), [0, 2]),
        (("val/tench", "val/goldfish", "train/tench"), [1, 0]),
    ],
)
def test_folders_of_every_kind(tmp_path: Path, folders: tuple[str, ...], targets: list[int]) -> None:
    for folder in folders:
        picture(tmp_path / folder / "a.png")
    labelled = open_labelled(tmp_path, DataConfig(), NAMES, WNIDS)
    assert labelled.class_map is None
    assert labelled.source.targets.tolist() == targets


def test_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    """ImageNet-V2: folder 10 is class 10, though it comes second when sorted as text."""
    for number in range(12):
        picture(tmp_path / str(number) / "a.png")
    source = open_labelled(tmp_path, DataConfig(), tuple("abcdefghijkl")).source
    assert [int(name.split("/")[0]) for name in source.names] == source.targets.tolist()


def test_without_a_path_the_pictures_held_out_from_training_are_taken(tmp_path: Path) -> None:
    for name in NAMES:
        for i in range(4):
            picture(tmp_path / name / f"{i}.png")
    config = DataConfig(path=str(tmp_path), val_fraction=0.25)
    expected = list(open_data(config).val.names)
    assert list(open_labelled(None, config, sorted(NAMES)).source.names) == expected
    assert list(open_labelled(tmp_path, config, sorted(NAMES)).source.names) == expected
    with pytest.raises(ValueError, match="with --data"):
        open_labelled(None, DataConfig(), NAMES, WNIDS)


def test_the_folder_one_is_in_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without a path of its own, such as one of the digits, was not trained on "."."""
    for i, name in enumerate(NAMES):
        picture(tmp_path / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for data in (DataConfig(), DIGITS):
        labelled = open_labelled(".", data, NAMES, WNIDS)
        assert sorted(labelled.source.names) == sorted(f"{name}/{i}.png" for i, name in enumerate(NAMES))


def npz(path: Path, count: int) -> Path:
    """`count` images of the classes 0, 1, 2, 0, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=np.zeros((count, 8, 8, 3), np.uint8), labels=np.arange(count) % 3, classes=np.array(NAMES))
    return path


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"": 30}, 30),
        ({"val": 6}, 6),
        ({"test": 7}, 7),
        ({"train": 20}, 20),
        ({"train": 20, "val": 6}, 6),
        ({"data_batch_1": 9, "data_batch_2": 9}, 18),
        ({"data_batch_1": 9, "test_batch": 5}, 5),
    ],
)
def test_npz_files_are_scored_whole_or_by_their_own_split(tmp_path: Path, files: dict[str, int], count: int) -> None:
    for name, its in files.items():
        npz(tmp_path / "new" / f"{name or 'other'}.npz", its)
    path = tmp_path / "new" / ("" if "" not in files else "other.npz")
    trained_on = DataConfig(path=str(npz(tmp_path / "trained.npz", 30)), img_size=8)
    labelled = open_labelled(path, trained_on, tuple(reversed(NAMES)))
    assert len(labelled.source) == count
    assert labelled.class_map == [2, 1, 0]
    assert len(open_labelled(tmp_path / "trained.npz", trained_on, NAMES).source) == 3, "its own: those held out"


def test_unknown_folders_and_bad_pictures_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "whale" / "a.png")
    with pytest.raises(ValueError, match="whale"):
        open_labelled(tmp_path, DataConfig(), NAMES)
    (tmp_path / "whale").rename(tmp_path / "tench")
    (tmp_path / "tench" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.png"):
        open_labelled(tmp_path, DataConfig(), NAMES)
    labelled = open_labelled(tmp_path, DataConfig(on_bad_image="skip"), NAMES)
    assert [bad.name for bad in labelled.skipped] == ["tench/b.png"]
    assert len(labelled.source) == 1


def test_real_labels_go_by_the_number_in_the_name(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[970, 795], [], [809]]))
    names = ["n3/ILSVRC2012_val_00000003.JPEG", "n1/ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.png"]
    assert read_real_labels(path, names) == [[809], [970, 795], []]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("[[1]]", "ILSVRC2012_val_00000002.JPEG", "is none of these"),
        ("[[1]]", "holiday.jpg", "is none of these"),
        ("[[1000]]", "ILSVRC2012_val_00000001.JPEG", "class numbers 0 to 999"),
        ('{"a": 1}', "ILSVRC2012_val_00000001.JPEG", "list of lists"),
        ("<html>", "ILSVRC2012_val_00000001.JPEG", "is not JSON"),
    ],
)
def test_what_is_not_real_labels_is_refused(tmp_path: Path, text: str, name: str, message: str) -> None:
    path = tmp_path / "real.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_real_labels(path, [name])


def test_real_labels_as_published() -> None:
    """The whole file, as timm carries it: 50,000 images, of which 3,163 have no label (arXiv 2006.07159)."""
    from importlib.util import find_spec

    spec = find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "data" / "_info" / "imagenet_real_labels.json"
    if not path.is_file():
        pytest.skip("this timm does not carry ReaL labels")
    labels = read_real_labels(path, [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50_001)])
    assert sum(not entry for entry in labels) == 3_163
    assert labels[1] == [970, 795]
