"""Images of a run: loss and accuracy over time, who is taken for whom, what was seen in which image."""

from __future__ import annotations

import contextlib
import json
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

try:
    import matplotlib
except ValueError:  # of a backend that is not here, such as that of a notebook which started this process
    _settings = {name: os.environ.pop(name) for name in ("MPLBACKEND", "MATPLOTLIBRC") if name in os.environ}
    try:
        import matplotlib
    finally:
        os.environ.update(_settings)
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from PIL import Image

from volo.data.files import write_atomically
from volo.data.mask_values import is_background

BLUE, ORANGE, GREEN, RED, INK, GREY, PALE = "#2563ab", "#e07b22", "#2e8b57", "#c23b3b", "#22282f", "#8a929b", "#e7eaee"
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#c4cad1",
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "xtick.color": "#5a636d",
    "ytick.color": "#5a636d",
    "legend.frameon": False,
    "figure.facecolor": "white",
}
# White to blue, light enough for black figures up to the middle.
_SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#d3e3f3", "#7fb0dc", "#2f74b5", "#123f70"])

# Up to so many classes the matrix has a figure in every cell, and names at its sides; above, names would be dust.
MAX_FIGURES, MAX_NAMES = 20, 60


@dataclass(frozen=True)
class SheetItem:
    """One image of a prediction sheet."""

    image: Tensor | np.ndarray
    """uint8 [3, H, W], any size."""
    top: Sequence[tuple[str, float]]
    """Classes and probabilities, most probable first."""
    name: str = ""
    truth: str | None = None
    """Where it is known the answer is shown in green or red."""


SCORES = {
    "score": "score",
    "top1": "top-1",
    "miou": "mIoU",
    "map": "mAP",
    "r2": "R²",
    "mean_class_accuracy": "mean of classes",
    "f1_macro": "macro F1",
}
"""Figures of an evaluation that are drawn as curves; the first that a run has is its score."""


def training_curves(metrics: str | Path, out: str | Path) -> None:
    """Draw loss, score (top-1, or mIoU) and learning rate of a run from its metrics.jsonl as a PNG.

    Raises FileNotFoundError, and ValueError where the file holds no steps. A last line that was cut off is left out.
    """
    steps, evaluations = _read_metrics(Path(metrics))
    if not steps and not evaluations:
        raise ValueError(f"{metrics} holds no steps yet, so there is no curve to draw")
    with _figure(out, "training curves", 13.5, 3.9) as figure:
        figure.get_layout_engine().set(wspace=0.06)
        loss, accuracy, rate = figure.subplots(1, 3)
        x = [line["epoch"] for line in steps]
        losses = [_number(line["loss"]) for line in steps]
        if steps:
            if len(steps) > 50:
                loss.plot(x, losses, color=BLUE, alpha=0.2, linewidth=0.8)
            loss.plot(x, _smooth(losses), color=BLUE, linewidth=1.8, label="training")
            rate.plot(x, [line["lr"] for line in steps], color=BLUE, linewidth=1.8)
        marker = {"marker": "o", "markersize": 3.5, "clip_on": False} if len(evaluations) <= 40 else {}
        ex = [line["epoch"] for line in evaluations]
        held_out = [_number(line["loss"]) for line in evaluations]
        if evaluations:
            loss.plot(ex, held_out, color=ORANGE, linewidth=1.8, label="held out", **marker)
            keys = [key for key in SCORES if all(key in line for line in evaluations)]
            scores = {key: [100 * _number(line[key]) for line in evaluations] for key in keys}
            for key, color, dashes in zip(keys, (ORANGE, GREY), ("-", "--")):
                values = scores[key]
                accuracy.plot(ex, values, color=color, linewidth=1.8, linestyle=dashes, label=SCORES[key], **marker)
            of_score = scores[keys[0]]
            best = int(np.nanargmax(of_score)) if np.isfinite(of_score).any() else 0
            top = of_score[best]
            accuracy.axhline(top, color=GREY, linewidth=0.8, linestyle=":")
            accuracy.plot(
                [ex[best]],
                [top],
                "o",
                color=ORANGE,
                markeredgecolor="white",
                markersize=9,
                clip_on=False,
                zorder=3,
            )
            accuracy.set_title(f"Held-out {SCORES[keys[0]]}: best {top:.2f} %")
            known = [value for values in scores.values() for value in values if math.isfinite(value)] or [0.0]
            accuracy.set_ylim(max(0.0, min(min(known) - 4, 96)), min(101.0, max(known) + 6))
            accuracy.legend(loc="lower right")
        else:
            accuracy.set_title("Held-out score")
            _say(accuracy, "not evaluated yet")
        loss.set_title("Loss")
        drawn = [value for value in (*_smooth(losses), *held_out) if math.isfinite(value)]
        if losses and drawn:
            # A first step far above all others would press the curve flat.
            loss.set_ylim(0, max(1.15 * np.quantile(drawn, 0.995), 1e-3))
        loss.legend(loc="upper right")
        rate.set_title("Learning rate")
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        rate.set_ylim(bottom=0)
        end = max([*x, *ex])
        for axes in (loss, accuracy, rate):
            axes.set_xlabel("epoch")
            axes.set_xlim(0, end if end > 0 else 1)
            axes.grid(visible=True)


