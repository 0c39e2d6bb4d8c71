"""What commands write is tried before the work and never takes the place of what is not theirs; results stand whatever
comes after them, and whatever the surroundings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from volo.cli.console import Bar, Lasting
from volo.cli.main import main
from volo.config import Recipe, load_recipe
from volo.models.checkpoint import model_config_dict, save_checkpoint
from volo.models.factory import create_model

OPTIONS = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8, "patch_size": 4}


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.pt of two classes, and photos/CLASS/N.png for them; one class is named in Latin-1."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = create_model("volo_nano", **OPTIONS, num_classes=2, img_size=16)
    classes = ["cat", "th\udce9"]
    recipe = Recipe().to_dict()
    recipe["data"] |= {"img_size": 16, "path": "photos", "num_workers": 0}
    content = {"format": 1, "model": model.state_dict(), "ema": None, "recipe": recipe, "metrics": {}, "step": 1}
    save_checkpoint(Path("model.pt"), content | {"model_config": model_config_dict(model), "classes": classes})
    for number in range(8):
        path = Path("photos", classes[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 30 * number, np.uint8)).save(path)
    return tmp_path


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return " ".join(captured.err.split())


def test_predict_replaces_its_own_files_alone(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = Path("photos/cat/0.png")
    before = picture.read_bytes()
    words = ["predict", "model.pt", "photos/cat", "--format", "csv"]
    assert "would replace the image" in complaint([*words, "--out", str(picture), "--overwrite"], capsys)
    assert "would replace the image" in complaint([*words, "--sheet", "./photos/../photos/cat/0.png"], capsys)
    assert picture.read_bytes() == before
    Path("notes.csv").write_text("my,notes\n")
    assert "not an earlier result of this command" in complaint([*words, "--out", "notes.csv"], capsys)
    assert "is a folder" in complaint([*words, "--out", "photos"], capsys)
    assert "there is a file of that name" in complaint([*words, "--out", "notes.csv/answers.csv"], capsys)
    assert Path("notes.csv").read_text() == "my,notes\n"
    for form in ("csv", "json"):
        again = [
            "predict",
            "model.pt",
            "photos/cat",
            "--format",
            form,
            "--out",
            f"new/answers.{form}",
            "--sheet",
            "s.png",
        ]
        assert main(again) == 0
        assert main(again) == 0
    assert main([*words, "--out", "notes.csv", "--overwrite"]) == 0
    assert len(Path("notes.csv").read_text().splitlines()) == 1 + 4 * 2


def test_evaluate_replaces_its_own_files_alone(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", "model.pt", "--data", "photos", "--out", "report"]
    assert main(words) == 0
    assert main(words) == 0
    figure = Path("report/confusion.png").read_bytes()
    Path("run").mkdir()
    Path("run/confusion.png").write_bytes(figure)  # of a training
    capsys.readouterr()
    assert "run/confusion.png already exists" in complaint([*words[:-1], "run"], capsys)
    Path("run/evaluation.json").write_text("{}")
    assert "run/evaluation.json already exists" in complaint([*words[:-1], "run"], capsys)
    assert Path("run/confusion.png").read_bytes() == figure
    assert main([*words[:-1], "run", "--overwrite"]) == 0
    report = json.loads(Path("run/evaluation.json").read_text())
    assert report["classes"] == ["cat", "th\udce9"]


def test_figures_are_optional(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without matplotlib, or where it fails, the result is printed, written, and the exit code is 0."""
    monkeypatch.delitem(sys.modules, "volo.explain.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["evaluate", "model.pt", "--data", "photos", "--json", "--out", "report"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(Path("report/evaluation.json").read_text())
    assert "confusion.png was not drawn: it needs matplotlib" in captured.err
    assert main(["predict", "model.pt", "photos/cat", "--sheet", "sheet.png"]) == 0
    assert "sheet.png was not drawn" in capsys.readouterr().err


def test_surroundings_neither_break_nor_mute(inside: Path) -> None:
    """No columns, an ASCII terminal, numbers of a batch system, no home: the same table as ever."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    odd = {"COLUMNS": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "RANK": "3", "SLURM_PROCID": "3"}
    words = [sys.executable, "-m", "volo", "evaluate", "model.pt", "--data", "photos"]
    done = subprocess.run(words, env=environment | odd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for word in ("top-1", "mean of classes", "cat", "th\\udce9"):
        assert word in done.stdout
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "volo", "--help"]
        done = subprocess.run(words, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr


def test_the_home_folder_in_paths(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(inside))
    (inside / "elsewhere").mkdir()
    monkeypatch.chdir(inside / "elsewhere")
    assert main(["predict", "--checkpoint=~/model.pt", "~/photos/cat", "--format=csv", "--out=~/answers.csv"]) == 0
    assert main(["evaluate", "$HOME/model.pt", "--data=${HOME}/photos", "--out", "~/report"]) == 0
    assert not list(Path.cwd().iterdir())
    assert (inside / "answers.csv").is_file() and (inside / "report/evaluation.json").is_file()
    Path("~").mkdir()
    Path("~/own.toml").write_text('[data]\npath = "~/photos"\n[model]\nweights = "~x"\n')
    recipe = load_recipe("~/own.toml")
    assert (recipe.data.path, recipe.model.weights) == (str(inside / "photos"), "~x")


def test_a_training_outlives_its_terminal() -> None:
    """Progress into a pipe whose reader has gone; a Console alone would end the program."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as gone:
        console = Console(file=cast(IO[str], Lasting(gone)))
        console.print("a row of figures")
        with Bar(console) as bar:
            bar._drawn = 0.0
            bar.show("training", 1, 2)
        try:
            with pytest.raises(SystemExit):
                Console(file=gone).print("a row of figures")
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_recipes_in_other_encodings(tmp_path: Path) -> None:
    """With a byte order mark they are read; what is not UTF-8 is named, with its line."""
    path = tmp_path / "mine.toml"
    path.write_bytes("\ufeff# grüße\r\n[data]\r\nimg_size = 48\r\n".encode())
    assert load_recipe(path).data.img_size == 48
    path.write_bytes("[data]\n# grüße\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.toml is not UTF-8 text .*line 2"):
        load_recipe(path)
    path.write_text("[dato]\n")
    with pytest.raises(ValueError, match=r"'dato'; did you mean 'data'\? Known here"):
        load_recipe(path)
    path.write_text("[zzzzzz]\n")
    with pytest.raises(ValueError, match=r"'zzzzzz'\. Known here"):
        load_recipe(path)
