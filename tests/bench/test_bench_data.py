"""`volo bench data` measures every part of the input pipeline, and the whole."""

from __future__ import annotations

import math

import torch

from volo.bench.data import bench_data, photo
from volo.data.decode import decode_image


def test_parts_and_the_whole_are_measured() -> None:
    before = torch.random.get_rng_state()
    result = bench_data(img_size=32, pictures=6, width=120, height=90, shrunk_side=48, rounds=2, images_per_second=1e5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert result["pictures"] == 4  # one of each class is held out
    rows = {row["candidate"]: row for row in result["rows"]}
    assert {
        "read from a shard",
        "decode",
        "random resized crop",
        "RandAugment",
        "flip",
        "stack",
        "read a label map",
    } <= set(rows)
    for row in rows.values():
        low, high = row["quartiles"]
        assert (
            low <= row["milliseconds"] <= high
        )  # parts are differences of clocks: next to nothing may come out negative
    whole = rows["all of it, from shards, with label maps"]
    assert result["cores_needed"] == math.ceil(1e5 / whole["per_second_and_core"]) > 1
    assert rows["all of it, from shards"]["of_all"] == 1.0
    parts = sum(rows[name]["milliseconds"] for name in ("decode", "random resized crop", "RandAugment"))
    assert parts < 3 * rows["all of it, from shards"]["milliseconds"]


def test_pictures_are_as_hard_to_decode_as_photographs() -> None:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(photo(0, 500, 375)).save(file, "JPEG", quality=92)
    # ImageNet: 110 KB for 500 x 375 on average.
    assert 85_000 < len(file.getvalue()) < 135_000
    assert decode_image(file.getvalue()).float().std() > 40