def confusion_matrix(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], out: str | Path, unit: str = "images"
) -> None:
    """Draw a confusion matrix (rows: truth, columns: prediction, counts of `unit`) as a PNG.

    Colours are shares of each row; so are the figures in the cells, in percent, where what was counted is not images.
    Above 60 classes the names give way to a list of the most frequent confusions.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    K = len(classes)
    if counts.shape != (K, K):
        raise ValueError(f"{K} classes need a {K} x {K} matrix; given: {' x '.join(map(str, counts.shape))}")
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    share_right = counts.trace() / max(counts.sum(), 1)
    names = _Names(classes)
    labels = [names(name, 24) for name in classes]
    title = f"{100 * share_right:.2f} % of {counts.sum():,} {unit} right"
    if K > MAX_NAMES:
        with _figure(out, "confusion matrix", 14, 7, names) as figure:
            matrix, bars = figure.subplots(1, 2, width_ratios=[1.15, 1])
            # One confusion among hundreds of classes is less than a pixel: a spot shows the largest share of a block of
            # classes, and the square root darkens it.
            block = -(-K // 200)
            padded = np.pad(shares, (0, -K % block))
            spots = padded.reshape(len(padded) // block, block, -1, block).max(axis=(1, 3))
            edges = (-0.5, len(padded) - 0.5)
            matrix.imshow(np.sqrt(spots), cmap=_SHARES, vmin=0, vmax=1, extent=(*edges, *edges[::-1]))
            matrix.set_xlim(-0.5, K - 0.5)
            matrix.set_ylim(K - 0.5, -0.5)
            matrix.set_anchor("N")
            matrix.set_xlabel("predicted class (number)")
            matrix.set_ylabel("true class (number)")
            matrix.set_title(title)
            _draw_confusions(bars, counts, labels, unit)
        return
    longest = max(map(len, labels))
    side = max(3.2, 0.42 * K if K <= MAX_FIGURES else 0.22 * K)
    width, height = side + 1.4 + 0.085 * longest, side + 1.1 + 0.075 * longest
    with _figure(out, "confusion matrix", width, height, names) as figure:
        axes = figure.subplots()
        drawn = axes.imshow(shares, cmap=_SHARES, vmin=0, vmax=1)
        size = 10 if K <= MAX_FIGURES else 7
        slanted = longest > 3
        axes.set_xticks(
            range(K),
            labels,
            rotation=45 if slanted else 0,
            ha="right" if slanted else "center",
            rotation_mode="anchor",
            fontsize=size,
            parse_math=False,
        )
        axes.set_yticks(range(K), labels, fontsize=size, parse_math=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(title)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(K + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(K + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=PALE, linewidth=0.8)
        axes.tick_params(which="minor", length=0)
        if K <= MAX_FIGURES:
            for row, column in zip(*counts.nonzero()):
                axes.text(
                    column,
                    row,
                    f"{counts[row, column]}" if unit == "images" else _in_percent(shares[row, column]),
                    ha="center",
                    va="center",
                    fontsize=9 if counts.max() < 1000 else 7,
                    color="white" if shares[row, column] > 0.6 else INK,
                )
        bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.03, format=lambda v, _: f"{100 * v:.0f} %")
        bar.outline.set_visible(False)
        bar.set_label("share of the true class")


def prediction_sheet(items: Sequence[SheetItem], out: str | Path, columns: int = 0) -> None:
    """Draw images with their most probable classes (up to three) as bars, as a PNG.

    columns: 0 chooses from the number of images. Raises ValueError for an empty sheet.
    """
    if not items:
        raise ValueError("a prediction sheet needs at least one image that could be read")
    columns = min(columns or max(4, min(8, math.ceil(math.sqrt(1.6 * len(items))))), len(items))
    rows = math.ceil(len(items) / columns)
    num_bars = max(1, max(min(3, len(item.top)) for item in items))
    lines = num_bars + any(item.truth is not None for item in items)  # of text below an image
    bar_height = 0.27 * (lines + 0.3)
    shown = [name for item in items for name in (item.name, item.truth or "", *(name for name, _ in item.top))]
    names = _Names(dict.fromkeys(shown))
    width, height = 2.15 * columns + 0.2, rows * (2.0 + bar_height + 0.35) + 0.1
    with _figure(out, "prediction sheet", width, height, names) as figure:
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.05, hspace=0.02, wspace=0.02)
        ratios = [2.0, bar_height] * rows
        grid = figure.subplots(2 * rows, columns, height_ratios=ratios, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for i, item in enumerate(items):
            row, column = divmod(i, columns)
            picture, bars = grid[2 * row, column], grid[2 * row + 1, column]
            _draw_picture(picture, item, names)
            _draw_bars(bars, item, names, num_bars, lines)


def _draw_picture(axes: Axes, item: SheetItem, names: _Names) -> None:
    image = np.asarray(item.image).transpose(1, 2, 0)
    # Pixels of tiny images are shown as they are; a blur would look like a fault of the image.
    axes.imshow(image, interpolation="nearest" if max(image.shape[:2]) < 100 else "antialiased")
    # All images get the same square, whatever their shape.
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, facecolor="#f3f5f7", zorder=-1))
    H, W = image.shape[:2]
    half = max(H, W) / 2
    axes.set_xlim((W - 1) / 2 - half, (W - 1) / 2 + half)
    axes.set_ylim((H - 1) / 2 + half, (H - 1) / 2 - half)
    if item.name:
        axes.set_title(
            names(item.name, 26, keep_end=True), fontsize=7.5, fontweight="normal", color=GREY, pad=3, loc="center"
        ).set_parse_math(False)


@dataclass(frozen=True)
class Caption:
    """What stands at one image of a captioned sheet."""

    name: str
    """Above the image; its end is shown where it is too long."""
    lines: Sequence[tuple[str, str]] = ()
    """Below it: text, and a colour of this module or "" for the usual one."""


def captioned_sheet(
    images: Iterable[Tensor | np.ndarray],
    captions: Sequence[Caption],
    out: str | Path,
    *,
    kind: str,
    heading: str,
    together: int = 1,
    most: int = 0,
) -> None:
    """Draw images with captions as a PNG.

    Args:
        images: uint8 [3, H, W] of any size, one for every caption; each is taken when its place is drawn, and reduced to
            what the sheet shows, so that a generator need not hold more than one.
        kind: the title in the file's metadata (`volo.cli.outputs.is_figure`).
        heading: the title that is drawn; long ones are wrapped.
        together: images of a group, which stand side by side with a gap after them.
        most: groups in a row; 0 chooses.

    Raises ValueError for an empty sheet, and where the captions are no whole number of groups.
    """
    if not captions or len(captions) % together:
        raise ValueError(f"a sheet needs at least one group of {together} images; given: {len(captions)} images")
    groups = len(captions) // together
    across = min(groups, most or max(1, min(8, math.ceil(math.sqrt(1.6 * len(captions)))) // together))
    rows = math.ceil(groups / across)
    lines = max(len(caption.lines) for caption in captions)
    text_height = 0.2 * (lines + 0.3)
    gap = 0.12 if together > 1 else 0.0
    ratios = ([1.0] * together + [gap]) * across if gap else [1.0] * across
    width, height = 2.15 * sum(ratios) + 0.2, rows * (2.0 + text_height + 0.35)
    wrapped = textwrap.fill(" ".join(heading.split()), max(24, int(width * 9.5)))
    height += 0.25 * (wrapped.count("\n") + 1) + 0.2
    names = _Names(
        dict.fromkeys(text for caption in captions for text in (caption.name, *(text for text, _ in caption.lines)))
    )
    with _figure(out, kind, width, height, names) as figure:
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, hspace=0.02, wspace=0.0)
        figure.suptitle(wrapped, x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)
        heights = [2.0, text_height] * rows
        grid = figure.subplots(2 * rows, len(ratios), height_ratios=heights, width_ratios=ratios, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        stride = together + bool(gap)
        for i, (caption, image) in enumerate(zip(captions, images)):
            group, place = divmod(i, together)
            row, column = divmod(group, across)
            x = column * stride + place
            _draw_picture(grid[2 * row, x], SheetItem(thumbnail(image), (), caption.name), names)
            text = grid[2 * row + 1, x]
            text.set_xlim(0, 1)
            text.set_ylim(lines - 0.3, -0.6)
            for number, (line, colour) in enumerate(caption.lines):
                shown = names(line, 26)
                text.text(
                    0.5, number, shown, ha="center", va="center", fontsize=8.5, color=colour or INK, parse_math=False
                )


def thumbnail(image: Tensor | np.ndarray, most: int = 400) -> np.ndarray:
    """uint8 [3, H, W] -> the same with its longer side of at most `most` pixels."""
    array = np.asarray(image)
    H, W = array.shape[1:]
    scale = most / max(H, W)
    if scale >= 1:
        return array.copy()
    size = max(1, round(W * scale)), max(1, round(H * scale))
    reduced = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))).resize(size, Image.Resampling.BOX)
    return np.asarray(reduced).transpose(2, 0, 1)


def class_bars(
    iou: Sequence[float | None],
    classes: Sequence[str],
    colours: Sequence[Sequence[int]],
    out: str | Path,
    boundary: Sequence[float | None] = (),
) -> None:
    """Draw the IoU of every class as bars in the classes' colours, best first, and boundary IoU as ticks, as a PNG.

    None stands for a class that does not occur: it is left out. Raises ValueError where nothing occurs.
    """
    known = [i for i, value in enumerate(iou) if value is not None]
    if not known:
        raise ValueError("no class occurs, so there are no bars to draw")
    order = sorted(known, key=lambda i: -(iou[i] or 0.0))
    mean = sum(iou[i] or 0.0 for i in known) / len(known)
    rows = min(len(order), 40)
    columns = -(-len(order) // rows)
    names = _Names(classes)
    longest = max(len(names(classes[i], 24)) for i in order)
    width, height = columns * (5.2 + 0.075 * longest), 0.27 * rows + 1.3
    with _figure(out, "IoU of classes", width, height, names) as figure:
        grid = figure.subplots(1, columns, squeeze=False)[0]
        for column, axes in enumerate(grid):
            part = order[column * rows : (column + 1) * rows]
            for row, i in enumerate(part):
                value = 100 * (iou[i] or 0.0)
                axes.barh(row, value, height=0.74, color=[c / 255 for c in colours[i]], edgecolor=INK, linewidth=0.5)
                axes.text(value + 1.2, row, f"{value:.1f}", va="center", fontsize=8.5)
                if len(boundary) and boundary[i] is not None:
                    axes.plot([100 * (boundary[i] or 0.0)] * 2, [row - 0.37, row + 0.37], color=INK, linewidth=2.4)
                    axes.plot([100 * (boundary[i] or 0.0)] * 2, [row - 0.37, row + 0.37], color="white", linewidth=1.2)
            axes.axvline(100 * mean, color=GREY, linewidth=0.9, linestyle=":")
            axes.set_yticks(range(len(part)), [names(classes[i], 24) for i in part], fontsize=9, parse_math=False)
            axes.set_ylim(rows - 0.4, -0.6)
            axes.set_xlim(0, 108)
            axes.set_xticks(range(0, 101, 20))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x")
        grid[0].set_title(f"IoU of each class, mean {100 * mean:.2f} % (dotted)")
        if len(boundary):
            grid[0].set_xlabel("white ticks: IoU of the band along boundaries")


@dataclass(frozen=True)
class OverlayItem:
    """One image of an overlay sheet."""

    image: Tensor | np.ndarray
    """uint8 [3, H, W]."""
    predicted: np.ndarray
    """uint8 [H, W], the class of each pixel."""
    truth: np.ndarray | None = None
    """The same by hand, 255 for void, which is shown black."""
    name: str = ""


def overlay_sheet(
    items: Sequence[OverlayItem], classes: Sequence[str], colours: Sequence[Sequence[int]], out: str | Path
) -> None:
    """Draw images, the truth where it is known, and what a model saw, side by side with a legend, as a PNG. A background
    has no colour.

    Raises ValueError for an empty sheet.
    """
    if not items:
        raise ValueError("an overlay sheet needs at least one image that could be read")
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = np.asarray(colours, np.uint8)
    plain = 0 if classes and is_background(classes[0]) else -1
    columns = 3 if any(item.truth is not None for item in items) else 2
    seen = np.zeros(256, np.int64)
    for item in items:
        for labels in (item.predicted, item.truth):
            seen += np.bincount(labels.ravel(), minlength=256) if labels is not None else 0
    shown = sorted((i for i in range(len(classes)) if seen[i]), key=lambda i: -seen[i])[:28]
    aspect = max(item.predicted.shape[0] / item.predicted.shape[1] for item in items)
    width = 3.9
    legend_rows = -(-(len(shown) + (columns == 3)) // (2 * columns))
    height = len(items) * (0.97 * width * aspect + 0.17) + 0.28 * legend_rows + 0.3
    names = _Names([*classes, *(item.name for item in items)])
    with _figure(out, "overlays", width * columns, height, names) as figure:
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0.01, wspace=0.01)
        grid = figure.subplots(len(items), columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for row, item in zip(grid, items):
            image = np.asarray(item.image).transpose(1, 2, 0)
            layers = [None, *([item.truth] if columns == 3 else []), item.predicted]
            for axes, labels, what in zip(row, layers, ["", *(["truth"] if columns == 3 else []), "prediction"]):
                axes.imshow(image)
                if labels is not None:
                    axes.imshow(table[labels], alpha=np.where(labels == plain, 0, 0.68), interpolation="nearest")
                title = axes.set_title(
                    what or names(item.name, 48, keep_end=True), fontsize=8, fontweight="normal", color=GREY, pad=2
                )
                title.set_parse_math(False)
        patches = [
            Rectangle(
                (0, 0),
                1,
                1,
                facecolor="none" if i == plain else [c / 255 for c in colours[i]],
                edgecolor=INK,
                linewidth=0.5,
            )
            for i in shown
        ]
        entries = [names(classes[i], 22) for i in shown]
        if columns == 3:
            patches.append(Rectangle((0, 0), 1, 1, facecolor="black"))
            entries.append("void")
        legend = figure.legend(patches, entries, loc="outside lower center", ncols=2 * columns, fontsize=8.5)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_bars(axes: Axes, item: SheetItem, names: _Names, num_bars: int, lines: int) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(lines - 0.3, -0.6)
    color = BLUE if item.truth is None else GREEN if item.top and item.top[0][0] == item.truth else RED
    for rank, (name, probability) in enumerate(item.top[:num_bars]):
        axes.barh(rank, 1, height=0.82, color=PALE)
        axes.barh(rank, probability, height=0.82, color=color, alpha=0.42 if rank == 0 else 0.22)
        style: dict[str, Any] = {"va": "center", "fontsize": 8.5, "fontweight": "bold" if rank == 0 else "normal"}
        axes.text(0.025, rank, names(name, 17 if rank == 0 else 19), parse_math=False, **style)
        axes.text(0.975, rank, f"{100 * probability:.0f} %", ha="right", **style)
    if color == RED:
        axes.text(
            0.025,
            num_bars,
            f"really: {names(item.truth or '', 18)}",
            va="center",
            fontsize=8.5,
            color=RED,
            parse_math=False,
        )


def _in_percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.005 else ""


def _draw_confusions(axes: Axes, counts: np.ndarray, labels: Sequence[str], unit: str, most: int = 24) -> None:
    """Horizontal bars of the largest entries off the diagonal."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None)[::-1][:most]
    pairs = [(t, p) for t, p in zip(*np.unravel_index(order, wrong.shape)) if wrong[t, p]]
    axes.set_title("Most frequent confusions (true → predicted)")
    if not pairs:
        _say(axes, "none")
        return
    values = [wrong[t, p] for t, p in pairs]
    axes.barh(range(len(pairs)), values, color=ORANGE, height=0.7)
    axes.set_yticks(range(len(pairs)), [f"{labels[t]} → {labels[p]}" for t, p in pairs], fontsize=8, parse_math=False)
    axes.set_ylim(most - 0.5, -0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_yticks([])


@contextlib.contextmanager
def _figure(out: str | Path, title: str, width: float, height: float, names: _Names | None = None) -> Iterator[Figure]:
    """A figure in our style (inches), whatever matplotlib is set to, written to `out` as a whole or not at all."""
    out = Path(out)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | ({"font.family": names.families} if names else {}))
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        out.parent.mkdir(parents=True, exist_ok=True)
        if names is not None and names.numbers:
            beside = out.with_name(f"{out.stem}.names.txt")
            figure.supxlabel(
                f"names that no font here can draw: {beside.name}", fontsize=8, color=GREY, parse_math=False
            )
            lines = (f"#{number} {name}\n" for name, number in names.numbers.items())
            write_atomically(beside, lambda file: file.write("".join(lines).encode(errors="backslashreplace")))
        # Long sheets stay below 30 megapixels.
        dpi = min(150, int(math.sqrt(3e7 / (width * height))))
        how: dict[str, Any] = {"dpi": dpi, "bbox_inches": "tight", "pad_inches": 0.12}
        how["metadata"] = {"Software": "volo", "Title": title}
        write_atomically(out, lambda file: figure.savefig(file, format="png", **how))


