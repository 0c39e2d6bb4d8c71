"""Whole models on a GPU in bfloat16: ours and timm's, eager, compiled and as CUDA graphs, one after the other and in turns."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from volo.bench.stages import Report
from volo.bench.timing import Timing, alternate, captured, matrix_rate, peak_memory, setting, speedup
from volo.layers import OutlookAttention
from volo.models.factory import create_model
from volo.models.fuse import use_training_kernels
from volo.models.volo import VOLO

DTYPE = torch.bfloat16
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A model at a size, and what is done with it."""

    model: str
    img_size: int
    batch_size: int
    work: Literal["inference", "training"]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `volo.create_model`: for a rehearsal, a model with less in it."""
    backend: str = "inductor"
    """Of torch.compile."""

    @property
    def name(self) -> str:
        return f"{self.model} at {self.img_size}, {self.work}"


@dataclass(frozen=True)
class Candidate:
    run: Run
    kept: int = 0
    """Bytes that it holds between its runs."""
    has_own_memory: bool = True
    """What it allocates can be told from what others have allocated."""


class Models:
    """What the candidates of a case are made of; each part is made when it is first asked for."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.steps: dict[tuple[bool, bool, bool, bool], Candidate] = {}
        """Of a training: (ours, compiled, is_tuned, packs)."""

    @functools.cached_property
    def twins(self) -> tuple[VOLO, nn.Module]:
        """Our model and timm's with the same random weights, on the CPU in float32."""
        torch.manual_seed(0)
        ours = create_model(self.case.model, img_size=self.case.img_size, **self.case.options)
        theirs = timm_model(self.case)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    @functools.cached_property
    def images(self) -> Tensor:
        """float32 [batch, 3, side, side]"""
        side, generator = self.case.img_size, torch.Generator().manual_seed(1)
        return torch.randn(self.case.batch_size, 3, side, side, generator=generator).to(self.device)

    @functools.cached_property
    def fused(self) -> VOLO:
        return copy.deepcopy(self.twins[0]).to(self.device, DTYPE).eval().fuse_for_inference()

    @functools.cached_property
    def peer(self) -> nn.Module:
        return copy.deepcopy(self.twins[1]).to(self.device, DTYPE).eval()

    @functools.cached_property
    def answers(self) -> Tensor:
        """What timm's model says in float32 of the first images."""
        with torch.inference_mode():
            return copy.deepcopy(self.twins[1]).to(self.device).eval()(self.images[:2])

    def compiled(self, model: nn.Module, is_tuned: bool = False) -> Callable[..., Any]:
        mode = "max-autotune" if is_tuned and self.case.backend == "inductor" else None  # others have no modes
        return torch.compile(model, backend=self.case.backend, mode=mode)


def timm_model(case: Case) -> nn.Module:
    """timm's model of a case, with random weights. Raises ModuleNotFoundError and ValueError."""
    try:
        import timm
        from timm.models import volo as timm_volo
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the peer of this benchmark is timm's VOLO: pip install timm") from error
    if not case.options:
        if not timm.is_model(f"{case.model}_224"):
            raise ValueError(f"timm, the peer of this benchmark, has no {case.model}; choose volo_d1 to volo_d5")
        return timm.create_model(f"{case.model}_224", img_size=case.img_size)
    depths, (first, second) = case.options["depths"], case.options["embed_dims"]
    heads, rest = case.options["num_heads"], len(case.options["depths"]) - 1
    return timm_volo.VOLO(
        layers=tuple(depths),
        img_size=case.img_size,
        stem_hidden_dim=case.options["stem_dim"],
        embed_dims=(first, *[second] * rest),
        num_heads=(heads[0], *[heads[1]] * rest),
        downsamples=(True, *[False] * rest),
        outlook_attention=(True, *[False] * rest),
    )


