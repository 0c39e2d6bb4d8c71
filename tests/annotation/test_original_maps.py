"""Label maps of the original tool: read safely, and refused where float16 has blurred the classes."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from volo.annotation.check import check_store
from volo.annotation.original_maps import OriginalMapError, find_original_map, import_original, read_original_map
from volo.cli.main import main
from volo.config import DataConfig
from volo.data.images import open_data
from volo.data.label_maps import LabelMaps
from volo.data.token_labels import PictureFrame, resample_label_maps, stack_frames


def save(path: Path, scores: torch.Tensor, classes: torch.Tensor, dtype: torch.dtype = torch.float16) -> Path:
    torch.save(torch.stack([scores, classes.float()]).to(dtype), path)
    return path


def test_scores_and_classes(tmp_path: Path):
    scores = torch.tensor([3.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 2, 2)
    classes = torch.tensor([5, 900, 7]).view(3, 1, 1).expand(3, 2, 2)
    read, indices = read_original_map(save(tmp_path / "a.pt", scores, classes), 1000)
    assert read.dtype == np.float16 and indices.dtype == np.int64
    assert read[:, 0, 1].tolist() == [3, 2, 1] and indices[:, 0, 1].tolist() == [5, 7, 900]


@pytest.mark.parametrize(
    ("largest", "num_classes", "dtype", "refused"),
    [
        (2048, 2049, torch.float16, False),
        (2049, 2100, torch.float16, True),  # is read back as 2048
        (2052, 21_841, torch.float16, True),
        (21_840, 21_841, torch.float32, False),
        (21_840, 21_841, torch.float16, True),
    ],
)
def test_the_limit_of_float16(tmp_path: Path, largest: int, num_classes: int, dtype: torch.dtype, refused: bool):
    path = save(tmp_path / "a.pt", torch.ones(1, 1, 1), torch.full((1, 1, 1), largest), dtype)
    if refused:
        with pytest.raises(
            OriginalMapError, match=r"a\.pt has the class index .* exact only to 2048: .* Generate the maps anew"
        ):
            read_original_map(path, num_classes)
    else:
        assert read_original_map(path, num_classes)[1].item() == largest


class Evil:
    def __reduce__(self):
        return (open, ("hacked", "w"))


def test_what_is_no_label_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    for content, words in (
        (torch.zeros(2, 3, 4), r"a tensor \[2, 3, 4\]"),
        ({"a": torch.zeros(1)}, "a dict"),
        (torch.full((2, 1, 1, 1), torch.nan), "no logits"),
        (torch.full((2, 1, 1, 1), 0.5), "no logits"),
        (torch.full((2, 1, 1, 1), -1.0), "no logits"),
        (torch.full((2, 1, 1, 1), 7.0), "class index 7, but the data has 7 classes"),
        (Evil(), "can run code"),
    ):
        torch.save(content, path)
        with pytest.raises(OriginalMapError, match=words):
            read_original_map(path, 7)
    assert not (tmp_path / "hacked").exists()
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(OriginalMapError, match="damaged|can run code"):
        read_original_map(path, 7)


def test_a_tensor_that_wants_gradients_is_one_like_others(tmp_path: Path):
    torch.save(torch.ones(2, 1, 1, 1, requires_grad=True), tmp_path / "a.pt")
    assert [array.item() for array in read_original_map(tmp_path / "a.pt", 2)] == [1, 1]


def test_names_are_found_as_the_original_names_them(tmp_path: Path):
    for name in ("n01/a.pt", "n01/x.y.pt", "n02/x.pt", "sub/z.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(name: str) -> str | None:
        path = find_original_map(tmp_path, name)
        return path and path.relative_to(tmp_path).as_posix()

    assert found("n01/a.JPEG") == found("train/n01/a.JPEG") == "n01/a.pt"
    assert found("train/n01/x.y.jpg") == "n01/x.y.pt"
    assert found("n02/x.y.jpg") == "n02/x.pt"
    assert found("train/n03/sub/z.jpg") == "sub/z.pt"
    assert found("n02/a.jpg") is None


WHOLE: dict[bool, bytes] = {}
for is_zip in (True, False):
    content = io.BytesIO()
    ranked = torch.randn(9, 3, 2, generator=torch.Generator().manual_seed(0)).topk(4, dim=0)
    torch.save(torch.stack([ranked[0], ranked[1].float()]).half(), content, _use_new_zipfile_serialization=is_zip)
    WHOLE[is_zip] = content.getvalue()


def read_damaged(path: Path, content: bytes) -> str:
    """What the error says; or nothing, where what is left still makes a label map."""
    path.write_bytes(content)
    try:
        scores, classes = read_original_map(path, 9)
    except OriginalMapError as error:
        return str(error)
    assert scores.shape == classes.shape
    assert classes.min() >= 0 and classes.max() < 9
    return ""


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_files_that_are_cut_off_anywhere(tmp_path: Path, is_zip: bool):
    whole = WHOLE[is_zip]
    assert not read_damaged(tmp_path / "a.pt", whole)
    for length in range(len(whole)):
        assert str(tmp_path / "a.pt") in read_damaged(tmp_path / "a.pt", whole[:length]), length


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@given(changes=st.dictionaries(st.floats(0, 1, exclude_max=True), st.integers(1, 255), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_files_with_other_bytes(tmp_path_factory: pytest.TempPathFactory, is_zip: bool, changes: dict[float, int]):
    content = bytearray(WHOLE[is_zip])
    for place, flipped in changes.items():
        content[int(place * len(content))] ^= flipped
    read_damaged(tmp_path_factory.getbasetemp() / "flipped.pt", content)


# Importing them

CLASSES = ["ant", "bee", "cat", "dog"]


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Tiny PNG files of random noise in class folders; their names."""
    generator = np.random.default_rng(seed)
    names = [f"{CLASSES[i % 4]}/{i:04}.png" for i in range(count)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name)
    return names


