"""Everything that is claimed, or still to be shown, of a GPU, in a few minutes on one: `volo bench gpu`.

Stages in the order of their worth (`volo.bench.gpu_stages`), each in a process of its own (`volo.bench.stages`), and what came
out of them against what is asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from volo.bench.stages import Progress, Stage, run_stages
from volo.config import nearest
from volo.data.files import write_json

# What an H200 should reach in bfloat16 at batch 128: (what, at least or at most, how much).
GOALS = (
    ("operator forward, of the copy bandwidth", ">=", 0.60),
    ("operator backward, of the copy bandwidth", ">=", 0.45),
    ("layer forward, times that on rows of logits", ">=", 1.8),
    ("inference, times timm compiled", ">=", 1.6),
    ("training step, times timm compiled", ">=", 1.35),
    ("peak memory of training, times timm eager", "<=", 0.8),
)
PACKED_LAYERS = ("packed forward", "compiled packed forward")
"""Of `bench_layer`, whose candidates on rows of logits are what the layer was before."""
REHEARSAL = "rehearsal on a CPU: figures mean nothing"
NOT_MEASURED = "not measured"
RECIPES = ("pictures64_nano_gpu", "pictures64_tiny_gpu")
SUMMARY = "summary.json"
PRETRAINING = "pretraining"
OVERHEAD = 5.0
"""Seconds at the end for the last files."""

_TOY = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "stem_dim": 8}


def list_stages(
    device: str = "cuda",
    *,
    batch_size: int = 128,
    rounds: int = 15,
    pictures: str = "",
    maps: str = "",
    folder: Path = Path(),
    is_rehearsal: bool = False,
    backend: str = "",
) -> list[Stage]:
    """The stages in their order; in a rehearsal the same at toy size. `folder` is where trainings go; `backend` is that of
    torch.compile, "inductor" if empty, in a rehearsal "aot_eager", which takes no compiler and less time."""
    backend = backend or ("aot_eager" if is_rehearsal else "inductor")
    overrides: dict[str, Any] = {}
    if is_rehearsal:
        d1, d3 = _case("volo_d1", 32, 2, backend, _TOY), _case("volo_d3", 48, 2, backend, _TOY)
        shapes = [[1, 4, 4, 1, 16], [1, 5, 3, 2, 16]]
        overrides = {"schedule.epochs": 1, "schedule.warmup_epochs": 0.5, "train.batch_size": 12, "train.eval_every": 1}
        rounds = min(rounds, 2)
    else:
        d1, d3 = _case("volo_d1", 224, batch_size, backend), _case("volo_d3", 448, batch_size, backend)
        shapes = [[2, 12, 11, 3, 32], [4, 28, 28, 6, 32]]
    d1_step = {**d1, "work": "training"}
    d3_step = {**d3, "work": "training", "batch_size": max(1, d3["batch_size"] // 4)}
    # Triton decides when it is imported whether it interprets its kernels.
    interpreted = {"TRITON_INTERPRET": "1"} if is_rehearsal else {}
    eager, compiled = ["volo", "timm eager"], ["volo compiled", "timm compiled"]
    all_ways = [*eager, *compiled, "volo packed compiled", "volo graph", "volo compiled graph", "timm compiled graph"]
    all_ways.append("volo packed")
    large, profiled, to_compile = [d3, d3_step], [d1, d1_step], [d1, d1_step, d3]
    large_ways, tuned = eager + compiled, [*compiled, "volo max-autotune", "timm max-autotune"]
    if is_rehearsal:  # the same paths, each once
        large, profiled, to_compile = [d3], [d1], [d1]
        large_ways, tuned = eager, ["volo max-autotune"]
    timed: dict[str, Any] = {"device": device, "rounds": rounds}

    def stage(name: str, what: str, seconds: float, run: str = "", **of: Any) -> Stage:
        least, is_timed, environment = of.pop("least", 0.0), of.pop("is_timed", True), of.pop("environment", {})
        run = f"volo.bench.gpu_stages:{run or name}"
        seconds = 3600.0 if is_rehearsal else seconds  # CPUs are as fast as they are; only the whole time counts
        return Stage(name, what, run, seconds, least, is_timed, {"device": device, **of}, environment)

    return [
        stage("correctness", "errors of every engine and dtype", 100, shapes=shapes, is_timed=False, environment=interpreted),
        stage("memory", "the kernels under compute-sanitizer", 110, shape=shapes[0], is_timed=False, environment=interpreted),
        stage("compilation", "torch.compile, for the stages to come", 130, cases=to_compile, is_timed=False),
        stage("rates", "copy bandwidth and matrix rate", 30, **timed),
        stage("kernels", "operator and layer", 90, batch_size=batch_size, **timed),
        stage("inference", "inference of volo_d1", 90, "models", cases=[d1], names=all_ways, **timed),
        stage("training", "training step of volo_d1", 110, "models", cases=[d1_step], names=all_ways, **timed),
        stage("profile", "volo_d1 compiled, by kernel", 60, cases=profiled),
        stage("large", "volo_d3 at 448", 100, "models", cases=large, names=large_ways, **timed),
        stage("autotune", "volo_d1 by max-autotune", 110, "models", cases=[d1], names=tuned, **timed),
        stage("tensorrt", "volo_d1 in TensorRT", 90, case=d1, **timed),
        *(
            [
                stage(
                    PRETRAINING, "pretraining of small models", 3600, least=20 if is_rehearsal else 100,
                    recipes=list(RECIPES), pictures=pictures, maps=maps, folder=str(folder), overrides=overrides,
                    saving=3.0 if is_rehearsal else 10.0,
                )
            ]
            if pictures or is_rehearsal
            else []
        ),
    ]  # fmt: skip


def _case(model: str, img_size: int, batch_size: int, backend: str, options: Mapping[str, Any] = {}) -> dict[str, Any]:
    return {
        "model": model,
        "img_size": img_size,
        "batch_size": batch_size,
        "work": "inference",
        "options": dict(options),
        "backend": backend,
    }


def bench_gpu(
    out: str | Path,
    *,
    minutes: float = 9.0,
    stages: Sequence[str] = (),
    device: str = "cuda",
    rehearse: bool = False,
    resume: bool = False,
    pictures: str | None = None,
    maps: str | None = None,
    batch_size: int = 128,
    rounds: int = 15,
    backend: str = "",
    tell: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Run the stages within `minutes`, each into `out`/STAGE.json at once, and sum them up in `out`/summary.json.

    Args:
        stages: names of those to run; empty: all of them (pretraining only with `pictures`).
        device: a CUDA device, unless `rehearse`.
        rehearse: every stage at toy size on the CPU.
        resume: leave out stages that are complete in `out`, and go on with a pretraining that is there.
        pictures: folder of npz pictures for the pretraining (docs/data.md).
        maps: label maps of these, for token labeling.
        backend: of torch.compile; see `list_stages`.
        tell: hears how it goes.

    Returns:
        The summary: `rows` has a row for every goal (`asked`, `measured`, `met`) and for every error of the operator,
        `stages` one for each stage (`status`, `seconds`, `file`). Figures of a rehearsal are never taken for measured ones.

    Raises:
        ValueError: an unknown stage, a time that is none, no CUDA device; `out` holds files of somebody else, or a
            pretraining and `resume` is not set.
        OSError: `out` cannot be written to.
    """
    began, out = time.monotonic(), Path(out)
    if not 0 < minutes < 1440:
        raise ValueError(f"minutes is a time above 0 and below a day; given: {minutes:g}")
    if not rehearse:
        _require_gpu(device)
    for what, path in (("pictures", pictures), ("maps", maps)):
        if path and not Path(path).exists():
            raise ValueError(f"{what}: there is no {path}")
    if maps and not pictures:
        raise ValueError("label maps belong to pictures: name their folder too (--pictures)")
    known = list_stages(
        "cpu" if rehearse else device,
        batch_size=batch_size,
        rounds=rounds,
        pictures=str(Path(pictures).resolve()) if pictures else "",
        maps=str(Path(maps).resolve()) if maps else "",
        folder=out.resolve() / PRETRAINING,
        is_rehearsal=rehearse,
        backend=backend,
    )
    chosen = choose(known, stages)
    _look_into(out, known, chosen, resume)
    left = [stage for stage in chosen if not (resume and _is_complete(out, stage.name, rehearse))]
    head = {"rehearsal": REHEARSAL} if rehearse else {}
    run_stages(left, out, seconds=60 * minutes - OVERHEAD - (time.monotonic() - began), head=head, tell=tell)
    results = read_results(out, [stage.name for stage in known])
    summary = {
        "what": "GPU",
        "status": REHEARSAL if rehearse else "measured",
        "date": time.strftime("%Y-%m-%d"),
        "minutes": minutes,
        "seconds": round(time.monotonic() - began, 1),
        **head,
        **_machine(results),
        "rows": goal_rows(results),
        "stages": [
            {"stage": name, "status": its["status"], "seconds": its.get("seconds", 0.0), "file": f"{name}.json"}
            for name, its in results.items()
        ],
    }
    write_json(out / SUMMARY, summary)
    return summary


