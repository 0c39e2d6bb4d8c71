"""`volo bench deploy`: every candidate in every runtime, and what the documents make of its result."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from volo.bench import deploy
from volo.cli.main import main

pytest.importorskip("onnxscript")
ROOT = Path(__file__).parents[2]


def figures(model: str, file: str, batch: int, speed: float) -> dict[str, Any]:
    row = {
        "model": model, "file": file, "batch_size": batch, "milliseconds": 1000 * batch / speed, "images_per_second": speed,
        "times_volo_fused": speed / 10, "top1": deploy.PUBLISHED[model.removeprefix("timm ")].top1,
    }  # fmt: skip
    if model == "volo_d1":
        row |= {"times_timm_eager": speed / 5, "times_timm_same": 1.25 if "int8" in file else 1.05}
    return row


@pytest.fixture
def result() -> dict[str, Any]:
    rows = [figures("volo_d1", "volo fused fp32", b, 10.0) for b in (1, 8)]
    for model in ("volo_d1", "timm volo_d1", *deploy.PEERS):
        for file, speed in (("openvino fp32", 11.0), ("openvino bf16", 15.0), ("openvino int8", 30.0)):
            rows += [figures(model, file, b, speed + len(model)) for b in (1, 8)]
    return {
        "what": "exported files", "model": "volo_d1", "batch_sizes": [1, 8], "img_size": 224, "device": "A processor",
        "processor": {"vendor": "Maker", "instructions": ["avx512_vnni"]}, "threads": 2, "date": "2026-01-01", "rounds": 9,
        "published": {name: {"top1": its.top1, "paper": its.paper} for name, its in deploy.PUBLISHED.items()}, "rows": rows,
    }  # fmt: skip


def test_plain_exports_run_as_the_model():
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    written = deploy.plain_onnx(model, 8)
    images = torch.randn(3, 3, 8, 8)
    for what, tolerance in (("onnx fp32", 1e-5), ("openvino fp32", 1e-5), ("openvino bf16", 0.1)):
        (given,) = deploy.open_plain(written, what, 8, True)(images)
        torch.testing.assert_close(torch.as_tensor(given), model(images), atol=tolerance, rtol=tolerance)


def test_refusals(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=r"swin_tinny.*swin_tiny"):
        deploy.bench_deploy(peers=("swin_tinny",))
    with pytest.raises(ValueError, match="on the CPU"):
        deploy.bench_deploy(device="cuda")
    assert main(["bench", "deploy", "--peers", "resnet"]) == 2
    assert "caformer_s18" in capsys.readouterr().err


def test_documents(result: dict[str, Any], tmp_path: Path):
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    text = {name: tables[name] for name in ("deploy", "deploy_goals")}
    for function in text.values():
        function.__globals__["RESULTS"] = tmp_path
        assert function() == "Not measured yet."
    (tmp_path / "deploy_d1.json").write_text(json.dumps(result), encoding="utf-8")
    table = text["deploy"]()
    assert (
        "| caformer_s18 | 83.6 |  | 23.0 / 23.0 |" in table and "A processor (Maker, avx512_vnni), 2 threads" in table
    )
    assert all(its.paper in table for its in deploy.PUBLISHED.values())
    goals = text["deploy_goals"]()
    assert "| int8, batch 8: our fused float32 | 2.3 | 3.70 |" in goals
    assert "| openvino fp32, batch 1: timm's volo_d1 in the same | 1.1 | **1.05, missed** |" in goals
    (tmp_path / "deploy_d1_avx2.json").write_text(json.dumps(result | {"device": "Another"}), encoding="utf-8")
    table, goals = text["deploy"](), text["deploy_goals"]()
    assert "A processor (" in table
    assert "Another (" in table
    assert "| int8, batch 8: our fused float32 | 2.3 | 3.70 | 3.70 |" in goals


def test_plot(result: dict[str, Any], tmp_path: Path):
    draw = runpy.run_path(str(ROOT / "benchmarks" / "deploy_plot.py"))["draw"]
    draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("openvino")
    files = ["onnx fp32", "onnx int8 static", "openvino bf16"]
    arguments = [
        "--model",
        "volo_nano",
        "--img-size",
        "32",
        "--batch-sizes",
        "1",
        "2",
        "--rounds",
        "1",
        "--peers",
        "none",
    ]
    assert main(["bench", "deploy", *arguments, "--files", *files, "--out", str(tmp_path / "x.json")]) == 0
    written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    found = [(row["file"], row["batch_size"]) for row in written["rows"]]
    assert found == [(what, batch) for batch in (1, 2) for what in ("volo fused fp32", *files)]
    assert all(row["milliseconds"] > 0 and row["cpu_milliseconds"] > 0 for row in written["rows"])
    assert written["processor"].keys() <= {"vendor", "instructions"} and "--peers none" in written["command"]
