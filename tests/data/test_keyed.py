from __future__ import annotations

import random

import numpy as np
import torch

from volo.data import keyed


def test_the_hash_is_splitmix64_and_stays_it() -> None:
    # First outputs of the published generator for seed 0: one step of the counter and the finaliser.
    assert keyed.key(0).tolist() == [0xE220A8397B1DCDAF]
    assert keyed.key(0, 1, 2).shape == (1,)
    assert len({int(keyed.key(*parts)[0]) for parts in ((1, 2), (2, 1), (1,), (1, 2, 0), (1, 2, 1), (-1, 2))}) == 6


def test_arrays_hash_like_their_elements() -> None:
    index = np.array([5, 0, 70_000, 5])
    together = keyed.key(3, 7, index, 2)
    assert together.tolist() == [int(keyed.key(3, 7, int(i), 2)[0]) for i in index]


def test_below_and_uniform_are_even() -> None:
    bits = keyed.key(1, np.arange(90_000))
    counts = np.bincount(keyed.below(bits, 9), minlength=9)
    assert len(counts) == 9
    assert np.abs(counts - 10_000).max() < 400
    chance = keyed.uniform(bits)
    assert chance.min() >= 0
    assert chance.max() < 1
    assert abs(chance.mean() - 0.5) < 0.005


def test_permutation_holds_every_number_and_depends_on_all_keys() -> None:
    orders = [keyed.permutation(1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert (orders[0] == keyed.permutation(1000, 0, 0)).all()


def test_own_random_state_leaves_no_trace() -> None:
    torch.manual_seed(1)
    random.seed(1)
    wanted = torch.rand(3), random.random()
    torch.manual_seed(1)
    random.seed(1)
    with keyed.own_random_state():
        keyed.seed_random_state(2**64 - 1)
        torch.rand(10)
        random.random()
    assert torch.equal(torch.rand(3), wanted[0])
    assert random.random() == wanted[1]