def choose(known: Sequence[Stage], names: Iterable[str]) -> list[Stage]:
    """The stages of these names, in the order in which they are run. Raises ValueError."""
    by_name = {stage.name: stage for stage in known}
    names = list(names)
    for name in names:
        if name == PRETRAINING and name not in by_name:
            raise ValueError("pretraining needs pictures: name their folder (--pictures FOLDER)")
        if name not in by_name:
            raise ValueError(f"no stage {name!r}{nearest(name, by_name)} (stages: {', '.join(by_name)})")
    return [stage for stage in known if not names or stage.name in names]


def has_failed(summary: Mapping[str, Any]) -> list[str]:
    """Stages that did not do what they are for."""
    return [
        s["stage"]
        for s in summary["stages"]
        if (s["status"].startswith(("failed", "ended", "does not end")) or s["status"].endswith("wrong"))
    ]


def _require_gpu(device: str) -> None:
    import torch

    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"this measures CUDA devices, and torch sees {torch.cuda.device_count()} of them here; given: device {device!r}. "
            "With --rehearse every stage runs at toy size on the CPU"
        )


def _look_into(out: Path, known: Sequence[Stage], chosen: Sequence[Stage], resume: bool) -> None:
    """Raises ValueError where files would be replaced that `bench_gpu` has not written, or a pretraining would be lost."""
    names = [f"{stage.name}.json" for stage in known] + [SUMMARY]
    for file in (out / name for name in names):
        if file.is_file() and not file.read_bytes().startswith(b'{\n "what": "GPU'):
            raise ValueError(f"{file} is not a result of this command: choose another folder, or move the file away")
    trains = any(stage.name == PRETRAINING for stage in chosen)
    if trains and not resume and any((out / PRETRAINING).glob("*/recipe.toml")):
        raise ValueError(
            f"{out / PRETRAINING} holds a pretraining: go on with it (--resume), choose another folder, or leave that stage out "
            "(--stages)"
        )


