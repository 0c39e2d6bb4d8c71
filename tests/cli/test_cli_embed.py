"""`volo embed`, `volo evaluate --wrong` and sheets through the command line, from files to files."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from volo.cli.main import main
from volo.config import Recipe
from volo.models.checkpoint import model_config_dict, save_checkpoint
from volo.models.factory import create_model, create_segmenter

OPTIONS = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}
CLASSES = ["cat", "th\udce9"]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.pt of two classes, and photos/{train,val}/CLASS/N.png for them, light and dark; one class is named
    in Latin-1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOLO_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = create_model("volo_nano", **OPTIONS, num_classes=2, img_size=16)
    recipe = Recipe().to_dict()
    recipe["data"] |= {"img_size": 16, "crop_pct": 1.0, "path": "photos", "num_workers": 0}
    content = {"format": 1, "model": model.state_dict(), "ema": None, "recipe": recipe, "metrics": {}, "step": 1}
    save_checkpoint(Path("model.pt"), content | {"model_config": model_config_dict(model), "classes": CLASSES})
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 6)):
        for number in range(count):
            label = number % 2
            path = Path("photos", part, CLASSES[label], f"{number:02}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            low = 150 * label
            coarse = rng.integers(low, low + 100, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((24, 20), Image.Resampling.NEAREST).save(path)
    return tmp_path


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


def is_png(path: str | Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and len(image.convert("RGB").resize((200, 200)).getcolors(40000)) > 20


def test_vectors_of_folders(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embed", "model.pt", "photos/train", "--device", "cpu", "--batch-size", "5"]
    assert main([*words, "--out", "vectors.npz"]) == 0
    said = capsys.readouterr().out
    assert "16 vectors of 96 numbers by model.pt" in said and "vectors.npz" in said
    with np.load("vectors.npz") as file:
        assert file["vectors"].shape == (16, 96) and file["vectors"].dtype == np.float32
        assert sorted(set(file["classes"].tolist())) == sorted(CLASSES)
        assert file["names"][0] == "photos/train/cat/00.png"
    for _ in range(2):
        assert main(["embed", "model.pt", "photos/val", "--neighbours", "near.png"]) == 0
        assert "near.png" in capsys.readouterr().out and is_png("near.png")
    assert main([*words, "--out", "vectors.npz", "--pool", "token", "--json"]) == 0, "ours"
    summary = json.loads(capsys.readouterr().out)
    assert (summary["count"], summary["size"], summary["pool"]) == (16, 32, "token")
    assert summary["out"] == "vectors.npz" and summary["left_out"] == []
    with np.load("vectors.npz") as file:
        assert file["vectors"].shape == (16, 32)
    before = np.load("vectors.npz")["vectors"]
    assert main([*words, "--out", "vectors.npz", "--pool", "token", "--img-size", "32"]) == 0
    assert not np.allclose(before, np.load("vectors.npz")["vectors"])


def test_unreadable_images_are_named_and_left_out(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/train/cat/bad.png").write_bytes(b"no image")
    words = ["embed", "model.pt", "photos/train/cat", "--out", "vectors.npz"]
    assert main(words) == 1
    assert "left out: photos/train/cat/bad.png" in " ".join(capsys.readouterr().err.split())
    assert len(np.load("vectors.npz")["names"]) == 8
    assert main([*words, "--on-bad-image", "skip"]) == 0
    capsys.readouterr()
    assert main(["embed", "model.pt", "--data", "photos", "--out", "vectors.npz", "--json"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert summary["count"] == 22 and len(summary["left_out"]) == 1 and "bad.png" in summary["left_out"][0]
    assert np.load("vectors.npz")["parts"].tolist() == ["train"] * 16 + ["val"] * 6


def test_files_of_others_stay(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez("own.npz", vectors=np.zeros((3, 4), np.float32), names=np.array(["a", "b", "c"]))
    with zipfile.ZipFile("letter.npz", "w") as archive:  # a .docx under another name
        archive.writestr("word/document.xml", "<text/>")
    theirs = {path: path.read_bytes() for path in (Path("own.npz"), Path("letter.npz"))}
    monkeypatch.setattr("volo.inference.embed.for_features", lambda *given: pytest.fail("the work began"))
    words = ["embed", "model.pt", "photos/train"]
    for path, content in theirs.items():
        assert "not an earlier result of this command" in complaint([*words, "--out", str(path)], capsys)
        assert path.read_bytes() == content
    image = Path("photos/train/cat/00.png")
    before = image.read_bytes()
    assert "would replace" in complaint([*words, "--neighbours", str(image), "--overwrite"], capsys)
    assert "not an earlier result" in complaint([*words, "--neighbours", "photos/val/cat/00.png"], capsys)
    assert image.read_bytes() == before
    assert "ends in .npz or .parquet; given: photos" in complaint([*words, "--out", "photos/"], capsys)
    Path("folder.npz").mkdir()
    assert "folder.npz is a folder" in complaint([*words, "--out", "folder.npz"], capsys)
    assert "ends in .npz or .parquet; given: vectors.csv" in complaint([*words, "--out", "vectors.csv"], capsys)
    monkeypatch.undo()
    monkeypatch.chdir(inside)
    assert main([*words, "--out", "own.npz", "--overwrite"]) == 0
    assert len(np.load("own.npz")["names"]) == 16


def test_parquet_of_others_stays(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    words = ["embed", "model.pt", "photos/train", "--out"]
    parquet.write_table(pyarrow.table({"vector": [1.0, 2.0]}), "own.parquet")
    content = Path("own.parquet").read_bytes()
    assert "not an earlier result of this command" in complaint([*words, "own.parquet"], capsys)
    assert Path("own.parquet").read_bytes() == content
    for _ in range(2):
        assert main([*words, "vectors.parquet"]) == 0
    assert parquet.read_table("vectors.parquet").num_rows == 16


def test_parquet_without_pyarrow_ends_before_the_work(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("volo.inference.embed.for_features", lambda *given: pytest.fail("the work began"))
    said = complaint(["embed", "model.pt", "photos/train", "--out", "vectors.parquet"], capsys)
    assert "pip install pyarrow, or write an .npz file" in said


def test_check_finds_what_is_planted(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = Path("photos/train/cat/02.png").read_bytes()
    Path("photos/val", CLASSES[1], "leak.png").write_bytes(same)
    dark = np.random.default_rng(5).integers(0, 60, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(dark).save(Path("photos/train", CLASSES[1], "wrong.png"))
    words = ["embed", "model.pt", "--data", "photos", "--check", "--batch-size", "4"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "17 training images and 7 held-out images" in said
    assert "between training and held-out images 1" in said and "leak.png" in said
    assert not Path("check.csv").exists(), "nothing is written without --out"
    assert main([*words, "--out", "check", "--json"]) == 0
    check = json.loads(capsys.readouterr().out)["check"]
    assert check["listed_duplicates"]["train-val"] == 1 and check["images"] == {"train": 17, "val": 7}
    rows = list(csv.reader(Path("check/check.csv").read_text(errors="surrogateescape").splitlines()))
    assert rows[0] == ["kind", "image", "other", "score", "label", "other_label", "part", "other_part"]
    duplicate = next(row for row in rows if row[0] == "duplicate" and "leak.png" in row[1] + row[2])
    assert float(duplicate[3]) > 0.999 and duplicate[4:] == ["cat", "th\\udce9", "train", "val"]
    labels = [row for row in rows if row[0] == "label"]
    assert any("wrong.png" in row[1] and row[2] == "cat" and row[4] == "th\\udce9" for row in labels)
    assert any("leak.png" in row[1] for row in labels), "held-out labels too"
    assert len(labels) <= 4 and len(rows) - 1 == len(check["found"])
    assert is_png("check/duplicates.png") and is_png("check/labels.png")
    assert main([*words[:2], *words[4:], "--out", "check", "--pool", "token"]) == 0, "ours; and the training's own data"
    Path("check/check.csv").write_text("my,notes\n")
    assert "not an earlier result of this command" in complaint([*words, "--out", "check"], capsys)
    assert Path("check/check.csv").read_text() == "my,notes\n"


def test_a_sheet_that_fails_is_a_warning(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("photos/val/cat/leak.png").write_bytes(Path("photos/train/cat/02.png").read_bytes())
    monkeypatch.delitem(sys.modules, "volo.explain.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["embed", "model.pt", "--data", "photos", "--check", "--out", "check"]) == 0
    captured = capsys.readouterr()
    assert "leak.png" in captured.out and Path("check/check.csv").exists()
    assert "duplicates.png was not drawn: it needs matplotlib" in " ".join(captured.err.split())
    assert main(["embed", "model.pt", "photos/train", "--out", "v.npz", "--neighbours", "n.png"]) == 0
    assert Path("v.npz").exists() and not Path("n.png").exists()
    assert main(["evaluate", "model.pt", "--wrong", "3", "--out", "report"]) == 0
    assert Path("report/wrong.csv").exists() and not Path("report/wrong.png").exists()


def test_what_does_not_go_together_is_refused(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["photos"], "say where the vectors go"),
        (["--out", "v.npz"], "name the images"),
        (["photos", "--data", "photos", "--out", "v.npz"], "--data is for a data set"),
        (["photos", "--check"], "--check is for a data set"),
        (["photos", "--out", "v.npz", "--threshold", "0.9"], "--threshold belongs to --check"),
        (["--check", "--threshold", "2"], "above -1 and at most 1; given: 2"),
        (["--check", "--data", "nowhere"], "nowhere"),
        (["photos", "--out", "v.npz", "--pool", "mean"], ""),
    ):
        if said:
            assert said in complaint(["embed", "model.pt", *words], capsys)
        else:
            with pytest.raises(SystemExit):
                main(["embed", "model.pt", *words])


def test_segmentation_models_are_refused(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_segmenter("fpn_volo_nano", num_classes=2, **OPTIONS)
    recipe = Recipe().to_dict() | {"task": "segment"}
    content = {"format": 1, "model": model.state_dict(), "ema": None, "recipe": recipe, "metrics": {}, "step": 1}
    save_checkpoint(Path("masks.pt"), content | {"model_config": model_config_dict(model), "classes": CLASSES})
    for more in ([], ["--img-size", "32"]):
        said = complaint(["embed", "masks.pt", "photos", "--out", "v.npz", *more], capsys)
        assert "is a segmentation model; vectors are made by a VOLO classifier: give a run folder" in said
    assert "wrong answers are listed for classifiers" in complaint(["evaluate", "masks.pt", "--wrong", "3"], capsys)


def test_wrong_answers(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "model.pt", "--data", "photos/train", "--device", "cpu"]
    assert main([*words, "--wrong", "5", "--json", "--out", "report"]) == 0
    report = json.loads(capsys.readouterr().out)
    wrong = report["wrong"]
    count = sum(map(sum, report["confusion"])) - sum(report["confusion"][i][i] for i in range(2))
    assert len(wrong) == min(5, count) > 0
    sure = [entry["probability_of_predicted_class"] for entry in wrong]
    assert sure == sorted(sure, reverse=True)
    assert main(["predict", "model.pt", "photos/train", "--top", "2", "--format", "json"]) == 0
    given = {p["picture"]: p["predictions"] for p in json.loads(capsys.readouterr().out)}
    for entry in wrong:
        best, other = given[f"photos/train/{entry['image']}"]
        assert (entry["predicted_class"], entry["true_class"]) == (best["class"], other["class"])
        assert Path(entry["image"]).parent.name == entry["true_class"] != entry["predicted_class"]
        assert entry["probability_of_predicted_class"] == pytest.approx(best["probability"], abs=1e-5)
        assert entry["probability_of_true_class"] == pytest.approx(other["probability"], abs=1e-5)
    lines = Path("report/wrong.csv").read_text().splitlines()
    assert lines[0].startswith("image,true class,predicted class,") and len(lines) == 1 + len(wrong)
    assert is_png("report/wrong.png")
    assert main([*words, "--wrong", "2"]) == 0
    said = capsys.readouterr().out
    assert "true class" in said and "predicted class" in said and Path(wrong[0]["image"]).name in said
    assert main([*words, "--wrong", "5", "--out", "report"]) == 0, "ours"
    Path("report/wrong.csv").write_text("mine\n")
    assert "wrong.csv already exists" in complaint([*words, "--wrong", "5", "--out", "report"], capsys)
    assert main([*words, "--out", "report"]) == 0, "not asked for, not touched"
    assert Path("report/wrong.csv").read_text() == "mine\n"
    assert "0 for none; given: -1" in complaint([*words, "--wrong", "-1"], capsys)


def test_a_sheet_shows_all_predicted_classes(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from volo.explain import plots

    many = Path("many")
    many.mkdir()
    for i in range(120):  # the first hundred are the same light image, the others are dark
        Image.fromarray(np.full((20, 24, 3), 230 if i < 100 else i - 100, np.uint8)).save(many / f"{i:03}.png")
    assert main(["predict", "model.pt", "many", "--top", "1", "--format", "json"]) == 0
    answers = [entry["predictions"][0]["class"] for entry in json.loads(capsys.readouterr().out)]
    shown: list[plots.SheetItem] = []
    drawn = plots.prediction_sheet
    monkeypatch.setattr(plots, "prediction_sheet", lambda items, out: (shown.extend(items), drawn(items, out)))
    assert main(["predict", "model.pt", "many", "--sheet", "sheet.png"]) == 0
    assert is_png("sheet.png") and len(shown) == 48
    assert {item.top[0][0] for item in shown} == set(answers)
    assert [item.name for item in shown] == sorted(item.name for item in shown)
    assert any(item.name > "many/080" for item in shown)
