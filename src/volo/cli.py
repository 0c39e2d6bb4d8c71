"""`volo train | evaluate | predict | info | bench`: the one place where names on a command line become objects.

Everything beyond the standard library is imported where it is used, so that help and spelling mistakes are answered at
once. A command is a function of one frozen dataclass: the docstring is its help, the fields are its options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import logging
import os
import shlex
import signal
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from volo import __version__
from volo.config import Recipe, find_recipe, list_recipes, load_recipe, nearest

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from volo.engine.predict import Prediction

Amp = Literal["off", "bf16", "fp16"]

HELP = f"""volo {__version__}: Vision Outlooker, image recognition with outlook attention (arXiv 2106.13112)

  volo train RECIPE      train a classifier on a folder of pictures, CIFAR, or the digits that come along
  volo evaluate MODEL    how good a model is: top-1, top-5, every class, calibration, confusion
  volo predict MODEL ... name what is in pictures
  volo info              versions, devices, engines of the operator; --models lists models, weights and recipes
  volo bench WHAT        measure: the operator, a model, a training step, the training loop

MODEL is a run folder, a checkpoint in it, or published weights such as volo_d1.224.

Begin with:
  volo train digits                                     a minute or two
  volo train photos_cpu --data FOLDER                   FOLDER/CLASS/*.jpg, or FOLDER/train and FOLDER/val
  volo predict runs/photos_cpu new_pictures/
  volo COMMAND --help                                   every option, with examples
"""


@dataclass(frozen=True)
class TrainOptions:
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the pictures are: short for --data.path."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Run folder; runs/NAME of the recipe if left out."""
    on_bad_image: Literal["error", "skip"] | None = None
    """Pictures that cannot be decoded: stop and name them all, or leave them out. Short for --data.on_bad_image."""
    resume: bool = False
    """Continue the run in --out where it stopped (or begin it, if there is none)."""
    overwrite: bool = False
    """Replace the run in --out."""
    json: bool = False
    """Print the summary as one JSON object; everything else goes to standard error."""
    quiet: bool = False
    """No progress, only the result."""
    recipe: Annotated[tyro.conf.FlagConversionOff[Recipe], tyro.conf.arg(name="")] = field(default_factory=Recipe)


def train(options: TrainOptions) -> int:
    """Train a classifier: RECIPE is a .toml file, the name of one that ships with volo, or a run folder (to repeat it).

    Every key of the recipe can be changed: --section.key VALUE. Arguments of the model that have no key of their own
    go by --model.options.NAME VALUE, in TOML: --model.options.depths [2,2,3,1]

    Examples:
      volo train digits
      volo train photos_cpu --data photos --out runs/photos --schedule.epochs 60
      volo train runs/photos --resume                      after Ctrl-C or a power cut: the same weights, bit for bit
      volo train imagenet_volo_d1_384 --data imagenet --train.batch_size 64 --train.accumulation 8
      volo train photos_cpu --data photos --model.name volo_d1 --model.weights volo_d1.224 --data.img_size 224
      torchrun --nproc-per-node 8 -m volo train imagenet_volo_d1_224 --data imagenet --train.amp bf16
      volo train photos_cpu --help                         all keys, with the values of that recipe
    """
    from volo.console import TrainReporter, show_result
    from volo.engine.train import train as run_training

    recipe, out = options.recipe, options.out
    assert out is not None
    if options.data is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=options.data))
    if options.on_bad_image is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, on_bad_image=options.on_bad_image))
    is_main = int(os.environ.get("RANK", "0")) == 0
    console = _console(stderr=options.json)
    reporter = None if options.quiet or not is_main else TrainReporter(console)
    program = "torchrun ... -m volo" if "RANK" in os.environ else "volo"
    resume_command = f"{program} train {shlex.quote(str(out))} --resume"
    try:
        with reporter or contextlib.nullcontext():
            result = run_training(recipe, out, resume=options.resume, overwrite=options.overwrite, reporter=reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_command) from None
    if not is_main:
        return 128 + result.signal if result.signal else 0
    if result.status == "interrupted":
        if options.json:
            print((out / "summary.json").read_text(encoding="utf-8"))
        message = f"stopped after step {result.step:,} of {result.total_steps:,}; go on with: {resume_command}"
        _console(stderr=True).print(message, style="yellow", soft_wrap=True, highlight=False)
        return 128 + result.signal

    from volo.explain.plots import confusion_matrix, training_curves

    pictures = [out / "curves.png"]
    training_curves(out / "metrics.jsonl", pictures[0])
    if result.confusion:
        pictures.append(out / "confusion.png")
        confusion_matrix(result.confusion, result.classes, pictures[1])
    if options.json:
        print((out / "summary.json").read_text(encoding="utf-8"))
    else:
        show_result(console, result, pictures)
    return 0


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it sees pictures."""

    crop: Annotated[str | None, tyro.conf.arg(metavar="original|timm|FLOAT")] = None
    """Share of the resized picture that is seen (above 1: padded). Published weights know two presets, that of the
    original code and timm's (which is the default); other models use what they were trained with."""
    img_size: tuple[int, ...] | None = None
    """Another size in pixels, or height and width; the position embedding is resampled."""
    batch_size: int = 32
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    amp: Amp = "off"
    """Autocast to bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""


@dataclass(frozen=True)
class EvaluateOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt), a checkpoint, or published weights such as volo_d1.224."""
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Class folders, a folder with val/, or an npz file; the pictures held out from the training if left out."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="real.json")] = None
    """ReaL labels of ImageNet's validation pictures; scored beside the folders' own."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be decoded: stop and name them all, or leave them out."""
    json: bool = False
    """Print one JSON object instead of tables; the rest goes to standard error."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write evaluation.json and confusion.png there."""
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def evaluate(options: EvaluateOptions) -> int:
    """Score a model on labelled pictures: top-1, top-5, mean class accuracy, calibration, every class, confusion.

    ImageNet for published weights: a folder of WordNet-id folders (all 1000 or some), or of the folders 0 to 999 of
    ImageNet-V2.

    Examples:
      volo evaluate runs/photos                                          on the pictures held out from the training
      volo evaluate runs/photos --data other_photos --out report         report/confusion.png, report/evaluation.json
      volo evaluate volo_d1.224 --data imagenet/val --real real.json --amp bf16
      volo evaluate volo_d4.448 --data imagenetv2 --crop original
    """
    from volo.console import Bar, show_evaluation
    from volo.data.loader import EvalLoader
    from volo.data.transforms import PixelPipeline
    from volo.engine.checkpoint import write_atomically
    from volo.engine.evaluate import evaluate as run_evaluation
    from volo.engine.evaluate import open_labelled, read_real_labels

    console = _console(stderr=options.json)
    device = _device(options.how)
    classifier = _load_classifier(options.model, options.how, device)
    data = dataclasses.replace(classifier.data, on_bad_image=options.on_bad_image)
    with Bar(console) as bar:
        labelled = open_labelled(
            options.data,
            data,
            classifier.classes,
            classifier.wnids,
            on_progress=lambda done, total: bar.show("checking pictures", done, total),
        )
        bar.clear()
        for bad in labelled.skipped:
            _console(stderr=True).print(
                f"left out: {bad}", style="yellow", soft_wrap=True, markup=False, highlight=False
            )
        source = labelled.source
        label_sets = None
        if options.real is not None:
            label_sets = read_real_labels(options.real, source.names, len(classifier.classes))
        result = run_evaluation(
            classifier.model,
            EvalLoader(source, data, batch_size=options.how.batch_size),
            PixelPipeline(data).to(device),
            num_classes=len(classifier.classes),
            device=device,
            amp=options.how.amp,
            class_map=labelled.class_map,
            label_sets=label_sets,
            on_batch=lambda done: bar.show("evaluating", done, len(source)),
        )
    described = {
        "model": classifier.origin,
        "data": labelled.what,
        "img_size": data.img_size,
        "crop_pct": data.crop_pct,
    }
    report = json.dumps({**described, "classes": classifier.classes, **result}, ensure_ascii=False)
    if options.out is not None:
        from volo.explain.plots import confusion_matrix

        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "evaluation.json", lambda file: file.write(report.encode()))
        confusion_matrix(result["confusion"], classifier.classes, options.out / "confusion.png")
    if options.json:
        print(report)
        return 0
    show_evaluation(console, result, classifier.classes, f"{labelled.what}, by {classifier.origin}")
    if options.out is not None:
        console.print(
            f"{options.out / 'evaluation.json'}, {options.out / 'confusion.png'}", style="cyan", soft_wrap=True
        )
    return 0


@dataclass(frozen=True)
class PredictOptions:
    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder (its best.pt), a checkpoint, or published weights such as volo_d1.224."""
    pictures: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE")]]
    """Files, folders (searched to the bottom), globs in quotes, or - for paths on standard input, one a line."""
    top: int = 3
    """So many classes for each picture."""
    format: Literal["table", "json", "csv"] = "table"
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write there instead of standard output; the file appears when it is complete."""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw the first 48 pictures with their classes; if all lie in folders named like classes, right and wrong show."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Pictures that cannot be read are named and left out either way; "error" ends with exit code 1, "skip" with 0."""
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


MAX_SHEET = 48


def predict(options: PredictOptions) -> int:
    """Name what is in pictures. The class names come with the model.

    Examples:
      volo predict runs/photos holiday.jpg
      volo predict runs/photos new_pictures/ "more/**/*.png" --top 1 --format csv --out answers.csv
      find . -name "*.jpg" | volo predict runs/photos - --format json
      volo predict volo_d1.224 pictures/ --sheet sheet.png
    """
    from volo.console import Bar, prediction_line
    from volo.engine.checkpoint import write_atomically
    from volo.engine.predict import find_pictures, to_csv, to_json
    from volo.engine.predict import predict as run_prediction

    pictures = find_pictures(options.pictures, sys.stdin if "-" in options.pictures else ())
    device = _device(options.how)
    classifier = _load_classifier(options.model, options.how, device)
    # Only one of the two streams may draw: a bar and lines on the same terminal must know of each other.
    to_terminal = options.out is None and sys.stdout.isatty()
    output, errors = _console(stderr=False), _console(stderr=True)
    bar = Bar(output if to_terminal else errors)
    for_sheet: list[Prediction] = []
    failed = 0

    def watched() -> Iterator[Prediction]:
        nonlocal failed
        answers = run_prediction(
            classifier, pictures, top=options.top, batch_size=options.how.batch_size, device=device, amp=options.how.amp
        )
        for done, prediction in enumerate(answers, start=1):
            if prediction.error:
                failed += 1
                if options.format != "table" or options.out is not None:
                    bar.console.print(prediction.error, style="red", soft_wrap=True, markup=False, highlight=False)
            elif len(for_sheet) < MAX_SHEET:
                for_sheet.append(prediction)
            yield prediction
            bar.show("predicting", done, len(pictures))

    def table() -> Iterator[str]:
        name_width = min(60, max(len(str(path)) for path in pictures))
        class_width = min(28, max(len(name) for name in classifier.classes))
        for prediction in watched():
            line = prediction_line(prediction, name_width, class_width)
            if to_terminal:
                output.print(line, no_wrap=True, overflow="ellipsis", crop=True)
            else:
                yield line.plain.rstrip() + "\n"

    lines = {"table": table, "json": lambda: to_json(watched()), "csv": lambda: to_csv(watched())}[options.format]()
    with bar:
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                options.out, lambda file: file.writelines(line.encode(errors="backslashreplace") for line in lines)
            )
        else:
            for line in lines:
                sys.stdout.write(line)
            sys.stdout.flush()
    if options.sheet is not None and for_sheet:
        _draw_sheet(for_sheet, classifier.classes, options.sheet)
    if failed:
        message = f"{failed} of {len(pictures)} pictures could not be read"
        errors.print(message, style="yellow" if options.on_bad_image == "skip" else "red", highlight=False)
    return 1 if failed and options.on_bad_image == "error" else 0


def _draw_sheet(predictions: Sequence[Prediction], classes: Sequence[str], out: Path) -> None:
    from volo.data.decode import decode_image
    from volo.data.transforms import ResizeAndCenterCrop
    from volo.explain.plots import SheetItem, prediction_sheet

    def thumbnail(path: str) -> Any:
        image = decode_image(path)
        H, W = image.shape[1:]
        scale = min(1.0, 400 / max(H, W))
        size = (max(1, round(H * scale)), max(1, round(W * scale)))
        return ResizeAndCenterCrop(size)(image) if scale < 1 else image

    folders = [Path(p.name).absolute().parent.name for p in predictions]
    truths: Sequence[str | None] = folders if set(folders) <= set(classes) else [None] * len(folders)
    items = [SheetItem(thumbnail(p.name), p.top, p.name, truth) for p, truth in zip(predictions, truths)]
    prediction_sheet(items, out)


@dataclass(frozen=True)
class InfoOptions:
    models: bool = False
    """List models, published weights and recipes as well."""
    json: bool = False
    """Print one JSON object."""


def info(options: InfoOptions) -> int:
    """Versions, devices, which engine computes outlook attention here and why not another; models and weights.

    Examples:
      volo info
      volo info --models
      volo info --json
    """
    from volo.console import show_info

    facts = _facts(options.models)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show_info(_console(stderr=False), facts)
    return 0


def _facts(with_models: bool) -> dict[str, Any]:
    import importlib.metadata
    import platform

    import torch

    from volo.models.volo import VARIANTS, create_model
    from volo.models.weights import PRETRAINED, cache_folder, cached_path
    from volo.ops.outlook_attention import list_backends

    versions: dict[str, str | None] = {"volo": __version__, "python": platform.python_version()}
    for name in (
        "torch",
        "torchvision",
        "timm",
        "triton",
        "numpy",
        "pillow",
        "safetensors",
        "tyro",
        "rich",
        "matplotlib",
        "tensorboard",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        )
    # Stage 1 of D1 at 224 px, what most calls look like.
    engines = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        value = torch.zeros(1, 28, 28, 6, 32, device=device)
        logits = torch.zeros(1, 14, 14, 6, 9, 9, device=device)
        engines[device] = {engine.name: engine.why_not(value, logits, 3, 2, 1) for engine in list_backends()}
    facts: dict[str, Any] = {
        "versions": versions,
        "devices": devices,
        "outlook_attention": engines,
        "cache": str(cache_folder()),
    }
    if with_models:
        facts["models"] = {}
        for name in VARIANTS:
            with torch.device("meta"):
                model = create_model(name)
            facts["models"][name] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "img_size": model.config.img_size[0],
                "depths": model.config.depths,
                "embed_dims": model.config.embed_dims,
            }
        facts["pretrained"] = {
            tag: {
                "top1": w.top1,
                "real": w.real,
                "v2": w.v2,
                "crop_original": w.crop_pct_original,
                "crop_timm": w.crop_pct_timm,
                "cached": any(cached_path(tag, source).exists() for source in ("hub", "release")),
            }
            for tag, w in PRETRAINED.items()
        }
        facts["recipes"] = {path.stem: _title(path) for path in list_recipes()}
    return facts


def _title(recipe: Path) -> str:
    """What the first line of a recipe says it is."""
    with recipe.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


@dataclass(frozen=True)
class BenchOptions:
    what: tyro.conf.Positional[Literal["op", "model", "train", "loop", "kernels", "gpu"]]
    """op: outlook attention, each engine against the reference; model: inference against timm's VOLO with the same
    weights; train: a training step against timm's; loop: volo train against a bare loop over ready tensors; kernels:
    the GPU kernels against the copy bandwidth of the GPU, or without one what the compiler makes of them (registers,
    spills); gpu: errors, kernels, inference, training step and memory on a GPU, in bfloat16, against what is asked."""
    model: str = ""
    """Name of a model; volo_d1, for loop volo_nano, if left out."""
    batch_size: int = 0
    """Pictures at once; 0: 8, for loop 256, for kernels and gpu 128."""
    img_size: int = 0
    """Side of the pictures; 0: 224, for loop 32."""
    rounds: int = 0
    """Turns of every candidate; 0: enough for a steady median in a minute or two."""
    amp: Literal["off", "bf16"] = "off"
    """Of train: autocast of both sides."""
    compiled: bool = False
    """Of model, train and kernels: torch.compile too; takes minutes."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    json: bool = False
    """Print one JSON object instead of a table."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Write the result there as well."""


