"""Outlook attention on GPUs from packed logits (`volo.ops.packed`): one kernel for each pass, which waits for memory once
a step.

A program walks down the grid as the kernels of `triton_kernels` do, whose words these comments use, with three
differences. It asks for all that the next step reads before it computes with what the last step asked for. Rows of logits
come in wide loads: row by row the first logits of each are aligned in packed logits. And one kernel computes both
gradients: in a step, a cell's lanes are the query places of its region instead of its tokens, so that a lane holds the
softmax of a query in each window; products of gradients with values over the region give the gradient of its logits, and
the same softmax, transposed by a second product, what its gradient adds to each value. Nothing passes from kernel to
kernel.

16-bit numbers are loaded two at a time, as 32-bit words, and told apart where they are used: numbers that wait for the
next step in halves of registers would each cost an instruction at every turn of the loop.
"""

# Kernels build tuples in unrolled loops, whose types change from turn to turn.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from volo.ops import triton_kernels
from volo.ops.packed import packed_width
from volo.ops.triton_kernels import (
    _LOG2_E,
    _UNSPECIALISED,
    Tiling,
    _cell,
    _constants,
    _on,
    _power_of_two,
    _power_of_two_below,
    _product,
    _stack,
    _unstack,
    choose_tiling,
    is_interpreted,
)  # fmt: skip

# ---- parts of kernels ----


@triton.jit
def _words(pointer):
    """The same place, read 32 bits at a time."""
    if pointer.dtype.element_ty == tl.float32:
        words = pointer
    else:
        words = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    return words


@triton.jit
def _numbers(words, dtype: tl.constexpr):
    """[..., n] words -> [..., n, 1 or 2] numbers."""
    if dtype == tl.float32:
        numbers = tl.expand_dims(words, -1)
    else:
        numbers = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16)).to(dtype, bitcast=True)
    return numbers


