"""What int8 costs, and which layers have to stay in floating point so that it costs no more than is allowed.

One guard for every way to quantise (`volo.deploy.quantize`). Three kinds of images are kept apart: those that activations
are calibrated on, on which layers are ranked too; those that the result is judged on; and, where there are too few for both,
it is said that they are the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from volo.config import DataConfig
from volo.data.classes import match_classes
from volo.data.decode import decode_image
from volo.data.images import open_data
from volo.data.masks import open_split
from volo.data.tables import is_table, open_all_table, open_targets
from volo.data.targets import TableTargets
from volo.data.transforms import PixelPipeline, eval_transform
from volo.deploy.check import MismatchError, same_answers
from volo.deploy.quantize import Quantizer
from volo.inference.evaluate import open_labelled
from volo.inference.model_source import LoadedModel
from volo.inference.predictor import find_pictures
from volo.inference.runtimes import Run, named_outputs

CALIBRATED, RANKED, JUDGED = 64, 16, 512
"""At most so many images."""
APART = 16
"""From so many on, some calibrate and the others judge."""
MOST = 0.5
"""With more of its layers in floating point, a file is no int8 file."""
SHARE = 0.95
"""Layers of the blocks with this share of the whole error are tried one by one."""
FEW = 8
"""Of up to so many layers, each is tried without."""

Say = Callable[[str], None]


# ---- images ----


@dataclass(frozen=True)
class Images:
    """Some images of a source, as a file takes them."""

    load: Callable[[int], Tensor]
    """Number -> uint8 [3, H, W]."""
    numbers: Sequence[int]
    what: str
    """For people: how many of which."""
    labels: Tensor | None = None
    """int64 [N], classes of the model."""

    def few(self, most: int) -> Images:
        """Up to `most` of them, spread over all."""
        step = -(-len(self.numbers) // most)
        return dataclasses.replace(
            self, numbers=self.numbers[::step], labels=None if self.labels is None else self.labels[::step]
        )


@dataclass(frozen=True)
class Feed:
    """Inputs of a file, batch by batch: float32 [B, 3, H, W], or uint8 [1, H, W, 3] where it prepares images itself."""

    images: Images
    data: DataConfig
    batch: int
    """Of a file whose batch is fixed, exactly that: what does not fill a last one is left out."""
    is_fixed: bool
    pixels: bool

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(
                f"a file for batches of {self.batch} is tried in such batches, and these are {self.images.what}: "
                "give more with --data, or export with --dynamic batch"
            )

    @cached_property
    def _prepared(self) -> Tensor:
        """uint8 [N, 3, H, W], a quarter of what they take as float32."""
        transform = eval_transform(self.data)
        return torch.stack([transform(self.images.load(i)) for i in self.images.numbers])

    def __len__(self) -> int:
        """Images."""
        count = len(self.images.numbers)
        return count - count % self.batch if self.is_fixed and not self.pixels else count

    @property
    def labels(self) -> Tensor | None:
        return None if self.images.labels is None else self.images.labels[: len(self)]

    def __iter__(self) -> Iterator[Tensor]:
        if self.pixels:
            yield from (self.images.load(i).permute(1, 2, 0)[None].contiguous() for i in self.images.numbers)
            return
        prepare = PixelPipeline(self.data).eval()
        yield from (prepare(part) for part in self._prepared[: len(self)].split(self.batch))


def has_own_images(loaded: LoadedModel[Any]) -> bool:
    """Whether the model knows the images it was trained on."""
    return loaded.recipe is not None and (bool(loaded.preprocessing.path) or loaded.preprocessing.kind != "auto")


def find_images(loaded: LoadedModel[Any], data: str | Path | None) -> tuple[Images, Images]:
    """Images to calibrate with, and images to judge by.

    Of the model's own data (`data` is None, or the same place) training images and held-out ones. Of anything else, every
    fourth image and the others; labelled where they lie in folders of the model's classes, or as `volo evaluate` takes them.
    Raises ValueError where there are none.
    """
    own = _opened_as(loaded.preprocessing)
    where = Path(own.path).expanduser()
    if has_own_images(loaded) and (data is None or (own.path and Path(data).expanduser().resolve() == where.resolve())):
        return _own_images(loaded, own)
    if data is None:
        raise ValueError(
            "int8 is calibrated on images and judged by its answers to others, and this model does not know those that it was "
            "trained on: give some with --data FOLDER (data=...)"
        )
    found = images_at(loaded, data)
    load, everything, labels = found.load, found.numbers, found.labels
    if len(everything) < APART:
        both = dataclasses.replace(found, what=f"all {len(everything)} images of {found.what}")
        return both, both
    calibration = list(everything[::4])
    others = [i for i in everything if i % 4]
    return (
        _chosen(load, calibration, CALIBRATED, f"images of {found.what}", None),
        _chosen(load, others, JUDGED, f"other images of {found.what}", None if labels is None else labels[others]),
    )


def images_at(loaded: LoadedModel[Any], data: str | Path) -> Images:
    """All images of any place: labelled data as `volo evaluate` takes it, with its classes if they are those of the model;
    those that have masks, for a segmentation model; those of a table; else files, folders and globs. `what` is the place.

    Raises ValueError and FileNotFoundError where there are none.
    """
    own = _opened_as(loaded.preprocessing)
    if loaded.task == "classify" and loaded.classes:
        try:
            found = open_labelled(data, own, loaded.classes, loaded.wnids)
            labels = _classes(found.source.targets, found.class_map)
            return Images(found.source.load, range(len(found.source)), found.what, labels)
        except ValueError:  # no folders of these classes: images alone
            pass
    if loaded.task == "segment":
        segment = dataclasses.replace(loaded.segment, layout="auto", num_classes=0, object_value=-1)
        known = (loaded.classes, loaded.colours)
        config = dataclasses.replace(own, path=str(data))
        try:  # masks are no images to try a model on
            masked, _ = open_split(
                config, segment, segment.val_split, known=known, learned=loaded.object_value, draw=False
            )
            return Images(lambda i: masked.load(i)[0], range(len(masked)), str(data))
        except ValueError:  # images alone
            pass
    if is_table(Path(data)):
        targets = loaded.targets if loaded.task == "table" else None
        rows, _ = open_all_table(dataclasses.replace(own, path=str(data), kind="auto", splits="auto"), targets)
        return Images(rows.load, range(len(rows)), str(data))
    paths = find_pictures([str(data)])
    return Images(lambda i: decode_image(paths[i]), range(len(paths)), str(data))


def _opened_as(data: DataConfig) -> DataConfig:
    """The data of a model, for a look at a few of its images: not all are tried again, unless some were left out."""
    return dataclasses.replace(data, check=data.check if data.on_bad_image == "skip" else "off", cache="none")


def _own_images(loaded: LoadedModel[Any], data: DataConfig) -> tuple[Images, Images]:
    what = data.path or data.kind
    if data.path and not Path(data.path).expanduser().exists():
        raise ValueError(
            f"the images that this model was trained on are not at {what} any more: give some with --data FOLDER (data=...)"
        )
    if loaded.task == "segment":
        known = (loaded.classes, loaded.colours)
        parts = [
            open_split(data, loaded.segment, split, known=known, learned=loaded.object_value)[0]
            for split in (loaded.segment.train_split, loaded.segment.val_split)
        ]
        loads: list[Callable[[int], Tensor]] = [(lambda i, part=part: part.load(i)[0]) for part in parts]  # type: ignore[misc]
        labels = None
    elif loaded.task == "table":
        rows = open_targets(data, loaded.targets)
        parts, loads, labels = [rows.train, rows.val], [rows.train.load, rows.val.load], None  # type: ignore[list-item]
    else:
        splits = open_data(data)
        parts, loads = [splits.train, splits.val], [splits.train.load, splits.val.load]  # type: ignore[list-item]
        is_same = splits.classes == tuple(loaded.classes)
        class_map = None if is_same else match_classes(splits.classes, loaded.classes)
        labels = _classes(splits.val.targets, class_map)
    return (
        _chosen(loads[0], range(len(parts[0])), CALIBRATED, f"training images of {what}", None),
        _chosen(loads[1], range(len(parts[1])), JUDGED, f"held-out images of {what}", labels),
    )


def _chosen(
    load: Callable[[int], Tensor], numbers: Sequence[int], most: int, what: str, labels: Tensor | None
) -> Images:
    few = Images(load, numbers, what, labels).few(most)
    count = f"{len(few.numbers):,} of {len(numbers):,}" if len(few.numbers) < len(numbers) else f"{len(numbers):,}"
    return dataclasses.replace(few, what=f"{count} {what}")


def _classes(targets: Tensor, class_map: Sequence[int] | None) -> Tensor:
    return targets if class_map is None else torch.tensor(class_map)[targets]


# ---- the judge ----


@dataclass(frozen=True)
class Score:
    """Of a file, against the model it was made from."""

    agreement: float
    """Share of equal answers; of a segmentation model, of pixels."""
    error: float
    """Of the logits: root of the mean square, relative to that of the model's."""
    top1: float | None = None
    """Share of right answers, where labels are known."""

    def to_dict(self) -> dict[str, float]:
        figures = {"agreement": 100 * self.agreement, "logit_error": self.error}
        return figures | ({} if self.top1 is None else {"top1": 100 * self.top1})


