"""The tables in README and docs say what the result files say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))


@pytest.mark.parametrize("name", tables["DOCUMENTS"])
def test_tables_are_those_of_the_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert tables["PLACE"].search(text)
    assert tables["written"](text) == text, "run: python benchmarks/tables.py"


def test_every_table_has_its_place_and_a_changed_figure_is_seen() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in tables["DOCUMENTS"]]
    assert {place[2] for text in texts for place in tables["PLACE"].finditer(text)} == set(tables["TABLES"])
    assert tables["written"](texts[0].replace("| 1.44 |", "| 1.54 |")) == texts[0] != texts[0].replace("1.44", "1.54")
