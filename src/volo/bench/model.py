"""Whole models, inference and training steps, against timm's VOLO with the same weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from volo.bench.timing import alternate, copy_bandwidth, matrix_rate, peak_memory, setting, speedup
from volo.config import height_width
from volo.inference.exported import ExportedModel
from volo.inference.model_source import load
from volo.models.factory import create_model
from volo.models.fuse import use_training_kernels
from volo.models.volo import VOLO

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bench_model(
    name: str = "volo_d1",
    *,
    batch_size: int = 8,
    img_size: int = 224,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    compiled: bool = False,
    rounds: int = 7,
    device: str = "cpu",
) -> dict[str, Any]:
    """Inference: ours (after `fuse_for_inference`) against timm eager, and both compiled if asked for.

    Returns a dict with a row for every candidate: images per second (median, quartiles), the speed-up over timm eager
    (float32 if that is measured), over timm in the same dtype, and over timm compiled in the same dtype, the fraction of
    the measured matrix rate that the model's products make, the fraction of the copy bandwidth that reading weights and
    images once makes (of use at batch 1 and on GPUs; otherwise the products are the limit), and the memory that a call
    takes at its peak.

    Where `name` is a path (a run folder, a checkpoint, an exported file), that model is measured alone, at its own size.
    """
    where = torch.device(device)
    if Path(name).exists() or Path(name).suffix:
        return _bench_path(name, batch_size, dtypes, rounds, where)
    ours, theirs = _twins(name, img_size, where)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where)
    candidates: dict[str, Callable[[], object]] = {}
    least: dict[str, int] = {}
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        fast = create_model(name, img_size=img_size)
        fast.load_state_dict(ours.state_dict())
        fast = fast.to(where, dtype).eval().fuse_for_inference()
        peer = _copy_of(theirs, name, img_size).to(where, dtype).eval()
        x = images.to(dtype)
        candidates[f"volo {dtype_name}"] = _inference(fast, x.contiguous(memory_format=torch.channels_last))
        candidates[f"timm eager {dtype_name}"] = _inference(peer, x)
        if compiled:
            candidates[f"volo compiled {dtype_name}"] = _inference(
                torch.compile(fast), x.contiguous(memory_format=torch.channels_last)
            )
            candidates[f"timm compiled {dtype_name}"] = _inference(torch.compile(peer), x)
        weights = sum(p.nbytes for p in peer.parameters())
        least |= {candidate: weights + x.nbytes for candidate in candidates if candidate.endswith(dtype_name)}
    difference = _largest_difference(ours, theirs, images)
    flops = _flops(name, img_size)
    report = _report("inference", name, batch_size, img_size, candidates, rounds, where, flops, least=least)
    return report | {"largest_logit_difference": difference}


def _bench_path(name: str, batch_size: int, dtypes: Sequence[str], rounds: int, device: torch.device) -> dict[str, Any]:
    """What `volo predict` runs for this path, and for checkpoints the other `dtypes`."""
    loaded = load(name, device=device)
    model, size = loaded.model, height_width(loaded.preprocessing.img_size)
    images = torch.randn(batch_size, 3, *size, device=device)
    candidates: dict[str, Callable[[], object]] = {}
    if isinstance(model, ExportedModel):
        if device.type != "cpu":
            raise ValueError(f"exported files run on the CPU here; given: {device}")
        x = torch.randint(256, (batch_size, *size, 3), dtype=torch.uint8) if model.takes_pixels else images
        candidates[f"file {model.description['dtype']}"] = _inference(model, x)
    else:
        for dtype_name in dtypes:
            fast = copy.deepcopy(model).to(DTYPES[dtype_name])
            for part in fast.modules():
                if isinstance(part, VOLO):
                    part.fuse_for_inference()
            x = images.to(DTYPES[dtype_name]).contiguous(memory_format=torch.channels_last)
            candidates[f"volo {dtype_name}"] = _inference(fast, x)
    rows = []
    for candidate, timing in alternate(candidates, rounds=rounds, device=device).items():
        fast_one, slow_one = timing.quartiles
        rows.append(
            {
                "candidate": candidate,
                "images_per_second": batch_size / timing.median,
                "quartiles": [batch_size / slow_one, batch_size / fast_one],
                "milliseconds": 1000 * timing.median,
            }
        )
    return {
        "what": "inference",
        "model": Path(name).name,
        "batch_size": batch_size,
        "img_size": list(size),
        "rounds": rounds,
        **setting(device),
        "rows": rows,
    }


def bench_train(
    name: str = "volo_d1",
    *,
    batch_size: int = 8,
    img_size: int = 224,
    amp: str = "off",
    compiled: bool = False,
    rounds: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """A training step (forward, cross-entropy, backward, AdamW) of ours against timm's, both compiled too if asked for.

    Rows as those of `bench_model`, without a fraction of the copy bandwidth: what a step must move depends on what is kept
    from the forward pass. `peak_memory_gib`: parameters, their AdamW moments, and whatever else the step holds at its peak.
    """
    where = torch.device(device)
    ours, theirs = _twins(name, img_size, where)
    if where.type == "cpu":
        use_training_kernels(ours)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where)
    target = torch.arange(batch_size, device=where) % 1000
    ours = ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dense = images.contiguous(memory_format=torch.channels_last)
    models: dict[str, tuple[nn.Module, bool, Tensor]] = {
        "volo": (ours, False, dense),
        "timm eager": (theirs, False, images),
    }
    if compiled:
        models["timm compiled"] = _copy_of(theirs, name, img_size).to(where), True, images
        fresh = create_model(name, img_size=img_size)
        fresh.load_state_dict(ours.state_dict())
        models["volo compiled"] = fresh.to(where, memory_format=torch.channels_last), True, dense  # type: ignore[call-overload]
    candidates = {
        candidate: _step(model, torch.compile(model) if is_compiled else model, x, target, amp)
        for candidate, (model, is_compiled, x) in models.items()
    }
    kept = {
        # Parameters and two moments of AdamW; gradients come and go within the step.
        candidate: 3 * sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
        for candidate, (model, *_) in models.items()
    }
    flops = 3 * _flops(name, img_size)  # the backward pass has two products for each one of the forward pass
    dtype = "bfloat16" if amp == "bf16" else "float32"
    report = _report("training step", name, batch_size, img_size, candidates, rounds, where, flops, dtype, kept)
    return report | {"amp": amp}


def _flops(name: str, img_size: int) -> int:
    """Floating point operations of the matrix products and convolutions of one image's forward pass."""
    with torch.device("meta"):
        model = create_model(name, img_size=img_size).eval()
        images = torch.empty(1, 3, img_size, img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


def _twins(name: str, img_size: int, device: torch.device) -> tuple[VOLO, nn.Module]:
    """Our model and timm's with the same random weights."""
    torch.manual_seed(0)
    ours = create_model(name, img_size=img_size)
    theirs = _timm_model(name, img_size)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device), theirs.to(device)


