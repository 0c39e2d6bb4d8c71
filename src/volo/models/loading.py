"""From weight files to state dicts, and from these into a model, with an exact report."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from volo.models.volo import resample_pos_embed

logger = logging.getLogger(__name__)


# From a file to tensors

DESCRIPTION = "volo"
"""Key in the metadata of a safetensors file of ours: a checkpoint without its tensors, as JSON."""

_WHAT_TORCH_RAISES_FOR_DAMAGED_FILES = (
    RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error
)  # fmt: skip

_WRAPPERS = ("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "state_dict", "model", "module")
"""Keys that state dicts lie under, averaged weights first."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "model_ema.", "ema.", "averaged_model.", "backbone.")
"""What DDP and FSDP, torch.compile, Lightning and wrappers of averaged weights put before every name."""

_ANCHOR = "patch_embed.conv.0.weight"
"""A name that every VOLO has, and every `Segmenter` behind `backbone.`: what stands before it is a wrapper's."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The parameters and buffers in a weight file, on the CPU.

    Takes safetensors files and torch files: a plain state dict, the original's and timm's checkpoints (`state_dict_ema`
    before `state_dict`), our own (`ema` before `model`) and those of Lightning. What DDP, torch.compile, Lightning and
    averages of weights put before the names is taken off.

    Raises FileNotFoundError; ValueError for a file that is damaged, no weight file, or a pickle that would run code when
    loaded.
    """
    return state_dict_in(read_file(path), str(path))