def bench(options: BenchOptions) -> int:
    """Measure on this machine. Candidates run in turns in one process; medians and quartiles are reported.

    Keep the machine otherwise idle: a second process that computes can slow one of two threads tenfold.

    Examples:
      volo bench op
      volo bench op --batch-size 1 --threads 2 --out op.json
      volo bench model --model volo_d1 --batch-size 8
      volo bench train --amp bf16 --device cuda --batch-size 128 --compiled
      volo bench loop
      volo bench gpu --out benchmarks/results/gpu.json
    """
    from volo.console import show_benchmark
    from volo.engine.checkpoint import write_atomically

    device = _device(ModelOptions(device=options.device, threads=options.threads))
    is_loop = options.what == "loop"
    name = options.model or ("volo_nano" if is_loop else "volo_d1")
    batch_size = options.batch_size or (256 if is_loop else 8)
    img_size = options.img_size or (32 if is_loop else 224)
    rounds = options.rounds or {"op": 41, "model": 7, "train": 5, "loop": 5, "kernels": 15, "gpu": 15}[options.what]
    result: dict[str, Any]
    if options.what == "op":
        from volo.bench.op import bench_op

        result = bench_op(name, batch_size=batch_size, img_size=img_size, device=str(device), rounds=rounds)
    elif options.what == "model":
        from volo.bench.model import bench_model

        result = bench_model(
            name,
            batch_size=batch_size,
            img_size=img_size,
            compiled=options.compiled,
            device=str(device),
            rounds=rounds,
        )
    elif options.what == "train":
        from volo.bench.model import bench_train

        result = bench_train(
            name,
            batch_size=batch_size,
            img_size=img_size,
            amp=options.amp,
            compiled=options.compiled,
            device=str(device),
            rounds=rounds,
        )
    elif options.what == "kernels":
        from volo.bench.kernels import bench_kernels, compile_report

        if device.type == "cuda":
            result = bench_kernels(options.batch_size or 128, compiled=options.compiled, rounds=rounds)
        else:
            result = compile_report()
    elif options.what == "gpu":
        from volo.bench.gpu import bench_gpu

        result = bench_gpu(
            name, batch_size=options.batch_size or 128, img_size=img_size, device=str(device), rounds=rounds
        )
    else:
        from volo.bench.loop import bench_loop

        result = bench_loop(name, img_size=img_size, batch_size=batch_size, device=str(device), rounds=rounds)
    report = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, lambda file: file.write(report.encode()))
    if options.json:
        print(report)
    else:
        show_benchmark(_console(stderr=False), result)
    return 0