WAYS: dict[str, dict[str, bool]] = {
    "volo": {"ours": True},
    "timm eager": {"ours": False},
    "volo compiled": {"ours": True, "compiled": True},
    "timm compiled": {"ours": False, "compiled": True},
    "volo packed compiled": {"ours": True, "compiled": True, "packs": True},
    "volo graph": {"ours": True, "graph": True},
    "volo compiled graph": {"ours": True, "compiled": True, "graph": True},
    "timm compiled graph": {"ours": False, "compiled": True, "graph": True},
    "volo max-autotune": {"ours": True, "compiled": True, "is_tuned": True},
    "timm max-autotune": {"ours": False, "compiled": True, "is_tuned": True},
    "volo packed": {"ours": True, "packs": True},
}
"""What can be measured of a case, in the order of its worth."""
COMPILED = ("volo compiled", "timm compiled", "volo packed compiled")
"""Those that torch.compile has to be done for first."""


def candidates(models: Models) -> dict[str, Callable[[], Candidate]]:
    """Functions that make the candidates of a case, by `WAYS`; a training step goes into a graph compiled, or not at all."""
    is_training = models.case.work == "training"
    make = _step if is_training else _inference
    return {
        name: functools.partial(make, models, **how)
        for name, how in WAYS.items()
        if not (is_training and name == "volo graph")
    }


def _inference(
    models: Models, ours: bool, compiled: bool = False, graph: bool = False, is_tuned: bool = False, packs: bool = False
) -> Candidate:
    module, images = models.fused if ours else models.peer, models.images.to(DTYPE)
    if packs:
        module = on_packed(copy.deepcopy(module))
    if ours:
        images = images.contiguous(memory_format=torch.channels_last)
    model = models.compiled(module, is_tuned) if compiled else module

    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return Candidate(captured(run, models.device), has_own_memory=False) if graph else Candidate(run)


def _step(
    models: Models, ours: bool, compiled: bool = False, graph: bool = False, is_tuned: bool = False, packs: bool = False
) -> Candidate:
    if graph:  # of the step that is compiled already
        its = _step(models, ours, compiled, is_tuned=is_tuned, packs=packs)
        return Candidate(captured(its.run, models.device), its.kept, has_own_memory=False)
    key = ours, compiled, is_tuned, packs
    if key not in models.steps:
        models.steps[key] = _make_step(models, *key)
    return models.steps[key]


def _make_step(models: Models, ours: bool, compiled: bool, is_tuned: bool, packs: bool) -> Candidate:
    model: nn.Module = copy.deepcopy(models.twins[not ours])
    if packs:
        on_packed(model)
    images, layout = models.images, torch.contiguous_format
    if ours:
        layout = torch.channels_last
        if models.device.type == "cpu":
            use_training_kernels(model)
    model = model.to(models.device).to(memory_format=layout)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    target = torch.arange(len(images), device=models.device) % 1000
    forward = models.compiled(model, is_tuned) if compiled else model
    # Parameters and two moments of AdamW; gradients come and go within the step.
    kept = 3 * sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    return Candidate(training_step(model, forward, images, target), kept)


def on_packed(model: nn.Module) -> nn.Module:
    """`model`, whose outlook attention from now on computes with packed logits."""
    for module in model.modules():
        if isinstance(module, OutlookAttention):
            module.packs = True
    return model


