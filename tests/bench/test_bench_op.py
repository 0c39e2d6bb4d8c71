"""`volo bench op` measures every engine that can serve, in both passes."""

from __future__ import annotations

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
    if "cpu" in engines:
        assert 0 < rows["cpu float32", "forward"]["scratch_percent"]
