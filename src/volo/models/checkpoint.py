"""Checkpoints: one file of plain dicts, lists, numbers, strings and tensors, never half written."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from volo.config import Recipe, recipe_from_dict
from volo.data.files import write_atomically
from volo.models.segmenter import Segmenter, segmenter_from_dict
from volo.models.volo import VOLO, VOLOConfig
from volo.models.weights import is_safetensors, load_plain

FORMAT = 1


Model = TypeVar("Model", VOLO, Segmenter)


class NoCheckpointError(ValueError):
    """A file may hold weights, but is no checkpoint of `volo train`."""


@dataclass(frozen=True)
class LoadedModel(Generic[Model]):
    """A trained model with what is needed to use it."""

    model: Model
    """In eval mode."""
    classes: tuple[str, ...]
    recipe: Recipe
    """How it was trained; `recipe.data` holds sizes, mean and std."""
    metrics: dict[str, Any]
    """Of the last evaluation before the checkpoint."""
    step: int
    extras: dict[str, Any]
    """`Workload.extras` of its training."""


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write `checkpoint` so that `path` is at every moment either the old file or the whole new one.

    Raises OSError (a full disk, for example); the old file is then still in place and no other is left behind.
    """
    write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU.

    Raises FileNotFoundError; ValueError for a truncated file or one with code in it; NoCheckpointError, which is one, for
    a file that is not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; a run folder holds last.pt and best.pt")
    not_ours = f"{path} holds weights but is not a checkpoint of volo; read it with volo.models.weights.load_weights"
    if is_safetensors(path):
        raise NoCheckpointError(not_ours)
    try:
        checkpoint = load_plain(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a checkpoint of volo, or holds more than plain data; it is not opened, because such a file can run code"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        # A file cut off amid its directory makes torch seek to before its start: EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} is damaged or cut off ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint or "model_config" not in checkpoint:
        raise NoCheckpointError(not_ours)
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {checkpoint['format']}, written by volo {checkpoint.get('volo_version')}; this version reads format {FORMAT}"
        )
    return checkpoint


def load_model(path: str | Path, *, use_ema: bool = True, device: torch.device | str = "cpu") -> LoadedModel[VOLO]:
    """The classifier of a checkpoint, ready to predict; its averaged weights where there are some and `use_ema` is set.

    Raises FileNotFoundError, ValueError (a segmentation model is one of the reasons).
    """
    checkpoint = load_checkpoint(path)
    if is_segmentation(checkpoint):
        raise ValueError(
            f"{path} is a segmentation model, which names pixels: use `volo segment`, `volo evaluate`, or load_segmenter"
        )
    return _load(path, checkpoint, lambda config: VOLO(VOLOConfig(**config)), use_ema, device)


def load_segmenter(
    path: str | Path, *, use_ema: bool = True, device: torch.device | str = "cpu"
) -> LoadedModel[Segmenter]:
    """As `load_model`, for a segmentation model; `extras["colours"]` are those of its classes."""
    checkpoint = load_checkpoint(path)
    if not is_segmentation(checkpoint):
        raise ValueError(f"{path} is a classifier, which names whole pictures: use `volo predict`, or load_model")
    return _load(path, checkpoint, segmenter_from_dict, use_ema, device)


def is_segmentation(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds a `Segmenter`."""
    return "backbone" in checkpoint["model_config"]


def find_checkpoint(source: str | Path) -> Path:
    """The checkpoint that a user means: a file, or a run folder's best.pt, else its last.pt.

    Raises FileNotFoundError for a folder without; a path that is no folder comes back as it is.
    """
    path = Path(source)
    if not path.is_dir():
        return path
    found = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no best.pt or last.pt in {path}; give a run folder of `volo train`, or a checkpoint")
    return found[0]


def _load(
    path: str | Path,
    checkpoint: dict[str, Any],
    build: Callable[[dict[str, Any]], Model],
    use_ema: bool,
    device: torch.device | str,
) -> LoadedModel[Model]:
    with torch.device("meta"):  # the weights follow; drawing random ones would only take time
        model = build(checkpoint["model_config"])
    weights = checkpoint["ema"] if use_ema and checkpoint["ema"] is not None else checkpoint["model"]
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit its model_config: {error}") from error
    return LoadedModel(
        model=model.to(device).eval(),
        classes=tuple(checkpoint["classes"]),
        recipe=recipe_from_dict(checkpoint["recipe"]),
        metrics=checkpoint["metrics"],
        step=checkpoint["step"],
        extras=checkpoint.get("extras", {}),
    )


def model_config_dict(model: VOLO | Segmenter) -> dict[str, Any]:
    """The model's configuration as dicts, lists and numbers: `VOLO(VOLOConfig(**d))`, or `segmenter_from_dict(d)`,
    rebuilds it."""
    return json.loads(json.dumps(asdict(model.config)))
