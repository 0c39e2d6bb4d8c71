"""What is planted in a data set is found, and little else."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import volo
from volo.config import DataConfig
from volo.data.images import open_data
from volo.data.sources import ArraySource
from volo.explain.data_check import (
    HEADER,
    Duplicate,
    check_data,
    grey_thumbnails,
    joined,
    label_issues,
    near_duplicates,
)
from volo.inference.embed import Embeddings, embed_source
from volo.inference.model_source import LoadedModel

TINY = {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2), "stem_dim": 16}


def blobs(seed: int, hue: int) -> np.ndarray:
    """uint8 [48, 48, 3]: a few soft blobs of one hue at random places; images of a hue are alike to the eye, not equal."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :48]
    image = np.full((48, 48, 3), 60.0)
    for _ in range(6):
        cy, cx, size = rng.uniform(0, 48), rng.uniform(0, 48), rng.uniform(3, 9)
        image[..., hue] += rng.uniform(60, 170) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * size**2))
        image[..., (hue + 1) % 3] += rng.uniform(0, 60) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * size**2))
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 230).astype(np.uint8)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    model = volo.create_model("volo_nano", num_classes=3, img_size=32, **TINY).eval()
    data = DataConfig(img_size=32, crop_pct=1.0, num_workers=0)
    return LoadedModel(model, "classify", ("r", "g", "b"), data, "tiny")


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, set[frozenset[str]]]:
    """train/ and val/ of three classes, and the pairs of names that show the same."""
    for part, count in (("train", 24), ("val", 6)):
        for hue, name in enumerate("rgb"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(blobs(1000 * hue + i + 500 * (part == "val"), hue)).save(folder / f"{i:02}.png")
    train, val = tmp_path / "data" / "train", tmp_path / "data" / "val"
    (val / "r" / "same.png").write_bytes((train / "r" / "03.png").read_bytes())
    Image.open(train / "g" / "04.png").save(val / "g" / "encoded.jpg", quality=75)
    Image.open(train / "b" / "05.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(train / "b" / "mirrored.png")
    brighter = np.clip(np.asarray(Image.open(val / "r" / "02.png")) * 1.1, 0, 255).astype(np.uint8)
    Image.fromarray(brighter).save(val / "g" / "brighter.png")
    pairs = [
        ("train/r/03.png", "val/r/same.png"),
        ("train/g/04.png", "val/g/encoded.jpg"),
        ("train/b/05.png", "train/b/mirrored.png"),
        ("val/r/02.png", "val/g/brighter.png"),
    ]
    return tmp_path / "data", {frozenset(pair) for pair in pairs}


def test_copies_are_found_and_others_not(
    loaded: LoadedModel, planted: tuple[Path, set[frozenset[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path / "cache"))
    folder, pairs = planted
    splits = open_data(DataConfig(path=str(folder), img_size=32, num_workers=0))
    parts = {"train": splits.train, "val": splits.val}
    found, features = embed_source(loaded, parts, views=2)
    check = check_data(found, features, parts, splits.classes)

    def name(i: int) -> str:
        root = "" if check.names[i].startswith(("train/", "val/")) else f"{check.parts[i]}/"
        return root + check.names[i]

    assert {frozenset((name(pair.first), name(pair.second))) for pair in check.duplicates} == pairs
    assert check.duplicate_count == 4
    by_pair = {frozenset((name(p.first), name(p.second))): p for p in check.duplicates}
    mirrored = by_pair[frozenset(("train/b/05.png", "train/b/mirrored.png"))]
    assert [pair for pair in check.duplicates if pair.is_mirrored] == [mirrored]
    kinds = [check.kind(pair) for pair in check.duplicates]
    assert kinds[:2] == ["train-val"] * 2 and set(kinds[2:]) == {"train", "val"}, "what leaks comes first"
    rows = list(csv.reader(io.StringIO("".join(check.to_csv()))))
    assert tuple(rows[0]) == HEADER and len(rows) == 1 + len(check.duplicates) + len(check.issues)
    across = next(row for row in rows if "brighter" in row[1] + row[2])
    assert {across[4], across[5]} == {"r", "g"} and across[6:] == ["val", "val"]
    listed = check.to_dict()
    assert listed["listed_duplicates"] == {"train-val": 2, "train": 1, "val": 1}
    assert len(listed["found"]) == len(rows) - 1


def test_a_part_is_returned_and_all_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 50, 16, generator=generator)
    thumbnails = 255 * torch.rand(50, 16, 16, generator=generator)
    for copy, original in ((40, 3), (41, 3), (42, 9)):
        features[:, copy], thumbnails[copy] = features[:, original], thumbnails[original]
    first = torch.arange(50) >= 42
    for block in (7, 50):
        pairs, count = near_duplicates(features, thumbnails, 1.0, first=first, block=block)
        assert [(p.first, p.second) for p in pairs] == [(9, 42), (3, 40), (3, 41), (40, 41)] and count == 4
        assert all(p.similarity == pytest.approx(1, abs=1e-5) and not p.is_mirrored for p in pairs)
        pairs, count = near_duplicates(features, thumbnails, 1.0, first=first, most=1, block=block)
        assert [(p.first, p.second) for p in pairs] == [(9, 42)] and count == 4


def test_model_and_pixels_must_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 30, 16, generator=generator)
    thumbnails = 255 * torch.rand(30, 16, 16, generator=generator)
    features[:, 1] = features[:, 0]  # alike for the model alone
    thumbnails[3] = thumbnails[2]  # in pixels alone
    assert near_duplicates(features, thumbnails) == ([], 0)
    features[1, 4], thumbnails[5] = features[0, 5], thumbnails[4].flip(-1)
    ((pair,), count) = near_duplicates(features, thumbnails)
    assert (pair.first, pair.second, pair.is_mirrored, count) == (4, 5, True, 1)


def test_images_of_one_grey_are_like_one_another_alone() -> None:
    images = torch.randint(0, 256, (4, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:2] = 0
    thumbnails = grey_thumbnails(
        {"train": ArraySource(images, torch.zeros(4, dtype=torch.int64), list("abcd"), ("x",))}
    )
    assert thumbnails.shape == (4, 16, 16) and thumbnails[2].mean() == pytest.approx(127, abs=8)
    features = torch.randn(2, 1, 8).expand(2, 4, 8) + 1e-6 * torch.randn(2, 4, 8)
    pairs, _ = near_duplicates(features, thumbnails, -0.99)
    assert {(p.first, p.second) for p in pairs} <= {(0, 1)}


def test_groups_are_joined_through_others() -> None:
    pairs = [Duplicate(0, 3, 1, False), Duplicate(3, 5, 1, False), Duplicate(1, 2, 1, False)]
    groups = joined(6, pairs).tolist()
    assert groups[0] == groups[3] == groups[5] != groups[1] == groups[2] != groups[4]


def test_planted_label_errors_are_found_with_precision() -> None:
    """Ten overlapping clusters, 5 % of whose labels are wrong; and none where none is."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(10).repeat_interleave(60)
    centres = 2.2 * torch.randn(10, 24, generator=generator)
    x = centres[truth] + torch.randn(600, 24, generator=generator)
    wrong = torch.randperm(600, generator=generator)[:30]
    labels = truth.clone()
    labels[wrong] = (truth[wrong] + torch.randint(1, 10, (30,), generator=generator)) % 10
    classes = tuple("abcdefghij")
    thumbnails = ArraySource(
        torch.randint(0, 256, (600, 3, 16, 16), dtype=torch.uint8, generator=generator),
        labels,
        [str(i) for i in range(600)],
        classes,
    )
    parts = ("train",) * 500 + ("val",) * 100
    order = torch.randperm(600, generator=generator)
    x, labels, truth = x[order], labels[order], truth[order]
    bad = set((labels != truth).nonzero().flatten().tolist())
    found = Embeddings(x.numpy(), tuple(map(str, range(600))), tuple(classes[i] for i in labels.tolist()), parts)
    sources = {"train": thumbnails.select(range(500)), "val": thumbnails.select(range(500, 600))}
    check = check_data(found, torch.stack([x, x]), sources, classes)
    hits = [issue for issue in check.issues if issue.image in bad]
    assert len(hits) >= 20, "recall"
    assert len(hits) / len(check.issues) >= 0.9, "precision"
    assert sum(issue.suggested == int(truth[issue.image]) for issue in hits) >= len(hits) - 1
    assert [issue.confidence for issue in check.issues] == sorted(issue.confidence for issue in check.issues)
    assert {check.parts[issue.image] for issue in hits} == {"train", "val"}, "held-out labels are judged too"
    clean = Embeddings(x.numpy(), found.names, tuple(classes[i] for i in truth.tolist()), parts)
    assert len(check_data(clean, torch.stack([x, x]), sources, classes).issues) <= 6


def test_thresholds_are_those_of_each_class() -> None:
    """By hand: a class whose images are never sure is not in question for that; what is sure of another is."""
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.6, 0.4], [0.95, 0.05]])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    # Thresholds: 0.9 and (0.8 + 0.55 + 0.4 + 0.05) / 4 = 0.45. Only the last reaches 0.9 of class 0; the one before it
    # prefers class 0 too, but not as the images of that class do.
    (issue,) = label_issues(probabilities, labels)
    assert (issue.image, issue.suggested) == (5, 0)
    assert (issue.confidence, issue.of_suggested) == (pytest.approx(0.05), pytest.approx(0.95))
    assert label_issues(probabilities, labels, torch.tensor([True, False])) == []


def test_small_classes_are_not_judged() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 20 + [1] * 20 + [2] * 2)
    x = 4 * torch.randn(3, 8, generator=generator)[labels] + torch.randn(42, 8, generator=generator)
    pixels = torch.randint(0, 256, (42, 3, 16, 16), dtype=torch.uint8, generator=generator)
    source = ArraySource(pixels, labels, [str(i) for i in range(42)], ("a", "b", "rare"))
    found = Embeddings(
        x.numpy(), tuple(source.names), tuple(source.classes[i] for i in labels.tolist()), ("train",) * 42
    )
    check = check_data(found, torch.stack([x, x]), {"train": source}, source.classes)
    assert check.not_judged == ("rare",)
    assert not any("rare" in (check.labels[i.image], check.classes[i.suggested]) for i in check.issues)
    with pytest.raises(ValueError, match="above -1 and at most 1; given: 1.5"):
        check_data(found, torch.stack([x, x]), {"train": source}, source.classes, threshold=1.5)