class _Names:
    """Names as they can be drawn here: in fonts that have their characters, or else as numbers, which a file explains."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        missing = {c for name in names for c in " ".join(name.split())}
        self.families: list[str] = []
        # The font of last resort has a box for everything.
        regular = [
            f for f in fontManager.ttflist if (f.style, f.weight) == ("normal", 400) and "LastResort" not in f.fname
        ]
        for font in sorted(regular, key=lambda font: (font.name != "DejaVu Sans", font.name, font.fname)):
            if not missing:
                break
            try:
                found = missing & set(map(chr, FT2Font(font.fname).get_charmap()))
            except (OSError, RuntimeError):  # moved since matplotlib made its list, or broken
                continue
            if found or not self.families:
                self.families.append(font.name)
                missing -= found
        self.families = self.families or ["DejaVu Sans"]
        self.numbers = {name: number for number, name in enumerate(names) if missing & set(name)}

    def __call__(self, name: str, width: int, keep_end: bool = False) -> str:
        if name in self.numbers:
            return f"#{self.numbers[name]}"
        name = " ".join(name.split())
        if len(name) <= width:
            return name
        return "…" + name[1 - width :] if keep_end else name[: width - 1] + "…"


def _read_metrics(path: Path) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Lines of steps and lines of evaluations."""
    steps: list[Mapping[str, Any]] = []
    evaluations: list[Mapping[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if values["kind"] == "eval":
            evaluations.append(values)
        elif values.get("loss") is not None:  # a step that fp16 skipped has none
            steps.append(values)
    return steps, evaluations


def _number(value: float | None) -> float:
    """NaN, which leaves a gap in a curve, for all that is not finite."""
    return value if value is not None and math.isfinite(value) else math.nan


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean of the finite ones over the thirtieth of the run around each step, as far as there are steps."""
    half, n = len(values) // 60, len(values)
    first, end = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(finite, values, 0.0), finite))
    count = counts[end] - counts[first]
    return np.where(count > 0, sums[end] - sums[first], np.nan) / np.maximum(count, 1)
