"""A label map and its bytes: nothing is lost by "exact", no more than it says by "compact", and bytes that are not a map are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volo.data.map_codec import COMPACT_STEP, ENCODINGS, decode_map, encode_map


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits that fall, of any size that float16 holds, and classes of any count (also above 65,536, and one only)."""
    top, h, w = draw(st.integers(1, 7)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    num_classes = draw(st.sampled_from([1, 2, 10, 255, 256, 257, 1000, 2049, 65_536, 65_537, 1 << 20, (1 << 32) - 1]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 30.0, 60_000.0]))
    scores = generator.uniform(-largest, largest, (top, h, w)).astype(np.float16)
    if draw(st.booleans()):
        scores[:, : h // 2] = 0.0  # ties
        scores[: top // 2 + 1, :, : w // 2] *= -1.0  # zeros of both signs
    return -np.sort(-scores, axis=0), generator.integers(0, num_classes, (top, h, w))


@settings(deadline=None, max_examples=150)
@given(maps())
def test_exact_gives_back_every_bit(drawn: tuple[np.ndarray, np.ndarray]):
    scores, classes = drawn
    read, indices = decode_map(encode_map(scores, classes, "exact"), scores.shape, "exact")
    assert read.dtype == np.float16 and indices.dtype == np.int64
    # Zero has no sign in a store.
    np.testing.assert_array_equal(read.view(np.uint16), (scores + np.float16(0)).view(np.uint16))
    np.testing.assert_array_equal(indices, classes)


@settings(deadline=None, max_examples=150)
@given(maps())
def test_compact_is_off_by_half_a_step_at_most(drawn: tuple[np.ndarray, np.ndarray]):
    scores, classes = drawn
    read, indices = decode_map(encode_map(scores, classes, "compact"), scores.shape, "compact")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(indices, classes)
    assert (read[1:] <= read[:-1]).all()
    # float32 itself has steps of 2^-8 at 60,000.
    error = np.abs(read.astype(np.float64) - scores)
    assert (error <= COMPACT_STEP / 2 + np.abs(scores.astype(np.float64)) * 2**-22 + 1e-9).all()


def test_the_error_of_a_probability_is_what_the_docstring_says():
    """A softmax over logits off by half a step, in the worst way: tanh(e) / 2."""
    e = COMPACT_STEP / 2
    bound = math.tanh(e) / 2
    assert bound < 0.025
    generator = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        scores = -np.sort(-generator.normal(0, 3, (5, 6, 6)).astype(np.float32), axis=0)
        classes = np.broadcast_to(np.arange(5)[:, None, None], scores.shape)
        read, _ = decode_map(encode_map(scores, classes, "compact"), scores.shape, "compact")
        p, q = (np.exp(x - x.max(axis=0)) / np.exp(x - x.max(axis=0)).sum(axis=0) for x in (scores, read))
        worst = max(worst, float(np.abs(p - q).max()))
    assert bound / 4 < worst <= bound + 1e-6


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_unusable_logits_are_refused(encoding):
    falling = np.linspace(3, 1, 12).reshape(3, 2, 2)
    classes = np.zeros((3, 2, 2), np.int64)
    for bad in (np.nan, np.inf, -np.inf):
        scores = falling.copy()
        scores[0, 0, 0] = bad
        with pytest.raises(ValueError, match="finite"):
            encode_map(scores, classes, encoding)
    with pytest.raises(ValueError, match="fall"):
        encode_map(falling[::-1], classes, encoding)


def test_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="65,504"):
        encode_map(np.full((1, 1, 1), 1e6), np.zeros((1, 1, 1), np.int64), "exact")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_bytes_are_a_value_error(encoding):
    """Whatever the bytes, the answer is a ValueError or arrays of the right shape: no crash, no endless memory."""
    generator = np.random.default_rng(0)
    scores = -np.sort(-generator.normal(0, 3, (5, 9, 9)), axis=0)
    record = encode_map(scores, generator.integers(0, 300, (5, 9, 9)), encoding)
    refused = 0
    for cut in (0, 1, 3, 4, 5, 40, len(record) - 1):
        with pytest.raises(ValueError, match="not a label map"):
            decode_map(record[:cut], (5, 9, 9), encoding)
    for _ in range(300):
        damaged = bytearray(record)
        damaged[generator.integers(len(record))] ^= 1 << int(generator.integers(8))
        try:
            read, indices = decode_map(bytes(damaged), (5, 9, 9), encoding)
        except ValueError:
            refused += 1
        else:
            assert read.shape == indices.shape == (5, 9, 9)
    assert refused > 50
    with pytest.raises(ValueError, match="5 x 9 x 8"):
        decode_map(record, (5, 9, 8), encoding)


def test_the_sizes_that_are_promised():
    """18 x 18 positions, top 5 of 1000 classes: the original takes 7.2 KB. The worst case is noise of every kind."""
    generator = np.random.default_rng(0)
    scores = -np.sort(-generator.normal(5, 3, (5, 18, 18)).astype(np.float16), axis=0)
    assert len(encode_map(scores, generator.integers(0, 1000, scores.shape), "exact")) < 5_200
    # What an annotator says looks more like this: regions of a few classes each, whose ranks change places.
    region = generator.integers(0, 1000, (3, 3, 12))
    tiles = np.kron(np.arange(9).reshape(3, 3), np.ones((6, 6), int))
    logits = np.full((18, 18, 1000), -5.0)
    rows, columns = np.indices((18, 18))
    for rank in range(12):
        logits[rows, columns, region.reshape(9, 12)[tiles, rank]] = generator.normal(8 - rank / 2, 1.5, (18, 18))
    classes = np.argsort(-logits, axis=2, kind="stable")[..., :5]
    scores = np.take_along_axis(logits, classes, axis=2)
    record = encode_map(scores.transpose(2, 0, 1), classes.transpose(2, 0, 1), "compact")
    assert len(record) < 2_500
