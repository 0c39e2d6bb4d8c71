"""What `volo bench gpu` does, stage by stage; each of these functions runs in a process of its own (`volo.bench.stages`).

On a CPU the same code runs at toy size, the kernels through Triton's interpreter: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from volo.bench.gpu_models import COMPILED, DTYPE, Case, Models, candidates, kernels_of, measure
from volo.bench.stages import Report, die_with
from volo.bench.timing import alternate, captured, copy_bandwidth, matrix_rate, setting
from volo.ops.outlook_attention import list_backends, outlook_attention, window_grid
from volo.training.report import NullReporter, RunInfo, StepReport

GEOMETRY = {"kernel_size": 3, "stride": 2, "padding": 1}  # D1-D5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _open(device: str) -> torch.device:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    return where


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- correctness ----


def correctness(report: Report, device: str, shapes: Sequence[Sequence[int]]) -> None:
    """Each engine of the operator in each dtype, its gradients too, against float64: a row for every tensor.

    shapes: [B, H, W, heads, head_dim]. `allowed`: twice the error of the eager reference in that dtype plus one rounding of
    the largest number. Outputs are poisoned with NaN beforehand, and two runs must agree to the bit.
    """
    where = _open(device)
    report.add(**setting(where))
    for shape in shapes:
        for dtype in DTYPES:
            value, logits, grad = draw(shape, dtype, where)
            exact = results_of("reference", value.double(), logits.double(), grad.double())
            eager = results_of("reference", value, logits, grad)
            engines = [b.name for b in list_backends() if b.why_not(value, logits, *GEOMETRY.values()) is None]
            for engine in engines:
                if engine == "reference":
                    continue  # what the others are held against
                report.say(f"{engine}, {_name(dtype)}, {' x '.join(map(str, shape))}")
                try:
                    report.rows.extend(_errors(engine, shape, dtype, (value, logits, grad), exact, eager))
                except Exception as error:  # noqa: BLE001  (of one engine in one dtype; the others are still worth knowing)
                    failed = f"{type(error).__name__}: {error}"[:500]
                    report.rows.append({"engine": engine, "dtype": _name(dtype), "failed": failed, "met": "no"})
                    report.say(traceback.format_exc())
                report.save()
    from volo.bench import kernels

    small: dict[str, Any] = {} if where.type == "cuda" else {"shape": (1, 3, 4), "heads": 1, "head_dim": 8}
    for dtype in DTYPES:
        report.say(f"the layer, {_name(dtype)}")
        try:
            for name, its in kernels.check_layer(dtype, device, **small).items():
                met = "yes" if its["error"] <= its["allowed"] else "no"
                report.rows.append({"engine": "layer", "dtype": _name(dtype), "tensor": name, **its, "met": met})
        except Exception as error:  # noqa: BLE001  (as above)
            failed = f"{type(error).__name__}: {error}"[:500]
            report.rows.append({"engine": "layer", "dtype": _name(dtype), "failed": failed, "met": "no"})
            report.say(traceback.format_exc())
        report.save()
    wrong = [row for row in report.rows if row["met"] == "no" or not row.get("same_bits", True)]
    report.add(status=f"{len(wrong)} of {len(report.rows)} are wrong" if wrong else "completed")


def _errors(
    engine: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    inputs: tuple[Tensor, Tensor, Tensor],
    exact: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
) -> Iterator[dict[str, Any]]:
    value, logits, _ = inputs
    poison = [torch.full_like(x, float("nan")) for x in (value, logits, value, logits, value)]
    del poison  # the allocator hands these out again
    ours, again = results_of(engine, *inputs), results_of(engine, *inputs)
    for name, x in ours.items():
        error = float((x.double() - exact[name]).abs().max())
        rounding = torch.finfo(dtype).eps * float(exact[name].abs().max())
        allowed = 2 * float((eager[name].double() - exact[name]).abs().max()) + rounding
        yield {
            "engine": engine,
            "dtype": _name(dtype),
            "shape": list(shape),
            "tensor": name,
            "error": error,
            "allowed": allowed,
            "met": "yes" if error <= allowed else "no",  # NaN is never met
            "same_bits": bool(torch.equal(x, again[name])),
        }


def draw(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """value, logits and a gradient of the output."""
    B, H, W, heads, head_dim = shape
    generator = torch.Generator(device).manual_seed(17)
    windows, taps = window_grid(H, W, *GEOMETRY.values()), GEOMETRY["kernel_size"] ** 2
    shapes = (B, H, W, heads, head_dim), (B, *windows, heads, taps, taps), (B, H, W, heads, head_dim)
    value, logits, grad = (torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes)
    return value, logits, grad


def results_of(engine: str, value: Tensor, logits: Tensor, grad: Tensor) -> dict[str, Tensor]:
    value, logits = value.detach().requires_grad_(), logits.detach().requires_grad_()
    out = outlook_attention(value, logits, **GEOMETRY, backend=engine)
    grads = torch.autograd.grad(out, (value, logits), grad)
    return {"out": out.detach(), "grad_value": grads[0], "grad_logits": grads[1]}


def memory(report: Report, device: str, shape: Sequence[int]) -> None:
    """Forward and backward pass of the kernels under compute-sanitizer: no access outside of what was allocated, no race."""
    case = [
        sys.executable,
        "-c",
        f"from volo.bench.gpu_stages import small_case; small_case({device!r}, {list(shape)})",
    ]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ("",):
        report.say(f"compute-sanitizer {tool}" if tool else "compute-sanitizer is not on the PATH; the case alone")
        prefix = [str(sanitizer), "--tool", tool, "--error-exitcode", "86"] if tool else []
        # Freed tensors are then freed indeed, and what lies behind one is nobody's.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run([*prefix, *case], env=environment, capture_output=True, text=True, check=False)
        row = {"tool": tool or "none", "exit_code": done.returncode, "said": (done.stdout + done.stderr)[-1500:]}
        report.add_row(row)
    bad = [row["tool"] for row in report.rows if row["exit_code"]]
    status = "completed" if sanitizer else "compute-sanitizer is not on the PATH"
    report.add(status=f"failed: {', '.join(bad)}" if bad else status)


def small_case(device: str, shape: Sequence[int]) -> None:
    """What `memory` watches."""
    where = _open(device)
    for dtype in DTYPES:
        results_of("triton", *draw(shape, dtype, where))
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    sys.stdout.write("the case has run\n")


# ---- compilation beforehand ----


def compilation(report: Report, device: str, cases: Sequence[Mapping[str, Any]]) -> None:
    """The compiled candidates of later stages, all at once on as many cores: they find the code in torch's caches.

    Each compiles in a process of its own; a row for each says how long it took.
    """
    jobs = [(case, name) for case in cases for name in COMPILED]
    threads = max(1, (os.cpu_count() or 1) // len(jobs))
    running: dict[int, tuple[subprocess.Popen[str], float]] = {}
    for i, (case, name) in enumerate(jobs):
        job = {"case": case, "name": name, "device": device, "parent": os.getpid()}
        process = subprocess.Popen(
            [sys.executable, "-m", "volo.bench.gpu_stages", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
        )
        running[i] = process, time.perf_counter()
        report.add_row({"case": Case(**case).name, "candidate": name})
    said: dict[int, str] = {}

    def read(i: int) -> None:  # a full pipe would stop the process
        said[i] = running[i][0].communicate()[0]

    readers = {i: threading.Thread(target=read, args=(i,), daemon=True) for i in running}
    for reader in readers.values():
        reader.start()
    while readers:
        for i in [i for i, reader in readers.items() if not reader.is_alive()]:
            del readers[i]
            process, began = running[i]
            report.rows[i] |= {"seconds": time.perf_counter() - began, "exit_code": process.returncode}
            if process.returncode:
                report.rows[i]["said"] = said[i][-1500:]
            report.save()
        report.say(f"{len(running) - len(readers)} of {len(running)} compiled")
        time.sleep(0.5)
    failed = [row for row in report.rows if row["exit_code"]]
    report.add(status=f"failed: {len(failed)} of {len(jobs)}" if failed else "completed")


def compile_one(case: Case, name: str, device: torch.device) -> None:
    candidates(Models(case, device))[name]().run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- rates of the device ----


def rates(report: Report, device: str, rounds: int) -> None:
    """Copy bandwidth (bytes read plus written) and matrix rates, over random numbers, and what an empty launch takes."""
    where = _open(device)
    report.add(**setting(where))
    report.say("copy bandwidth")
    report.add_row({"what": "copy, TB/s", "figure": copy_bandwidth(where, rounds) / 1e12})
    for dtype in DTYPES:
        report.say(f"matrix rate, {_name(dtype)}")
        report.add_row(
            {"what": f"{_name(dtype)} products, TFLOP/s", "figure": matrix_rate(where, dtype, rounds) / 1e12}
        )
    small = torch.zeros(1, device=where)
    launches = captured(lambda: [small.add_(1) for _ in range(100)], where)
    eager = alternate(
        {"eager": lambda: [small.add_(1) for _ in range(100)], "graph": launches}, rounds=rounds, device=where
    )
    for name, timing in eager.items():
        report.add_row({"what": f"a launch, {name}, microseconds", "figure": 1e4 * timing.median})


# ---- operator and layer ----


def kernels(report: Report, device: str, batch_size: int, rounds: int) -> None:
    """Operator and layer: a row for every candidate, ours first. Without a GPU: what the compiler makes of the kernels."""
    from volo.bench import kernels

    where = _open(device)
    report.add(**setting(where))
    if where.type != "cuda":
        report.say("compiling for sm_90")
        compiled = kernels.compile_report((DTYPE,), (90,))
        report.rows.extend(compiled["rows"])
        report.add(operator={key: value for key, value in compiled.items() if key != "rows"})
    parts: dict[str, list[dict[str, Any]]] = {}

    def keep(part: str, result: dict[str, Any]) -> None:
        parts[part] = [{"part": part, **row} for row in result["rows"]]
        report.content["rows"] = [row for rows in parts.values() for row in rows]
        report.add(**{part: {key: value for key, value in result.items() if key != "rows"}})

    if where.type == "cuda":
        options: dict[str, Any] = {"dtype": DTYPE, "rounds": rounds, "device": device}
        report.say("operator")
        try:
            keep("operator", kernels.bench_kernels(batch_size, compiled=False, **options))
        except Exception as error:  # noqa: BLE001  (what fails on packed logits leaves those on rows)
            report.say(traceback.format_exc())
            report.add(failed=f"{type(error).__name__}: {error}"[:500])
            options["packed"] = False
            keep("operator", kernels.bench_kernels(batch_size, compiled=False, **options))
        report.say("layer")
        keep("layer", kernels.bench_layer(batch_size, **options))
        report.say("operator, the reference compiled as well")
        keep("operator", kernels.bench_kernels(batch_size, compiled=True, **options))


# ---- whole models ----


def models(report: Report, device: str, cases: Sequence[Mapping[str, Any]], rounds: int, names: Sequence[str]) -> None:
    """Inference or training steps of whole models: rows of `measure`. Where timm eager has too little memory for the batch
    the case is measured with half of it, and so on."""
    where = _open(device)
    for values in cases:
        case = Case(**values)
        if where.type == "cuda":
            case = _that_fits(report, case, where)
        measure(report, case, where, rounds, names)
    failed = [row["candidate"] for row in report.rows if "failed" in row]
    report.add(status=f"failed: {', '.join(failed)}" if len(failed) == len(report.rows) else "completed")


def _that_fits(report: Report, case: Case, device: torch.device) -> Case:
    while case.batch_size > 1:
        report.say(f"{case.name}: does a batch of {case.batch_size} fit?")
        try:
            candidates(Models(case, device))["timm eager"]().run()
            return case
        except torch.OutOfMemoryError:
            case = dataclasses.replace(case, batch_size=case.batch_size // 2)
        finally:
            torch.cuda.empty_cache()
    return case


def profile(report: Report, device: str, cases: Sequence[Mapping[str, Any]], most: int = 60) -> None:
    """Where the time of our compiled model goes, by kernel: the `most` largest of each case."""
    where = _open(device)
    report.add(**setting(where))
    for values in cases:
        case = Case(**values)
        report.say(case.name)
        found = kernels_of(candidates(Models(case, where))["volo compiled"]().run, where)
        report.rows.extend({"case": case.name, **row} for row in found[:most])
        total = sum(row["milliseconds"] for row in found)
        report.add(**{case.name: {"milliseconds": total, "kernels": len(found), "batch_size": case.batch_size}})


# ---- another runtime ----


def tensorrt(report: Report, device: str, case: Mapping[str, Any], rounds: int) -> None:
    """An engine of TensorRT from our ONNX file, in float16: its answers against ours, and its time against that of our
    compiled model."""
    where, its = _open(device), Case(**case)
    is_installed = importlib.util.find_spec("tensorrt") is not None
    if not is_installed and where.type == "cuda":
        report.add(status="TensorRT is not installed")
        return
    from volo.deploy.export import export

    with tempfile.TemporaryDirectory() as folder:
        report.say("writing ONNX")
        models = Models(its, where)
        file = Path(folder) / "model.onnx"
        exported = export(
            models.twins[0].eval(), file, img_size=its.img_size, batch_size=its.batch_size, dynamic=(), dtype="fp32"
        )
        report.add(onnx={"bytes": exported.values["bytes"]})
        if not is_installed:
            report.add(status="TensorRT is not installed")
            return
        report.say("building the engine")
        engine = _build_engine(file)
    images = models.images.contiguous()
    run, answer = _open_engine(engine, images)
    run()
    torch.cuda.synchronize(where)
    exact = models.answers
    report.add(error=float((answer[: len(exact)].float() - exact).abs().max() / exact.abs().max()))
    report.say("TensorRT and ours in turns")
    compiled = candidates(models)["volo compiled"]().run
    timings = alternate({"tensorrt float16": run, "volo compiled bfloat16": compiled}, rounds=rounds, device=where)
    for name, timing in timings.items():
        row = {"candidate": name, "milliseconds": 1000 * timing.median}
        report.add_row(row | {"images_per_second": its.batch_size / timing.median})


def _build_engine(file: Path) -> Any:
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ValueError(f"TensorRT does not take our ONNX file: {errors}")
    config = builder.create_builder_config()
    config.set_flag(tensorrt.BuilderFlag.FP16)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError("TensorRT built no engine; its reasons are in the log")
    return tensorrt.Runtime(logger).deserialize_cuda_engine(plan)


def _open_engine(engine: Any, images: Tensor) -> tuple[Any, Tensor]:
    """What runs the engine on `images`, and the tensor that its answer goes to."""
    source, target = (engine.get_tensor_name(i) for i in range(2))
    answer = torch.empty(tuple(engine.get_tensor_shape(target)), device=images.device)
    context = engine.create_execution_context()
    context.set_tensor_address(source, images.data_ptr())
    context.set_tensor_address(target, answer.data_ptr())
    return lambda: context.execute_async_v3(torch.cuda.current_stream(images.device).cuda_stream), answer


# ---- pretraining ----

SAVING = 10.0
"""Seconds before the end of its box at which a training is asked to end, with a checkpoint."""


def pretraining(
    report: Report,
    device: str,
    recipes: Sequence[str],
    pictures: str,
    maps: str,
    folder: str,
    overrides: Mapping[str, Any],
    saving: float = SAVING,
) -> None:
    """Train by `recipes`, one after the other, each in `folder`/NAME, with all pictures on the device, until the time is
    over; what is there already goes on as if it had not been interrupted. A row for every evaluation.

    pictures: npz folder; empty: a few are made, for a rehearsal. maps: label maps for token labeling; empty: none.
    """
    from volo.config import load_recipe
    from volo.training.loop import train
    from volo.training.workloads.on_device import on_device

    timer = threading.Timer(report.seconds_left - saving, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    with tempfile.TemporaryDirectory() as made:
        chosen: dict[str, Any] = {"data.path": pictures or str(make_pictures(Path(made))), "train.device": device}
        if maps:
            chosen |= {"token_label.source": "maps", "token_label.maps": maps}
        try:
            signal.signal(signal.SIGTERM, _time_is_over)
            timer.start()
            for name in recipes:
                recipe = load_recipe(name, {**chosen, **overrides})
                if maps:
                    recipe = dataclasses.replace(recipe, task="token_label")
                out = Path(folder) / Path(name).stem
                result = train(
                    recipe, out, resume=True, workload=on_device, reporter=PretrainingReporter(report, out.name)
                )
                row = {"recipe": out.name, "status": result.status, "step": result.step, "of": result.total_steps}
                best = {key: result.best[key] for key in ("top1", "top5") if key in result.best}
                report.add_row(row | {"images_per_second": result.images_per_second} | best)
                if result.status == "interrupted":
                    report.add(status=f"time is over in {out.name}; it goes on with --resume")
                    return
        except _TimeIsOver:
            report.add(status="time is over; it goes on with --resume")
        finally:
            timer.cancel()


class _TimeIsOver(BaseException):
    """Between two trainings, or before the first step of one; a training itself ends with a checkpoint."""


def _time_is_over(number: int, frame: FrameType | None) -> None:
    raise _TimeIsOver


def make_pictures(folder: Path, count: int = 24, side: int = 64, num_classes: int = 3) -> Path:
    """Pictures of a colour each, as WebP in npz files, a folder as `data.path` takes it."""
    import io

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, number in (("data_batch_1", count), ("test_batch", count // 3)):
        labels = np.arange(number) % num_classes
        encoded = []
        for label in labels:
            pixels = rng.integers(0, 120, (side, side, 3))
            pixels[:, :, label] += 120
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "WEBP")
            encoded.append(file.getvalue())
        offsets = np.cumsum([0, *map(len, encoded)])
        jpeg = np.frombuffer(b"".join(encoded), np.uint8)
        np.savez(folder / f"{name}.npz", jpeg=jpeg, offsets=offsets, labels=labels)
    return folder


class PretrainingReporter(NullReporter):
    """Tells the report of a stage how a training goes."""

    def __init__(self, report: Report, name: str) -> None:
        self.report, self.name, self.said, self.total = report, name, 0.0, 0

    def on_progress(self, what: str, done: int, total: int) -> None:
        self._say(f"{what}, {done:,} of {total:,}")

    def on_start(self, run: RunInfo) -> None:
        self.total = run.total_steps
        self.report.say(
            f"{self.name}: {run.num_train:,} pictures, {run.total_steps:,} steps from {run.start_step:,} on"
        )

    def on_step(self, report: StepReport) -> None:
        speed = f"{report.images_per_second:,.0f} images/s"
        self._say(f"step {report.step:,} of {self.total:,}, loss {report.loss:.3f}, {speed}")

    def on_eval(self, metrics: dict[str, Any], is_best: bool) -> None:
        kept: dict[str, Any] = {
            key: metrics[key] for key in ("step", "epoch", "top1", "top5", "loss") if key in metrics
        }
        self.report.add_row({"recipe": self.name, **kept})

    def _say(self, text: str) -> None:
        if time.monotonic() - self.said > 1:
            self.said = time.monotonic()
            self.report.say(f"{self.name}: {text}")


def _main(job: dict[str, Any]) -> None:
    die_with(job["parent"])
    compile_one(Case(**job["case"]), job["name"], _open(job["device"]))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
