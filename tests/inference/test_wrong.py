"""Wrong answers: the surest ones, whatever the batches, with the true class beside them."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter

import pytest
import torch

from volo.data.sources import ArraySource
from volo.inference.spread import Spread, evenly, spread
from volo.inference.wrong import HEADER, WrongAnswers, to_csv

CLASSES = ("a", "b", "c, d")


def source(count: int) -> ArraySource:
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    return ArraySource(images, torch.zeros(count, dtype=torch.int64), [f"{i}.png" for i in range(count)], CLASSES)


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_the_surest_are_found_whatever_the_batches(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(60, 3, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    p = logits.softmax(dim=1)
    expected = sorted((-float(p[i].max()), i) for i in range(60) if int(p[i].argmax()) != int(target[i]))[
        :10
    ]  # by a plain loop
    found = WrongAnswers(10)
    for start in range(0, 60, batch):
        rows = torch.arange(60)[start : start + batch]
        found.add(logits[rows], target[rows], rows)
    listed = found.listed(source(60), CLASSES)
    assert [answer.index for answer in listed] == [i for _, i in expected]
    for answer in listed:
        i = answer.index
        assert answer.image == f"{i}.png" and answer.truth == CLASSES[int(target[i])]
        assert answer.predicted == CLASSES[int(p[i].argmax())] != answer.truth
        assert answer.probability == pytest.approx(float(p[i].max()), abs=1e-6)
        assert answer.probability_of_truth == pytest.approx(float(p[i, target[i]]), abs=1e-6)
    rows_ = list(csv.reader(io.StringIO("".join(to_csv(listed)))))
    assert tuple(rows_[0]) == HEADER and len(rows_) == 11
    assert rows_[1][:3] == [listed[0].image, listed[0].truth, listed[0].predicted]


def test_right_answers_are_not_listed() -> None:
    found = WrongAnswers(5)
    assert found.listed(source(3), CLASSES) == []
    found.add(5 * torch.eye(3), torch.tensor([0, 1, 1]), torch.arange(3))
    assert [(a.index, a.truth, a.predicted) for a in found.listed(source(3), CLASSES)] == [(2, "b", "c, d")]
    with pytest.raises(ValueError, match="at least 1"):
        WrongAnswers(0)


def test_a_spread_takes_as_many_of_each_group() -> None:
    groups = ["x"] * 500 + ["y"] * 3 + ["z"] * 200
    chosen = spread(groups, 12)
    assert chosen == sorted(chosen)
    counts = Counter(groups[i] for i in chosen)
    assert counts["y"] == 3 and counts["x"] + counts["z"] == 9 and min(counts["x"], counts["z"]) >= 4
    of_x = [i for i in chosen if i < 500]
    assert of_x[0] < 100 and of_x[-1] > 300, "evenly over the group, not its beginning"
    assert spread(groups[:5], 48) == [0, 1, 2, 3, 4]
    assert len(spread([str(i) for i in range(100)], 48)) == 48
    assert evenly(10, 5) == [0, 2, 4, 6, 8] and evenly(2, 5) == [0, 1]


def test_a_spread_holds_little() -> None:
    draw = random.Random(0)
    groups = [draw.choice("abc") for _ in range(5000)]
    found: Spread[int] = Spread(9)
    for i, group in enumerate(groups):
        found.add(group, i)
        assert sum(map(len, found._kept.values())) <= 3 * 18
    assert len(found.chosen()) == 9
    alone: Spread[int] = Spread(9)
    for i in range(5000):
        alone.add("a", i)
    assert len(alone.chosen()) == 9 and alone.chosen()[-1] > 4000
