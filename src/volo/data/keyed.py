"""Keyed randomness: random numbers as a function of (seed, epoch, image) and of nothing else.

A key begins with the stream it belongs to (ORDER, SAMPLE, ...), so that no two of them ever draw the same numbers.
A run that is resumed, spread over other processes or given more workers therefore sees the same images, cropped the
same way, in the same order. The function is splitmix64 (Steele, Lea, Flood, OOPSLA 2014), applied to one key after the
other; it is the same on every platform and in every version of numpy and torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

ORDER, SAMPLE, CROP, SCENE, STEP = 1, 2, 3, 4, 5
"""The order of an epoch; the augmentation of an image, of a batch of them, and of an image with its mask; dropout and mixing
of a step."""

_MASK = (1 << 64) - 1


def key(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers, or integer arrays that broadcast, to uint64 of the broadcast shape (at least 1-d)."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        part = np.asarray(part & _MASK, np.uint64) if isinstance(part, int) else part.astype(np.uint64)
        state = _splitmix64(state ^ part)
    return state


def below(bits: np.ndarray, limit: int) -> np.ndarray:
    """int64 in 0..limit-1 from uint64 hashes (limit < 2^32)."""
    return (((bits >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from uint64 hashes."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(count: int, *parts: int) -> np.ndarray:
    """int64 [count]: the numbers 0..count-1 in the order that `parts` determine."""
    return np.argsort(key(*parts, np.arange(count)), kind="stable")


@contextmanager
def own_random_state() -> Iterator[None]:
    """Whatever is drawn from, or seeded in, torch's CPU generator and `random` inside leaves no trace outside."""
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)


def seed_random_state(value: int) -> None:
    """Seed torch's CPU generator and `random`; unlike `torch.manual_seed` quick, and the CPU's only."""
    torch.default_generator.manual_seed(value)
    random.seed(value)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
