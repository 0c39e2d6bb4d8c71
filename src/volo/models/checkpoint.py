"""Checkpoints: one file of plain dicts, lists, numbers, strings and tensors, never half written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from volo.data.files import write_atomically
from volo.models.loading import read_file
from volo.models.segmenter import Segmenter, segmenter_from_dict
from volo.models.volo import VOLO, VOLOConfig

FORMAT = 1


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write `checkpoint` so that `path` is at every moment either the old file or the whole new one.

    Raises OSError (a full disk, for example); the old file is then still in place and no other is left behind.
    """
    write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU, into memory: the file may be replaced or removed afterwards.

    Raises FileNotFoundError; ValueError for a truncated file, one with code in it, or one that is not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; a run folder holds last.pt and best.pt")
    content = read_file(path, mmap=False)
    if not is_checkpoint(content):
        raise ValueError(
            f"{path} holds weights but is not a checkpoint of volo; read it with volo.models.loading.load_weights"
        )
    check_format(content, path)
    return content


def is_checkpoint(content: Any) -> bool:
    """Whether what `read_file` gave is a checkpoint of `volo train`, of whatever version."""
    return isinstance(content, dict) and "format" in content and "model_config" in content


def check_format(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Raises ValueError for a checkpoint of another version."""
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {checkpoint['format']}, written by volo {checkpoint.get('volo_version')}; this version reads format {FORMAT}"
        )


def model_of_checkpoint(
    checkpoint: Mapping[str, Any], origin: str, *, use_ema: bool = True, device: torch.device | str = "cpu"
) -> VOLO | Segmenter:
    """The model of a checkpoint, in eval mode; its averaged weights where there are some and `use_ema` is set.

    On the device "meta" it is the architecture alone. Raises ValueError for weights that do not fit.
    """
    config = checkpoint["model_config"]
    with torch.device("meta"):  # the weights follow; drawing random ones would only take time
        model = segmenter_from_dict(config) if "backbone" in config else VOLO(VOLOConfig(**config))
    if torch.device(device).type != "meta":
        weights = checkpoint["ema"] if use_ema and checkpoint.get("ema") is not None else checkpoint["model"]
        try:  # copies, since the file may be mapped, and may be replaced while the model is used
            model.load_state_dict({name: w.to(device, copy=True) for name, w in weights.items()}, assign=True)
            model.float()  # stored as float16 to save space
        except RuntimeError as error:
            raise ValueError(f"the weights in {origin} do not fit its model_config: {error}") from error
    return model.eval()


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


def model_config_dict(model: VOLO | Segmenter) -> dict[str, Any]:
    """The model's configuration as dicts, lists and numbers: `VOLO(VOLOConfig(**d))`, or `segmenter_from_dict(d)`,
    rebuilds it."""
    return json.loads(json.dumps(asdict(model.config)))
