"""What is wrong with a data set, as a model sees it: images that occur more than once, and labels that are likely wrong."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volo.data.sources import ImageSource, in_parallel
from volo.inference.embed import Embeddings, standardised
from volo.inference.regression import FOLDS, fit_probe

THRESHOLD = 0.85
"""Cosine similarity of standardised vectors from which on two images may be near-duplicates. A model that was trained on
the data has different images of one class above that, too."""
SIDE, PIXELS_ALIKE = 16, 0.95
"""Near-duplicates have grey thumbnails of SIDE x SIDE pixels with this correlation as well, whatever the model thinks.
docs/data_check.md has the measurement of both."""
MAX_PAIRS = 10_000
"""So many near-duplicates are listed, the most similar ones."""
HEADER = ("kind", "image", "other", "score", "label", "other_label", "part", "other_part")
PARTS = {"train": "training", "val": "held out"}


@dataclass(frozen=True)
class Duplicate:
    """Two images that show the same."""

    first: int
    second: int
    similarity: float
    is_mirrored: bool
    """The mirror image of one is like the other."""


@dataclass(frozen=True)
class LabelIssue:
    """An image that is likely of another class than its label says."""

    image: int
    suggested: int
    """The class."""
    confidence: float
    """Out-of-fold probability of its label; the lower, the likelier it is wrong."""
    of_suggested: float
    """Out-of-fold probability of the suggested class."""


@dataclass(frozen=True)
class DataCheck:
    """What was found. Images go by their number in `names`."""

    names: tuple[str, ...]
    labels: tuple[str, ...]
    parts: tuple[str, ...]
    classes: tuple[str, ...]
    threshold: float
    duplicates: list[Duplicate]
    """Most similar first, those between training and held-out images before all others."""
    duplicate_count: int
    """Pairs, with those that are not listed."""
    issues: list[LabelIssue]
    """Likeliest first."""
    accuracy: float
    """Of the linear probe on training images that it has not seen; where it is low, suggestions mean little."""
    not_judged: tuple[str, ...]
    """Classes with too few training images for a judgement of their labels."""

    def kind(self, pair: Duplicate) -> str:
        """ "train-val", "train" or "val"."""
        parts = sorted({self.parts[pair.first], self.parts[pair.second]})
        return "-".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        kinds = [self.kind(pair) for pair in self.duplicates]
        return {
            "images": {part: self.parts.count(part) for part in PARTS},
            "threshold": self.threshold,
            "duplicate_count": self.duplicate_count,
            "listed_duplicates": {kind: kinds.count(kind) for kind in ("train-val", "train", "val")},
            "label_issue_count": len(self.issues),
            "probe_accuracy": self.accuracy,
            "not_judged": list(self.not_judged),
            "found": [dict(zip(HEADER, row)) for row in self.rows()],
        }

    def rows(self) -> Iterator[tuple[str, str, str, float, str, str, str, str]]:
        """As `HEADER` says. The score of duplicates is their similarity, that of labels 1 - the probability of the label, so
        that a higher one is more suspicious; `other` is the other image, or the suggested class."""
        for pair in self.duplicates:
            i, j = pair.first, pair.second
            kind = "mirrored duplicate" if pair.is_mirrored else "duplicate"
            score = round(pair.similarity, 6)
            images = (self.labels[i], self.labels[j], self.parts[i], self.parts[j])
            yield (kind, self.names[i], self.names[j], score, *images)
        for issue in self.issues:
            i = issue.image
            score = round(1 - issue.confidence, 6)
            yield ("label", self.names[i], self.classes[issue.suggested], score, self.labels[i], "", self.parts[i], "")

    def to_csv(self) -> Iterator[str]:
        for row in (HEADER, *self.rows()):
            line = io.StringIO()
            csv.writer(line, lineterminator="\n").writerow(row)
            yield line.getvalue()


def check_data(
    embeddings: Embeddings,
    features: Tensor,
    sources: Mapping[str, ImageSource],
    classes: Sequence[str],
    *,
    threshold: float = THRESHOLD,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> DataCheck:
    """Look for near-duplicates in all images, and for wrong labels.

    Args:
        embeddings: names, classes and parts ("train", "val") of the images.
        features: float32 [2, N, F], of the images and their mirror images (`embed_source` with two views).
        sources: the images, by part; each is decoded once for its thumbnail.
        on_progress: `on_progress(what, done, total)`.

    The probe is fitted to the training images; the held-out ones, of which it has seen none, are judged by it as well.
    Near-duplicates are never on both sides of a fold, or they would confirm each other's labels.

    Raises ValueError for a threshold out of range, and for too few images.
    """
    if not -1 < threshold <= 1:
        raise ValueError(f"the threshold is a cosine similarity, above -1 and at most 1; given: {threshold}")
    say = on_progress or (lambda what, done, total: None)
    parts = torch.tensor([part == "train" for part in embeddings.parts])
    duplicates, count = near_duplicates(
        features,
        grey_thumbnails(sources, lambda done, total: say("reducing images", done, total)),
        threshold,
        first=~parts,
        device=device,
        on_progress=lambda done, total: say("comparing images", done, total),
    )
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in embeddings.classes])
    groups = joined(len(embeddings), duplicates)
    trained = parts.nonzero().flatten()
    probe = fit_probe(
        features[0, trained],
        labels[trained],
        len(classes),
        groups=groups[trained],
        on_progress=lambda done, total: say("fitting the probe", done, total),
    )
    probabilities = (features[0] @ probe.weight.T + probe.bias).softmax(dim=1)
    probabilities[trained] = probe.out_of_fold
    counts = torch.bincount(labels[trained], minlength=len(classes))
    judged = counts >= FOLDS
    return DataCheck(
        names=embeddings.names,
        labels=embeddings.classes,
        parts=embeddings.parts,
        classes=tuple(classes),
        threshold=threshold,
        duplicates=duplicates,
        duplicate_count=count,
        issues=label_issues(probabilities, labels, judged),
        accuracy=probe.accuracy,
        not_judged=tuple(name for name, is_judged in zip(classes, judged.tolist()) if not is_judged),
    )


def grey_thumbnails(
    sources: Mapping[str, ImageSource], on_progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """float32 [N, SIDE, SIDE]: every image, one part after the other, in grey and squashed to a square."""
    total = sum(map(len, sources.values()))
    found = torch.empty(total, SIDE, SIDE)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    done = 0
    for source in sources.values():

        def reduce(index: int, source: ImageSource = source) -> Tensor:
            grey = (source.load(index).float() * weights).sum(dim=0)
            return F.adaptive_avg_pool2d(grey[None], SIDE)[0]

        for small in in_parallel(reduce, range(len(source))):
            found[done] = small
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    return found


def near_duplicates(
    features: Tensor,
    thumbnails: Tensor,
    threshold: float = THRESHOLD,
    *,
    first: Tensor | None = None,
    most: int = MAX_PAIRS,
    block: int = 1024,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Duplicate], int]:
    """Pairs of images that a model and their pixels call alike, and the number of all such pairs, of which `most` are
    returned. Alike are two images, or one and the mirror image of the other, whose standardised vectors have a cosine
    similarity of at least `threshold` and whose thumbnails have a correlation of at least PIXELS_ALIKE.

    Args:
        features: [2, N, F], of the images and of their mirror images.
        thumbnails: [N, SIDE, SIDE], grey.
        first: bool [N]; pairs of one image that is `first` and one that is not come before all others.
        block: images that are compared with all at once: the work is 2 N² F multiplications, the memory block x N.
    """
    N = len(thumbnails)
    unit = standardised(features.reshape(2 * N, -1)).view(2, N, -1).to(device)
    pixels = torch.stack([_centred(thumbnails), _centred(thumbnails.flip(-1))]).to(device)
    is_first = (torch.zeros(N, dtype=torch.bool) if first is None else first).to(device)
    kept = torch.empty(0, 5, dtype=torch.float64)  # across, similarity, i, j, mirrored
    total = 0
    for start in range(0, N, block):
        rows = torch.arange(start, min(start + block, N), device=device)
        similarity = torch.full((len(rows), N), -torch.inf, device=device)
        is_mirrored = torch.zeros(len(rows), N, dtype=torch.bool, device=device)
        for view in range(2):
            alike = unit[view, rows] @ unit[0].T
            # Images that are equal stay so at a threshold of 1, whatever the rounding.
            alike[(alike < threshold - 1e-5) | (pixels[view, rows] @ pixels[0].T < PIXELS_ALIKE)] = -torch.inf
            is_mirrored |= (alike > similarity + 1e-5) if view else False
            similarity = torch.maximum(similarity, alike)
        later = torch.arange(N, device=device)[None] > rows[:, None]
        i, j = ((similarity > -torch.inf) & later).nonzero(as_tuple=True)
        total += len(i)
        across = is_first[rows[i]] != is_first[j]
        found = [across, similarity[i, j], rows[i], j, is_mirrored[i, j]]
        kept = torch.cat([kept, torch.stack([x.cpu().double() for x in found], dim=1)])
        kept = kept[(-kept[:, 1]).argsort(stable=True)]
        kept = kept[(-kept[:, 0]).argsort(stable=True)][:most]
        if on_progress is not None:
            on_progress(int(rows[-1]) + 1, N)
    pairs = [Duplicate(int(i), int(j), min(1.0, s), bool(m)) for _, s, i, j, m in kept.tolist()]
    return pairs, total


def _centred(thumbnails: Tensor) -> Tensor:
    """[N, H, W] -> [N, H W] of length 1, whose products are correlations. Images of one grey are like one another alone."""
    flat = thumbnails.flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    flat = torch.where(flat.abs().amax(dim=1, keepdim=True) < 0.5, torch.ones_like(flat), flat)
    return F.normalize(flat, dim=1)


def joined(count: int, pairs: Sequence[Duplicate]) -> Tensor:
    """int64 [count]: the same number for images that pairs connect."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for pair in pairs:
        parent[root(pair.first)] = root(pair.second)
    return torch.tensor([root(i) for i in range(count)], dtype=torch.int64)