def write_original(folder: Path, names: list[str], num_classes: int = 4, dtype: torch.dtype = torch.float16) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in names:
        scores, classes = torch.randn(num_classes, 3, 3, generator=generator).topk(2, dim=0)
        path = (folder / name).with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([scores, classes.float()]).to(dtype), path)


def test_original_maps_are_imported(tmp_path: Path):
    data, folder = tmp_path / "data", tmp_path / "original"
    names = write_pictures(data, 40)
    write_original(folder, [*names, "cat/unused.png"])
    where = DataConfig(path=str(data))
    report = import_original(folder, where, tmp_path / "store", part="all", batch_size=8, shard_size=16)
    assert (report["pictures"], report["unused"]) == (40, ["cat/unused.pt"])
    maps = LabelMaps.open(tmp_path / "store")
    for name in names:
        original = torch.load((folder / name).with_suffix(".pt"), weights_only=True)
        assert torch.equal(maps[name][0], original[0]) and torch.equal(maps[name][1], original[1].long())
    assert check_store(tmp_path / "store", str(data)) == []
    (folder / names[3]).with_suffix(".pt").unlink()
    torch.save(torch.zeros(3), (folder / names[5]).with_suffix(".pt"))
    with pytest.raises(ValueError, match="2 of 40") as raised:
        import_original(folder, where, tmp_path / "again", part="all", batch_size=8, shard_size=16)
    assert names[3] in str(raised.value) and "[2, top, h, w]" in str(raised.value)
    skipping = dataclasses.replace(where, on_bad_image="skip")
    assert set(
        import_original(folder, skipping, tmp_path / "again", part="all", batch_size=8, shard_size=16, resume=True)[
            "skipped"
        ]
    ) == {names[3], names[5]}


def test_original_maps_are_of_the_centre_square(tmp_path: Path):
    """A map whose logits are the place it shows: read back for the whole image, they are where they were."""
    data, folder = tmp_path / "data", tmp_path / "original"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (400, 300)).save(data / name / f"{i}.png")
            place = (50 + (torch.arange(6) + 0.5) * 50) / 400  # of the middle 300 columns
            scores = torch.stack([place.expand(6, 6), torch.zeros(6, 6)])
            classes = torch.stack([torch.zeros(6, 6), torch.ones(6, 6)])
            torch.save(torch.stack([scores, classes]), folder / name / f"{i}.pt")
    where = DataConfig(path=str(data))
    import_original(folder, where, tmp_path / "store", part="all", batch_size=8, shard_size=16)
    maps = LabelMaps.open(tmp_path / "store")
    assert maps.annotator["crop"] == 1.0 and maps.box(300, 400) == pytest.approx((0, 0.125, 1, 0.875))
    scores, classes = maps.read_batch(["cat/0.png"])
    frames, boxes = stack_frames([PictureFrame.whole(300, 400)]), torch.tensor([maps.box(300, 400)])
    read = resample_label_maps(scores, classes, frames, (8, 8), 2, boxes).view(8, 8, 2)[4, :, 0]
    torch.testing.assert_close(read[2:6], (torch.arange(8)[2:6] + 0.5) / 8, atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match=r"crop was 1\.0, now squash"):
        import_original(
            folder, where, tmp_path / "store", part="all", batch_size=8, shard_size=16, crop="squash", resume=True
        )
    command = ["annotate", "--import-original", str(folder), "--data", str(data), "--part", "all", "--quiet"]
    for words, box in ((["--crop", "squash"], (0, 0, 1, 1)), (["--crop", "0.5"], (0.25, 0.3125, 0.75, 0.6875))):
        assert main([*command, "--out", str(tmp_path / words[1]), *words]) == 0
        assert LabelMaps.open(tmp_path / words[1]).box(300, 400) == pytest.approx(box)


def test_original_maps_whose_first_ones_are_damaged(tmp_path: Path):
    """They are named like any other, and may be left out."""
    data, folder = tmp_path / "data", tmp_path / "original"
    write_original(folder, write_pictures(data, 40))
    names = open_data(DataConfig(path=str(data))).train.names
    paths = [(folder / name).with_suffix(".pt") for name in names]
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    paths[1].write_bytes(b"<html>404</html>")
    torch.save(torch.full((2, 2, 3, 3), 1e30), paths[2])
    torch.save(torch.stack([torch.full((2, 3, 3), 1e30), torch.ones(2, 3, 3)]), paths[3])  # no encoding holds it
    where = DataConfig(path=str(data))
    with pytest.raises(ValueError, match=f"4 of {len(names)}") as raised:
        import_original(folder, where, tmp_path / "store", batch_size=8, shard_size=16)
    assert all(name in str(raised.value) for name in names[:4])
    skipping = dataclasses.replace(where, on_bad_image="skip")
    report = import_original(folder, skipping, tmp_path / "store", batch_size=8, shard_size=16, resume=True)
    assert (report["pictures"], set(report["skipped"])) == (len(names) - 4, set(names[:4]))
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"none of the {len(names)} label maps") as raised:
        import_original(folder, skipping, tmp_path / "again", batch_size=8, shard_size=16)
    assert all(str(path) in str(raised.value) for path in paths)
