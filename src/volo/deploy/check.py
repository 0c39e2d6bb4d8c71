"""An exported file against the model it was made from: largest error, top-1, speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volo.config import DataConfig
from volo.data.decode import decode_image
from volo.data.targets import TableTargets
from volo.data.transforms import PixelPipeline, eval_transform, height_width
from volo.inference.exported import ExportedModel, named_outputs

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": None}
"""Largest error as a share of the largest logit; int8 is judged in `volo.deploy.accuracy`."""
PROBABILITY_TOLERANCE = 1e-2
"""Largest error of a probability, of files with their preprocessing inside: resizing may differ by one grey level."""
MAX_IMAGES = 64
ROUNDS = 5


class MismatchError(ValueError):
    """The exported file gives other answers than the model."""


def read_images(paths: Sequence[Path], data: DataConfig) -> Tensor:
    """float32 [N, 3, H, W], prepared as `data` says."""
    transform, pixels = eval_transform(data), PixelPipeline(data).eval()
    return pixels(torch.stack([transform(decode_image(path)) for path in paths]))


def made_images(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    """float32 [count, channels, height, width]: coarse blobs and fine noise, the same every time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, channels, 5, 5, generator=generator)
    fine = torch.randn(count, channels, height, width, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic") + 0.3 * fine


def made_pixels(height: int, width: int, seed: int) -> Tensor:
    """uint8 [1, height, width, 3]."""
    blobs = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(blobs, (height, width), mode="bicubic") * 60 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)


def same_answers(given: Tensor, expected: Tensor, targets: TableTargets | None) -> Tensor:
    """Whether two outputs [B, K, ...] say the same, bool [B, A, ...]: one answer an image (pixel), or those of a table: its
    classes, each of several labels, and numbers, within a tenth of the standard deviation of the training images."""
    if targets is None:
        return (given.argmax(1) == expected.argmax(1))[:, None]
    same = []
    for output, mine, its in zip(targets.outputs, targets.split_logits(given), targets.split_logits(expected)):
        if output.kind == "class":
            same.append((mine.argmax(1) == its.argmax(1))[:, None])
        elif output.kind == "labels":
            same.append((mine > 0) == (its > 0))
        else:
            same.append((mine - its).abs() < 0.1)
    return torch.cat(same, dim=1)


def compare(
    model: nn.Module,
    exported: ExportedModel,
    dtype: str,
    images: Sequence[Tensor],
    least_agreement: float,
    targets: TableTargets | None = None,
) -> list[dict[str, Any]]:
    """One row for each batch of `images`: its shape, largest error absolute and relative, share of equal answers
    (`same_answers`).

    Raises MismatchError for an error above `TOLERANCE`, where more answers differ than `least_agreement` allows (an answer
    that the error could turn is not counted), and for values that are not finite.
    """
    kept: list[Tensor] = []
    rows, tolerance = [], TOLERANCE[dtype]
    for batch in images:
        with torch.inference_mode():
            wanted = named_outputs(model(batch))
        got = named_outputs(exported(batch)).values()
        row: dict[str, Any] = {
            "shape": list(batch.shape),
            "max_error": 0.0,
            "relative_error": 0.0,
            "top1_agreement": 1.0,
        }
        where = f"on images {' x '.join(map(str, batch.shape))}"
        for (name, expected), given in zip(wanted.items(), got, strict=True):
            expected = expected.float()
            if not expected.isfinite().all():
                raise ValueError(
                    f"the model itself gives values that are not finite (NaN or infinity) {where}: its weights are damaged"
                )
            if given.shape != expected.shape or not given.isfinite().all():
                what = "values that are not finite" if given.shape == expected.shape else f"shape {tuple(given.shape)}"
                raise MismatchError(
                    f"the exported file gives {what} as {name} {where}; the model gives {tuple(expected.shape)}"
                )
            if expected.dim() == 1:
                expected, given = expected[:, None], given[:, None]
            error, scale = float((given - expected).abs().max()), float(expected.abs().max())
            top = expected.topk(min(2, expected.shape[1]), dim=1).values
            margin = top[:, 0] - top[:, -1]
            is_same = same_answers(given, expected, targets)
            if targets is None:  # those of a table have no margin in common: their error decides
                kept.append((is_same[:, 0] | (margin < 2 * (tolerance or 0.0) * scale)).flatten())
            row["max_error"] = max(row["max_error"], error)
            row["relative_error"] = max(row["relative_error"], error / max(scale, 1e-12))
            row["top1_agreement"] = min(row["top1_agreement"], float(is_same.float().mean()))
            if tolerance is not None and error > tolerance * scale:
                raise MismatchError(
                    f"the exported file differs from the model by {error:.3g} in {name} {where}, {error / max(scale, 1e-12):.2g} of "
                    f"the largest; {dtype} allows {tolerance:g}. No file was written"
                )
        rows.append(row)
    agreement = float(torch.cat(kept).float().mean()) if kept else 1.0
    if agreement < least_agreement:
        raise MismatchError(
            f"the exported file gives the model's answer to {100 * agreement:.1f} % of the images, and at least "
            f"{100 * least_agreement:g} % are asked for. No file was written"
        )
    return rows


def compare_pixels(
    model: nn.Module, exported: ExportedModel, data: DataConfig, pictures: Iterable[Tensor], tolerance: float
) -> dict[str, Any]:
    """The same for a file that takes uint8 pixels [1, H, W, 3], against preprocessing, model and softmax."""
    transform, pixels = eval_transform(data), PixelPipeline(data).eval()
    worst, same, count, shapes = 0.0, 0, 0, []
    for picture in pictures:
        with torch.inference_mode():
            wanted = named_outputs(model(pixels(transform(picture[0].permute(2, 0, 1))[None])))
        got = list(named_outputs(exported(picture)).values())
        for expected, given in zip(wanted.values(), got, strict=True):
            worst = max(worst, float((given - expected.float().softmax(-1)).abs().max()))
        same += int(got[0].argmax() == next(iter(wanted.values())).argmax())
        count += 1
        shapes.append(list(picture.shape))
        if not worst <= tolerance:
            raise MismatchError(
                f"the exported file gives probabilities that differ from the model's by {worst:.3g} for pixels "
                f"{' x '.join(map(str, picture.shape))}; {tolerance:g} is allowed. No file was written"
            )
    return {"shapes": shapes[:5], "images": count, "max_error": worst, "top1_agreement": same / max(count, 1)}


def milliseconds(candidates: dict[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
    """Median time of one call of each, in turns. An indication: nobody keeps the machine quiet meanwhile."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for name, run in candidates.items():
                begin = time.perf_counter()
                run(images)
                if turn:  # the first call prepares
                    times[name].append(1000 * (time.perf_counter() - begin))
    return {name: round(statistics.median(t), 3) for name, t in times.items()}


def example_images(
    data: DataConfig, free: frozenset[str], multiple: int, batch: int, real: Tensor | None, channels: int = 3
) -> list[Tensor]:
    """Batches to compare on: real images if there are any, batch 1 and 8, and another size that is not square."""
    height, width = height_width(data.img_size)
    images = made_images(8, height, width, channels) if real is None else real
    if "batch" not in free:
        return [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)][:8]
    batches = [images[:1], *images.split(8)]
    if "size" in free:
        batches.append(made_images(2, height + 2 * multiple, max(width - multiple, 2 * multiple), channels))
    return batches
