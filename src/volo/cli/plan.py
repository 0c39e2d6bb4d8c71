"""What a run would take, as `volo train --plan` shows it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from volo.cli.console import duration, megabytes, millions


def show_plan(console: Console, plan: dict[str, Any], title: str = "") -> None:
    """What a run will take (`volo.training.plan`), the annotator that comes first before it."""
    if "annotator" in plan:
        show_plan(console, plan["annotator"], "first, the annotator")
        title = "then, with its label maps"
    if title:
        console.print(Text(title, style="bold"))
    height, width = plan["img_size"]
    memory, seconds = plan["memory_bytes"], plan["seconds"]
    tried, micro_batch = plan["probed_micro_batch_size"], plan["micro_batch_size"]
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in memory.items() if size and name != "all")
    split = f" in micro batches of {plan['micro_batch_size']}" if plan["micro_batch_size"] < plan["batch_size"] else ""
    rows = [
        ("model", f"{plan['model']}, {millions(plan['num_parameters'])} parameters, images of {height} x {width}"),
        (
            "images",
            f"{plan['num_train']:,} for training, {plan['num_val']:,} held out, {plan['num_classes']} classes",
        ),
        (
            "steps",
            f"{plan['steps']:,} of {plan['batch_size']}{split}: {plan['epochs']:g} epochs of {plan['steps_per_epoch']:,} steps, "
            f"{plan['pictures']:,} images; {plan['evaluations']} evaluations",
        ),
        ("learning rate", f"{plan['peak_lr']:.3g} at its peak"),
        ("memory", f"about {megabytes(memory['all'])} on {plan['device']} ({parts})"),
    ]
    unknown = [name for name, size in memory.items() if size is None]
    if unknown:
        rows.append(("", f"and what could not be measured: {' and '.join(sorted(unknown))}"))
    if plan["peak_bytes"]:
        rows.append(("", f"{megabytes(plan['peak_bytes'])} at most while trying"))
    if plan["step_seconds"]:
        low, high = min(plan["step_seconds"]), max(plan["step_seconds"])
        rows += [
            (
                "time",
                f"about {duration(seconds['training'])} for the steps ({low:.3g} to {high:.3g} s each in {len(plan['step_seconds'])} tries, "
                f"{plan['pictures_per_second']:,.0f} images/s), {duration(seconds['evaluations'])} for evaluations",
            ),
            ("", _limit(plan)),
        ]
    else:
        rows.append(("time", "not measured: memory is too small even for a step with two images"))
    if 0 < tried < micro_batch:
        rows.append(("", f"activations and time are scaled up from {tried} images to {micro_batch} in a micro batch"))
    elif 0 < tried < plan["batch_size"] // plan["world_size"]:
        rows.append(("", "time is scaled up from one micro batch a step"))
    if "live_annotator" in plan:
        rows.append(("annotator", _live_annotator(plan["live_annotator"])))
    if "label_maps" in plan:
        maps = plan["label_maps"]
        grid = f" of {maps['grid'][0]} x {maps['grid'][1]}" if maps["grid"] else ""
        size = megabytes(maps["bytes"]) if maps["bytes"] else "size known when the annotator is"
        rows.append(
            ("label maps", f"{size}{grid}, {'in' if maps['is_there'] else 'to be generated in'} {maps['path']}")
        )
        if not maps["is_there"] and maps["seconds"] is None:
            rows.append(("", f"generating them is not counted: {maps['not_counted']}"))
        elif not maps["is_there"]:
            rows.append(
                (
                    "",
                    f"about {duration(maps['seconds'])} to generate them ({maps['pictures_per_second']:,.3g} images/s)",
                )
            )
    table = Table(show_header=False, box=None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table, highlight=False)
    if seconds["all"] is not None and ("annotator" in plan or seconds.get("label_maps")):
        console.print(f"{duration(seconds['all'])} in all", highlight=False)


def _limit(plan: dict[str, Any]) -> str:
    """Whether a plan's steps wait for their images."""
    data, workers = plan["data_seconds"], plan["num_workers"]
    if not workers:
        return f"images are made between the steps, {data:.3g} s of each"
    beside = f"{data:.3g} s for the images of a step, by {workers} processes beside it"
    return f"the images are the limit: {beside}" if plan["limit"] == "data" else f"the steps are the limit: {beside}"


def _live_annotator(annotator: dict[str, Any]) -> str:
    what = "of unknown size"
    if annotator["img_size"]:
        height, width = annotator["img_size"]
        what = f"{millions(annotator['num_parameters'])} parameters, images of {height} x {width}"
    if annotator["is_in_steps"]:
        return f"{what}; it looks on in the steps that were tried"
    if annotator["seconds_a_picture"] is None:
        return f"{what}; its time is not counted: {annotator['not_counted']}"
    return f"{what}; {annotator['seconds_a_picture']:.3g} s an image on top of the steps that were tried"
