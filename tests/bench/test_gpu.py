"""`volo bench gpu` without a GPU: what it makes of results, what it refuses, and a rehearsal of its stages."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from volo.bench import gpu, gpu_stages
from volo.bench.gpu import GOALS, NOT_MEASURED, REHEARSAL, bench_gpu, choose, goal_rows, has_failed, list_stages
from volo.bench.stages import Report, Stage, run_stages
from volo.cli.main import main
from volo.ops.outlook_attention import list_backends

SMALL = (torch.zeros(1, 4, 4, 1, 16), torch.zeros(1, 2, 2, 1, 9, 9), 3, 2, 1)
TOY = {
    stage.name: stage.arguments["cases"][0]
    for stage in list_stages(is_rehearsal=True)
    if stage.name in ("inference", "training")
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu.__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# ---- results against what is asked ----

MEASURED: dict[str, dict[str, Any]] = {
    "kernels": {
        "rows": [
            {"part": "operator", "candidate": "fused forward", "copy_fraction": 0.61},
            {"part": "operator", "candidate": "padded forward", "copy_fraction": 0.65},
            {"part": "operator", "candidate": "fused backward", "copy_fraction": 0.4},
            {"part": "operator", "candidate": "fused forward + backward", "copy_fraction": 0.9},
            {"part": "operator", "candidate": "compiled forward", "copy_fraction": 0.99},
            {"part": "layer", "candidate": "packed forward", "copy_fraction": 0.98, "times_rows": 1.9},
        ]
    },
    "inference": {
        "rows": [
            {"candidate": "volo compiled", "times_timm_compiled": 1.5},
            {"candidate": "timm compiled graph", "times_timm_compiled": 3.0},
            {"candidate": "volo graph", "failed": "no"},
        ]
    },
    "autotune": {"rows": [{"candidate": "volo max-autotune", "times_timm_compiled": 1.7}]},
    "training": {
        "rows": [
            {"candidate": "volo", "times_timm_compiled": 1.2, "memory_times_timm_eager": 0.9},
            {"candidate": "volo compiled", "times_timm_compiled": 1.4, "memory_times_timm_eager": 0.7},
            {"candidate": "timm eager", "times_timm_compiled": 1.0, "memory_times_timm_eager": 1.0},
        ]
    },
    "correctness": {
        "rows": [
            {"tensor": "out", "engine": "triton", "dtype": "bfloat16", "error": 0.1, "allowed": 0.2, "met": "yes"},
            {"tensor": "out", "engine": "triton", "dtype": "float16", "error": 0.3, "allowed": 0.2, "met": "no"},
        ]
    },
}


def test_goals_take_the_best_of_ours() -> None:
    rows = goal_rows(MEASURED)
    assert [row["goal"] for row in rows[: len(GOALS)]] == [goal for goal, *_ in GOALS]
    assert [row["measured"] for row in rows] == [0.65, 0.4, 1.9, 1.7, 1.4, 0.7, 0.1, 0.3]
    assert [row["met"] for row in rows] == ["yes", "no", "yes", "yes", "yes", "yes", "yes", "no"]


def test_what_was_not_measured_or_only_rehearsed_is_not_measured() -> None:
    assert {row["measured"] for row in goal_rows({})} == {NOT_MEASURED}
    rehearsed = {name: {**its, "rehearsal": REHEARSAL} for name, its in MEASURED.items()}
    assert goal_rows(rehearsed) == goal_rows({})
    without = {name: its for name, its in MEASURED.items() if name != "training"}
    assert [row["measured"] for row in goal_rows(without)[3:6]] == [1.7, NOT_MEASURED, NOT_MEASURED]


def test_stages_that_failed_are_named() -> None:
    statuses = [
        "completed",
        "failed: OSError",
        "ended after its 3 seconds",
        "TensorRT is not installed",
        "ended by SIGSEGV",
        "2 of 9 are wrong",
    ]
    summary = {"stages": [{"stage": str(i), "status": status} for i, status in enumerate(statuses)]}
    assert has_failed(summary) == ["1", "2", "4", "5"]


# ---- what is refused ----


def test_stages_are_chosen_by_name_and_run_in_their_order() -> None:
    known = list_stages()
    assert [stage.name for stage in choose(known, ["training", "rates"])] == ["rates", "training"]
    assert choose(known, []) == known
    with pytest.raises(ValueError, match="no stage 'rate'; did you mean 'rates'"):
        choose(known, ["rate"])
    with pytest.raises(ValueError, match="name their folder"):
        choose(known, ["pretraining"])
    assert choose(list_stages(pictures="x"), ["pretraining"])[0].least > 0


def test_the_boxes_of_all_stages_leave_time_for_the_pretraining() -> None:
    """Stages that run together count once; they may not all be as slow as they are allowed to be."""
    *stages, pretraining = list_stages(pictures="x")
    together = max(stage.seconds for stage in stages if not stage.is_timed)
    alone = sum(stage.seconds for stage in stages if stage.is_timed)
    assert together + alone <= 1.5 * 540
    assert 60 <= pretraining.least <= 120


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_the_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_lost_in_a_folder_that_holds_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernels.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="kernels.json is not a result of this command"):
        bench_gpu(tmp_path, rehearse=True)
    (tmp_path / "kernels.json").unlink()
    (tmp_path / "pretraining" / "run").mkdir(parents=True)
    (tmp_path / "pretraining" / "run" / "recipe.toml").write_text("")
    with pytest.raises(ValueError, match="--resume"):
        bench_gpu(tmp_path, rehearse=True)
    with pytest.raises(ValueError, match="there is no /nowhere"):
        bench_gpu(tmp_path, rehearse=True, pictures="/nowhere")
    with pytest.raises(ValueError, match="minutes is a time"):
        bench_gpu(tmp_path, rehearse=True, minutes=0)
    (tmp_path / "file").write_text("")
    assert main(["bench", "gpu", "--rehearse", "--out", str(tmp_path / "file")]) == 2
    assert "is a file where a folder is needed" in capsys.readouterr().err


# ---- the rehearsal ----


@pytest.mark.timeout(900)
def test_a_tiny_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels, through the interpreter, and the whole way from the command line to the files."""
    pytest.importorskip("triton")
    out = tmp_path / "out"
    words = ["bench", "gpu", "--rehearse", "--minutes", "12", "--out", str(out), "--stages", "correctness", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "summary.json").read_text())
    assert printed["status"] == REHEARSAL and {row["measured"] for row in printed["rows"]} == {NOT_MEASURED}
    assert [(its["stage"], its["status"]) for its in printed["stages"]] == [("correctness", "completed")]
    assert printed["torch"] == str(torch.__version__)
    rows = json.loads((out / "correctness.json").read_text())["rows"]
    kinds = {(row["dtype"], row["tensor"]) for row in rows if row["engine"] == "triton"}
    assert len(kinds) == 9
    assert all(row["met"] == "yes" and row.get("same_bits", True) for row in rows)
    layers = {(row["dtype"], row["tensor"]) for row in rows if row["engine"] == "layer"}
    assert {("bfloat16", "packed out"), ("float16", "packed attn.weight"), ("float32", "rows x")} <= layers
    # Complete stages are left alone by --resume.
    before = (out / "correctness.json").stat().st_mtime_ns
    assert main([*words, "--resume"]) == 0
    assert (out / "correctness.json").stat().st_mtime_ns == before


