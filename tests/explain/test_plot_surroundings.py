"""Figures are drawn whatever the surroundings: settings of matplotlib, gaps in the metrics, names in any script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image

from volo.cli.outputs import is_figure
from volo.explain.plots import SheetItem, confusion_matrix, prediction_sheet, training_curves

NO_FONT = "\U0010fffe"  # no character, so no font has it

CODE = """
from volo.explain.plots import confusion_matrix
confusion_matrix([[1, 2], [3, 4]], ["a", "b"], "confusion.png")
import matplotlib
import numpy as np
print(matplotlib.rcParams["text.usetex"])
"""


def test_settings_of_matplotlib_decide_nothing(tmp_path: Path) -> None:
    """A backend that is not installed, and a matplotlibrc that wants LaTeX (which stays in force for others)."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    environment = os.environ | {"MPLBACKEND": "module://not_installed.backend", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("steps", "gap"), [(4, float("nan")), (200, float("inf")), (4, None)])
def test_curves_have_gaps_where_figures_are_not_finite(tmp_path: Path, steps: int, gap: float | None) -> None:
    lines = []
    for step in range(1, steps + 1):
        lines.append({"kind": "step", "step": step, "epoch": step, "loss": gap if step == 3 else 1.0, "lr": 1e-3})
        figures = {"top1": gap if step == 2 else 0.5, "mean_class_accuracy": 0.5, "loss": gap if step == 2 else 0.5}
        lines.append({"kind": "eval", "step": step, "epoch": step, **figures})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert is_figure("training curves")(tmp_path / "curves.png")
    assert not is_figure("confusion matrix")(tmp_path / "curves.png")


@pytest.mark.filterwarnings("error")
def test_names_that_no_font_can_draw_are_numbers_with_a_list(tmp_path: Path) -> None:
    classes = ["cat", f"{NO_FONT}{NO_FONT}", "th\udce9"]
    confusion_matrix([[3, 0, 0], [0, 2, 1], [0, 0, 1]], classes, tmp_path / "confusion.png")
    listed = (tmp_path / "confusion.names.txt").read_text(encoding="utf-8").splitlines()
    assert listed == [f"#1 {NO_FONT}{NO_FONT}", "#2 th\\udce9"]
    item = SheetItem(np.zeros((3, 8, 8), np.uint8), [(classes[1], 0.9)], "a.png", classes[2])
    prediction_sheet([item], tmp_path / "sheet.png")
    assert len((tmp_path / "sheet.names.txt").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.filterwarnings("error")
def test_other_fonts_of_the_system_help_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regular = [font for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)]
    fonts = {font.name: font for font in regular if "mpl-data" in font.fname}
    dejavu, other = (set(FT2Font(fonts[name].fname).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral"))
    only_there = sorted(map(chr, other - dejavu))[0]
    monkeypatch.setattr(fontManager, "ttflist", [fonts["STIXGeneral"], fonts["DejaVu Sans"]])
    confusion_matrix([[1, 0], [0, 1]], [f"name {only_there}", "b"], tmp_path / "confusion.png")
    assert not list(tmp_path.glob("*.txt"))
    assert matplotlib.rcParams["font.family"] == ["sans-serif"], "our style is left behind"
