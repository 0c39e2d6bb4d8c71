"""The GPU kernels measured: what the compiler makes of them and what that should take, which needs no GPU, and what they do
on one.

Two variants. On rows of logits as they are there are three kernels: `forward`, and for the backward pass `grad_logits` and
`grad_value` (the forward kernel, transposed). On packed logits (`volo.ops.packed`) there are two: `packed_forward` and
`packed_backward`. Results are plain dicts with a list of `rows`, as everything in `volo bench`.
"""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from volo.bench.timing import setting
from volo.layers import OutlookAttention
from volo.ops.outlook_attention import window_grid
from volo.ops.packed import pack, packed_width, unpack
from volo.ops.reference import outlook_attention_reference

if TYPE_CHECKING:
    from volo.ops.triton_kernels import Tiling

VARIANTS = {"rows": ("forward", "grad_logits", "grad_value"), "packed": ("packed_forward", "packed_backward")}
KERNELS = tuple(itertools.chain(*VARIANTS.values()))
NOT_MEASURED = {"what": "GPU kernels", "status": "not measured: no CUDA device", "rows": []}
_KERNEL_SIZE, _STRIDE, _PADDING = 3, 2, 1  # D1-D5
_GEOMETRY = (_KERNEL_SIZE, _STRIDE, _PADDING)
_TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_D1 = 128, 28, 28, 6, 32  # batch, height, width, heads, head_dim of D1's stage 1

# The H200 of the predictions. What a large copy reaches there, bytes read plus written, and the clock of its schedulers.
_MULTIPROCESSORS, _COPY, _CLOCK = 132, 4.3e12, 1.98e9
# From the request for memory to the answer, under load: fitted so that the prediction for `forward` in bfloat16 is what was
# measured (benchmarks/results/gpu_kernels_d1.json). It is the only number that is fitted.
_LATENCY = 0.835e-6
# What cuBLAS's products of this width and the pooling reach of a copy's bandwidth: assumed.
_LINEAR_EFFICIENCY = 0.75

_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}  # of a multiprocessor; a program takes 1 KB on top of its own


# ---- without a GPU ----


def compile_report(
    dtypes: Sequence[torch.dtype] = tuple(_TRITON_TYPES), capabilities: Sequence[int] = (80, 90), head_dim: int = 32
) -> dict[str, Any]:
    """The kernels of D1-D5 compiled for GPUs that need not be there: registers, spills, shared memory, occupancy."""
    import triton

    rows = [
        inspect_kernel(name, dtype, capability, head_dim=head_dim)
        for capability, dtype, name in itertools.product(capabilities, dtypes, KERNELS)
    ]
    return {
        "what": "GPU kernels compiled ahead of time",
        "triton": triton.__version__,
        "torch": str(torch.__version__),
        "kernel_size": _KERNEL_SIZE,
        "stride": _STRIDE,
        "padding": _PADDING,
        "head_dim": head_dim,
        "speed": NOT_MEASURED["status"],
        "fewest_megabytes_of_d1_at_batch_128_in_bf16": {
            name: n / 1e6 for name, n in fewest_bytes(*_D1, torch.bfloat16).items()
        },
        "predicted": predict(rows),
        "rows": rows,
    }


