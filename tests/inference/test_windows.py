"""Windows cover images without seams, strips come in order, and a small image is seen whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import volo
from volo.inference.segment_evaluate import HowToTest, log_probabilities
from volo.inference.windows import multi_scale_log_probs, resized_strips, whole_logits, window_logits, window_starts


def pixelwise() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 1).eval()


class Position(nn.Module):
    """Logits that depend on the place in the window: its middle says 1, its edge 0."""

    def forward(self, images):
        H, W = images.shape[-2:]
        rows, columns = (1 - (torch.linspace(-1, 1, n).abs()) for n in (H, W))
        return torch.minimum(rows[:, None], columns).expand(len(images), 1, H, W)


@given(length=st.integers(1, 300), window=st.integers(1, 80), data=st.data())
@settings(max_examples=100, deadline=None)
def test_windows_cover_everything(length: int, window: int, data) -> None:
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    assert starts[0] == 0 and starts[-1] == max(0, length - window)
    assert all(0 < b - a <= stride for a, b in zip(starts, starts[1:]))
    # mmsegmentation's number of windows
    assert len(starts) == max(length - window + stride - 1, 0) // stride + 1


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    window=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    batch=st.integers(1, 5),
    smooth=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_pixelwise_model_does_not_notice_windows(size, window, batch, smooth, data) -> None:
    stride = tuple(data.draw(st.integers(max(1, side // 2), side)) for side in window)
    model, images = pixelwise(), torch.randn(2, 3, *size)
    calls = []
    with torch.no_grad():
        strips = list(
            window_logits(
                model,
                images,
                window,
                stride,
                smooth=smooth,
                batch_size=batch,
                on_window=lambda *args: calls.append(args),
            )
        )
        expected = model(images)
    assert [top for top, _ in strips] == [sum(s.shape[2] for _, s in strips[:i]) for i in range(len(strips))]
    assert all(strip.shape[2] > 0 for _, strip in strips)
    torch.testing.assert_close(torch.cat([s for _, s in strips], dim=2), expected, rtol=1e-4, atol=1e-4)
    total = calls[-1][1]
    assert calls == [(i + 1, total) for i in range(total)]


@pytest.mark.parametrize("smooth", [False, True])
def test_a_picture_smaller_than_the_window_is_seen_whole(smooth: bool) -> None:
    torch.manual_seed(0)
    model = volo.create_segmenter(
        "fpn_volo_nano", 5, depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), stem_dim=8, channels=16
    ).eval()
    for size in ((40, 52), (64, 64), (33, 64)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            got = whole_logits(model, images, window=(64, 64), stride=(43, 43), smooth=smooth)
            assert torch.equal(got, model(images))


def test_even_overlaps_are_means() -> None:
    """As mmsegmentation does it."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 3, padding=1).eval()  # sees the edge of a window
    images, window, stride = torch.randn(1, 3, 20, 26), 12, 8
    with torch.no_grad():
        total, count = torch.zeros(1, 2, 20, 26), torch.zeros(20, 26)
        for y in window_starts(20, window, stride):
            for x in window_starts(26, window, stride):
                total[..., y : y + window, x : x + window] += model(images[..., y : y + window, x : x + window])
                count[y : y + window, x : x + window] += 1
        got = whole_logits(model, images, window=(window, window), stride=(stride, stride))
    torch.testing.assert_close(got, total / count)


def test_smooth_blending_leaves_no_seams() -> None:
    """A model that is only sure in the middle of its window: without weights its answer jumps where windows begin."""
    images = torch.zeros(1, 3, 60, 200)

    def steepest(smooth: bool) -> float:
        row = whole_logits(Position(), images, window=(60, 60), stride=(60, 40), smooth=smooth)[0, 0, 30]
        return float(row.diff().abs()[20:-20].max())

    assert steepest(True) < 0.6 * steepest(False)


def test_windows_of_bytes_are_normalised_one_by_one() -> None:
    model, images = pixelwise(), torch.randint(0, 256, (1, 3, 30, 30), dtype=torch.uint8)
    seen = []

    def pixels(crops):
        seen.append(crops.shape)
        return crops.float() / 255

    with torch.no_grad():
        got = whole_logits(model, images, window=(20, 20), stride=(10, 10), pixels=pixels)
        torch.testing.assert_close(got, model(images.float() / 255))
    assert set(seen) == {(1, 3, 20, 20)} and len(seen) == 4


@given(
    h=st.integers(1, 30),
    w=st.integers(1, 30),
    H=st.integers(1, 60),
    W=st.integers(1, 60),
    rows=st.integers(1, 70),
    cut=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_strips_of_a_resized_map_are_those_of_interpolate(h, w, H, W, rows, cut) -> None:
    logits = torch.randn(1, 3, h, w)
    parts = [(top, logits[:, :, top : top + cut]) for top in range(0, h, cut)]
    strips = list(resized_strips(iter(parts), h, (H, W), rows))
    assert [top for top, _ in strips] == list(range(0, H, rows))
    expected = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.cat([s for _, s in strips], dim=2), expected, rtol=1e-4, atol=1e-5)


def test_scales_and_mirror_images_are_averaged() -> None:
    model = pixelwise()
    images = torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        plain = multi_scale_log_probs(model, images, (24, 32), (1.0,), flip=False)
        torch.testing.assert_close(plain, model(images).log_softmax(1))
        # A pixelwise model answers the mirror image with the mirrored answer.
        torch.testing.assert_close(multi_scale_log_probs(model, images, (24, 32), (1.0,), flip=True), plain)
        double = F.interpolate(images, scale_factor=2, mode="bilinear")
        halves = F.interpolate(model(double), size=(24, 32), mode="bilinear").softmax(1)
        expected = ((plain.exp() + halves) / 2).log()
        torch.testing.assert_close(multi_scale_log_probs(model, images, (24, 32), (1.0, 2.0), flip=False), expected)
        assert multi_scale_log_probs(model, images, (50, 60), (0.5,), flip=True).shape == (1, 4, 50, 60)


def test_how_to_test_in_words_and_in_numbers() -> None:
    how = HowToTest.by_windows(512, 341, scales=(0.5, 1.0), flip=True)
    assert str(how) == "windows of 512 x 512 every 341 x 341, scales 0.5, 1, mirrored too"
    assert str(HowToTest()) == "whole images"
    assert HowToTest.by_windows((90, 120)).steps == (60, 80)
    with pytest.raises(ValueError, match="from 1 to the window"):
        HowToTest.by_windows(100, 200)
    with pytest.raises(ValueError, match="factors above 0"):
        HowToTest(scales=())
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            log_probabilities(pixelwise(), images, (40, 40), HowToTest.by_windows(16)),
            log_probabilities(pixelwise(), images, (40, 40), HowToTest()),
        )


@pytest.mark.slow
def test_a_street_of_1024_x_2048_by_windows() -> None:
    torch.manual_seed(0)
    model = volo.create_segmenter("upernet_volo_d1", 19, img_size=512).eval()
    with torch.inference_mode():
        logits = whole_logits(model, torch.randn(1, 3, 1024, 2048), window=(512, 512), stride=(341, 341))
    assert logits.shape == (1, 19, 1024, 2048) and bool(logits.isfinite().all())
