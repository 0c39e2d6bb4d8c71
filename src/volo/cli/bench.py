"""`volo bench`: measurements that a user can repeat, one sub-command each."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from volo.cli.console import Bar, duration, note, print_row, results
from volo.cli.options import open_device, parse_as
from volo.cli.outputs import begins_with, claim
from volo.config import nearest

if TYPE_CHECKING:
    from volo.bench.stages import Progress


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What all of them take. Candidates run in turns in one process; medians and quartiles are reported."""

    rounds: int
    """Turns of every candidate."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Write the result there as well."""
    overwrite: bool = False
    """Replace a file at --out that is no earlier result."""


@dataclass(frozen=True, kw_only=True)
class OnDevice(Measurement):
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""


@dataclass(frozen=True, kw_only=True)
class OfModel(OnDevice):
    model: str = "volo_d1"
    """Name of a model."""
    batch_size: int = 8
    """Images at once."""
    img_size: int = 224
    """Side of the images."""


@dataclass(frozen=True, kw_only=True)
class Op(OfModel):
    """Outlook attention alone: each backend against the reference (unfold, softmax, product, fold).

    Examples:
      volo bench op
      volo bench op --batch-size 1 --threads 2 --compiled --out op.json
    """

    rounds: int = 41
    compiled: bool = False
    """The reference by torch.compile, too; takes minutes."""


@dataclass(frozen=True, kw_only=True)
class Model(OfModel):
    """Inference of a whole model against timm's VOLO with the same weights; of a run folder, a checkpoint or an exported
    file alone.

    Examples:
      volo bench model --batch-size 8
      volo bench model --model photos.onnx --batch-size 1
      volo bench model --model volo_d4 --img-size 448 --device cuda --compiled
    """

    rounds: int = 7
    compiled: bool = False
    """Both by torch.compile, too; takes minutes."""


@dataclass(frozen=True, kw_only=True)
class Train(OfModel):
    """A training step against timm's: forward, cross-entropy, backward, AdamW.

    Examples:
      volo bench train
      volo bench train --amp bf16 --device cuda --batch-size 128 --compiled
    """

    rounds: int = 5
    amp: Literal["off", "bf16"] = "off"
    """Autocast of both sides."""
    compiled: bool = False
    """Both by torch.compile, too; takes minutes."""


@dataclass(frozen=True, kw_only=True)
class Loop(OfModel):
    """`volo train`, data included, against a bare loop over tensors that are ready.

    Examples:
      volo bench loop
    """

    rounds: int = 5
    model: str = "volo_nano"
    batch_size: int = 256
    img_size: int = 32


@dataclass(frozen=True, kw_only=True)
class Data(Measurement):
    """What one core does of reading, decoding, augmenting and stacking images of ImageNet's size.

    Examples:
      volo bench data --images-per-second 2500
    """

    rounds: int = 7
    img_size: int = 224
    """Side of the images that a model gets."""
    images_per_second: float = 1000.0
    """What a GPU takes; the cores that this needs are reported."""


@dataclass(frozen=True, kw_only=True)
class Labels(OnDevice):
    """Label maps: their size, reading, writing, and generating them against the annotator's bare forward pass.

    Examples:
      volo bench labels --model runs/cifar10 --data cifar10
    """

    rounds: int = 5
    model: str
    """An annotator, as `volo annotate` takes it."""
    data: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The images."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights of a timm model, in place of its published ones."""
    pictures: int = 2048
    """So many images."""
    part: Literal["train", "val", "all"] = "train"
    """Of which part of the data."""
    batch_size: int = 64
    """Images at once."""
    img_size: int | None = None
    """Side of the images; the annotator's own if left out."""
    amp: Literal["off", "bf16"] = "off"
    """Autocast of both sides."""