def predict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Times of operator and layer of D1's stage 1 at batch 128 in bfloat16 on an H200, from `compile_report`'s rows.

    Not measured: see `_predict`. Of a layer, the products and the pooling are counted by their bytes.
    """
    times = {
        row["kernel"]: row["predicted_microseconds"]
        for row in rows
        if row["dtype"] == "bfloat16" and "predicted_microseconds" in row
    }
    B, H, W, heads, head_dim = _D1
    tokens = 2 * B * H * W * heads * head_dim  # bytes
    pooled, logits = tokens // _STRIDE**2, 2 * B * (H // _STRIDE) * (W // _STRIDE) * heads * _KERNEL_SIZE**4
    others = {"value": 2 * tokens, "pooling": tokens + pooled, "logits": pooled + logits, "projection": 2 * tokens}
    microseconds = {name: n / (_LINEAR_EFFICIENCY * _COPY) * 1e6 for name, n in others.items()}
    result: dict[str, Any] = {"parts_of_the_layer_microseconds": microseconds, "variants": {}}
    for variant, (forward, *backward) in VARIANTS.items():
        if forward in times:
            result["variants"][variant] = {
                "operator_forward_microseconds": times[forward],
                "operator_backward_microseconds": sum(times[name] for name in backward),
                "layer_forward_microseconds": times[forward] + sum(microseconds.values()),
            }
    return result


def inspect_kernel(
    name: str, dtype: torch.dtype, capability: int, *, head_dim: int = 32, tiling: Tiling | None = None
) -> dict[str, Any]:
    """What ptxas reports of one kernel for kernel 3, stride 2, padding 1: a row of `compile_report`.

    Args:
        name: one of KERNELS.
        capability: 80 for sm_80, 90 for sm_90.
        tiling: another than the one that `volo.ops.triton_kernels` chooses.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, tiling, registers_at_most = _specialisation(name, dtype, head_dim, tiling)
    pointers = dict.fromkeys(
        ("src", "out", "value", "logits", "grad_out", "grad_logits", "grad_value"), f"*{_TRITON_TYPES[dtype]}"
    )
    pointers |= {"lse": "*fp32", "tops": "*fp32", "scale": "fp32"}
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(argument, "i32")
        for argument in kernel.arg_names
    }
    # As at run time: allocations are aligned, and the strides of tokens, heads and packed windows are multiples of 16.
    aligned = re.compile(r"(src|value|grad)_[byxh]" + ("|logits_[bij]" if name.startswith("packed") else ""))
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or aligned.fullmatch(argument)
    }
    source = ASTSource(kernel, signature, {k: v for k, v in constants.items() if k in signature}, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiling.num_warps, "num_stages": 1, "maxnreg": registers_at_most},
    )
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, stack, spills, instructions, (begin, end) = _assemble(ptx)
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // tiling.num_warps
    programs = min(by_registers, _SHARED_BYTES[capability] // (shared + 1024), 64 // tiling.num_warps, 32)
    step = instructions[begin:end]
    row = {
        "kernel": name,
        "dtype": str(dtype).removeprefix("torch."),
        "target": f"sm_{capability}",
        "registers": registers,
        "spill_bytes": spills,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "num_warps": tiling.num_warps,
        "cells": tiling.cells,
        "warps_per_multiprocessor": programs * tiling.num_warps,
        "loads_of_16_bytes": len(re.findall(r"ld\.global\S*\.v(4\.b32|2\.b64)", ptx)),
        "matrix_instructions": len(re.findall(r"\bmma\.sync", ptx)),
        "instructions_per_cell_and_step": len(step) * tiling.num_warps / tiling.cells,
        "loads_per_step": sum("LDG" in line for line in step),
        "stores_per_step": sum("STG" in line for line in step),
        "megabytes_of_d1_at_batch_128": _moved(name, dtype) / 1e6,
    }
    if capability == 90 and head_dim == _D1[4]:
        row |= _predict(name, dtype, instructions, begin, end, programs, tiling.num_warps)
    return row


def _specialisation(
    name: str, dtype: torch.dtype, head_dim: int, tiling: Tiling | None
) -> tuple[Any, dict[str, Any], Tiling, int | None]:
    """A kernel, its constants as in the calls of D1-D5, the tiling, and the most registers it may use."""
    from volo.ops import triton_kernels, triton_packed

    tiling = tiling or _tiling(name, dtype, head_dim)
    constants = {
        "K": _KERNEL_SIZE, "S": _STRIDE, "P": _PADDING, "HEAD_DIM": head_dim, "FALLING": False,
        "COLUMNS": tiling.columns, "FIRST": tiling.first, "WINDOWS": tiling.windows, "SPAN": tiling.span,
        "RING": tiling.ring, "LEVELS": tiling.levels, "D": tiling.padded_head_dim, "CELLS": tiling.cells, "UPCAST": False,
    }  # fmt: skip
    if name not in VARIANTS["packed"]:
        constants |= {
            "SPLIT": dtype == torch.float32, "TRANSPOSED": name == "grad_value",
            "TAP_LEVELS": (_KERNEL_SIZE**2 - 1).bit_length(),
        }  # fmt: skip
        kernel = triton_kernels._grad_logits_kernel if name == "grad_logits" else triton_kernels._mix_kernel
        return kernel, constants, tiling, None
    is_backward = name == "packed_backward"
    constants["PER_WORD"] = 4 // dtype.itemsize
    if is_backward:
        constants |= {
            "PACKED_WIDTH": packed_width(_D1[3], _KERNEL_SIZE), "AHEAD": dtype.itemsize == 2,
            "TOKEN_LEVELS": (tiling.ring * tiling.columns - 1).bit_length(),
        }  # fmt: skip
    kernel = triton_packed._backward_kernel if is_backward else triton_packed._forward_kernel
    most = triton_packed.most_registers(dtype, head_dim, _KERNEL_SIZE, is_backward=is_backward)
    return kernel, constants, tiling, most


def _tiling(name: str, dtype: torch.dtype, head_dim: int) -> Tiling:
    """The built-in choice for D1's stage 1 at batch 128."""
    from volo.ops import triton_kernels, triton_packed

    B, H, W, heads, _ = _D1
    if name == "grad_logits":
        h, w = window_grid(H, W, *_GEOMETRY)
        columns = B * heads * (_STRIDE * (w - 1) + _KERNEL_SIZE)
        return triton_kernels.choose_tiling(
            dtype, head_dim, _KERNEL_SIZE, _STRIDE, 0, keeps_sums=False, num_columns=columns, num_steps=h
        )
    size: dict[str, Any] = {"num_columns": B * heads * W, "num_steps": -(-(H + _PADDING) // _STRIDE)}
    if name in VARIANTS["packed"]:
        return triton_packed.choose_packed_tiling(
            dtype, head_dim, *_GEOMETRY, is_backward=name == "packed_backward", **size
        )
    return triton_kernels.choose_tiling(dtype, head_dim, *_GEOMETRY, **size)


def _assemble(ptx: str) -> tuple[int, int, int, list[str], tuple[int, int]]:
    """Registers a lane, bytes of stack and bytes spilled (stores and loads), as ptxas -v says; the instructions, and where
    among them the loop over the steps is."""
    import triton

    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        path.write_text(ptx)
        tools = triton.knobs.nvidia
        command = [tools.ptxas.path, "-v", f"--gpu-name={target[1]}", path, "-o", cubin]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([tools.nvdisasm.path, "-c", cubin], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", report)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None, report
    assert frame is not None, report
    instructions: list[str] = []
    labels, loops = {}, [(0, 0)]
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            if (branch := re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])) and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions)))
    longest = max(loops, key=lambda loop: loop[1] - loop[0])
    return int(registers[1]), int(frame[1]), int(frame[2]) + int(frame[3]), instructions, longest