def read_file(path: str | Path, *, mmap: bool = True) -> Any:
    """What a weight file holds; with `mmap`, where the format allows it, tensors are read when they are used.

    Raises as `read_state_dict`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file at {path}")
    damaged = f"{path} ({path.stat().st_size:,} bytes) is damaged, cut off, or no weight file at all; delete it and fetch it again"
    if _is_safetensors(path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                described = (file.metadata() or {}).get(DESCRIPTION)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(f"{damaged}: {error}") from error
        checkpoint = None
        with contextlib.suppress(ValueError):  # metadata of that name may be somebody else's
            checkpoint = json.loads(described or "")
        return checkpoint | {"model": tensors, "ema": None} if isinstance(checkpoint, dict) else tensors
    try:
        # The original's training script, like timm's, stores its arguments beside the weights: a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} is refused: besides tensors it holds {found[1]}, and loading such objects can run code. "
                "If you trust the file, save its state dict anew with the software it comes from"
            ) from error
        raise ValueError(damaged) from error
    except _WHAT_TORCH_RAISES_FOR_DAMAGED_FILES as error:
        raise ValueError(f"{damaged}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    except OSError as error:
        # A file cut off amid its directory makes torch seek to before its start.
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(damaged) from error


def _is_safetensors(path: Path) -> bool:
    """By the ending, or the content: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def state_dict_in(content: Any, origin: str) -> dict[str, Tensor]:
    """The state dict in what `read_file` gave, its names those of the model; `origin` is what to call the file."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        kind = f"keys {list(content)[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(
            f"{origin} holds no state dict (name -> tensor), neither plain nor under {', '.join(_WRAPPERS)}; found: {kind}"
        )
    return _without_wrappers(dict(content), origin)


def _without_wrappers(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    # Wrappers nest: DDP around a compiled model in a Lightning module. A module that averages weights counts them, too.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("n_averaged")}
    while tensors and (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), "")):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # Where several models lie side by side, as a Lightning module has them, averaged weights come first again.
    found = [name.removesuffix(_ANCHOR).removesuffix("backbone.") for name in tensors if name.endswith(_ANCHOR)]
    if not found or "" in found:
        return tensors
    prefix = min(found, key=lambda prefix: ("ema" not in prefix and "average" not in prefix, len(prefix)))
    chosen = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if others := [name for name in tensors if not name.startswith(prefix)]:
        logger.info("%s: of its tensors those under %r; left out: %s", origin, prefix, ", ".join(others[:8]))
    return chosen


# From tensors into a model


@dataclass(frozen=True)
class LoadReport:
    """What loading found. Names under `missing` and `misshaped` keep the values the model had."""

    missing: tuple[str, ...] = ()
    """Names the model has and the file has not."""
    unexpected: tuple[str, ...] = ()
    """Names the file has and the model has not."""
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """(name, shape in the file, shape in the model)."""
    adapted: tuple[str, ...] = ()
    """What was changed because it was asked for, in words."""

    @property
    def is_exact(self) -> bool:
        """Every tensor of the file went into the model, and every one of the model came from the file."""
        return not (self.missing or self.unexpected or self.misshaped or self.adapted)

    def __str__(self) -> str:
        lines = [f"missing in the file: {name}" for name in self.missing]
        lines += [f"unexpected in the file: {name}" for name in self.unexpected]
        lines += [
            f"other shape: {name} is {_shape(given)} in the file, {_shape(wanted)} in the model"
            for name, given, wanted in self.misshaped
        ]
        lines += [f"adapted: {what}" for what in self.adapted]
        return "\n".join(lines) or "every name and shape agrees"


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    adapt_pos_embed: bool = False,
    adapt_head: bool = False,
    adapt_stem: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Load weights into `model`, in place.

    Args:
        model: a VOLO or Segmenter to load into; unchanged if this function raises.
        source: a weight file, as `read_state_dict` takes it, or a state dict.
        adapt_pos_embed: resample a position embedding [1, h, w, C] made for another image size.
        adapt_head: leave what names classes (`head` and `aux_head`; `conv_seg` of a Segmenter's heads) as it is in the
            model where the number of classes differs.
        adapt_stem: sum (for one channel) or repeat the RGB filters of the first convolution for other `in_chans`.
        strict: raise ValueError, with the report, for names or shapes that differ; else load what fits.

    Raises ValueError if strict and something does not fit, or for a file that `read_state_dict` refuses.
    """
    given = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    wanted = model.state_dict()
    backbone = "backbone." if "backbone.pos_embed" in wanted else ""
    pos_embed, stem = f"{backbone}pos_embed", f"{backbone}{_ANCHOR}"
    adapted: list[str] = []
    kept_heads: set[str] = set()

    def differs(name: str) -> bool:
        return name in given and name in wanted and given[name].shape != wanted[name].shape

    if adapt_pos_embed and differs(pos_embed):
        old, new = given[pos_embed].shape, wanted[pos_embed].shape
        if len(old) == 4 and old[-1] == new[-1]:
            given[pos_embed] = resample_pos_embed(given[pos_embed], (new[1], new[2]))
            adapted.append(f"{pos_embed} resampled from {_shape(old[1:3])} to {_shape(new[1:3])} tokens")
    for head in _HEADS if adapt_head else ():
        ours = {name: tensor.shape for name, tensor in wanted.items() if name.startswith(head)}
        theirs = {name: tensor.shape for name, tensor in given.items() if name.startswith(head)}
        if ours != theirs:
            kept_heads |= ours.keys()
            given = {name: tensor for name, tensor in given.items() if name not in theirs}
            num_theirs, num_ours = (next((s[0] for s in shapes.values()), 0) for shapes in (theirs, ours))
            fate = "left as initialised" if ours else "left out"
            adapted.append(f"{head[:-1]} {fate} ({num_theirs} classes in the file, {num_ours} in the model)")
    if adapt_stem and differs(stem) and given[stem].shape[1] == 3:
        in_chans = wanted[stem].shape[1]
        given[stem] = _stem_for(given[stem], in_chans)
        adapted.append(f"{stem} turned from 3 input channels to {in_chans}")

    misshaped = [name for name in wanted if differs(name)]
    report = LoadReport(
        missing=tuple(name for name in wanted if name not in given and name not in kept_heads),
        unexpected=tuple(name for name in given if name not in wanted),
        misshaped=tuple((name, tuple(given[name].shape), tuple(wanted[name].shape)) for name in misshaped),
        adapted=tuple(adapted),
    )
    if strict and given and not wanted.keys() & given.keys():
        raise ValueError(
            f"the weights are those of another model: none of their {len(given)} names ({', '.join(list(given)[:3])}, "
            f"...) is one of the model's {len(wanted)} ({', '.join(list(wanted)[:3])}, ...)"
        )
    if strict and (report.missing or report.unexpected or report.misshaped):
        raise ValueError(f"the weights do not fit the model, which was left unchanged:\n{report}{_hints(report)}")
    fitting = {name: tensor for name, tensor in given.items() if name in wanted and not differs(name)}
    model.load_state_dict(fitting, strict=False)
    return report


_HEADS = ("head.", "aux_head.", "decode_head.conv_seg.", "auxiliary_head.conv_seg.")
"""What the names of parameters begin with whose size is the number of classes."""


def _stem_for(weight: Tensor, in_chans: int) -> Tensor:
    """Filters [C, 3, k, k] for another number of channels, of the same response to a grey image (as in timm)."""
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans] * (3 / in_chans)


def _hints(report: LoadReport) -> str:
    concerned = {*report.missing, *report.unexpected, *(name for name, _, _ in report.misshaped)}
    hints = {
        "adapt_pos_embed": any(name.endswith("pos_embed") for name in concerned),
        "adapt_head": any(name.startswith(_HEADS) for name in concerned),
        "adapt_stem": any(name.endswith(_ANCHOR) for name in concerned),
    }
    asked = [f"{name}=True" for name, concerns in hints.items() if concerns]
    return f"\nTo adapt what can be adapted pass {', '.join(asked)}" if asked else ""


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
