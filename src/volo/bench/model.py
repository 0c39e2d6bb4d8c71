"""Whole models, inference and training steps, against timm's VOLO with the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from volo.bench.timing import alternate, setting, speedup
from volo.models.volo import VOLO, create_model

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
    """Inference: ours (with the stem folded, channels-last) against timm eager, and timm compiled if asked for.

    Returns a dict with a row for every candidate: images per second (median, quartiles) and the speed-up over timm
    eager float32 and over timm in the same dtype.
    """
    where = torch.device(device)
    ours, theirs = _twins(name, img_size, where)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where)
    candidates: dict[str, Callable[[], object]] = {}
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
    difference = _largest_difference(ours, theirs, images)
    return _report("inference", name, batch_size, img_size, candidates, rounds, where) | {
        "largest_logit_difference": difference
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
    """A training step (forward, cross-entropy, backward, AdamW) of ours against timm's; peak memory on a GPU."""
    where = torch.device(device)
    ours, theirs = _twins(name, img_size, where)
    images = torch.randn(batch_size, 3, img_size, img_size, device=where)
    target = torch.arange(batch_size, device=where) % 1000
    ours = ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    candidates = {
        "volo": _step(ours, images.contiguous(memory_format=torch.channels_last), target, amp),
        "timm eager": _step(theirs, images, target, amp),
    }
    if compiled:
        candidates["timm compiled"] = _step(
            torch.compile(_copy_of(theirs, name, img_size).to(where)), images, target, amp
        )
        fresh = create_model(name, img_size=img_size).to(where)
        fresh.load_state_dict(ours.state_dict())
        candidates["volo compiled"] = _step(torch.compile(fresh), images, target, amp)
    report = _report("training step", name, batch_size, img_size, candidates, rounds, where)
    if where.type == "cuda":
        for row in report["rows"]:
            torch.cuda.reset_peak_memory_stats()
            candidates[row["candidate"]]()
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return report | {"amp": amp}


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


def _step(model: nn.Module | Callable[..., Any], images: Tensor, target: Tensor, amp: str) -> Callable[[], object]:
    assert isinstance(model, nn.Module)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        context = torch.autocast(images.device.type, DTYPES["bfloat16"]) if amp == "bf16" else contextlib.nullcontext()
        with context:
            loss = nn.functional.cross_entropy(model(images), target)
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
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    timings = alternate(candidates, rounds=rounds, device=device)
    eager = next(key for key in timings if key.startswith("timm eager"))
    rows = []
    for candidate, timing in timings.items():
        fast, slow = timing.quartiles
        same_dtype = f"timm eager {candidate.split()[-1]}"
        row = {
            "candidate": candidate,
            "images_per_second": batch_size / timing.median,
            "quartiles": [batch_size / slow, batch_size / fast],
            "times_timm_eager": speedup(timing, timings[eager]),
        }
        if same_dtype in timings and same_dtype != eager:
            row["times_timm_same_dtype"] = speedup(timing, timings[same_dtype])
        rows.append(row)
    return {
        "what": what,
        "model": name,
        "batch_size": batch_size,
        "img_size": img_size,
        "rounds": rounds,
        **setting(device),
        "rows": rows,
    }
