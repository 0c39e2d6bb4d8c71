"""The GPU kernels without a GPU: numerics through Triton's interpreter, and what ptxas makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from torch._subclasses import FakeTensorMode

from volo.bench import kernels
from volo.ops import triton_kernels
from volo.ops.outlook_attention import outlook_attention

HERE = Path(__file__).parent


def run_interpreted(marker: str) -> None:
    """Triton decides at import whether it interprets, so that takes a process."""
    files = HERE / "triton_interpreted.py", HERE / "packed_interpreted.py"
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-m", marker, "-o", "addopts="]
    run = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_numerics() -> None:
    run_interpreted("not slow")


@pytest.mark.slow
def test_numerics_of_everything() -> None:
    run_interpreted("slow")


def check_compiled(row: dict[str, object]) -> None:
    # A register or two less than it would take let one more warp reside; Triton 3.6 makes more of the same source.
    spilled = 0
    if row["kernel"] == "packed_backward" and row["dtype"] != "float32":
        spilled = 16 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 100
    assert row["spill_bytes"] <= spilled, row
    assert row["stack_bytes"] <= spilled, row
    # 168 registers let 12 warps reside on a multiprocessor; fewer would not cover the latency of memory. In float32 the
    # gradients' kernel multiplies on the CUDA cores, which takes registers, and time enough.
    is_slow = row["kernel"] == "packed_backward" and row["dtype"] == "float32"
    assert row["warps_per_multiprocessor"] >= (8 if is_slow else 10), row
    assert row["loads_of_16_bytes"] > 0, row


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_compiles_for_hopper_without_spills(name: str) -> None:
    row = kernels.inspect_kernel(name, torch.bfloat16, 90)
    check_compiled(row)
    # The kernels on packed logits wait for memory about once a step, those on rows two to four times.
    assert row["step_microseconds"] > 2.0 if name in kernels.VARIANTS["rows"] else row["step_microseconds"] < 1.2, row


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_compiles_for_all_targets_without_spills(name: str, dtype: torch.dtype, capability: int) -> None:
    check_compiled(kernels.inspect_kernel(name, dtype, capability))


def test_fewest_bytes_of_the_paper() -> None:
    # D1's stage 1 at batch 128 in bf16: value 38.5 MB, logits 24.4 MB, output 38.5 MB.
    forward = kernels.fewest_bytes(128, 28, 28, 6, 32, torch.bfloat16)
    assert forward["forward"] == pytest.approx(101.4e6, rel=2e-3)
    assert forward["backward"] == pytest.approx(164.4e6, rel=2e-3)


def test_predictions_agree_with_what_was_measured() -> None:
    results = HERE.parents[1] / "benchmarks" / "results"
    variants = json.loads((results / "triton_compile.json").read_text())["predicted"]["variants"]
    rows = {row["candidate"]: row for row in json.loads((results / "gpu_kernels_d1.json").read_text())["rows"]}
    # The constant is fitted to the first; the second comes out by itself.
    predicted, measured = variants["rows"]["operator_forward_microseconds"], rows["fused forward"]["microseconds"]
    assert predicted == pytest.approx(measured, rel=0.02)
    predicted, measured = variants["rows"]["operator_backward_microseconds"], rows["fused backward"]["microseconds"]
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_fake_tensors_of_a_gpu_that_is_not_here() -> None:
    with FakeTensorMode():
        value, logits = torch.empty(1, 8, 8, 2, 16, device="cuda"), torch.empty(1, 4, 4, 2, 9, 9, device="cuda")
        assert triton_kernels.why_not(value, logits, 3, 2, 1) == "there is no GPU here"
        out = outlook_attention(value, logits, kernel_size=3, stride=2, padding=1)
    assert out.shape == value.shape and out.device.type == "cuda"


def test_whether_the_kernels_serve_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    # What torch.compile(fullgraph=True) has to get through on a GPU, but for the question to the device.
    def serves(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return value + (triton_kernels.why_not(value, logits, 3, 2, 1) is None)

    value, logits = torch.zeros(1, 8, 8, 2, 16), torch.zeros(1, 4, 4, 2, 9, 9)
    compiled = torch.compile(serves, fullgraph=True, backend="eager")
    assert torch.equal(compiled(value, logits), value)
    monkeypatch.setattr(triton_kernels, "_INTERPRETED", True)
    assert torch.equal(compiled(value, logits), value + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to measure")
def test_measurement_says_that_nothing_was_measured() -> None:
    for result in (kernels.tune_kernels(), kernels.bench_layer()):
        assert result["status"] == "not measured: no CUDA device"
        assert result["rows"] == []
    assert kernels.check_layer(torch.bfloat16) == {}


@pytest.mark.gpu
def test_correct_on_the_device() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for result in kernels.check_correctness(2, 12, 11, 3, 32, dtype).values():
            assert result["error"] <= result["allowed"], (dtype, result)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_correct_on_the_device(dtype: torch.dtype) -> None:
    results = kernels.check_layer(dtype)
    assert {name.split()[0] for name in results} == {"rows", "packed"}
    for name, result in results.items():
        assert result["error"] <= result["allowed"], (name, result)
