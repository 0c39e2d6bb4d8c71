"""A run folder: what lies in it, what of that is a run's own, and whether a run may begin or go on there.

A run writes recipe.toml, last.pt (all that is needed to continue), best.pt (the best evaluation's weights),
metrics.jsonl (a line for every step and every evaluation), held_out.csv (the images it is scored on), summary.json, and its own files in tensorboard/; the command
line adds plots at the end. Nothing else in the folder is ever replaced or deleted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from volo.config import Recipe, recipe_from_dict, recipe_to_toml
from volo.data.files import write_atomically
from volo.models.checkpoint import load_checkpoint

RUN_FILES = ("recipe.toml", "last.pt", "best.pt", "metrics.jsonl", "summary.json", "held_out.csv")
PLOTS = ("curves.png", "confusion.png", "iou.png", "overlays.png")
EVENTS = ".volo"
"""How the names of our files in tensorboard/ end."""

# A run may be continued with other values of these: they change speed, place or reports, not what is computed (rounding
# aside). The data is known by its classes and images, so it may have moved.
CHANGEABLE = frozenset(
    {
        "data.path",
        "data.kind",
        "data.root",
        "data.num_workers",
        "data.cache",
        "data.check",
        "data.timeout",
        "data.on_bad_image",
    }
    | {"token_label.maps", "annotator.model", "annotator.weights"}
    | {
        "train.device",
        "train.threads",
        "train.compile",
        "train.channels_last",
        "train.grad_checkpointing",
        "train.parallel",
    }
    | {"train.eval_every", "train.eval_steps", "train.eval_batch_size", "train.checkpoint_minutes", "train.tensorboard"}
)


def look_into(out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None for a run from the beginning. Nothing is changed.

    Raises:
        FileExistsError: a run is there and neither `resume` nor `overwrite` is set, or files that a run would replace
            and no run has written.
        ValueError: the run there cannot be continued, or not by this recipe.
    """
    if resume and overwrite:
        raise ValueError("a run is either continued (resume) or replaced (overwrite), not both")
    there = [name for name in (*RUN_FILES, *PLOTS) if (out / name).exists()]
    if there and not _is_run(out):
        raise FileExistsError(
            f"{out} is not a run of volo, but it holds {', '.join(there)}, which a run would replace: choose another --out, or move "
            "that away"
        )
    if there and not (resume or overwrite):
        raise FileExistsError(
            f"{out} already holds a run: continue it with --resume, replace it with --overwrite, or choose another --out"
        )
    if not resume:
        return None
    if not (out / "last.pt").exists():
        # A run that was killed before its first checkpoint has neither of these.
        if lost := [name for name in ("best.pt", "summary.json") if name in there]:
            raise ValueError(
                f"the run in {out} cannot be continued without last.pt, and to begin it anew would replace {' and '.join(lost)}. Copy last.pt "
                f"there as well, replace the run with --overwrite, or start another one in another --out (which may begin with the weights of "
                f"best.pt: --model.weights {out / 'best.pt'})"
            )
        return None
    checkpoint = load_checkpoint(out / "last.pt")
    changed = _differences(recipe_from_dict(checkpoint["recipe"]).to_dict(), recipe.to_dict())
    if changed:
        lines = "; ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise ValueError(
            f"the run in {out} was started with another recipe ({lines}). Continue it with its own recipe ({out / 'recipe.toml'}), or start "
            "another run, which may begin with these weights (--model.weights)"
        )
    return checkpoint


def prepare(out: Path, recipe: Recipe, is_fresh: bool, is_first_step: bool) -> None:
    """Make `out`, where `look_into` had nothing against it, ready for a run.

    is_fresh: what an earlier run has left goes. is_first_step: so do its curves in tensorboard/.
    """
    out.mkdir(parents=True, exist_ok=True)
    if is_fresh:
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
    if is_first_step:
        for path in (out / "tensorboard").glob(f"events.out.tfevents.*{EVENTS}"):
            path.unlink()
    text = recipe_to_toml(recipe).encode()
    write_atomically(out / "recipe.toml", lambda file: file.write(text))


def list_held_out(out: Path, images: Iterable[tuple[str, str]]) -> None:
    """Write held_out.csv: the images that a run is scored on and never learns from, and their classes ("" for masks)."""
    path, head = out / "held_out.csv", '"image","class"\n'
    if path.is_file() and not path.read_bytes().startswith(head.encode()):
        return  # in a run of an earlier version, somebody else's
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([("image", "class"), *images])
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(out / "held_out.csv", lambda file: file.write(content))


def require_same_images(out: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError where a run is continued with other images than it was begun with: `list_images` of each part of the
    data, then and now."""
    for part, before in then.items():
        after = now[part]
        differing = [key for key in before if key != "sample" and before[key] != after[key]]
        if not differing:
            continue
        if "count" in differing:
            what = f"{before['count']:,} {part} images; there are {after['count']:,} now"
        elif "names" in differing:
            pair = next(((a, b) for a, b in zip(before["sample"], after["sample"]) if a != b), None)
            example = f" (then {pair[0]}, now {pair[1]})" if pair else ""
            what = f"{part} images of other names, or in another order{example}"
        else:
            what = f"other labels for the {part} images"
        raise ValueError(
            f"the run in {out} was begun with {what}. Data may move, but not change: give it the same images, or start a new run"
        )


def _is_run(out: Path) -> bool:
    """Whether `out` holds a run of ours, or one that had just begun."""
    recipe = out / "recipe.toml"
    if not recipe.is_file():
        return False
    if any((out / name).is_file() for name in ("last.pt", "best.pt", "metrics.jsonl")):
        return True
    # Killed before its first step. A recipe that a person wrote does not look like this, and would be lost.
    try:
        import tomllib

        text = recipe.read_text(encoding="utf-8")
        content = tomllib.loads(text)
        # Compared as values: 12 epochs given as an integer are written as one.
        ours = tomllib.loads(recipe_to_toml(recipe_from_dict(content)))
        return content == ours and not any(line.startswith("#") for line in text.splitlines())
    except (OSError, ValueError):
        return False


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys whose change would make it another run, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        a, b, dotted = old.get(name), new.get(name), prefix + name
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differences(a, b, dotted + ".")
        elif a != b and dotted not in CHANGEABLE:
            found[dotted] = (a, b)
    return found
