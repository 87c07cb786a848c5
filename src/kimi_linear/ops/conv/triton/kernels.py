"""The short convolution's kernels: a vector of channels sweeps a run of rows, the last inputs in registers.

Rows are those of layout.py: a sequence's segment is its history, W - 1 rows, then its tokens, so that row q holds token
q - (W - 1), and token q meets rows q to q + W - 1. Runs cut the rows of all segments whatever sequences they belong to;
a program sweeps the pieces of segments in its run one after the other. PAST is W - 1.

A sweep loads GROUP rows before it uses the first: nothing else hides how long a load takes.
"""

# The kernel language joins tuples with + alone, whatever their lengths.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from kimi_linear.ops.triton.device import save


@triton.jit
def find_segment(cu_seqlens, row, T, N, PAST: tl.constexpr, PACKED: tl.constexpr):
    """Return the sequence whose segment holds a row, the segment's first row, its first token, and its length."""
    if PACKED:
        low = tl.full((), 0, tl.int64)
        high = low + N
        while high - low > 1:
            middle = (low + high) // 2
            after = tl.load(cu_seqlens + middle).to(tl.int64) + middle * PAST <= row
            low, high = tl.where(after, middle, low), tl.where(after, high, middle)
        token = tl.load(cu_seqlens + low).to(tl.int64)
        length = tl.load(cu_seqlens + low + 1).to(tl.int64) - token
        return low, token + low * PAST, token, length
    n = row // (T + PAST)
    return n, n * (T + PAST), n * T, tl.cast(T, tl.int64)


