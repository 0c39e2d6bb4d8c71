"""`volo train`: from a recipe and its changes to a run."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import json
import logging
import shlex
import tomllib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from volo.cli.console import is_main_process, note, process_rank, results
from volo.cli.options import answer_habits, open_device, parse_as
from volo.cli.outputs import is_figure, optional
from volo.config import Recipe, find_recipe, list_recipes, load_recipe

if TYPE_CHECKING:
    from volo.training.report import TrainResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the images are: short for --data.path."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Run folder; runs/NAME of the recipe if left out."""
    on_bad_image: Literal["error", "skip"] | None = None
    """Images that cannot be decoded: stop and name them all, or leave them out. Short for --data.on_bad_image."""
    minutes: float | None = None
    """Time limit in minutes: the epochs that fit are chosen from measured speed. Short for --schedule.minutes."""
    resume: bool = False
    """Continue the run in --out where it stopped (or begin it, if there is none)."""
    overwrite: bool = False
    """Replace the run in --out."""
    plan: bool = False
    """Only say what the run would take: steps, images, memory, time (tried out with a few images), label maps."""
    json: bool = False
    """Print the summary (with --plan, the plan) as one JSON object; everything else goes to standard error."""
    quiet: bool = False
    """No progress, only the result."""
    recipe: Annotated[tyro.conf.FlagConversionOff[Recipe], tyro.conf.arg(name="")] = field(default_factory=Recipe)