@triton.jit
def _load_row(row, rest, there, TAPS: tl.constexpr, PER_WORD: tl.constexpr):
    """One row of packed logits a lane, not yet taken apart: TAPS // 8 times words [ROWS, 8 / PER_WORD], the last [ROWS]."""
    word = tl.arange(0, 8 // PER_WORD)
    parts = ()
    for n in tl.static_range(TAPS // 8):
        parts += (tl.load(_words(row + 8 * n)[:, None] + word[None, :], mask=there[:, None], other=0),)
    parts += (tl.load(rest, mask=there, other=0),)
    return parts


@triton.jit
def _softmax(parts, m: tl.constexpr, there, factor, FALLING: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr):
    """Softmax of the m-th row of each lane in `parts`, as TAPS times [ROWS]; zero where not `there`.

    FALLING says that factor is negative. The largest is subtracted before the multiplication, so that large logits lose
    nothing.
    """
    CHUNKS: tl.constexpr = TAPS // 8
    rest = parts[m * (CHUNKS + 1) + CHUNKS]
    x = ()
    for n in tl.static_range(CHUNKS):
        numbers = _numbers(parts[m * (CHUNKS + 1) + n], rest.dtype)
        x += _unstack(tl.reshape(numbers, (ROWS, 8)), ROWS, 3)
    x += (rest,)
    y = ()
    for t in tl.static_range(TAPS):
        y += (x[t].to(tl.float32),)
    top = y[0]
    for t in tl.static_range(1, TAPS):
        top = tl.minimum(top, y[t]) if FALLING else tl.maximum(top, y[t])
    total = tl.zeros_like(top)
    e = ()
    for t in tl.static_range(TAPS):
        e += (tl.exp2((y[t] - top) * factor),)
        total += e[t]
    inverse = tl.where(there, 1.0 / total, 0.0)
    p = ()
    for t in tl.static_range(TAPS):
        p += (e[t] * inverse,)
    return p


@triton.jit
def _load_step(
    i, stop, at, to, step_y, there, height, S: tl.constexpr, P: tl.constexpr, SPAN: tl.constexpr, REGION: tl.constexpr,
    WORDS: tl.constexpr, PADDED_WORDS: tl.constexpr,
):  # fmt: skip
    """Words of the tokens that window row i reads, if it is before `stop`: [CELLS, REGION, PADDED_WORDS]."""
    y = i * S - P + tl.arange(0, REGION) // SPAN
    there &= ((y >= 0) & (y < height) & (i < stop))[None, :]
    word = tl.arange(0, PADDED_WORDS)
    return tl.load(
        _words(at[:, None] + to + (y * step_y)[None, :])[:, :, None] + word[None, None, :],
        mask=there[:, :, None] & (word < WORDS)[None, None, :],
        other=0,
    )


@triton.jit
def _load_rows(
    i, row_at, row_offset, ok, column, row_j, rest, window_cols, logits_i, logits_j,
    K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr, WINDOWS: tl.constexpr, PER_WORD: tl.constexpr,
):  # fmt: skip
    """A lane's rows of logits in the windows of row i, for lanes that are `ok`. In the first of these windows `column` is
    that of its query, `row_offset` where the row stands among the rows of a window."""
    rows = ()
    for m in tl.static_range(WINDOWS):
        at = row_at + i * logits_i + (row_j + (m + FIRST)) * logits_j
        there = ok & _is_in_window(m, column, row_j, window_cols, K, S, FIRST)
        offset = row_offset - S * m
        rows += _load_row(at + offset * (K * K // 8 * 8), at + rest + offset, there, K * K, PER_WORD)
    return rows


@triton.jit
def _is_in_window(m: tl.constexpr, column, row_j, window_cols, K: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr):
    window = row_j + (m + FIRST)
    return (column >= S * m) & (column < S * m + K) & (window >= 0) & (window < window_cols)


# ---- kernels ----


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _forward_kernel(
    value, logits, out,
    batch, height, width, heads, window_rows, window_cols, cells_x, rows_per_program, scale,
    value_b, value_y, value_x, value_h, logits_b, logits_i, logits_j,
    K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, HEAD_DIM: tl.constexpr, FALLING: tl.constexpr,
    PER_WORD: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, WINDOWS: tl.constexpr, SPAN: tl.constexpr, RING: tl.constexpr,
    LEVELS: tl.constexpr, D: tl.constexpr, CELLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over windows and taps of softmax(logits)[token, tap] * value[tap]."""
    TAPS: tl.constexpr = K * K
    REGION: tl.constexpr = 2**LEVELS  # K * SPAN taps, padded
    TOKENS: tl.constexpr = RING * COLUMNS
    ROWS: tl.constexpr = CELLS * TOKENS
    factor = scale * _LOG2_E
    rest = heads * (TAPS * (TAPS // 8 * 8))  # where the last logit of each row begins

    # What a cell reads: [CELLS, REGION] places.
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    b, head, j = _cell(cell, heads, cells_x)
    tap = tl.arange(0, REGION)
    channel = tl.arange(0, D)
    x = (j * S + S * FIRST - P)[:, None] + (tap % SPAN)[None, :]
    value_ok = (b < batch)[:, None] & (tap < K * SPAN)[None, :] & (x >= 0) & (x < width)
    value_at = value + b.to(tl.int64) * value_b + head * value_h
    value_to = x * value_x

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
    row_at = logits + row_b.to(tl.int64) * logits_b
    row_column += P - S * FIRST  # in the first window
    row_offset = row_head * TAPS + row_column

    # Rows are counted from the first that a window reaches, P above the grid. After step i the first S rows of window
    # row i are complete. Steps before `first` only bring in what they give to rows from there on.
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, (height + P + S - 1) // S)
    begin = tl.maximum(first - (K - 1) // S, 0)
    stop = tl.minimum(last, window_rows)

    # Every load is for the next step, and takes the registers that have just become free.
    row_a = (row_slot - begin * S) & (RING - 1)  # where the window has the row
    rows_ok = row_ok & (row_a < K) & (begin < stop)
    rows = _load_rows(
        begin, row_at, row_offset + row_a * K, rows_ok, row_column, row_j, rest, window_cols, logits_i, logits_j,
        K, S, FIRST, WINDOWS, PER_WORD,
    )  # fmt: skip
    values = _load_step(
        begin,
        stop,
        value_at,
        value_to,
        value_y,
        value_ok,
        height,
        S,
        P,
        SPAN,
        REGION,
        HEAD_DIM // PER_WORD,
        D // PER_WORD,
    )
    acc = tl.zeros((CELLS, D, TOKENS), tl.float32)
    for i in range(begin, last):
        row_a = (row_a - S) & (RING - 1)
        row_y = i * S + S + row_a
        next_ok = row_ok & (row_a < K) & (i + 1 < stop) & (row_y >= tl.maximum(first * S, P))
        next_ok &= row_y < tl.minimum(last * S, height + P)
        next_rows = _load_rows(
            i + 1, row_at, row_offset + row_a * K, next_ok, row_column, row_j, rest, window_cols, logits_i, logits_j,
            K, S, FIRST, WINDOWS, PER_WORD,
        )  # fmt: skip
        p = ()
        for m in tl.static_range(WINDOWS):
            there = rows_ok & _is_in_window(m, row_column, row_j, window_cols, K, S, FIRST)
            p += _softmax(rows, m, there, factor, FALLING, TAPS, ROWS)
        weights = ()  # of each tap of the region, summed over the windows that hold both token and tap
        for t in tl.static_range(REGION):
            weight = tl.zeros((ROWS,), tl.float32)
            for m in tl.static_range(WINDOWS):
                if t < K * SPAN and (t % SPAN >= S * m and t % SPAN < S * m + K):
                    weight += p[m * TAPS + t // SPAN * K + t % SPAN - S * m]
            weights += (weight.to(value.dtype.element_ty),)
        attn = tl.reshape(_stack(weights, ROWS, LEVELS), (CELLS, TOKENS, REGION))
        numbers = tl.reshape(_numbers(values, value.dtype.element_ty), (CELLS, REGION, D))
        # Channels first: the product's short side, tokens, then needs no padding beyond 8.
        acc = _product(tl.permute(numbers, (0, 2, 1)), tl.permute(attn, (0, 2, 1)), acc, UPCAST)
        values = _load_step(
            i + 1, stop, value_at, value_to, value_y, value_ok, height, S, P, SPAN, REGION,
            HEAD_DIM // PER_WORD, D // PER_WORD,
        )  # fmt: skip

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
        rows, rows_ok = next_rows, next_ok


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _backward_kernel(
    grad_out, value, logits, grad_value, grad_logits,
    batch, height, width, heads, window_rows, window_cols, cells_x, rows_per_program, scale,
    grad_b, grad_y, grad_x, grad_h, value_b, value_y, value_x, value_h, logits_b, logits_i, logits_j,
    K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, HEAD_DIM: tl.constexpr, FALLING: tl.constexpr,
    PER_WORD: tl.constexpr, PACKED_WIDTH: tl.constexpr, TOKEN_LEVELS: tl.constexpr, AHEAD: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr, WINDOWS: tl.constexpr, SPAN: tl.constexpr, RING: tl.constexpr,
    LEVELS: tl.constexpr, D: tl.constexpr, CELLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_value[tap] = sum over windows and tokens of softmax(logits)[token, tap] * grad_out[token], and
    grad_logits = scale * softmax * (g - sum(softmax * g)), where g is grad_out of the query times value of the key.

    Cell j owns the tokens of the forward kernel's cell and the window with its own number.
    """
    TAPS: tl.constexpr = K * K
    WIDE: tl.constexpr = TAPS // 8 * 8
    REGION: tl.constexpr = 2**LEVELS
    TOKENS: tl.constexpr = RING * COLUMNS
    ROWS: tl.constexpr = CELLS * REGION
    WORDS: tl.constexpr = HEAD_DIM // PER_WORD
    PADDED_WORDS: tl.constexpr = D // PER_WORD
    factor = scale * _LOG2_E
    rest = heads * (TAPS * WIDE)  # where the last logit of each row begins

    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    b, head, j = _cell(cell, heads, cells_x)
    tap = tl.arange(0, REGION)
    channel = tl.arange(0, D)
    x = (j * S + S * FIRST - P)[:, None] + (tap % SPAN)[None, :]
    region_ok = (b < batch)[:, None] & (tap < K * SPAN)[None, :] & (x >= 0) & (x < width)
    value_at = value + b.to(tl.int64) * value_b + head * value_h
    grad_at = grad_out + b.to(tl.int64) * grad_b + head * grad_h
    value_to, grad_to = x * value_x, x * grad_x

    token = tl.arange(0, TOKENS)
    out_x = j[:, None] * S + (token % COLUMNS)[None, :]
    out_ok = (b < batch)[:, None] & (token % COLUMNS < S)[None, :] & (out_x < width)
    out_at = (grad_value + (b.to(tl.int64) * height * width * heads + head) * HEAD_DIM)[:, None]
    out_at += out_x * (heads * HEAD_DIM)

    # Rows of logits, one a lane: [ROWS] = (cell, query place in the region).
    row = tl.arange(0, ROWS)
    row_b, row_head, row_j = _cell(tl.program_id(0) * CELLS + row // REGION, heads, cells_x)
    row_column = row % REGION % SPAN
    row_ok = (row_b < batch) & (row % REGION < K * SPAN)
    row_offset = row_head * TAPS + row % REGION // SPAN * K + row_column  # in window m: S * m less
    row_at = logits + row_b.to(tl.int64) * logits_b
    to = grad_logits + row_b.to(tl.int64) * window_rows * window_cols * PACKED_WIDTH
    eight = tl.arange(0, 8)
    gap_at = heads * (TAPS * TAPS) + row % REGION
    gap_ok = (row_b < batch) & (row_head == 0) & (gap_at < PACKED_WIDTH)

    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, (height + P + S - 1) // S)
    begin = tl.maximum(first - (K - 1) // S, 0)
    stop = tl.minimum(last, window_rows)
    if AHEAD:
        grads = _load_step(
            begin, stop, grad_at, grad_to, grad_y, region_ok, height, S, P, SPAN, REGION, WORDS, PADDED_WORDS
        )
        values = _load_step(
            begin, stop, value_at, value_to, value_y, region_ok, height, S, P, SPAN, REGION, WORDS, PADDED_WORDS
        )
        rows = _load_rows(
            begin, row_at, row_offset, row_ok & (begin < stop), row_column, row_j, rest, window_cols, logits_i, logits_j,
            K, S, FIRST, WINDOWS, PER_WORD,
        )  # fmt: skip
    acc = tl.zeros((CELLS, D, TOKENS), tl.float32)
    for i in range(begin, last):
        next_i = i + 1 if AHEAD else i
        next_grads = _load_step(
            next_i, stop, grad_at, grad_to, grad_y, region_ok, height, S, P, SPAN, REGION, WORDS, PADDED_WORDS
        )
        next_values = _load_step(
            next_i, stop, value_at, value_to, value_y, region_ok, height, S, P, SPAN, REGION, WORDS, PADDED_WORDS
        )
        next_rows = _load_rows(
            next_i, row_at, row_offset, row_ok & (next_i < stop), row_column, row_j, rest, window_cols, logits_i, logits_j,
            K, S, FIRST, WINDOWS, PER_WORD,
        )  # fmt: skip
        if not AHEAD:
            grads, values, rows = next_grads, next_values, next_rows
        grad_numbers = tl.reshape(_numbers(grads, value.dtype.element_ty), (CELLS, REGION, D))
        value_numbers = tl.reshape(_numbers(values, value.dtype.element_ty), (CELLS, REGION, D))
        products = _product(
            grad_numbers, tl.permute(value_numbers, (0, 2, 1)), tl.zeros((CELLS, REGION, REGION), tl.float32), UPCAST
        )
        g = _unstack(tl.reshape(products, (ROWS, REGION)), ROWS, LEVELS)

        added = ()  # what a lane's query gives to each token of the cell; row slots as if this were step 0
        for _ in tl.static_range(TOKENS):
            added += (tl.zeros((ROWS,), tl.float32),)
        for m in tl.static_range(WINDOWS):
            there = row_ok & (i < stop) & _is_in_window(m, row_column, row_j, window_cols, K, S, FIRST)
            p = _softmax(rows, m, there, factor, FALLING, TAPS, ROWS)
            sums = ()
            for n in tl.static_range(TOKENS):
                if (
                    n // COLUMNS < K
                    and n % COLUMNS < S
                    and (n % COLUMNS + P - S * (m + FIRST) >= 0 and n % COLUMNS + P - S * (m + FIRST) < K)
                ):
                    sums += (added[n] + p[n // COLUMNS * K + n % COLUMNS + P - S * (m + FIRST)],)
                else:
                    sums += (added[n],)
            added = sums
            if m == -FIRST:
                mean = tl.zeros((ROWS,), tl.float32)
                for t in tl.static_range(TAPS):
                    mean += p[t] * g[t // K * SPAN + t % K + S * m]
                parts = ()
                for t in tl.static_range(TAPS):
                    part = p[t] * (g[t // K * SPAN + t % K + S * m] - mean) * scale
                    parts += (part.to(grad_logits.dtype.element_ty),)
                there &= i >= first
                at = to + (i * window_cols + row_j) * PACKED_WIDTH
                for n in tl.static_range(TAPS // 8):
                    eighth = ()
                    for t in tl.static_range(8):
                        eighth += (parts[8 * n + t],)
                    tl.store(
                        (at + (row_offset - S * m) * WIDE + 8 * n)[:, None] + eight[None, :],
                        _stack(eighth, ROWS, 3),
                        mask=there[:, None],
                    )
                tl.store(at + rest + row_offset - S * m, parts[TAPS - 1], mask=there)
                # The gap behind the logits of a window: whoever multiplies with these gradients reads it.
                there = gap_ok & (i < stop) & (i >= first) & (row_j < window_cols)
                tl.store(at + gap_at, tl.zeros((ROWS,), grad_logits.dtype.element_ty), mask=there)

        weights = ()
        for n in tl.static_range(TOKENS):
            weight = added[n]
            for turn in tl.static_range(1, RING):
                if turn % (S & -S) == 0:
                    turned = added[(n // COLUMNS - turn) % RING * COLUMNS + n % COLUMNS]
                    weight = tl.where(((i * S) & (RING - 1)) == turn, turned, weight)
            weights += (weight.to(value.dtype.element_ty),)
        attn = tl.reshape(_stack(weights, ROWS, TOKEN_LEVELS), (CELLS, REGION, TOKENS))
        acc = _product(tl.permute(grad_numbers, (0, 2, 1)), attn, acc, UPCAST)

        a = (token // COLUMNS - i * S) & (RING - 1)
        is_complete = a < S
        y = i * S + a - P
        ok = out_ok & (is_complete & (y >= 0) & (y < height) & (i >= first))[None, :]
        tl.store(
            (out_at + (y * (width * heads * HEAD_DIM))[None, :])[:, None, :] + channel[None, :, None],
            acc.to(grad_value.dtype.element_ty),
            mask=ok[:, None, :] & (channel < HEAD_DIM)[None, :, None],
        )
        acc = tl.where(is_complete[None, None, :], 0.0, acc)
        if AHEAD:
            grads, values, rows = next_grads, next_values, next_rows


# ---- calls ----


def why_not(value: Tensor, grid: tuple[int, ...], kernel_size: int, stride: int, padding: int) -> str | None:
    """None where the kernels support these values with packed logits of `grid` windows, otherwise the reason why not."""
    if kernel_size % 2 == 0 or kernel_size == 1:
        return f"packed logits are for windows of 3 x 3 or 5 x 5 tokens, not {kernel_size} x {kernel_size}"
    heads, head_dim = value.shape[3:]
    if head_dim % 2 and value.dtype != torch.float32:
        return f"it loads 16-bit numbers in pairs, and head_dim is {head_dim}"
    if math.prod(grid) * packed_width(heads, kernel_size) >= 2**31:
        return "one image of logits spans more than 2**31 elements"
    return triton_kernels.why_not_here(value, kernel_size) or triton_kernels.too_large("value", value)


def _in_words(x: Tensor) -> Tensor:
    """x, or a copy of it, whose last dimension is dense and whose rows begin at whole words."""
    steps = x.stride()[:-1]
    is_whole = x.element_size() == 4 or (all(step % 2 == 0 for step in steps) and x.data_ptr() % 4 == 0)
    return x if x.stride(-1) == 1 and is_whole else x.contiguous()


def choose_packed_tiling(
    dtype: torch.dtype, head_dim: int, kernel_size: int, stride: int, padding: int, *, is_backward: bool = False,
    num_columns: int = 0, num_steps: int = 1,
) -> Tiling:  # fmt: skip
    """The tiling for a geometry, as `triton_kernels.choose_tiling`. It decides speed only, never a result."""
    tiling = choose_tiling(dtype, head_dim, kernel_size, stride, padding)
    if is_backward:
        # A lane for each place of the region; and registers for values, gradients and their products, which in float32 are
        # made of single multiplications, out of registers too.
        region = 2**tiling.levels
        numbers = 2 * region * (tiling.padded_head_dim * dtype.itemsize / 4 + region)
        share = max(region / 32, numbers / (1536 if dtype == torch.float32 else 4096))
        cells, num_warps = _power_of_two_below(1 / share), min(_power_of_two(math.ceil(share)), 8)
        tiling = replace(tiling, cells=cells, num_warps=num_warps)
    # About 1450 programs run at once on the largest GPUs. A walk begins with work that is worth a step or two, so that long
    # ones pay.
    num_programs = -(-num_columns // (stride * tiling.cells))
    walks = min(max(4096 // max(num_programs, 1), 1), -(-num_steps // 4))
    return replace(tiling, rows_per_program=-(-num_steps // walks))


def _tiling(value: Tensor, kernel_size: int, stride: int, padding: int, windows: int, *, is_backward: bool) -> Tiling:
    B, H, W, heads, head_dim = value.shape
    return choose_packed_tiling(
        value.dtype, head_dim, kernel_size, stride, padding, is_backward=is_backward,
        num_columns=B * heads * stride * _num_cells(W, stride, windows), num_steps=-(-(H + padding) // stride),
    )  # fmt: skip


def most_registers(dtype: torch.dtype, head_dim: int, kernel_size: int, *, is_backward: bool) -> int | None:
    """The most registers of a lane, where it is known that so few suffice: more programs then run at a time."""
    if kernel_size != 3 or head_dim > 32 or (is_backward and dtype == torch.float32):
        return None
    return 184 if is_backward else 176  # for 11 warps on a multiprocessor


def _num_cells(width: int, stride: int, windows: int) -> int:
    """In a row: as many as hold all tokens, and as many as there are windows."""
    return max(-(-width // stride), windows)


def forward(
    value: Tensor, packed: Tensor, kernel_size: int, stride: int, padding: int, scale: float,
    *, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Outlook attention of packed logits, for inputs for which `why_not` answers None.

    Args:
        value: [B, H, W, heads, head_dim], as in `volo.ops.outlook_attention`.
        packed: [B, h, w, packed_width(heads, kernel_size)].

    Returns a contiguous tensor like `value`. Sums in float32; with 16-bit inputs the softmax is rounded to their dtype before
    it meets the values, as in the reference.
    """
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    if value.numel() == 0:
        return out
    B, H, W, heads, head_dim = value.shape
    h, w = packed.shape[1:3]
    value, packed = _in_words(value), _in_words(packed)
    tiling = tiling or _tiling(value, kernel_size, stride, padding, w, is_backward=False)
    cells_x, steps = -(-W // stride), -(-(H + padding) // stride)
    grid = -(-B * heads * cells_x // tiling.cells), -(-steps // tiling.rows_per_program)
    with _on(value):
        _forward_kernel[grid](
            value, packed, out, B, H, W, heads, h, w, cells_x, tiling.rows_per_program, scale,
            *value.stride()[:4], *packed.stride()[:3],
            kernel_size, stride, padding, head_dim, scale < 0, 4 // value.element_size(),
            *_constants(tiling), is_interpreted() and value.dtype == torch.bfloat16,
            num_warps=tiling.num_warps, num_stages=1,
            maxnreg=most_registers(value.dtype, head_dim, kernel_size, is_backward=False),
        )  # fmt: skip
    return out


def backward(
    grad_out: Tensor, value: Tensor, packed: Tensor, kernel_size: int, stride: int, padding: int, scale: float,
    *, tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `value` and `packed`, both contiguous, zero in the gap; the softmax is computed again."""
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    grad_packed = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    if value.numel() == 0:
        return grad_value, grad_packed.zero_()
    B, H, W, heads, head_dim = value.shape
    h, w, width = packed.shape[1:]
    grad_out, value, packed = _in_words(grad_out.to(value.dtype)), _in_words(value), _in_words(packed)
    tiling = tiling or _tiling(value, kernel_size, stride, padding, w, is_backward=True)
    cells_x, steps = _num_cells(W, stride, w), -(-(H + padding) // stride)
    grid = -(-B * heads * cells_x // tiling.cells), -(-steps // tiling.rows_per_program)
    with _on(value):
        _backward_kernel[grid](
            grad_out, value, packed, grad_value, grad_packed,
            B, H, W, heads, h, w, cells_x, tiling.rows_per_program, scale,
            *grad_out.stride()[:4], *value.stride()[:4], *packed.stride()[:3],
            kernel_size, stride, padding, head_dim, scale < 0, 4 // value.element_size(), width,
            (tiling.ring * tiling.columns - 1).bit_length(), value.element_size() == 2,
            *_constants(tiling), is_interpreted() and value.dtype == torch.bfloat16,
            num_warps=tiling.num_warps, num_stages=1,
            maxnreg=most_registers(value.dtype, head_dim, kernel_size, is_backward=True),
        )  # fmt: skip
    return grad_value, grad_packed
