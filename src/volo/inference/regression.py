"""Multinomial logistic regression on frozen features: a linear probe, its penalty chosen by cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Candidates for the weight of half the squared norm of the coefficients beside the mean cross-entropy, on standardised
features; strongest first, so that each fit starts from a smoother one."""
FOLDS = 5
MAX_STEPS = 200
ENOUGH_TO_CHOOSE_BY = 10_000
"""Examples, at most, by which the penalty is chosen; the fits for the others would take most of the time."""


@dataclass(frozen=True)
class LinearProbe:
    """logits = features @ weight.T + bias."""

    weight: Tensor
    """float32 [num_classes, F]."""
    bias: Tensor
    """float32 [num_classes]."""
    penalty: float
    out_of_fold: Tensor
    """float32 [N, num_classes]: probabilities of each training example, by a probe that has not seen it."""
    accuracy: float
    """Of these, from 0 to 1."""


def fit_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    groups: Tensor | None = None,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> LinearProbe:
    """Fit a linear probe; the penalty is the one of `penalties` whose out-of-fold cross-entropy is the lowest, of
    `ENOUGH_TO_CHOOSE_BY` examples drawn by chance where there are more.

    Args:
        features: [N, F], standardised here.
        labels: int64 [N] in 0..num_classes-1. Classes without examples get no probability.
        groups: int64 [N]; examples of a group, such as an image and its mirror image, are in the same fold. None: each alone.
        on_progress: is called with (fits done, fits in all).

    Raises ValueError for features that are not finite, or fewer than two examples.
    """
    if len(features) < 2 or len(features) != len(labels):
        raise ValueError(
            f"a linear probe needs at least two labelled examples; given: {len(features)} features, {len(labels)} labels"
        )
    if not features.isfinite().all():
        raise ValueError("a linear probe needs finite features; the model's outputs are NaN or infinite")
    x = features.double()
    centre, spread = x.mean(dim=0), x.std(dim=0, unbiased=False)
    spread = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
    x = ((x - centre) / spread).float()
    groups = torch.arange(len(labels)) if groups is None else groups
    done, total = 0, (FOLDS + 1) * len(penalties)
    if len(labels) > ENOUGH_TO_CHOOSE_BY and len(penalties) > 1:
        done, total = total, total + FOLDS + 1

        def on_fit_of_some(fits: int, _: int) -> None:
            if on_progress is not None:
                on_progress(fits, total)

        some = _some(groups, ENOUGH_TO_CHOOSE_BY, seed)
        of_some = fit_probe(
            features[some], labels[some], num_classes, groups=groups[some], penalties=penalties, seed=seed,
            on_progress=on_fit_of_some,
        )  # fmt: skip
        penalties = (of_some.penalty,)
    fold = folds(labels, groups, seed)
    out_of_fold = torch.zeros(len(penalties), len(labels), num_classes)
    for k in range(FOLDS):
        held = fold == k
        if not held.any() or held.all():
            continue
        start = None
        for i, penalty in enumerate(penalties):
            start = _minimise(x[~held], labels[~held], num_classes, penalty, start)
            out_of_fold[i, held] = _logits(x[held], *start).softmax(dim=1)
            if on_progress is not None:
                on_progress(done + k * len(penalties) + i + 1, total)
    of_truth = out_of_fold[:, torch.arange(len(labels)), labels]
    best = int((-of_truth.clamp(min=1e-12).log()).mean(dim=1).argmin())
    start = None
    for penalty in penalties[: best + 1]:
        start = _minimise(x, labels, num_classes, penalty, start)
    assert start is not None
    if on_progress is not None:
        on_progress(total, total)
    weight, bias = (tensor.double() for tensor in start)
    weight = weight / spread
    bias = bias - weight @ centre
    right = out_of_fold[best].argmax(dim=1) == labels
    return LinearProbe(weight.float(), bias.float(), penalties[best], out_of_fold[best], float(right.float().mean()))


def folds(labels: Tensor, groups: Tensor, seed: int = 0) -> Tensor:
    """int64 [N]: the fold of each example. Each class is spread evenly over the folds; groups stay together."""
    generator = torch.Generator().manual_seed(seed)
    names, of_example = groups.unique(return_inverse=True)
    label_of_group = torch.zeros(len(names), dtype=torch.int64).scatter_(0, of_example, labels)
    order = torch.randperm(len(names), generator=generator)
    order = order[label_of_group[order].argsort(stable=True)]  # class by class, in random order
    fold = torch.empty(len(names), dtype=torch.int64)
    fold[order] = torch.arange(len(names)) % FOLDS
    return fold[of_example]


def _some(groups: Tensor, count: int, seed: int) -> Tensor:
    """bool [N]: about `count` examples drawn by chance, those of a group together."""
    names, of_example = groups.unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(len(names), dtype=torch.bool)
    drawn[order[: max(FOLDS, round(count * len(names) / len(groups)))]] = True
    return drawn[of_example]


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


@torch.enable_grad()
def _minimise(
    x: Tensor, labels: Tensor, num_classes: int, penalty: float, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy + penalty / 2 * squared norm of the weights, by L-BFGS from `start`, or from zero."""
    if start is None:
        start = torch.zeros(num_classes, x.shape[1]), torch.zeros(num_classes)
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_STEPS, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(x, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
