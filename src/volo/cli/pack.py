"""`volo pack`: images as tar shards."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.text import Text

from volo.cli.console import Bar, duration, note, results
from volo.cli.options import run

if TYPE_CHECKING:
    from volo.data.pack import Packed


@dataclass(frozen=True)
class PackOptions:
    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Anything that data.path of a recipe can be: class folders, train/ and val/, npz files, other shards."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the shards go."""
    shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "256MB"
    """A shard is no larger than this."""
    shorter_side: Annotated[int, tyro.conf.arg(metavar="PIXELS")] = 0
    """Scale images down whose shorter side is longer than this, and save them as JPEG; 0: leave them as they are."""
    quality: Annotated[int, tyro.conf.arg(metavar="1..100")] = 0
    """Save every image as JPEG of this quality; 0: only those that are scaled down, with 95."""
    kind: Annotated[str, tyro.conf.arg(metavar="KIND")] = "auto"
    """How DATA is read, as data.kind of a recipe."""
    val_fraction: float = 0.1
    """Share of each class that goes to val where the data has no split of its own."""
    split_seed: int = 0
    """Seed of that split; with the same seed a recipe holds out the same images."""
    on_bad_image: Literal["error", "skip"] = "error"
    """Images that cannot be decoded: stop and name them all, or leave them out."""
    overwrite: bool = False
    """Replace the shards in FOLDER."""
    json: bool = False
    """Print a summary as one JSON object; everything else goes to standard error."""


def pack(options: PackOptions) -> int:
    """Turn images into tar shards (train-000000.tar, ..., val-000000.tar, ..., classes.txt), which WebDataset reads too.

    Images keep order, bytes and names, so that a training on the shards is the training on the data. The same command
    continues after an interruption.

    Examples:
      volo pack imagenet --out shards/imagenet
      volo pack photos --out shards/photos --shorter-side 512 --quality 90       smaller, and quicker to decode
      volo train imagenet_volo_d1_224 --data shards/imagenet
      volo train imagenet_volo_d1_224 --data "shards/imagenet/train-{000000..000511}.tar"
    """
    from volo.config import recipe_from_dict
    from volo.data.pack import pack as run_packing
    from volo.data.pack import parse_size

    console = results(options.json)
    names = ("kind", "val_fraction", "split_seed", "on_bad_image")
    data = recipe_from_dict({"data": {"path": options.data, **{name: getattr(options, name) for name in names}}}).data
    command = shlex.join(["volo", "pack", *sys.argv[2:]]) if sys.argv[1:2] == ["pack"] else "the same command"
    try:
        with Bar(console) as bar:
            packed = run_packing(
                data,
                options.out,
                shard_bytes=parse_size(options.shard_size),
                shorter_side=options.shorter_side,
                quality=options.quality,
                overwrite=options.overwrite,
                on_checked=lambda done, total: bar.show("checking images", done, total),
                on_packed=lambda done, total: bar.show("packing", done, total),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(command) from None
    for line in [f"left out: {bad}" for bad in packed.skipped] + packed.notes:
        note(line)
    if options.json:
        summary = {
            "out": str(packed.out),
            "num_classes": len(packed.classes),
            "num_train": packed.num_train,
            "num_val": packed.num_val,
            "shards": [path.name for path in packed.shards],
            "bytes": packed.num_bytes,
            "shards_done_before": packed.num_done_before,
            "skipped": [str(bad) for bad in packed.skipped],
            "notes": packed.notes,
            "seconds": round(packed.seconds, 3),
        }
        print(json.dumps(summary))
    else:
        show_packed(console, packed)
    return 0


def show_packed(console: Console, packed: Packed) -> None:
    """What `volo pack` has made, and what to do with it."""
    before = f", {packed.num_done_before} of them were there before" if packed.num_done_before else ""
    console.print(
        f"{packed.num_train:,} training and {packed.num_val:,} held-out images of {len(packed.classes)} classes in "
        f"{len(packed.shards)} shards{before}: {packed.num_bytes / 1e6:,.1f} MB in {duration(packed.seconds)}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        Text.assemble("next: ", (f"volo train RECIPE --data {shlex.quote(str(packed.out))}", "bold")), soft_wrap=True
    )


main = partial(run, pack)
