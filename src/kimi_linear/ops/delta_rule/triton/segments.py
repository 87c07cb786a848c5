"""Segments: a long sequence of few heads runs as several chains side by side, joined exactly by their affine maps.

A run of tokens maps the state entering it to A S + B. B is what the chain makes of no state, A what it makes of the
identity without values; two runs after each other are (A2 A1, A2 B1 + B2). So: A and B of every segment, side by
side, a fold over the segments that gives the state entering each, and the chain of every segment from there.
Backward likewise: dS = A^T dS' + E, with E what the reverse chain makes of no gradient of the final state.
"""

import triton
import triton.language as tl

from kimi_linear.base import env
from kimi_linear.ops.triton.device import dot

# Programs that fill a large GPU, chunks of a sequence from which segments pay, and the least chunks of a segment: its
# maps are three times the work of its chain.
PROCESSORS = 132
LONG = 64
LEAST = 16


def segment_length(programs: int, chunks: int) -> int:
    """Return the chunks of a segment, 0 for no segments, for so many programs of a chain and chunks of a sequence.

    With KIMI_LINEAR_TRITON_SEGMENTS=0 there are none: where there are, a sequence's last bits depend on how many
    sequences are in the call.
    """
    if programs == 0 or programs * 2 > PROCESSORS or chunks < LONG or not env.read("KIMI_LINEAR_TRITON_SEGMENTS"):
        return 0
    return max(LEAST, -(-chunks * programs // PROCESSORS))


@triton.jit(do_not_specialize=["HV"])
def fold_kernel(
    gain, offset, initial, entering, final, first,
    HV,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, FINAL: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S <- A S + B over a sequence's segments, writing the S that enters each; REVERSE: dS <- A^T dS + E, backwards.

    The product reads S, in blocks of BK rows, from where it was just written. Grid: value blocks * HV * N, value blocks
    innermost.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    v = (pid % BLOCKS) * BV + tl.arange(0, BV)
    row = pid // BLOCKS
    sequence, head = row // HV, row % HV
    c = tl.arange(0, KP)
    inside = (c < K)[:, None] & (v < V)[None, :]
    cell = c[:, None] * V + v[None, :]
    state = tl.zeros([KP, BV], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + row * K * V + cell, mask=inside, other=0.0)
    start, end = tl.load(first + sequence), tl.load(first + sequence + 1)
    for step in range(end - start):
        segment = start + step
        if REVERSE:
            segment = end - 1 - step
        base = segment.to(tl.int64) * HV + head
        tl.store(entering + base * K * V + cell, state, mask=inside)
        tl.debug_barrier()
        state = tl.load(offset + base * K * V + cell, mask=inside, other=0.0)
        for block in range(KP // BK):
            k = block * BK + tl.arange(0, BK)
            at = c[:, None] * K + k[None, :]
            if REVERSE:
                at = c[:, None] + k[None, :] * K
            a = tl.load(gain + base * K * K + at, mask=(c < K)[:, None] & (k < K)[None, :], other=0.0)
            rows = base * K * V + k[:, None] * V + v[None, :]
            x = tl.load(entering + rows, mask=(k < K)[:, None] & (v < V)[None, :], other=0.0)
            state += dot(a, x, True)
    if FINAL:
        tl.store(final + row * K * V + cell, state, mask=inside)