# From words to options


COMMANDS: dict[str, tuple[Callable[[Any], int], type]] = {
    "train": (train, TrainOptions),
    "evaluate": (evaluate, EvaluateOptions),
    "predict": (predict, PredictOptions),
    "info": (info, InfoOptions),
    "bench": (bench, BenchOptions),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv if None) and return its exit code: 0; 1: some pictures could not be read, or nobody reads
    our output; 2: an error that the message explains; 130: Ctrl-C; 143: SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Names of files are bytes, of any encoding or none; a terminal that cannot show one is no reason to stop.
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"volo {__version__}")
        return 0
    try:
        return _run(argv[0], argv[1:])
    except KeyboardInterrupt as interrupt:
        _complain("stopped" + (f"; go on with: {interrupt}" if str(interrupt) else ""))
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output (head, less) has gone. Python's own flush at exit must not stumble over it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as error:
        if os.environ.get("VOLO_TRACEBACK"):
            raise
        _complain(_message(error))
        return 2
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError) or os.environ.get("VOLO_TRACEBACK"):
            raise
        _complain(
            f"{str(error).splitlines()[0]}\nUse a smaller --batch-size (training: --train.batch_size, or the same with "
            "--train.accumulation 4), --amp bf16 (--train.amp bf16), a smaller picture, or --train.grad_checkpointing true"
        )
        return 2


