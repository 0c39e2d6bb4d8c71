"""Outlook attention on GPUs: Triton kernels, forward and backward, without atomics and without an unfolded tensor.

Every output token is owned by one program, which gathers what the windows around it contribute; the order of the
additions is fixed, so results are the same from run to run and whatever the tiling.

Tiling. A *cell* is `stride` tokens of a row; the windows that touch it read `span` token columns. A program owns some
cells side by side and walks down the grid, one row of windows at a time. In a step, [tokens, taps] weights times
[taps, head_dim] values is one small matrix product a cell, on the tensor cores: tokens are the rows under the window
row times the columns of the cell, taps are the kernel_size * span places that the row of windows reads. For D1-D5
(kernel 3, stride 2) that is [4 * 2, 15 -> 16] times [16, 32]. The sums of token rows that the next row of windows
touches too stay in registers: a ring of row slots, where a row keeps its slot from the first window that reaches it to
the last.

Softmax. One lane holds one row of logits (window, query offset), a register a key offset: max, exponentials and sum
need no exchange between lanes, and every row is loaded by exactly one program (plus one more in the backward pass).

The gradient of `value` is the forward kernel with the roles of query and key exchanged, given the log-sum-exp of each
row, which the kernel for the gradient of the logits leaves behind (4 bytes a row of kernel_size**2 logits, in float32
8: the largest logit and the rest, whose sum would cost digits).

Non-finite values: a weight of zero times infinity is NaN, so an infinite or NaN value reaches all tokens of the cells
around it, a few more than share a window with it.

The module imports triton; `volo.ops.library` imports it when the first CUDA tensor comes. With TRITON_INTERPRET=1 in
the environment the same kernels run on CPU tensors, slowly, through Triton's interpreter.
"""

# Kernels build tuples in unrolled loops, whose types change from turn to turn.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every tap is a few instructions of unrolled code. 5 compiles in about a minute, once, 7 in several.
_LARGEST_KERNEL = 5
_LOG2_E = tl.constexpr(1.4426950408889634)
# Sizes and positions only: specialising on them (1, multiples of 16) would compile again for the last, short batch.
_UNSPECIALISED = ["batch", "height", "width", "window_rows", "window_cols", "cells_x", "rows_per_program"]


# ---- parts of kernels ----


