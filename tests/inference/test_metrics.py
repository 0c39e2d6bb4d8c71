"""Metrics against torchmetrics and scikit-learn."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from volo.inference.metrics import ClassificationMetrics


def random_batches(num_classes: int, batches: int = 4, size: int = 57) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(num_classes)
    result = []
    for _ in range(batches):
        target = torch.randint(num_classes, (size,), generator=generator)
        logits = 2 * torch.randn(size, num_classes, generator=generator)
        logits[torch.arange(size), target] += 1.5
        result.append((logits, target))
    return result


@pytest.mark.parametrize("num_classes", [2, 5, 12])
def test_equals_torchmetrics(num_classes: int) -> None:
    from torchmetrics.functional import classification as oracle  # here: processes that import this file need it not

    batches = random_batches(num_classes)
    metrics = ClassificationMetrics(num_classes)
    for batch in batches:
        metrics.update(*batch)
    got = metrics.compute()
    logits, target = (torch.cat(parts) for parts in zip(*batches))

    def accuracy(average: str, top_k: int = 1) -> torch.Tensor:
        return oracle.multiclass_accuracy(logits, target, num_classes, average=average, top_k=top_k)

    assert got["count"] == len(target)
    assert got["top1"] == pytest.approx(float(accuracy("micro")))
    assert got["top5"] == pytest.approx(float(accuracy("micro", min(5, num_classes))))
    assert got["mean_class_accuracy"] == pytest.approx(float(accuracy("macro")))
    assert got["per_class_accuracy"] == pytest.approx(accuracy("none").tolist())
    ece = oracle.multiclass_calibration_error(logits, target, num_classes, n_bins=15, norm="l1")
    assert got["ece"] == pytest.approx(float(ece), abs=1e-6)
    assert got["confusion"] == oracle.multiclass_confusion_matrix(logits, target, num_classes).tolist()
    assert got["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)))


def test_a_class_without_pictures_is_left_out_of_the_mean() -> None:
    from sklearn.metrics import balanced_accuracy_score

    logits, target = random_batches(6)[0]
    target[target == 3] = 4
    logits[:, 3] = -20  # never predicted either, which the oracle would warn of
    metrics = ClassificationMetrics(6)
    metrics.update(logits, target)
    got = metrics.compute()
    assert got["per_class_accuracy"][3] is None
    expected = balanced_accuracy_score(target.numpy(), logits.argmax(1).numpy())
    assert got["mean_class_accuracy"] == pytest.approx(expected)


def test_sets_of_labels() -> None:
    logits = torch.tensor([[9.0, 8.0, 0.0], [9.0, 8.0, 0.0], [9.0, 8.0, 0.0], [9.0, 8.0, 0.0]])
    metrics = ClassificationMetrics(3)
    metrics.update(logits, [[0, 2], [], [1, 2], [2]])  # right; left out; wrong twice
    got = metrics.compute()
    assert got["count"] == 3
    assert got["top1"] == pytest.approx(1 / 3)
    assert got["confusion"] == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_sets_of_one_label_equal_plain_targets() -> None:
    logits, target = random_batches(7)[0]
    plain, sets = ClassificationMetrics(7), ClassificationMetrics(7)
    plain.update(logits, target)
    sets.update(logits, [[label] for label in target.tolist()])
    assert plain.compute() == sets.compute()


def test_bad_input_is_named() -> None:
    metrics = ClassificationMetrics(3)
    with pytest.raises(ValueError, match="no labelled images"):
        metrics.compute()
    with pytest.raises(ValueError, match="classes are 0 to 2; given: 1 to 3"):
        metrics.update(torch.zeros(2, 3), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="classes are 0 to 2"):
        metrics.update(torch.zeros(1, 3), [[3]])
    with pytest.raises(ValueError, match="given: logits"):
        metrics.update(torch.zeros(2, 4), torch.tensor([1, 2]))


def _merge_in_process(rank: int, init: str, results: dict[int, dict]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    metrics = ClassificationMetrics(5)
    batches = random_batches(5)
    for batch in batches[:3] if rank == 0 else batches[3:]:
        metrics.update(*batch)
    metrics.merge()
    results[rank] = metrics.compute()
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_figures_of_one(tmp_path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_merge_in_process, (f"file://{tmp_path}/rendezvous", results), nprocs=2)
        results = dict(results)
    alone = ClassificationMetrics(5)
    for batch in random_batches(5):
        alone.update(*batch)
    expected = alone.compute()
    loss = expected.pop("loss")
    for got in results.values():
        assert got.pop("loss") == pytest.approx(loss)
        assert got == expected