def _run(name: str, argv: list[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(
            f"no command {name!r}{nearest(name, COMMANDS)} (commands: {', '.join(COMMANDS)}; see volo --help)"
        )
    command, options_type = COMMANDS[name]
    default: Any = tyro.MISSING_NONPROP
    prog = f"volo {name}"
    model_options: dict[str, Any] = {}
    if name == "train":
        argv, default, model_options = _prepare_train(argv)
        prog += " RECIPE"
    options = tyro.cli(
        options_type,
        prog=prog,
        description=inspect.cleandoc(command.__doc__ or ""),
        args=argv,
        default=default,
        # Recipe keys are shown as they are written in recipes.
        use_underscores=name == "train",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if name == "train":
        recipe = options.recipe
        model = dataclasses.replace(recipe.model, options=model_options)
        options = dataclasses.replace(options, recipe=dataclasses.replace(recipe, model=model))
    return command(options)


def _prepare_train(argv: list[str]) -> tuple[list[str], TrainOptions, dict[str, Any]]:
    """The words after the recipe, options with the recipe's values for a start, and the arguments of the model."""
    if not argv:
        raise ValueError("volo train needs a recipe: a .toml file, " + ", ".join(path.stem for path in list_recipes()))
    if argv[0].startswith("-"):
        if not {"-h", "--help"} & set(argv):
            raise ValueError(f"the recipe comes first: volo train RECIPE {' '.join(argv)}")
        return ["--help"], TrainOptions(), {}
    folder = Path(argv[0])
    path = find_recipe(folder / "recipe.toml" if (folder / "recipe.toml").is_file() else argv[0])
    # The recipe a run was started with lies in its folder, where it is also continued.
    out = folder if (folder / "recipe.toml").is_file() else Path("runs") / path.stem
    recipe = load_recipe(path)
    argv, given_options = _take_model_options(argv[1:])
    default = TrainOptions(
        out=out, recipe=dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options={}))
    )
    return _spell_booleans(argv), default, recipe.model.options | given_options


def _take_model_options(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Split off --model.options.NAME VALUE (or NAME=VALUE): their types are the model's business, so they are TOML."""
    prefix, rest, options = "--model.options.", [], {}
    words = iter(argv)
    for word in words:
        if not word.startswith(prefix):
            rest.append(word)
            continue
        name, has_value, text = word.removeprefix(prefix).partition("=")
        if not has_value:
            try:
                text = next(words)
            except StopIteration:
                raise ValueError(f"{word} needs a value in TOML, such as 2, true, [2, 2, 3, 1] or text") from None
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text  # bare words are text: quotes would have to be quoted in a shell
        options[name.replace("-", "_")] = value
    return rest, options


def _spell_booleans(argv: list[str]) -> list[str]:
    """--train.compile true (as in TOML), or without a value, as the parser wants it: --train.compile True."""
    hints = typing.get_type_hints(Recipe)
    switches = {
        f"--{section}.{key.name}"
        for section, hint in hints.items()
        if dataclasses.is_dataclass(hint)
        for key in dataclasses.fields(hint)
        if typing.get_type_hints(hint)[key.name] is bool
    }
    result: list[str] = []
    words = iter(argv)
    following = next(words, None)
    while following is not None:
        word, following = following, next(words, None)
        name, has_value, value = word.partition("=")
        if "--" + name[2:].replace("-", "_") not in switches:
            result.append(word)
        elif has_value:
            result.append(f"{name}={value.capitalize()}")
        elif following is None or following.startswith("--"):
            result += [word, "True"]
        else:
            result += [word, following.capitalize()]
            following = next(words, None)
    return result


def _load_classifier(model: str, how: ModelOptions, device: torch.device) -> Any:
    from volo.engine.predict import load_classifier

    crop: Any = how.crop
    if crop is not None and crop not in ("original", "timm"):
        try:
            crop = float(crop)
        except ValueError:
            raise ValueError(f"--crop is original, timm or a number such as 0.96; given: {crop!r}") from None
    size: Any = how.img_size
    if size is not None:
        if len(size) not in (1, 2) or min(size) < 1:
            raise ValueError(
                f"--img-size is one number of pixels, or height and width; given: {' '.join(map(str, size))}"
            )
        size = size[0] if len(size) == 1 else size
    return load_classifier(model, img_size=size, crop=crop, device=device)


def _device(how: ModelOptions) -> torch.device:
    import torch

    if how.threads:
        torch.set_num_threads(how.threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if how.device == "auto" else how.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known to torch; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name} was asked for, but torch sees {torch.cuda.device_count()} GPUs here; use --device cpu"
        )
    return device


def _console(stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _message(error: Exception) -> str:
    """What an error says, without Python's decoration of OSErrors."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _complain(message: str) -> None:
    from rich.text import Text

    rank = os.environ.get("RANK")
    who = f"volo (process {rank})" if rank else "volo"
    _console(stderr=True).print(Text.assemble((f"{who}: ", "bold red"), (message, "red")), soft_wrap=True)