def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "stage.json", {"what": "GPU: a test", "status": "begun"}, time.time() + 600)


def of_file(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "stage.json").read_text())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("work", ["inference", "training"])
def test_whole_models_are_measured_with_the_same_weights(work: str, tmp_path: Path) -> None:
    names = ["volo", "timm eager", "timm compiled", "timm compiled graph"]
    gpu_stages.models(report(tmp_path), "cpu", [TOY[work]], rounds=3, names=names)
    content = of_file(tmp_path)
    rows = {row["candidate"]: row for row in content["rows"]}
    assert list(rows) == names and not [row for row in rows.values() if "failed" in row]
    for name, row in rows.items():
        assert row["images_per_second"] * row["milliseconds"] == pytest.approx(1000 * TOY[work]["batch_size"])
        assert 0 < row["of_matrix_rate"] and row["first_seconds"] > 0
        assert ("peak_memory_gib" in row) == ("graph" not in name)
        if work == "inference" and "graph" not in name:
            assert row["error"] < 0.05
    assert rows["timm compiled"]["times_timm_compiled"] == 1.0
    assert rows["timm eager"]["memory_times_timm_eager"] == 1.0


def test_a_candidate_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from volo.bench import gpu_models

    def no_graph(run: object, device: torch.device) -> object:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu_models, "captured", no_graph)
    gpu_stages.models(report(tmp_path), "cpu", [TOY["inference"]], rounds=2, names=["volo", "timm eager", "volo graph"])
    content = of_file(tmp_path)
    assert content["status"] == "completed"
    assert [("failed" in row, "milliseconds" in row) for row in content["rows"]] == [(False, True)] * 2 + [
        (True, False)
    ]
    gpu_stages.models(report(tmp_path), "cpu", [TOY["inference"]], rounds=2, names=["volo graph"])
    assert of_file(tmp_path)["status"] == "failed: volo graph"