def _timm_model(name: str, img_size: int) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the peer of this benchmark is timm's VOLO: pip install timm") from error
    if not timm.is_model(f"{name}_224"):
        raise ValueError(f"timm, the peer of this benchmark, has no {name}; choose volo_d1 to volo_d5")
    return timm.create_model(f"{name}_224", img_size=img_size)


def _copy_of(model: nn.Module, name: str, img_size: int) -> nn.Module:
    copy = _timm_model(name, img_size)
    copy.load_state_dict(model.state_dict())
    return copy


def _inference(model: nn.Module | Callable[..., Any], images: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def _step(
    model: nn.Module, forward: Callable[..., Any], images: Tensor, target: Tensor, amp: str
) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        context = torch.autocast(images.device.type, DTYPES["bfloat16"]) if amp == "bf16" else contextlib.nullcontext()
        with context:
            loss = nn.functional.cross_entropy(forward(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


@torch.inference_mode()
def _largest_difference(ours: nn.Module, theirs: nn.Module, images: Tensor) -> float:
    return float((ours.eval()(images[:1]) - theirs.eval()(images[:1])).abs().max())


def _report(
    what: str,
    name: str,
    batch_size: int,
    img_size: int,
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    flops: int,
    dtype: str = "",
    kept: Mapping[str, int] | None = None,
    least: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Time `candidates`. Where `dtype` is empty, the last word of a candidate's name is its dtype. `kept`: bytes that a
    candidate holds between its runs; `least`: the fewest that a run must move.
    """
    timings = alternate(candidates, rounds=rounds, device=device)
    eager = next(key for key in timings if key.startswith("timm eager"))
    dtypes = {candidate: dtype or candidate.split()[-1] for candidate in candidates}
    rates = {used: matrix_rate(device, DTYPES[used]) for used in dict.fromkeys(dtypes.values())}
    bandwidth = copy_bandwidth(device)
    rows = []
    for candidate, timing in timings.items():
        fast, slow = timing.quartiles
        row: dict[str, Any] = {
            "candidate": candidate,
            "images_per_second": batch_size / timing.median,
            "quartiles": [batch_size / slow, batch_size / fast],
            "times_timm_eager": speedup(timing, timings[eager]),
        }
        peers = {
            "times_timm_same_dtype": f"timm eager {dtypes[candidate]}",
            "times_timm_compiled": f"timm compiled {dtypes[candidate]}",
        }
        if dtype:
            peers = {"times_timm_compiled": "timm compiled"}
        for key, peer in peers.items():
            if peer in timings and peer != eager:
                row[key] = speedup(timing, timings[peer])
        row["of_matrix_rate"] = flops * batch_size / timing.median / rates[dtypes[candidate]]
        if least is not None:
            row["of_copy_bandwidth"] = least[candidate] / timing.median / bandwidth
        peak = peak_memory(candidates[candidate], device) + (kept[candidate] if kept is not None else 0)
        row["peak_memory_gib"] = peak / 2**30
        rows.append(row)
    theirs = next(row["peak_memory_gib"] for row in rows if row["candidate"] == eager)
    for row in rows:
        row["memory_times_timm_eager"] = row["peak_memory_gib"] / theirs
    return {
        "what": what,
        "model": name,
        "batch_size": batch_size,
        "img_size": img_size,
        "rounds": rounds,
        **setting(device),
        "gigaflops_per_image": flops / 1e9,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "matrix_gigaflops": {used: rate / 1e9 for used, rate in rates.items()},
        "rows": rows,
    }
