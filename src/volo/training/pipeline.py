"""From a recipe to a run folder, with all that its training needs first: train the annotator, generate label maps, train."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from volo.annotation.annotator import describe, load_annotator
from volo.annotation.generate import annotate
from volo.annotation.store import clear
from volo.config import Recipe, load_recipe
from volo.data.files import FolderLock
from volo.data.label_maps import INDEX, LabelMaps
from volo.data.transforms import height_width
from volo.distributed import World, agree_on_start, join_world, main_first, main_only
from volo.training import run_folder
from volo.training.image_size import fit_to_images
from volo.training.loop import train as run_loop
from volo.training.optim import LearningRate
from volo.training.report import NullReporter, Reporter, TrainResult
from volo.training.settings import torch_settings
from volo.training.time_limit import fit_into_time
from volo.training.workloads.token_labeling import check_annotator

SHARED_DATA = (
    "path kind splits val_fraction split_seed root image_column label_columns label_kinds split_column label_separator "
    "on_bad_image check cache num_workers timeout"
).split()
"""Keys of [data] in which an annotator's training follows the recipe that it is trained for: what the images are, and how
they are read."""


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Do all that `recipe` says and leave the results in the folder `out`: `volo.training.loop.train`, after what its
    [annotator] has to do, in `out`/annotator and `out`/label_maps.

    What is there is not done again, what was cut off goes on. Under torchrun every process calls this.

    Args:
        resume: continue the run in `out`, or begin it.
        overwrite: replace a run that is already in `out`, and its annotator and label maps if they are not those of
            `recipe`.

    Returns the result of the annotator's training if a signal ended that. Raises as that does, and ValueError for label
    maps that are there but not as [annotator] says.
    """
    started = time.monotonic()
    if not recipe.schedule.minutes:
        LearningRate.from_recipe(recipe, 1)  # refuses what contradicts itself before images are read
    out, reporter = Path(out), reporter or NullReporter()
    with join_world(recipe.train.device) as world:
        recipe = fit_to_images(recipe, world, reporter)
        prepared, stopped = prepare_label_maps(
            recipe, out, world, reporter if world.is_main else NullReporter(), resume=resume, overwrite=overwrite
        )
        if stopped is not None:
            return stopped
        # The run keeps its own recipe, which does not say where its folder lies: it may be moved. What was prepared has
        # begun it.
        resume = resume or (prepared is not recipe and not overwrite)
        if recipe.schedule.minutes and not resume:  # refused before it is measured
            main_only(world, lambda: run_folder.look_into(out, recipe, resume, overwrite))
        timed = fit_into_time(prepared, out, world, reporter, started=started, resume=resume)
        recipe = dataclasses.replace(recipe, schedule=timed.schedule)
        return run_loop(timed, out, resume=resume, overwrite=overwrite, reporter=reporter, kept=recipe)


def prepare_label_maps(
    recipe: Recipe,
    out: Path,
    world: World,
    reporter: Reporter,
    *,
    resume: bool = True,
    overwrite: bool = False,
) -> tuple[Recipe, TrainResult | None]:
    """Train the annotator of `recipe` and generate its label maps, as far as they are not there: see `train`.

    Returns the recipe with the places filled in as they are now, and the result of the annotator's training if a signal
    ended that.
    """
    config, labels = recipe.annotator, recipe.token_label
    if recipe.task != "token_label" or labels.source == "own" or not (config.recipe or config.model):
        return recipe, None
    is_trained_here = trains_annotator(recipe, out)
    check_annotator(recipe)
    if is_trained_here and config.weights:
        raise ValueError(
            f"annotator.weights are for a model of timm, but the annotator is trained first, by {config.recipe}; name the model "
            "with --annotator.model, or leave the weights out"
        )
    at_hand, annotator = recipe, out / "annotator"
    if is_trained_here:
        at_hand = dataclasses.replace(at_hand, annotator=dataclasses.replace(config, model=str(annotator)))
    maps = Path(labels.maps or out / "label_maps")
    is_ours = maps.resolve() == (out / "label_maps").resolve()
    is_there = labels.source == "maps" and (maps / INDEX).is_file()
    if labels.source == "maps":
        at_hand = dataclasses.replace(at_hand, token_label=dataclasses.replace(labels, maps=str(maps)))

    with contextlib.ExitStack() as stack:
        main_only(world, lambda: stack.enter_context(FolderLock(out, "training")) is None)
        # Nobody writes before all have looked.
        agree_on_start(run_folder.look_into(out, recipe, resume, overwrite), world)
        its, is_other_annotator = None, False
        if is_trained_here and (not is_there or (annotator / "recipe.toml").is_file()):
            its = annotator_recipe(recipe, begun=annotator)
            try:
                run_folder.look_into(annotator, its, resume=True, overwrite=False)
            except ValueError:
                if not overwrite:
                    raise
                is_other_annotator = True
        if is_there:
            differing = ["another annotator"] if is_other_annotator else _differences(at_hand, maps)
            if not differing:
                return at_hand, None
            what = f"the label maps in {maps} are not as [annotator] says"
            if not (overwrite and is_ours):
                way_out = (
                    "generate them anew with --overwrite" if is_ours else "choose another folder for --token_label.maps"
                )
                raise ValueError(f"{what}: {'; '.join(differing)}. Let it say what they are, or {way_out}")
            reporter.on_message(f"{what} ({'; '.join(differing)}): they are replaced")
        if its is None and labels.source == "live":
            return at_hand, None

        def begin() -> None:
            """What is replaced goes before anything takes its place, so that a run that is cut off here is continued by its
            folder, and never with what an earlier one has left."""
            if overwrite and is_ours and labels.source == "maps":
                clear(maps)
            if is_other_annotator and its is not None:
                run_folder.prepare(annotator, its, is_fresh=True, is_first_step=True)
            run_folder.prepare(out, recipe, is_fresh=overwrite, is_first_step=overwrite)

        main_only(world, begin)
        if its is not None:
            reporter.on_message(f"first the annotator, by the recipe {config.recipe}, in {annotator}")
            its = fit_into_time(its, annotator, world, reporter, started=time.monotonic(), resume=True)
            result = run_loop(its, annotator, resume=True, reporter=reporter)
            if result.status == "interrupted":
                return at_hand, result
        if labels.source == "maps":
            reporter.on_message(f"then the label maps, in {maps}")
            report = _generate(at_hand, maps, world, reporter)
            if world.is_main:
                reporter.on_message(_described(report))
        return at_hand, None


