"""Figures of tables against scikit-learn and torchmetrics."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics import classification as tm
from torchmetrics import regression as tmr

from volo.data.targets import Output, TableTargets
from volo.inference.predictor import Prediction, to_csv, to_json
from volo.inference.table import (
    average_precision,
    label_figures,
    number_figures,
    read_answers,
    score_of,
    table_figures,
)

TARGETS = TableTargets(
    (
        Output("age", "number", (), ("age",), 40.0, 12.0),
        Output("gender", "class", ("f", "m", "x"), ("gender",)),
        Output("tags", "labels", ("sea", "sky"), ("tags",)),
    )
)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_labels(seed: int, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 6, generator=generator)
    if coarse:  # many equal logits
        logits = logits.mul(2).round()
    truth = (torch.rand(60, 6, generator=generator) < 0.3) | (logits > 1.5)
    truth[:, 4] = False
    found = label_figures(logits, truth)
    expected = [sk.average_precision_score(truth[:, k], logits[:, k]) for k in (0, 1, 2, 3, 5)]
    assert found["per_class_ap"][4] is None
    assert [found["per_class_ap"][k] for k in (0, 1, 2, 3, 5)] == pytest.approx(expected, abs=1e-12)
    probabilities = logits.double().sigmoid()
    seen = [0, 1, 2, 3, 5]  # torchmetrics counts a label that no image has as 0
    theirs = tm.MultilabelAveragePrecision(5, average="macro")(probabilities[:, seen], truth[:, seen].long())
    assert found["map"] == pytest.approx(float(theirs), abs=1e-6)
    predicted = (logits >= 0).int().numpy()
    for average in ("micro", "macro"):
        ours = found[f"f1_{average}"]
        assert ours == pytest.approx(sk.f1_score(truth.int().numpy(), predicted, average=average, zero_division=0))
        theirs = tm.MultilabelF1Score(6, threshold=0.5, average=average)(probabilities, truth.long())
        if not coarse:  # torchmetrics takes exactly 0.5 for no
            assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_no_label_at_all() -> None:
    found = label_figures(torch.full((3, 2), -1.0), torch.zeros(3, 2, dtype=torch.bool))
    assert (found["map"], found["f1_micro"], found["f1_macro"]) == (0.0, 0.0, 0.0)
    assert average_precision(torch.randn(3), torch.zeros(3, dtype=torch.bool)) is None


@pytest.mark.parametrize("seed", range(3))
def test_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.normal(2000, 10, 80)
    predicted = truth + rng.normal(0, 5, 80)
    found = number_figures(torch.from_numpy(predicted), torch.from_numpy(truth))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(truth, predicted))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, predicted))
    assert found["r2"] == pytest.approx(sk.r2_score(truth, predicted))
    assert found["r2"] == pytest.approx(
        float(tmr.R2Score()(torch.from_numpy(predicted), torch.from_numpy(truth))), abs=1e-6
    )


def test_numbers_that_are_all_one() -> None:
    same = torch.full((4,), 3.0, dtype=torch.float64)
    assert number_figures(same, same)["r2"] == sk.r2_score(same, same) == 1.0
    assert number_figures(same + 1, same)["r2"] == sk.r2_score(same, same + 1) == 0.0


def test_several_outputs_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=generator)
    target = torch.stack(
        [
            40 + 12 * torch.randn(50, generator=generator),
            torch.randint(3, (50,), generator=generator).float(),
            *(torch.rand(2, 50, generator=generator) < 0.5).float(),
        ],
        dim=1,
    ).double()
    found = table_figures(logits, target, TARGETS)
    ages = logits[:, 0].double() * 12 + 40
    assert found["r2"] == pytest.approx(sk.r2_score(target[:, 0], ages))
    assert found["top1"] == pytest.approx(sk.accuracy_score(target[:, 1].long(), logits[:, 1:4].argmax(1)))
    assert found["map"] == pytest.approx(
        sk.average_precision_score(target[:, 2:].int(), logits[:, 4:], average="macro")
    )
    assert found["score"] == pytest.approx((found["r2"] + found["top1"] + found["map"]) / 3)
    assert found["outputs"]["age"]["mae"] == found["mae"]
    assert score_of(TARGETS) == "score"
    assert score_of(TableTargets(TARGETS.outputs[:1])) == "r2"
    assert score_of(TableTargets(TARGETS.outputs[2:])) == "map"
    assert "score" not in table_figures(logits[:, :1], target[:, :1], TableTargets(TARGETS.outputs[:1]))


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no labelled images"):
        table_figures(torch.empty(0, 6), torch.empty(0, 4), TARGETS)


def test_what_is_said_of_an_image() -> None:
    logits = torch.tensor([[0.5, 3.0, 1.0, 0.0, 2.0, -1.0], [-1.0, 0.0, 0.0, 9.0, -3.0, -2.0]])
    first, second = read_answers(logits, TARGETS, top=2, threshold=0.5)
    age, gender, tags = first
    assert age.number == pytest.approx(46.0)
    assert [name for name, _ in gender.labels] == ["f", "m"]
    assert gender.labels[0][1] == pytest.approx(float(logits[0, 1:4].softmax(0)[0]))
    assert tags.labels == (("sea", pytest.approx(float(torch.tensor(2.0).sigmoid()))),)
    assert second[2].labels == ()
    both = read_answers(logits, TARGETS, top=2, threshold=0.2)[0][2].labels
    assert [name for name, _ in both] == ["sea", "sky"]

    answers = [Prediction("a.png", (), outputs=first), Prediction("b.png", (), "no image")]
    text = "".join(to_json(answers))
    assert '"age": 46.0' in text
    rows = list(csv.DictReader(io.StringIO("".join(to_csv(answers, is_table=True)))))
    assert [(row["output"], row["value"]) for row in rows] == [
        ("age", "46"), ("gender", "f"), ("gender", "m"), ("tags", "sea"), ("", ""),
    ]  # fmt: skip
    assert rows[-1]["error"] == "no image"
