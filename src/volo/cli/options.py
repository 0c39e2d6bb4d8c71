"""Options that several commands share, how a command line becomes them, and what they stand for."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from volo.config import read_size

if TYPE_CHECKING:
    import torch

Amp = Literal["off", "bf16", "fp16"]


def parse_as(kind: type[Any], argv: Sequence[str], prog: str, described: str = "", **settings: Any) -> Any:
    """`argv` as a `kind`, a dataclass whose fields are the options, under help of `described` (or its own docstring)."""
    return tyro.cli(
        kind,
        prog=prog,
        description=inspect.cleandoc(described or kind.__doc__ or ""),
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
        **settings,
    )


def answer_habits(command: str, argv: Sequence[str], ours: Mapping[str, str]) -> None:
    """Answer options of other tools by what they are called here. Raises ValueError."""
    for word in argv:
        option = word.partition("=")[0].replace("_", "-")
        if word.startswith("-") and option in ours:
            raise ValueError(f"{command} has no {word.partition('=')[0]}: {ours[option]}")


def run(command: Callable[[Any], int], argv: Sequence[str], ours: Mapping[str, str] | None = None) -> int:
    """Parse the options of a command, the one argument it takes, and run it. Its docstring is the help."""
    answer_habits(f"volo {command.__name__}", argv, ours or {})
    kind = typing.get_type_hints(command)["options"]
    return command(parse_as(kind, argv, f"volo {command.__name__}", command.__doc__ or ""))


_MODEL_FIRST = "name the model first, a run folder, a file or published weights such as volo_d1.224"
OF_MODELS = {"--pretrained": _MODEL_FIRST, "--weights": _MODEL_FIRST, "--model": _MODEL_FIRST}


@dataclass(frozen=True)
class DeviceOptions:
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one."""
    amp: Amp = "off"
    """Autocast to bfloat16 or float16."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""


@dataclass(frozen=True)
class ModelOptions(DeviceOptions):
    """Which model, and how it sees images."""

    crop: Annotated[str | None, tyro.conf.arg(metavar="original|timm|FLOAT")] = None
    """Share of the resized image that is seen (above 1: padded). Published weights know two presets, that of the
    original code and timm's (which is the default); other models use what they were trained with."""
    img_size: tuple[int, ...] | None = None
    """Another size in pixels, or height and width; the position embedding is resampled."""
    batch_size: int = 0
    """Images at once, or windows of a segmentation model; 0: 32, and 1 for segmentation."""


@dataclass(frozen=True)
class WindowOptions:
    """What a segmentation model sees of an image; `flip` is for classifiers too."""

    window: tuple[int, ...] | None = None
    """Size of the overlapping windows in pixels (side, or height and width); 0: the whole image at once."""
    stride: tuple[int, ...] | None = None
    """Step between windows, in pixels; two thirds of the window if left out."""
    scales: tuple[float, ...] = ()
    """Average the answers at these scales, for example 0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """Average with the answers to the mirror images."""


def how_to_test(default: Any, seen: WindowOptions) -> Any:
    """`default` (a HowToTest, or None) as the options change it."""
    from volo.inference import segment

    return segment.how_to_test(
        default,
        window=read_size("--window", seen.window, least=0),
        stride=read_size("--stride", seen.stride, least=0),
        scales=seen.scales,
        flip=seen.flip,
    )


def model_and_pictures(model: str, words: tuple[str, ...], checkpoint: str | None) -> tuple[str, list[Path]]:
    """What was meant by MODEL PICTURE..., or by PICTURE... --checkpoint MODEL."""
    from volo.inference.predictor import find_pictures

    if checkpoint is not None:
        model, words = checkpoint, (model, *words)
    return model, find_pictures(words, sys.stdin if "-" in words else ())


def load_model(model: str, how: ModelOptions, device: torch.device, task: Any = None, *, trust: bool = False) -> Any:
    from volo.inference.model_source import load

    return load(
        model,
        task=task,
        img_size=read_size("--img-size", how.img_size),
        crop=None if how.crop is None else read_crop(how.crop, "original", "timm"),
        device=device,
        trust=trust,
    )


def read_crop(crop: str, *words: str) -> Any:
    """--crop as one of `words` or as a share."""
    if crop in words:
        return crop
    try:
        return float(crop)
    except ValueError:
        raise ValueError(f"--crop is {', '.join(words)} or a number such as 0.96; given: {crop!r}") from None


def set_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def open_device(device: str, threads: int = 0) -> torch.device:
    """What --device names, with --threads set."""
    import torch

    set_threads(threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known to torch; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name} was asked for, but torch sees {torch.cuda.device_count()} GPUs here; use --device cpu"
        )
    return chosen