def _generate(recipe: Recipe, maps: Path, world: World, reporter: Reporter) -> dict[str, Any]:
    with torch_settings(recipe.train, world.device):
        with main_first(world):  # downloads once
            loaded = load_annotator(recipe.annotator, world.device)
        how = dataclasses.replace(recipe.annotator, top=min(recipe.annotator.top, loaded.model.num_classes))
        return annotate(
            loaded,
            how,
            recipe.data,
            maps,
            world=world,
            resume=True,
            on_progress=reporter.on_progress,
        )


def _differences(recipe: Recipe, path: Path) -> list[str]:
    """What of the label maps that are there is not as [annotator] says. An annotator that is not at hand is known by its
    name alone: nothing is downloaded only to compare."""
    config, maps = recipe.annotator, LabelMaps.open(path)
    wanted: dict[str, Any] = {
        "top": min(config.top, maps.num_classes),
        "encoding": config.encoding,
        "flip": config.flip,
        "crop": config.crop,
    }
    if config.img_size:
        wanted["img_size"] = list(height_width(config.img_size))
    if Path(config.model).exists() or (config.weights and Path(config.weights).exists()):
        its = describe(load_annotator(config), config)
        wanted |= {key: its[key] for key in ("img_size", "weights_digest")}
    elif maps.annotator["model"] != Path(config.model).name and not trains_annotator(recipe, Path(config.model).parent):
        wanted["model"] = config.model
    there = maps.annotator | {"top": maps.top, "encoding": maps.encoding}
    return [f"{key} is {there.get(key)}, not {value}" for key, value in wanted.items() if there.get(key) != value]


def trains_annotator(recipe: Recipe, out: Path) -> bool:
    """A run that goes to `out` begins by training its annotator, unless the label maps are there: `annotator.recipe` says
    how, and `annotator.model` names no other one."""
    wanted = recipe.task == "token_label" and recipe.token_label.source != "own" and recipe.annotator.recipe
    return bool(wanted) and recipe.annotator.model in ("", str(out / "annotator"))


def annotator_recipe(recipe: Recipe, begun: Path | None = None) -> Recipe:
    """The recipe of a recipe's annotator: `annotator.recipe`, on the same images and the same machine.

    begun: the annotator's run folder, whose recipe is taken where that one is not found (from another working directory).
    """
    try:
        its = load_recipe(recipe.annotator.recipe)
    except FileNotFoundError:
        if begun is None or not (begun / "recipe.toml").is_file():
            raise
        its = load_recipe(begun / "recipe.toml")
    data = dataclasses.replace(its.data, **{key: getattr(recipe.data, key) for key in SHARED_DATA})
    train = dataclasses.replace(its.train, device=recipe.train.device, threads=recipe.train.threads)
    return dataclasses.replace(its, data=data, train=train)


def _described(report: dict) -> str:
    agreement = report["agreement"]
    agrees = (
        f"; the annotator agrees with {100 * agreement['top1']:.1f} % of the labels" if agreement is not None else ""
    )
    return f"{report['pictures']:,} label maps of {report['grid'][0]} x {report['grid'][1]}, {report['bytes'] / 1e6:.1f} MB{agrees}"