@dataclass(frozen=True)
class Judge:
    """Holds files against the model's own answers to the same inputs; of several outputs, the first ones."""

    feed: Feed
    expected: list[Tensor]
    targets: TableTargets | None
    max_drop: float
    """Percent of the answers, or, where labels are known, of the accuracy."""
    max_changed: float | None = None
    """Percent of the answers, right or wrong, whether labels are known or not."""

    @classmethod
    def of(
        cls, model: nn.Module, feed: Feed, max_drop: float, max_changed: float | None, targets: TableTargets | None
    ) -> Judge:
        with torch.inference_mode():
            return cls(feed, [_first(model(x)) for x in feed], targets, max_drop, max_changed)

    @property
    def before(self) -> float | None:
        """Accuracy of the model itself."""
        return self._top1([expected.argmax(1) for expected in self.expected])

    def score(self, run: Callable[[Tensor], Any]) -> Score:
        same, square, whole, answers = [], 0.0, 0.0, []
        for inputs, expected in zip(self.feed, self.expected, strict=True):
            given = _first(run(inputs))
            same.append(same_answers(given, expected, self.targets).float().flatten(1).mean(1))
            square += float((given - expected).square().sum())
            whole += float(expected.square().sum())
            answers.append(given.argmax(1))
        error = (square / max(whole, 1e-12)) ** 0.5
        return Score(float(torch.cat(same).mean()), error if error == error else float("inf"), self._top1(answers))

    def accepts(self, score: Score) -> bool:
        """Where the truth is known it decides, else how many answers stayed; `max_changed` is held in any case."""
        before, changed = self.before, 1 - score.agreement
        lost = changed if before is None or score.top1 is None else before - score.top1
        if score.error == float("inf") or 100 * lost > self.max_drop + 1e-9:
            return False
        return self.max_changed is None or 100 * changed <= self.max_changed + 1e-9

    def told(self, score: Score) -> str:
        """For people."""
        same = f"{100 * score.agreement:.2f} % of the model's answers"
        if score.top1 is None or self.before is None:
            return same
        top1 = f"top-1 {100 * self.before:.2f} -> {100 * score.top1:.2f} %"
        return top1 if self.max_changed is None else f"{top1} and {same}"

    @property
    def allowed(self) -> str:
        """For people: what `accepts` holds a score to."""
        lost = f"{self.max_drop:g} may be lost"
        return lost if self.max_changed is None else f"{lost} and {self.max_changed:g} % of the answers may differ"

    def _top1(self, answers: list[Tensor]) -> float | None:
        labels = self.feed.labels
        return None if labels is None else float((torch.cat(answers) == labels).float().mean())