def _predict(
    name: str, dtype: torch.dtype, instructions: list[str], begin: int, end: int, programs: int, num_warps: int
) -> dict[str, float]:
    """What D1's stage 1 at batch 128 should take on an H200: the longer of its bytes at the bandwidth of a copy, and of
    what a multiprocessor's programs take one after the other.

    A scheduler's warps take turns, an instruction each; what a load brings is there _LATENCY after it, and the first
    instruction that names one of its registers waits for that. Nothing else ever waits.
    """
    turn = programs * num_warps / 4 / _CLOCK

    def walk(lines: Sequence[str], now: float, pending: dict[int, float]) -> float:
        for line in lines:
            for register in [int(r) for r in re.findall(r"\bR(\d+)\b", line)]:
                now = max(now, pending.pop(register, now))
            now += turn
            if load := re.search(r"LDG\S*?(?:\.(64|128))? R(\d+)", line):
                pending |= dict.fromkeys(range(int(load[2]), int(load[2]) + int(load[1] or 32) // 32), now + _LATENCY)
        return now

    pending: dict[int, float] = {}
    setup = walk(instructions[:begin], 0.0, pending)
    ends = [setup]
    for _ in range(4):
        ends.append(walk(instructions[begin:end], ends[-1], pending))
    step = ends[-1] - ends[-2]

    tiling = _tiling(name, dtype, _D1[4])
    B, H, W, heads, _ = _D1
    h, w = window_grid(H, W, *_GEOMETRY)
    is_logits = name == "grad_logits"
    cells = B * heads * (-(-(_STRIDE * (w - 1) + _KERNEL_SIZE) // _STRIDE) if is_logits else -(-W // _STRIDE))
    steps = h if is_logits else -(-(H + _PADDING) // _STRIDE)
    walks = -(-steps // tiling.rows_per_program)
    # A walk that does not begin at the top begins a few steps early; grad_logits needs none of what these bring.
    early = 0 if is_logits else (walks - 1) * ((_KERNEL_SIZE - 1) // _STRIDE)
    columns = -(-cells // tiling.cells) / (_MULTIPROCESSORS * programs)
    by_steps = columns * (walks * setup + (steps + early) * step)
    by_bytes = _moved(name, dtype) / _COPY
    return {
        "step_microseconds": step * 1e6,
        "predicted_microseconds": max(by_steps, by_bytes) * 1e6,
        "predicted_by_steps_microseconds": by_steps * 1e6,
        "predicted_by_bytes_microseconds": by_bytes * 1e6,
    }


def _moved(name: str, dtype: torch.dtype) -> int:
    """Bytes that a kernel reads and writes for D1's stage 1 at batch 128, each once."""
    B, H, W, heads, head_dim = _D1
    h, w = window_grid(H, W, *_GEOMETRY)
    value = B * H * W * heads * head_dim * dtype.itemsize
    rows = B * h * w * heads * _KERNEL_SIZE**2
    logits = rows * _KERNEL_SIZE**2 * dtype.itemsize
    packed = B * h * w * packed_width(heads, _KERNEL_SIZE) * dtype.itemsize
    sums = rows * (8 if dtype == torch.float32 else 4)
    return {
        "forward": 2 * value + logits,
        "grad_logits": 2 * value + 2 * logits + sums,
        "grad_value": 2 * value + logits + sums,
        "packed_forward": 2 * value + packed,
        "packed_backward": 3 * value + 2 * packed,
    }[name]


def fewest_bytes(B: int, H: int, W: int, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that must move at the least: forward reads value and logits and writes out; backward reads these two and
    the gradient of out, and writes two gradients. `backward_moved` adds what the two kernels of ours move besides."""
    h, w = window_grid(H, W, *_GEOMETRY)
    value = B * H * W * heads * head_dim * dtype.itemsize
    rows = B * h * w * heads * _KERNEL_SIZE**2
    logits = rows * _KERNEL_SIZE**2 * dtype.itemsize
    again = value + logits + 2 * rows * (8 if dtype == torch.float32 else 4)
    return {
        "forward": 2 * value + logits,
        "backward": 3 * value + 2 * logits,
        "backward_moved": 3 * value + 2 * logits + again,
    }


# ---- on a GPU ----


def bench_kernels(
    batch_size: int = 128,
    height: int = 28,
    width: int = 28,
    heads: int = 6,
    head_dim: int = 32,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compiled: bool = True,
    rounds: int = 15,
    device: str = "cuda",
    packed: bool = True,
) -> dict[str, Any]:
    """Outlook attention of D1's stage 1 on the current CUDA device, against unfold/fold eager and compiled.

    Candidates: `fused` are the kernels on rows of logits as they are, `packed` those on packed logits; `eager` and
    `compiled` the reference. Each `forward` and `forward + backward`, the kernels also `backward`.

    Correctness comes first: AssertionError names what misses the error budget. Times are medians over `rounds` turns of
    CUDA graphs over four input sets, which do not fit in the cache together; `copy_fraction` is the fewest bytes over
    the time, relative to a large copy on the device (bytes read plus written) in the same process.

    Returns `compile_report()` where there is no CUDA device, or `device` is another.
    """
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        return compile_report()
    correctness = check_correctness(min(batch_size, 4), height, width, heads, head_dim, dtype, packed=packed)
    for name, error in correctness.items():
        assert error["error"] <= error["allowed"], f"{name} misses the error budget: {error}"

    from volo.ops import triton_kernels, triton_packed

    sets = [_draw(batch_size, height, width, heads, head_dim, dtype, seed) for seed in range(4)]
    packed_sets = [(value, _packed(logits), grad) for value, logits, grad in sets]
    scale = head_dim**-0.5

    def ours(value: Tensor, logits: Tensor, grad: Tensor) -> Any:
        return triton_kernels.forward(value, logits, *_GEOMETRY, scale)

    def ours_backward(value: Tensor, logits: Tensor, grad: Tensor) -> Any:
        return triton_kernels.backward(grad, value, logits, *_GEOMETRY, scale)

    def on_packed(value: Tensor, logits: Tensor, grad: Tensor) -> Any:
        return triton_packed.forward(value, logits, *_GEOMETRY, scale)

    def packed_backward(value: Tensor, logits: Tensor, grad: Tensor) -> Any:
        return triton_packed.backward(grad, value, logits, *_GEOMETRY, scale)

    def step_of(operator: Callable[..., Tensor]) -> Callable[..., Any]:
        def step(value: Tensor, logits: Tensor, grad: Tensor) -> Any:
            value, logits = value.detach().requires_grad_(), logits.detach().requires_grad_()
            return torch.autograd.grad(operator(value, logits, *_GEOMETRY, scale), (value, logits), grad)

        return step

    candidates: dict[str, Callable[..., Any]] = {
        "fused forward": ours,
        "fused backward": ours_backward,
        "fused forward + backward": lambda *x: (ours(*x), ours_backward(*x)),
    }
    if packed:
        candidates |= {
            "packed forward": on_packed,
            "packed backward": packed_backward,
            "packed forward + backward": lambda *x: (on_packed(*x), packed_backward(*x)),
        }
    peers = {"eager": outlook_attention_reference}
    if compiled:
        peers["compiled"] = torch.compile(outlook_attention_reference)
    for name, operator in peers.items():
        candidates[f"{name} forward"] = lambda v, a, g, operator=operator: operator(v, a, *_GEOMETRY, scale)
        candidates[f"{name} forward + backward"] = step_of(operator)

    block = torch.randn(2**28, device="cuda")
    target = torch.empty_like(block)
    graphs = {
        name: _capture(run, packed_sets if name.startswith("packed") else sets) for name, run in candidates.items()
    }
    seconds = _time(graphs, rounds, len(sets))
    copy = statistics.median(_time({"copy": _capture(lambda: target.copy_(block), [()])}, rounds, 1)["copy"])
    bandwidth = 2 * block.nbytes / copy
    bytes_of = fewest_bytes(batch_size, height, width, heads, head_dim, dtype)
    bytes_of["forward + backward"] = bytes_of["forward"] + bytes_of["backward"]
    rows = []
    for name, taken in seconds.items():
        engine, _, work = name.partition(" ")
        row = _row(name, taken)
        row["copy_fraction"] = bytes_of[work] / statistics.median(taken) / bandwidth
        for peer in (*peers, "fused") if engine == "packed" else peers if engine == "fused" else ():
            if f"{peer} {work}" in seconds:
                row[f"times_{peer}"] = statistics.median(seconds[f"{peer} {work}"]) / statistics.median(taken)
        rows.append(row)
    return {
        "what": "GPU kernels",
        "status": "measured",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [batch_size, height, width, heads, head_dim],
        "rounds": rounds,
        "copy_terabytes_per_second": bandwidth / 1e12,
        **setting(torch.device("cuda", torch.cuda.current_device())),
        "fewest_bytes": bytes_of,
        "correctness": correctness,
        "rows": rows,
    }


def bench_layer(
    batch_size: int = 128, *, dtype: torch.dtype = torch.bfloat16, rounds: int = 15, device: str = "cuda",
    backward: bool = True, packed: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The outlook attention layer of D1's stage 1 (192 channels, 6 heads, 28 x 28 tokens), its Linear layers in `dtype`.

    Candidates, each `forward`, and with `backward` also `forward + backward` (gradients of input and parameters): `rows`,
    whose kernels take the logits as they are; `packed` (`volo.ops.packed`); `eager`, on the reference; and by torch.compile
    `compiled packed` and `compiled` (the reference). Correctness comes first: AssertionError names what misses the error
    budget. Times are medians over `rounds` turns of CUDA graphs over four inputs; `times_NAME` says how many times as fast
    as NAME a candidate is. Without `packed` nothing is measured of packed logits.

    Returns NOT_MEASURED where there is no CUDA device, or `device` is another.
    """
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        return NOT_MEASURED
    correctness = check_layer(dtype, packed=packed)
    for name, error in correctness.items():
        assert error["error"] <= error["allowed"], f"{name} misses the error budget: {error}"
    _, H, W, heads, head_dim = _D1
    names = ("rows", "packed", "eager") if packed else ("rows", "eager")
    layers: dict[str, Any] = {name: _layer(name, dtype) for name in names}
    if packed:
        layers["compiled packed"] = torch.compile(_layer("packed", dtype))
    layers["compiled"] = torch.compile(_layer("eager", dtype))
    generator = torch.Generator("cuda").manual_seed(0)
    shape = batch_size, H, W, heads * head_dim
    sets = [tuple(torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2)) for _ in range(4)]

    def inference_of(layer: Callable[..., Tensor]) -> Callable[..., Any]:
        def infer(x: Tensor, grad: Tensor) -> Any:
            with torch.no_grad():
                return layer(x)

        return infer

    def step_of(layer: Any) -> Callable[..., Any]:
        def step(x: Tensor, grad: Tensor) -> Any:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

        return step

    graphs = {f"{name} forward": _capture(inference_of(layer), sets) for name, layer in layers.items()}
    if backward:
        graphs |= {f"{name} forward + backward": _capture(step_of(layer), sets) for name, layer in layers.items()}
    seconds = _time(graphs, rounds, len(sets))
    rows = []
    for name, taken in seconds.items():
        engine, _, work = name.rpartition(" forward")
        row = _row(name, taken)
        for peer in ("rows", "eager", "compiled"):
            if peer != engine:
                row[f"times_{peer}"] = statistics.median(seconds[f"{peer} forward{work}"]) / statistics.median(taken)
        rows.append(row)
    return {
        "what": "outlook attention layer on a GPU",
        "status": "measured",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "rounds": rounds,
        **setting(torch.device("cuda", torch.cuda.current_device())),
        "correctness": correctness,
        "rows": rows,
    }


def check_layer(
    dtype: torch.dtype, device: str = "cuda", *, packed: bool = True,
    shape: tuple[int, int, int] = (2, 12, 11), heads: int = 6, head_dim: int = 32,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Largest errors of the layer against float64, and what the error budget allows, as in `check_correctness`. Keys: `rows`
    and `packed`, the two ways to the kernels, before `out`, `x` (its gradient) and the names of the parameters (their
    gradients).

    Two runs must agree to the bit (AssertionError). On a CPU it takes Triton's interpreter (TRITON_INTERPRET=1); without that
    and without a CUDA device the dict is empty.
    """
    if torch.device(device).type == "cuda":
        runs = torch.cuda.is_available()
    else:
        from volo.ops import triton_kernels

        runs = triton_kernels.is_interpreted()
    if not runs:
        return {}
    generator = torch.Generator(device).manual_seed(17)
    x, grad = (torch.randn(*shape, heads * head_dim, device=device, generator=generator).to(dtype) for _ in range(2))

    def run(layer: Any, to: torch.dtype) -> dict[str, Tensor]:
        inputs = x.to(to).requires_grad_()
        named = {"x": inputs} | dict(layer.to(to).named_parameters())
        out = layer(inputs)
        return {"out": out.detach()} | dict(zip(named, torch.autograd.grad(out, list(named.values()), grad.to(to))))

    def made(name: str) -> Any:
        return _layer(name, dtype, device, heads, head_dim)

    exact, eager = run(made("eager"), torch.float64), run(made("eager"), dtype)
    results = {}
    for path in ("rows", "packed") if packed else ("rows",):
        ours, again = run(made(path), dtype), run(made(path), dtype)
        for name, truth in exact.items():
            assert torch.equal(ours[name], again[name]), f"{path} {name} differs from run to run"
            rounding = torch.finfo(dtype).eps * truth.abs().max().item()
            results[f"{path} {name}"] = {
                "error": (ours[name] - truth).abs().max().item(),
                "allowed": 2 * (eager[name] - truth).abs().max().item() + rounding,
            }
    return results


class _Reference(OutlookAttention):
    """The layer on the reference backend."""

    def _attend(self, x: Tensor) -> Tensor:
        return outlook_attention_reference(*self._project(x), *_GEOMETRY, self.scale)


def _layer(
    name: str, dtype: torch.dtype, device: str = "cuda", heads: int = _D1[3], head_dim: int = _D1[4]
) -> OutlookAttention:
    """The same weights whatever the name; logits as spread as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    layer = (_Reference if name == "eager" else OutlookAttention)(heads * head_dim, heads, *_GEOMETRY)
    layer.packs = name == "packed"
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        layer.attn.weight.mul_(head_dim**0.5)
    return layer.to(device, dtype)


def tune_kernels(
    batch_size: int = 128,
    height: int = 28,
    width: int = 28,
    heads: int = 6,
    head_dim: int = 32,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 5,
) -> dict[str, Any]:
    """Times of other tilings than the built-in choice, fastest first for each pass. Results do not depend on it.

    Returns NOT_MEASURED where there is no CUDA device.
    """
    if not torch.cuda.is_available():
        return NOT_MEASURED
    from volo.ops import triton_kernels, triton_packed

    sets = [_draw(batch_size, height, width, heads, head_dim, dtype, seed) for seed in range(4)]
    packed_sets = [(value, _packed(logits), grad) for value, logits, grad in sets]
    scale = head_dim**-0.5
    mix = triton_kernels.choose_tiling(dtype, head_dim, *_GEOMETRY)
    grad = triton_kernels.choose_tiling(dtype, head_dim, _KERNEL_SIZE, _STRIDE, 0, keeps_sums=False)

    def variants(tiling: Tiling) -> Iterator[Tiling]:
        for num_warps, rows in itertools.product((1, 2, 4), (2, 3, 4, 5, 8, 15)):
            yield replace(tiling, cells=tiling.cells * num_warps, num_warps=num_warps, rows_per_program=rows)

    candidates: dict[tuple[str, Tiling | None], Callable[..., Any]] = {}
    for tiling in (None, *variants(mix)):
        candidates["forward", tiling] = lambda v, a, g, tiling=tiling: triton_kernels.forward(
            v, a, *_GEOMETRY, scale, tiling=tiling
        )
    # The two kernels of the backward pass do not influence each other: one choice at a time.
    for tiling in (None, *variants(mix)):
        candidates["grad_value", tiling] = lambda v, a, g, tiling=tiling: triton_kernels.backward(
            g, v, a, *_GEOMETRY, scale, tiling=tiling
        )
    for tiling in variants(grad):
        candidates["grad_logits", tiling] = lambda v, a, g, tiling=tiling: triton_kernels.backward(
            g, v, a, *_GEOMETRY, scale, logits_tiling=tiling
        )
    for is_backward, name in enumerate(VARIANTS["packed"]):
        packed = triton_packed.choose_packed_tiling(dtype, head_dim, *_GEOMETRY, is_backward=bool(is_backward))
        for tiling in (None, *variants(packed)):
            candidates[name, tiling] = lambda v, a, g, tiling=tiling, is_backward=is_backward: (
                triton_packed.backward(g, v, a, *_GEOMETRY, scale, tiling=tiling)
                if is_backward
                else triton_packed.forward(v, a, *_GEOMETRY, scale, tiling=tiling)
            )
    graphs = {
        key: _capture(run, packed_sets if key[0].startswith("packed") else sets) for key, run in candidates.items()
    }
    seconds = _time(graphs, rounds, len(sets))
    rows = [
        {
            "varied": varied,
            "pass": varied.replace("grad_logits", "backward").replace("grad_value", "backward").replace("_", " "),
            "microseconds": statistics.median(taken) * 1e6,
            "num_warps": tiling.num_warps if tiling else "built in",
            "rows_per_program": tiling.rows_per_program if tiling else "built in",
        }
        for (varied, tiling), taken in seconds.items()
    ]
    return {
        "what": "GPU kernels, tilings",
        "status": "measured",
        **setting(torch.device("cuda", torch.cuda.current_device())),
        "rows": sorted(rows, key=lambda row: (row["pass"], row["microseconds"])),
    }


def check_correctness(
    B: int, H: int, W: int, heads: int, head_dim: int, dtype: torch.dtype, *, packed: bool = True
) -> dict[str, dict[str, float]]:
    """Largest errors on the current CUDA device against float64, and what the error budget allows: twice the error of
    the eager reference in the same dtype plus one rounding of the largest number. Keys: out, grad_value, grad_logits,
    and the same three after `packed `, for the kernels on packed logits, unless `packed` is False.

    Outputs are poisoned with NaN first; the results of two runs must agree to the bit (AssertionError).
    """
    from volo.ops import triton_kernels, triton_packed

    value, logits, grad = _draw(B, H, W, heads, head_dim, dtype, seed=17)
    packed_logits = _packed(logits)
    packed_logits[..., heads * _KERNEL_SIZE**4 :] = torch.nan  # nobody reads the gap
    scale = head_dim**-0.5

    def fused() -> list[Tensor]:
        out = triton_kernels.forward(value, logits, *_GEOMETRY, scale)
        return [out, *triton_kernels.backward(grad, value, logits, *_GEOMETRY, scale)]

    def fused_on_packed() -> list[Tensor]:
        out = triton_packed.forward(value, packed_logits, *_GEOMETRY, scale)
        grad_value, grad_packed = triton_packed.backward(grad, value, packed_logits, *_GEOMETRY, scale)
        assert not grad_packed[..., heads * _KERNEL_SIZE**4 :].any(), "the gradient of the gap is not zero"
        return [out, grad_value, unpack(grad_packed, heads, _KERNEL_SIZE)]

    def reference(to: torch.dtype) -> list[Tensor]:
        v, a = value.to(to).requires_grad_(), logits.to(to).requires_grad_()
        out = outlook_attention_reference(v, a, *_GEOMETRY, scale)
        return [out.detach(), *torch.autograd.grad(out, (v, a), grad.to(to))]

    exact, eager = reference(torch.float64), reference(dtype)
    results = {}
    for prefix, run in (("", fused), ("packed ", fused_on_packed)) if packed else (("", fused),):
        # The allocator hands these out again to `run`.
        poison = [torch.full_like(x, float("nan")) for x in (value, packed_logits, value, logits, value)]
        del poison
        ours, again = run(), run()
        for name, x, y, truth, peer in zip(("out", "grad_value", "grad_logits"), ours, again, exact, eager):
            assert torch.equal(x, y), f"{prefix}{name} differs from run to run"
            results[prefix + name] = {
                "error": (x - truth).abs().max().item(),
                "allowed": 2 * (peer - truth).abs().max().item() + torch.finfo(dtype).eps * truth.abs().max().item(),
            }
    return results


def _row(name: str, taken: Sequence[float]) -> dict[str, Any]:
    first, median, third = statistics.quantiles(taken, n=4)
    return {"candidate": name, "microseconds": median * 1e6, "quartiles": [first * 1e6, third * 1e6]}


def _packed(logits: Tensor) -> Tensor:
    """[B, h, w, heads, K*K, K*K] -> packed logits."""
    return pack(logits.flatten(3).movedim(-1, 0), logits.shape[3], _KERNEL_SIZE).movedim(0, -1).contiguous()


def _draw(
    B: int, H: int, W: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    taps = _KERNEL_SIZE**2
    shapes = (B, H, W, heads, head_dim), (B, *window_grid(H, W, *_GEOMETRY), heads, taps, taps)
    value, logits = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes)
    return value, logits, torch.randn(shapes[0], device="cuda", generator=generator).to(dtype)


def _capture(run: Callable[..., object], sets: Sequence[Sequence[Any]]) -> torch.cuda.CUDAGraph:
    """One call for each set of inputs, as a graph: what is timed is the device, not the host that launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, chooses algorithms, warms the allocator
        for inputs in [*sets, *sets]:
            run(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            run(*inputs)
    return graph


def _time(graphs: dict[Any, torch.cuda.CUDAGraph], rounds: int, calls: int) -> dict[Any, list[float]]:
    """Seconds of a call, by round; the graphs take turns."""
    seconds: dict[Any, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / calls)
    return seconds
