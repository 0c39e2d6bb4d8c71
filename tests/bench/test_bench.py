"""The measurements run and report what they claim to; how fast anything is, is not a test."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import time
from pathlib import Path

import pytest
import torch

import volo
from volo.bench import timing
from volo.bench.loop import bench_loop
from volo.bench.model import _flops, bench_model, bench_train
from volo.bench.timing import Timing, alternate, matrix_rate, peak_memory, speedup
from volo.cli.bench import BENCHMARKS, Labels, Op, command_of
from volo.cli.main import main
from volo.ops import linear as linear_ops


def test_candidates_take_turns_and_ratios_are_within_rounds():
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    timings = alternate({"fast": lambda: calls.append("fast"), "slow": slow}, rounds=3, warmup=1)
    assert calls == ["fast", "slow"] * 4
    assert len(timings["slow"].seconds) == 3
    assert timings["slow"].median >= 0.02 > timings["fast"].median
    assert speedup(Timing((1.0, 1.0, 2.0)), Timing((2.0, 6.0, 4.0))) == 2.0
    low, high = timings["slow"].quartiles
    assert low <= timings["slow"].median <= high


def test_peak_memory_counts_what_is_freed_again():
    def run() -> torch.Tensor:
        large = torch.ones(1 << 20)
        small = large[:4].clone()
        del large
        return small

    peak = peak_memory(run, torch.device("cpu"))
    assert 4 << 20 <= peak < 5 << 20


def both_multiply() -> bool:
    """Whether oneDNN multiplies float32 on this processor where PyTorch could."""
    return torch.float32 in linear_ops._dtypes and linear_ops._packing_pays[torch.float32]


def test_matrix_rate_is_that_of_the_fastest_way(monkeypatch: pytest.MonkeyPatch):
    seconds = {"PyTorch": Timing((4.0, 3.0, 6.0)), "oneDNN": Timing((2.0, 1.0, 5.0))}
    monkeypatch.setattr(timing, "alternate", lambda candidates, **_: {name: seconds[name] for name in candidates})
    fastest = 1.0 if both_multiply() else 3.0
    assert matrix_rate(torch.device("cpu"), torch.float32) == 2 * 2048**3 / fastest


def test_both_ways_of_the_matrix_rate_multiply(monkeypatch: pytest.MonkeyPatch):
    products: list[object] = []

    def once(candidates: dict, **_: object) -> dict[str, Timing]:
        products.extend(run() for run in candidates.values())
        return dict.fromkeys(candidates, Timing((1.0,)))

    monkeypatch.setattr(timing, "alternate", once)
    matrix_rate(torch.device("cpu"), torch.float32)
    assert len(products) == 1 + both_multiply()
    # One of them multiplies by the transpose; each number is a sum of 2048 products of normal ones.
    assert all(product.shape == (2048, 2048) for product in products)
    assert all(product.std().item() == pytest.approx(2048**0.5, rel=0.02) for product in products)


def test_model_rows_compare_the_same_weights():
    result = bench_model(batch_size=1, img_size=32, rounds=2)
    assert result["largest_logit_difference"] < 1e-5
    assert [row["candidate"] for row in result["rows"]] == [
        "volo float32",
        "timm eager float32",
        "volo bfloat16",
        "timm eager bfloat16",
    ]
    assert result["rows"][1]["times_timm_eager"] == 1.0
    for row in result["rows"]:
        assert row["quartiles"][0] <= row["images_per_second"] <= row["quartiles"][1]
        assert row["of_matrix_rate"] > 0 and row["peak_memory_gib"] > 0
        assert 0 < row["of_copy_bandwidth"] < 1
    assert result["rows"][1]["memory_times_timm_eager"] == 1.0


def test_a_checkpoint_and_an_exported_file_are_measured_alone(tmp_path: Path):
    loaded = volo.load("volo_nano")
    volo.save_pretrained(loaded, tmp_path / "saved")
    volo.export(loaded, tmp_path / "nano.pt2", format="torch", dynamic=(), batch_size=2)
    for name, expected in (("saved", ["volo float32", "volo bfloat16"]), ("nano.pt2", ["file fp32"])):
        result = bench_model(str(tmp_path / name), batch_size=3, rounds=2)
        assert result["model"] == name and result["img_size"] == [64, 64]
        assert [row["candidate"] for row in result["rows"]] == expected
        assert all(row["images_per_second"] * row["milliseconds"] == pytest.approx(3000) for row in result["rows"])
    with pytest.raises(FileNotFoundError, match="gone.onnx"):
        bench_model(str(tmp_path / "gone.onnx"))


def test_train_rows():
    result = bench_train(batch_size=2, img_size=32, rounds=1)
    assert [row["candidate"] for row in result["rows"]] == ["volo", "timm eager"]
    assert result["rows"][1]["times_timm_eager"] == 1.0
    # At least the 26 million parameters, their gradients and two moments.
    assert all(row["peak_memory_gib"] > 4 * 4 * 26e6 / 2**30 for row in result["rows"])


def test_operations_of_d1_are_those_of_the_paper():
    assert _flops("volo_d1", 224) == pytest.approx(2 * 6.9e9, rel=0.02)


def test_loop_reports_both_rates():
    result = bench_loop(batch_size=8, rounds=1, steps=4, device="cpu")
    assert result["ratio"] == pytest.approx(
        result["rows"][0]["images_per_second"] / result["rows"][1]["images_per_second"]
    )


def test_command_line_writes_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    threads = torch.get_num_threads()
    out = tmp_path / "results" / "loop.json"
    assert main(["bench", "loop", "--batch-size", "8", "--rounds", "1", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["what"] == "training loop"
    assert sorted(result["command"].split()) == sorted("volo bench loop --batch-size 8 --rounds 1 --device cpu".split())
    assert result["threads"] == threads
    assert result["volo"] == volo.__version__ and result["timm"] == importlib.metadata.version("timm")
    shown = capsys.readouterr().out
    assert "bare loop" in shown
    assert "images per second" in shown


def test_the_command_of_a_result_holds_no_paths():
    options = Labels(model="runs/a b", data="/data/cifar10", json=True, out=Path("/tmp/labels.json"))
    assert command_of("labels", options) == "volo bench labels --model 'a b' --data cifar10"
    assert command_of("op", Op(threads=2, compiled=True)) == "volo bench op --threads 2 --compiled"


def test_each_measurement_has_its_own_options_and_help(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--help"]) == 0
    overview = capsys.readouterr().out
    for name, (kind, function) in BENCHMARKS.items():
        assert f"volo bench {name}" in overview
        with pytest.raises(SystemExit) as end:
            main(["bench", name, "--help"])
        assert end.value.code == 0
        assert f"  volo bench {name}" in capsys.readouterr().out
        module, _, function = function.partition(":")
        takes = list(inspect.signature(getattr(importlib.import_module(module), function)).parameters)
        own = {field.name for field in dataclasses.fields(kind)} - {"json", "out", "overwrite", "threads", "model"}
        assert own <= set(takes), name
    with pytest.raises(SystemExit):
        main(["bench", "data", "--compiled"])
    capsys.readouterr()
    assert main(["bench", "modle"]) == 2
    assert "did you mean 'model'?" in capsys.readouterr().err