@triton.jit
def load_taps(weight, c, inside, W: tl.constexpr):
    """Return the taps of channels c, W vectors."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight + c * W + j, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_input(x, initial, q, count, stride, c, inside, PAST: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """Return row q of a segment of `count` rows, zero outside of it; x and initial point to the sequence's own."""
    token = tl.load(x + (q - PAST) * stride + c, mask=inside & (q >= PAST) & (q < count), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        past = tl.load(initial + c * PAST + q, mask=inside & (q >= 0) & (q < PAST), other=0.0).to(tl.float32)
        token = tl.where(q < PAST, past, token)
    return token


@triton.jit
def load_group(x, q, end, stride, c, inside, GROUP: tl.constexpr):
    """Return rows q to q + GROUP - 1 of x as they are, zero from row `end` on."""
    rows = ()
    for i in tl.static_range(GROUP):
        rows = rows + (tl.load(x + (q + i) * stride + c, mask=inside & (q + i < end), other=0.0),)
    return rows


@triton.jit
def correlate(window, taps, W: tl.constexpr):
    """Return sum_j taps[j] * window[j]."""
    y = taps[0] * window[0]
    for j in tl.static_range(1, W):
        y = tl.fma(taps[j], window[j], y)
    return y


@triton.jit(do_not_specialize=["T", "N", "ROWS", "RUN"])
def forward_kernel(
    x, weight, initial, cu_seqlens, y, final,
    T, N, ROWS, RUN, x_sequence, x_token,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write y and the final states, the last W - 1 rows of every segment. Grid: channel blocks, innermost, * runs."""
    PAST: tl.constexpr = W - 1
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % BLOCKS).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = c < D
    taps = load_taps(weight, c, inside, W)
    row = pid // BLOCKS * RUN
    last = tl.minimum(row + RUN, ROWS)
    while row < last:
        n, first, token, length = find_segment(cu_seqlens, row, T, N, PAST, PACKED)
        begin, end = tl.maximum(row - first, 0), tl.minimum(last - first, length + PAST)
        # Offsets that leave tokens out must not keep a program here.
        row = tl.maximum(first + end, row + 1)
        own = x + n * x_sequence
        if PACKED:
            own = x + token * x_token
        history = initial
        if HAS_INITIAL:
            history = initial + n * D * PAST
        start = tl.maximum(begin, PAST)
        window = ()
        for i in tl.static_range(PAST):
            q = start - PAST + i
            window = window + (load_input(own, history, q, length + PAST, x_token, c, inside, PAST, HAS_INITIAL),)
        for at in range(start, end, GROUP):
            rows = load_group(own - PAST * x_token, at, end, x_token, c, inside, GROUP)
            for i in tl.static_range(GROUP):
                window = window + (rows[i].to(tl.float32),)
                z = correlate(window, taps, W)
                if SILU:
                    z = z * tl.sigmoid(z)
                save(y + (token + at + i - PAST) * D + c, z, inside & (at + i < end))
                window = window[1:]
        if end > length:
            for i in tl.static_range(PAST):
                q = length + i
                u = load_input(own, history, q, length + PAST, x_token, c, inside, PAST, HAS_INITIAL)
                save(final + (n * D + c) * PAST + i, u, inside & (q >= begin) & (q < end))


@triton.jit
def silu_gradient(z, d_y, SILU: tl.constexpr):
    """Return d_y silu'(z), silu'(z) = s + z s (1 - s), s = sigmoid(z); d_y without SILU."""
    if SILU:
        s = tl.sigmoid(z)
        return d_y * (s + z * s * (1.0 - s))
    return d_y


@triton.jit(do_not_specialize=["T", "N", "ROWS", "RUN"])
def backward_kernel(
    d_y, d_final, x, weight, initial, cu_seqlens, d_x, d_initial, d_taps,
    T, N, ROWS, RUN, x_sequence, x_token,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the gradients of x and the histories, and of the taps those of every run, [runs, W, D].

    With z_t the pre-activation of token t and g_t its gradient, du_q = sum_j taps[j] g_{q - j}, and row q gets that of
    final state q - length too. Row q comes with token q, whose inputs, rows q to q + W - 1, are then in registers.
    Grid: as the forward's.
    """
    PAST: tl.constexpr = W - 1
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % BLOCKS).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    inside = c < D
    taps = load_taps(weight, c, inside, W)
    sums = ()
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    run = pid // BLOCKS
    row = run * RUN
    last = tl.minimum(row + RUN, ROWS)
    while row < last:
        n, first, token, length = find_segment(cu_seqlens, row, T, N, PAST, PACKED)
        begin, end = tl.maximum(row - first, 0), tl.minimum(last - first, length + PAST)
        # Offsets that leave tokens out must not keep a program here.
        row = tl.maximum(first + end, row + 1)
        own, d_own = x + n * x_sequence, d_y + token * D
        if PACKED:
            own = x + token * x_token
        history = initial
        if HAS_INITIAL:
            history = initial + n * D * PAST
        state = (n * D + c) * PAST
        # Tokens before the first row, whose gradients reach it.
        window, grads = (), ()
        for i in tl.static_range(PAST):
            q = begin - PAST + i
            window = window + (load_input(own, history, q, length + PAST, x_token, c, inside, PAST, HAS_INITIAL),)
        for i in tl.static_range(PAST):
            q = begin - PAST + i
            u = load_input(own, history, q + PAST, length + PAST, x_token, c, inside, PAST, HAS_INITIAL)
            window = window + (u,)
            d = tl.load(d_own + q * D + c, mask=inside & (q >= 0) & (q < length), other=0.0).to(tl.float32)
            grads = (silu_gradient(correlate(window, taps, W), d, SILU),) + grads
            window = window[1:]
        for at in range(begin, end, GROUP):
            rows = load_group(own, at, length, x_token, c, inside, GROUP)
            d_rows = load_group(d_own, at, length, D, c, inside, GROUP)
            for i in tl.static_range(GROUP):
                window = window + (rows[i].to(tl.float32),)
                d = silu_gradient(correlate(window, taps, W), d_rows[i].to(tl.float32), SILU)
                # Rows behind the run are the next one's.
                d = tl.where(at + i < end, d, 0.0)
                grads = (d,) + grads
                d_u = correlate(grads, taps, W)
                for j in tl.static_range(W):
                    sums = sums[:j] + (tl.fma(d, window[j], sums[j]),) + sums[j + 1 :]
                window, grads = window[1:], grads[:PAST]
                q = at + i
                if q >= length:
                    d_u += tl.load(d_final + state + q - length, mask=inside & (q < end), other=0.0).to(tl.float32)
                save(d_x + (token + q - PAST) * D + c, d_u, inside & (q >= PAST) & (q < end))
                if HAS_INITIAL:  # noqa: SIM102 - the kernel language has no short circuit
                    if q < PAST:
                        save(d_initial + state + q, d_u, inside & (q < end))
    for j in tl.static_range(W):
        tl.store(d_taps + (run * W + j) * D + c, sums[j], mask=inside)


@triton.jit(do_not_specialize=["SLOTS"])
def decode_kernel(
    x, weight, pool, slots, y,
    SLOTS, slot_stride, channel_stride, tap_stride,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve one token and move its history on; without a slot of the pool y is zero.

    A channel belongs to one thread, BLOCK being 32 times the warps, so no thread overwrites what another has yet to
    read. Grid: channel blocks, innermost, * sequences.
    """
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    n = pid // BLOCKS
    c = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = c < D
    slot = tl.load(slots + n).to(tl.int64)
    if (slot < 0) | (slot >= SLOTS):
        save(y + n * D + c, tl.zeros([BLOCK], tl.float32), inside)
        return
    history = pool + slot * slot_stride + c * channel_stride
    token = tl.load(x + n * D + c, mask=inside, other=0.0)
    kept = ()
    for i in tl.static_range(W - 1):
        kept = kept + (tl.load(history + i * tap_stride, mask=inside, other=0.0),)
    window = ()
    for i in tl.static_range(W - 1):
        window = window + (kept[i].to(tl.float32),)
    z = correlate(window + (token.to(tl.float32),), load_taps(weight, c, inside, W), W)
    if SILU:
        z = z * tl.sigmoid(z)
    save(y + n * D + c, z, inside)
    for i in tl.static_range(W - 2):
        tl.store(history + i * tap_stride, kept[i + 1], mask=inside)
    if W > 1:
        save(history + (W - 2) * tap_stride, token, inside)
