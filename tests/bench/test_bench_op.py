"""`volo bench op` measures every backend that can serve, in both passes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from volo.bench.op import bench_op
from volo.ops.outlook_attention import list_backends, outlook_attention


def test_every_engine_has_both_passes_and_the_reference_is_the_unit():
    result = bench_op("volo_d1", batch_size=1, img_size=64, dtypes=("float32",), rounds=3)
    assert (result["tokens"], result["heads"], result["kernel_size"], result["stride"]) == ([8, 8], 6, 3, 2)
    value, logits = torch.zeros(1, 8, 8, 6, 32), torch.zeros(1, 4, 4, 6, 9, 9)
    assert outlook_attention(value, logits, kernel_size=3, stride=2, padding=1).shape == value.shape
    engines = [b.name for b in list_backends() if b.why_not(value, logits, 3, 2, 1) is None]
    rows = {(row["candidate"], row["pass"]): row for row in result["rows"]}
    assert set(rows) == {(f"{e} float32", p) for e in engines for p in ("forward", "forward + backward")}
    for row in rows.values():
        low, high = row["quartiles"]
        assert 0 < low <= row["milliseconds"] <= high
        if row["candidate"] == "reference float32":
            assert row["times_reference"] == 1.0
        # The bandwidth that the fraction is of stands in the result: the fewest bytes follow from the two.
        bandwidth = result["values_copy_gigabytes_per_second"]["float32"] * 1e9
        moved = row["of_values_copy_bandwidth"] * bandwidth * row["milliseconds"] / 1e3
        least = 2 * value.nbytes + logits.nbytes
        expected = least if row["pass"] == "forward" else least + 3 * value.nbytes + 2 * logits.nbytes
        assert moved == pytest.approx(expected)
    if "cpu" in engines:
        assert 0 < rows["cpu float32", "forward"]["scratch_percent"]


def test_the_compiled_reference_is_a_peer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # how fast it is, is not a test
    result = bench_op("volo_d1", batch_size=1, img_size=32, dtypes=("float32",), compiled=True, rounds=2)
    peers = [row for row in result["rows"] if row["candidate"] == "compiled reference float32"]
    assert [row["pass"] for row in peers] == ["forward", "forward + backward"]
    assert all(row["times_compiled_reference"] == 1.0 for row in peers)
    assert all("times_compiled_reference" in row for row in result["rows"])
