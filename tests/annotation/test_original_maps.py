"""Label maps of the original tool: read safely, and refused where float16 has blurred the classes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volo.annotation.original_maps import OriginalMapError, find_original_map, read_original_map


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
            OriginalMapError, match=r"a\.pt has the class index .* exact only to 2048: .* Draw the maps anew"
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