def _is_complete(out: Path, name: str, is_rehearsal: bool) -> bool:
    its = read_results(out, [name]).get(name, {})
    return its.get("status") == "completed" and bool(its.get("rehearsal")) == is_rehearsal and name != PRETRAINING


def read_results(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What lies in `out` of the stages of these names."""
    files = {name: out / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def _machine(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Device and versions, as the first stage that knows them says."""
    keys = ("device", "volo", "timm", "torch", "python")
    its = next((result for result in results.values() if "device" in result), {})
    return {key: its[key] for key in keys if key in its}


# ---- what is asked ----


def goal_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every goal and every error, from the results of the stages: `measured` is "not measured" where nothing was,
    or only rehearsed. Ours is the best of our candidates."""
    measured = {name: its for name, its in results.items() if not its.get("rehearsal")}
    figures = (
        _best_kernel(measured, "forward"),
        _best_kernel(measured, "backward"),
        _best(measured, "kernels", "times_rows", lambda row: row["candidate"] in PACKED_LAYERS),
        _best_model(measured, ("inference", "autotune"), "times_timm_compiled"),
        _best_model(measured, ("training",), "times_timm_compiled"),
        _best_model(measured, ("training",), "memory_times_timm_eager", min),
    )
    rows = [
        {"goal": goal, "asked": f"{sign} {bound:g}", **_judged(figure, sign, bound)}
        for (goal, sign, bound), figure in zip(GOALS, figures)
    ]
    return rows + [
        {
            "goal": f"error of {row['tensor']}, {row['engine']}, {row['dtype']}",
            "asked": f"<= {row['allowed']:.3g}",
            "measured": row["error"],
            "met": row["met"],
        }
        for row in measured.get("correctness", {}).get("rows", ())
        if "error" in row
    ]


def _judged(figure: float | None, sign: str, bound: float) -> dict[str, Any]:
    if figure is None:
        return {"measured": NOT_MEASURED, "met": NOT_MEASURED}
    return {"measured": figure, "met": "yes" if (figure >= bound if sign == ">=" else figure <= bound) else "no"}


def _best(
    results: Mapping[str, Mapping[str, Any]],
    stage: str,
    key: str,
    is_ours: Callable[[Mapping[str, Any]], bool],
    choose: Callable[..., float] = max,
) -> float | None:
    rows = results.get(stage, {}).get("rows", ())
    return choose((row[key] for row in rows if row.get(key) is not None and is_ours(row)), default=None)


def _best_kernel(results: Mapping[str, Mapping[str, Any]], direction: str) -> float | None:
    """Rows are "ENGINE forward", "ENGINE backward", "ENGINE forward + backward"; eager and compiled are the reference's."""

    def is_ours(row: Mapping[str, Any]) -> bool:
        engine, _, work = row["candidate"].partition(" ")
        return engine not in ("eager", "compiled") and work == direction and row.get("part", "operator") == "operator"

    return _best(results, "kernels", "copy_fraction", is_ours)


def _best_model(
    results: Mapping[str, Mapping[str, Any]], stages: Iterable[str], key: str, choose: Callable[..., float] = max
) -> float | None:
    found = [_best(results, stage, key, lambda row: row["candidate"].startswith("volo"), choose) for stage in stages]
    return choose((figure for figure in found if figure is not None), default=None)