@triton.jit
def _stack(parts, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """2**LEVELS tensors [ROWS] -> [ROWS, 2**LEVELS], all of a row in one lane."""
    for level in tl.static_range(LEVELS):
        joined = ()
        for n in tl.static_range(2 ** (LEVELS - 1 - level)):
            pair = tl.join(parts[n], parts[n + 2 ** (LEVELS - 1 - level)])
            joined += (tl.reshape(pair, (ROWS, 2 * 2**level)),)
        parts = joined
    return parts[0]


@triton.jit
def _unstack(x, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """[ROWS, 2**LEVELS] -> 2**LEVELS tensors [ROWS]."""
    parts = (x,)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for n in tl.static_range(2**level):
            a, b = tl.split(tl.reshape(parts[n], (ROWS, 2 ** (LEVELS - 1 - level), 2)))
            even += (tl.reshape(a, (ROWS, 2 ** (LEVELS - 1 - level))),)
            odd += (tl.reshape(b, (ROWS, 2 ** (LEVELS - 1 - level))),)
        parts = even + odd
    flat = ()
    for n in tl.static_range(2**LEVELS):
        flat += (tl.reshape(parts[n], (ROWS,)),)
    return flat


@triton.jit
def _softmax_row(row, mask, factor, FALLING: tl.constexpr, TAPS: tl.constexpr):
    """Softmax of the TAPS logits from `row` on, one row a lane, zero where not `mask`; its largest
    logit, and log2 of the sum of exponentials relative to that.

    FALLING says that factor is negative. The largest is subtracted before the multiplication, so that large logits lose
    nothing.
    """
    x = ()
    for t in tl.static_range(TAPS):
        x += (tl.load(row + t, mask=mask, other=0.0).to(tl.float32),)
    top = x[0]
    for t in tl.static_range(1, TAPS):
        top = tl.minimum(top, x[t]) if FALLING else tl.maximum(top, x[t])
    total = tl.zeros_like(top)
    e = ()
    for t in tl.static_range(TAPS):
        e += (tl.exp2((x[t] - top) * factor),)
        total += e[t]
    inverse = tl.where(mask, 1.0 / total, 0.0)
    p = ()
    for t in tl.static_range(TAPS):
        p += (e[t] * inverse,)
    return p, top, tl.log2(total)


@triton.jit
def _softmax_column(column, lse_row, tops_row, mask, factor, SPLIT: tl.constexpr, TAPS: tl.constexpr):
    """A column of a window's TAPS x TAPS softmax, from what `_grad_logits_kernel` left; zero where not `mask`."""
    p = ()
    for t in tl.static_range(TAPS):
        x = tl.load(column + t * TAPS, mask=mask, other=0.0).to(tl.float32)
        if SPLIT:
            x -= tl.load(tops_row + t, mask=mask, other=0.0)
        # A masked lane takes exp2(0 - inf) = 0.
        p += (tl.exp2(x * factor - tl.load(lse_row + t, mask=mask, other=float("inf"))),)
    return p


@triton.jit
def _cell(index, heads, cells_x):
    """Cell index -> image, head, column of cells. Columns run fastest: neighbours share the tokens between them."""
    return index // (cells_x * heads), (index // cells_x) % heads, index % cells_x


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b for each cell, in float32. UPCAST: Triton's interpreter has no bfloat16 product."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# ---- kernels ----


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _mix_kernel(
    src, logits, lse, tops, out,
    batch, height, width, heads, window_rows, window_cols, cells_x, rows_per_program, scale,
    src_b, src_y, src_x, src_h, logits_b, logits_i, logits_j, logits_h,
    K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, HEAD_DIM: tl.constexpr, FALLING: tl.constexpr,
    SPLIT: tl.constexpr, TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, WINDOWS: tl.constexpr, SPAN: tl.constexpr, RING: tl.constexpr,
    LEVELS: tl.constexpr, D: tl.constexpr, CELLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over windows and taps of softmax(logits)[token, tap] * src[tap].

    With TRANSPOSED the weight is softmax(logits)[tap, token], the gradient of `value` where src is that of the output.
    """
    TAPS: tl.constexpr = K * K
    REGION: tl.constexpr = 2**LEVELS  # K * SPAN taps, padded
    TOKENS: tl.constexpr = RING * COLUMNS
    ROWS: tl.constexpr = CELLS * TOKENS
    factor = scale * _LOG2_E

    # What a cell reads: [CELLS, REGION] places.
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    b, head, j = _cell(cell, heads, cells_x)
    tap = tl.arange(0, REGION)
    channel = tl.arange(0, D)
    x = (j * S + S * FIRST - P)[:, None] + (tap % SPAN)[None, :]
    src_ok = (b < batch)[:, None] & (tap < K * SPAN)[None, :] & (x >= 0) & (x < width)
    src_at = src + b.to(tl.int64) * src_b + head * src_h
    src_to = x * src_x

    # What it writes: [CELLS, TOKENS] places; a token is (row slot, column).
    token = tl.arange(0, TOKENS)
    out_x = j[:, None] * S + (token % COLUMNS)[None, :]
    out_ok = (b < batch)[:, None] & (token % COLUMNS < S)[None, :] & (out_x < width)
    out_at = (out + (b.to(tl.int64) * height * width * heads + head) * HEAD_DIM)[:, None] + out_x * (heads * HEAD_DIM)

    # Its rows of logits, one a lane: [ROWS] = (cell, token).
    row = tl.arange(0, ROWS)
    row_b, row_head, row_j = _cell(tl.program_id(0) * CELLS + row // TOKENS, heads, cells_x)
    row_slot = row // COLUMNS % RING
    row_column = row % COLUMNS
    row_ok = (row_b < batch) & (row_column < S) & (row_j * S + row_column < width)
    row_at = logits + row_b.to(tl.int64) * logits_b + row_head * logits_h
    sums_at = (row_b.to(tl.int64) * window_rows * window_cols * heads + row_head) * TAPS  # of lse and tops

    # Rows are counted from the first that a window reaches, P above the grid. After step i the first S rows of window
    # row i are complete. Steps before `first` only bring in what they give to rows from there on.
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, (height + P + S - 1) // S)
    acc = tl.zeros((CELLS, D, TOKENS), tl.float32)
    for i in range(tl.maximum(first - (K - 1) // S, 0), last):
        y = i * S - P + tap // SPAN
        ok = src_ok & ((y >= 0) & (y < height) & (i < window_rows))[None, :]
        values = tl.load(
            src_at[:, None, None] + (src_to + (y * src_y)[None, :])[:, :, None] + channel[None, None, :],
            mask=ok[:, :, None] & (channel < HEAD_DIM)[None, None, :],
            other=0.0,
        )

        a = (row_slot - i * S) & (RING - 1)
        row_y = i * S + a
        ok = row_ok & (a < K) & (i < window_rows) & (row_y >= tl.maximum(first * S, P))
        ok &= row_y < tl.minimum(last * S, height + P)
        p = ()
        for m in tl.static_range(WINDOWS):
            column = row_column + P - S * (m + FIRST)  # of the token in its window
            window = row_j + (m + FIRST)
            there = ok & (column >= 0) & (column < K) & (window >= 0) & (window < window_cols)
            offset = a * K + column
            window_at = row_at + i * logits_i + window * logits_j
            if TRANSPOSED:
                sums = sums_at + (i * window_cols + window) * (heads * TAPS)
                p += _softmax_column(window_at + offset, lse + sums, tops + sums, there, factor, SPLIT, TAPS)
            else:
                softmax, _, _ = _softmax_row(window_at + offset * TAPS, there, factor, FALLING, TAPS)
                p += softmax

        weights = ()  # of each tap of the region, summed over the windows that hold both token and tap
        for t in tl.static_range(REGION):
            weight = tl.zeros((ROWS,), tl.float32)
            for m in tl.static_range(WINDOWS):
                if t < K * SPAN and (t % SPAN >= S * m and t % SPAN < S * m + K):
                    weight += p[m * TAPS + t // SPAN * K + t % SPAN - S * m]
            weights += (weight.to(src.dtype.element_ty),)
        attn = tl.reshape(_stack(weights, ROWS, LEVELS), (CELLS, TOKENS, REGION))
        # Channels first: the product's short side, tokens, then needs no padding beyond 8.
        acc = _product(tl.permute(values, (0, 2, 1)), tl.permute(attn, (0, 2, 1)), acc, UPCAST)

        a = (token // COLUMNS - i * S) & (RING - 1)
        is_complete = a < S
        y = i * S + a - P
        ok = out_ok & (is_complete & (y >= 0) & (y < height) & (i >= first))[None, :]
        tl.store(
            (out_at + (y * (width * heads * HEAD_DIM))[None, :])[:, None, :] + channel[None, :, None],
            acc.to(out.dtype.element_ty),
            mask=ok[:, None, :] & (channel < HEAD_DIM)[None, :, None],
        )
        acc = tl.where(is_complete[None, None, :], 0.0, acc)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _grad_logits_kernel(
    grad_out, value, logits, lse, tops, grad_logits,
    batch, height, width, heads, window_rows, window_cols, cells_x, rows_per_program, scale,
    grad_b, grad_y, grad_x, grad_h, value_b, value_y, value_x, value_h, logits_b, logits_i, logits_j, logits_h,
    K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, HEAD_DIM: tl.constexpr, FALLING: tl.constexpr,
    SPLIT: tl.constexpr, TAP_LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, WINDOWS: tl.constexpr, SPAN: tl.constexpr, RING: tl.constexpr,
    LEVELS: tl.constexpr, D: tl.constexpr, CELLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_logits = scale * softmax * (g - sum(softmax * g)), where g is grad_out of the query times value of the key.

    Also writes `lse`, the log-sum-exp of each row to base 2; with SPLIT its two parts, the largest logit (`tops`) and
    the rest (`lse`). Cells begin P left of the grid, so that queries outside it, whose logits get zero, have an owner.
    """
    TAPS: tl.constexpr = K * K
    REGION: tl.constexpr = 2**LEVELS
    TOKENS: tl.constexpr = RING * COLUMNS
    ROWS: tl.constexpr = CELLS * TOKENS
    factor = scale * _LOG2_E

    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    b, head, j = _cell(cell, heads, cells_x)
    channel = tl.arange(0, D)

    tap = tl.arange(0, REGION)
    x = (j * S + S * FIRST - P)[:, None] + (tap % SPAN)[None, :]
    value_ok = (b < batch)[:, None] & (tap < K * SPAN)[None, :] & (x >= 0) & (x < width)
    value_at = value + b.to(tl.int64) * value_b + head * value_h
    value_to = x * value_x

    token = tl.arange(0, TOKENS)
    x = (j * S - P)[:, None] + (token % COLUMNS)[None, :]
    grad_ok = (b < batch)[:, None] & ((token % COLUMNS < S) & (token // COLUMNS < K))[None, :]
    grad_ok &= (x >= 0) & (x < width)
    grad_at = grad_out + b.to(tl.int64) * grad_b + head * grad_h
    grad_to = x * grad_x

    row = tl.arange(0, ROWS)
    row_b, row_head, row_j = _cell(tl.program_id(0) * CELLS + row // TOKENS, heads, cells_x)
    row_a = row // COLUMNS % RING
    row_column = row % COLUMNS
    row_ok = (row_b < batch) & (row_column < S) & (row_a < K)
    row_at = logits + row_b.to(tl.int64) * logits_b + row_head * logits_h
    sums_at = (row_b.to(tl.int64) * window_rows * window_cols * heads + row_head) * TAPS  # of lse and tops

    out_tap = tl.arange(0, 2**TAP_LEVELS)
    to_at = grad_logits + (b.to(tl.int64) * window_rows * window_cols * heads + head) * (TAPS * TAPS)
    to_ok = (token % COLUMNS < S) & (token // COLUMNS < K)

    first = tl.program_id(1) * rows_per_program
    for i in range(first, tl.minimum(first + rows_per_program, window_rows)):
        y = i * S - P + tap // SPAN
        values = tl.load(
            value_at[:, None, None] + (value_to + (y * value_y)[None, :])[:, :, None] + channel[None, None, :],
            mask=(value_ok & ((y >= 0) & (y < height))[None, :])[:, :, None] & (channel < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        y = i * S - P + token // COLUMNS
        grads = tl.load(
            grad_at[:, None, None] + (grad_to + (y * grad_y)[None, :])[:, :, None] + channel[None, None, :],
            mask=(grad_ok & ((y >= 0) & (y < height))[None, :])[:, :, None] & (channel < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        acc = tl.zeros((CELLS, REGION, TOKENS), tl.float32)
        products = _product(values, tl.permute(grads, (0, 2, 1)), acc, UPCAST)
        grad = _unstack(tl.reshape(tl.permute(products, (0, 2, 1)), (ROWS, REGION)), ROWS, LEVELS)

        for m in tl.static_range(WINDOWS):
            column = row_column - S * (m + FIRST)
            window = row_j + (m + FIRST)
            ok = row_ok & (column >= 0) & (column < K) & (window >= 0) & (window < window_cols)
            offset = row_a * K + column
            p, top, log_sum = _softmax_row(
                row_at + i * logits_i + window * logits_j + offset * TAPS, ok, factor, FALLING, TAPS
            )
            sums = sums_at + (i * window_cols + window) * (heads * TAPS) + offset
            if SPLIT:
                tl.store(tops + sums, top, mask=ok)
                tl.store(lse + sums, log_sum, mask=ok)
            else:
                tl.store(lse + sums, top * factor + log_sum, mask=ok)
            mean = tl.zeros((ROWS,), tl.float32)
            for t in tl.static_range(TAPS):
                mean += p[t] * grad[t // K * SPAN + t % K + S * m]
            parts = ()
            for t in tl.static_range(2**TAP_LEVELS):
                if t < TAPS:
                    part = p[t] * (grad[t // K * SPAN + t % K + S * m] - mean) * scale
                else:
                    part = tl.zeros((ROWS,), tl.float32)
                parts += (part.to(grad_logits.dtype.element_ty),)
            column = token % COLUMNS - S * (m + FIRST)
            window = j + (m + FIRST)
            to = to_at + (i * window_cols + window) * (heads * TAPS * TAPS)
            offset = token // COLUMNS * K + column
            ok = to_ok & (column >= 0) & (column < K)
            tl.store(
                to[:, None, None] + (offset * TAPS)[None, :, None] + out_tap[None, None, :],
                tl.reshape(_stack(parts, ROWS, TAP_LEVELS), (CELLS, TOKENS, 2**TAP_LEVELS)),
                mask=((b < batch) & (window >= 0) & (window < window_cols))[:, None, None]
                & ok[None, :, None]
                & (out_tap < TAPS)[None, None, :],
            )


# ---- tiling ----


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work; the fields in the order of the kernels' constants.

    `stride` tokens of a row (padded to `columns`) form a cell; `windows` windows touch it, the first is `first` windows
    from the one with the cell's own number, and read `span` columns; kernel_size * span taps are padded to 2**levels.
    `ring` row slots, `padded_head_dim` channels. A program takes `cells` cells, with `num_warps` warps, and walks down
    up to `rows_per_program` rows of windows.
    """

    columns: int
    first: int
    windows: int
    span: int
    ring: int
    levels: int
    padded_head_dim: int
    cells: int
    num_warps: int
    rows_per_program: int


def _power_of_two(n: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (n - 1).bit_length())


def _power_of_two_below(x: float) -> int:
    return 1 << max(int(x).bit_length() - 1, 0)


def choose_tiling(
    dtype: torch.dtype, head_dim: int, kernel_size: int, stride: int, reach: int, *, keeps_sums: bool = True,
    num_columns: int = 0, num_steps: int = 1,
) -> Tiling:  # fmt: skip
    """The tiling for a geometry. It decides speed only, never a result.

    Args:
        reach: tokens by which window 0 begins left of cell 0: the padding, or 0 where cells begin there too.
        keeps_sums: whether sums stay in registers from step to step, which leaves room for fewer values.
        num_columns: token columns over all images and heads; with `num_steps`, the steps that a walk down the whole
            grid takes, it decides how many programs share a column of cells.
    """
    first = -((kernel_size - 1 - reach) // stride)
    windows = (stride - 1 + reach) // stride - first + 1
    span = stride * (windows - 1) + kernel_size
    region = _power_of_two(kernel_size * span, 16)
    columns, ring = _power_of_two(stride), _power_of_two(max(kernel_size, stride))
    padded_head_dim = _power_of_two(head_dim, 16)

    # What a cell takes of a warp: lanes for its rows, and registers for its sums and values. One warp a program waits
    # for no other; more only where one cell is too much for it.
    tokens = ring * columns
    values = region * padded_head_dim * (dtype.itemsize / 4096 if keeps_sums else 1 / 2048)
    share = max(tokens / 32, tokens * padded_head_dim / 1024, values)
    cells, num_warps = _power_of_two_below(1 / share), min(_power_of_two(math.ceil(share)), 8)

    # Several waves of programs on the largest GPUs (about 1600 run at once), so that the last one, not full, weighs
    # little; but no walks shorter than four rows: each begins with a row of windows that the walk above has read too.
    num_programs = -(-num_columns // (stride * cells))
    walks = min(max(8192 // max(num_programs, 1), 1), -(-num_steps // 4))
    return Tiling(
        columns, first, windows, span, ring, region.bit_length() - 1, padded_head_dim, cells, num_warps,
        -(-num_steps // walks),
    )  # fmt: skip


def _constants(tiling: Tiling) -> tuple[int, ...]:
    return (
        tiling.columns, tiling.first, tiling.windows, tiling.span, tiling.ring, tiling.levels, tiling.padded_head_dim,
        tiling.cells,
    )  # fmt: skip


# ---- calls ----


def why_not(value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int) -> str | None:
    """None where the kernels support these tensors, otherwise the reason why not."""
    return why_not_here(value, kernel_size) or too_large("value", value) or too_large("logits", logits)


def why_not_here(value: Tensor, kernel_size: int) -> str | None:
    """None where kernels of this kind support the dtype and device of `value` and such windows, otherwise the reason."""
    if value.dtype not in _DTYPES:
        given = str(value.dtype).removeprefix("torch.")
        return f"its kernels compute in float32, bfloat16 and float16, the tensors are {given}"
    if is_interpreted():
        if value.device.type != "cpu":
            return f"under TRITON_INTERPRET=1 it computes on CPU tensors, these are on {value.device.type}"
    elif value.device.type != "cuda":
        return f"it computes on CUDA devices, the tensors are on {value.device.type}"
    elif not torch.cuda.is_available():  # fake tensors are on any device
        return "there is no GPU here"
    elif torch.cuda.get_device_properties(value.device).major < 8:  # a constant to torch.compile
        return "it needs a GPU of compute capability 8.0 or newer"
    if kernel_size > _LARGEST_KERNEL:
        return f"its kernels hold the windows in registers, up to {_LARGEST_KERNEL} x {_LARGEST_KERNEL} tokens"
    return None


def too_large(name: str, x: Tensor) -> str | None:
    """Within an image offsets are 32 bit; from image to image 64 bit."""
    span = sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:]))
    if max(span, math.prod(x.shape[1:])) >= 2**31:
        return f"one image of {name} spans more than 2**31 elements"
    return None


_INTERPRETED = not isinstance(_mix_kernel, triton.JITFunction)  # a constant: torch.compile asks too


def is_interpreted() -> bool:
    """Whether the kernels run through Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return _INTERPRETED


def _dense_inside(x: Tensor, dims: int) -> Tensor:
    """x, or a copy of it, whose last `dims` dimensions are contiguous. Anything goes for the others."""
    expected = 1
    for size, step in zip(reversed(x.shape[-dims:]), reversed(x.stride()[-dims:])):
        if size != 1 and step != expected:
            return x.contiguous()
        expected *= size
    return x


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _mix(
    src: Tensor, logits: Tensor, sums: Tensor | None, kernel_size: int, stride: int, padding: int, scale: float,
    tiling: Tiling | None,
) -> Tensor:  # fmt: skip
    B, H, W, heads, head_dim = src.shape
    _, h, w, _, _, _ = logits.shape
    out = torch.empty(src.shape, dtype=src.dtype, device=src.device)
    steps = -(-(H + padding) // stride)
    tiling = tiling or choose_tiling(
        src.dtype, head_dim, kernel_size, stride, padding, num_columns=B * heads * W, num_steps=steps
    )
    cells_x = -(-W // stride)
    grid = -(-B * heads * cells_x // tiling.cells), -(-steps // tiling.rows_per_program)
    with _on(src):
        _mix_kernel[grid](
            src, logits, *((src, src) if sums is None else (sums[0], sums[-1])), out,
            B, H, W, heads, h, w, cells_x, tiling.rows_per_program, scale,
            *src.stride()[:4], *logits.stride()[:4],
            kernel_size, stride, padding, head_dim, scale < 0, src.dtype == torch.float32, sums is not None,
            *_constants(tiling), is_interpreted() and src.dtype == torch.bfloat16,
            num_warps=tiling.num_warps, num_stages=1,
        )  # fmt: skip
    return out


def forward(
    value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float,
    *, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Outlook attention, shapes as in `volo.ops.outlook_attention`, inputs for which `why_not` answers None.

    Sums in float32; with 16-bit inputs the softmax is rounded to their dtype before it meets the values, as in the
    reference. Returns a contiguous tensor.
    """
    if value.numel() == 0:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return _mix(_dense_inside(value, 1), _dense_inside(logits, 2), None, kernel_size, stride, padding, scale, tiling)


def backward(
    grad_out: Tensor, value: Tensor, logits: Tensor, kernel_size: int, stride: int, padding: int, scale: float,
    *, tiling: Tiling | None = None, logits_tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `value` and `logits`, both contiguous; the softmax is computed again from the logits."""
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if value.numel() == 0:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device), grad_logits
    B, H, W, heads, head_dim = value.shape
    _, h, w, _, taps, _ = logits.shape
    grad_out = _dense_inside(grad_out.to(value.dtype), 1)
    value, logits = _dense_inside(value, 1), _dense_inside(logits, 2)
    is_split = value.dtype == torch.float32
    sums = torch.empty(1 + is_split, B, h, w, heads, taps, dtype=torch.float32, device=value.device)
    reached = stride * (w - 1) + kernel_size  # columns of tokens under the windows, those outside the grid included
    logits_tiling = logits_tiling or choose_tiling(
        value.dtype, head_dim, kernel_size, stride, 0, keeps_sums=False, num_columns=B * heads * reached, num_steps=h
    )
    cells_x = -(-reached // stride)
    grid = -(-B * heads * cells_x // logits_tiling.cells), -(-h // logits_tiling.rows_per_program)
    with _on(value):
        _grad_logits_kernel[grid](
            grad_out, value, logits, sums[0], sums[-1], grad_logits,
            B, H, W, heads, h, w, cells_x, logits_tiling.rows_per_program, scale,
            *grad_out.stride()[:4], *value.stride()[:4], *logits.stride()[:4],
            kernel_size, stride, padding, head_dim, scale < 0, is_split, max((taps - 1).bit_length(), 1),
            *_constants(logits_tiling), is_interpreted() and value.dtype == torch.bfloat16,
            num_warps=logits_tiling.num_warps, num_stages=1,
        )  # fmt: skip
    return _mix(grad_out, logits, sums, kernel_size, stride, padding, scale, tiling), grad_logits
