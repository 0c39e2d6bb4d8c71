"""The linear probe against scikit-learn, and its cross-validation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volo.inference import regression
from volo.inference.regression import FOLDS, PENALTIES, fit_probe, folds


def blobs(per_class: int, num_classes: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, 12, generator=generator)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), 12, generator=generator)
    # Scales that differ by orders of magnitude, as the channels of a network do.
    return (centres[labels] + spread * noise) * torch.logspace(-2, 2, 12) + 3, labels


def test_as_scikit_learn_has_it() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(40, 4, 1.0)
    probe = fit_probe(features, labels, 4, penalties=[1e-2])
    x = ((features.double() - features.double().mean(0)) / features.double().std(0, unbiased=False)).numpy()
    # scikit-learn minimises C * sum of losses + half the squared norm.
    theirs = linear_model.LogisticRegression(C=1 / (1e-2 * len(labels)), tol=1e-8, max_iter=2000).fit(x, labels)
    ours = torch.softmax(features @ probe.weight.T + probe.bias, dim=1)
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(x), atol=2e-3)


def test_the_penalty_follows_from_what_was_held_out() -> None:
    noisy, labels = blobs(6, 3, 3.0)
    clean, _ = blobs(6, 3, 0.05)
    assert fit_probe(noisy, labels, 3).penalty > fit_probe(clean, labels, 3).penalty
    new, truth = blobs(200, 3, 0.05, seed=0)
    probe = fit_probe(clean, labels, 3)
    assert ((new @ probe.weight.T + probe.bias).argmax(1) == truth).float().mean() > 0.99


def test_out_of_fold_answers_know_nothing_of_their_example() -> None:
    """Labels that are pure chance: whoever has seen an example names it, whoever has not cannot."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(120, 200, generator=generator), torch.arange(120) % 2
    probe = fit_probe(features, labels, 2, penalties=[1e-4])
    seen = (features @ probe.weight.T + probe.bias).argmax(1) == labels
    assert seen.float().mean() == 1 and probe.accuracy < 0.7
    both, twice = torch.cat([features, features]), torch.cat([labels, labels])
    alone = fit_probe(both, twice, 2, penalties=[1e-4])
    together = fit_probe(both, twice, 2, penalties=[1e-4], groups=torch.arange(120).repeat(2))
    assert together.accuracy < 0.7 < alone.accuracy, "a copy in another fold gives the answer away"


def test_many_examples_choose_the_penalty_by_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []
    minimise = regression._minimise
    monkeypatch.setattr(regression, "_minimise", lambda x, *args: fits.append(len(x)) or minimise(x, *args))
    features, labels = blobs(60, 4, 1.0)
    groups = torch.arange(120).repeat_interleave(2)
    by_all = fit_probe(features, labels, 4, groups=groups)
    with_all, fits[:] = fits.count(240), []
    monkeypatch.setattr(regression, "ENOUGH_TO_CHOOSE_BY", 100)
    progress: list[tuple[int, int]] = []
    by_some = fit_probe(features, labels, 4, groups=groups, on_progress=lambda *x: progress.append(x))
    assert fits.count(100) <= len(PENALTIES) and max(fits[: -FOLDS - 1]) <= 100
    assert fits[-FOLDS - 1 :] == [192] * FOLDS + [240] and with_all >= 1
    assert by_some.out_of_fold.shape == by_all.out_of_fold.shape
    assert abs(by_some.accuracy - by_all.accuracy) < 0.05
    steps = [done for done, _ in progress]
    assert steps == sorted(steps) and progress[-1] == ((FOLDS + 1) * (len(PENALTIES) + 1),) * 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.integers(0, 5))
def test_folds_spread_classes_and_keep_groups(labels: list[int], seed: int) -> None:
    once = torch.tensor(labels)
    given_labels, groups = torch.cat([once, once]), torch.arange(len(labels)).repeat(2)
    fold = folds(given_labels, groups, seed)
    assert torch.equal(fold[: len(labels)], fold[len(labels) :])
    for label in set(labels):
        counts = torch.bincount(fold[: len(labels)][once == label], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        fit_probe(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="finite"):
        fit_probe(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.int64), 2)
    probe = fit_probe(
        torch.zeros(6, 3), torch.tensor([0, 0, 0, 0, 1, 1]), 3
    )  # constant features, a class without examples
    assert probe.weight.isfinite().all() and probe.bias.argmax() == 0