@dataclass(frozen=True, kw_only=True)
class Kernels(OnDevice):
    """The GPU kernels against the copy bandwidth of the GPU, or without one what the compiler makes of them (registers,
    spills).

    Examples:
      volo bench kernels
    """

    rounds: int = 15
    batch_size: int = 128
    """Images at once."""
    compiled: bool = False
    """The reference by torch.compile, too; takes minutes."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """All that is claimed of a GPU, in a few minutes on one: errors, kernels, whole models against timm, a profile, TensorRT,
    and in the time that is left the pretraining of small models.

    Each stage runs in a process of its own with a deadline, and writes a file of its own at once: what goes wrong in one
    takes nothing from the others. Begin with a rehearsal, which runs every stage at toy size on the CPU.

    Examples:
      volo bench gpu --rehearse --out rehearsal
      volo bench gpu --minutes 9 --out gpu
      volo bench gpu --minutes 9 --out gpu --pictures pictures64
      volo bench gpu --minutes 4 --out gpu --pictures pictures64 --stages pretraining --resume
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the files go: STAGE.json, summary.json, logs, and the run folders of the pretraining."""
    minutes: float = 9.0
    """All of it takes no longer."""
    stages: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STAGE ...")] = ()
    """Only these, in any order: correctness, memory, compilation, rates, kernels, inference, training, profile, large, autotune,
    tensorrt, pretraining."""
    rehearse: bool = False
    """Every stage at toy size on the CPU; its figures mean nothing."""
    resume: bool = False
    """Leave out what is complete in the folder, and go on with the pretraining there."""
    pictures: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Images of one size in npz files, to pretrain on; without them there is no pretraining."""
    maps: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Label maps of these, made by `volo annotate`: token labeling."""
    device: str = "cuda"
    """cuda, cuda:1, ..."""
    batch_size: int = 128
    """Images at once, of kernels and models."""
    rounds: int = 15
    """Turns of every candidate."""
    backend: str = ""
    """Of torch.compile: inductor, in a rehearsal aot_eager, which takes no compiler and less time."""
    json: bool = False
    """Print the summary as one JSON object instead of tables."""


@dataclass(frozen=True, kw_only=True)
class Deploy(OnDevice):
    """Exported files on the CPU: against our fused model, timm's, and what people would pick instead of VOLO.

    Examples:
      volo bench deploy --threads 2 --out benchmarks/results/deploy_d1.json
      volo bench deploy --model volo_nano --img-size 64 --files "onnx int8 dynamic" "openvino bf16" --peers none
    """

    rounds: int = 9
    device: str = "cpu"
    model: str = "volo_d1"
    """Name of a model."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images at once."""
    img_size: int = 224
    """Side of the images."""
    files: tuple[str, ...] = (
        "onnx fp32", "onnx int8 dynamic", "onnx int8 static", "openvino fp32", "openvino bf16", "openvino int8",
    )  # fmt: skip
    """Each a format and a dtype of `volo export`, for int8 also the way."""
    peers: tuple[str, ...] = ("caformer_s18", "convnext_tiny", "deit3_small", "swin_tiny")
    """Models of timm, in the same runtimes; none: no others."""
    data: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Images to calibrate int8 with; made ones if left out, since random weights lose nothing."""


BENCHMARKS: dict[str, tuple[type[Any], str]] = {
    "op": (Op, "volo.bench.op:bench_op"),
    "model": (Model, "volo.bench.model:bench_model"),
    "train": (Train, "volo.bench.model:bench_train"),
    "loop": (Loop, "volo.bench.loop:bench_loop"),
    "data": (Data, "volo.bench.data:bench_data"),
    "labels": (Labels, "volo.bench.labels:bench_labels"),
    "kernels": (Kernels, "volo.bench.kernels:bench_kernels"),
    "deploy": (Deploy, "volo.bench.deploy:bench_deploy"),
    "gpu": (Gpu, "volo.bench.gpu:bench_gpu"),
}


def _help() -> str:
    lines = (
        f"  volo bench {name:8} {inspect.cleandoc(of.__doc__ or '').partition(chr(10) * 2)[0].replace(chr(10), ' ')}"
        for name, (of, _) in BENCHMARKS.items()
    )
    return (
        "Measure on this machine. Candidates run in turns in one process; medians and quartiles are reported.\n\n"
        + "\n".join(lines)
        + "\n\nKeep the machine otherwise idle: a second process that computes can slow one of two threads tenfold.\n"
        "volo bench WHAT --help lists the options of each.\n"
    )


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(_help(), end="")
        return 0
    name = argv[0] if argv else ""
    if name not in BENCHMARKS:
        given = f"there is no {name!r}{nearest(name, BENCHMARKS)}" if name else "it needs to be told"
        raise ValueError(f"volo bench measures {', '.join(BENCHMARKS)}: {given}")
    kind, function = BENCHMARKS[name]
    options = parse_as(kind, argv[1:], prog=f"volo bench {name}")
    return gpu(options) if isinstance(options, Gpu) else bench(name, options, function)


def bench(name: str, options: Any, function: str) -> int:
    from volo.data.files import write_atomically

    if options.out is not None:
        claim(options.out, begins_with('{\n "what": '), overwrite=options.overwrite)
    left_out = ("json", "out", "overwrite", "threads")
    arguments = {key: value for key, value in vars(options).items() if key not in left_out}
    if isinstance(options, OnDevice):
        arguments["device"] = str(open_device(options.device, options.threads))
    if arguments.get("peers") == ("none",):
        arguments["peers"] = ()
    model = [arguments.pop("model")] if "model" in arguments else []
    module, _, function = function.partition(":")
    result = getattr(importlib.import_module(module), function)(*model, **arguments)
    result = {"what": result["what"], "command": command_of(name, options)} | result
    report = json.dumps(result, indent=1)
    if options.json:
        print(report)
    else:
        show_benchmark(results(), result)
    if options.out is not None:
        write_atomically(options.out, lambda file: file.write(report.encode()))
    return 0


def gpu(options: Gpu) -> int:
    """Exit code 1: some stage failed, or was ended."""
    from volo.bench.gpu import bench_gpu, has_failed

    arguments = {key: value for key, value in vars(options).items() if key != "json"}
    console = results(options.json)
    with Bar(console) as bar:

        def tell(progress: Progress) -> None:
            name = progress.stage.name
            if progress.result is None:
                what = f"{name}, {progress.line[:60]}" if progress.line else name
                bar.show(what, int(progress.seconds), max(1, int(progress.box)), "seconds")
                return
            bar.clear()
            status = progress.result["status"]
            style = "green" if status == "completed" else "yellow"
            row = Text.assemble(f"{name:14}{duration(progress.seconds):>6}  ", (status.splitlines()[0], style))
            print_row(console, row)

        summary = bench_gpu(tell=tell, **arguments)
    if options.json:
        print(json.dumps(summary, indent=1))
    else:
        show_benchmark(console, summary)
        console.print(Text.assemble("files: ", (str(options.out), "cyan")), soft_wrap=True)
    failed = has_failed(summary)
    if failed:
        note(f"look into {options.out / 'logs'}: {', '.join(failed)} did not come to an end")
    return int(bool(failed))


def command_of(name: str, options: Measurement) -> str:
    """The command that repeats a measurement: what differs from the defaults. Of files and folders the names alone, since
    the rest of a path says nothing on another machine."""
    words = ["volo", "bench", name]
    for option in dataclasses.fields(options):
        given = getattr(options, option.name)
        if option.name in ("json", "out", "overwrite") or given == option.default:
            continue
        words.append("--" + option.name.replace("_", "-"))
        if isinstance(given, tuple):
            words += map(str, given)
        elif given is not True:
            words.append(Path(given).name if option.name in ("model", "data", "weights") else str(given))
    return shlex.join(words)


def show_benchmark(console: Console, result: dict[str, Any]) -> None:
    """The rows of a measurement as a table, under what was measured and where."""
    plain = {k: v for k, v in result.items() if k != "rows" and not isinstance(v, (dict, list))}
    console.print(", ".join(f"{k.replace('_', ' ')} {_figure(v)}" for k, v in plain.items()), highlight=False)
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    table = Table(header_style="dim", box=None)
    for i, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="right" if i else "left")
    for row in result["rows"]:
        table.add_row(*(_figure(row.get(column, "")) for column in columns))
    console.print(table, highlight=False)


def _figure(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(_figure(v) for v in value) if len(value) == 2 else ", ".join(map(_figure, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