def train(options: TrainOptions, words: Sequence[str] = ()) -> int:
    """Train a classifier, or a segmentation model: RECIPE is a .toml file, the name of one that ships with volo, or a run folder (to repeat it).

    Every key of the recipe can be changed: --section.key VALUE. Arguments of the model that have no key of their own
    go by --model.options.NAME VALUE, in TOML: --model.options.depths [2,2,3,1]. Those of the recipe hold for its own
    model and are left out with another --model.name, all but the pooling.

    Examples:
      volo train digits
      volo train photos --data photos                      your own photos in five minutes; --minutes 20 for more
      volo train photos_probe --data photos                a linear probe, in seconds
      volo train photos_cpu --data photos --out runs/photos --schedule.epochs 60
      volo train photos_cpu --data labels.csv              classes by a table: path,label
      volo train table_cpu --data labels.csv --data.label_columns age gender     numbers, several labels, several outputs
      volo train camvid_cpu --data camvid --out runs/camvid
      volo train runs/photos --resume                      after Ctrl-C or a power cut: the same weights, bit for bit
      volo train imagenet_volo_d1_384 --data imagenet --train.accumulation 8     8 micro batches of 64 a step
      volo train photos_finetune --data photos             from published weights; --train.amp bf16 on a GPU
      torchrun --nproc-per-node 8 -m volo train imagenet_volo_d1_224 --data imagenet --train.amp bf16
      volo train cifar10_token_labels --data cifar10       its annotator first, then the label maps, then the training
      volo train imagenet_volo_d1_224 --data imagenet --token_label.maps maps/imagenet --plan
      volo train photos_cpu --help-all                     all keys, with the values of that recipe
    """
    from volo.cli.progress import TrainReporter, show_result
    from volo.training.pipeline import train as run_training
    from volo.training.settings import keep_freed_memory

    recipe, out = options.recipe, options.out
    assert out is not None
    if options.data is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=options.data))
    if options.on_bad_image is not None:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, on_bad_image=options.on_bad_image))
    if options.minutes is not None:
        recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, minutes=options.minutes))
    is_main = is_main_process()
    console = results(options.json)
    reporter = None if options.quiet or not is_main else TrainReporter(results(options.json, lasting=True))
    if options.plan:
        return _show_plan(recipe, out, options)
    program = "volo" if process_rank() is None else "torchrun ... -m volo"

    kept = out / "recipe.toml"
    earlier = kept.stat().st_mtime_ns if kept.is_file() and options.overwrite else None

    def go_on() -> str:
        """The command that continues. Until a run has its recipe in its folder, only the words it was given know it."""
        if kept.is_file() and kept.stat().st_mtime_ns == earlier:  # the run that was to be replaced is still there
            return f"{program} train {shlex.join(words)}"
        if kept.is_file() or not words:
            return f"{program} train {shlex.quote(str(out))} --resume"
        return f"{program} train {shlex.join(w for w in words if w not in ('--resume', '--overwrite'))} --resume"

    keep_freed_memory()
    try:
        with reporter or contextlib.nullcontext():
            result = run_training(recipe, out, resume=options.resume, overwrite=options.overwrite, reporter=reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(go_on()) from None
    if not is_main:
        return 128 + result.signal if result.signal else 0
    if result.status == "interrupted":
        if options.json:  # of the annotator's training, if it was that
            print((result.out / "summary.json").read_text(encoding="utf-8"))
        note(f"stopped after step {result.step:,} of {result.total_steps:,}; continue with: {go_on()}")
        return 128 + result.signal

    if options.json:
        print((out / "summary.json").read_text(encoding="utf-8"), flush=True)
    else:
        show_result(console, result)
    for name, draw in _figures(out, result, recipe.task).items():
        path = out / name
        with optional(str(path)):
            if path.exists() and not is_figure(FIGURES[name])(path):
                raise ValueError("a file of that name exists and is not a figure of an earlier training")
            draw(path)
            if not options.json:
                console.print(f"  {path}", style="cyan", soft_wrap=True, markup=False, highlight=False)
    return 0


FIGURES = {
    "curves.png": "training curves",
    "confusion.png": "confusion matrix",
    "iou.png": "IoU of classes",
    "overlays.png": "overlays",
}


def _figures(out: Path, result: TrainResult, task: str) -> dict[str, Callable[[Path], None]]:
    """What is drawn of a run, each by a function of the file it goes to."""

    def curves(path: Path) -> None:
        from volo.explain.plots import training_curves

        training_curves(out / "metrics.jsonl", path)

    def confusion(path: Path) -> None:
        from volo.explain.plots import confusion_matrix

        confusion_matrix(result.confusion, result.classes, path, "pixels" if task == "segment" else "images")

    figures: dict[str, Callable[[Path], None]] = {"curves.png": curves}
    if result.confusion:
        figures["confusion.png"] = confusion
    if task == "segment" and result.best:
        figures["iou.png"] = partial(_draw_iou, out, result.best)
        figures["overlays.png"] = partial(_draw_overlays, out)
    return figures


MAX_OVERLAYS = 6


def _draw_iou(out: Path, best: dict[str, Any], path: Path) -> None:
    from volo.explain.plots import class_bars
    from volo.inference.model_source import load

    model = load(out, task="segment", device="meta")
    class_bars(best["per_class_iou"], model.classes, model.colours, path, best.get("per_class_boundary_iou", ()))


def _draw_overlays(out: Path, path: Path) -> None:
    """Some held-out images as the best weights see them."""
    from volo.data.masks import BadImageError, find_pairs, load_pair, open_classes
    from volo.explain.plots import OverlayItem, overlay_sheet
    from volo.inference.model_source import load
    from volo.inference.segment import HowToTest, segment

    recipe = load_recipe(out / "recipe.toml")
    device = open_device(recipe.train.device)
    classifier = load(out, task="segment", device=device)
    data, its = classifier.preprocessing, classifier.segment
    if its.object_value == -1 and classifier.object_value != 1:  # as the training understood the masks
        its = dataclasses.replace(its, object_value=classifier.object_value)
    root, classes = open_classes(data, its, (classifier.classes, classifier.colours))
    pairs = find_pairs(root, its, its.val_split, data)
    count = len(pairs.names)
    items = []
    for i in sorted({(2 * k + 1) * count // (2 * MAX_OVERLAYS) for k in range(MAX_OVERLAYS)}):
        name = pairs.names[i]
        try:
            image, truth = load_pair(root, name, pairs.masks[i], classes)
        except BadImageError:  # left out of the training, too
            continue
        how = HowToTest.from_config(classifier.segment, classifier.preprocessing.img_size)
        answer = next(segment(classifier, [root / name], how=how, device=device))
        items.append(OverlayItem(image, answer.classes, truth[0].numpy(), Path(name).name))
    overlay_sheet(items, classifier.classes, classifier.colours, path)


def _show_plan(recipe: Recipe, out: Path, options: TrainOptions) -> int:
    from volo.cli.plan import show_plan
    from volo.cli.progress import TrainReporter
    from volo.training.plan import plan_training

    is_main = is_main_process()
    console = results(options.json)
    reporter = None if options.quiet or not is_main else TrainReporter(results(options.json, lasting=True))
    with reporter or contextlib.nullcontext():
        plan = plan_training(recipe, out, reporter=reporter)
    if is_main and options.json:
        print(json.dumps(plan, indent=1))
    elif is_main:
        show_plan(console, plan)
    return 0


KEYS_THAT_MATTER = {
    "data.path": "where the images are; --data for short",
    "model.name": "which network: `volo info --models` lists them",
    "model.weights": "start from these: published ones (volo_d1.224), a run folder, a file; empty: from scratch",
    "data.img_size": "side of the images in pixels, or height and width: time grows with its square",
    "schedule.epochs": "how long: passes over the training images",
    "train.batch_size": "images per step; the learning rate scales with it unless optim.lr is set",
    "optim.lr": "peak learning rate; 0: by the batch size",
    "train.accumulation": "number of micro batches per step, for less memory",
    "train.amp": "off, bf16, fp16: bf16 is about twice as fast on today's GPUs",
    "train.device": "cpu, cuda, cuda:1; auto: cuda where there is one",
}
FOR_ANY_MODEL = ("pool",)
"""Model options of a recipe that stay with another --model.name: they say nothing of its size."""
HABITS = {
    "--pretrained": "--model.weights pretrained starts from our own weights (volo_nano, volo_tiny) or the published ones (volo_d1 to d5)",
    "--weights": "--model.weights takes published weights, a run folder or a file to start from",
    "--checkpoint": "--model.weights RUN starts from its weights; `volo train RUN --resume` continues it",
    "--epochs": "--schedule.epochs",
    "--lr": "--optim.lr",
    "--learning-rate": "--optim.lr",
    "--weight-decay": "--optim.weight_decay",
    "--opt": "--optim.name",
    "--batch-size": "--train.batch_size, images in a step over all processes",
    "--img-size": "--data.img_size",
    "--model": "--model.name",
    "--amp": "--train.amp bf16",
    "--device": "--train.device",
    "--seed": "--train.seed",
    "--workers": "--data.num_workers",
    "--output": "--out, the run folder",
    "--output-dir": "--out, the run folder",
    "--save-dir": "--out, the run folder",
    "--num-classes": "the classes are those of the images in --data; nothing to say",
}


def _short_help(recipe: Recipe) -> str:
    """What to know first: the ten keys that matter, as they are in `recipe`."""
    sections = dataclasses.asdict(recipe)
    keys = []
    for key, meaning in KEYS_THAT_MATTER.items():
        section, _, name = key.partition(".")
        value = sections[section][name]
        given = " ".join(map(str, value)) if isinstance(value, tuple) else value
        keys.append(f"  {f'--{key} {given}'.rstrip():30} {meaning}")
    return f"""usage: volo train RECIPE [OPTIONS]

{inspect.cleandoc(train.__doc__ or "")}

Where and how:
  --data PATH                    where the images are
  --out FOLDER                   run folder; runs/NAME of the recipe if left out
  --minutes N                    end after so many minutes, with the epochs that fit
  --resume, --overwrite          go on with the run in --out, or replace it
  --plan                         only say what it would take: steps, memory, time
  --json, --quiet                the summary as JSON; no progress

The keys that matter first, with the values of this recipe:
{chr(10).join(keys)}

volo train RECIPE --help-all     every option and key
"""


def main(argv: Sequence[str]) -> int:
    answer_habits("volo train", argv, HABITS)
    words, default, of_recipe, given = _prepare(argv)
    if {"-h", "--help"} & set(words):
        print(_short_help(default.recipe), end="")
        return 0
    words = ["--help" if word == "--help-all" else word for word in words]
    # Recipe keys are shown as they are written in recipes.
    options = parse_as(
        TrainOptions, words, "volo train RECIPE", train.__doc__ or "", default=default, use_underscores=True
    )
    if options.quiet:
        logging.getLogger("volo").setLevel(logging.WARNING)
    recipe, own = options.recipe, default.recipe.model.name
    if recipe.model.name != own and (its_own := [option for option in of_recipe if option not in FOR_ANY_MODEL]):
        logger.info("model.options of the recipe are left out (%s): they are for %s", ", ".join(its_own), own)
        of_recipe = {option: value for option, value in of_recipe.items() if option in FOR_ANY_MODEL}
    model, data = dataclasses.replace(recipe.model, options=of_recipe | given), recipe.data
    said = {word.partition("=")[0].replace("-", "_") for word in words}
    if "__data.img_size" in said and "__data.max_upscale" not in said:
        data = dataclasses.replace(data, max_upscale=0.0)  # who names a size wants that one
    return train(dataclasses.replace(options, recipe=dataclasses.replace(recipe, model=model, data=data)), argv)


def _prepare(argv: Sequence[str]) -> tuple[list[str], TrainOptions, dict[str, Any], dict[str, Any]]:
    """The words after the recipe, options with the recipe's values for a start, and the arguments of the model: those of
    the recipe and those given."""
    if not argv:
        raise ValueError("volo train needs a recipe: a .toml file, " + ", ".join(path.stem for path in list_recipes()))
    if argv[0].startswith("-"):
        asked = {"-h", "--help", "--help-all"} & set(argv)
        if not asked:
            raise ValueError(f"the recipe comes first: volo train RECIPE {' '.join(argv)}")
        return [*asked], TrainOptions(), {}, {}
    folder = Path(argv[0])
    try:
        path = find_recipe(folder / "recipe.toml" if (folder / "recipe.toml").is_file() else argv[0])
    except FileNotFoundError:
        if "--resume" not in argv or folder.suffix == ".toml" or len(folder.parts) == 1:
            raise
        raise FileNotFoundError(
            f"{folder} {'holds no run: it has no recipe.toml' if folder.exists() else 'is not there'}. --resume goes on with a "
            "run folder, or with the run that a recipe and --out name"
        ) from None
    # The recipe a run was started with lies in its folder, where it is also continued.
    out = folder if (folder / "recipe.toml").is_file() else Path("runs") / path.stem
    recipe = load_recipe(path)
    argv, given_options = _take_model_options(argv[1:])
    default = TrainOptions(
        out=out, recipe=dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options={}))
    )
    return _spell_lists(_spell_booleans(argv)), default, recipe.model.options, given_options


def _take_model_options(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
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


def _keys_of(type_: type) -> set[str]:
    """Options of the recipe's keys that take, maybe among others, a value of this type."""
    return {
        f"--{section}.{key.name}"
        for section, hint in typing.get_type_hints(Recipe).items()
        if dataclasses.is_dataclass(hint)
        for key in dataclasses.fields(hint)
        if any(type_ in (its, typing.get_origin(its)) for its in _alternatives(typing.get_type_hints(hint)[key.name]))
    }


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return (hint, *typing.get_args(hint))


def _spell_lists(argv: list[str]) -> list[str]:
    """--data.img_size [32, 48] or [32,48] (as in TOML) as the parser wants it: --data.img_size 32 48."""
    lists, result = _keys_of(tuple), list[str]()
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        name, has_value, value = word.partition("=")
        first = value if has_value else words[0] if words else ""
        if "--" + name[2:].replace("-", "_") in lists and first.startswith("["):
            given = [value] if has_value else []
            # [32, 48] without quotes is two words to the shell.
            while words and not words[0].startswith("--") and not (given and given[-1].endswith("]")):
                given.append(words.popleft())
            items = " ".join(given).removeprefix("[").removesuffix("]").split(",")
            result += [name, *(item.strip().strip("\"'") for item in items if item.strip())]
        else:
            result.append(word)
    return result


def _spell_booleans(argv: list[str]) -> list[str]:
    """--train.compile true (as in TOML), or without a value, as the parser wants it: --train.compile True."""
    switches = _keys_of(bool)

    def spelled(value: str) -> str:
        return value.capitalize() if value.lower() in ("true", "false") else value

    result: list[str] = []
    words = iter(argv)
    following = next(words, None)
    while following is not None:
        word, following = following, next(words, None)
        name, has_value, value = word.partition("=")
        if "--" + name[2:].replace("-", "_") not in switches:
            result.append(word)
        elif has_value:
            result.append(f"{name}={spelled(value)}")
        elif following is None or following.startswith("--"):
            result += [word, "True"]
        else:
            result += [word, spelled(following)]
            following = next(words, None)
    return result
