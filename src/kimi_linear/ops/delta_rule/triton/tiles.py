"""The fixed table of tiles: what a shape is compiled for."""

from dataclasses import dataclass

import torch
import triton

from kimi_linear.ops.delta_rule.triton.inputs import Inputs
from kimi_linear.ops.triton.launch import padded

# From how many programs on a chain's blocks of values are wide: about the multiprocessors of a large GPU.
PROCESSORS = 96


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and warps of each kernel."""

    # Tokens of a chunk.
    chunk: int
    # Channels of K at a time, in the preparation, and of a program that collects.
    key_block: int
    # Channels of V of a program of the chains; at a time, in the gradients of scores, and where these are collected.
    chain_block: int
    score_block: int
    value_block: int
    prepare_warps: int
    chain_warps: int
    gradient_warps: int


def tiles(inputs: Inputs, T: int, sequences: int, packed: bool) -> Tiles:
    """Return the tiles for a call, from a fixed table: nothing is tried out at the first call.

    All compile for sm_90 without a spilled register (scripts/compile_gpu.py). Half precision takes chunks of up to 64;
    float32, and more than 128 channels, less. Few heads get narrow blocks of values, so that more programs run side by
    side; that changes no result's bits, as only what a sequence does not share with others may depend on others.
    """
    K, V = padded(inputs.q.shape[2]), padded(inputs.value.shape[2])
    wide, large = inputs.value.dtype == torch.float32, max(K, V) > 128
    largest = 16 if wide else 32 if large else 64
    # The lengths of packed sequences are not known here.
    chunk = largest if packed else min(largest, max(16, triton.next_power_of_2(T)))
    # Fewer than 64 rows are products of single warps, whose operands are held in registers.
    full = chunk == 64
    # Masks of the channels take registers of their own.
    blocks = 64 if (full and inputs.q.shape[2] == K) or (large and not wide) else 32
    few = sequences * inputs.value.shape[1] * -(-V // blocks) < PROCESSORS
    return Tiles(
        chunk=chunk,
        key_block=min(K, 16 if chunk == 32 else 32),
        chain_block=min(V, blocks // 2 if few else blocks),
        score_block=min(V, 64 if full else 32),
        value_block=min(V, 64 if full else 16 if wide or chunk == 32 or not large else 32),
        prepare_warps=8 if full else 4,
        chain_warps=8 if large else 4,
        gradient_warps=8 if full else 4,
    )
