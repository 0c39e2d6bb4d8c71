"""The snippets of docs/python.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import volo

SNIPPETS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(
    snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20), "white").save("pictures/white.png")
    threads = torch.get_num_threads()
    try:
        exec(compile(snippet, "docs/python.md", "exec"), {})
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out


def test_every_name_is_there_and_listed() -> None:
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    for name in volo.__all__:
        assert getattr(volo, name) is not None
        if name[0].islower():
            assert name in text, name