def test_a_profile_accounts_for_all_of_the_time(tmp_path: Path) -> None:
    gpu_stages.profile(report(tmp_path), "cpu", [TOY["inference"]], most=1000)
    content = of_file(tmp_path)
    assert sum(row["share"] for row in content["rows"]) == pytest.approx(1)
    times = [row["milliseconds"] for row in content["rows"]]
    assert times == sorted(times, reverse=True) and sum(times) == pytest.approx(
        content["volo_d1 at 32, inference"]["milliseconds"]
    )
    assert any("conv" in row["kernel"] for row in content["rows"])


def test_rates_are_those_of_numbers_that_are_not_all_the_same(tmp_path: Path) -> None:
    gpu_stages.rates(report(tmp_path), "cpu", rounds=2)
    assert len(of_file(tmp_path)["rows"]) == 6
    assert all(row["figure"] > 0 and math.isfinite(row["figure"]) for row in of_file(tmp_path)["rows"])


@pytest.mark.skipif(
    "cpu" not in {b.name for b in list_backends() if b.why_not(*SMALL) is None}, reason="needs the CPU kernel"
)
def test_wrong_results_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_stages.results_of

    def wrong(engine: str, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        results = right(engine, *tensors)
        if engine != "reference":
            results["grad_value"] = results["grad_value"].clone()
            results["grad_value"].view(-1)[3] = float("nan")  # as a place that is never written to
        return results

    monkeypatch.setattr(gpu_stages, "results_of", wrong)
    gpu_stages.correctness(report(tmp_path), "cpu", [[1, 4, 4, 1, 16]])
    content = of_file(tmp_path)
    assert content["status"] == f"{len(content['rows']) // 3} of {len(content['rows'])} are wrong"
    assert {row["tensor"] for row in content["rows"] if row["met"] == "no"} == {"grad_value"}


@pytest.mark.slow
def test_pretraining_saves_in_time_and_goes_on(tmp_path: Path) -> None:
    (stage,) = choose(list_stages(device="cpu", is_rehearsal=True, folder=tmp_path / "pretraining"), ["pretraining"])
    arguments = {**stage.arguments, "recipes": ["pictures64_nano_gpu"]}
    arguments["overrides"] = {**arguments["overrides"], "schedule.epochs": 100_000}
    long = Stage(stage.name, stage.what, stage.run, 100, arguments=arguments)
    steps = []
    for _ in range(2):
        result = run_stages([long], tmp_path, seconds=120)["pretraining"]
        assert result["status"] == "time is over in pictures64_nano_gpu; it goes on with --resume"
        assert result["seconds"] < 101
        steps.append(result["rows"][-1]["step"])
        lines = (tmp_path / "pretraining" / "pictures64_nano_gpu" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if '"step"' in line and '"kind": "step"' in line] == list(
            range(1, steps[-1] + 1)
        )
    assert 0 < steps[0] < steps[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["bench", "gpu", "--rehearse", "--minutes", "28", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    statuses = {
        stage.name: json.loads((out / f"{stage.name}.json").read_text())["status"]
        for stage in list_stages(is_rehearsal=True)
    }
    expected = dict.fromkeys(statuses, "completed")
    if statuses["memory"] != "completed":
        expected["memory"] = "compute-sanitizer is not on the PATH"
    if statuses["tensorrt"] != "completed":
        expected["tensorrt"] = "TensorRT is not installed"
    assert statuses == expected
    for name in statuses:
        assert name in shown
        content = json.loads((out / f"{name}.json").read_text())
        assert content["rehearsal"] == REHEARSAL
        assert not [row for row in content["rows"] if "failed" in row], content["rows"]
    assert NOT_MEASURED in shown
    assert (out / "pretraining" / "pictures64_tiny_gpu" / "best.pt").is_file()
    assert os.listdir(out / "logs")
