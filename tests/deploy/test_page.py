"""The page: what it takes to write one, and its answer in a real browser."""

from __future__ import annotations

import base64
import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import volo
from volo.config import DataConfig
from volo.deploy.html import RUNTIME, WASM, find_web_runtime, write_page
from volo.inference.model_source import LoadedModel
from volo.inference.predictor import predict
from volo.models.factory import create_model

CLASSES = ("ant", "</script><b>bee", "@MODEL@", "猫")


def test_without_the_runtime_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="npm install onnxruntime-web"):
        find_web_runtime(None)
    with pytest.raises(FileNotFoundError, match="--web-runtime"):
        find_web_runtime(tmp_path)
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in (RUNTIME, WASM):
        (dist / name).touch()
    assert find_web_runtime(None) == find_web_runtime(tmp_path) == find_web_runtime(dist) == dist


def test_class_names_cannot_break_the_page(tmp_path: Path):
    for name in (RUNTIME, WASM):
        (tmp_path / name).write_bytes(name.encode())
    page = tmp_path / "page.html"
    write_page(page, b"model", {"classes": list(CLASSES), "origin": "a test", "licence": "MIT"}, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == 5 and "@MODEL@" in text.partition('id="about"')[2].partition("</script>")[0]
    assert text.count(base64.b64encode(b"model").decode()) == 1


@pytest.mark.slow
def test_the_browser_answers_as_predict_does(tmp_path: Path):
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium here")
    try:
        runtime = find_web_runtime(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = create_model("volo_nano", num_classes=len(CLASSES))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    loaded = LoadedModel(model.eval(), "classify", CLASSES, DataConfig(img_size=32), "a test")
    picture = tmp_path / "picture.png"
    coarse = np.random.default_rng(1).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((90, 64), Image.Resampling.BICUBIC).save(picture)
    page = tmp_path / "page.html"
    report = volo.export(loaded, page, format="html", web_runtime=runtime)
    assert report.values["bytes"] < 30e6

    # The image is dropped by a script that is added to the page, which is opened from the disk.
    drop = f"""<script type="module">
    const bytes = Uint8Array.from(atob("{base64.b64encode(picture.read_bytes()).decode()}"), c => c.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], "picture.png", {{type: "image/png"}}));
    document.dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true}}));
    </script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", drop), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=120000", "--dump-dom", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False).stdout
    (expected,) = predict(loaded, [picture], top=4)
    answers = re.search(r'<ol id="answers".*?</ol>', seen, re.S)
    assert answers is not None
    names = [html.unescape(name) for name in re.findall(r"<li><div><span>(.*?)</span>", answers[0])]
    shares = [float(share) / 100 for share in re.findall(r"<span>([\d.]+) %</span>", answers[0])]
    assert names == [name for name, _ in expected.top]
    assert shares == pytest.approx([p for _, p in expected.top], abs=1e-2)
