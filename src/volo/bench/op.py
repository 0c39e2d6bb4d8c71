"""Outlook attention alone: every backend that can be used against the reference (unfold, softmax, product, fold)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from volo.bench.timing import alternate, copy_bandwidth, matrix_rate, peak_memory, setting, speedup
from volo.models.factory import create_model
from volo.ops import cpu_kernel
from volo.ops.outlook_attention import list_backends, outlook_attention, window_grid
from volo.ops.reference import outlook_attention_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bench_op(
    name: str = "volo_d1",
    *,
    batch_size: int = 8,
    img_size: int = 224,
    dtypes: Sequence[str] = tuple(DTYPES),
    compiled: bool = False,
    rounds: int = 41,
    device: str = "cpu",
) -> dict[str, Any]:
    """The operator of stage 1 of a model, forward and forward + backward, backends in turns in one process, and if asked
    for the reference compiled.

    Returns a dict with a row for every candidate, pass and dtype: milliseconds (median, quartiles), the speed-up over
    the reference, and over the compiled one, in the same dtype and pass, the fraction of the bandwidth of a copy of the
    values that the fewest bytes make (forward: values and logits read, output written; backward: these two and the
    gradient read, two gradients written), the fraction of the measured matrix rate that the products of the windows
    make, and the peak of the memory that PyTorch takes, results included. `scratch_percent`: what the CPU kernel takes
    beyond inputs and outputs, relative to the unfolded values that the reference stores.

    The values of a few images stay in the cache of a CPU, as they do between the layers of a model; that is why the
    rows are measured by a copy of them (`values_copy_gigabytes_per_second`), which is faster than one that memory has
    to serve (`memory_copy_gigabytes_per_second`).
    """
    where = torch.device(device)
    with torch.device("meta"):
        config = create_model(name, img_size=img_size).config
    heads, side = config.num_heads[0], img_size // config.patch_size
    K, stride, padding = config.outlook_kernel, config.outlook_stride, config.outlook_padding
    padding = (K - 1) // 2 if padding is None else padding
    h, w = window_grid(side, side, K, stride, padding)
    geometry = {"kernel_size": K, "stride": stride, "padding": padding}
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    bandwidths: dict[str, float] = {}
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(batch_size, side, side, heads, config.embed_dims[0] // heads, generator=generator)
        logits = torch.randn(batch_size, h, w, heads, K * K, K * K, generator=generator)
        value, logits = (x.to(where, dtype) for x in (value, logits))
        grad = torch.randn_like(value)
        operators: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            b.name: partial(outlook_attention, kernel_size=K, stride=stride, padding=padding, backend=b.name)
            for b in list_backends()
            if b.why_not(value, logits, K, stride, padding) is None
        }
        if compiled:
            reference = torch.compile(outlook_attention_reference)
            scale = value.shape[-1] ** -0.5
            operators["compiled reference"] = partial(
                reference, kernel_size=K, stride=stride, padding=padding, scale=scale
            )
        candidates = {name: _forward(operator, value, logits) for name, operator in operators.items()}
        candidates |= {f"{name} + backward": _both(op, value, logits, grad) for name, op in operators.items()}
        candidates["copy of the values"] = partial(torch.empty_like(value).copy_, value)
        timings = alternate(candidates, rounds=rounds, device=where)
        bandwidth = bandwidths[dtype_name] = 2 * value.nbytes / timings.pop("copy of the values").median
        rate = rates[dtype_name] = matrix_rate(where, dtype)
        products = 2 * logits.numel() * value.shape[-1]  # a product a query, key and channel; twice as many backwards
        least = 2 * value.nbytes + logits.nbytes
        for candidate in operators:
            for suffix in ("", " + backward"):
                timing = timings[candidate + suffix]
                row: dict[str, Any] = {
                    "candidate": f"{candidate} {dtype_name}",
                    "pass": "forward" + suffix,
                    "milliseconds": timing.median * 1e3,
                    "quartiles": [q * 1e3 for q in timing.quartiles],
                    "times_reference": speedup(timing, timings["reference" + suffix]),
                }
                if compiled:
                    row["times_compiled_reference"] = speedup(timing, timings["compiled reference" + suffix])
                moved = least + (3 * value.nbytes + 2 * logits.nbytes if suffix else 0)
                row["of_values_copy_bandwidth"] = moved / timing.median / bandwidth
                row["of_matrix_rate"] = products * (3 if suffix else 1) / timing.median / rate
                row["peak_memory_mib"] = peak_memory(candidates[candidate + suffix], where) / 2**20
                if candidate == "cpu":
                    scratch = cpu_kernel.scratch_bytes(value, logits, K, stride, padding, backward=bool(suffix))
                    unfolded = batch_size * h * w * K * K * config.embed_dims[0] * value.element_size()
                    row["scratch_percent"] = 100 * scratch / unfolded
                rows.append(row)
    return {
        "what": "outlook attention",
        "model": name,
        "batch_size": batch_size,
        "tokens": [side, side],
        "channels": config.embed_dims[0],
        "heads": heads,
        **geometry,
        "rounds": rounds,
        "cpu_instructions": cpu_kernel.instruction_set(),
        **setting(where),
        "values_copy_gigabytes_per_second": {name: bandwidth / 1e9 for name, bandwidth in bandwidths.items()},
        "memory_copy_gigabytes_per_second": copy_bandwidth(where) / 1e9,
        "matrix_gigaflops": {name: rate / 1e9 for name, rate in rates.items()},
        "rows": rows,
    }


def _forward(operator: Callable[[Tensor, Tensor], Tensor], value: Tensor, logits: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return operator(value, logits)

    return run


def _both(
    operator: Callable[[Tensor, Tensor], Tensor], value: Tensor, logits: Tensor, grad: Tensor
) -> Callable[[], object]:
    value, logits = (x.detach().clone().requires_grad_() for x in (value, logits))

    def run() -> object:
        out = operator(value, logits)
        return torch.autograd.grad(out, (value, logits), grad)

    return run