# ---- the guard ----


@dataclass(frozen=True)
class Int8:
    """How a file becomes int8, and what it may cost."""

    way: str
    calibration: Feed
    judge: Judge
    say: Say = lambda text: None

    def guard(self, quantizer: Quantizer, open_: Callable[[Any], Run]) -> tuple[Any, dict[str, Any]]:
        """The int8 model with the fewest layers in floating point that costs no more than is allowed, and a report.

        Everything is quantised first. If that costs too much, layers are ranked by the error of the logits with the layer
        alone in int8, the most harmful of them are kept, as few as suffice, and of these, those that are not needed after
        all are given back.

        `open_` makes a model run, as it will where the file is used. Raises MismatchError where nothing suffices.
        """
        judge, layers = self.judge, quantizer.layers
        made: dict[frozenset[str], tuple[Any, Score]] = {}

        def suffices(keep: Sequence[str]) -> bool:
            made.clear()  # one at a time in memory
            model = quantizer.quantize(frozenset(keep))
            made[frozenset(keep)] = model, judge.score(runs(open_(model)))
            tried.append({"kept": len(keep)} | made[frozenset(keep)][1].to_dict())
            return judge.accepts(made[frozenset(keep)][1])

        tried: list[dict[str, Any]] = []
        kept: list[str] = []
        ranked: list[tuple[str, float]] = []
        if not suffices(kept):
            ((_, first),) = made.values()
            self.say(f"int8 in all layers: {judge.told(first)}; looking for the layers that lose it")
            ranked = self.rank(quantizer)
            kept = self._fewest([name for name, _ in ranked], suffices, first, ranked)
        if frozenset(kept) not in made:
            suffices(kept)
        ((model, _),) = made.values()
        if kept:
            self.say(f"left in floating point: {', '.join(kept)}")
        errors: Mapping[str, float] = dict(ranked)
        return model, {
            "way": self.way,
            "calibrated_on": self.calibration.images.what,
            "judged_on": judge.feed.images.what,
            "layers": len(layers),
            "left_in_floating_point": kept,
            "error_alone": {name: errors[name] for name in kept},
            "tried": tried,
        }

    def confirm(self, run: Callable[[Tensor], Any]) -> dict[str, Any]:
        """Figures of the file as it was written. Raises MismatchError where they are not good enough."""
        score = self.judge.score(run)
        if not self.judge.accepts(score):
            raise MismatchError(
                f"the file as it was written gives {self.judge.told(score)} on {self.judge.feed.images.what}, and "
                f"{self.judge.allowed}. No file was written"
            )
        before = self.judge.before
        return score.to_dict() | ({} if before is None else {"top1_before": 100 * before})

    def rank(self, quantizer: Quantizer) -> list[tuple[str, float]]:
        """Layers, the most harmful first, with the error of the logits when each alone is in int8. Blocks are tried first,
        and layer by layer only those that matter; the others share the error of their block."""
        layers = quantizer.layers
        few = self.calibration.images.few(max(RANKED, self.calibration.batch))
        feed = dataclasses.replace(self.calibration, images=few)
        plain = quantizer.trial(layers)
        expected = [runs(plain)(x) for x in feed]
        judge = Judge(feed, expected, None, 0.0)
        blocks: dict[str, list[str]] = {}
        for layer in layers:
            blocks.setdefault(block_of(layer), []).append(layer)

        def alone(quantized: Sequence[str]) -> float:
            return judge.score(runs(quantizer.trial(frozenset(layers) - set(quantized)))).error

        of_blocks = {block: alone(its) for block, its in blocks.items()}
        whole = sum(error**2 for error in of_blocks.values())
        errors, seen = {}, 0.0
        for block in sorted(of_blocks, key=of_blocks.__getitem__, reverse=True):
            its, error = blocks[block], of_blocks[block]
            is_small = seen >= SHARE * whole
            for layer in its:
                errors[layer] = error / len(its) ** 0.5 if is_small or len(its) == 1 else alone([layer])
            seen += error**2
        return sorted(errors.items(), key=lambda entry: entry[1], reverse=True)

    def _fewest(
        self,
        names: list[str],
        suffices: Callable[[Sequence[str]], bool],
        first: Score,
        ranked: list[tuple[str, float]],
    ) -> list[str]:
        """So many of `names`, from the first on, as suffice, without those that are not needed."""
        most = int(MOST * len(names))
        too_few, enough = 0, 1
        while enough > most or not suffices(names[:enough]):
            if enough >= most:
                how = "--max-drop" if self.judge.max_changed is None else "--max-drop or --max-changed"
                worst = ", ".join(f"{name} ({error:.2g})" for name, error in ranked[:3])
                raise MismatchError(
                    f"int8 ({self.way}) gives {self.judge.told(first)} on {self.judge.feed.images.what}, and "
                    f"{self.judge.allowed}; {most} of {len(names)} layers in floating point are not enough to hold that. The "
                    f"largest errors of the logits come from {worst}. Allow more with {how}, calibrate on other images (--data), or "
                    "choose another way (--int8) or --dtype fp16 or bf16. No file was written"
                )
            too_few, enough = enough, min(2 * enough, most)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if suffices(names[:middle]) else (middle, enough)
        kept = names[:enough]
        if 1 < len(kept) <= FEW:
            for name in reversed(names[: enough - 1]):
                without = [other for other in kept if other != name]
                if suffices(without):
                    kept = without
        return kept


def block_of(layer: str) -> str:
    """The numbered block that a layer is in ("network.0.1" of "network.0.1.attn.v"), else the module around it."""
    numbered = re.match(r"(.*\.\d+)\.", layer)
    return numbered[1] if numbered else layer.rpartition(".")[0] or layer


def as_arrays(feed: Feed) -> Iterator[np.ndarray]:
    return (x.numpy() for x in feed)


def runs(run: Run) -> Callable[[Tensor], Tensor]:
    """`run` between tensors, its first output alone."""
    return lambda x: torch.from_numpy(run(x.numpy())[0])


def _first(given: Any) -> Tensor:
    return next(iter(named_outputs(given).values())).float()