def label_issues(probabilities: Tensor, labels: Tensor, judged: Tensor | None = None) -> list[LabelIssue]:
    """Labels that are likely wrong, by confident learning (Northcutt et al., arXiv 1911.00068), likeliest first.

    The threshold of a class is the mean probability that images with its label have of it. An image counts as one of the
    most probable class whose threshold it reaches; where that is not its label, the label is in question.

    Args:
        probabilities: [N, num_classes], by models that have not seen the image's label.
        labels: int64 [N].
        judged: bool [num_classes]; labels of other classes are not questioned, and they are not suggested.
    """
    N, K = probabilities.shape
    of_label = probabilities[torch.arange(N), labels]
    counts = torch.bincount(labels, minlength=K)
    thresholds = torch.zeros(K, dtype=probabilities.dtype).index_add_(0, labels, of_label) / counts.clamp(min=1)
    allowed = counts > 0 if judged is None else judged & (counts > 0)
    reached = (probabilities >= thresholds) & allowed
    best, suggested = probabilities.masked_fill(~reached, -1.0).max(dim=1)
    # A class whose threshold is below the label's own probability says little against the label.
    questioned = (best > of_label) & (suggested != labels) & allowed[labels]
    found = questioned.nonzero().flatten()
    order = found[of_label[found].argsort(stable=True)]
    return [LabelIssue(int(i), int(suggested[i]), float(of_label[i]), float(best[i])) for i in order]