def training_step(model: nn.Module, forward: Callable[..., Any], images: Tensor, target: Tensor) -> Run:
    """Forward under autocast, cross-entropy, backward, AdamW."""
    model.train()
    is_gpu = images.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=is_gpu)

    def run() -> None:
        # Casts that are kept from one part of a step to another do not go into a graph.
        with torch.autocast(images.device.type, DTYPE, cache_enabled=False):
            loss = nn.functional.cross_entropy(forward(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure(report: Report, case: Case, device: torch.device, rounds: int, names: Sequence[str]) -> None:
    """The candidates of `case` of these names, each alone as soon as it is made, then all of them in turns; a row each.

    A row: images per second (median, quartiles), milliseconds, seconds until the first answer (compilation), peak memory,
    largest error relative to timm's model in float32 (inference), share of the matrix rate, times timm eager and timm
    compiled. A candidate that fails, or for which there is too little memory, has an `error` in place of figures.
    """
    models = Models(case, device)
    rate, flops = matrix_rate(device, DTYPE), flops_of(case)
    rows: list[dict[str, Any]] = []
    made: dict[str, Candidate] = {}
    timings: dict[str, Timing] = {}

    def show() -> None:
        for row in rows:
            if row["candidate"] in timings:
                row |= figures(case, row["candidate"], timings, flops, rate)
        report.save()

    report.add(
        **setting(device),
        **{case.name: {"gigaflops_per_image": flops / 1e9, "batch_size": case.batch_size, "rounds": rounds}},
        matrix_teraflops=rate / 1e12,
    )
    for name, make in candidates(models).items():
        if name not in names:
            continue
        report.say(f"{case.name}: {name}")
        row: dict[str, Any] = {"case": case.name, "batch_size": case.batch_size, "candidate": name}
        rows.append(row)
        report.add_row(row)
        try:
            began = time.perf_counter()
            candidate = make()
            output = candidate.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            row["first_seconds"] = time.perf_counter() - began
            if isinstance(output, Tensor):
                exact = models.answers
                row["error"] = float((output[: len(exact)].float() - exact).abs().max() / exact.abs().max())
            timings |= alternate({name: candidate.run}, rounds=min(3, rounds), device=device)
            made[name] = candidate
            if candidate.has_own_memory:
                row["peak_memory_gib"] = (peak_memory(candidate.run, device) + candidate.kept) / 2**30
        except Exception as error:  # noqa: BLE001  (whatever happens to one candidate, the others are measured)
            row["failed"] = f"{type(error).__name__}: {error}"[:500]
            timings.pop(name, None)
            made.pop(name, None)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        show()
    report.say(f"{case.name}: {len(made)} candidates in turns")
    timings |= alternate({name: candidate.run for name, candidate in made.items()}, rounds=rounds, device=device)
    theirs = next((row.get("peak_memory_gib") for row in rows if row["candidate"] == "timm eager"), None)
    for row in rows:
        if theirs and "peak_memory_gib" in row:
            row["memory_times_timm_eager"] = row["peak_memory_gib"] / theirs
    show()


def figures(case: Case, name: str, timings: Mapping[str, Timing], flops: int, rate: float) -> dict[str, Any]:
    timing = timings[name]
    fast, slow = timing.quartiles
    row: dict[str, Any] = {
        "images_per_second": case.batch_size / timing.median,
        "quartiles": [case.batch_size / slow, case.batch_size / fast],
        "milliseconds": 1000 * timing.median,
        # The backward pass has two products for each one of the forward pass.
        "of_matrix_rate": flops * (3 if case.work == "training" else 1) * case.batch_size / timing.median / rate,
    }
    for peer in ("timm eager", "timm compiled"):
        if peer in timings:
            row["times_" + peer.replace(" ", "_")] = speedup(timing, timings[peer])
    return row


def flops_of(case: Case) -> int:
    """Floating point operations of the matrix products and convolutions of one image's forward pass."""
    with torch.device("meta"):
        model = create_model(case.model, img_size=case.img_size, **case.options).eval()
        images = torch.empty(1, 3, case.img_size, case.img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


def kernels_of(run: Run, device: torch.device, runs: int = 3) -> list[dict[str, Any]]:
    """Time of a run by kernel (on a CPU by operator), most first, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = device.type == "cuda"
    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]) as record:
        for _ in range(runs):
            run()
        if is_gpu:
            torch.cuda.synchronize(device)
    rows = []
    for event in record.key_averages():
        # Regions that somebody has named hold kernels that are listed themselves.
        if is_gpu != (event.device_type.name == "CUDA") or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        if microseconds > 0:
            row = {"kernel": event.key, "calls": event.count / runs, "milliseconds": microseconds / 1000 / runs}
            rows.append(row)
    total = sum(row["milliseconds"] for row in rows)
    for row in rows:
        row["share"] = row["milliseconds"] / total
    return sorted(rows, key=lambda row: -row["milliseconds"])
